"""Stream the statistics that rewriters ask for: one layer at a time, moments only, never the activations of a set.

Each statistic of layer l runs the model up to layer l and stops there, so converting all layers in order costs about
L/2 forward passes over the calibration text, and memory does not grow with the text. Moments are summed in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .rewriters.attention_weights import AttentionWeights
from .runtime.layout import AttentionSite, HeadNorm, Projection
from .show import progress
from .text import Windows

BATCH = 8


@dataclass(frozen=True)
class OutputMoments:
    """Moments for refitting `o`: `yo_DP` = E[y oᵀ] [D, N*Hv], `oo_PP` = E[o oᵀ]; y is the parent's, without bias."""

    yo_DP: Tensor
    oo_PP: Tensor


def input_moments(model: nn.Module, site: AttentionSite, windows: Windows, with_bias: bool = False) -> Tensor:
    """E[x xᵀ] of what the projections of `site` read; E[x~ x~ᵀ] with x~ = [x; 1] where `with_bias`. float64."""
    total: Tensor | None = None
    for x_PD in projection_inputs(model, site, windows):
        x = x_PD.double()
        if with_bias:
            x = torch.cat([x, torch.ones_like(x[:, :1])], -1)
        total = x.T @ x if total is None else total + x.T @ x
    assert total is not None
    return total / windows.tokens


def projection_inputs(model: nn.Module, site: AttentionSite, windows: Windows) -> Iterator[Tensor]:
    """[tokens, D] per batch: what q, k and v of `site` are projected from, padding excluded."""
    with progress(f"layer {site.layer}: reading inputs", len(windows)) as advance:
        for ids, mask in windows.batches(BATCH):
            x, _ = run_to(model, module_of(site.q), ids)
            yield x[mask.to(x.device)].cpu()
            advance(len(ids))


def normed_projections(weights: AttentionWeights, x_PD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q [P, N, H], k [P, K, H], v [P, K, Hv] in float64 as the score reads them before rotation: q/k norms applied."""
    x = x_PD.double()
    if weights.has_bias:
        x = torch.cat([x, torch.ones_like(x[:, :1])], -1)
    q, k, v = (torch.einsum("pd,nhd->pnh", x, weights.with_bias(name)) for name in "qkv")
    q = _norm(q, weights.q_norm, weights.q_norm_NH, weights.q_norm_bias_NH)
    k = _norm(k, weights.k_norm, weights.k_norm_KH, weights.k_norm_bias_KH)
    return q, k, v


def output_moments(student: nn.Module, parent: nn.Module, site: AttentionSite, windows: Windows) -> OutputMoments:
    """What refitting `o` of `site` needs: the student's head outputs against the parent's attention output."""
    yo: Tensor | None = None
    oo: Tensor | None = None
    module = module_of(site.o)
    bias = None if site.o.bias is None else parent.get_parameter(site.o.bias).detach().double().cpu()
    with progress(f"layer {site.layer}: reading outputs", len(windows)) as advance:
        for ids, mask in windows.batches(BATCH):
            _, y = run_to(parent, module, ids)
            o, _ = run_to(student, module, ids)
            o, y = (t.reshape(*mask.shape, -1)[mask.to(t.device)].double().cpu() for t in (o, y))
            if bias is not None:
                y = y - bias
            yo = y.T @ o if yo is None else yo + y.T @ o
            oo = o.T @ o if oo is None else oo + o.T @ o
            advance(len(ids))
    assert yo is not None and oo is not None
    return OutputMoments(yo / windows.tokens, oo / windows.tokens)


class _Reached(Exception):
    """Ends a forward pass that has delivered what it was run for."""


@torch.no_grad()
def run_to(model: nn.Module, module: str, ids_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Input and output of one submodule, the rest of the forward pass not run. Padding on the right needs no mask."""
    found: list[Tensor] = []

    def record(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        found.extend((args[0], output))
        raise _Reached

    handle = model.get_submodule(module).register_forward_hook(record)
    try:
        model(input_ids=ids_BT.to(next(model.parameters()).device), use_cache=False)
    except _Reached:
        pass
    finally:
        handle.remove()
    x, y = found
    return x.reshape(*ids_BT.shape, -1), y


def module_of(projection: Projection) -> str:
    """Qualified name of the module that owns the projection's weight."""
    return projection.weight.rpartition(".")[0]


def _norm(x_PNH: Tensor, norm: HeadNorm | None, gain_NH: Tensor | None, bias_NH: Tensor | None) -> Tensor:
    if norm is None:
        return x_PNH
    x = x_PNH.flatten(1) if norm.span == "all" else x_PNH
    if norm.kind == "layer":
        x = x - x.mean(-1, keepdim=True)
    x = (x * (x.square().mean(-1, keepdim=True) + norm.eps).rsqrt()).reshape(x_PNH.shape)
    x = x if gain_NH is None else x * gain_NH.double()
    return x if bias_NH is None else x + bias_NH.double()
