"""Refits of q and o around a latent: closed forms on calibration activations, to the parent's scores and output."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from ..anatomy.proof import rotate_pairs
from ..calibrate import Activations
from ..runtime.layout import Rotary
from .attention_weights import AttentionWeights
from .latent import LatentWeights, attend_latent
from .latent_lowrank import expanded_weights
from .reference import attend
from .refit import OutputFit, QueryFit


class LatentQueryFit(QueryFit):
    """`QueryFit` where the key that a query sees depends on where it stands: k_up c_n + q_ropeᵀ rot(k_r,n, n - m)."""

    def __init__(self, parent: AttentionWeights, student: AttentionWeights, latent: LatentWeights) -> None:
        super().__init__(parent, student, range(student.heads))
        self.latent = latent

    def add(self, x_parent_BTD: Tensor, x_student_BTD: Tensor, mask_BT: Tensor, stride: int = 1) -> None:
        """Both streams' inputs of the projections; every `stride`-th position serves as a query."""
        latent, T = self.latent, x_student_BTD.shape[1]
        parent = attend(self.parent, x_parent_BTD)
        student = attend_latent(self.student, latent, x_student_BTD)
        time = torch.arange(0, T, stride)
        p, s = parent.probs_BNTT[:, :, time], parent.scores_BNTT[:, :, time]
        if self.student.alibi_slopes is not None:
            slopes = torch.tensor(self.student.alibi_slopes, dtype=s.dtype)
            s = s - slopes[:, None, None] * (torch.arange(T)[None] - time[:, None])
        p = p / p.sum(-1, keepdim=True).clamp_min(1e-30)  # a sink takes no part in the comparison of keys
        keep = mask_BT[:, time]
        kv_of = self.student.kv_of()
        turned: Tensor | None = None
        if latent.rope_dims:
            rotary = Rotary(dims=latent.rope_dims, inv_freq=tuple(latent.inv_freq_F.tolist()))
            angle = -time[:, None].double() * latent.inv_freq_F.double()
            cos, sin = angle.cos().to(s)[:, None], angle.sin().to(s)[:, None]
            shared = student.k_rope_BTF[:, None].expand(-1, len(time), -1, -1)
            turned = rotate_pairs(rotary, shared, cos, sin)  # [B, m, S, 2F']
        metric, target = [], []
        for n, a in enumerate(kv_of):
            plain = student.c_BTR @ latent.k_up_KHR[a].to(s).mT
            seen = plain[:, None].expand(-1, len(time), -1, -1)
            if turned is not None:
                seen = seen + turned @ latent.q_rope_KFH[a].to(s)
            weight = p[:, n][..., None]
            centred = seen - (weight * seen).sum(2, keepdim=True)
            weighted = weight * centred
            logits = s[:, n] - (p[:, n] * s[:, n]).sum(-1, keepdim=True)
            metric.append((weighted.mT @ centred)[keep] * self.student.scale**2)
            target.append((weighted.mT @ logits[..., None])[..., 0][keep] * self.student.scale)
        self.x.append(x_student_BTD[:, time][keep])
        self.metric.append(torch.stack(metric))
        self.target.append(torch.stack(target))


def refit_queries(
    parent: AttentionWeights,
    student: AttentionWeights,
    latent: LatentWeights,
    activations: Iterable[Activations],
    stride: int = 1,
    ridge: float = 1e-3,
) -> AttentionWeights:
    """`student` with W_q fitted to the parent's attention logits; unchanged behind a q norm or a soft cap."""
    if student.q_norm is not None or student.softcap is not None:
        return student
    fit: QueryFit
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
        y = torch.einsum("btnv,dnv->btd", attend(parent, a.x_parent_BTD).out_BTNV, parent.o_DNV)
        fit.add(attend_latent(student, latent, a.x_student_BTD).out_BTNV, y + a.gap_BTD, a.mask_BT)
    return fit.solve(student, ridge)


def _with_q_of(student: AttentionWeights, fitted: AttentionWeights) -> AttentionWeights:
    return replace(student, q_NHD=fitted.q_NHD, q_bias_NH=fitted.q_bias_NH)
