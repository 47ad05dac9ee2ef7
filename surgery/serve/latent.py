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
from itertools import pairwise
from typing import Any, NamedTuple

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


class Prompt(NamedTuple):
    """One request with several new tokens."""

    tokens: slice
    length: int
    """With the new tokens."""
    blocks_1P: Tensor
    """Its pages, up to the last that it fills."""


class Steps(NamedTuple):
    """All requests with one new token."""

    at_B: Tensor
    """Their new tokens."""
    longest: int
    blocks_BP: Tensor
    """Pages of each, up to the last that the longest fills."""
    hidden_B11S: Tensor
    """Added to scores: -inf where a request has no token."""


@dataclass
class Batch:
    """Where the tokens of one step of the engine lie: counted once, for all layers."""

    tokens: int
    slots_T: Tensor
    """Of each new token; -1 of none."""
    has_slots: bool
    """Whether every new token has one."""
    prompts: list[Prompt]
    steps: Steps | None
    read: tuple[str, Tensor] | None = None
    """The owner whose pages were read last for `steps`, and its entries: readers mostly stand right after it."""


class LatentBuilder(AttentionMetadataBuilder[Batch]):
    def __init__(
        self, kv_cache_spec: KVCacheSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._size, self._dtype = kv_cache_spec.block_size, vllm_config.model_config.dtype

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Batch:
        common = common_attn_metadata
        starts, lengths = common.query_start_loc_cpu.tolist(), common.seq_lens.tolist()
        blocks, slots = common.block_table_tensor.long(), common.slot_mapping[: common.num_actual_tokens].long()
        counts = [end - start for start, end in pairwise(starts)]
        prompts = [
            Prompt(slice(start, start + count), length, blocks[row : row + 1, : self._pages(length)])
            for row, (start, count, length) in enumerate(zip(starts, counts, lengths, strict=False))
            if count > 1
        ]
        rows = [row for row, count in enumerate(counts) if count == 1]
        steps = None
        if rows:
            longest = max(lengths[row] for row in rows)
            beyond = torch.arange(longest, device=blocks.device) >= common.seq_lens[rows, None]
            hidden = torch.zeros(beyond.shape, dtype=self._dtype, device=blocks.device).masked_fill_(beyond, -torch.inf)
            at = torch.tensor([starts[row] for row in rows], device=blocks.device)
            steps = Steps(at, longest, blocks[rows, : self._pages(longest)], hidden[:, None, None])
        return Batch(common.num_actual_tokens, slots, bool((slots >= 0).all()), prompts, steps)

    def _pages(self, length: int) -> int:
        return -(-length // self._size)


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
        pages = context.no_compile_layers[self.owner].kv_cache[:, 0]
        if attention.owns_cache:
            entry, _ = attention._entry(hidden, asked)
            self._write(pages, attention._turned_entry(entry, asked)[0, 0], batch)
            batch.read = None
        if batch.steps is not None and len(batch.steps.at_B) == n:  # all of them, in order
            heads = self._steps(pages, asked, batch, batch.steps)
        else:
            heads = hidden.new_empty(n, attention.site.heads, attention.site.value_dim)
            for prompt in batch.prompts:
                heads[prompt.tokens] = self._prompt(pages, asked, prompt)
            if batch.steps is not None:
                heads[batch.steps.at_B] = self._steps(pages, asked, batch, batch.steps)
        output_TD[:n] = attention.o_proj(heads.flatten(1))
        output_TD[n:].zero_()

    def _write(self, pages_PSW: Tensor, entry_TW: Tensor, batch: Batch) -> None:
        slots, entry, size = batch.slots_T, entry_TW.to(pages_PSW.dtype), pages_PSW.shape[1]
        if not batch.has_slots:
            real = slots >= 0
            slots, entry = slots[real], entry[real]
        pages_PSW[slots // size, slots % size] = entry

    def _read(self, pages_PSW: Tensor, blocks_BP: Tensor, longest: int) -> Tensor:
        """Cached entries [B, 1, S, W]."""
        return pages_PSW[blocks_BP].flatten(1, 2)[:, None, :longest]

    def _places(self, cached_B1SW: Tensor) -> Tensor:
        """The positions of cached entries, as they stand beside them elsewhere; the same for all requests."""
        places = torch.arange(cached_B1SW.shape[2], device=cached_B1SW.device)[None]
        return positions_as_numbers(places, cached_B1SW.dtype)[:, None]

    def _prompt(self, pages: Tensor, asked: AskedLatent, prompt: Prompt) -> Tensor:
        """Head outputs [T, N, V] of one request's new tokens."""
        attention, tokens = self.attention, prompt.tokens.stop - prompt.tokens.start
        cached = self._read(pages, prompt.blocks_1P, prompt.length)
        query = attention._query(_part(asked, prompt.tokens))
        key, value = attention._keys_of(cached, self._places(cached)), attention._values_of(cached)
        width = value.shape[-1]
        query, key, value = equally_wide(query, key, value)
        mask = None
        if prompt.length > tokens:
            places = torch.arange(prompt.length, device=pages.device)
            mask = places[None] <= places[prompt.length - tokens :, None]
        found = F.scaled_dot_product_attention(
            query, key, value, mask, is_causal=mask is None, scale=attention.scaling, enable_gqa=True
        )
        return found[0, ..., :width].transpose(0, 1)

    def _steps(self, pages: Tensor, asked: AskedLatent, batch: Batch, steps: Steps) -> Tensor:
        """Head outputs [B, N, V] of requests with one new token each."""
        attention = self.attention
        if batch.read is None or batch.read[0] != self.owner:
            batch.read = self.owner, self._read(pages, steps.blocks_BP, steps.longest)
        cached = batch.read[1]
        one = _step(asked, steps.at_B)
        # The heads stand where tokens do: all of them read the same entries, and nothing is repeated.
        if attention.latent.rotate_on_read:
            query = attention._query(one).unflatten(1, (attention.latent.kv_heads, -1)).squeeze(3)  # [B, K, G, H]
            scores = query @ attention._keys_of(cached, self._places(cached)).mT
            scores = (scores * attention.scaling + steps.hidden_B11S).flatten(1, 2)
            mean = scores.softmax(-1, dtype=torch.float32).to(cached.dtype) @ cached[:, 0]  # [B, N, W]
        else:
            query = attention._absorbed(one.q_BTNH, one.q_rope_BTNF)  # [B, 1, N, W]
            hidden = steps.hidden_B11S.expand(-1, -1, query.shape[2], -1)
            mean = F.scaled_dot_product_attention(query, cached, cached, hidden, scale=attention.scaling)[:, 0]
        return attention._values(mean[:, None])[:, 0]


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
