"""Refits of q and o around a latent: closed forms on calibration activations, to the parent's scores and output."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from ...attention.forward import head_outputs
from ...attention.latent import LatentWeights, cached_entries, expanded_weights, latent_outputs, shared_rotary
from ...attention.maths import rotate_pairs
from ...attention.weights import AttentionWeights
from ...calibration.statistics import Activations
from ..common.refit import OutputFit, QueryFit, ScoreFit


class LatentQueryFit(ScoreFit):
    """`ScoreFit` where the key that a query sees depends on where it stands: k_up c_n + q_ropeᵀ rot(k_r,n, n - m)."""

    def __init__(self, parent: AttentionWeights, student: AttentionWeights, latent: LatentWeights) -> None:
        super().__init__(parent, student, range(student.heads))
        self.latent = latent

    def add(self, x_parent_BTD: Tensor, x_student_BTD: Tensor, mask_BT: Tensor, stride: int = 1) -> None:
        """Both streams' inputs of the projections; every `stride`-th position serves as a query."""
        latent = self.latent
        time, p, s, keep = self.parents_view(x_parent_BTD, mask_BT, stride)
        c, k_r = cached_entries(latent, x_student_BTD)
        entry = torch.cat([c, k_r], -1)
        entry = entry - entry.mean(1, keepdim=True)  # changes no variance; without it they are differences
        # What query m sees of token n is [k_up, G_m] entry_n: G_m = q_ropeᵀ turned back by m takes in the rotation.
        turn = torch.eye(latent.rope_dims, dtype=torch.float64).expand(len(time), -1, -1)
        angle = -time[:, None, None].double() * latent.inv_freq_F.double()
        turn = rotate_pairs(shared_rotary(latent), turn, angle.cos(), angle.sin())
        weight = p.sqrt()[..., None, :]
        logits = (s - (p * s).sum(-1, keepdim=True))[..., None, :]
        metric, target = [], []
        for a, group in enumerate(self.student.groups):
            k_up = latent.k_up_KHR[a].to(turn).expand(len(time), -1, -1)
            read = torch.cat([k_up, (turn @ latent.q_rope_KFH[a].to(turn)).mT], -1)  # [m, H, R + 2F']
            seen = (read.flatten(0, 1).to(entry) @ entry.mT).unflatten(1, (len(time), -1))  # [B, m, H, S]
            for n in group:
                # One product gives the keys' second moments, their means and what they owe the logits.
                rows = torch.cat([seen, torch.ones_like(weight[:, n]), logits[:, n]], 2) * weight[:, n]
                both = rows[:, :, :-2] @ rows.mT
                mean = both[..., -2:-1]
                metric.append((both[..., :-2] - mean @ mean.mT)[keep] * self.student.scale**2)
                target.append(both[..., -1][keep] * self.student.scale)
        order = [h for group in self.student.groups for h in group]
        place = [order.index(h) for h in range(len(order))]
        self.x.append(x_student_BTD[:, time][keep])
        self.metric.append(torch.stack(metric)[place])
        self.target.append(torch.stack(target)[place])


def refit_queries(
    parent: AttentionWeights,
    student: AttentionWeights,
    latent: LatentWeights,
    activations: Iterable[Activations],
    stride: int = 1,
    ridge: float = 1e-3,
) -> AttentionWeights:
    """`student` with W_q fitted to the parent's attention logits; unchanged where a q norm or a soft cap follows."""
    if student.q_norm is not None or student.softcap is not None:
        return student
    fit: QueryFit | LatentQueryFit
    if latent.rotate_on_read:
        fit = QueryFit(parent, expanded_weights(student, latent), range(student.heads))
    else:
        fit = LatentQueryFit(parent, student, latent)
    for a in activations:
        fit.add(a.x_parent_BTD, a.x_student_BTD, a.mask_BT, stride)
    return _with_q_of(student, fit.solve(ridge))


def refit_output(
    parent: AttentionWeights,
    student: AttentionWeights,
    latent: LatentWeights,
    activations: Iterable[Activations],
    ridge: float = 1e-3,
) -> AttentionWeights:
    """`student` with W_o fitted to the parent's attention output and to what the residual stream has lost before."""
    fit = OutputFit()
    for a in activations:
        y = torch.einsum("btnv,dnv->btd", head_outputs(parent, a.x_parent_BTD), parent.o_DNV)
        fit.add(latent_outputs(student, latent, a.x_student_BTD), y + a.gap_BTD, a.mask_BT)
    return fit.solve(student, ridge)


def _with_q_of(student: AttentionWeights, fitted: AttentionWeights) -> AttentionWeights:
    return replace(student, q_NHD=fitted.q_NHD, q_bias_NH=fitted.q_bias_NH)
