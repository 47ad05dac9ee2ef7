"""Torch's global modes and random state, which belong to the caller: set aside while this library works; its memory."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import torch


@contextmanager
def plain_torch() -> Iterator[None]:
    """Run as in a fresh process, whatever surrounds the call; afterwards all is as it was. Also a decorator.

    Set aside: `inference_mode`, `no_grad`, autocast, the default dtype and the default device. The states of the random
    generators are put back, so that a caller's own numbers do not depend on what happened in between.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in ("cpu", *filter(None, [_accelerator()])):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        # Without CUDA there is no state to keep, and asking for it would start CUDA.
        gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        stack.enter_context(torch.random.fork_rng(devices=list(gpus)))
        before = torch.get_default_dtype()
        stack.callback(torch.set_default_dtype, before)
        torch.set_default_dtype(torch.float32)
        yield


def _accelerator() -> str | None:
    found = torch.accelerator.current_accelerator()
    return None if found is None else found.type


def give_memory_back() -> None:
    """Let the system have what freed tensors took. The GNU C library keeps most of it otherwise, in pieces, and the
    memory of a process that makes and frees large tensors grows with time. Elsewhere nothing happens."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Any:
    try:
        return getattr(ctypes.CDLL(None), "malloc_trim", None)
    except (OSError, TypeError):  # no such library, or (Windows) no library without a name
        return None
