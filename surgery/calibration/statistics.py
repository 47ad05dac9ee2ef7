"""What is found out about one layer from what it reads: whether it varies, and how its output joins the residual."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.layout import Projection


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


@torch.no_grad()
def residual_factor(layer: nn.Module, o: nn.Module, run: Callable[[], Tensor], h: Tensor) -> float | None:
    """c where the decoder layer adds c times the attention's output to the residual stream (1; Granite: less).

    None where something else stands between (a norm of the output, as in OLMo-2 and Gemma): then no attention output
    can stand for a difference of residual streams. Found by looking for h + c y among what the layer computes.

    Args:
        o: the last projection of the attention.
        run: calls the layer on `h` and returns its hidden states.
    """
    seen: list[Tensor] = []
    outputs: list[Tensor] = []
    given: list[Tensor] = []

    def stream(t: Any) -> Tensor | None:
        """A copy, as layers add in place (Falcon), in the shape of `h`: some work on all tokens in one row (OPT)."""
        fits = isinstance(t, Tensor) and t.is_floating_point() and t.numel() == h.numel() and t.shape[-1] == h.shape[-1]
        return t.detach().reshape(h.shape).clone() if fits else None

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        seen.extend(t for t in map(stream, (*args, *kwargs.values())) if t is not None)
        found = stream(output[0] if isinstance(output, tuple) else output)
        if found is not None:
            outputs.append(found)
            if module is o:
                given.append(found)
            if module is layer:
                seen.extend([found, *(found - other for other in outputs)])

    handles = [module.register_forward_hook(record, with_kwargs=True) for module in layer.modules()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    if not given:
        return None
    y = given[0]
    for t in seen:
        difference = t - h
        c = float((difference * y).sum() / y.square().sum().clamp_min(1e-30))
        if c > 1e-3 and float((difference - c * y).norm()) < 1e-3 * float((c * y).norm()):
            return c
    return None


def module_of(projection: Projection) -> str:
    """Qualified name of the module that owns the projection's weight."""
    return projection.weight.rpartition(".")[0]
