"""How operators are registered under `torch.ops.surgery`, and how they refuse wrong arguments."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

LIBRARY = torch.library.Library("surgery", "DEF")
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def operator(
    schema: str, *, cpu: Callable[..., Any], cuda: Callable[..., Any], fake: Callable[..., Any]
) -> torch._ops.OpOverload:
    """Define one opaque operator: inference only, one implementation per device, what it writes marked in `schema`."""
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, _as_given(cpu), "CPU")
    LIBRARY.impl(name, cuda, "CUDA")
    torch.library.register_fake(f"surgery::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.surgery, name).default


def _as_given(cpu: Callable[..., Any]) -> Callable[..., Any]:
    """Under torch.autocast, products within an operator stay in the dtype of its arguments."""

    @functools.wraps(cpu)
    def run(*arguments: Any, **named: Any) -> Any:
        with torch.autocast("cpu", enabled=False):
            return cpu(*arguments, **named)

    return run


class Arguments:
    """Checks the arguments of one call; sizes are named by letters, and the first tensor that has one fixes it.

    Raises:
        ValueError: names the operator, the argument, what was found and what is needed.
    """

    def __init__(self, operator: str, device: torch.device) -> None:
        self.operator, self.device = operator, device
        self.sizes: dict[str, int] = {}

    def __getitem__(self, letter: str) -> int:
        return self.sizes[letter]

    def tensor(
        self, name: str, tensor: Tensor, shape: str, dtypes: Sequence[torch.dtype] = FLOATS, *, dense: bool = False
    ) -> None:
        """`shape` such as "B K S H"; `dense` asks for contiguous memory, otherwise only the last dimension must be."""
        letters = shape.split()
        fits = tensor.ndim == len(letters)
        if fits:
            for letter, size in zip(letters, tensor.shape, strict=True):
                wanted = int(letter) if letter.isdigit() else self.sizes.setdefault(letter, size)
                fits = fits and size == wanted
        if not fits:
            known = ", ".join(f"{c} = {self.sizes[c]}" for c in letters if c in self.sizes and not c.isdigit())
            self.fail(f"{name} has shape {list(tensor.shape)}, expected [{', '.join(letters)}] with {known}")
        if tensor.dtype not in dtypes:
            wanted_types = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
            self.fail(f"{name} has dtype {str(tensor.dtype).removeprefix('torch.')}, expected {wanted_types}")
        if tensor.device != self.device:
            self.fail(f"{name} is on {tensor.device}, expected {self.device}, where the first argument is")
        if dense and not tensor.is_contiguous():
            self.fail(f"{name} has strides {tensor.stride()}, expected contiguous memory")
        if tensor.numel() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            self.fail(f"{name} has strides {tensor.stride()}, expected 1 in the last dimension")

    def same_dtype(self, **tensors: Tensor) -> None:
        """All tensors have the dtype of the first."""
        (first, tensor), *others = tensors.items()
        for name, other in others:
            if other.dtype != tensor.dtype:
                self.fail(f"{name} has dtype {other.dtype}, expected {tensor.dtype}, that of {first}")

    def multiple(self, letter: str, of: int, meaning: str) -> None:
        """A size that the kernel reads in vectors."""
        if self.sizes[letter] % of:
            self.fail(f"{meaning} {letter} = {self.sizes[letter]} must be a multiple of {of}")

    def within(self, name: str, values: Tensor, low: int, high: int) -> None:
        """Values in [low, high]; for host memory only, where looking at them waits for nobody."""
        numbers = values.flatten().tolist()  # a few: cheaper than two reductions
        if numbers and not (low <= min(numbers) and max(numbers) <= high):
            self.fail(f"{name} has values from {min(numbers)} to {max(numbers)}, expected {low} to {high}")

    def fail(self, message: str) -> None:
        raise ValueError(f"surgery::{self.operator}: {message}.")
