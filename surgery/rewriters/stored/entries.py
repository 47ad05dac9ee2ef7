"""Entries of latent caches of calibration text, and the one metric in which their errors are felt by keys and values.

An entry is [c ; k_r]: keys and values are made from c, and k_r is rotated. Its error δ moves the score of a head by
(q~ δ) scale, with q~ the head's query in the latent space, and so its output by that times p (v - v̄); and it moves the
value by v_up δ, the output by p times that. Both are in units of the attention's output once W_o is applied, so their
squares add up: M = Σ_h scale² E|W_o (v - v̄)|² E[q~ q~'] + v_up' W_o' W_o v_up.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...attention.latent import LatentWeights, cached_entries, expanded_weights
from ...attention.weights import AttentionWeights
from ...calibration.processes import gathered
from ...calibration.visit import Visit
from ...runtime.layout import Codec
from ..latent.moments import LatentMoments, MomentSums
from .samples import TOKENS, behind_first, check_enough


def sampled_entries(visit: Visit, store: Codec, latent: LatentWeights) -> tuple[Tensor, Tensor]:
    """Entries [1, P, W] of the tokens behind the first ones, and their metric [1, W, W].

    Raises:
        PlanError: the text has too few of them.
    """
    weights = visit.copy.read(visit.layer)
    if latent.rotate_on_read:
        weights = expanded_weights(weights, latent)
    sums, entries = MomentSums(weights), []
    for found in visit.activations(TOKENS):
        x, mask = found.x_student_BTD, found.mask_BT
        sums.add(x, x, mask)
        entries.append(torch.cat(cached_entries(latent, x), -1)[behind_first(mask, store)])
    entries_PW = gathered(torch.cat(entries))
    check_enough(visit, store, *entries_PW.shape)
    return entries_PW[None], entry_metric(weights, latent, sums.finish())[None]


def entry_metric(weights: AttentionWeights, latent: LatentWeights, moments: LatentMoments) -> Tensor:
    """[W, W]: see above. Phases of the rotated pairs are alike, so that only their energies are left.

    Args:
        weights: the layer with its own q and o.
    """
    kv_of, down = weights.kv_of(), latent.down_RD.double()
    o_NDV = weights.o_DNV.double().transpose(0, 1)
    v_up_NVR = latent.v_up_KVR.double()[kv_of]
    read_NRR = v_up_NVR.mT @ (o_NDV.mT @ o_NDV) @ v_up_NVR
    # Means that stand apart count as biases in the moments; the latent itself may have none.
    spread_RR = down @ moments.key_DD[: down.shape[1], : down.shape[1]] @ down.T
    weight_N = weights.scale**2 * (read_NRR * spread_RR).sum((1, 2))
    q_NHH = moments.q_read_NHH if latent.rotate_on_read else moments.q_NHH
    k_up_NHR = latent.k_up_KHR.double()[kv_of]
    keys = torch.einsum("n,nhr,nhj,njs->rs", weight_N, k_up_NHR, q_NHH, k_up_NHR)
    q_rope_NFH = latent.q_rope_KFH.double()[kv_of]
    turning_F = torch.einsum("n,nfh,nhj,nfj->f", weight_N, q_rope_NFH, moments.q_NHH, q_rope_NFH)
    pairs = turning_F.unflatten(0, (2, -1)).mean(0).repeat(2)
    return torch.block_diag(keys + read_NRR.sum(0), torch.diag(pairs))
