"""A latent with several readers: the owner caches a latent of its own input, and later layers read K and V from it.

What a later layer needs of a token is mostly in an earlier layer's *input*, not in its K and V. So a reader's K and V
are regressed on the owner's input; one weighted factorisation of all readers' maps, the owner's own among them, gives
the latent; and each reader, when its turn comes, is fitted anew on the latent that it will really read. K is rotated at
read, as in `lowrank`, so that the rotary embedding of every reader is exact.

The field's nearest: CLLA (arXiv:2410.15252) shares a trained MLA latent between layers. Made from pretrained weights,
with readers regressed on the owner's input, it is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...attention.latent import LatentWeights
from ...attention.linalg import blockdiag, damp, factorise, hermitian, ridge_regression
from ...attention.weights import AttentionWeights
from ...calibration.text import Windows
from ...calibration.visit import Visit
from ...calibration.working_copy import WorkingCopy
from ..latent.factors import CommonBasis, alternate, definite, orthonormal
from ..latent.moments import MomentSums
from ..latent.rotary_split import output_metric, query_metric

Refit = Callable[[Visit, AttentionWeights], None]
RIDGE = 1e-4
UNIFORM = 0.05
"""Part of the moments in which every token counts alike: attention alone leaves directions that it never met."""
VALUE_WEIGHT = 3.0
"""V's error against K's beside equal energies, as in `mla`."""


@dataclass(frozen=True, kw_only=True)
class ReaderMoments:
    """What one layer's K and V, in the parent, have to do with an owner's input, in the converted prefix. float64.

    D stands for D+1 where the projections have a bias. K and V weigh tokens by how they are attended to.
    """

    key_cross_DD: Tensor
    """E[x_reader x_ownerᵀ]"""
    key_DD: Tensor
    """E[x_owner x_ownerᵀ]"""
    value_cross_DD: Tensor
    value_DD: Tensor
    query_NHH: Tensor
    """Queries turned to the keys that they look at: the metric of K."""


def share_latents(
    copy: WorkingCopy, owners: Mapping[int, int], ranks: Mapping[int, int], windows: Windows, refit: Refit
) -> None:
    """Give each owner a latent that its readers read too, layer after layer. In place.

    Args:
        owners: reader -> owner.
        ranks: owner -> numbers of its latent.
        refit: fits q and o of a layer to what it reads now.
    """
    readers = {owner: [reader for reader, o in owners.items() if o == owner] for owner in set(owners.values())}
    before = {layer: copy.read(layer) for layer in {*owners, *readers}}
    kept: dict[str, dict[int, Any]] = {"moments": {}, "downs": {}}
    for visit in copy.visits(windows, before, lenders=readers, kept=kept):
        moments, downs, layer = kept["moments"], kept["downs"], visit.layer
        owner = owners.get(layer, layer)
        if owner == layer:
            own = ((a.x_parent_BTD, a.x_student_BTD, a.mask_BT) for a in visit.activations())
            moments[layer] = _moments(copy.parent(layer), own)
            for reader, x in visit.ahead(readers[layer]):
                pairs = ((x[i], a.x_student_BTD, a.mask_BT) for i, a in enumerate(visit.activations()))
                moments[reader] = _moments(copy.parent(reader), pairs)
            downs[layer] = _down(before, {member: moments[member] for member in [layer, *readers[layer]]}, ranks[layer])
        copy.read_from(layer, owner, latent=_read_from(before[layer], moments.pop(layer), downs[owner]))
        copy.write(layer, before[layer])
        refit(visit, before[layer])


def regress_reader(visit: Visit, owner: int) -> LatentWeights:
    """The visited layer with K and V regressed on the whole input of `owner`: what any latent of it gives at best."""
    pairs = ((a.x_parent_BTD, a.inputs[owner], a.mask_BT) for a in visit.activations(sources=(owner,)))
    moments = _moments(visit.copy.parent(visit.layer), pairs)
    return _read_from(visit.copy.read(visit.layer), moments, torch.eye(len(moments.key_DD), dtype=torch.float64))


def _moments(weights: AttentionWeights, pairs: Iterable[tuple[Tensor, Tensor, Tensor]]) -> ReaderMoments:
    """Stream the moments of a reader and its owner, which may be the reader itself.

    Args:
        weights: the reader's, in the parent.
        pairs: what the reader reads in the parent, what the owner reads in the copy, and the mask of real tokens.
    """
    sums = MomentSums(weights)
    for x_reader, x_owner, mask in pairs:
        sums.add(x_reader, torch.cat([x_reader, x_owner], -1), mask)
    found = sums.finish()
    D = weights.q_NHD.shape[-1]
    wanted = [*range(D), 2 * D] if weights.has_bias else [*range(D)]  # x~ = [x_reader; x_owner; 1]
    given = [*range(D, 2 * D + weights.has_bias)]
    uniform = UNIFORM * found.input_DD

    def cut(moment: Tensor, rows: list[int]) -> Tensor:
        return (moment + uniform)[rows][:, given]

    return ReaderMoments(
        key_cross_DD=cut(found.key_DD, wanted),
        key_DD=hermitian(cut(found.key_DD, given)),
        value_cross_DD=cut(found.value_DD, wanted),
        value_DD=hermitian(cut(found.value_DD, given)),
        query_NHH=found.q_read_NHH,
    )


def _read_from(weights: AttentionWeights, moments: ReaderMoments, down_RD: Tensor) -> LatentWeights:
    """The layer that reads c = down x_owner: K and V regressed on x_owner, and their maps on c."""
    k, v = (
        _up(w_PD, C, down_RD).unflatten(0, (weights.kv_heads, -1))
        for w_PD, C in zip(_maps(weights, moments), (moments.key_DD, moments.value_DD), strict=True)
    )
    K, H, D = weights.kv_heads, weights.head_dim, down_RD.shape[1]
    return LatentWeights(
        down_RD=down_RD,
        rope_FD=down_RD.new_zeros(0, D),
        inv_freq_F=down_RD.new_zeros(0),
        k_up_KHR=k,
        q_rope_KFH=down_RD.new_zeros(K, 0, H),
        v_up_KVR=v,
        rotate_on_read=True,
    ).to(torch.float32)


def _maps(weights: AttentionWeights, moments: ReaderMoments) -> tuple[Tensor, Tensor]:
    """K and V [K·H, D], [K·V, D] as maps of the owner's input; with little text, as if it were the reader's."""
    k, v = weights.with_bias("k").flatten(0, 1), weights.with_bias("v").flatten(0, 1)
    return (
        ridge_regression(k @ moments.key_cross_DD, moments.key_DD, RIDGE, k),
        ridge_regression(v @ moments.value_cross_DD, moments.value_DD, RIDGE, v),
    )


def _up(w_PD: Tensor, C_DD: Tensor, down_RD: Tensor) -> Tensor:
    """argmin over up of E‖w x - up down x‖²."""
    return torch.linalg.solve(damp(down_RD @ C_DD @ down_RD.mT, 1e-9), down_RD @ C_DD @ w_PD.mT).mT


def _down(weights: Mapping[int, AttentionWeights], moments: Mapping[int, ReaderMoments], rank: int) -> Tensor:
    """[R, D]: the latent of the owner's input that serves all readers' K and V best, each in its own metric."""
    D = len(next(iter(moments.values())).key_DD)
    if rank >= D:
        return torch.eye(D, dtype=torch.float64)
    k_rows, v_rows, k_metrics, v_metrics = [], [], [], []
    for layer, m in moments.items():
        w = weights[layer]
        k, v = _maps(w, m)
        k_rows.append(k)
        v_rows.append(v)
        k_metrics.append(blockdiag(query_metric(w, m.query_NHH)) * w.scale**2)
        v_metrics.append(blockdiag(output_metric(w)))
    k_PD, v_QD = torch.cat(k_rows), torch.cat(v_rows)
    key = torch.stack([m.key_DD for m in moments.values()]).mean(0)
    value = torch.stack([m.value_DD for m in moments.values()]).mean(0)
    k_metric = torch.block_diag(*(damp(metric, 1e-7) for metric in k_metrics))
    v_metric = torch.block_diag(*(damp(metric, 1e-7) for metric in v_metrics))
    k_energy, v_energy = (
        float((M * (W @ C @ W.mT)).sum()) for W, C, M in ((k_PD, key, k_metric), (v_QD, value, v_metric))
    )
    v_metric = v_metric * (VALUE_WEIGHT**2 * k_energy / max(v_energy, 1e-300))
    basis = CommonBasis.of(*definite(key, value))
    k_PD, v_QD = basis.enter(k_PD), basis.enter(v_QD)
    start = factorise(torch.cat([k_PD, v_QD]), None, rank, torch.block_diag(k_metric, v_metric), ridge=0.0)
    return orthonormal(basis.leave(alternate(start.down, k_PD, v_QD, k_metric, v_metric, basis.share_D)[0]))
