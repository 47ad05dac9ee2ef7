"""Stream the statistics that rewriters ask for: one layer at a time, moments only, never the activations of a set.

Each statistic of layer l runs the model up to layer l and stops there, so converting all layers in order costs about
L/2 forward passes over the calibration text, and memory does not grow with the text. Moments are summed in float64.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..console import progress
from ..runtime.layout import AttentionSite, Projection
from .text import Windows

BATCH = 8


class Pair(Protocol):
    """The parent, and the copy of it that is being converted."""

    @property
    def teacher(self) -> PreTrainedModel: ...

    @property
    def model(self) -> PreTrainedModel: ...

    @property
    def sites(self) -> Mapping[int, AttentionSite]: ...


class Activations(NamedTuple):
    """One calibration batch at one layer, in the parent's stream and in the converted prefix's; on the CPU."""

    x_parent_BTD: Tensor
    """Input of the projections, after the norm."""
    x_student_BTD: Tensor
    gap_BTD: Tensor
    """Residual stream of the parent minus that of the student before this layer, in units of attention output."""
    mask_BT: Tensor
    """True at real tokens; padding on the right."""
    inputs: Mapping[int, Tensor] = MappingProxyType({})
    """By layer: input of the projections in the student's stream, [B, T, D], of the layers that were asked for."""


@dataclass(frozen=True)
class Again:
    """Activations to go through several times, computed anew each time."""

    make: Callable[[], Iterator[Activations]]

    def __iter__(self) -> Iterator[Activations]:
        return self.make()


class Variety:
    """Whether what a layer was seen to read differs in more than its size; if not, moments are singular."""

    def __init__(self, layer: int) -> None:
        self.layer = layer
        self.direction_D: Tensor | None = None
        self.is_varied = False

    @torch.no_grad()
    def see(self, x_BTD: Tensor, mask_BT: Tensor) -> None:
        """Take in one batch; `mask_BT` is True at real tokens."""
        if self.is_varied:
            return
        x_PD = x_BTD[mask_BT.to(x_BTD.device)].float()
        sizes = x_PD.norm(dim=-1)
        if self.direction_D is None and sizes.any():
            self.direction_D = x_PD[sizes.argmax()] / sizes.max()
        if self.direction_D is not None:
            rest = x_PD - (x_PD @ self.direction_D)[:, None] * self.direction_D
            self.is_varied = bool((rest.norm(dim=-1) > 1e-4 * sizes.max()).any())

    def warn(self) -> None:
        """Warn where all that was seen is zero, or one vector."""
        if self.is_varied:
            return
        if self.direction_D is None:
            text = "its projections read zeros only (a norm whose gains are zero?); it is converted as without text."
        else:
            text = (
                "what its projections read is multiples of one vector (the same token throughout?); its moments are "
                "singular and damped. Give varied text."
            )
        warnings.warn(f"layer {self.layer}: {text}", stacklevel=2)


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
    variety = Variety(site.layer)
    with progress(f"layer {site.layer}: reading inputs", len(windows)) as advance:
        for ids, mask in windows.batches(BATCH):
            x, _ = run_to(model, module_of(site.q), ids)
            variety.see(x, mask)
            yield x[mask.to(x.device)].cpu()
            advance(len(ids))
    variety.warn()


def layer_activations(
    copy: Pair, site: AttentionSite, windows: Windows, sources: Iterable[int] = ()
) -> Iterator[Activations]:
    """Both models' inputs of one attention, batch by batch, and how far their residual streams are apart before it.

    Args:
        sources: layers, none behind that of `site`, whose inputs in the student are wanted beside.
    """
    factor = residual_factor(copy.teacher, site, windows)
    variety = Variety(site.layer)
    with progress(f"layer {site.layer}: refitting", len(windows)) as advance:
        for ids, mask in windows.batches(BATCH):
            x, h = _stream_at(copy.teacher, site, ids)
            with noted_inputs(copy, sources) as inputs:
                x_s, h_s = _stream_at(copy.model, site, ids)
            gap = torch.zeros_like(h) if factor is None else (h - h_s) / factor
            variety.see(x_s, mask)
            yield Activations(x.cpu(), x_s.cpu(), gap.cpu(), mask, inputs)
            advance(len(ids))
    variety.warn()


@contextmanager
def noted_inputs(copy: Pair, layers: Iterable[int]) -> Iterator[dict[int, Tensor]]:
    """What q, k and v of some layers of the student are projected from inside, [B, T, D] on the CPU, by layer."""
    found: dict[int, Tensor] = {}

    def note(layer: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            found[layer] = args[0].reshape(-1, *args[0].shape[-2:]).cpu()

        return hook

    with ExitStack() as stack:
        for layer in layers:
            module = copy.model.get_submodule(module_of(copy.sites[layer].q))
            stack.callback(module.register_forward_pre_hook(note(layer)).remove)
        yield found


def layer_inputs(copy: Pair, layers: Iterable[int], windows: Windows) -> Iterator[tuple[dict[int, Tensor], Tensor]]:
    """Inputs of the projections of some layers of the student, batch by batch, and the mask of real tokens."""
    wanted = sorted(layers)
    for ids, mask in windows.batches(BATCH):
        with noted_inputs(copy, wanted) as inputs:
            run_to(copy.model, module_of(copy.sites[wanted[-1]].q), ids)
        yield inputs, mask


def residual_factor(model: nn.Module, site: AttentionSite, windows: Windows) -> float | None:
    """c where the decoder layer adds c times the attention's output to the residual stream (1; Granite: less).

    None where something else stands between (a norm of the output, as in OLMo-2 and Gemma): then no attention output
    can stand for a difference of residual streams. Found by looking for h + c y among what the layer computes.
    """
    ids = windows.ids_BT[:1, : min(32, int(windows.mask_BT[0].sum()))]
    layer = model.get_submodule(site.module.rpartition(".")[0])
    seen: list[Tensor] = []
    outputs: list[Tensor] = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        seen.extend(t for t in (*args, *kwargs.values()) if isinstance(t, Tensor))
        output = output[0] if isinstance(output, tuple) else output
        if isinstance(output, Tensor):
            outputs.append(output)
            if module is layer:
                seen.extend([output, *(output - other for other in outputs if other.shape == output.shape)])

    handles = [module.register_forward_hook(record, with_kwargs=True) for module in layer.modules()]
    try:
        _, h = _stream_at(model, site, ids)  # stops early: what matters is run below
        seen.clear()
        outputs.clear()
        _, y = run_to(model, module_of(site.o), ids)
        with torch.no_grad():
            model(input_ids=ids.to(h.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    y = y.reshape(h.shape)
    for t in seen:
        if t.shape == h.shape and t.is_floating_point():
            difference = t - h
            c = float((difference * y).sum() / y.square().sum().clamp_min(1e-30))
            if c > 1e-3 and float((difference - c * y).norm()) < 1e-3 * float((c * y).norm()):
                return c
    return None


def _stream_at(model: nn.Module, site: AttentionSite, ids_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Input of the projections, and the residual stream that enters the decoder layer; both [B, T, D]."""
    entered: list[Tensor] = []

    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entered.append(args[0] if args else kwargs["hidden_states"])

    layer = model.get_submodule(site.module.rpartition(".")[0])
    handle = layer.register_forward_pre_hook(record, with_kwargs=True)
    try:
        x, _ = run_to(model, module_of(site.q), ids_BT)
    finally:
        handle.remove()
    return x, entered[-1].reshape(*ids_BT.shape, -1)


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
