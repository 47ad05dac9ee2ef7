"""Recognise what lies between a projection and the scores: rows, heads, norm, factor, rotation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, fx

from ..runtime.layout import HeadNorm
from .graph import Graph, is_call
from .probe import CODES, PathProbe, Reading, match_codes, snap_one
from .probe_rotary import read_rotary
from .walk import Found, Path

_POSITIONS = 32


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
    rotary, factors = read_rotary(probe, basis)
    if role == "v" and rotary is not None:
        raise probe.refuse("values change with the position of their token.")
    if factors.max() - factors.min() > 1e-4 * factors.abs().max():
        raise probe.refuse("channels are multiplied by unequal factors.")
    factor = snap_one(float(factors.mean()))
    return Reading(first, repeats, len(order), order, factor, rotary, norm, clip)


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
    return match_codes(
        codes,
        shown,
        probe.refuse("something mixes the projected numbers, so that no head can be told from its rows of the weight."),
    )


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
        raise probe.refuse("several biases are added behind the norm; one is understood.")
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
        raise probe.refuse("several gains are multiplied in; one is understood.")
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
        raise probe.refuse("several parameters act, and not one for each head.")
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
