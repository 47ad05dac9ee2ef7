"""KV heads repeated until every group has the same size and holds consecutive query heads: what engines can say."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from ..runtime.layout import Heads


def repeated_heads(layers: Sequence[Heads]) -> tuple[int, list[tuple[int, ...]]]:
    """The fewest KV heads with which layers of one query head count all have equal runs of query heads.

    Repetition is lossless: query heads go on reading the K and V that they read.

    Returns:
        Their number K', and per layer which of its own heads each of the K' copies: query head h reads copy
        h // (N / K').
    """
    reads = [_reads(heads) for heads in layers]
    queries = len(reads[0])
    run = 0
    for kv in reads:
        for start, (left, right) in enumerate(itertools.pairwise(kv)):
            if left != right:
                run = math.gcd(run, start + 1)
    run = math.gcd(run, queries)
    return queries // run, [tuple(kv[::run]) for kv in reads]


def _reads(heads: Heads) -> list[int]:
    """For each query head the KV head that it reads."""
    of_query = {query: kv for kv, group in enumerate(heads.groups) for query in group}
    return [of_query[query] for query in sorted(of_query)]
