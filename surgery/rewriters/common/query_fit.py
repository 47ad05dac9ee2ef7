"""Queries that face rewritten keys: W_q by least squares on the parent's attention scores.

The normal equations are never written down. A product with them is what a change of W_q does to the scores, centred
under the parent's attention and brought back: two passes over the scores, as cheap as attention itself. Scores are
kept in blocks of neighbouring queries, each with the keys that it sees and no others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
from torch import Tensor

from ...attention.forward import probabilities, project, rotation
from ...attention.linalg import damp, hermitian, to_double
from ...attention.maths import rotate_pairs
from ...attention.weights import AttentionWeights
from ...calibration.processes import total
from ...calibration.visit import Visit
from ...errors import PlanError

QUERY_TOKENS = 9_000
"""Calibration tokens whose queries are fitted: each keeps N numbers for every token of its window. `mqa` of SmolLM2
loses much with half of them, and gains little with twice as many."""
STEPS = 6
"""Of conjugate gradients. On SmolLM2 (4096 tokens) twice as many change the KL of `mqa` from 0.802 to 0.820 nats and of
`mla-4x` from 0.849 to 0.847: what they still find is of the calibration text."""
SOLVED_NUMBERS = 4_000_000
"""Numbers of W_q that are solved for together, whole heads: conjugate gradients keep six times as many in float64."""
BLOCKS = 4
"""Parts of a window's queries. The last query of each also writes out its own metric of W_q, for the preconditioner."""


class Keys(Protocol):
    """The keys of one batch as queries at chosen places see them; u stands for queries before their rotation."""

    def scores(self, u_BNmH: Tensor) -> Tensor:
        """[B, N, m, S]: without the scale."""

    def pull(self, c_BNmS: Tensor) -> Tensor:
        """[B, N, m, H]: the transpose of `scores`."""

    def seen_from(self, query: int) -> Tensor:
        """[B, N, S, H]: the keys themselves, as the query at the place `query` of m sees them."""

    def of_heads(self, heads: slice) -> Self:
        """The keys of some of the query heads."""

    def part(self, queries: slice, seen: int) -> Self:
        """The first `seen` keys as some of the queries see them."""


@dataclass
class _Batch:
    x_BmD: Tensor
    p_BNmS: Tensor
    """The parent's attention to the keys up to the last that a query sees; zero for queries that are padding."""
    keys: Keys

    def of_heads(self, heads: slice) -> _Batch:
        return _Batch(self.x_BmD, self.p_BNmS[:, heads], self.keys.of_heads(heads))


class ScoreFit:
    """Least squares for all rows of W_q, head by head, on the parent's attention logits; add batches, then `solve`.

    Minimises Σ_m Var_{n~p_m}(s'_mn - s_mn) over q' = W_q x, where p is the parent's attention and s its logits: to
    second order the KL between the two attentions. Moments alone assume that queries know nothing of the keys' error
    and that all positions count alike; here both are what they are. Linear in W_q, solved by conjugate gradients with
    a Kronecker preconditioner.

    Not for attentions with a q norm (not linear).

    Args:
        order: the parent's query head for each of the student's.
    """

    def __init__(self, parent: AttentionWeights, student: AttentionWeights, order: Sequence[int]) -> None:
        if student.q_norm is not None or student.softcap is not None:
            raise PlanError("queries that are normed or soft-capped are not linear in W_q. Leave out the query refit.")
        self.parent, self.student = parent, student
        self.order = list(order)
        self.batches: list[_Batch] = []
        self.tokens = 0
        self.target_NHD = torch.zeros((), dtype=torch.float64)
        self.metric_NHH = torch.zeros((), dtype=torch.float64)
        self.seen_DD = torch.zeros((), dtype=torch.float64)
        self.probed = 0

    def take(self, x_parent_BTD: Tensor, x_BTD: Tensor, mask_BT: Tensor, time: Tensor, keys: Keys) -> None:
        """Both streams' inputs of the projections; places `time` serve as queries and see `keys`, all of T."""
        q, k, _ = project(self.parent, x_parent_BTD, time)
        q, k = q[:, self.order], k[:, self.parent.kv_of()][:, self.order]
        x = x_BTD[:, time]
        if self.student.q_bias_NH is not None:
            x = torch.cat([x, torch.ones_like(x[..., :1])], -1)
        for rows in torch.arange(len(time)).tensor_split(BLOCKS):
            if len(rows) and mask_BT[:, time[rows]].any():
                block, seen = slice(int(rows[0]), int(rows[-1]) + 1), int(time[rows[-1]]) + 1
                self._take(q[:, :, block], k[:, :, :seen], x[:, block], mask_BT, time[block], keys.part(block, seen))

    def _take(self, q_BNmH: Tensor, k_BNSH: Tensor, x_BmD: Tensor, mask_BT: Tensor, time: Tensor, keys: Keys) -> None:
        """A block of queries; q and k are the parent's, S the keys up to the last that one of them sees."""
        s, p = probabilities(self.parent, q_BNmH, k_BNSH, time)
        if self.student.alibi_slopes is not None:
            slopes = torch.tensor(self.student.alibi_slopes, dtype=s.dtype)
            s = s - slopes[:, None, None] * (torch.arange(s.shape[-1])[None] - time[:, None])
        # A sink takes no part in the comparison of keys.
        p = p * (mask_BT[:, None, time, None] / p.sum(-1, keepdim=True).clamp_min(1e-30))
        batch = _Batch(x_BmD, p, keys)
        self.batches.append(batch)
        self.tokens += int(mask_BT[:, time].sum())
        self.target_NHD = self.target_NHD + to_double(self._bring_back(batch, s))
        self._probe(batch)

    def _bring_back(self, batch: _Batch, s_BNmS: Tensor) -> Tensor:
        """Σ of Jᵀ applied to logits, [N, H, D], where J is what W_q does to logits centred under the attention.

        The logits are overwritten. What sums batches is in float64.
        """
        p = batch.p_BNmS
        # In place: memory is what it waits for.
        centred = s_BNmS.sub_(torch.linalg.vecdot(p, s_BNmS)[..., None]).mul_(p)
        back = batch.keys.pull(centred) * self.student.scale
        return torch.einsum("bnmh,bmd->nhd", back, batch.x_BmD)

    def _probe(self, batch: _Batch) -> None:
        """What the preconditioner is made of: the metric of W_q's rows at the last query, x as each weighs it."""
        p, x, scale = batch.p_BNmS, batch.x_BmD, self.student.scale
        k_BNSH = batch.keys.seen_from(p.shape[2] - 1) * scale
        weighed = k_BNSH * p[:, :, -1, :, None]
        mean = weighed.sum(2)
        metric = weighed.mT @ k_BNSH - mean[..., :, None] * mean[..., None, :]
        self.metric_NHH = self.metric_NHH + to_double(metric.sum(0))
        self.probed += int(p[:, 0, -1].sum().round())  # padding looks at nothing
        norms = k_BNSH.square().sum(-1)
        # Var of the keys under each query's attention; which place the keys are seen from hardly changes their norms.
        size = torch.einsum("bnms,bns->bnm", p, norms) - (batch.keys.pull(p) * scale).square().sum(-1)
        weight = (size.clamp_min(0) / size.mean((0, 2), keepdim=True).clamp_min(1e-30)).mean(1)
        self.seen_DD = self.seen_DD + to_double(torch.einsum("bmd,bm,bme->de", x, weight, x))

    def solve(self, ridge: float = 1e-3, steps: int = STEPS) -> AttentionWeights:
        """The student with refitted W_q; `ridge` is relative, and shrinks to the rows that it had."""
        x = self.batches[0].x_BmD
        w = self.student.with_bias("q")[..., : x.shape[-1]].double()
        tokens, probed = total(torch.tensor([self.tokens, self.probed])).tolist()
        C = hermitian(total(self.seen_DD)) / tokens
        mean = hermitian(total(self.metric_NHH)) / probed
        mu = (ridge * mean.diagonal(0, -2, -1).mean(-1) * C.diagonal().mean())[:, None, None]
        left, right = (torch.linalg.inv(damp(m, 1e-2)).to(x) for m in (mean, C))
        del C
        block = max(1, SOLVED_NUMBERS // w[0].numel())
        fitted = torch.empty_like(w)
        for start in range(0, len(w), block):
            heads = slice(start, start + block)
            batches = [batch.of_heads(heads) for batch in self.batches]
            fitted[heads] = self._solve(batches, tokens, heads, w[heads], mu[heads], left[heads], right, steps)
        return _with_queries(self.student, fitted)

    def _solve(
        self,
        batches: Sequence[_Batch],
        tokens: int,
        heads: slice,
        w: Tensor,
        mu: Tensor,
        left: Tensor,
        right: Tensor,
        steps: int,
    ) -> Tensor:
        """The rows of some heads, from `w`; `left` and `right` are the parts of the preconditioner."""

        def apply(W: Tensor) -> Tensor:
            found, rows = torch.zeros_like(W), W.to(right)
            for batch in batches:
                u = torch.einsum("bmd,nhd->bnmh", batch.x_BmD, rows)
                found += self._bring_back(batch, batch.keys.scores(u * self.student.scale))
            return total(found).div_(tokens).add_(mu * W)

        def precondition(r: Tensor) -> Tensor:
            return to_double(left @ r.to(right) @ right)  # how good it is decides the number of steps, not the result

        goal = total(self.target_NHD[heads]) / tokens + mu * w
        return conjugate_gradients(apply, goal, w, precondition, steps)


def conjugate_gradients(
    apply: Callable[[Tensor], Tensor], goal: Tensor, start: Tensor, precondition: Callable[[Tensor], Tensor], steps: int
) -> Tensor:
    """x with apply(x) = goal, for every matrix of a stack [N, H, D] on its own, from `start`."""

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum((1, 2))

    x, r = start.clone(), goal - apply(start)
    z = precondition(r)
    p, rz = z, dot(r, z)
    enough = 1e-8 * rz
    for _ in range(steps):
        if not bool((rz > enough).any()):
            break
        Ap = apply(p)
        step = torch.where(rz > 0, rz / dot(p, Ap).clamp_min(1e-30), 0)[:, None, None]
        x += step * p  # in place: at the width of a 7B model each of these is 134 MB
        r -= step * Ap
        z = precondition(r)
        rz, old = dot(r, z), rz
        p = z.add_(torch.where(old > 0, rz / old.clamp_min(1e-30), 0)[:, None, None] * p)
    return x


class RotatedKeys:
    """Keys that are rotated as the parent rotates them.

    Args:
        k_BNSH: rotated, for each query head.
        time: places of the queries.
    """

    def __init__(self, weights: AttentionWeights, k_BNSH: Tensor, time: Tensor) -> None:
        self.rotary, self.k = weights.rotary, k_BNSH
        cos, sin = rotation(weights, k_BNSH.shape[2], k_BNSH)
        self.cos, self.sin = cos[time], sin[time]

    def scores(self, u_BNmH: Tensor) -> Tensor:
        return rotate_pairs(self.rotary, u_BNmH, self.cos, self.sin) @ self.k.mT

    def pull(self, c_BNmS: Tensor) -> Tensor:
        return self._back(c_BNmS @ self.k, self.cos, self.sin)

    def seen_from(self, query: int) -> Tensor:
        return self._back(self.k, self.cos[query], self.sin[query])

    def of_heads(self, heads: slice) -> Self:
        found = copy(self)
        found.k = self.k[:, heads]
        return found

    def part(self, queries: slice, seen: int) -> Self:
        found = copy(self)
        found.k, found.cos, found.sin = self.k[:, :, :seen], self.cos[queries], self.sin[queries]
        return found

    def _back(self, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The transpose of the rotation of queries."""
        return rotate_pairs(self.rotary, k, cos, -sin)


class QueryFit(ScoreFit):
    """`ScoreFit` for students that rotate their keys as the parent does."""

    def add(
        self, x_parent_BTD: Tensor, x_BTD: Tensor, mask_BT: Tensor, stride: int = 1, k_BKTH: Tensor | None = None
    ) -> None:
        """Both streams' inputs of the projections; every `stride`-th position serves as a query.

        Args:
            k_BKTH: the keys that the student reads, where it does not make them from its own input.
        """
        time = torch.arange(0, x_BTD.shape[1], stride)
        k = project(self.student, x_BTD, time)[1] if k_BKTH is None else k_BKTH
        keys = RotatedKeys(self.student, k[:, self.student.kv_of()], time)
        self.take(x_parent_BTD, x_BTD, mask_BT, time, keys)


def stride_of(visit: Visit, tokens: int = QUERY_TOKENS) -> int:
    """Every how many-th token of a window serves as a query, so that about `tokens` of all do."""
    return max(1, round(visit.tokens / tokens))


def _with_queries(weights: AttentionWeights, w_NHD: Tensor) -> AttentionWeights:
    if weights.q_bias_NH is None:
        return replace(weights, q_NHD=w_NHD.to(weights.q_NHD.dtype))
    bias = w_NHD[..., -1].to(weights.q_bias_NH.dtype)
    return replace(weights, q_NHD=w_NHD[..., :-1].to(weights.q_NHD.dtype), q_bias_NH=bias)
