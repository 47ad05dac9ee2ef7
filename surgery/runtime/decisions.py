"""Pure functions on the decisions of `Retain` values: who sees what, and what merged slots hold. No modules, no state.

`order_BT` says where each token stands in its own sequence: 0 at its first token, negative at padding. It counts
through a cache, and starts again at every document of a packed sequence. Places in a tensor (T) never do.

Shape suffixes as in `layout.py`. Decisions are True (or near 1) where a token is dropped (`dms`) or merged (`dmc`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .layout import Retain
from .slots import pick

_STRETCH = 2**19
"""Numbers that are pooled at once: 2 MB in float32."""


def order_of_packed(position_ids_BT: Tensor) -> Tensor:
    """[B, T] int64 from positions that start again at every document: tokens since the last start.

    A sequence that begins in the middle of a document is taken to begin there.
    """
    places = torch.arange(position_ids_BT.shape[-1], device=position_ids_BT.device).expand_as(position_ids_BT)
    follows = torch.zeros_like(position_ids_BT, dtype=torch.bool)
    follows[:, 1:] = position_ids_BT[:, 1:] == position_ids_BT[:, :-1] + 1
    start = torch.where(follows, 0, places).cummax(-1).values
    return places - start


def at_end(x: Tensor, real_BT: Tensor) -> Tensor:
    """[B, T] or [B, K, T, ...] with the real tokens of each row at its end, in order."""
    return _pick_tokens(x, torch.argsort(real_BT.byte(), dim=-1, stable=True))


def from_end(x: Tensor, real_BT: Tensor) -> Tensor:
    """What `at_end` was given."""
    order = torch.argsort(real_BT.byte(), dim=-1, stable=True)
    return _pick_tokens(x, torch.argsort(order, dim=-1))


def _pick_tokens(x: Tensor, index_BT: Tensor) -> Tensor:
    if x.ndim == 2:
        return x.gather(1, index_BT)
    index = index_BT[:, None].expand(*x.shape[:2], -1)
    return x.gather(2, index) if x.ndim == 3 else pick(x, index)


def hard_decisions(logits_BKT: Tensor, order_BT: Tensor, protected: int) -> Tensor:
    """[B, K, T] bool: logit above 0, and never at padding or the first `protected` tokens (`Retain.protected`)."""
    return (logits_BKT > 0) & (order_BT >= protected)[:, None]


def log_keep(logits_BKT: Tensor, order_BT: Tensor, protected: int, temperature: float, noise: Tensor | None) -> Tensor:
    """log(1 - p) of relaxed decisions p = sigmoid((logit + noise) / temperature), float32, [B, K, T].

    Args:
        noise: logistic, log(u / (1 - u)) with u uniform; None for none.
    """
    a = logits_BKT.float() if noise is None else logits_BKT.float() + noise
    return torch.where((order_BT >= protected)[:, None], torch.nn.functional.logsigmoid(-a / temperature), 0.0)


class Mixed(NamedTuple):
    """How a head is trained whose tokens stay or go together: `alpha` of what it makes of all tokens, the rest of what
    it makes of the first and the newest ones alone (DuoAttention, arXiv:2410.10819, section 2.2)."""

    alpha_BK11: Tensor
    """From 0 to 1, float32."""
    all_B1TT: Tensor
    """Bool: who sees whom while everything stays."""
    near_B1TT: Tensor
    """Bool: the same behind a window, but for the first tokens."""


def logit_of_alpha(alpha: Tensor) -> Tensor:
    """Logit of a head's decisions: above 0 where less than half of what it makes is of all tokens."""
    return 0.5 - alpha


def alpha_of_logit(logit: Tensor) -> Tensor:
    """What `logit_of_alpha` was given."""
    return 0.5 - logit


def mixed(
    logits_BKT: Tensor, order_BT: Tensor, decides_BT: Tensor, retain: Retain, allowed_B1TT: Tensor | None
) -> Mixed:
    """`Mixed` from the logits of a head gate, which all tokens of a head have in common.

    Args:
        decides_BT: as `order_BT`, negative also at padding that stands between tokens.
        allowed_B1TT: as in `visible`.
    """
    logits_B1T = logits_BKT[:, :1]
    goes = hard_decisions(torch.ones_like(logits_B1T), decides_BT, retain.protected)
    none = torch.zeros_like(goes)
    return Mixed(
        alpha_of_logit(logits_BKT[..., :1, None]),
        visible(none, order_BT, retain, allowed_B1TT),
        visible(goes, order_BT, retain, allowed_B1TT),
    )


def same_sequence(order_BT: Tensor) -> Tensor:
    """[B, T, T] bool: key j is at or before query i, in the same sequence. Padding is left to the model's mask."""
    places = torch.arange(order_BT.shape[-1], device=order_BT.device)
    start_BT = places - order_BT
    return (places[:, None] >= places) & (start_BT[:, :, None] == start_BT[:, None, :])


def visible(
    decisions_BKT: Tensor,
    order_BT: Tensor,
    retain: Retain,
    allowed_B1TT: Tensor | None = None,
    real_BT: Tensor | None = None,
) -> Tensor:
    """[B, K, T, T] bool: query i sees key j under hard decisions, causality and borders of documents included.

    `dms`: i - j < window, or j's own decision is 0 (delta 0 of arXiv:2506.05345: a token decides for itself).
    `dmc`: j is i, or the newest token of its run: the decision of j + 1 is 0. Keys are then those of `pooled`.

    Args:
        allowed_B1TT: the model's own mask, True is visible, in the place of `same_sequence`.
        real_BT: False at padding, where that stands between tokens.
    """
    near_B1TT, of_key_BKT = _near_and_key(decisions_BKT, order_BT, retain, real_BT)
    allowed = same_sequence(order_BT)[:, None] if allowed_B1TT is None else allowed_B1TT
    return (near_B1TT | ~of_key_BKT[:, :, None, :]) & allowed


def soft_bias(
    log_keep_BKT: Tensor,
    order_BT: Tensor,
    retain: Retain,
    allowed_B1TT: Tensor | None = None,
    dtype: Any = None,
    real_BT: Tensor | None = None,
) -> Tensor:
    """[B, K, T, T] float: `visible` of relaxed decisions, to be added to the scores.

    0 in the window (`dms`) or on the diagonal (`dmc`), log(1 - p) elsewhere; the lowest number where causality or the
    border of a document hides a key.

    Args:
        allowed_B1TT: the model's own mask, True is visible, in the place of those two.
        dtype: of the scores; float32 where None.
        real_BT: as in `visible`.
    """
    near_B1TT, of_key_BKT = _near_and_key(log_keep_BKT, order_BT, retain, real_BT)
    allowed = same_sequence(order_BT)[:, None] if allowed_B1TT is None else allowed_B1TT
    low = torch.finfo(dtype or torch.float32).min
    rows = of_key_BKT.clamp_min(low).to(dtype or torch.float32)[:, :, None, :]
    # One pass over [B, K, T, T], here and backward: the pairs that no decision concerns are a constant.
    fixed = torch.where(allowed, 0.0, low).to(rows.dtype)
    return torch.where(allowed & ~near_B1TT, rows, fixed)


def _near_and_key(x_BKT: Tensor, order_BT: Tensor, retain: Retain, real_BT: Tensor | None) -> tuple[Tensor, Tensor]:
    """Pairs [B, 1, T, T] that no decision hides, and for each key the entry of `x_BKT` that may hide it from others."""
    distance = (order_BT[:, :, None] - order_BT[:, None, :])[:, None]
    if not retain.averages:
        assert retain.window is not None
        return distance < retain.window, x_BKT
    # The next token decides whether j stays visible; after the last one there is none yet.
    if real_BT is None:
        return distance == 0, torch.nn.functional.pad(x_BKT[..., 1:], (0, 1))
    return distance == 0, from_end(torch.nn.functional.pad(at_end(x_BKT, real_BT)[..., 1:], (0, 1)), real_BT)


def pooled(x_BKTH: Tensor, weight_BKT: Tensor, merge_BKT: Tensor, window: int | None) -> Tensor:
    """What the open slot holds after each token: the weighted mean of its run so far, [B, K, T, H] in x's dtype.

    Args:
        weight_BKT: above 0.
        merge_BKT: hard or relaxed decisions; 0 at the first token of every sequence.
        window: newest tokens of the run that count; None: all.

    Sums are taken in float32 (float64 for float64) as shifted multiply-adds, or doubling where `window` is None: never
    as differences of long prefix sums, which cancel. Relaxed, the numerator and the denominator follow
    c_t = p_t c_(t-1) + w_t (arXiv:2403.09636, section 3).
    """
    dtype = torch.promote_types(x_BKTH.dtype, torch.float32)
    weight, p = weight_BKT.to(dtype), merge_BKT.to(dtype)
    B, K, T, H = x_BKTH.shape
    # Stretches that stay in a processor's cache: long sequences pass through memory once.
    length, done = max(64, _STRETCH // max(1, B * K * H)), []
    carry = None
    for begin in range(0, T, length):
        before = min(begin, (window or 1) - 1)
        stretch, end = slice(begin - before, begin + length), begin + length
        w, q = weight[..., stretch], p[..., stretch]
        # The denominator is one more channel.
        x = torch.cat((x_BKTH[:, :, stretch].to(dtype) * w[..., None], w[..., None]), dim=-1)
        if window is not None:
            total = _shifted(x, q, window)[:, :, before:]
        else:
            total = _scan(x, q)
            total = total if carry is None else total + q.cumprod(-1)[..., None] * carry
            carry = total[:, :, -1:]
        mean = (total[..., :-1] / total[..., -1:]).to(x_BKTH.dtype)
        # A slot with one token holds it to the last bit.
        done.append(torch.where((p[..., begin:end] == 0)[..., None], x_BKTH[:, :, begin:end], mean))
    return torch.cat(done, dim=2) if len(done) > 1 else done[0]


def _shifted(x_BKTH: Tensor, p_BKT: Tensor, window: int) -> Tensor:
    """Sum over s < window of (p_(t-s+1) ... p_t) x_(t-s)."""
    total, factor = x_BKTH.clone(), p_BKT
    for s in range(1, min(window, x_BKTH.shape[2])):
        # Slices are views: the backward pass keeps one copy of x for all s.
        total[:, :, s:] += factor[:, :, s:, None] * x_BKTH[:, :, :-s]
        factor = factor * torch.nn.functional.pad(p_BKT, (s, 0))[..., : p_BKT.shape[-1]]
    return total


def _scan(x_BKTH: Tensor, p_BKT: Tensor) -> Tensor:
    """c_t = p_t c_(t-1) + x_t, in log2(T) steps."""
    s = 1
    while s < x_BKTH.shape[2]:
        x_BKTH = torch.cat((x_BKTH[:, :, :s], x_BKTH[:, :, s:] + p_BKT[:, :, s:, None] * x_BKTH[:, :, :-s]), dim=2)
        p_BKT = torch.cat((torch.zeros_like(p_BKT[..., :s]), p_BKT[..., s:] * p_BKT[..., :-s]), dim=-1)
        s *= 2
    return x_BKTH
