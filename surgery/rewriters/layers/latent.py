"""A latent with several readers: the owner caches a latent of its own input, and later layers read K and V from it.

What a later layer needs of a token is mostly in an earlier layer's *input*, not in its K and V. So a reader's K and V
are regressed on the owner's input; one weighted factorisation of all readers' maps, the owner's own among them, gives
the latent; and each reader, when its turn comes, is fitted anew on the latent that it will really read. K is rotated at
read, as in `lowrank`, so that the rotary embedding of every reader is exact.

The field's nearest: CLLA (arXiv:2410.15252) shares a trained MLA latent between layers. Made from pretrained weights,
with readers regressed on the owner's input, it is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...attention.latent import LatentWeights
from ...attention.linalg import blockdiag, damp, factorise, hermitian, ridge_regression
from ...attention.weights import AttentionWeights
from ...calibration.statistics import layer_activations
from ...calibration.text import Windows
from ...calibration.working_copy import WorkingCopy
from ..latent.factors import alternate
from ..latent.moments import MomentSums
from ..latent.rotary_split import output_metric, query_metric

Refit = Callable[[WorkingCopy, int, AttentionWeights, Windows], None]
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


def share_latents(copy: WorkingCopy, owners: Mapping[int, int], rank: int, windows: Windows, refit: Refit) -> None:
    """Give each owner a latent of `rank` numbers that its readers read too, layer after layer. In place.

    Args:
        owners: reader -> owner.
        refit: fits q and o of a layer to what it reads now.
    """
    fit, _ = windows.split()
    before = {layer: copy.read(layer) for layer in {*owners, *owners.values()}}
    downs: dict[int, Tensor] = {}
    for layer in sorted(before):
        owner = owners.get(layer, layer)
        if owner == layer:
            members = [layer, *(reader for reader, o in owners.items() if o == layer)]
            found = {member: reader_moments(copy, member, layer, fit) for member in members}
            downs[layer] = _down(before, found, rank)
            moments = found[layer]
        else:
            moments = reader_moments(copy, layer, owner, fit)
        copy.read_from(layer, owner, latent=_read_from(before[layer], moments, downs[owner]))
        copy.write(layer, before[layer])
        refit(copy, layer, before[layer], windows)


def regress_reader(copy: WorkingCopy, reader: int, owner: int, fit: Windows) -> LatentWeights:
    """`reader` with K and V regressed on the whole input of `owner`: what any latent of it can give at best."""
    moments = reader_moments(copy, reader, owner, fit)
    return _read_from(copy.read(reader), moments, torch.eye(len(moments.key_DD), dtype=torch.float64))


def reader_moments(copy: WorkingCopy, reader: int, owner: int, fit: Windows) -> ReaderMoments:
    """Stream the moments of one reader and its owner; `reader` may be the owner itself."""
    weights = copy.parent(reader)
    sums = MomentSums(weights)
    for a in layer_activations(copy, copy.sites[reader], fit, (owner,)):
        sums.add(a.x_parent_BTD, torch.cat([a.x_parent_BTD, a.inputs[owner]], -1), a.mask_BT)
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
    start = factorise(torch.cat([k_PD, v_QD]), key + value, rank, torch.block_diag(k_metric, v_metric), ridge=0.0)
    return alternate(start.down, k_PD, v_QD, k_metric, v_metric, key, value)[0]
