"""One factor per query head on q and on o: what least squares on scores and outputs leaves to be won.

In closed form, layer by layer, or over the whole model by its loss (`gain_fit: global`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...attention.linalg import damp, to_double
from ...attention.weights import AttentionWeights, parameter_names
from ...calibration.outputs import compared, compared_module, distance
from ...calibration.processes import total
from ...calibration.text import Windows
from ...calibration.visit import Visit
from ...calibration.working_copy import WorkingCopy
from ...runtime.layout import AttentionSite

GainFit = bool | Literal["global"]
"""`true`: layer by layer, in closed form; `global`: by 60 steps on the loss of the whole model; `false`: not at all."""
GAIN_TOKENS = 4_096
"""Tokens that the closed form looks at: it fits 2N numbers per layer."""
GAIN_NUMBERS = 2_500_000
"""Numbers of output that are compared: of wide models the same windows give them with fewer tokens."""
GAIN_ROWS = 64
"""Tokens whose 2N outputs, [2N, tokens, D], are in memory together."""
STEP = 0.05
"""Part of q by which its effect on the head outputs is measured."""
WINDOWS = 64
BATCH = 8


def fit_gains(visit: Visit, weights: AttentionWeights) -> AttentionWeights:
    """One Gauss-Newton step on the factors of the visited layer, to what its attention should give.

    A factor on q changes its own head's outputs alone, so that one look with all of q made a little larger has every
    head's derivative. Under a norm of q only o gets factors: the norm would undo the others.
    """
    copy, layer, N = visit.copy, visit.layer, weights.heads
    larger = replace(weights, q_NHD=weights.q_NHD * (1 + STEP), q_bias_NH=_times(weights.q_bias_NH, 1 + STEP))
    gram, cross = torch.zeros(2 * N, 2 * N, dtype=torch.float64), torch.zeros(2 * N, dtype=torch.float64)
    every = max(1, round(min(visit.tokens, GAIN_TOKENS) * len(weights.o_DNV) / GAIN_NUMBERS))
    for a in visit.activations(GAIN_TOKENS):
        now, then = (copy.head_outputs(layer, a.inputs, w) for w in (weights, larger))
        heads = torch.cat([(then - now) / STEP, now], 2) if weights.q_norm is None else torch.cat([now * 0, now], 2)
        o_CVD = weights.o_DNV.permute(1, 2, 0).repeat(2, 1, 1)
        mask = a.mask_BT
        counted = (x[mask][::every].split(GAIN_ROWS) for x in (heads, a.wanted_BTD))
        for heads_PCV, wanted_PD in zip(*counted, strict=True):
            given_CPD = heads_PCV.transpose(0, 1) @ o_CVD
            missing_PD = wanted_PD - given_CPD[N:].sum(0)
            given = given_CPD.flatten(1)
            gram += to_double(given @ given.T)
            cross += to_double(given @ missing_PD.flatten())
    factor = (1 + torch.linalg.solve(damp(total(gram), 1e-3), total(cross))).clamp(0.5, 2.0).to(weights.q_NHD.dtype)
    q, o = factor[:N], factor[N:]
    return replace(
        weights,
        q_NHD=weights.q_NHD * q[:, None, None],
        q_bias_NH=_times(weights.q_bias_NH, q[:, None]),
        o_DNV=weights.o_DNV * o[:, None],
    )


def _times(x: Tensor | None, factor: Tensor | float) -> Tensor | None:
    return None if x is None else x * factor


def tune_gains(copy: WorkingCopy, layers: Iterable[int], windows: Windows, steps: int = 60) -> float:
    """`descend_gains` of the converted `layers` together, kept where the check windows agree. Returns their KL."""
    fit, check = windows.take(WINDOWS).split()
    sites = [site for site in (copy.sites[layer] for layer in sorted(layers)) if not site.gated_output]
    before = copy.divergence(check)
    if not sites:
        return before
    kept = {name: copy.tensor(name).clone() for site in sites for name in parameter_names(site)}
    batches = [{"input_ids": ids, "attention_mask": mask.long()} for ids, mask in fit.batches(BATCH)]
    copy.restore(descend_gains(copy.model, copy.teacher, batches, sites, steps=steps)[1])
    after = copy.divergence(check)
    if after > before:
        copy.restore(kept)
    copy.forget_model()
    return min(before, after)


@torch.enable_grad()
def descend_gains(
    student: PreTrainedModel,
    parent: PreTrainedModel,
    batches: Sequence[Mapping[str, Tensor]],
    sites: Sequence[AttentionSite],
    *,
    steps: int = 60,
    lr: float = 0.02,
) -> tuple[list[float], dict[str, Tensor]]:
    """Learn one factor on W_q and one on W_o per query head by KL(parent ‖ student), and fold them.

    Where the models give no probabilities, by what `outputs.distance` takes in place of the KL.

    2N numbers per layer, Adam, all weights frozen: the remedy for logits that least squares shrank.

    Args:
        batches: keyword arguments of both models' forward (`input_ids`, and `attention_mask` where there is padding).
        sites: the converted attentions, as they are in `student`. Before a q norm only W_o gets a factor: the norm
            would undo the other.

    Returns:
        The loss of each step, per token, and the parameters of `student` with their factors, by name.
    """
    parameters = {name: p.detach() for name, p in student.named_parameters()}
    device = next(iter(parameters.values())).device
    gains = [(torch.ones(s.heads, device=device), torch.ones(s.heads, device=device)) for s in sites]
    learned = [g for site, (q, o) in zip(sites, gains, strict=True) for g in ((o,) if site.q_norm else (q, o))]
    for g in learned:
        g.requires_grad_()

    def scaled() -> dict[str, Tensor]:
        out = dict(parameters)
        for site, (q, o) in zip(sites, gains, strict=True):
            if site.q_norm is None:
                for name in (site.q.weight, site.q.bias):
                    if name is not None:
                        axis = -1 if site.q.transposed else 0
                        out[name] = _scale_heads(out[name], site.q.head_rows, site.head_dim, q, axis)
            axis = 0 if site.o.transposed else -1
            out[site.o.weight] = _scale_heads(out[site.o.weight], site.o.head_rows, site.value_dim, o, axis)
        return out

    module = compared_module(student)
    prefix = next(f"{name}." if name else "" for name, part in student.named_modules() if part is module)
    inside = {name.removeprefix(prefix): name for name in parameters if name.startswith(prefix)}

    optimizer = torch.optim.Adam(learned, lr=lr, betas=(0.9, 0.95))
    losses: list[float] = []
    for step in range(steps):
        batch = {name: tensor.to(device) for name, tensor in batches[step % len(batches)].items()}
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        with torch.no_grad():
            target = compared(parent, compared_module(parent)(**batch, use_cache=False), mask)
        weights = scaled()
        own = {short: weights[name] for short, name in inside.items()}
        output = torch.func.functional_call(module, own, (), {**batch, "use_cache": False})
        loss = distance(student, compared(student, output, mask), target) / len(target)
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        return losses, {name: w for name, w in scaled().items() if w is not parameters[name]}


def _scale_heads(w: Tensor, rows: Sequence[int], dim: int, gain_N: Tensor, axis: int) -> Tensor:
    """`w` with the rows (or columns) of head h times gain_N[h]; what belongs to no head stays."""
    axis = axis % w.ndim
    index = torch.cat([torch.arange(r, r + dim) for r in rows]).to(w.device)
    factor = torch.ones(w.shape[axis], device=w.device).index_put((index,), gain_N.repeat_interleave(dim))
    shape = [-1 if a == axis else 1 for a in range(w.ndim)]
    return w * factor.reshape(shape).to(w.dtype)
