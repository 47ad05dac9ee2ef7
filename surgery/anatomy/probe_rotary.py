"""Recognise a rotary embedding: pairs, frequencies, scaling, and the axis of the positions behind each pair."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ..runtime.frequencies import length_dependent
from ..runtime.layout import Rotary
from .graph import Graph, shape
from .probe import PathProbe, Reading, snap_one
from .walk import Found, Path


def read_rotary(probe: PathProbe, basis: Tensor) -> tuple[Rotary | None, Tensor]:
    """The rotation that takes position 0 to the others, and the factor of each channel without rotary scaling."""
    dim = basis.shape[1]
    here = basis[0].diagonal().clone()
    off = basis[0] - torch.diag(here)
    if off.abs().max() > 1e-5 * here.abs().max() or here.min() <= 0:
        raise probe.refuse("something mixes channels at position 0 already, which no rotary embedding does.")
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
        what = "positions act in a way that is no rotation at constant frequencies."
        raise probe.refuse(f"{what}{_rounded_table(probe)}")
    inside = torch.zeros(dim, dtype=torch.bool)
    inside[start : start + dims] = True
    scaling = float(here[inside].mean() / (here[~inside].mean() if (~inside).any() else 1.0))
    scaling = snap_one(scaling)
    here[inside] /= scaling
    return dataclasses.replace(rotary, scaling=scaling), here


def _rounded_table(probe: PathProbe) -> str:
    """What to do about a table of sines that a cast of the whole model has rounded; empty where there is none."""
    for node in probe.path.buffers:
        value = probe.graph.values.get(node)
        if value is not None and value.dtype in (torch.bfloat16, torch.float16):
            dtype = str(value.dtype).removeprefix("torch.")
            return (
                f" Its buffer {probe.name(node)} is rounded to {dtype}, as `model.to(torch.{dtype})` does. Load the "
                f"model in {dtype} instead: from_pretrained(..., dtype=torch.{dtype}) leaves this buffer in float32."
            )
    return ""


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
