"""Which layers share a cache, decided on calibration text: by measured KL, or as KVSharer does by dissimilarity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from ...attention.latent import LatentWeights
from ...attention.weights import AttentionWeights
from ...calibration.statistics import BATCH, layer_inputs
from ...calibration.text import Windows
from ...calibration.working_copy import WorkingCopy
from ...console import progress
from .latent import regress_reader
from .maps import least_squares, pair_moments

NEAR = 4
"""Owners tried for a reader: those at most so many layers before it."""
AGAIN = 5
"""Cheapest pairs that are measured again on top of those already taken: errors do not add up."""
PAIR_WINDOWS = 8
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
    fit, check = windows.take(MOMENT_WINDOWS).split()
    check = check.take(PAIR_WINDOWS)
    pairs = [(reader, owner) for reader, owners in possible.items() for owner in owners if reader - owner <= NEAR]
    forms = {pair: _forms(copy, *pair, fit, latent) for pair in pairs}
    cost = {}
    with progress("measuring pairs of layers", len(pairs)) as advance:
        for pair in pairs:
            cost[pair] = _measure(copy, [pair], forms, check)
            advance(1)
    taken: list[tuple[int, int]] = []
    while len(taken) < readers:
        legal = [pair for pair in pairs if _legal(pair, taken, forms)]
        if not legal:
            break
        best = sorted(legal, key=cost.__getitem__)[:AGAIN]
        if taken:
            best.sort(key=lambda pair: _measure(copy, _with(pair, taken), forms, check))
        taken = _with(best[0], taken)
    return dict(taken)


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
    means = {layer: _mean_cache(copy, layer, sample) for layer in sorted({layer for pair in pairs for layer in pair})}
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
    return taken


def _forms(copy: WorkingCopy, reader: int, owner: int, fit: Windows, latent: bool) -> list[Form]:
    own = copy.read(reader)
    if latent:
        return [Form(own, regress_reader(copy, reader, owner, fit))]
    return [Form(own), Form(least_squares(own, pair_moments(copy, reader, owner, fit))[0])]


def _measure(
    copy: WorkingCopy,
    pairs: Sequence[tuple[int, int]],
    forms: Mapping[tuple[int, int], Sequence[Form]],
    check: Windows,
) -> float:
    """KL with all `pairs` mapped, the last one in the best of its forms. The copy is left as it was."""
    kept = {reader: (copy.form(reader), copy.read(reader)) for reader, _ in pairs}
    *before, last = pairs
    losses = []
    for form in forms[last]:
        for pair, chosen in [*((pair, forms[pair][-1]) for pair in before), (last, form)]:
            reader, owner = pair
            copy.read_from(reader, owner, latent=chosen.latent)
            copy.write(reader, chosen.weights)
        losses.append(copy.divergence(check))
    for reader, (as_it_was, weights) in kept.items():
        copy.take_form(reader, as_it_was)
        copy.write(reader, weights)
    return min(losses)


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


def _mean_cache(copy: WorkingCopy, layer: int, windows: Windows) -> tuple[Tensor, Tensor]:
    """K and V of one layer, averaged over texts, [K, T, H]."""
    total: list[Tensor] = []
    for inputs, _ in layer_inputs(copy, copy.form(layer).sources(layer), windows):
        k, v = (F.pad(t.sum(0), (0, 0, 0, windows.ids_BT.shape[1] - t.shape[2]))
                for t in copy.keys_values(layer, inputs))  # fmt: skip
        total = [total[0] + k, total[1] + v] if total else [k, v]
    return total[0] / len(windows), total[1] / len(windows)


@torch.no_grad()
def _hidden(model: PreTrainedModel, windows: Windows) -> Tensor:
    """Final hidden states of all real tokens, [P, D]."""
    found = []
    for ids, mask in windows.batches(BATCH):
        found.append(model.base_model(input_ids=ids.to(model.device), use_cache=False).last_hidden_state[mask].cpu())
    return torch.cat(found)
