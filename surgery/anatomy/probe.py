"""Read by numbers what a graph does not say in words: run the piece between a linear and a score, and look.

Every probe replaces a linear's output by chosen numbers, and gains by ones, and reads queries, keys or values. At
position 0 a rotary embedding does nothing, and neither norms with unit gain nor positive factors change signs: that
is how rows are recognised. Rotation is then whatever happens between position 0 and the others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, fx

from ..errors import UnsupportedModel
from ..runtime.layout import HeadNorm, Rotary
from .graph import MASK, Graph, is_call, length_dependent, shape
from .walk import Found, OutPath, Path

CODES = 62
_POSITIONS = 32
_FAR = (1_048_573, 999_983)
"""Two distant query positions, at which a mask function is asked for its window."""


@dataclasses.dataclass(frozen=True)
class Reading:
    """What one path does between its linear and the score."""

    first_rows: tuple[int, ...]
    """First row of each distinct head."""
    repeats: int
    """How often the graph repeats each head in a row."""
    dim: int
    order: tuple[int, ...]
    """Channel of the graph that holds each channel of a head, in the order of the rows."""
    factor: float
    """What the model multiplies the heads by, rotary scaling left out."""
    rotary: Rotary | None
    norm: HeadNorm | None
    clip: float | None


class PathProbe:
    """Runs one path on chosen linear outputs."""

    def __init__(self, graph: Graph, module: str, path: Path, transposed: bool) -> None:
        self.graph, self.module, self.path, self.transposed = graph, module, path, transposed
        self._run = graph.runner([path.target], [path.linear.out])
        self.rows = path.linear.outputs
        self.tokens = graph.tokens
        ones = {p: torch.ones(shape(p)) for p in path.parameters}
        self.unit = dict(ones)
        self.biases: tuple[fx.Node, ...] = ()
        if ones:
            still = self(torch.zeros(self.rows))
            moved = [p for p in ones if not torch.equal(self(torch.zeros(self.rows), {p: 0 * ones[p]}), still)]
            self.biases = tuple(moved)
            self.unit |= {p: 0 * ones[p] for p in moved}
        self.gains = tuple(p for p in path.parameters if p not in self.biases)

    def __call__(self, y: Tensor, changed: dict[fx.Node, Tensor] | None = None) -> Tensor:
        """[heads, T, H] for a linear output y, [rows] (the same at all positions) or [T, rows]."""
        y = y.expand(self.tokens, self.rows).reshape(shape(self.path.linear.out))
        out = self._run(y, more={**self.unit, **(changed or {})})[0].float()
        if self.transposed:
            out = out.transpose(-1, -2)
        return out.reshape(-1, *out.shape[-2:])

    def refuse(self, what: str) -> UnsupportedModel:
        name = self.graph.sources[self.path.linear.weight].name
        return UnsupportedModel(f"module {self.module}: on the way from {name}, {what}")

    def name(self, node: fx.Node) -> str:
        return self.graph.sources[node].name


def read_path(graph: Graph, found: Found, path: Path, role: str, generator: torch.Generator) -> Reading:
    """Recognise rows, heads, norm, factor and rotation of one path.

    Raises:
        UnsupportedModel: the path does something that a description cannot hold.
    """
    probe = PathProbe(graph, found.module, path, found.k_transposed and role == "k")
    clip = _clip(path)
    level = 1.0 if clip is None else clip / 8
    rows = _decode_rows(probe, level, generator)
    first, order, repeats = _heads_of_rows(probe, rows)
    distinct = (torch.tensor(first)[:, None] + torch.arange(len(order))).long()

    def heads(y: Tensor, changed: dict[fx.Node, Tensor] | None = None) -> Tensor:
        return probe(y, changed)[::repeats][..., list(order)]

    norm = _read_norm(probe, heads, distinct, level, generator)
    basis = _basis(probe, heads, distinct, norm, level, generator)
    rotary, factors = _read_rotary(probe, basis)
    if role == "v" and rotary is not None:
        raise probe.refuse("the values change with the position.")
    if factors.max() - factors.min() > 1e-4 * factors.abs().max():
        raise probe.refuse("channels are multiplied by unequal factors.")
    factor = _snap_one(float(factors.mean()))
    return Reading(first, repeats, len(order), order, factor, rotary, norm, clip)


def _snap_one(x: float) -> float:
    return 1.0 if abs(x - 1) < 2e-6 else x


def _clip(path: Path) -> float | None:
    for node in path.nodes:
        if is_call(node, "clamp", "clamp_", "clip", "clip_", "hardtanh"):
            low, high = ([*node.args[1:], None, None])[:2]
            low, high = node.kwargs.get("min", low), node.kwargs.get("max", high)
            if isinstance(low, int | float) and isinstance(high, int | float) and low == -high:
                return float(high)
    return None


def _decode_rows(probe: PathProbe, level: float, generator: torch.Generator) -> Tensor:
    """[heads, H]: the row of the linear that each channel shows."""
    codes = torch.randint(0, 2, (CODES, probe.rows), generator=generator) * 2 - 1
    shown = torch.stack([probe(level * c.float())[:, 0] for c in codes]).sign().long()
    return match_codes(codes, shown, probe.refuse("channels of a head do not show rows of the projection."))


def match_codes(codes: Tensor, shown: Tensor, refusal: UnsupportedModel) -> Tensor:
    """Index into `codes` [probes, n] of every column of `shown` [probes, ...].

    A mean that is subtracted may blank a code now and then, so near matches count where exact ones are missing.
    """
    places = 2 ** torch.arange(len(codes))
    keys, at = ((codes > 0) * places[:, None]).sum(0).sort()
    flat = shown.flatten(1)
    asked = ((flat > 0) * places[:, None]).sum(0)
    slot = torch.searchsorted(keys, asked).clamp_max(len(keys) - 1)
    index = at[slot]
    for i in ((keys[slot] != asked) | (flat == 0).any(0)).nonzero().flatten().tolist():
        score = (codes * flat[:, i : i + 1]).sum(0)
        best = int(score.argmax())
        if score[best] < 0.7 * len(codes):
            raise refusal
        index[i] = best
    return index.reshape(shown.shape[1:])


def _heads_of_rows(probe: PathProbe, rows: Tensor) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    first = rows.min(1).values
    offset = rows - first[:, None]
    dim = rows.shape[1]
    if not torch.equal(offset.sort(1).values, torch.arange(dim).expand_as(rows)):
        raise probe.refuse("the rows of a head are not contiguous.")
    if not (offset == offset[0]).all():
        raise probe.refuse("heads order their channels differently.")
    distinct = list(dict.fromkeys(first.tolist()))
    repeats = len(first) // len(distinct)
    if first.tolist() != [f for f in distinct for _ in range(repeats)]:
        raise probe.refuse("heads are not repeated one group after the other; query head n must read n // G.")
    return tuple(distinct), tuple(offset[0].argsort().tolist()), repeats


def _normalised(y_NH: Tensor, kind: str, span: str, eps: float = 0.0) -> Tensor:
    y = y_NH if span == "head" else y_NH.flatten()[None]
    if kind == "layer":
        y = y - y.mean(-1, keepdim=True)
    return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)).reshape(y_NH.shape)


def _fit(got: Tensor, wanted: Tensor) -> tuple[Tensor, float]:
    """Factor per channel that takes `wanted` to `got`, and how far off it is."""
    factor = (got * wanted).sum(0) / wanted.pow(2).sum(0).clamp_min(1e-30)
    return factor, float((got - factor * wanted).abs().max() / got.abs().max().clamp_min(1e-30))


def _read_norm(
    probe: PathProbe, heads: Callable[..., Tensor], rows: Tensor, level: float, generator: torch.Generator
) -> HeadNorm | None:
    y = torch.randn(probe.rows, generator=generator).clamp(-3, 3) * level
    small, large = heads(y / 2)[:, 0], heads(2 * y)[:, 0]
    if float((large - 4 * small).abs().max()) <= 1e-3 * float(large.abs().max()):
        if probe.path.parameters:
            raise probe.refuse(f"{probe.name(probe.path.parameters[0])} does something other than a norm's gain.")
        return None
    far = 2 * y if level < 1 else 100 * y
    got = heads(far)[:, 0]
    best: tuple[Literal["rms", "layer"], Literal["head", "all"], float] | None = None
    kinds: tuple[Literal["rms", "layer"], ...] = ("rms", "layer")
    spans: tuple[Literal["head", "all"], ...] = ("head", "all")
    for kind in kinds:
        for span in spans:
            wanted = _normalised(far[rows], kind, span)
            scale = float((got * wanted).sum() / wanted.pow(2).sum())
            off = float((got - scale * wanted).abs().max() / got.abs().max())
            if off < 3e-3 and best is None:
                best = (kind, span, scale)
    if best is None:
        raise probe.refuse("the heads change with their size in a way that is no RMS or layer norm of heads.")
    kind, span, scale = best
    weight, offset = _read_gain(probe, heads, y, rows.shape)
    bias = probe.biases
    if len(bias) > 1 and len(bias) != len(rows):
        raise probe.refuse("several biases follow the norm.")
    return HeadNorm(
        kind=kind, span=span, eps=_read_eps(probe, heads, rows, kind, span, scale, y / level), weight=weight,
        bias=None if not bias else probe.name(bias[0]) if len(bias) == 1
        else _ordered(probe, heads, y, bias), weight_offset=offset,
    )  # fmt: skip


def _read_gain(
    probe: PathProbe, heads: Callable[..., Tensor], y: Tensor, size: Sequence[int]
) -> tuple[str | tuple[str, ...] | None, float]:
    gains = probe.gains
    if not gains:
        return None, 0.0
    count, dim = size
    one = heads(y)[:, 0]
    none = heads(y, {g: 0 * probe.unit[g] for g in gains})[:, 0]
    slope = float(((one - none) * one).sum() / one.pow(2).sum())
    if abs(slope) < 1e-3:
        raise probe.refuse("a parameter after the projection does not act as a gain.")
    offset = round(float((none * one).sum() / one.pow(2).sum()) / slope, 4) + 0.0
    if len(gains) == 1:
        if probe.unit[gains[0]].numel() not in (dim, count * dim):
            raise probe.refuse(f"the gain {probe.name(gains[0])} fits neither one head nor all.")
        return probe.name(gains[0]), offset
    if len(gains) != count:
        raise probe.refuse("several gains follow the projection.")
    return _ordered(probe, heads, y, gains), offset


def _ordered(
    probe: PathProbe, heads: Callable[..., Tensor], y: Tensor, parameters: Sequence[fx.Node]
) -> tuple[str, ...]:
    """Names of one parameter per head, in the order of the heads."""
    still = heads(y)[:, 0]
    at: dict[int, str] = {}
    for p in parameters:
        moved = (heads(y, {p: probe.unit[p] + 1})[:, 0] - still).abs().amax(1) > 1e-4 * still.abs().max()
        if int(moved.sum()) == 1:
            at[int(moved.long().argmax())] = probe.name(p)
    if len(at) != len(parameters):
        raise probe.refuse("several parameters follow the projection, and not one for each head.")
    return tuple(at[h] for h in sorted(at))


def _read_eps(
    probe: PathProbe, heads: Callable[..., Tensor], rows: Tensor, kind: str, span: str, scale: float, y: Tensor
) -> float:
    """Solve n(a y) = a y / sqrt(a^2 m + eps) at the size `a` where eps weighs about as much as the data."""
    guesses = []
    for power in range(1, 9):
        small = y * 10.0 ** (-power / 2 - 1)
        got = heads(small)[:, 0] / scale
        wanted = _normalised(small[rows], kind, span)
        ratio = float((got * wanted).sum() / wanted.pow(2).sum())
        if 0 < ratio < 0.9999:
            z = small[rows].double()
            z = z if span == "head" else z.flatten()[None]
            z = z - z.mean(-1, keepdim=True) if kind == "layer" else z
            m = float(z.pow(2).mean())
            # Heads differ in size, so the average only points at the value; literals of the graph say it exactly.
            guesses.append((abs(ratio - 0.7), m * (1 / ratio**2 - 1)))
    if not guesses:
        return 0.0
    guess = min(guesses)[1]
    literals = [
        float(a)
        for node in probe.path.nodes
        for a in (*node.args, *node.kwargs.values())
        if isinstance(a, float) and 0 < a < 1e-2
    ]
    near = min(literals, key=lambda a: abs(a - guess), default=guess)
    return near if 0.5 * guess < near < 2 * guess else guess


def _basis(
    probe: PathProbe,
    heads: Callable[..., Tensor],
    rows: Tensor,
    norm: HeadNorm | None,
    level: float,
    generator: torch.Generator,
) -> Tensor:
    """[T, H, H]: column j is what happens at each position to the j-th channel alone."""
    count, dim = rows.shape
    tokens = min(_POSITIONS, probe.tokens)
    result = torch.zeros(tokens, dim, dim)
    if norm is None or norm.kind == "rms":
        size = level if norm is None or level < 1 else 100.0
        for start in range(0, dim, count):
            y = torch.zeros(probe.rows)
            channels = range(start, min(start + count, dim))
            for head, j in enumerate(channels):
                y[rows[head, j]] = size
            out = heads(y)[:, :tokens] / (size if norm is None else _unit_rms(norm, count, dim, len(channels)))
            for head, j in enumerate(channels):
                result[:, :, j] = out[head]
        return result
    if not probe.gains:
        raise probe.refuse("a layer norm without gain hides how the heads are rotated.")
    y = torch.randn(probe.rows, generator=generator).clamp(-3, 3) * level
    plain = _normalised(y[rows], norm.kind, norm.span, norm.eps)
    for j in range(dim):
        changed = {}
        for g in probe.gains:
            gain = torch.full((probe.unit[g].numel() // dim, dim), -norm.weight_offset)
            gain[:, j] += 1
            changed[g] = gain.reshape(probe.unit[g].shape)
        strongest = int(plain[:, j].abs().argmax())
        result[:, :, j] = heads(y, changed)[strongest, :tokens] / plain[strongest, j]
    return result


def _unit_rms(norm: HeadNorm, heads: int, dim: int, filled: int) -> float:
    """What an RMS norm with unit gain makes of a single channel per filled head."""
    return float(dim**0.5 if norm.span == "head" else (heads * dim / filled) ** 0.5) * (1 + norm.weight_offset)


def _read_rotary(probe: PathProbe, basis: Tensor) -> tuple[Rotary | None, Tensor]:
    """The rotation that takes position 0 to the others, and the factor of each channel without rotary scaling."""
    dim = basis.shape[1]
    here = basis[0].diagonal().clone()
    off = basis[0] - torch.diag(here)
    if off.abs().max() > 1e-5 * here.abs().max() or here.min() <= 0:
        raise probe.refuse("channels mix at position 0; only rotary embeddings are understood.")
    turn = basis / here
    others = turn - torch.diag_embed(turn.diagonal(dim1=1, dim2=2))
    strength = others.abs().amax(0)
    turning = (strength.amax(0) > 1e-9).nonzero().flatten().tolist()
    if not turning:
        if (turn.diagonal(dim1=1, dim2=2) - 1).abs().max() > 1e-5:
            raise probe.refuse("heads are scaled by their position.")
        return None, here
    partner = strength.argmax(0)
    distance = {abs(int(partner[j]) - j) for j in turning}
    start = min(turning)
    if len(distance) != 1:
        raise probe.refuse("channels are not rotated in regular pairs.")
    (gap,) = distance
    interleaved = gap == 1 and len(turning) > 2
    dims = max(turning) + 1 - start if interleaved else 2 * gap
    if start + dims > dim or (interleaved and dims % 2):
        raise probe.refuse("channels are not rotated in regular pairs.")
    pairs = [(start + 2 * j, start + 2 * j + 1) if interleaved else (start + j, start + j + gap)
             for j in range(dims // 2)]  # fmt: skip
    low, high = (torch.tensor(p) for p in zip(*pairs, strict=True))
    angles = torch.atan2(turn[:, high, low].double(), turn[:, low, low].double())
    freq = angles[1]
    p = 2
    while p < len(angles):  # each doubling of the position halves the rounding error of the angle
        expected = freq * p
        freq = (expected + torch.remainder(angles[p] - expected + torch.pi, 2 * torch.pi) - torch.pi) / p
        p *= 2
    inv_freq, owners = _snap_frequencies(probe, freq)
    rotary = Rotary(dims=dims, inv_freq=inv_freq, interleaved=interleaved, start=start,
                    length_dependent=any(_changes_with_length(probe.graph, n) for n in owners))  # fmt: skip
    expected = torch.eye(dim).repeat(len(turn), 1, 1)
    angle = torch.arange(len(turn))[:, None] * torch.tensor(inv_freq)
    expected[:, low, low], expected[:, high, high] = angle.cos(), angle.cos()
    expected[:, high, low], expected[:, low, high] = angle.sin(), -angle.sin()
    if (expected - turn).abs().max() > 2e-5:
        raise probe.refuse("positions act in a way that is no rotation at constant frequencies.")
    inside = torch.zeros(dim, dtype=torch.bool)
    inside[start : start + dims] = True
    scaling = float(here[inside].mean() / (here[~inside].mean() if (~inside).any() else 1.0))
    scaling = _snap_one(scaling)
    here[inside] /= scaling
    return dataclasses.replace(rotary, scaling=scaling), here


def read_axes(graph: Graph, found: Found, path: Path, reading: Reading) -> tuple[int, ...] | None:
    """Which of a token's several positions turns each rotary pair; None where positions reach the heads as one.

    Raises:
        UnsupportedModel: several of them turn one pair, or none does.
    """
    rotary, axes = reading.rotary, graph.axes
    assert rotary is not None and axes is not None
    transposed = found.k_transposed and path.target is found.k
    probe = PathProbe(graph, found.module, path, transposed)
    far = torch.linspace(0, 1e5, graph.tokens, dtype=torch.float64).long()
    run = graph.runner([path.target], [path.linear.out, axes])
    y = torch.linspace(1, 2, path.linear.outputs).expand(graph.tokens, -1).reshape(shape(path.linear.out))
    low = rotary.start + torch.arange(rotary.dims // 2) * (2 if rotary.interleaved else 1)
    turned = []
    for axis in range(shape(axes)[0]):
        positions = torch.zeros(shape(axes), dtype=torch.long)
        positions[axis, 0] = far
        out = run(y, positions, more=probe.unit)[0].float()
        out = out.transpose(-1, -2) if transposed else out
        heads = out.reshape(-1, *out.shape[-2:])[..., list(reading.order)][..., low]
        turned.append((heads - heads[:, :1]).abs().amax((0, 1)) > 1e-4 * heads.abs().max())
    by_pair = torch.stack(turned)
    if not by_pair.any():
        return None
    if not (by_pair.sum(0) == 1).all():
        raise probe.refuse("rotary pairs are not turned by one axis of the positions each.")
    return tuple(by_pair.int().argmax(0).tolist())


def _snap_frequencies(probe: PathProbe, freq: Tensor) -> tuple[tuple[float, ...], list[str]]:
    """The exact numbers behind measured frequencies: a buffer of the model, or 1 / base^(2j / dims)."""
    owners, exact = [], None
    for node in probe.path.buffers:
        value = probe.graph.values.get(node)
        if value is not None and value.is_floating_point() and value.numel() == freq.numel():
            owners.append(probe.name(node))
            if exact is None and torch.allclose(value.flatten().double(), freq, rtol=2e-6, atol=1e-9):
                exact = value.flatten().float()
    if exact is None and len(freq) > 1 and (freq > 0).all():
        base = round(float(freq[-1]) ** (-len(freq) / (len(freq) - 1)), 1)
        formula = 1.0 / (base ** (torch.arange(0, 2 * len(freq), 2, dtype=torch.int64) / (2 * len(freq))))
        if torch.allclose(formula.double(), freq, rtol=2e-6, atol=1e-9):
            exact = formula
    return tuple((freq if exact is None else exact).tolist()), owners


def _changes_with_length(graph: Graph, buffer: str) -> bool:
    """Whether the module that owns a frequency buffer recomputes it in long sequences."""
    module, _, name = buffer.rpartition(".")
    kind: Any = graph.rope_types.get(module)
    if isinstance(kind, dict):
        kind = next((k for layer_type, k in kind.items() if name.startswith(layer_type)), "")
    return length_dependent(kind)


@dataclasses.dataclass(frozen=True)
class Scores:
    """What happens between q k^T and the softmax."""

    scale: float
    softcap: float | None
    window: int | None
    window_in_mask: bool
    sinks: str | None
    alibi_slopes: tuple[float, ...] | None


def read_scores(graph: Graph, found: Found, heads: int, generator: torch.Generator) -> Scores:
    """Scale, soft cap, window, sinks and ALiBi of one attention.

    Raises:
        UnsupportedModel: the mask or the scores follow no known pattern.
    """
    call = found.call
    if call is None:
        assert found.scores is not None
        scale, bias = _measure_scores(graph, found, generator)
        window, slopes = _read_bias(found.module, bias, heads)
        tags = [n.args[1] for n in graph.between([found.scores], [found.q, found.k]) if n.target is MASK]
        in_mask = any(_window_at(graph, found, tag, _FAR[0]) is not None for tag in tags)  # type: ignore[arg-type]
        return Scores(scale, None, window, in_mask, None, slopes)
    if call.unknown:
        raise UnsupportedModel(
            f"module {found.module}: its attention is given {', '.join(call.unknown)}, which no description holds."
        )
    window, slopes = _read_mask(graph, found, heads)
    in_mask = window is not None and found.mask is not None
    return Scores(call.scale, call.softcap, window, in_mask, _read_sinks(graph, found, heads, generator), slopes)


def _measure_scores(graph: Graph, found: Found, generator: torch.Generator) -> tuple[float, Tensor]:
    assert found.scores is not None
    _refuse_learned(graph, found, graph.between([found.scores], [found.q, found.k]))
    run = graph.runner([found.scores], [found.q, found.k])
    q = torch.randn(shape(found.q), generator=generator)
    k = torch.randn(shape(found.k), generator=generator)
    tokens = graph.tokens

    def scores(a: Tensor, b: Tensor) -> Tensor:
        return run(a, b)[0].float().reshape(-1, tokens, tokens)

    bias = scores(0 * q, 0 * k)
    seen = bias > -1e4
    plain = (q @ k).reshape(-1, tokens, tokens)
    seen, bias_n = seen.expand_as(plain), bias.expand_as(plain)
    for size in (1.0, 8.0):
        got = (scores(size * q, k).expand_as(plain) - bias_n)[seen]
        wanted = size * plain[seen]
        scale = float((got * wanted).double().sum() / wanted.pow(2).double().sum())
        if float((got - scale * wanted).abs().max()) > 2e-5 * float(bias_n[seen].abs().max() + got.abs().max()):
            raise UnsupportedModel(
                f"module {found.module}: its scores are not a multiple of q k^T plus a bias (a soft cap in the "
                "model's own code is not understood)."
            )
    return scale, bias


def _read_mask(graph: Graph, found: Found, heads: int) -> tuple[int | None, tuple[float, ...] | None]:
    call = found.call
    assert call is not None
    if found.mask is None:
        if not call.causal:
            raise UnsupportedModel(f"module {found.module}: its attention is not causal.")
        return call.window, None
    pieces = graph.between([found.mask], [])
    _refuse_learned(graph, found, pieces)
    tags = [n.args[1] for n in pieces if n.target is MASK]
    value = graph.runner([found.mask], [])()[0]
    if value.dtype == torch.bool:
        value = torch.zeros(value.shape).masked_fill(~value, float("-inf"))
    window, slopes = _read_bias(found.module, value.reshape(-1, *value.shape[-2:]), heads)
    if len(tags) == 1:
        widths = [_window_at(graph, found, tags[0], far) for far in _FAR]  # type: ignore[arg-type]
        if widths[0] != widths[1] or (window is not None and window != widths[0]):
            raise UnsupportedModel(
                f"module {found.module}: its mask is neither causal nor a sliding window (chunks, perhaps)."
            )
        window = widths[0]
    return window, slopes


def _refuse_learned(graph: Graph, found: Found, nodes: Sequence[fx.Node]) -> None:
    for node in nodes:
        if (source := graph.sources.get(node)) is not None and source.kind == "parameter":
            raise UnsupportedModel(
                f"module {found.module}: its mask or the bias on its scores is computed from {source.name}; only fixed "
                "patterns (causal, window, ALiBi) are understood."
            )


def _window_at(graph: Graph, found: Found, tag: int, far: int) -> int | None:
    """How many tokens a query at a far position sees, by bisection of the mask function."""

    def sees(key: int) -> bool:
        return bool(graph.visible(tag, torch.tensor(far), torch.tensor(key)))

    if sees(far + 1) or not sees(far):
        raise UnsupportedModel(f"module {found.module}: its mask is not causal.")
    if sees(0):
        return None
    near, hidden = 0, 1
    while hidden < far and sees(far - hidden):
        near, hidden = hidden, hidden * 2
    hidden = min(hidden, far)
    while hidden - near > 1:
        middle = (near + hidden) // 2
        near, hidden = (middle, hidden) if sees(far - middle) else (near, middle)
    return hidden


def _read_bias(module: str, bias_NTS: Tensor, heads: int) -> tuple[int | None, tuple[float, ...] | None]:
    """Window and ALiBi slopes of what is added to the scores."""
    seen = bias_NTS > -1e4
    tokens = bias_NTS.shape[-1]
    if not (seen == seen[0]).all() or seen.shape[-2] != tokens:
        raise UnsupportedModel(f"module {module}: its heads see different tokens.")
    token = torch.arange(tokens)
    behind = token[:, None] - token
    width = int(seen[0, -1].sum())
    if tokens > 1 and seen[0, 0, -1]:
        raise UnsupportedModel(f"module {module}: its attention is not causal.")
    if not torch.equal(seen[0], (behind >= 0) & (behind < width)):
        raise UnsupportedModel(f"module {module}: its mask is neither causal nor a sliding window.")
    window = None if width == tokens else width
    bias = (bias_NTS - bias_NTS.diagonal(dim1=1, dim2=2)[..., None]).masked_fill(~seen, 0.0)
    if not bias.any():
        return window, None
    if tokens < 2 or len(bias) not in (1, heads):
        raise UnsupportedModel(f"module {module}: an unknown bias is added to its scores.")
    slopes = -bias[:, 1, 0]
    expected = (slopes[:, None, None] * -behind).masked_fill(~seen, 0.0)
    # Falcon makes its slopes times positions in bfloat16: what differs by such rounding is still ALiBi.
    rounding = bias_NTS.masked_fill(~seen, 0.0).abs().amax(-1, keepdim=True) * 2**-7
    if ((bias - expected).abs() > rounding).any():
        raise UnsupportedModel(f"module {module}: the bias on its scores is not linear in the distance (ALiBi).")
    return window, tuple(slopes.expand(heads).tolist())


def _read_sinks(graph: Graph, found: Found, heads: int, generator: torch.Generator) -> str | None:
    if found.sinks is None:
        return None
    parameters = [n for n in graph.between([found.sinks], []) if n in graph.sources]
    if len(parameters) == 1 and graph.sources[parameters[0]].kind == "parameter":
        value = torch.randn(shape(parameters[0]), generator=generator)
        got = graph.runner([found.sinks], parameters)(value)[0]
        if value.numel() == heads and torch.equal(got.flatten(), value.flatten()):
            return graph.sources[parameters[0]].name
    raise UnsupportedModel(f"module {found.module}: its attention sinks are not one parameter per head.")


def read_out(graph: Graph, found: Found, path: OutPath, generator: torch.Generator) -> tuple[int, ...]:
    """First input column of the output projection for each query head.

    Raises:
        UnsupportedModel: something between attention and output projection reorders or changes the heads.
    """
    refusal = UnsupportedModel(
        f"module {found.module}: its heads do not reach {graph.sources[path.linear.weight].name} unchanged."
    )
    run = graph.runner([path.linear.x], [found.out, *path.others])
    gates = [torch.ones(shape(g)) for g in path.others]
    size = shape(found.out)
    dim = size[-1]
    heads = torch.Size(size).numel() // (graph.tokens * dim)
    codes = torch.randint(0, 2, (CODES, path.linear.inputs), generator=generator) * 2 - 1
    if path.linear.inputs != heads * dim:
        raise refusal
    shown = []
    for code in codes:
        given = code.float().reshape(heads, 1, dim).expand(heads, graph.tokens, dim)
        given = given.transpose(0, 1) if found.tokens_first else given
        out = run(given.reshape(size), *gates)[0].reshape(graph.tokens, -1)
        if not torch.equal(out, out[:1].expand_as(out)) or not torch.equal(out.abs(), torch.ones_like(out)):
            raise refusal
        shown.append(out[0])
    # Column c shows channel `index[c]` of the heads laid end to end.
    index = match_codes(codes, torch.stack(shown).sign().long(), refusal)
    columns = index.argsort().reshape(heads, dim)
    if not torch.equal(columns, columns[:, :1] + torch.arange(dim)):
        raise refusal
    return tuple(columns[:, 0].tolist())
