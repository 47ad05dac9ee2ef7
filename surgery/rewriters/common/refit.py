"""Refits: closed forms on calibration activations, per layer, for the weights that face a rewritten K and V."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...attention.forward import attend, project, rotation
from ...attention.linalg import damp, hermitian, ridge_regression
from ...attention.maths import rotate_pairs
from ...attention.weights import AttentionWeights
from ...errors import PlanError


class ScoreFit:
    """Least squares for all rows of W_q, head by head, on the parent's attention logits; add batches, then `solve`.

    Minimises Σ_m Var_{n~p_m}(s'_mn - s_mn) over q' = W_q x, where p is the parent's attention and s its logits: to
    second order the KL between the two attentions. Moments alone assume that queries know nothing of the keys' error
    and that all positions count alike; here both are what they are. Linear in W_q, solved by conjugate gradients with
    a Kronecker preconditioner. Keeps H·(H+1) numbers per head and calibration token: a few thousand tokens do.

    Not for attentions with a q norm (not linear).

    Args:
        order: the parent's query head for each of the student's.
    """

    def __init__(self, parent: AttentionWeights, student: AttentionWeights, order: Sequence[int]) -> None:
        if student.q_norm is not None or student.softcap is not None:
            raise PlanError("queries that are normed or soft-capped are not linear in W_q. Leave out the query refit.")
        self.parent, self.student = parent, student
        self.order = list(order)
        self.x: list[Tensor] = []
        self.metric: list[Tensor] = []
        self.target: list[Tensor] = []

    def parents_view(self, x_parent_BTD: Tensor, mask_BT: Tensor, stride: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Positions of the queries [m], the parent's attention and logits there [B, N, m, S], True at real queries."""
        time = torch.arange(0, x_parent_BTD.shape[1], stride)
        parent = attend(self.parent, x_parent_BTD, time)
        p, s = parent.probs_BNTT[:, self.order], parent.scores_BNTT[:, self.order]
        if self.student.alibi_slopes is not None:
            slopes = torch.tensor(self.student.alibi_slopes, dtype=s.dtype)
            s = s - slopes[:, None, None] * (torch.arange(s.shape[-1])[None] - time[:, None])
        # A sink takes no part in the comparison of keys.
        return time, p / p.sum(-1, keepdim=True).clamp_min(1e-30), s, mask_BT[:, time]

    def solve(self, ridge: float = 1e-3, steps: int = 20) -> AttentionWeights:
        """The student with refitted W_q; `ridge` is relative, and shrinks to the rows that it had."""
        x = torch.cat(self.x)
        w = self.student.with_bias("q")
        if self.student.q_bias_NH is not None:
            x = torch.cat([x, torch.ones_like(x[:, :1])], -1)
        else:
            w = w[..., : x.shape[-1]]
        M, v = torch.cat(self.metric, 1), torch.cat(self.target, 1)
        C = x.double().T @ x.double() / len(x)
        mean = hermitian(M.mean(1, dtype=torch.float64))
        level = mean.diagonal(0, -2, -1).mean(-1) * C.diagonal().mean()
        new = _solve_rows(M, x, v, w.to(x), (ridge * level).to(x), damp(mean, 1e-2), damp(C, 1e-2), steps)
        return _with_queries(self.student, new)


class QueryFit(ScoreFit):
    """`ScoreFit` for students that rotate their keys as the parent does."""

    def add(
        self,
        x_parent_BTD: Tensor,
        x_student_BTD: Tensor,
        mask_BT: Tensor,
        stride: int = 1,
        k_BKTH: Tensor | None = None,
    ) -> None:
        """Both streams' inputs of the projections; every `stride`-th position serves as a query.

        Args:
            k_BKTH: the keys that the student reads, where it does not make them from its own input.
        """
        time, p, s, keep = self.parents_view(x_parent_BTD, mask_BT, stride)
        k = project(self.student, x_student_BTD, time)[1] if k_BKTH is None else k_BKTH
        k = k[:, self.student.kv_of()]
        rotary = self.student.rotary
        cos, sin = (y[time, None] for y in rotation(self.student, x_student_BTD.shape[1], x_student_BTD))
        metric, target = [], []
        for n in range(self.student.heads):
            mean = p[:, n] @ k[:, n]
            outer = torch.einsum("bsi,bsj->bsij", k[:, n], k[:, n])
            M = (p[:, n] @ outer.flatten(2)).unflatten(-1, outer.shape[-2:]) - mean[..., :, None] * mean[..., None, :]
            centred = p[:, n] * (s[:, n] - (p[:, n] * s[:, n]).sum(-1, keepdim=True))
            # Keys were met where the query stands; W_q x comes before the rotation: turn back by its position.
            M = rotate_pairs(rotary, rotate_pairs(rotary, M, cos, -sin).mT, cos, -sin)
            v = rotate_pairs(rotary, centred @ k[:, n], cos[:, 0], -sin[:, 0])
            metric.append(M[keep] * self.student.scale**2)
            target.append(v[keep] * self.student.scale)
        self.x.append(x_student_BTD[:, time][keep])
        self.metric.append(torch.stack(metric))
        self.target.append(torch.stack(target))


def _with_queries(weights: AttentionWeights, w_NHD: Tensor) -> AttentionWeights:
    if weights.q_bias_NH is None:
        return replace(weights, q_NHD=w_NHD.to(weights.q_NHD.dtype))
    bias = w_NHD[..., -1].to(weights.q_bias_NH.dtype)
    return replace(weights, q_NHD=w_NHD[..., :-1].to(weights.q_NHD.dtype), q_bias_NH=bias)


def _solve_rows(
    M_NtHH: Tensor,
    x_tD: Tensor,
    v_NtH: Tensor,
    start_NHD: Tensor,
    mu_N: Tensor,
    left_NHH: Tensor,
    right_DD: Tensor,
    steps: int,
) -> Tensor:
    """Conjugate gradients, all heads at once, for Σ_t M_t W x_t x_tᵀ / T + μ (W - W_0) = Σ_t v_t x_tᵀ / T.

    In the dtype of the activations: where they are float32, so are the products, which cost nearly all the time.
    """
    T, mu = len(x_tD), mu_N[:, None, None]
    left, right = torch.linalg.inv(left_NHH).to(x_tD), torch.linalg.inv(right_DD).to(x_tD)

    def apply(W: Tensor) -> Tensor:
        turned = M_NtHH @ (x_tD @ W.mT)[..., None]
        return turned[..., 0].mT @ x_tD / T + mu * W

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum((1, 2))

    W = start_NHD.clone()
    r = v_NtH.mT @ x_tD / T + mu * start_NHD - apply(W)
    z = left @ r @ right
    p, rz = z, dot(r, z)
    goal = 1e-8 * rz
    for _ in range(steps):
        if not bool((rz > goal).any()):
            break
        Ap = apply(p)
        step = torch.where(rz > 0, rz / dot(p, Ap).clamp_min(1e-30), 0)[:, None, None]
        W, r = W + step * p, r - step * Ap
        z = left @ r @ right
        rz, old = dot(r, z), rz
        p = z + torch.where(old > 0, rz / old.clamp_min(1e-30), 0)[:, None, None] * p
    return W


class OutputFit:
    """Streams what the ridge refit of `o` needs; add batches, then `solve`.

    The target is the parent's attention output plus whatever the residual stream has lost in the layers before, so a
    layer also repairs its predecessors: y = o_parent(x_parent) + (h_parent - h_student).
    """

    def __init__(self) -> None:
        self.cross_DP = torch.zeros((), dtype=torch.float64)
        self.moment_PP = torch.zeros((), dtype=torch.float64)
        self.tokens = 0

    def add(self, out_BTNV: Tensor, target_BTD: Tensor, mask_BT: Tensor) -> None:
        """Head outputs of the student (input of `o`), the wanted output without `o`'s bias, True at real tokens."""
        o, y = out_BTNV.flatten(2)[mask_BT], target_BTD[mask_BT]
        self.cross_DP = self.cross_DP + y.double().T @ o.double()
        self.moment_PP = self.moment_PP + o.double().T @ o.double()
        self.tokens += len(o)

    def solve(self, weights: AttentionWeights, ridge: float = 1e-3) -> AttentionWeights:
        """`weights` with `o` refitted; see `refit_output`."""
        return refit_output(weights, self.cross_DP / self.tokens, self.moment_PP / self.tokens, ridge)


def refit_output(
    weights: AttentionWeights, cross_DP: Tensor, moment_PP: Tensor, ridge: float = 1e-3
) -> AttentionWeights:
    """W_o ← (E[y oᵀ] + μ W_o)(E[o oᵀ] + μ I)⁻¹, P = N·Hv: shrinks to the folded W_o, not to 0.

    `ridge` is μ relative to the mean energy of o. Needs many more tokens than N·Hv. A gated output is fitted just as
    well, if o is taken after the gate.
    """
    prior = weights.o_DNV
    new = ridge_regression(cross_DP, moment_PP, ridge, prior.flatten(1))
    return replace(weights, o_DNV=new.reshape(prior.shape).to(prior.dtype))
