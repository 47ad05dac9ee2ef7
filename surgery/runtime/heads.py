"""Attention of a converted layer that caches K and V heads of full width, shared by any groups of query heads."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .attention import Inputs, Shapes, SurgeryAttention, SurgeryHeadNorm, norm_heads
from .calling import CallingConvention
from .coded_layer import CodedLayer, prepare
from .functions import LIKE_SDPA, angles_of, complete_mask
from .layout import AttentionSite, Codec, Heads, LayerPlan
from .ops import NAME as OPERATORS
from .quantised_attention import Columns, Seen, attend_packed, columns_of


class SurgeryHeadsAttention(SurgeryAttention):
    """`SurgeryAttention` under a `Heads` plan; parameters as `canonical_weights` names them."""

    linears = ("q_proj", "k_proj", "v_proj", "o_proj")
    norms = ("q_norm", "k_norm", "v_norm")
    k_proj: nn.Linear
    v_proj: nn.Linear
    k_norm: SurgeryHeadNorm | None
    v_norm: SurgeryHeadNorm | None
    kv_of_query: Tensor

    def __init__(
        self, config: Any, site: AttentionSite, plan: LayerPlan, call: CallingConvention, shapes: Shapes
    ) -> None:
        super().__init__(config, site, plan, call, shapes)
        assert isinstance(plan.project, Heads)
        self.heads = plan.project
        _check_heads(site, self.heads)
        # repeat_kv undoes uniform groups inside the attention function; others are spread by an index before it.
        self.num_key_value_groups = site.heads // self.heads.kv_heads if self.heads.is_uniform else 1
        self.turns_at_read = isinstance(plan.store, Codec) and plan.store.unrotated and site.rotary is not None
        self.build_tables()
        self.reset()

    def _tables(self) -> dict[str, Tensor]:
        tables = super()._tables()
        if not self.heads.is_uniform:
            reads = {query: kv for kv, group in enumerate(self.heads.groups) for query in group}
            tables["kv_of_query"] = torch.tensor([reads[query] for query in range(self.site.heads)], device="cpu")
        return tables

    def _needs_frequencies(self) -> bool:
        store = self.plan.store
        return self.call.rotary_layout is None or (isinstance(store, Codec) and store.unrotated)

    def _query_key_value(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        q = self._queries(inputs.hidden_BTD)
        turn = self._rotation(inputs, q.dtype)
        query = norm_heads(self.q_norm, turn(q), True).transpose(1, 2)
        if self.owns_cache:
            k = self._key_heads(inputs.hidden_BTD)
            k = (k if self.turns_at_read else norm_heads(self.k_norm, turn(k), True)).transpose(1, 2)
            if self.plan.value_owner is None:
                key, value = self._store(k, self._value_heads(inputs.hidden_BTD).transpose(1, 2), inputs)
            else:
                key, _ = self._store(k, k[..., :0], inputs)
                _, value = self._lent(self.plan.value_owner, inputs.shared)
        else:
            key, value = self._borrow(inputs)
        if not self.heads.is_uniform and isinstance(key, Tensor):
            key, value = key.index_select(1, self.kv_of_query), value.index_select(1, self.kv_of_query)
        return query, key, value

    def _attend(self, inputs: Inputs) -> tuple[Tensor, Tensor | None]:
        if not self._steps(inputs):
            return super()._attend(inputs)
        query, seen, _ = self._query_key_value(inputs)
        assert isinstance(seen, Seen)
        slopes = None if self.site.alibi_slopes is None else self.slope_bits
        mask = complete_mask(
            self.site, self.call, self.plan.owner, slopes, inputs.mask, query, seen, inputs.cache, skippable=False
        )  # fmt: skip
        spread = None if self.heads.is_uniform else self.kv_of_query
        operators = self.config._attn_implementation == OPERATORS
        out = attend_packed(query, seen, mask, self.scaling, spread, self.site.softcap, self.sinks, operators)
        return out, None

    def _steps(self, inputs: Inputs) -> bool:
        """Whether one new token reads packed blocks as they lie in the cache of the layer, or of its owner."""
        plain = self.config._attn_implementation in LIKE_SDPA and not self.gives_weights(inputs.rest)
        if inputs.hidden_BTD.shape[1] != 1 or inputs.cache is None or self.training or not plain:
            return False
        if not self.owns_cache:
            lent = (inputs.shared or {}).get(self.plan.owner)
            return lent is not None and isinstance(lent[0], Seen)
        layers = inputs.cache.layers
        layer = layers[self.layer_idx] if self.layer_idx < len(layers) else None
        apart = {plan.value_owner for plan in self.all_plans}  # what they lend is read beside keys of others
        return isinstance(layer, CodedLayer) and layer.can_step and self.layer_idx not in apart

    def _store(self, key: Tensor, value: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        if not self._steps(inputs):
            return super()._store(key, value, inputs)
        layer = inputs.cache.layers[self.layer_idx]
        prepare(layer, inputs.mask, self.call.mask_true_hides, self.codec())
        seen = layer.step(key, value)
        if self.turns_at_read:
            cos, sin = self._angles_at_read(inputs, key.dtype)
            turn = functools.partial(_turn_columns, self._turn, cos, sin)
            seen = dataclasses.replace(seen, key_map=turn)
        if self.has_readers:
            assert inputs.shared is not None
            inputs.shared[self.layer_idx] = seen, seen
        return seen, seen

    def _as_read(self, key: Tensor, inputs: Inputs) -> Tensor:
        if not self.turns_at_read:
            return key
        cos, sin = (t[:, :, : key.shape[2]] for t in self._angles_at_read(inputs, key.dtype))
        return self._turn(key, cos, sin)

    def _angles_at_read(self, inputs: Inputs, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin [B or 1, 1, S, F] of all columns."""
        assert self.site.rotary is not None
        if inputs.cache is None:
            positions = self._positions(inputs)
        else:
            positions = inputs.cache.layers[self.layer_idx].positions(inputs.hidden_BTD.shape[1], inputs.position_ids)
        cos, sin = angles_of(positions, self.inv_freq_bits, self.site.rotary.scaling, dtype)
        return cos.unsqueeze(1), sin.unsqueeze(1)

    def _rotation(self, inputs: Inputs, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        """What turns [B, T, heads, H] by the positions of this call; nothing where the parent does not."""
        if self.site.rotary is None:
            return lambda x_BTNH: x_BTNH
        positions = self._positions(inputs) if self.call.rotary_layout is None else None
        cos, sin = self._cos_sin(inputs.position_embeddings, positions, dtype)
        return partial(self._turn, cos=cos, sin=sin)

    def _key_heads(self, hidden_states: Tensor) -> Tensor:
        """[B, T, K, H], normed, before any rotation."""
        return norm_heads(self.k_norm, self._project(self.k_proj, hidden_states, self.site.head_dim), False)

    def _value_heads(self, hidden_states: Tensor) -> Tensor:
        """[B, T, K, V]"""
        return norm_heads(self.v_norm, self._project(self.v_proj, hidden_states, self.site.value_dim), False)


def _turn_columns(turn: Callable[..., Tensor], cos: Tensor, sin: Tensor, key: Tensor, at: Columns) -> Tensor:
    cos, sin = (columns_of(t.mT, at).mT for t in (cos, sin))
    return turn(key, cos, sin)


def _check_heads(site: AttentionSite, heads: Heads) -> None:
    where = f"{site.module} (layer {site.layer})"
    if sorted(query for group in heads.groups for query in group) != list(range(site.heads)):
        raise ValueError(f"{where}: groups {heads.groups} do not name each of {site.heads} query heads once")
    if len(heads.groups) != heads.kv_heads or (heads.head_dim, heads.value_dim) != (site.head_dim, site.value_dim):
        raise ValueError(
            f"{where}: plans {heads.kv_heads} KV heads of {heads.head_dim} + {heads.value_dim} in {len(heads.groups)} "
            f"groups; head width must stay {site.head_dim} + {site.value_dim}, with one group per head"
        )
