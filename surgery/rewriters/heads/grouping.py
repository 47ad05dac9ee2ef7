"""Which KV heads go together, and which queries read them."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from functools import cache

import torch
from torch import Tensor

from ...attention.linalg import hermitian, to_double
from ...attention.weights import AttentionWeights
from ...errors import RecipeError
from ..common.moments import Block, Moments, rotated_block, scalar_gram, unrotated_block, value_block

Groups = tuple[tuple[int, ...], ...]
"""Source KV heads of each new KV head."""


def neighbour_groups(heads: int, kv_heads: int) -> Groups:
    """Head i joins group i // (heads / kv_heads), the grouping that transformers' repeat_kv undoes."""
    check_divides(heads, kv_heads)
    size = heads // kv_heads
    return tuple(tuple(range(g * size, (g + 1) * size)) for g in range(kv_heads))


def check_divides(heads: int, kv_heads: int, where: str = "") -> None:
    """Refuse a number of KV heads that equal groups cannot have."""
    if kv_heads < 1 or heads % kv_heads:
        divisors = ", ".join(str(d) for d in range(1, heads + 1) if heads % d == 0)
        rest = f"{heads} % {kv_heads} != 0" if kv_heads > 0 else "it must be positive"
        raise RecipeError(f"{where}cannot group {heads} KV heads into {kv_heads} ({rest}). Use one of {divisors}.")


def search_groups(
    cost: Callable[[tuple[int, ...]], float],
    heads: int,
    kv_heads: int,
    *,
    limit: int = 20_000,
    exact: int = 5_000,
    starts: int = 20,
    seed: int = 0,
) -> Groups:
    """The equal-sized groups with the smallest summed cost.

    Exhaustive where there are at most `limit` partitions, else pair swaps to a local minimum from the neighbour
    grouping and `starts` random ones. Where there are more than `exact` groups to choose from, the swaps add up the
    costs of the pairs in a group instead of its own (32 heads have 36,000 groups of four, and 496 pairs), and its own
    cost decides only between the result and the neighbours. Neighbours win ties.
    """
    check_divides(heads, kv_heads)
    size = heads // kv_heads
    cached = cache(cost)
    best: Groups = neighbour_groups(heads, kv_heads)
    if count_partitions(heads, size) <= limit:
        return _cheapest([best, *partitions(heads, size)], cached)
    if math.comb(heads, size) <= exact:
        return _cheapest([best, *_swap(cached, heads, kv_heads, starts, seed)], cached)

    @cache
    def by_pairs(group: tuple[int, ...]) -> float:
        return sum(cached(pair) for pair in itertools.combinations(group, 2))

    return _cheapest([best, _cheapest(_swap(by_pairs, heads, kv_heads, starts, seed), by_pairs)], cached)


def _cheapest(candidates: Sequence[Groups], cost: Callable[[tuple[int, ...]], float]) -> Groups:
    """The first of the candidates that none beats by more than rounding."""
    best, best_cost = candidates[0], sum(map(cost, candidates[0]))
    for groups in candidates[1:]:
        value = sum(map(cost, groups))
        if value < best_cost - 1e-12 * abs(best_cost):
            best, best_cost = groups, value
    return best


def _swap(cost: Callable[[tuple[int, ...]], float], heads: int, kv_heads: int, starts: int, seed: int) -> list[Groups]:
    """Local minima under swaps of two heads, from the neighbour grouping and `starts` random ones."""
    size, rng, found = heads // kv_heads, random.Random(seed), []
    for start in range(starts + 1):
        order = list(range(heads))
        if start:
            rng.shuffle(order)
        trial = [tuple(sorted(order[g * size : (g + 1) * size])) for g in range(kv_heads)]
        improved = True
        while improved:
            improved = False
            for g, h in itertools.combinations(range(kv_heads), 2):
                before = cost(trial[g]) + cost(trial[h])
                for a, b in itertools.product(trial[g], trial[h]):
                    one = tuple(sorted({*trial[g], b} - {a}))
                    two = tuple(sorted({*trial[h], a} - {b}))
                    if cost(one) + cost(two) < before - 1e-12 * abs(before):
                        trial[g], trial[h], improved = one, two, True
                        break
        found.append(tuple(sorted(trial)))
    return found


def partitions(heads: int, size: int) -> Iterator[Groups]:
    """Every way to split range(heads) into unordered groups of `size`."""

    def split(left: tuple[int, ...]) -> Iterator[Groups]:
        if not left:
            yield ()
            return
        for rest in itertools.combinations(left[1:], size - 1):
            group = (left[0], *rest)
            for tail in split(tuple(h for h in left if h not in group)):
                yield (group, *tail)

    return split(tuple(range(heads)))


def count_partitions(heads: int, size: int) -> int:
    """Their number: heads! / (size!^n n!) with n = heads / size."""
    n = heads // size
    return math.factorial(heads) // (math.factorial(size) ** n * math.factorial(n))


def rank1_cost(weights: AttentionWeights, moments: Moments) -> Callable[[tuple[int, ...]], float]:
    """Cost of a group: its rank-1 key and value errors, each relative to the layer's total energy of that kind."""
    pairs, nope, value = (f(weights, moments) for f in (rotated_block, unrotated_block, value_block))
    k_total = (pairs.gram.diagonal(dim1=1, dim2=2).real * pairs.metric.T).sum() + _block_energy(nope)
    v_total = _block_energy(value)
    nope_PP, value_PP = _weighed(nope), _weighed(value)

    def cost(group: tuple[int, ...]) -> float:
        if len(group) == 1:
            return 0.0
        g = list(group)
        lam = pairs.metric[g]
        lam = lam.maximum(1e-6 * lam.mean())
        root = lam.T.sqrt().to(pairs.gram.dtype)
        scaled = root[:, :, None] * pairs.gram[:, g][:, :, g] * root[:, None, :]
        k_error = _tail(scaled, 1).sum() + _block_tail(nope_PP, g)
        return float(k_error / k_total.clamp_min(1e-300) + _block_tail(value_PP, g) / v_total.clamp_min(1e-300))

    return cost


def _block_energy(block: Block) -> Tensor:
    return torch.stack([(block.metric[a] * block.gram[a, :, a]).sum() for a in range(block.metric.shape[0])]).sum()


def _tail(x: Tensor, rank: int) -> Tensor:
    """Sum of all but the `rank` largest eigenvalues."""
    if x.shape[0] == 0:
        return x.new_zeros((), dtype=torch.float64)
    return torch.linalg.eigvalsh(hermitian(x))[..., : x.shape[-1] - rank].clamp_min(0).sum(-1)


def _weighed(block: Block) -> Tensor:
    """Gram under the metrics, Rᵀ gram R with block-diagonal R Rᵀ = metric: [K, H', K, H']."""
    values, vectors = torch.linalg.eigh(block.metric)
    root = vectors * values.clamp_min(0).sqrt()[:, None, :]
    return torch.einsum("ahi,ahbj->aibj", root, torch.einsum("ahbk,bkj->ahbj", block.gram, root))


def _block_tail(weighed_KHKH: Tensor, g: list[int]) -> Tensor:
    m, H = len(g), weighed_KHKH.shape[1]
    if H == 0:
        return torch.zeros((), dtype=torch.float64)
    return _tail(weighed_KHKH[g][:, :, g].reshape(m * H, m * H), H)


def cluster_heads(weights: AttentionWeights, moments: Moments, kv_heads: int) -> Groups:
    """AsymGQA (arXiv:2406.14963): heads with similar activations together, sizes free.

    Average-link clustering on the cosine between keys plus that between values, as they are (no alignment).
    """
    blocks = ((rotated_block(weights, moments), unrotated_block(weights, moments)), (value_block(weights, moments),))
    everyone = list(range(weights.kv_heads))
    likeness = torch.zeros(len(everyone), len(everyone), dtype=torch.float64)
    for kind in blocks:
        gram = torch.stack([scalar_gram(b, everyone)[0] for b in kind]).sum(0)
        size = gram.diagonal().clamp_min(1e-300).sqrt()
        likeness += gram / size[:, None] / size
    clusters = [[a] for a in everyone]
    while len(clusters) > kv_heads:
        one, two = max(
            itertools.combinations(range(len(clusters)), 2),
            key=lambda ab: float(likeness[clusters[ab[0]]][:, clusters[ab[1]]].mean()),
        )
        clusters[one] = sorted(clusters[one] + clusters.pop(two))
    return tuple(sorted(tuple(c) for c in clusters))


def evolve_groups(
    weights: AttentionWeights, kv_heads: int, *, population: int = 100, generations: int = 60, seed: int = 0
) -> Groups:
    """QCQA (arXiv:2406.10247): a genetic search over group ids, sizes free, for the least Σ_gΣ_a‖W_a - mean_g‖² (K, V).

    The number of groups is fixed by the plan here, so the second objective of the source (cache size) drops out.
    Crossover .9, mutation 1/K, the best tenth survives.
    """
    K = weights.kv_heads
    rows = torch.cat([weights.with_bias("k").flatten(1), weights.with_bias("v").flatten(1)], 1)
    gram = (rows @ rows.T).tolist()  # thousands of tiny sums: plain floats are faster than tensors
    rng = random.Random(seed)

    @cache
    def explained(group: tuple[int, ...]) -> float:
        return float(sum(gram[a][b] for a in group for b in group)) / len(group)

    @cache
    def cost(ids: tuple[int, ...]) -> float:
        groups: list[list[int]] = [[] for _ in range(kv_heads)]
        for a, g in enumerate(ids):
            groups[g].append(a)
        return -sum(explained(tuple(g)) for g in groups) if all(groups) else math.inf

    people = [tuple(rng.randrange(kv_heads) for _ in range(K)) for _ in range(population)]
    people[0] = tuple(a * kv_heads // K for a in range(K))
    for _ in range(generations):
        people.sort(key=cost)
        children = people[: max(1, population // 10)]
        while len(children) < population:
            mother, father = (min(rng.sample(people, 3), key=cost) for _ in range(2))
            child = [m if rng.random() < 0.5 else f for m, f in zip(mother, father, strict=True)]
            child = child if rng.random() < 0.9 else list(mother)
            children.append(tuple(rng.randrange(kv_heads) if rng.random() < 1 / K else c for c in child))
        people = children
    best = min(people, key=cost)
    return tuple(sorted(tuple(a for a in range(K) if best[a] == g) for g in range(kv_heads)))


def share_queries(moments: Moments, groups: Groups, heads: int) -> Groups:
    """KDGQA: query heads of each new KV head in proportion to the mean norm of the keys in its group."""
    norms = to_double(moments.k_KHKH).diagonal(dim1=0, dim2=2).diagonal(dim1=0, dim2=1).sum(-1).sqrt()
    return allocate_queries([float(norms[list(g)].mean()) for g in groups], heads)


def allocate_queries(key_norms: Sequence[float], heads: int) -> Groups:
    """Query heads per KV head in proportion to the keys' norm; each at least one, largest remainders first.

    The published min-max form gives the smallest group no query at all, and is 0/0 where the norms are equal.
    """
    K = len(key_norms)
    if heads < K:
        raise RecipeError(f"{heads} query heads cannot give each of {K} KV heads one.")
    total = sum(key_norms)
    share = [heads * x / total if total > 0 else heads / K for x in key_norms]
    counts = [max(1, math.floor(x)) for x in share]
    while sum(counts) < heads:
        counts[max(range(K), key=lambda a: (share[a] - counts[a], -a))] += 1
    while sum(counts) > heads:
        counts[max((a for a in range(K) if counts[a] > 1), key=lambda a: (counts[a] - share[a], a))] -= 1
    ends = list(itertools.accumulate(counts, initial=0))
    return tuple(tuple(range(a, b)) for a, b in itertools.pairwise(ends))
