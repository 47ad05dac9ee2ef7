"""Attention of a converted layer whose tokens are averaged or leave by the decisions of a gate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .attention import Inputs, Shapes, SurgeryAttention, norm_heads
from .caches import install_layers
from .calling import CallingConvention
from .decisions import Mixed, at_end, from_end, hard_decisions, log_keep, mixed, pooled, soft_bias, visible
from .functions import LIKE_SDPA, angles_of
from .gates import SurgeryGate, logistic_noise
from .heads import SurgeryHeadsAttention
from .layout import AttentionSite, Heads, LayerPlan, Ranked
from .masks import read_chunk, read_whole, settle
from .paged_attention import Cap, attend
from .paged_cache import PagedLayer
from .queries import Queries
from .slots import Chunk, New

ZERO_OUT = 0.1
"""Part of the ramp in which borrowed channels fade; 0.8 of it fades, the rest is trained without them."""


class SurgeryGatedAttention(SurgeryAttention):
    """`SurgeryAttention` under a `Retain` value; parameters of the gate are named `gate.*`.

    What all forms of the cache share: decisions, the cache, and who sees what. A subclass, which derives from a form of
    `SurgeryAttention` as well, says what its queries are (`_asked`), what a new token brings to the cache (`_new`), and
    how the queries read what was kept (`_spread`, `_attend_seen`).

    In training, without a cache, decisions are relaxed: p = sigmoid((logit + logistic noise) / `temperature`), runs are
    pooled and scores lowered by them; a gate of heads mixes two attentions instead (`Mixed`). In evaluation, and where
    a score takes them, they are hard, and a whole sequence without a cache gives what decoding through the cache gives.
    A reader has no gate: it attends to its owner's slots as the owner does.
    """

    gate: SurgeryGate
    separators_BT: Tensor | None = None
    """Which tokens of this pass separate parts of the text, where the score asks: see `separators`."""

    def __init__(
        self, config: Any, site: AttentionSite, plan: LayerPlan, call: CallingConvention, shapes: Shapes
    ) -> None:
        super().__init__(config, site, plan, call, shapes)
        assert plan.retain is not None
        self.retain = plan.retain
        reason = self.retain.supports(site) or self.retain.supports_project(plan.project)
        if reason is not None:
            raise ValueError(f"{site.module} (layer {site.layer}): {reason}")
        self.temperature = 0.3
        self.target_ratio = self.retain.ratio
        """What the budget asks for now; training raises it from 1."""
        if self.owns_cache and self.retain.decided_by != "rank":
            groups = plan.project.groups if isinstance(plan.project, Heads) else ()
            self.gate = SurgeryGate(self.retain, plan.decisions, shapes["q_proj.weight"][1], groups)

    def reset(self) -> None:
        super().reset()
        if "gate" in self._modules:  # not while the base class is built
            self.gate.reset()

    def set_ramp(self, progress: float) -> None:
        """Raise the ratio from 1 to the plan's."""
        if self.owns_cache and self.retain.decided_by == "head":
            self.gate.bound()
        self.target_ratio = 1 + progress * (self.retain.ratio - 1)

    def _attend(self, inputs: Inputs) -> tuple[Tensor, Tensor | None]:
        cache, implementation = inputs.cache, self.config._attn_implementation
        if cache is not None and self.training and self.owns_cache:
            self._pass_over(cache)
        if self.retain.decided_by == "rank" and (cache is None or self.training):
            return super()._attend(inputs._replace(cache=None))  # nothing leaves but from a cache
        if implementation not in (*LIKE_SDPA, "eager"):
            raise ValueError(
                f"layer {self.layer_idx}: averaged and evicted tokens are hidden by a mask per head, which runs with "
                f"attn_implementation 'sdpa' or 'eager', not {implementation!r}"
            )
        if inputs.rest.pop("is_causal", None) is False:
            raise ValueError(
                f"layer {self.layer_idx}: tokens are averaged or leave by what came before them, so attention with "
                "is_causal=False has no meaning here. Leave it out."
            )
        asked = self._asked(inputs)
        if cache is not None and not self.training:
            return self._attend_seen(asked, self._seen(inputs, asked)), None
        if self.owns_cache:
            new = self._new(inputs, asked, None)
            key, value, keep = self._retain(new, inputs)
            key = new.turn(key)
            if self.has_readers:
                assert inputs.shared is not None
                inputs.shared[self.layer_idx] = key, value, keep  # type: ignore[assignment]
        else:
            key, value, keep = self._lent(self.plan.owner, inputs.shared)  # type: ignore[misc]
        if isinstance(keep, Mixed):
            return self._attend_mixed(asked, key, value, keep, inputs.rest)
        query, key, value, keep = self._spread(asked, key, value, keep)
        return self._call_attention(self._attention_function(inputs.rest), query, key, value, keep, inputs.rest)

    def _pass_over(self, cache: Any) -> None:
        """Note that new tokens are not kept.

        Raises:
            ValueError: earlier ones were, which these would not see.
        """
        if cache.get_seq_length(self.layer_idx):
            raise ValueError(
                f"layer {self.layer_idx}: decisions are relaxed in training, and no cache keeps what they leave. Call "
                "model.eval(), or pass use_cache=False and all tokens."
            )
        if not torch.compiler.is_compiling():
            install_layers(cache, self.all_plans)
            cache.layers[self.layer_idx].passed_over = True

    def _attend_mixed(
        self, asked: Any, key: Tensor, value: Tensor, keep: Mixed, named: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """Both attentions of each head, mixed by its alpha."""
        query, key, value, alpha_BN11 = self._spread(asked, key, value, keep.alpha_BK11)
        attend_to = partial(self._call_attention, self._attention_function(named), query, key, value, named=named)
        (whole, weights), (near, near_weights) = attend_to(mask=keep.all_B1TT), attend_to(mask=keep.near_B1TT)
        alpha_BN11 = alpha_BN11.to(whole.dtype)
        if weights is not None and near_weights is not None:
            weights = torch.lerp(near_weights, weights, alpha_BN11)
        return torch.lerp(near, whole, alpha_BN11.transpose(1, 2)), weights

    def _seen(self, inputs: Inputs, asked: Any) -> PagedLayer | Chunk:
        """What the new tokens see; the cache keeps what the decisions leave of them."""
        if not self.owns_cache:
            found: Any = self._lent(self.plan.owner, inputs.shared)
            return found
        install_layers(inputs.cache, self.all_plans)
        layer = inputs.cache.layers[self.layer_idx]
        seen: Any = layer.add(self._new(inputs, asked, self._real(inputs, layer)))
        if self.has_readers:
            assert inputs.shared is not None
            inputs.shared[self.layer_idx] = seen
        return seen

    def _asked(self, inputs: Inputs) -> Any:
        """Queries before their rotation, and what turns them and new keys."""
        raise NotImplementedError

    def _new(self, inputs: Inputs, asked: Any, real_BT: Tensor | None) -> New:
        """What the new tokens bring to the layer's own cache."""
        raise NotImplementedError

    def _spread(self, asked: Any, key: Tensor, value: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Without a cache: query, key, value and mask as the attention function takes them, from what slots hold."""
        raise NotImplementedError

    def _attend_seen(self, asked: Any, seen: PagedLayer | Chunk) -> Tensor:
        """Through the cache: head outputs [B, T, N, V]."""
        raise NotImplementedError

    def _decide(self, hidden_BTD: Tensor, q_BTNH: Tensor, k_BTKH: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits and weights of the gate; where there is none, those of staying."""
        if self.retain.decided_by == "rank":
            B, T, K, _ = k_BTKH.shape
            return k_BTKH.new_full((B, K, T), -1.0, dtype=torch.float32), None
        found: tuple[Tensor, Tensor | None] = self.gate(hidden_BTD, q_BTNH, k_BTKH)
        return found

    def _ranks(self, tokens: int) -> bool:
        """Whether slots may leave by their rank behind so many new tokens."""
        return self.retain.decided_by == "rank" and (tokens > 1 or not self.retain.waits_for_prompts)

    def _queries_of(self, query_BNTH: Tensor, real_BT: Tensor | None) -> Queries:
        """Queries, rotated, as scores of slots read them."""
        return Queries(
            query_BNTH=query_BNTH.detach(),
            real_BT=real_BT,
            scale=self.scaling,
            softcap=self.site.softcap,
            sinks_N=self.sinks,
            output_norms=self._output_norms,
            separators_BT=self.separators_BT if self.plan.asks_separators else None,
        )

    def _output_norms(self, value_BKSV: Tensor) -> Tensor:
        """|W_o v|_1 [B, N, S] of the value that each query head reads."""
        heads, readers = self.site.heads, getattr(self, "kv_of_query", None)
        by_head = _matrix_of(self.o_proj, value_BKSV.device).float().unflatten(1, (heads, -1)).unbind(1)
        reads = [h * value_BKSV.shape[1] // heads for h in range(heads)] if readers is None else readers.tolist()
        norms = [(value_BKSV[:, kv] @ w_DV.T).abs().sum(-1) for kv, w_DV in zip(reads, by_head, strict=True)]
        return torch.stack(norms, dim=1)

    @property
    def _plain(self) -> bool:
        """Whether attention is a softmax over scores and nothing else."""
        return self.site.softcap is None and self.sinks is None

    def _real(self, inputs: Inputs, layer: PagedLayer) -> Tensor | None:
        """[B, T] bool: False at padding among the new tokens; None where there is none."""
        (B, T, _), mask = inputs.hidden_BTD.shape, inputs.mask
        if mask is None:
            if layer.has_padding:
                raise ValueError(
                    f"layer {self.layer_idx}: no attention mask came, but the cache was given padding before, which it "
                    "did not keep. Pass the attention mask of all tokens so far."
                )
            return None
        counted = layer.tokens if layer.is_initialized else torch.zeros(B, dtype=torch.int32, device=mask.device)
        where = f"layer {self.layer_idx}"
        real, claims = read_chunk(where, mask, self.call.mask_true_hides, T, layer.get_seq_length(), counted)
        return real if settle(where, claims, ~real.all()) else None

    def _retain(self, new: New, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor | Mixed]:
        """K and V as slots hold them after each token, [B, K, T, .], K not yet rotated; and who sees them: bool, or in
        training a bias, [B, K, T, T], or what heads are mixed of."""
        key, value, logits = new.key_BKTH, new.value_BKTV, new.logits_BKT
        B, _, T = logits.shape
        retain, allowed, holes = self.retain, None, None
        order = decides = torch.arange(T, device=key.device)[None]
        if inputs.mask is not None:
            where = f"layer {self.layer_idx}"
            mask = inputs.mask if inputs.cache is None else inputs.mask[..., :T]  # a static one has room behind
            read = read_whole(where, mask, self.call.mask_true_hides, B, T)
            # Compiled, padding is taken to stand between tokens: right in any case, and more work.
            holes = read.real_BT if settle(where, read.claims, read.has_holes) else None
            order, allowed = read.order_BT, read.visible_B1TT
            decides = torch.where(read.real_BT, order, -1)
        if self.training and retain.decided_by == "head":
            return key, value, mixed(logits, order, decides, retain, allowed)
        if self.training and retain.is_trained:
            kept = log_keep(logits, decides, retain.protected, self.temperature, logistic_noise(logits))
            p, seen = -torch.expm1(kept), soft_bias(kept, order, retain, allowed, key.dtype, holes)
        else:
            hard = hard_decisions(logits, decides, retain.protected)
            p, seen = hard.float(), visible(hard, order, retain, allowed, holes)
        if new.weight_BKT is not None:
            key, value = (self._pooled(x, new.weight_BKT, p, holes) for x in (key, value))
        return key, value, seen

    def _pooled(self, x_BKTH: Tensor, weight_BKT: Tensor, p_BKT: Tensor, real_BT: Tensor | None) -> Tensor:
        """`pooled`; `real_BT` where runs go on behind padding."""
        if real_BT is None:
            return pooled(x_BKTH, weight_BKT, p_BKT, self.retain.window)
        x, weight, p = (at_end(t, real_BT) for t in (x_BKTH, weight_BKT, p_BKT))
        return from_end(pooled(x, weight, p, self.retain.window), real_BT)


@torch.no_grad()
def _matrix_of(projection: Any, device: torch.device) -> Tensor:
    """W [out, in] by which a projection multiplies, with what an adapter adds to it; of an offloaded one as well."""
    if type(projection) is torch.nn.Linear and not projection.weight.is_meta:
        return projection.weight
    width, dtype = projection.in_features, next(projection.parameters()).dtype
    rows = torch.eye(width + 1, width, dtype=dtype, device=device)  # the last one is 0, and gives the bias
    found: Tensor = projection(rows)
    return (found[:-1] - found[-1]).T


class AskedHeads(NamedTuple):
    """Queries of heads, before their rotation."""

    q_BTNH: Tensor
    turn: Callable[[Tensor], Tensor]
    """Rotates [B, T, heads, H] to the positions of this call."""


class SurgeryGatedHeadsAttention(SurgeryGatedAttention, SurgeryHeadsAttention):
    """KV heads, each of which decides for itself."""

    def set_ramp(self, progress: float) -> None:
        """Raise the ratio from 1 to the plan's; before that, fade channels that the gate borrows."""
        if self.owns_cache and self.retain.decided_by == "borrowed":
            self._fade(progress / ZERO_OUT)
            progress = max(0.0, progress - ZERO_OUT) / (1 - ZERO_OUT)
        super().set_ramp(progress)

    @torch.no_grad()
    def _fade(self, progress: float) -> None:
        """Zero-out stage of arXiv:2403.09636, appendix; once over, the rows start from zero and belong to the gate."""
        if self.gate.channel == 0:
            return
        if progress < 1:
            # Just above 0 at the end of the fading: only 0 says that the rows were set to zero.
            self.gate.set_channel(max(1e-6, 1 - progress / 0.8))
            return
        width = self.site.head_dim
        for projection in (self.q_proj, self.k_proj):
            projection.weight[width - 1 :: width] = 0
            if projection.bias is not None:
                projection.bias[width - 1 :: width] = 0
        self.gate.set_channel(0.0)

    def _asked(self, inputs: Inputs) -> AskedHeads:
        q = self._queries(inputs.hidden_BTD)
        return AskedHeads(q, self._rotation(inputs, q.dtype))

    def _new(self, inputs: Inputs, asked: AskedHeads, real_BT: Tensor | None) -> New:
        k, v = self._key_heads(inputs.hidden_BTD), self._value_heads(inputs.hidden_BTD)
        logits, weight = self._decide(inputs.hidden_BTD, asked.q_BTNH, k)
        ranks = self.retain.decided_by == "rank"
        return New(
            key_BKTH=(k if ranks else self.gate.without_borrowed(k)).transpose(1, 2),
            value_BKTV=v.transpose(1, 2),
            logits_BKT=logits,
            weight_BKT=weight,
            real_BT=real_BT,
            turn=lambda x: norm_heads(self.k_norm, asked.turn(x.transpose(1, 2)), True).transpose(1, 2),
            angles=self._angles(asked.turn),
            shift=self._shifted if self.retain.moves_slots else None,
            queries=self._ranking_queries(inputs, asked, real_BT) if self._ranks(k.shape[1]) else None,
        )

    def _ranking_queries(self, inputs: Inputs, asked: AskedHeads, real_BT: Tensor | None) -> Queries:
        found = replace(
            self._queries_of(self._query(asked), real_BT),
            row_of_query=None if self.heads.is_uniform else self.kv_of_query,
        )
        if not self.retain.reads_plain_queries:
            return found
        start_B1 = self._positions(inputs).amax(-1, keepdim=True) + 1
        ahead = partial(self._turn_ahead, start_B1=start_B1)
        plain = asked.q_BTNH.detach().transpose(1, 2)
        return replace(found, plain_BNTH=plain, ahead=ahead, pair_norms=self._pair_norms)

    def _turn_ahead(self, x_BNXH: Tensor, offsets: Sequence[int], start_B1: Tensor) -> Tensor:
        """`x_BNXH` by the mean rotation over positions that lie so far behind `start_B1`."""
        rotary = self.site.rotary
        if rotary is None:
            return x_BNXH
        at = start_B1 + torch.tensor(offsets, device=x_BNXH.device)
        cos, sin = angles_of(at, self.inv_freq_bits, rotary.scaling, torch.float32)
        return self._turn(x_BNXH, *(t.mean(1)[:, None, None] for t in (cos, sin)))

    def _shifted(self, key_BKSH: Tensor, by_BKS: Tensor) -> Tensor:
        if self.site.rotary is None:
            return key_BKSH
        cos, sin = angles_of(by_BKS, self.inv_freq_bits, 1.0, torch.float32)
        return self._turn(key_BKSH.float(), cos, sin).to(key_BKSH.dtype)

    def _pair_norms(self, x: Tensor) -> Tensor:
        rotary = self.site.rotary
        if rotary is None:
            return x.abs()
        end = rotary.start + rotary.dims
        pairs = x[..., rotary.start : end].unflatten(-1, (-1, 2) if rotary.interleaved else (2, -1))
        norms = pairs.norm(dim=-1 if rotary.interleaved else -2)
        return torch.cat((x[..., : rotary.start].abs(), norms, x[..., end:].abs()), dim=-1)

    def _needs_frequencies(self) -> bool:
        retain = self.plan.retain
        turns = retain is not None and (retain.reads_plain_queries or retain.turns_keys)
        return super()._needs_frequencies() or turns

    def _query(self, asked: AskedHeads) -> Tensor:
        """[B, N, T, H], rotated."""
        q = self.gate.without_borrowed(asked.q_BTNH) if "gate" in self._modules else asked.q_BTNH
        return norm_heads(self.q_norm, asked.turn(q), True).transpose(1, 2)

    def _spread(
        self, asked: AskedHeads, key: Tensor, value: Tensor, keep: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if not self.heads.is_uniform:
            key, value, keep = (x.index_select(1, self.kv_of_query) for x in (key, value, keep))
        elif self.num_key_value_groups > 1:
            keep = keep.repeat_interleave(self.num_key_value_groups, dim=1)
        return self._query(asked), key, value, keep

    def _attend_seen(self, asked: AskedHeads, seen: PagedLayer | Chunk) -> Tensor:
        kv_of_query = None if self.heads.is_uniform else self.kv_of_query
        retain, cap = self.retain, None
        if isinstance(retain, Ranked) and retain.caps_distance:
            cap = Cap(retain.distance, self._shifted)
        return attend(self, self._query(asked), seen, self.scaling, self._plain, kv_of_query=kv_of_query, cap=cap)

    def _angles(self, turn: Any) -> tuple[Tensor, Tensor, bool, int] | None:
        """What `turn` does, for operators that rotate keys themselves; None where it is nothing or more than that."""
        rotary = self.site.rotary
        if rotary is None or (self.k_norm is not None and self.k_norm.norm.after_rotary):
            return None
        cos, sin = (turn.keywords[name][:, :, 0] for name in ("cos", "sin"))
        return cos, sin, rotary.interleaved, rotary.start
