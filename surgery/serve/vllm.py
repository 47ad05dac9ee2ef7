"""`Surgery<Parent>` in vLLM: its Llama decoder with attentions whose KV heads, norms and caches the plan decides.

A reader has no K, V nor cache: its attention names its owner's (`kv_sharing_target_layer_name`), as vLLM's Gemma-3n
does. Layers may differ in their KV heads; where vLLM cannot have it so, they are
repeated (`copies_of`), which is lossless.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import CacheConfig, VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, extract_layer_index
from vllm.platforms import current_platform

from ..runtime.layout import HeadNorm, Heads, Latent
from .latent import SurgeryServedLatent
from .support import check_cache_dtype, check_parallel, check_served, copies_of, served_layers


class SurgeryServedAttention(nn.Module):
    """Called by vLLM's Llama decoder layer in the place of its own attention; [tokens, D] in and out."""

    def __init__(
        self,
        config: Any,
        hidden_size: int,
        num_heads: int,
        max_position_embeddings: int,
        quant_config: QuantizationConfig | None = None,
        cache_config: CacheConfig | None = None,
        prefix: str = "",
        **_: Any,
    ) -> None:
        super().__init__()
        layers = {plan.layer: (site, plan, shapes) for site, plan, shapes in served_layers(config.surgery)}
        site, plan, shapes = layers[extract_layer_index(prefix)]
        copies = copies_of([plan for _, plan, _ in layers.values()])[plan.layer]
        ranks, rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
        self.owns_cache = plan.owner == plan.layer
        self.head_dim = site.head_dim
        self.heads = num_heads // ranks
        kv_heads = len(copies)
        self.kv_heads = max(1, kv_heads // ranks)
        query_part = range(rank * self.heads, (rank + 1) * self.heads)
        first = rank * self.kv_heads if kv_heads >= ranks else rank // (ranks // kv_heads)
        kv_part = copies[first : first + self.kv_heads]

        options: dict[str, Any] = {"bias": "q_proj.bias" in shapes, "quant_config": quant_config}
        if self.owns_cache:
            self.qkv_proj = QKVParallelLinear(
                hidden_size, site.head_dim, num_heads, kv_heads, prefix=f"{prefix}.qkv_proj", **options
            )
        else:
            self.q_proj = ColumnParallelLinear(
                hidden_size, num_heads * site.head_dim, prefix=f"{prefix}.q_proj", **options
            )
        self.o_proj = RowParallelLinear(
            num_heads * site.head_dim,
            hidden_size,
            bias="o_proj.bias" in shapes,
            quant_config=quant_config,
            prefix=f"{prefix}.o_proj",
        )
        self.q_norm = _norm(site.q_norm, shapes.get("q_norm.weight"), site.head_dim, query_part)
        self.k_norm = (
            _norm(site.k_norm, shapes.get("k_norm.weight"), site.head_dim, kv_part) if self.owns_cache else None
        )
        self.rotary_emb = get_rope(
            site.head_dim, max_position=max_position_embeddings, rope_parameters=config.rope_parameters
        )
        root = prefix.rsplit(f"layers.{plan.layer}.", 1)[0]
        self.attn = Attention(
            self.heads,
            site.head_dim,
            site.scale,
            num_kv_heads=self.kv_heads,
            cache_config=cache_config,
            quant_config=quant_config,
            per_layer_sliding_window=site.window,
            prefix=f"{prefix}.attn",
            kv_sharing_target_layer_name=None if self.owns_cache else f"{root}layers.{plan.owner}.self_attn.attn",
        )

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        k = v = None
        if self.owns_cache:
            qkv, _ = self.qkv_proj(hidden_states)
            width = self.kv_heads * self.head_dim
            q, k, v = qkv.split([self.heads * self.head_dim, width, width], dim=-1)
        else:
            q, _ = self.q_proj(hidden_states)
        if self.q_norm is not None:
            q = self._by_head(self.q_norm, q)
        if self.k_norm is not None and k is not None:
            k = self._by_head(self.k_norm, k)
        q, k = self.rotary_emb(positions, q, k)
        output, _ = self.o_proj(self.attn(q, k, v))
        return output

    def _by_head(self, norm: nn.Module, x: Tensor) -> Tensor:
        return norm(x.unflatten(-1, (-1, self.head_dim)).contiguous()).flatten(-2)


class HeadGains(nn.Module):
    """RMS norm with a gain for each of the rank's heads."""

    def __init__(self, norm: HeadNorm, shape: tuple[int, ...], head_dim: int, part: Iterable[int]) -> None:
        super().__init__()
        self.norm = RMSNorm(head_dim, eps=norm.eps, has_weight=False)
        self.weight = _part(shape, part)

    def forward(self, x_TNH: Tensor) -> Tensor:
        return self.norm(x_TNH) * self.weight


def _norm(norm: HeadNorm | None, shape: tuple[int, ...] | None, head_dim: int, part: Iterable[int]) -> nn.Module | None:
    if norm is None:
        return None
    if shape is None or len(shape) == 1:
        return RMSNorm(head_dim, eps=norm.eps, has_weight=shape is not None)
    return HeadGains(norm, shape, head_dim, part)


def _part(shape: tuple[int, ...], part: Iterable[int]) -> nn.Parameter:
    """Rows `part` of a parameter that has one per head."""
    rows = list(part)
    parameter = nn.Parameter(torch.empty(len(rows), *shape[1:]), requires_grad=False)

    def load(target: Tensor, whole: Tensor) -> None:
        target.data.copy_(whole[rows])

    parameter.weight_loader = load  # type: ignore[attr-defined]
    return parameter


def served_attention(config: Any, prefix: str = "", **options: Any) -> nn.Module:
    """The attention of one layer: of heads, or of latents."""
    layers = {plan.layer: (site, plan, shapes) for site, plan, shapes in served_layers(config.surgery)}
    site, plan, shapes = layers[extract_layer_index(prefix)]
    if isinstance(plan.project, Latent):
        return SurgeryServedLatent(config, site, plan, shapes, prefix)
    return SurgeryServedAttention(config=config, prefix=prefix, **options)


class SurgeryDecoderLayer(LlamaDecoderLayer):
    def __init__(self, vllm_config: VllmConfig, prefix: str = "", config: Any = None) -> None:
        super().__init__(vllm_config, prefix=prefix, config=config, attn_layer_type=served_attention)


def _check_latents(vllm_config: VllmConfig) -> None:
    """Refuse what the plain torch of `SurgeryServedLatent` does not do."""
    parallel = vllm_config.parallel_config
    if parallel.tensor_parallel_size > 1 or parallel.pipeline_parallel_size > 1:
        raise ValueError("latents are served by one rank: leave out tensor and pipeline parallelism")
    if vllm_config.quant_config is not None:
        raise ValueError("latents are served with weights that are not quantised")
    if not current_platform.is_cpu() and not vllm_config.model_config.enforce_eager:
        raise ValueError("latents are read in plain torch, which no CUDA graph records: add --enforce-eager")


class SurgeryForCausalLM(LlamaForCausalLM):
    """What vLLM builds for each `Surgery<Parent>` of `PLUGIN_PARENTS`."""

    supports_lora = False  # adapters name q_proj, k_proj and v_proj of every layer; readers have no k_proj

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        check_served(config)
        plans = [plan for _, plan, _ in served_layers(config.surgery)]
        check_cache_dtype(plans, vllm_config.cache_config.cache_dtype, current_platform.is_cpu())
        parallel = vllm_config.parallel_config
        if any(isinstance(plan.project, Latent) for plan in plans):
            _check_latents(vllm_config)
        check_parallel(plans, config.num_attention_heads, parallel.tensor_parallel_size)
        if parallel.pipeline_parallel_size > 1 and any(plan.lenders for plan in plans):
            raise ValueError("layers share caches, and pipeline stages do not: use tensor parallelism instead")
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=SurgeryDecoderLayer)
        self.surgery_plans = plans
        stacked: dict[str, Any] = {".gate_proj": (".gate_up_proj", 0), ".up_proj": (".gate_up_proj", 1)}
        for plan in plans:
            if plan.owner == plan.layer and isinstance(plan.project, Heads):
                at = f"layers.{plan.layer}.self_attn"
                stacked |= {f"{at}.{x}_proj.": (f"{at}.qkv_proj.", x) for x in "qkv"}
        self.model.hf_to_vllm_mapper = WeightsMapper(orig_to_new_stacked=stacked)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        return AutoWeightsLoader(self).load_weights(self._with_copies(weights))

    def _with_copies(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """K and V heads as often as the engine has them."""
        copies = copies_of(self.surgery_plans)
        kept = {plan.layer: plan.project.kv_heads for plan in self.surgery_plans if isinstance(plan.project, Heads)}
        for name, tensor in weights:
            if ".self_attn.k_proj." in name or ".self_attn.v_proj." in name:
                layer = extract_layer_index(name)
                if copies[layer] != tuple(range(kept[layer])):
                    tensor = tensor.unflatten(0, (kept[layer], -1))[list(copies[layer])].flatten(0, 1)
            yield name, tensor
