"""Several processes, each with its part of the calibration windows: what all of them have seen is summed up.

Each batch of windows is in one process, whole, and sums are in float64: results are those of one process but for the
order of the sums.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import CheckpointError

T = TypeVar("T")
_apart = False


def count() -> int:
    """Processes that work together; 1 where nobody launched several."""
    return dist.get_world_size() if _together() else 1


def rank() -> int:
    """The number of this process among them."""
    return dist.get_rank() if _together() else 0


def mine(batches: Sequence[T]) -> list[T]:
    """The batches of this process."""
    return list(batches[rank() :: count()])


def total(x: Tensor) -> Tensor:
    """The sum of `x` over the processes, on the CPU; `x` itself where there is one."""
    if count() == 1:
        return x
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else x.device
    parts = torch.view_as_real(x) if x.is_complex() else x
    summed = parts.to(device, copy=True).contiguous()
    dist.all_reduce(summed)
    summed = summed.cpu()
    return torch.view_as_complex(summed) if x.is_complex() else summed


def mean(summed: float, tokens: int) -> float:
    """A sum over tokens, in parts of their number, over those of all processes."""
    found = total(torch.tensor([summed, tokens], dtype=torch.float64))
    return float(found[0] / found[1].clamp_min(1))


def of_first(x: T) -> T:
    """`x` of the first process, for all."""
    if count() == 1:
        return x
    held = [x]
    dist.broadcast_object_list(held)
    return held[0]


def gathered(x: Tensor) -> Tensor:
    """`x` of all processes one after the other, along the first dimension."""
    if count() == 1:
        return x
    parts: list[Tensor] = [x] * count()
    dist.all_gather_object(parts, x)
    return torch.cat(parts)


def check_enough(batches: int) -> None:
    """Refuse processes that would have no windows to fit on.

    Raises:
        CheckpointError: there are more processes than batches.
    """
    if batches < count():
        raise CheckpointError(
            f"calibration text: {batches} batches of windows to fit on for {count()} processes. Give more windows, or "
            "launch fewer processes."
        )


@contextmanager
def joined() -> Iterator[None]:
    """Inside, processes that `accelerate launch` or `torchrun` started work together; alone, nothing happens."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or _together():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
        dist.barrier()
    finally:
        dist.destroy_process_group()


@contextmanager
def apart() -> Iterator[None]:
    """Inside, each process does the whole work, as if it were alone: for text too short to be shared out."""
    global _apart
    was, _apart = _apart, True
    try:
        yield
    finally:
        _apart = was


def _together() -> bool:
    return dist.is_available() and dist.is_initialized() and not _apart
