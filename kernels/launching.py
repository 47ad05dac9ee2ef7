"""Triton where it is installed, launches, and what is assumed of a device that is not there."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # operators then serve CPU tensors only
    triton = tl = None

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton reads this once, when a kernel is decorated."""


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit`, or the function itself where there is no Triton."""
    return function if triton is None else triton.jit(function)


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One launch that was recorded instead of made."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Device:
    """What launch parameters depend on."""

    arch: str
    multiprocessors: int


ASSUMED = Device(arch="sm_90", multiprocessors=132)
"""For tensors that are on no GPU: under the interpreter, and in ahead-of-time compilation."""

_recording: tuple[Device, list[Launch]] | None = None


@contextmanager
def recording(device: Device = ASSUMED) -> Iterator[list[Launch]]:
    """Collect launches as they would be made on `device`, and make none."""
    global _recording
    before, _recording = _recording, (device, [])
    try:
        yield _recording[1]
    finally:
        _recording = before


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """`kernel[grid](...)` on the device of the first argument."""
    if _recording is not None:
        _recording[1].append(Launch(kernel=kernel, grid=grid, arguments=arguments, options=options))
        return
    if triton is None:
        raise RuntimeError("Triton is not installed, and tensors on a GPU need it: pip install 'triton>=3.6'")
    index = arguments[0].device.index
    if index is None or index == torch.cuda.current_device():
        kernel[grid](*arguments, **options)
    else:
        with torch.cuda.device(index):
            kernel[grid](*arguments, **options)


def device_of(tensor: torch.Tensor) -> Device:
    """The device that a launch over `tensor` runs on."""
    if _recording is not None:
        return _recording[0]
    return _properties(tensor.device.index) if tensor.is_cuda else ASSUMED


@functools.cache
def _properties(index: int) -> Device:
    found = torch.cuda.get_device_properties(index)
    arch = getattr(found, "gcnArchName", "").partition(":")[0] or f"sm_{found.major}{found.minor}"
    return Device(arch=arch, multiprocessors=found.multi_processor_count)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is not below `n`."""
    return 1 << max(n - 1, 0).bit_length()
