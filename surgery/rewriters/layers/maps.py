"""What a reader must fold into its q and o to read another layer's K and V, and the mean of several layers' weights."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...attention.linalg import damp, hermitian
from ...attention.weights import AttentionWeights
from ...calibration.layers import DecoderLayers
from ...calibration.processes import total
from ...calibration.statistics import module_of
from ...calibration.visit import Visit
from ...calibration.working_copy import WorkingCopy
from ...runtime.layout import AttentionSite
from ..common.moments import normed_heads
from ..heads.folding import fold_queries, foldable, permute_queries


@dataclass(frozen=True, kw_only=True)
class PairMoments:
    """Second moments of a reader's own heads and of those that it is to read: normed, before rotation, float64."""

    k_KHKH: Tensor
    """E[k_reader,a k_owner,bᵀ]"""
    k_KHH: Tensor
    """E[k_owner,b k_owner,bᵀ]"""
    v_KVKV: Tensor
    v_KVV: Tensor
    q_NHH: Tensor
    """E[q_h q_hᵀ] of the reader."""


def pair_moments(visit: Visit, owner: int) -> PairMoments:
    """Stream the moments of the visited layer and of one whose cache it is to read, in the converted prefix."""
    reader = visit.layer
    own, other = visit.copy.read(reader), visit.copy.read(owner)
    sums: list[Tensor] = []
    for a in visit.activations(sources=(reader, owner)):
        q, k, v = normed_heads(own, a.inputs[reader][a.mask_BT])
        _, k_o, v_o = normed_heads(other, a.inputs[owner][a.mask_BT])
        parts = [
            torch.einsum("pah,pbj->ahbj", k, k_o),
            torch.einsum("pbi,pbj->bij", k_o, k_o),
            torch.einsum("pah,pbj->ahbj", v, v_o),
            torch.einsum("pbi,pbj->bij", v_o, v_o),
            torch.einsum("pni,pnj->nij", q, q),
        ]
        sums = [a + b for a, b in zip(sums, parts, strict=True)] if sums else parts
    k_KHKH, k_KHH, v_KVKV, v_KVV, q_NHH = (total(s) / visit.tokens for s in sums)
    return PairMoments(k_KHKH=k_KHKH, k_KHH=k_KHH, v_KVKV=v_KVKV, v_KVV=v_KVV, q_NHH=q_NHH)


def least_squares(weights: AttentionWeights, moments: PairMoments) -> tuple[AttentionWeights, list[int]]:
    """The reader with the best linear maps from the owner's heads to its own, folded into q and o; its heads' order.

    Each KV head reads the head of the owner that explains it best: one complex factor per rotary frequency for K (what
    commutes with the rotation), a full map for channels that do not turn and for V. Heads change places only where
    query heads may.

    Source: regression of one layer's K and V on another's, as in KV transfer; assignment and metrics are ours.
    """
    K, pairs = weights.kv_heads, range(weights.kv_heads)
    k_maps = [[_key_map(weights, moments, a, b) for b in pairs] for a in pairs]
    v_maps = [[_value_map(moments, a, b) for b in pairs] for a in pairs]
    o = weights.o_DNV.double().transpose(0, 1)
    explained = torch.zeros(K, K, dtype=torch.float64)
    for a in pairs:
        group = list(weights.groups[a])
        k_metric = moments.q_NHH[group].sum(0) * weights.scale**2
        v_metric = (o[group].mT @ o[group]).sum(0)
        gain_K = torch.stack([_explained(k_maps[a][b], moments.k_KHH[b], k_metric) for b in pairs])
        gain_V = torch.stack([_explained(v_maps[a][b], moments.v_KVV[b], v_metric) for b in pairs])
        # Each in parts of the best: score and output have no common unit.
        explained[a] = gain_K / gain_K.max().clamp_min(1e-30) + gain_V / gain_V.max().clamp_min(1e-30)
    source = assign(explained) if weights.permutable and not weights.gated_output else list(pairs)
    read, maps = torch.empty_like(moments.q_NHH), torch.empty(len(o), *moments.v_KVV.shape[1:], dtype=torch.float64)
    for a in pairs:
        for h in weights.groups[a]:
            read[h], maps[h] = k_maps[a][source[a]], v_maps[a][source[a]]
    folded = fold_queries(weights, read, foldable(weights))
    if weights.v_foldable:
        folded = replace(folded, o_DNV=torch.einsum("ndv,nvw->dnw", o, maps).to(weights.o_DNV.dtype))
    groups = tuple(weights.groups[source.index(b)] for b in pairs)
    return permute_queries(replace(folded, groups=groups)), [h for group in groups for h in group]


def map_values(weights: AttentionWeights, moments: PairMoments) -> AttentionWeights:
    """The reader of another layer's V alone: each KV head regressed on the same head there, folded into o."""
    if not weights.v_foldable:
        return weights
    maps = torch.stack([_value_map(moments, a, a) for a in range(weights.kv_heads)])[weights.kv_of()]
    o = torch.einsum("dnv,nvw->dnw", weights.o_DNV.double(), maps)
    return replace(weights, o_DNV=o.to(weights.o_DNV.dtype))


def assign(gain_KK: Tensor) -> list[int]:
    """One column for each row, all different, with a large sum: from many starts, exchanges of two while any helps."""
    gain, K = gain_KK.tolist(), len(gain_KK)
    best: list[int] = []
    for shift in range(K):
        chosen, improved = [(a + shift) % K for a in range(K)], True
        while improved:
            improved = False
            for a, b in itertools.combinations(range(K), 2):
                i, j = chosen[a], chosen[b]
                if gain[a][j] + gain[b][i] > gain[a][i] + gain[b][j] + 1e-12:
                    chosen[a], chosen[b], improved = j, i, True
        if not best or sum(gain[a][i] for a, i in enumerate(chosen)) > sum(gain[a][i] for a, i in enumerate(best)):
            best = chosen
    return best


def mean_weights(copy: WorkingCopy, weights: dict[int, AttentionWeights], owner: int) -> AttentionWeights:
    """The owner with the true mean of the K and V rows of `weights` (its own among them).

    Rows of each layer are taken in units of the normed residual stream, that is with the gain of the layer's input
    norm, and the mean is brought to the owner's.
    """
    gains = {layer: input_gain(copy.layers, copy.sites[layer]) for layer in weights}
    own = weights[owner]

    def mean(name: str, scaled: bool) -> Tensor | None:
        tensors = {layer: getattr(w, name) for layer, w in weights.items()}
        if any(t is None for t in tensors.values()):
            return getattr(own, name)
        if scaled:
            tensors = {layer: t.double() * gains[layer] for layer, t in tensors.items()}
        total = torch.stack([t.double() for t in tensors.values()]).mean(0)
        return (total / gains[owner] if scaled else total).to(getattr(own, name).dtype)

    made: dict[str, Any] = {name: mean(name, True) for name in ("k_KHD", "v_KVD")}
    made |= {name: mean(name, False) for name in ("k_bias_KH", "v_bias_KV", "k_norm_KH", "k_norm_bias_KH")}
    return replace(own, **made)


def input_gain(layers: DecoderLayers, site: AttentionSite) -> Tensor:
    """[D]: the gain of the norm that makes the input of q, k and v; ones where none does. float64.

    Found by identity of tensors, measured by what the norm does to ±1: mean 0 and rms 1, so that every norm leaves it.
    """
    made: dict[int, nn.Module] = {}
    read: list[int] = []
    kept: list[Tensor] = []  # an id is free again as soon as its tensor is gone

    def record(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor):
            kept.append(output)
            made[id(output)] = module
            if module is projection:
                read.append(id(args[0]))

    index = layers.place[site.layer]
    layer = layers.build(index)
    projection = layer.get_submodule(module_of(site.q).removeprefix(f"{layers.name}.{index}."))
    h, calls = layers.entering(torch.zeros(1, 2, dtype=torch.long))
    handles = [module.register_forward_hook(record) for module in layer.modules()]
    try:
        with torch.no_grad():
            layers.run(layer, h, calls[index])
    finally:
        for handle in handles:
            handle.remove()
    norm = made.get(read[0]) if read else None
    ones = torch.ones(site.hidden_size, dtype=torch.float64)
    if norm is None or not any(p.shape == (site.hidden_size,) for p in norm.parameters(recurse=False)):
        return ones
    sign = torch.ones(site.hidden_size)
    sign[1::2] = -1
    with torch.no_grad():
        plus, minus = (norm(x[None, None].to(next(norm.parameters()))) for x in (sign, -sign))
    return (plus - minus).flatten().double().cpu() / 2 * sign


def _key_map(weights: AttentionWeights, moments: PairMoments, a: int, b: int) -> Tensor:
    """[H, H] A with k_reader,a ≈ A k_owner,b: rotations and factors per pair, free among channels that do not turn."""
    cross, own = moments.k_KHKH[a, :, b], moments.k_KHH[b]
    A = torch.zeros_like(own)
    first, second = weights.rotated()
    energy = own[first, first] + own[second, second]
    real = (cross[first, first] + cross[second, second]) / energy.clamp_min(1e-30)
    imag = (cross[second, first] - cross[first, second]) / energy.clamp_min(1e-30)
    A[first, first], A[second, second] = real, real
    A[second, first], A[first, second] = imag, -imag
    rest = weights.unrotated()
    if rest:
        block = own[rest][:, rest]
        A[torch.tensor(rest)[:, None], torch.tensor(rest)] = torch.linalg.solve(
            damp(block, 1e-4), cross[rest][:, rest].mT
        ).mT
    return A


def _value_map(moments: PairMoments, a: int, b: int) -> Tensor:
    """[V, V] N with v_reader,a ≈ N v_owner,b."""
    return torch.linalg.solve(damp(moments.v_KVV[b], 1e-4), moments.v_KVKV[a, :, b].mT).mT


def _explained(map_HH: Tensor, own_HH: Tensor, metric_HH: Tensor) -> Tensor:
    """tr(M A E[y yᵀ] Aᵀ): what a least-squares map explains is the energy of what it gives."""
    return (metric_HH * hermitian(map_HH @ own_HH @ map_HH.mT)).sum()
