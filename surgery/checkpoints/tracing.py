"""Where the tensors of a file go when transformers loads them: it renames, splits and joins by lists of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

_KEEPING = (Tensor.__getitem__, Tensor.to, Tensor.detach, Tensor.clone, Tensor.contiguous, Tensor.requires_grad_)
"""What loaders do to a tensor that stays the same numbers in the same places."""


class Trace:
    """Tensors without memory that remember which names they come from, whatever is made of them.

    `used` has the names that anything was made of: a loader leaves alone what its model has no place for.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.used: set[str] = set()
        self.tensors = {name: self.mark(torch.empty(shape, device="meta"), {name}) for name, shape in shapes.items()}

    def mark(self, tensor: Tensor, origins: set[str]) -> Tensor:
        """`tensor` as one that was made of `origins`."""
        marked = tensor.as_subclass(_Traced)
        marked.traced_by, marked.origins, marked.is_whole = self, origins, True
        return marked


def origins_of(tensor: Tensor) -> set[str]:
    """The names that a tensor was made of; none where it comes from no trace."""
    return tensor.origins if isinstance(tensor, _Traced) else set()


def is_whole(tensor: Tensor) -> bool:
    """Whether it is one traced tensor as that was."""
    return isinstance(tensor, _Traced) and tensor.is_whole


class _Traced(Tensor):
    traced_by: Trace
    origins: set[str]
    is_whole: bool

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, cls) and hasattr(x, "origins")]
        out = super().__torch_function__(func, types, args, kwargs)
        made = [x for x in (out if isinstance(out, (list, tuple)) else [out]) if isinstance(x, Tensor)]
        if given and made:
            origins = set().union(*(x.origins for x in given))
            given[0].traced_by.used |= origins
            whole = func in _KEEPING and given[0].is_whole and made[0].shape == given[0].shape
            for x in made:
                x.__dict__.update(traced_by=given[0].traced_by, origins=origins, is_whole=whole)
        return out
