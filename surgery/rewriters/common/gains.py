"""One factor per query head on q and on o, fitted over the whole model: the only step that sees the model's loss."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...attention.weights import parameter_names
from ...calibration.outputs import compared, compared_module, distance
from ...calibration.text import Windows
from ...calibration.working_copy import WorkingCopy
from ...runtime.layout import AttentionSite

WINDOWS = 64
BATCH = 8


def tune_gains(copy: WorkingCopy, layers: Iterable[int], windows: Windows, steps: int = 60) -> float:
    """`fit_gains` of the converted `layers` together, kept where the check windows agree. Returns their KL."""
    fit, check = windows.take(WINDOWS).split()
    sites = [site for site in (copy.sites[layer] for layer in sorted(layers)) if not site.gated_output]
    before = copy.divergence(check)
    if not sites:
        return before
    kept = {name: copy.tensor(name).clone() for site in sites for name in parameter_names(site)}
    batches = [{"input_ids": ids, "attention_mask": mask.long()} for ids, mask in fit.batches(BATCH)]
    fit_gains(copy.model, copy.teacher, batches, sites, steps=steps)
    copy.forget_streams()
    after = copy.divergence(check)
    if after > before:
        copy.restore(kept)
    return min(before, after)


@torch.enable_grad()
def fit_gains(
    student: PreTrainedModel,
    parent: PreTrainedModel,
    batches: Sequence[Mapping[str, Tensor]],
    sites: Sequence[AttentionSite],
    *,
    steps: int = 60,
    lr: float = 0.02,
) -> list[float]:
    """Learn one factor on W_q and one on W_o per query head by KL(parent ‖ student), and fold them. In place.

    Where the models give no probabilities, by what `outputs.distance` takes in place of the KL.

    2N numbers per layer, Adam, all weights frozen: the remedy for logits that least squares shrank.

    Args:
        batches: keyword arguments of both models' forward (`input_ids`, and `attention_mask` where there is padding).
        sites: the converted attentions, as they are in `student`. Before a q norm only W_o gets a factor: the norm
            would undo the other.

    Returns:
        The loss of each step, per token.
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
        named = dict(student.named_parameters())
        for name, w in scaled().items():
            if w is not parameters[name]:
                named[name].copy_(w)
    return losses


def _scale_heads(w: Tensor, rows: Sequence[int], dim: int, gain_N: Tensor, axis: int) -> Tensor:
    """`w` with the rows (or columns) of head h times gain_N[h]; what belongs to no head stays."""
    axis = axis % w.ndim
    index = torch.cat([torch.arange(r, r + dim) for r in rows]).to(w.device)
    factor = torch.ones(w.shape[axis], device=w.device).index_put((index,), gain_N.repeat_interleave(dim))
    shape = [-1 if a == axis else 1 for a in range(w.ndim)]
    return w * factor.reshape(shape).to(w.dtype)
