"""Layers that cache latents, in vLLM: the runtime's own attention over vLLM's pages, shared between layers or not.

vLLM's own MLA wants an RMS norm on the latent, 512 + 64 numbers and no biases on some platforms, turns all keys before
they are cached, and has no sharing. Here the pages of a layer hold its latents as the plan has them, and a reader
reads its owner's pages through the forward context, as DeepSeek-V4's layers do in vLLM 0.33. Positions of tokens that
are turned at read are their places in the sequence, so that nothing lies beside the latents.

Plain torch: decoding requests are read together, prompts one by one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.attention.backend import AttentionBackend, AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import KVCacheSpec, MLAAttentionSpec

from ..runtime.attention import Inputs, equally_wide
from ..runtime.calling import CallingConvention
from ..runtime.latent import AskedLatent, SurgeryLatentAttention, positions_as_numbers
from ..runtime.layout import AttentionSite, LayerPlan


@dataclass
class Batch:
    """Where the tokens of one step lie, on the CPU where it is counted with."""

    tokens: int
    starts: list[int]
    """Of each request's new tokens, and the end of the last."""
    lengths: list[int]
    """Of each request, new tokens included."""
    lengths_B: Tensor
    blocks_BP: Tensor
    """Pages of each request."""
    slots_T: Tensor
    """Of each new token; -1 of none."""


class LatentBuilder(AttentionMetadataBuilder[Batch]):
    def __init__(
        self, kv_cache_spec: KVCacheSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Batch:
        common = common_attn_metadata
        return Batch(
            tokens=common.num_actual_tokens,
            starts=common.query_start_loc_cpu.tolist(),
            lengths=common.seq_lens.tolist(),
            lengths_B=common.seq_lens,
            blocks_BP=common.block_table_tensor.long(),
            slots_T=common.slot_mapping[: common.num_actual_tokens].long(),
        )


class LatentBackend(AttentionBackend):
    supported_dtypes = [torch.float32, torch.bfloat16, torch.float16]  # noqa: RUF012  (as vLLM declares it)

    @staticmethod
    def get_name() -> str:
        return "SURGERY_LATENT"

    @staticmethod
    def get_impl_cls() -> Any:
        raise NotImplementedError("the layer attends by itself")

    @staticmethod
    def get_builder_cls() -> type[LatentBuilder]:
        return LatentBuilder


class SurgeryServedLatent(nn.Module, AttentionLayerBase):
    """Called by vLLM's decoder layer in the place of its own attention; [tokens, D] in and out."""

    def __init__(
        self, config: Any, site: AttentionSite, plan: LayerPlan, shapes: dict[str, tuple[int, ...]], prefix: str
    ) -> None:
        super().__init__()
        self.attention = SurgeryLatentAttention(
            config, site, plan, CallingConvention(arguments=("hidden_states",)), shapes
        )
        self.name = f"{prefix}.attn"
        root = prefix.rsplit(f"layers.{plan.layer}.", 1)[0]
        self.owner = f"{root}layers.{plan.owner}.self_attn.attn"
        self.width = plan.project.dims
        self.kv_cache = torch.tensor([])
        get_current_vllm_config().compilation_config.static_forward_context[self.name] = self

    def get_attn_backend(self) -> type[AttentionBackend]:
        return LatentBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec | None:
        if not self.attention.owns_cache:
            return None
        return MLAAttentionSpec(
            block_size=vllm_config.cache_config.block_size, num_kv_heads=1, head_size=self.width,
            dtype=vllm_config.model_config.dtype, cache_dtype_str="auto",
        )  # fmt: skip

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Called by vLLM's loader with names below this module."""
        given = dict(weights)
        self.attention.load_state_dict(given)
        return {f"attention.{name}" for name in given}

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        output = torch.empty_like(hidden_states)
        torch.ops.vllm.surgery_latent_attention(positions, hidden_states, output, self.name)
        return output

    def attend(self, positions_T: Tensor, hidden_TD: Tensor, output_TD: Tensor) -> None:
        """Write what the layer adds for each new token into `output_TD`; zeros while vLLM measures its memory."""
        context, attention = get_forward_context(), self.attention
        if context.attn_metadata is None:
            output_TD.zero_()
            return
        batch: Batch = context.attn_metadata[self.owner]
        hidden, n = hidden_TD[None, : batch.tokens], batch.tokens
        inputs = Inputs(hidden, None, None, positions_T[None, :n], None, None, {})
        asked = attention._latent_queries(inputs)
        pages = context.no_compile_layers[self.owner].kv_cache
        if attention.owns_cache:
            entry, _ = attention._entry(hidden, asked)
            self._write(pages, attention._turned_entry(entry, asked)[0, 0], batch.slots_T)
        heads = hidden.new_empty(n, attention.site.heads, attention.site.value_dim)
        counts = [end - start for start, end in zip(batch.starts, batch.starts[1:], strict=False)]
        steps = [row for row, count in enumerate(counts) if count == 1]
        for row, count in enumerate(counts):
            if count > 1:
                part = slice(batch.starts[row], batch.starts[row + 1])
                heads[part] = self._prompt(pages, asked, part, batch.blocks_BP[row], batch.lengths[row])
        if steps:
            at = torch.tensor([batch.starts[row] for row in steps])
            heads[at] = self._steps(pages, asked, at, batch, torch.tensor(steps))
        output_TD[:n] = attention.o_proj(heads.flatten(1))
        output_TD[n:].zero_()

    def _write(self, pages: Tensor, entry_TW: Tensor, slots_T: Tensor) -> None:
        real = slots_T >= 0
        slots, size = slots_T[real], pages.shape[-2]
        pages[slots // size, 0, slots % size] = entry_TW[real].to(pages.dtype)

    def _read(self, pages: Tensor, blocks_BP: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        """Cached entries [B, 1, S, W], and the positions beside them."""
        count = -(-longest // pages.shape[-2])
        cached = pages[blocks_BP[:, :count], 0].flatten(1, 2)[:, None, :longest]
        places = torch.arange(longest, device=pages.device)[None]
        return cached, positions_as_numbers(places, cached.dtype)[:, None].expand(len(cached), -1, -1, -1)

    def _prompt(self, pages: Tensor, asked: AskedLatent, part: slice, blocks_P: Tensor, length: int) -> Tensor:
        """Head outputs [T, N, V] of one request's new tokens."""
        attention, tokens = self.attention, part.stop - part.start
        cached, beside = self._read(pages, blocks_P[None], length)
        query = attention._query(_part(asked, part))
        key, value = attention._keys_of(cached, beside), attention._values_of(cached)
        width = value.shape[-1]
        query, key, value = equally_wide(query, key, value)
        mask = None
        if length > tokens:
            places = torch.arange(length, device=pages.device)
            mask = places[None] <= places[length - tokens :, None]
        found = F.scaled_dot_product_attention(
            query, key, value, mask, is_causal=mask is None, scale=attention.scaling, enable_gqa=True
        )
        return found[0, ..., :width].transpose(0, 1)

    def _steps(self, pages: Tensor, asked: AskedLatent, at: Tensor, batch: Batch, rows: Tensor) -> Tensor:
        """Head outputs [B, N, V] of requests with one new token each."""
        attention = self.attention
        longest = max(batch.lengths[row] for row in rows.tolist())
        cached, beside = self._read(pages, batch.blocks_BP[rows], longest)
        seen = torch.arange(longest, device=pages.device)[None] < batch.lengths_B[rows, None]
        hidden_B11S = torch.where(seen, 0.0, -torch.inf).to(cached.dtype)[:, None, None]
        one = _step(asked, at)
        if attention.latent.rotate_on_read:
            query = attention._query(one).unflatten(1, (attention.latent.kv_heads, -1)).squeeze(3)  # [B, K, G, H]
            scores = (query @ attention._keys_of(cached, beside).mT).flatten(1, 2)[:, :, None]
        else:
            query = attention._absorbed(one.q_BTNH, one.q_rope_BTNF)[:, 0]  # [B, N, W]
            scores = (query @ cached[:, 0].mT)[:, :, None]
        weights = (scores * attention.scaling + hidden_B11S).softmax(-1, dtype=torch.float32).to(cached.dtype)
        mean = (weights.squeeze(2) @ cached[:, 0])[:, None]  # [B, 1, N, W]
        return attention._values(mean)[:, 0]


def _part(asked: AskedLatent, part: slice) -> AskedLatent:
    """One request's queries; the angles are of entries, which are made by now."""
    q_rope = asked.q_rope_BTNF
    return AskedLatent(
        asked.q_BTNH[:, part], None if q_rope is None else q_rope[:, part], None, asked.positions_BT[:, part]
    )


def _step(asked: AskedLatent, at: Tensor) -> AskedLatent:
    """The queries of tokens `at`, each as a sequence of its own."""
    q_rope = asked.q_rope_BTNF
    return AskedLatent(
        asked.q_BTNH[0, at, None],
        None if q_rope is None else q_rope[0, at, None],
        None,
        asked.positions_BT[0, at, None],
    )


def _latent_attention(positions: Tensor, hidden_states: Tensor, output: Tensor, layer_name: str) -> None:
    get_forward_context().no_compile_layers[layer_name].attend(positions, hidden_states, output)


def _latent_attention_fake(positions: Tensor, hidden_states: Tensor, output: Tensor, layer_name: str) -> None:
    return None


direct_register_custom_op(
    "surgery_latent_attention", _latent_attention, mutates_args=["output"], fake_impl=_latent_attention_fake
)
