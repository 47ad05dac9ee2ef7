"""Which layers share a cache, decided on calibration text: by measured KL, or as KVSharer does by dissimilarity."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from ...attention.latent import LatentWeights
from ...attention.weights import AttentionWeights
from ...calibration.pipeline import BATCH
from ...calibration.processes import total
from ...calibration.text import Windows
from ...calibration.visit import Visit
from ...calibration.working_copy import WorkingCopy
from ...console import progress
from .latent import regress_reader
from .maps import least_squares, pair_moments

NEAR = 4
"""Owners tried for a reader: those at most so many layers before it."""
MEASURED = 2
"""Owners of each reader, the best by what the reader's own layer loses, that the whole model is measured with first."""
AGAIN = 5
"""Cheapest pairs that are measured again on top of those already taken: errors do not add up."""
PAIR_TOKENS = 2_048
"""Tokens that whole models are measured on."""
MOMENT_WINDOWS = 32


class Form(NamedTuple):
    """One way in which a layer could read another's cache."""

    weights: AttentionWeights
    latent: LatentWeights | None = None


def search_pairs(
    copy: WorkingCopy, possible: Mapping[int, Sequence[int]], readers: int, windows: Windows, latent: bool
) -> dict[int, int]:
    """Reader -> owner, greedily by KL(parent || model), measured anew as pairs are taken.

    Args:
        possible: earlier layers whose cache each layer could read.
        readers: layers that are to keep no cache.
        latent: readers regress K and V on their owner's input, else on its K and V (or read them as they are).
    """
    sample = windows.take(MOMENT_WINDOWS)
    check = sample.split()[1]
    check = check.take(max(1, PAIR_TOKENS // check.ids_BT.shape[1]))
    forms = _nearest_forms(copy, possible, sample, latent)
    promising = [pair for i, pair in enumerate(forms) if sum(r == pair[0] for r, _ in list(forms)[:i]) < MEASURED]
    cost = {}
    with progress("measuring pairs of layers", len(promising)) as advance:
        for pair in promising:
            cost[pair] = _measure(copy, [pair], forms, check)
            advance(1)
    taken: list[tuple[int, int]] = []
    while len(taken) < readers:
        legal = [pair for pair in cost if _legal(pair, taken, forms)]
        if not legal:  # the budget before the price: the owners that promised less
            legal = [pair for pair in forms if _legal(pair, taken, forms)]
            cost |= {pair: _measure(copy, [pair], forms, check) for pair in legal}
        if not legal:
            break
        best = sorted(legal, key=cost.__getitem__)[:AGAIN]
        if taken:
            best.sort(key=lambda pair: _measure(copy, _with(pair, taken), forms, check))
        taken = _with(best[0], taken)
    copy.forget_model()
    return dict(taken)


def _nearest_forms(
    copy: WorkingCopy, possible: Mapping[int, Sequence[int]], windows: Windows, latent: bool
) -> dict[tuple[int, int], Form]:
    """By pair of reader and near owner: the better way to read. Owners with which the reader loses least come first."""
    near = {reader: [o for o in owners if reader - o <= NEAR] for reader, owners in possible.items()}
    near = {reader: owners for reader, owners in near.items() if owners}
    lenders = {owner for owners in near.values() for owner in owners}
    chosen: dict[tuple[int, int], Form] = {}
    for visit in copy.visits(windows, near, lenders, kept=chosen):
        reader = visit.layer
        before, own = copy.form(reader), copy.read(reader)
        tried: list[tuple[float, int, Form]] = []
        for owner in near[reader]:
            for form in _forms(visit, own, owner, latent):
                copy.read_from(reader, owner, latent=form.latent)
                copy.write(reader, form.weights)
                tried.append((visit.error(), owner, form))
                copy.take_form(reader, before)
                copy.write(reader, own)
        for _, owner, form in sorted(tried, key=lambda found: found[0]):
            chosen.setdefault((reader, owner), form)
    return chosen


def kvsharer_pairs(
    copy: WorkingCopy, possible: Mapping[int, Sequence[int]], readers: int, windows: Windows
) -> dict[int, int]:
    """Reader -> owner, most dissimilar caches first, kept where the final hidden states still point the same way.

    Source: KVSharer, arXiv:2410.18517: mean K and V per layer on about 30 short texts, Euclidean distance, cosine
    above 0.5 to the parent's. Weights stay as they are.
    """
    sample = windows.take(30)
    pairs = [(reader, owner) for reader, owners in possible.items() for owner in owners]
    before = {layer: copy.form(layer) for layer, owners in possible.items() if owners}
    means = mean_caches(copy, {layer for pair in pairs for layer in pair}, sample)
    distance = {(r, o): sum(float((a - b).norm()) for a, b in zip(means[r], means[o], strict=True)) for r, o in pairs}
    taken: dict[int, int] = {}
    hidden = _hidden(copy.teacher, sample)
    for reader, owner in sorted(pairs, key=distance.__getitem__, reverse=True):
        if len(taken) == readers:
            break
        if reader in taken or owner in taken or reader in taken.values():
            continue
        copy.read_from(reader, owner)
        if float(F.cosine_similarity(_hidden(copy.model, sample), hidden, dim=-1).mean()) > 0.5:
            taken[reader] = owner
        else:
            copy.take_form(reader, before[reader])
    for reader in taken:
        copy.take_form(reader, before[reader])
    copy.forget_model()
    return taken


def _forms(visit: Visit, own: AttentionWeights, owner: int, latent: bool) -> list[Form]:
    if latent:
        return [Form(own, regress_reader(visit, owner))]
    return [Form(own), Form(least_squares(own, pair_moments(visit, owner))[0])]


def _measure(
    copy: WorkingCopy,
    pairs: Sequence[tuple[int, int]],
    forms: Mapping[tuple[int, int], Form],
    check: Windows,
) -> float:
    """KL with all `pairs` mapped. The copy is left as it was."""
    kept = {reader: (copy.form(reader), copy.read(reader)) for reader, _ in pairs}
    for pair in pairs:
        reader, owner = pair
        copy.read_from(reader, owner, latent=forms[pair].latent)
        copy.write(reader, forms[pair].weights)
    found = copy.divergence(check)
    for reader, (as_it_was, weights) in kept.items():
        copy.take_form(reader, as_it_was)
        copy.write(reader, weights)
    return found


def _legal(pair: tuple[int, int], taken: Sequence[tuple[int, int]], forms: Mapping[tuple[int, int], object]) -> bool:
    """Whether the pair can join: the owner owns, and those who read the reader so far can read its owner."""
    reader, owner = pair
    owners = dict(taken)
    if reader in owners or owner in owners:
        return False
    return all((r, owner) in forms for r, o in taken if o == reader)


def _with(pair: tuple[int, int], taken: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """`taken` and `pair`; who read the new reader reads its owner."""
    reader, owner = pair
    return [*((r, owner if o == reader else o) for r, o in taken), pair]


def mean_caches(copy: WorkingCopy, layers: Iterable[int], windows: Windows) -> dict[int, list[Tensor]]:
    """K and V of each layer, averaged over texts, [K, T, H]; a text that has ended adds nothing."""
    means: dict[int, list[Tensor]] = {}
    for visit in copy.visits(windows, layers, kept=means):
        summed: list[Tensor] = []
        for a in visit.activations():
            real = a.mask_BT[:, None, :, None]
            k, v = (F.pad((t * real).sum(0), (0, 0, 0, windows.ids_BT.shape[1] - t.shape[2]))
                    for t in copy.keys_values(visit.layer, a.inputs))  # fmt: skip
            summed = [summed[0] + k, summed[1] + v] if summed else [k, v]
        means[visit.layer] = [total(t) / len(windows) for t in summed]
    return means


@torch.no_grad()
def _hidden(model: PreTrainedModel, windows: Windows) -> Tensor:
    """Final hidden states of all real tokens, [P, D]."""
    found = []
    for ids, mask in windows.batches(BATCH):
        found.append(model.base_model(input_ids=ids.to(model.device), use_cache=False).last_hidden_state[mask].cpu())
    return torch.cat(found)
