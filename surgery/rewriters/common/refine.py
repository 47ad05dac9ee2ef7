"""Block reconstruction: a layer's new parameters are trained to lead where the parent's layer leads.

From the converted prefix's inputs to the parent's output of the same layer, on the streams that are there anyway. The
closed forms are its start, and windows that it does not see decide whether its end is better.

Source: block reconstruction as in BRECQ (arXiv:2102.05426), here for what attention caches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...attention.weights import AttentionWeights
from ...calibration.forms import HeadsForm, LatentForm, ReaderForm
from ...calibration.processes import total
from ...calibration.visit import Visit
from ...calibration.working_copy import WorkingCopy

RATE = 0.02
"""Size of a step in parts of a parameter's root mean square."""
LOOKS = 4
"""How often the held-out error is looked at; the best state is kept."""
TOKENS = 1_024
"""Tokens of one step."""


def refine(visit: Visit, steps: int) -> None:
    """Train what the visited layer got, by Adam on the distance of the hidden states after the layer; keep what helps.

    Trained are q and o, and what makes K and V: heads, or the maps to and from a latent. A latent with readers keeps
    the map that fills it: their maps stand on it.

    Args:
        steps: of Adam, a few hundred; 0 does nothing.
    """
    if not steps or visit.site.gated_output:
        return
    copy, layer = visit.copy, visit.layer
    form, weights = copy.form(layer), copy.read(layer)
    start = _trained(form, weights)
    # Zeros of a latent's maps are its shape: K and V, or groups of heads, have parts of it for themselves.
    sizes = {name: _sizes(name, t) * (t != 0 if name.startswith("latent.") else 1) for name, t in start.items()}
    moves = {name: torch.zeros_like(t, requires_grad=True) for name, t in start.items()}

    def values() -> dict[str, Tensor]:
        return {name: t + sizes[name] * moves[name] for name, t in start.items()}

    best, error = start, visit.error()
    optimizer = torch.optim.Adam(moves.values(), lr=RATE, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    parts = visit.parts(TOKENS)
    for step in range(steps):
        part = parts[step % len(parts)]
        for move in moves.values():
            move.grad = torch.zeros_like(move)
        if part is not None:
            with torch.enable_grad():
                attention = partial(_attention, copy, layer, form, weights, values())
                visit.error_of(part, attention).backward()
        for move in moves.values():
            assert move.grad is not None
            move.grad = total(move.grad)
        optimizer.step()
        schedule.step()
        if (step + 1) % -(-steps // LOOKS) == 0 or step + 1 == steps:
            with torch.no_grad():
                reached = values()
            _write(visit, form, weights, reached)
            found = visit.error()
            if found < error:
                best, error = reached, found
    _write(visit, form, weights, best)


def _rate(step: int, steps: int) -> float:
    """Up within a tenth of the steps, then down along a cosine."""
    return min(1.0, 10 * (step + 1) / steps) * (1 + math.cos(math.pi * step / steps)) / 2


def _trained(form: HeadsForm, weights: AttentionWeights) -> dict[str, Tensor]:
    """The parameters, by the names of their fields; those of a latent after `latent.`."""
    names = ["q_NHD", "q_bias_NH", "o_DNV"]
    latent = getattr(form, "latent", None)
    if not isinstance(form, LatentForm) and not (isinstance(form, ReaderForm) and not form.values_only):
        names += ["k_KHD", "k_bias_KH"]
    if not form.is_computed:
        names += ["v_KVD", "v_bias_KV"]
    found = {name: getattr(weights, name) for name in names}
    if latent is not None:
        own = ["k_up_KHR", "v_up_KVR", "k_mean_KH", "v_mean_KV"]
        own += ["down_RD", "rope_FD", "q_rope_KFH"] if isinstance(form, LatentForm) else []
        found |= {f"latent.{name}": getattr(latent, name) for name in own}
    return {name: t.detach().float() for name, t in found.items() if t is not None and t.numel()}


def _sizes(name: str, t: Tensor) -> Tensor:
    """Root mean squares that steps are parts of: by channel of a latent, else by head."""
    channel = {"latent.down_RD": 0, "latent.k_up_KHR": 2, "latent.v_up_KVR": 2, "o_DNV": 1}.get(name, 0)
    others = [axis for axis in range(t.ndim) if axis != channel]
    square = t.square()
    return (square.mean(others, keepdim=True) if others else square.mean()).sqrt().clamp_min(1e-8).expand(t.shape)


def _filled(form: HeadsForm, weights: AttentionWeights, values: dict[str, Tensor]) -> tuple[Any, AttentionWeights]:
    """The form and the weights with these values."""
    inner = {name.removeprefix("latent."): t for name, t in values.items() if name.startswith("latent.")}
    outer: dict[str, Any] = {name: t for name, t in values.items() if not name.startswith("latent.")}
    if isinstance(form, (LatentForm, ReaderForm)) and form.latent is not None:
        changed: dict[str, Any] = dict(inner)
        form = replace(form, latent=replace(form.latent, **changed))
    return form, replace(weights, **outer)


def _attention(
    copy: WorkingCopy,
    layer: int,
    form: HeadsForm,
    weights: AttentionWeights,
    values: dict[str, Tensor],
    inputs: Mapping[int, Tensor],
) -> Tensor:
    """The attention's output [B, T, D], with what `o` adds."""
    form, own = _filled(form, weights, values)
    heads = copy.head_outputs(layer, inputs, own, form)
    out = torch.einsum("btnv,dnv->btd", heads, own.o_DNV)
    return out if own.o_bias_D is None else out + own.o_bias_D


def _write(visit: Visit, form: HeadsForm, weights: AttentionWeights, values: dict[str, Tensor]) -> None:
    form, own = _filled(form, weights, values)
    visit.copy.take_form(visit.layer, form)
    visit.copy.write(visit.layer, own)
