"""Decoding speed of cache layouts, beside transformers and the memory's speed.

What a step costs depends on shapes alone, so no checkpoint is needed.
"""

from __future__ import annotations

import dataclasses
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel, StaticCache

from ..errors import RecipeError
from ..runtime.calling import cache_argument
from .decode_layouts import SHAPES, Layout, Shape, layouts, of_model
from .decode_loop import DecodeLoop


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured cell. Speeds count the tokens of the whole batch."""

    variant: str
    """Name of the recipe or model."""
    batch: int
    context: int
    kv_bytes_per_token: int
    weight_bytes: int
    largest_batch: int
    """Sequences of `context` tokens whose caches fit beside the weights."""
    tokens_per_s: float | None = None
    step_ms: float | None = None
    ideal_tokens_per_s: float | None = None
    """Weights and live caches read once per step at the measured bandwidth, nothing else."""
    transformers_tokens_per_s: float | None = None
    """transformers with the same heads: StaticCache and the compiled forward that `generate` uses, without its loop."""
    skipped: str | None = None
    is_parent: bool = False
    """Whether these are the caches of the shape itself."""

    @property
    def fraction_of_ideal(self) -> float | None:
        return _ratio(self.tokens_per_s, self.ideal_tokens_per_s)

    @property
    def over_transformers(self) -> float | None:
        return _ratio(self.tokens_per_s, self.transformers_tokens_per_s)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {
            "fraction_of_ideal": self.fraction_of_ideal,
            "over_transformers": self.over_transformers,
        }


@dataclass(frozen=True, kw_only=True)
class DecodeBench:
    """All cells of one run."""

    shape: str
    device: str
    dtype: str
    compiled: bool
    bandwidth_gb_per_s: float
    """Of a sum over memory far larger than the caches of the processor."""
    rows: tuple[Row, ...]

    def to_dict(self) -> dict[str, Any]:
        data = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return data | {"rows": [row.to_dict() for row in self.rows]}

    def tables(self) -> list[Table]:
        title = (
            f"decoding, {self.shape}, {self.dtype}, {self.device}, {'compiled' if self.compiled else 'eager'}, "
            f"{self.bandwidth_gb_per_s:.0f} GB/s read"
        )
        table = Table(title=title)
        for column in (
            "variant", "batch", "context", "KV bytes/token", "tokens/s", "of ideal", "over parent", "over transformers",
            "largest batch",
        ):  # fmt: skip
            table.add_column(column, justify="left" if column == "variant" else "right")
        parent = {(row.batch, row.context): row.tokens_per_s for row in self.rows if row.is_parent}
        for row in self.rows:
            speed = row.skipped if row.tokens_per_s is None else f"{row.tokens_per_s:,.1f}"
            table.add_row(
                row.variant, str(row.batch), f"{row.context:,}", f"{row.kv_bytes_per_token:,}", speed,
                _shown(row.fraction_of_ideal, "{:.0%}"),
                _shown(_ratio(row.tokens_per_s, parent.get((row.batch, row.context))), "{:.2f}x"),
                _shown(row.over_transformers, "{:.2f}x"), str(row.largest_batch),
            )  # fmt: skip
        return [table]


def decode(
    shape: str | None,
    recipes: Sequence[Any] = ("identity", "mqa", "mla-4x", "cla2"),
    *,
    model: str | None = None,
    batches: Sequence[int] = (1, 16, 64),
    contexts: Sequence[int] = (4096, 32768),
    layers: int | None = None,
    steps: int = 32,
    dtype: str = "bfloat16",
    device: str | None = None,
    compiled: bool = True,
    transformers: bool = True,
    memory: int | None = None,
    report: Callable[[Row], None] = lambda row: None,
) -> DecodeBench:
    """Time decode steps of what every recipe makes, at every batch and context.

    Args:
        shape: a name in `SHAPES`; not asked where a model is given.
        recipes: what `Recipe.load` takes; `identity` is the shape's own layout. Plans alone: nothing is converted.
        model: folder or Hub id of a checkpoint whose shape is taken, and whose own caches come first.
        layers: fewer layers than the shape has; speeds are then of that smaller model.
        steps: timed steps; the median counts.
        device: default a GPU where there is one.
        transformers: also time transformers over the same heads, where it has such a layout.
        memory: bytes for weights and caches; default what the GPU has free, or 80 GiB.
        report: called with each row as it is done.

    Raises:
        RecipeError, PlanError: an unknown shape or dtype, no steps, a recipe that does not fit, or caches that the loop
            does not have.
        CheckpointError: the model's config cannot be read.
    """
    if model is None and shape not in SHAPES:
        raise RecipeError(f"shape {shape!r} is unknown; use one of {', '.join(SHAPES)}")
    if dtype not in ("bfloat16", "float16", "float32"):
        raise RecipeError(f"dtype {dtype!r} is unknown; use bfloat16, float16 or float32")
    if steps < 1 or min((*batches, *contexts), default=0) < 1:
        raise RecipeError("batches, contexts and steps must name positive numbers")
    if model is not None and layers is not None:
        raise RecipeError(
            "layers: a model has its own number of them. Leave layers out, or name a shape in the place of the model"
        )
    sizes, own = (SHAPES[str(shape)], None) if model is None else of_model(model, dtype)
    if layers is not None:
        sizes = dataclasses.replace(sizes, layers=layers)
    made = [*([own] if own else []), *(layouts(sizes, dtype, recipes) if recipes else [])]
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    kind: torch.dtype = getattr(torch, dtype)
    room = memory or (torch.cuda.mem_get_info(place)[0] if place.type == "cuda" else 80 * 2**30)
    bandwidth = read_bandwidth(place)
    rows = []
    for layout in made:
        for context in contexts:
            for batch in batches:
                row = _measure(
                    sizes, layout, batch, context, steps, kind, place, compiled, transformers, room, bandwidth
                )
                rows.append(row)
                report(row)
    name = torch.cuda.get_device_name(place) if place.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return DecodeBench(
        shape=str(model or shape) if layers is None else f"{shape}, {layers} layers", device=name, dtype=dtype,
        compiled=compiled, bandwidth_gb_per_s=bandwidth / 1e9, rows=tuple(rows),
    )  # fmt: skip


def _measure(
    shape: Shape, layout: Layout, batch: int, context: int, steps: int, dtype: torch.dtype, device: torch.device,
    compiled: bool, transformers: bool, room: int, bandwidth: float,
) -> Row:  # fmt: skip
    kv_bytes = layout.bytes_per_token
    with torch.device("meta"):
        parameters = list(DecodeLoop(shape, layout.layers, 1, 1).parameters())
    weights = sum(p.numel() for p in parameters) * dtype.itemsize
    capacity = -(-(context + steps + _WARM) // 64) * 64
    facts: dict[str, Any] = {
        "variant": layout.name, "is_parent": layout.is_parent, "batch": batch, "context": context,
        "kv_bytes_per_token": kv_bytes, "weight_bytes": weights,
        "largest_batch": max(0, (room - weights) // (kv_bytes * context)),
    }  # fmt: skip
    if weights + batch * capacity * kv_bytes > 0.95 * room:
        return Row(**facts, skipped="does not fit")
    loop = build(lambda: DecodeLoop(shape, layout.layers, batch, capacity), dtype, device)
    loop.start(context)
    seconds = time_steps(loop.forward, torch.zeros(batch, dtype=torch.long, device=device), steps, compiled)
    del loop
    # A reader reads the whole cache of its owner again: traffic is of all layers, memory of owners only.
    traffic = weights - shape.vocabulary * shape.hidden * dtype.itemsize
    traffic += batch * context * sum(layer.project.dims for layer in layout.layers) * dtype.itemsize
    facts |= {
        "tokens_per_s": batch / seconds, "step_ms": seconds * 1e3, "ideal_tokens_per_s": batch * bandwidth / traffic,
    }  # fmt: skip
    kv_heads = layout.uniform_heads
    if transformers and kv_heads is not None:
        other = _transformers(shape, kv_heads, batch, context, capacity, steps, dtype, device, compiled)
        facts["transformers_tokens_per_s"] = batch / other
    return Row(**facts)


_WARM = 4
"""Steps before timing: compilation, and the recording of CUDA graphs."""


@torch.no_grad()
def time_steps(
    forward: Callable[[Tensor], Tensor],
    tokens: Tensor,
    steps: int,
    compiled: bool,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Median seconds of a step, after some that warm up.

    Args:
        forward: from the tokens of a step, int64 [B], to those of the next.
        clock: in seconds; `time.process_time` on one thread counts no time that other programs take.
    """
    on_gpu = tokens.is_cuda
    step = forward
    torch.compiler.reset()
    if compiled:
        step = torch.compile(forward, fullgraph=True, dynamic=False, mode="reduce-overhead" if on_gpu else None)
    seconds = []
    with torch._dynamo.config.patch(error_on_recompile=True):
        for i in range(steps + _WARM):
            start = clock()
            if compiled:
                torch.compiler.cudagraph_mark_step_begin()
            tokens = step(tokens).clone()
            if on_gpu:
                torch.cuda.synchronize()
            if i >= _WARM:
                seconds.append(clock() - start)
    torch.compiler.reset()
    return statistics.median(seconds)


def greedy_step(model: PreTrainedModel, cache: Any, batch: int, context: int) -> Callable[[Tensor], Tensor]:
    """One greedy decoding step of a model of transformers, as one function of tokens [B] that compiles.

    Args:
        cache: what holds the first `context` tokens of every sequence; it grows by one token with each call.
    """
    name = cache_argument(model)
    place = torch.full((batch, 1), context, device=model.device)
    torch._dynamo.mark_static_address(place)  # without it, a mutated input keeps CUDA graphs away

    def forward(tokens_B: Tensor) -> Tensor:
        logits = model(tokens_B[:, None], position_ids=place, use_cache=True, **{name: cache}).logits
        place.add_(1)
        return logits[:, -1].argmax(-1)

    return forward


def build(make: Callable[[], Any], dtype: torch.dtype, device: torch.device) -> Any:
    """A module that is made on a device and in a dtype, without a copy in another; for inference."""
    gc.collect()
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return make().eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def _transformers(
    shape: Shape, kv_heads: int, batch: int, context: int, capacity: int, steps: int, dtype: torch.dtype,
    device: torch.device, compiled: bool,
) -> float:  # fmt: skip
    """Seconds of a step of `LlamaForCausalLM` over a full static cache."""
    config = shape.config(dtype, kv_heads, capacity)
    config._attn_implementation = "sdpa"
    model = build(lambda: LlamaForCausalLM(config), dtype, device)
    cache: Any = StaticCache(config=config, max_cache_len=capacity)
    cache.early_initialization(batch, kv_heads, shape.head_dim, dtype, device)
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
        layer.cumulative_length.fill_(context)
    forward = greedy_step(model, cache, batch, context)
    return time_steps(forward, torch.zeros(batch, dtype=torch.long, device=device), steps, compiled)


@torch.no_grad()
def read_bandwidth(device: torch.device) -> float:
    """Bytes per second of a sum over 1 GiB on a GPU, 128 MiB on a CPU; the best of ten."""
    data = torch.ones(2**28 if device.type == "cuda" else 2**25, device=device)
    best = float("inf")
    for _ in range(11):
        start = time.perf_counter()
        float(data.sum())
        best = min(best, time.perf_counter() - start)
    return data.numel() * data.element_size() / best


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
