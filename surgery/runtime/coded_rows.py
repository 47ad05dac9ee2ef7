"""Packed codes of single vectors as rows of bytes: what pages of slots hold in the place of numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from .packed_forms import Form, Half, PerToken, Spherical, Symmetric
from .store import Codec

_ALONE = (Half, Symmetric, PerToken, Spherical)
"""Forms that encode each vector for itself, whatever stands beside it."""


class Rows:
    """Vectors of one width as rows of bytes: the parts that a form makes of each, one behind another.

    Args:
        form: one of `_ALONE`; None: the numbers as they are.
        dtype: that of the numbers.
    """

    def __init__(self, form: Form | None, width: int, dtype: torch.dtype) -> None:
        self.form, self.width, self.dtype = form if width else None, width, dtype
        made = () if self.form is None else self.form.encode(torch.zeros(1, 1, 1, width))
        self.parts = [(part.dtype, part.numel() * part.element_size(), part.shape[3:]) for part in made]
        """dtype, bytes and shape of what is made of one vector."""

    def encode(self, x: Tensor) -> Tensor:
        """uint8 [..., bytes] of vectors [..., width]."""
        if not self.width:
            return x.new_empty(x.shape, dtype=torch.uint8)
        flat = x.detach().to(self.dtype).reshape(1, 1, -1, self.width)
        parts = (flat,) if self.form is None else self.form.encode(flat)
        rows = [part.reshape(flat.shape[2], -1).contiguous().view(torch.uint8) for part in parts]
        return torch.cat(rows, -1).view(*x.shape[:-1], -1)

    def decode(self, rows: Tensor) -> Tensor:
        """Vectors [..., width] in `dtype` of uint8 [..., bytes]."""
        if not self.width:
            return rows.to(self.dtype)
        if self.form is None:
            return rows.contiguous().view(self.dtype)
        flat = rows.reshape(-1, rows.shape[-1])
        each = flat.split([size for _, size, _ in self.parts], -1)
        parts = [
            part.contiguous().view(dtype).view(1, 1, len(flat), *shape)
            for part, (dtype, _, shape) in zip(each, self.parts, strict=True)
        ]
        return self.form.decode(tuple(parts), self.width).to(self.dtype).view(*rows.shape[:-1], self.width)


def rows_of(store: Codec, widths: tuple[int, int], dtype: torch.dtype) -> tuple[Rows, Rows]:
    """How pages hold keys and values of these widths."""
    keys, values = (Rows(form, width, dtype) for form, width in zip(store.forms(), widths, strict=True))
    return keys, values


def has_rows(store: Codec) -> bool:
    """Whether each vector is encoded for itself."""
    return all(form is None or isinstance(form, _ALONE) for form in store.forms())
