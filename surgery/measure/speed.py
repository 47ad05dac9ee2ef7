"""Tokens per second of prefill and decode, several models side by side in one run."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..anatomy.positions import max_positions
from ..console import progress
from ..runtime.calling import cache_argument, cache_of
from .scoring import last_logits


@dataclass(frozen=True, kw_only=True)
class Rate:
    """Tokens per second: median of the repeats, slowest and fastest."""

    median: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Greedy generation with the model's own dynamic cache, uncompiled."""

    batch: int
    prompt: int
    new: int
    repeats: int
    prefill: Rate
    decode: Rate
    peak_memory_bytes: int
    """Most memory during the runs: of the device on a GPU, of the whole process on a CPU."""


def measure_speed(
    models: Sequence[PreTrainedModel], *, batch: int = 4, prompt: int = 128, new: int = 32, repeats: int = 5
) -> list[Speed]:
    """Time all models in turn within every repeat, so that a slow moment of the machine strikes all of them.

    Args:
        batch, prompt, new: sequences, tokens of the random prompt, tokens decoded one by one; the last two shrink
            where a model has fewer positions.
        repeats: timed runs of each model, after one that warms up.
    """
    limit = min((n for model in models if (n := max_positions(model.config)) is not None), default=prompt + new)
    new = min(new, max(1, limit // 4))
    prompt = min(prompt, max(1, limit - new))
    times: list[list[tuple[float, float]]] = [[] for _ in models]
    peaks = [0] * len(models)
    generator = torch.Generator().manual_seed(0)
    with progress("timing", (repeats + 1) * len(models)) as advance:
        for repeat in range(repeats + 1):
            for i, model in enumerate(models):
                vocabulary = model.config.get_text_config().vocab_size
                ids = torch.randint(vocabulary, (batch, prompt), generator=generator).to(model.device)
                if model.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(model.device)
                measured = _run(model, ids, new)
                peaks[i] = max(peaks[i], _peak(model.device))
                if repeat:
                    times[i].append(measured)
                advance(1)
    return [
        Speed(
            batch=batch,
            prompt=prompt,
            new=new,
            repeats=repeats,
            prefill=_rate([batch * prompt / p for p, _ in runs]),
            decode=_rate([batch * new / d for _, d in runs]),
            peak_memory_bytes=peak,
        )
        for runs, peak in zip(times, peaks, strict=True)
    ]


def _run(model: PreTrainedModel, ids_BT: Tensor, new: int) -> tuple[float, float]:
    """Seconds of the prefill and of `new` decoding steps."""
    wait: Callable[[], None] = torch.cuda.synchronize if ids_BT.is_cuda else lambda: None
    with torch.inference_mode():
        wait()
        begun = time.perf_counter()
        out = model(input_ids=ids_BT, use_cache=True, **last_logits(model))
        wait()
        filled = time.perf_counter()
        for _ in range(new):
            token = out.logits[:, -1:].argmax(-1)
            out = model(input_ids=token, use_cache=True, **{cache_argument(model): cache_of(out)})
        wait()
    return filled - begun, time.perf_counter() - filled


def _rate(values: list[float]) -> Rate:
    return Rate(median=statistics.median(values), low=min(values), high=max(values))


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
