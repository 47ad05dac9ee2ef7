"""Fit one layer's latent on calibration text: candidates by KL, then refits that must earn their place.

The whole model is measured with this layer converted and the layers after it as they are; what is fitted on one part
of the text is accepted on another, and neither is ever text that a result is reported on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from ...attention.latent import LatentWeights, check_latent
from ...attention.weights import AttentionWeights
from ...calibration.statistics import Activations, layer_activations
from ...calibration.text import Windows
from ...calibration.working_copy import HELD_NUMBERS, WorkingCopy
from ...runtime.layout import AttentionSite
from . import LowrankInit, MlaInit
from .low_rank import Layout, LowrankOptions, lowrank
from .moments import LatentMoments, MomentSums
from .refit import refit_output, refit_queries
from .rotary_split import MlaOptions, mla, mla_freq

Candidate = Callable[[AttentionWeights, LatentMoments], LatentWeights]
QUERY_TOKENS = 6_000
"""Calibration tokens for the query refit: it keeps N·H·(H+1) numbers for each."""
MOMENT_TOKENS = 25_000
SEARCH_BATCHES = 2
"""Batches of check windows that candidates are compared on; refits are accepted on all of them."""


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """What is fitted around a latent; all of it is closed form but for the gains (2N numbers per layer)."""

    compensate: bool = True
    """Moments and refits from the converted prefix, not from the parent's own stream."""
    queries: bool = True
    """Rows of W_q to the parent's attention scores."""
    output: bool = True
    """W_o to the parent's attention output, and to what the layers before have lost."""
    gains: bool = False
    """One factor per query head on q and on o, by KL, over all layers together. After both refits they bring 0.3 % of
    the KL for a third of the time (`stories940K-tok105-hf`, keep 0.25); without the refits, much more."""


@dataclass
class Fitted:
    """What `fit_layer` chose, for reports."""

    choice: int
    kl: dict[str, float] = field(default_factory=dict)
    """Nats per token on the check windows after each step."""


def fit_layer(
    copy: WorkingCopy,
    layer: int,
    candidates: Sequence[Candidate],
    windows: Windows,
    options: FitOptions | None = None,
    variants: Sequence[Sequence[Candidate]] = (),
) -> Fitted:
    """Convert one layer of `copy` to the best of `candidates`, and refit q and o around it. In place.

    Args:
        candidates: in an order along which their loss falls and then rises (ranks, shares): the search walks it
            downhill from the choice of the layer before.
        variants: each made otherwise, in the same order; tried at the place that the walk ends at.
    """
    options = options or FitOptions()
    parent = _parent(copy, layer)
    fit, check = windows.split()
    activations = _activations(copy, layer, fit, options)
    moments = _moments(parent, activations())
    latent, choice = _choose(copy, layer, [candidates, *variants], parent, moments, check)
    copy.write_latent(layer, latent, parent)
    found = Fitted(choice, {"latent": copy.divergence(check, layer)})
    kl, student = found.kl["latent"], parent
    for name, wanted in (("queries", options.queries), ("output", options.output)):
        if not wanted:
            continue
        if name == "queries":
            stride = max(1, fit.tokens // QUERY_TOKENS)
            refitted = refit_queries(parent, student, latent, activations(), stride)
        else:
            refitted = refit_output(parent, student, latent, activations())
        copy.write_latent(layer, latent, refitted)
        found.kl[name] = copy.divergence(check, layer)
        if found.kl[name] > kl:
            copy.write_latent(layer, latent, student)
        else:
            kl, student = found.kl[name], refitted
    return found


def _parent(copy: WorkingCopy, layer: int) -> AttentionWeights:
    """The parent's weights of one layer.

    Raises:
        UnsupportedModel: no latent can stand for this attention.
    """
    found = copy.parent(layer)
    check_latent(found, copy.sites[layer], rotate_on_read=True)
    return found


def _activations(
    copy: WorkingCopy, layer: int, fit: Windows, options: FitOptions
) -> Callable[[], Iterator[Activations]]:
    """Both models' activations of one layer, to be asked for several times."""
    site, streams = copy.sites[layer], copy.streams(fit, layer)

    def read() -> Iterator[Activations]:
        for a in layer_activations(copy, site, fit) if streams is None else streams.activations(site):
            yield a if options.compensate else a._replace(x_student_BTD=a.x_parent_BTD, gap_BTD=a.gap_BTD * 0)

    if 3 * fit.ids_BT.numel() * site.hidden_size > HELD_NUMBERS:
        return read
    kept = list(read())
    return lambda: iter(kept)


def _moments(parent: AttentionWeights, activations: Iterator[Activations]) -> LatentMoments:
    sums = MomentSums(parent)
    for a in activations:
        if sums.tokens < MOMENT_TOKENS:
            sums.add(a.x_parent_BTD, a.x_student_BTD, a.mask_BT)
    return sums.finish()


def _choose(
    copy: WorkingCopy,
    layer: int,
    lines: Sequence[Sequence[Candidate]],
    parent: AttentionWeights,
    moments: LatentMoments,
    check: Windows,
) -> tuple[LatentWeights, int]:
    """The candidate of least KL, and its place: the first line is walked downhill, the others are tried there."""
    tried: dict[tuple[int, int], tuple[float, LatentWeights]] = {}
    single = len(lines) == len(lines[0]) == 1

    def loss(i: int, line: int = 0) -> float:
        if not 0 <= i < len(lines[line]):
            return float("inf")
        if (line, i) not in tried:
            made = lines[line][i](parent, moments)
            copy.write_latent(layer, made)
            tried[line, i] = 0.0 if single else copy.divergence(check, layer, SEARCH_BATCHES), made
        return tried[line, i][0]

    at = min(copy.choice, len(lines[0]) - 1) if copy.choice is not None else len(lines[0]) // 2
    for step in (1, -1):
        while loss(at + step) < loss(at):
            at += step
    copy.choice = at
    best = min(range(len(lines)), key=lambda line: loss(at, line))
    return tried[best, at][1], at


def cost_alone(
    copy: WorkingCopy, windows: Windows, candidate: Callable[[int, int], Candidate]
) -> Callable[[int, int], float]:
    """KL to the parent in nats per token of one layer at a number of cached numbers, all other layers as they are.

    Args:
        candidate: the form of a layer at a number of cached numbers.

    The function that is returned wants layers in rising order, and leaves `copy` as it was.
    """
    fit, check = windows.split()
    moments: dict[int, LatentMoments] = {}

    def cost(layer: int, numbers: int) -> float:
        parent, before = _parent(copy, layer), copy.form(layer)
        if layer not in moments:
            moments[layer] = _moments(parent, _activations(copy, layer, fit, FitOptions())())
        copy.write_latent(layer, candidate(layer, numbers)(parent, moments[layer]))
        found = copy.divergence(check, layer, SEARCH_BATCHES)
        copy.take_form(layer, before)
        return found

    return cost


def mla_candidates(
    splits: Sequence[tuple[int, int]],
    betas: Sequence[float] = (1.0,),
    options: MlaOptions | MlaInit = "default",
) -> list[Candidate]:
    """`mla` for every split (rank, rope_dims) and balance."""

    def candidate(rank: int, rope_dims: int, beta: float) -> Candidate:
        return lambda weights, moments: mla(weights, moments, rank, rope_dims, options=options, beta=beta)

    return [candidate(rank, rope_dims, beta) for rank, rope_dims in splits for beta in betas]


def lowrank_candidates(
    numbers: int,
    shares: Sequence[float] = (0.36, 0.42, 0.48),
    options: LowrankOptions | LowrankInit = "qw",
    layout: Layout = "joint",
    group: int = 4,
) -> list[Candidate]:
    """`lowrank` with each share of `numbers` for K, the rest for V."""

    def candidate(share: float) -> Candidate:
        k_rank = min(numbers - 1, max(1, round(numbers * share)))
        return lambda weights, moments: lowrank(
            weights, moments, k_rank, numbers - k_rank, layout=layout, group=group, options=options
        )

    return [candidate(share) for share in shares]


def freq_candidates(
    numbers: int, shares: Sequence[float], site: AttentionSite, mean_split: bool = False
) -> list[Candidate]:
    """`mla_freq` with each share of `numbers` for K, all of it rotated, the rest for V."""

    def candidate(rope_dims: int) -> Candidate:
        return lambda weights, moments: mla_freq(
            weights, moments, numbers - rope_dims, rope_dims, mean_split=mean_split
        )

    full = site.kv_heads * site.head_dim
    wide = {min(full, max(2, round(numbers * share / 2) * 2)) for share in shares}
    return [candidate(rope_dims) for rope_dims in sorted(wide) if rope_dims < numbers]
