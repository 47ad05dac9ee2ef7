"""Decoding speed of a cache layout: an own compiled loop over random weights of a real shape, beside transformers'.

What a step costs depends on shapes alone, so no checkpoint is needed. The loop is the one that a served model would
run: static caches, positions on the device, one graph (CUDA graphs where there is a GPU), greedy sampling inside.
"""

from __future__ import annotations

import dataclasses
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn

from ..anatomy.reader import load_config
from ..checkpoints.files import local_folder, read_json
from ..errors import RecipeError
from ..kernels.decode_gqa import decode_gqa
from ..kernels.decode_latent import decode_latent
from ..kernels.rope_append import rope_append_
from ..runtime.calling import cache_argument
from ..runtime.layout import Heads, Latent, LayerPlan


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a Llama-like decoder."""

    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    """Of the original model."""
    head_dim: int
    vocabulary: int


SHAPES = {
    "llama-2-7b": Shape(hidden=4096, mlp=11008, layers=32, heads=32, kv_heads=32, head_dim=128, vocabulary=32000),
    "llama-3-8b": Shape(hidden=4096, mlp=14336, layers=32, heads=32, kv_heads=8, head_dim=128, vocabulary=128256),
    "small": Shape(hidden=512, mlp=1408, layers=4, heads=8, kv_heads=8, head_dim=64, vocabulary=2048),
}


@dataclass(frozen=True, kw_only=True)
class LayerCache:
    """What one layer reads at a decode step."""

    kv_heads: int
    owner: int
    """Index of the layer that stores it."""
    rank: int = 0
    """Of a latent; 0 where heads are cached."""
    rope_dims: int = 0

    def dims(self, head_dim: int) -> int:
        """Numbers per token."""
        return self.rank + self.rope_dims if self.rank else 2 * self.kv_heads * head_dim


@dataclass(frozen=True, kw_only=True)
class Variant:
    """How the caches of all layers look."""

    name: str
    layers: tuple[LayerCache, ...]

    @property
    def uniform_heads(self) -> int | None:
        """KV heads, where every layer caches so many of its own: what transformers can build too."""
        kinds = {(layer.kv_heads, layer.rank, layer.owner == i) for i, layer in enumerate(self.layers)}
        (heads, rank, owns) = next(iter(kinds))
        return heads if len(kinds) == 1 and owns and not rank else None


def variant_of(name: str, shape: Shape) -> Variant:
    """Read `base`, `mha`, `gqa-8`, `mqa`, `mla-512-64` (rank, rotated part) or one of them with `+cla-2` behind it.

    Raises:
        RecipeError: the name is none of these, or does not fit the shape.
    """
    cache, _, sharing = name.partition("+")
    kind, *words = cache.split("-")
    numbers = [int(word) for word in words if word.isdigit()]
    share = int(sharing[4:]) if sharing.startswith("cla-") and sharing[4:].isdigit() else 0 if sharing else 1
    named = {"base": shape.kv_heads, "mha": shape.heads, "mqa": 1}
    rank = rope = 0
    if kind in named and not words:
        kv_heads = named[kind]
    elif kind == "gqa" and len(numbers) == len(words) == 1:
        kv_heads = numbers[0]
    elif kind == "mla" and len(numbers) == len(words) == 2 and numbers[0]:
        kv_heads, (rank, rope) = 1, numbers
    else:
        kv_heads = 0
    if not share or not kv_heads or shape.heads % kv_heads or rope % 2:
        raise RecipeError(
            f"variant {name!r}: expected base, mha, mqa, gqa-K with K a divisor of {shape.heads}, or mla-RANK-ROPE, "
            "each also with +cla-N for N layers that share a cache"
        )
    return Variant(
        name=name,
        layers=tuple(
            LayerCache(kv_heads=kv_heads, rank=rank, rope_dims=rope, owner=i - i % share) for i in range(shape.layers)
        ),
    )


def of_model(model: str) -> tuple[Shape, Variant]:
    """Shape and caches of a checkpoint, from its config alone; what is not attention is taken for Llama's.

    Raises:
        CheckpointError: the config cannot be read.
        RecipeError: groups of unequal size, latents that are rotated at read, or merged tokens, which the loop does not
            have.
    """
    folder = local_folder(model)
    config: Any = load_config(folder)
    text = config.get_text_config(decoder=True)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    shape = Shape(
        hidden=text.hidden_size, mlp=text.intermediate_size, layers=text.num_hidden_layers,
        heads=text.num_attention_heads, kv_heads=getattr(text, "num_key_value_heads", text.num_attention_heads),
        head_dim=head_dim, vocabulary=text.vocab_size,
    )  # fmt: skip
    name = Path(model).name or model
    surgery = read_json(folder / "config.json").get("surgery") or {}
    if "layers" not in surgery:
        return shape, dataclasses.replace(variant_of("base", shape), name=name)
    layers = []
    for plan in (LayerPlan.from_dict(layer["plan"]) for layer in surgery["layers"]):
        cache = plan.project
        if plan.retain is not None:
            raise RecipeError(
                f"{model}: layer {plan.layer} merges or drops tokens ({plan.retain.kind}); the loop has no cache for "
                "that. Time generation instead: surgery eval --speed."
            )
        if isinstance(cache, Latent):
            if cache.rotate_on_read:
                raise RecipeError(
                    f"{model}: layer {plan.layer} rotates its keys at read; the loop has no kernel for that"
                )
            layers.append(LayerCache(kv_heads=1, rank=cache.rank, rope_dims=cache.rope_dims, owner=plan.owner))
        elif isinstance(cache, Heads) and cache.is_uniform:
            layers.append(LayerCache(kv_heads=cache.kv_heads, owner=plan.owner))
        else:
            raise RecipeError(
                f"{model}: layer {plan.layer} has groups of unequal size; the loop has no kernel for that"
            )
    if len(layers) != shape.layers:
        raise RecipeError(f"{model}: {len(layers)} of {shape.layers} layers have an attention that was converted")
    return shape, Variant(name=name, layers=tuple(layers))


class Layer(nn.Module):
    """Attention and MLP of one decoder layer, for one new token per sequence."""

    def __init__(self, shape: Shape, cache: LayerCache, owner: bool) -> None:
        super().__init__()
        self.shape, self.cache, self.owner = shape, cache, owner
        D, N, H = shape.hidden, shape.heads, shape.head_dim
        R, P = cache.rank, cache.rope_dims
        self.norms = nn.ParameterList(nn.Parameter(torch.ones(D)) for _ in range(2))
        self.q = _linear(D, N * (H + P if R else H))
        self.o = _linear(N * H, D)
        if owner:
            self.kv = _linear(D, cache.dims(H))
        if R:
            self.k_up = nn.Parameter(torch.randn(N, H, R) / H**0.5)
            self.v_up = nn.Parameter(torch.randn(N, R, H) / R**0.5)
        self.gate_up = _linear(D, 2 * shape.mlp)
        self.down = _linear(shape.mlp, D)

    def forward(self, x: Tensor, stored: tuple[Tensor, ...], cos: Tensor, sin: Tensor, places: Tensor) -> Tensor:
        shape, cache = self.shape, self.cache
        B, N, H = len(x), shape.heads, shape.head_dim
        h = F.rms_norm(x, (shape.hidden,), self.norms[0])
        if cache.rank:
            q_nope, q_rope = self.q(h).view(B, N, -1).split((H, cache.rope_dims), -1)
            q = torch.cat((torch.bmm(q_nope.transpose(0, 1), self.k_up).transpose(0, 1), q_rope), -1)
            if self.owner:
                q = rope_append_(q, self.kv(h)[:, None], None, cos, sin, places, *stored, None, False, cache.rank)
            else:
                q = _turn(q, cos, sin, cache.rank)
            mean, _ = decode_latent(q, *stored, places + 1, (H + cache.rope_dims) ** -0.5, cache.rank)
            attended = torch.bmm(mean.transpose(0, 1), self.v_up).transpose(0, 1)
        else:
            q = self.q(h).view(B, N, H)
            if self.owner:
                k, v = self.kv(h).view(B, 2, cache.kv_heads, H).unbind(1)
                q = rope_append_(q, k, v, cos, sin, places, *stored)
            else:
                q = _turn(q, cos, sin, 0)
            attended, _ = decode_gqa(q, *stored, places + 1, H**-0.5)
        x = x + self.o(attended.reshape(B, N * H))
        h = F.rms_norm(x, (shape.hidden,), self.norms[1])
        gate, up = self.gate_up(h).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class DecodeLoop(nn.Module):
    """A whole model at a decode step: tokens in, greedy next tokens out, caches and positions advanced in place."""

    places: Tensor

    def __init__(self, shape: Shape, variant: Variant, batch: int, capacity: int) -> None:
        super().__init__()
        self.shape, H = shape, shape.head_dim
        self.embedding = nn.Parameter(torch.randn(shape.vocabulary, shape.hidden))
        self.layers = nn.ModuleList(Layer(shape, cache, cache.owner == i) for i, cache in enumerate(variant.layers))
        self.norm = nn.Parameter(torch.ones(shape.hidden))
        self.head = _linear(shape.hidden, shape.vocabulary)
        angles = {}
        for i, cache in enumerate(variant.layers):
            pairs = (cache.rope_dims if cache.rank else H) // 2
            angles[pairs] = torch.arange(capacity)[:, None] * 10000.0 ** -(torch.arange(pairs) / max(pairs, 1))
            if cache.owner != i:
                continue
            shapes = [(1, cache.rank + cache.rope_dims)] if cache.rank else [(cache.kv_heads, H)] * 2
            for part, (heads, width) in enumerate(shapes):
                self.register_buffer(f"cache{i}_{part}", torch.randn(batch, heads, capacity, width))
        for pairs, table in angles.items():
            self.register_buffer(f"cos{pairs}", table.cos().float())
            self.register_buffer(f"sin{pairs}", table.sin().float())
        self.tables = tuple(angles)
        self.register_buffer("places", torch.zeros(batch, dtype=torch.int32))

    def start(self, length: int) -> None:
        """Say that `length` tokens are cached."""
        self.places.fill_(length)

    def forward(self, tokens_B: Tensor) -> Tensor:
        places = self.places
        turns = {
            pairs: [getattr(self, f"{name}{pairs}").index_select(0, places) for name in ("cos", "sin")]
            for pairs in self.tables
        }
        x = F.embedding(tokens_B, self.embedding)
        for layer in self.layers:
            cache: LayerCache = layer.cache  # type: ignore[assignment]
            stored = tuple(getattr(self, f"cache{cache.owner}_{part}") for part in range(1 if cache.rank else 2))
            cos, sin = turns[(cache.rope_dims if cache.rank else self.shape.head_dim) // 2]
            x = layer(x, stored, cos, sin, places)
        x = F.rms_norm(x, (self.shape.hidden,), self.norm)
        places += 1
        return self.head(x).argmax(-1)


def _linear(columns: int, rows: int) -> nn.Linear:
    return nn.Linear(columns, rows, bias=False)


def _turn(q_BNH: Tensor, cos_BF: Tensor, sin_BF: Tensor, start: int) -> Tensor:
    a, b = q_BNH[..., start:].chunk(2, -1)
    cos, sin = cos_BF[:, None], sin_BF[:, None]
    return torch.cat((q_BNH[..., :start], a * cos - b * sin, b * cos + a * sin), -1).to(q_BNH.dtype)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured cell. Speeds count the tokens of the whole batch."""

    variant: str
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
            "variant", "batch", "context", "KV bytes/token", "tokens/s", "of ideal", "over base", "over transformers",
            "largest batch",
        ):  # fmt: skip
            table.add_column(column, justify="left" if column == "variant" else "right")
        base = {(row.batch, row.context): row.tokens_per_s for row in self.rows if row.variant == "base"}
        for row in self.rows:
            speed = row.skipped if row.tokens_per_s is None else f"{row.tokens_per_s:,.1f}"
            table.add_row(
                row.variant, str(row.batch), f"{row.context:,}", f"{row.kv_bytes_per_token:,}", speed,
                _shown(row.fraction_of_ideal, "{:.0%}"),
                _shown(_ratio(row.tokens_per_s, base.get((row.batch, row.context))), "{:.2f}x"),
                _shown(row.over_transformers, "{:.2f}x"), str(row.largest_batch),
            )  # fmt: skip
        return [table]


def decode(
    shape: str | None,
    variants: Sequence[str] = ("base", "mqa", "mla-512-64", "base+cla-2"),
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
    """Time decode steps of every variant at every batch and context.

    Args:
        shape: a name in `SHAPES`; not asked where a model is given.
        variants: see `variant_of`.
        model: folder or Hub id of a checkpoint whose shape is taken, and whose own caches come first.
        layers: fewer layers than the shape has; speeds are then of that smaller model.
        steps: timed steps; the median counts.
        device: default a GPU where there is one.
        transformers: also time transformers over the same heads, where it has such a layout.
        memory: bytes for weights and caches; default what the GPU has free, or 80 GiB.
        report: called with each row as it is done.

    Raises:
        RecipeError: an unknown shape, variant or dtype, no steps, or a model that the loop cannot stand for.
        CheckpointError: the model's config cannot be read.
    """
    if model is None and shape not in SHAPES:
        raise RecipeError(f"shape {shape!r} is unknown; use one of {', '.join(SHAPES)}")
    if dtype not in ("bfloat16", "float16", "float32"):
        raise RecipeError(f"dtype {dtype!r} is unknown; use bfloat16, float16 or float32")
    if steps < 1 or min((*batches, *contexts), default=0) < 1:
        raise RecipeError("batches, contexts and steps must name positive numbers")
    if model is not None and layers is not None:
        raise RecipeError("layers goes with a shape; a model has its own")
    sizes, own = (SHAPES[str(shape)], None) if model is None else of_model(model)
    if layers is not None:
        sizes = dataclasses.replace(sizes, layers=layers)
    made = [*([own] if own else []), *(variant_of(name, sizes) for name in variants)]
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    kind: torch.dtype = getattr(torch, dtype)
    room = memory or (torch.cuda.mem_get_info(place)[0] if place.type == "cuda" else 80 * 2**30)
    bandwidth = read_bandwidth(place)
    rows = []
    for variant in made:
        for context in contexts:
            for batch in batches:
                row = _measure(
                    sizes, variant, batch, context, steps, kind, place, compiled, transformers, room, bandwidth
                )
                rows.append(row)
                report(row)
    name = torch.cuda.get_device_name(place) if place.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return DecodeBench(
        shape=str(model or shape) if layers is None else f"{shape}, {layers} layers", device=name, dtype=dtype,
        compiled=compiled, bandwidth_gb_per_s=bandwidth / 1e9, rows=tuple(rows),
    )  # fmt: skip


def _measure(
    shape: Shape, variant: Variant, batch: int, context: int, steps: int, dtype: torch.dtype, device: torch.device,
    compiled: bool, transformers: bool, room: int, bandwidth: float,
) -> Row:  # fmt: skip
    dims = [cache.dims(shape.head_dim) for cache in variant.layers]
    kv_bytes = sum(d for i, d in enumerate(dims) if variant.layers[i].owner == i) * dtype.itemsize
    with torch.device("meta"):
        parameters = list(DecodeLoop(shape, variant, 1, 1).parameters())
    weights = sum(p.numel() for p in parameters) * dtype.itemsize
    capacity = -(-(context + steps + _WARM) // 64) * 64
    facts: dict[str, Any] = {
        "variant": variant.name, "batch": batch, "context": context, "kv_bytes_per_token": kv_bytes,
        "weight_bytes": weights, "largest_batch": max(0, (room - weights) // (kv_bytes * context)),
    }  # fmt: skip
    if weights + batch * capacity * kv_bytes > 0.95 * room:
        return Row(**facts, skipped="does not fit")
    loop = _build(lambda: DecodeLoop(shape, variant, batch, capacity), dtype, device)
    loop.start(context)
    seconds = _time(loop.forward, torch.zeros(batch, dtype=torch.long, device=device), steps, compiled)
    del loop
    # A reader reads the whole cache of its owner again: traffic is of all layers, memory of owners only.
    traffic = weights - shape.vocabulary * shape.hidden * dtype.itemsize
    traffic += batch * context * sum(dims) * dtype.itemsize
    facts |= {
        "tokens_per_s": batch / seconds, "step_ms": seconds * 1e3, "ideal_tokens_per_s": batch * bandwidth / traffic,
    }  # fmt: skip
    kv_heads = variant.uniform_heads
    if transformers and kv_heads is not None:
        other = _transformers(shape, kv_heads, batch, context, capacity, steps, dtype, device, compiled)
        facts["transformers_tokens_per_s"] = batch / other
    return Row(**facts)


_WARM = 4
"""Steps before timing: compilation, and the recording of CUDA graphs."""


@torch.no_grad()
def _time(forward: Callable[[Tensor], Tensor], tokens: Tensor, steps: int, compiled: bool) -> float:
    """Median seconds of a step."""
    on_gpu = tokens.is_cuda
    step = forward
    torch.compiler.reset()
    if compiled:
        step = torch.compile(forward, fullgraph=True, dynamic=False, mode="reduce-overhead" if on_gpu else None)
    seconds = []
    with torch._dynamo.config.patch(error_on_recompile=True):
        for i in range(steps + _WARM):
            start = time.perf_counter()
            if compiled:
                torch.compiler.cudagraph_mark_step_begin()
            tokens = step(tokens).clone()
            if on_gpu:
                torch.cuda.synchronize()
            if i >= _WARM:
                seconds.append(time.perf_counter() - start)
    torch.compiler.reset()
    return statistics.median(seconds)


def _build(make: Callable[[], Any], dtype: torch.dtype, device: torch.device) -> Any:
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
    from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

    config: Any = LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=kv_heads,
        head_dim=shape.head_dim, max_position_embeddings=capacity,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    model = _build(lambda: LlamaForCausalLM(config), dtype, device)
    cache: Any = StaticCache(config=config, max_cache_len=capacity)
    cache.early_initialization(batch, kv_heads, shape.head_dim, dtype, device)
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
        layer.cumulative_length.fill_(context)
    name = cache_argument(model)
    place = torch.full((batch, 1), context, device=device)
    torch._dynamo.mark_static_address(place)  # without it, a mutated input keeps CUDA graphs away

    def forward(tokens_B: Tensor) -> Tensor:
        logits = model(tokens_B[:, None], position_ids=place, use_cache=True, **{name: cache}).logits
        place.add_(1)
        return logits[:, -1].argmax(-1)

    return _time(forward, torch.zeros(batch, dtype=torch.long, device=device), steps, compiled)


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
