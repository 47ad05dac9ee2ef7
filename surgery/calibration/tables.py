"""Embedding tables and heads in the format of their file: beside one layer they are the largest weights in memory.

At a 7B shape both take 1 GB in float32, half of that in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TABLES = (nn.Embedding, nn.Linear)
"""Of no other class, for those may read their weights in ways of their own."""
TABLE_NUMBERS = 2**24
"""Numbers of a matrix for which it is worth it."""
WIDENED = 2**21
"""Numbers of a head that are in float32 together: few enough to stay in the processor's cache."""


def narrow_tables(model: nn.Module, but: Collection[nn.Module]) -> Callable[[], None]:
    """Keep large tables of embeddings, and large heads, in half precision where that holds their values exactly.

    They give what they gave, in float32.

    Args:
        model: in float32; changed in place.
        but: modules that are left alone.

    Returns:
        What puts everything back.
    """
    left, kept = {id(m) for m in but}, dict[int, nn.Parameter | None]()
    before: list[tuple[nn.Embedding | nn.Linear, Tensor]] = []
    for module in model.modules():
        if type(module) not in TABLES or id(module) in left or "forward" in module.__dict__:
            continue
        assert isinstance(module, nn.Embedding | nn.Linear)
        weight = module.weight
        if weight.dtype != torch.float32 or weight.is_meta or weight.numel() < TABLE_NUMBERS:
            continue
        if id(weight) not in kept:
            kept[id(weight)] = _narrow(weight)
        narrow = kept[id(weight)]
        if narrow is None or getattr(module, "max_norm", None) is not None:
            continue
        before.append((module, weight))
        module.weight = narrow
        read: Callable[..., Tensor] = _look_up if isinstance(module, nn.Embedding) else _multiply
        module.__dict__["forward"] = partial(read, module)

    def restore() -> None:
        for module, weight in before:
            module.weight = weight
            del module.__dict__["forward"]

    return restore


def _narrow(weight: Tensor) -> nn.Parameter | None:
    for dtype in (torch.bfloat16, torch.float16):
        narrow = weight.detach().to(dtype)
        if all(torch.equal(a.float(), b) for a, b in zip(narrow.split(4096), weight.split(4096), strict=True)):
            return nn.Parameter(narrow, requires_grad=False)
    return None


def _look_up(module: nn.Embedding, ids: Tensor) -> Tensor:
    return F.embedding(ids, module.weight, module.padding_idx).float()


def _multiply(module: nn.Linear, x: Tensor) -> Tensor:
    rows = max(1, WIDENED // module.in_features)
    found = torch.cat([F.linear(x, part.float()) for part in module.weight.split(rows)], -1)
    return found if module.bias is None else found + module.bias
