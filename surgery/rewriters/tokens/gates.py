"""The `dmc` and `dms` steps: give layers a gate. Every other weight stays, to the last bit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...attention.forward import apply_norm
from ...attention.weights import AttentionWeights
from ...calibration.statistics import projection_inputs
from ...calibration.text import Windows
from ...calibration.working_copy import WorkingCopy
from ...errors import PlanError
from ...recipe import DmsStep, MergeStep
from ...runtime.gates import gate_shapes
from ...runtime.layout import LayerPlan, Merge
from .windows import windows_by_layer


class Gates:
    """An untrained gate for each layer that owns its cache: all its decisions are 0, except a score's."""

    def __init__(self, step: MergeStep, seed: int = 0) -> None:
        del seed  # nothing is random
        self.step = step

    def convert(self, copy: WorkingCopy, plans: Sequence[LayerPlan], windows: Windows | None) -> None:
        """Write the gates into `copy`, in place.

        Args:
            windows: calibration text, which `score:key_norm` and `windows: sensitivity` need.
        """
        if isinstance(self.step, DmsStep) and self.step.windows == "sensitivity":
            assert windows is not None
            copy.window_of |= windows_by_layer(copy, plans, windows)
            plans = [copy.settle(plan) for plan in plans]
        for plan in plans:
            assert plan.retain is not None
            if copy.settle(plan).owner != plan.layer:
                continue
            weights = copy.read(plan.layer)
            made = new_gate(plan.retain, copy.sites[plan.layer].hidden_size, weights.kv_heads)
            if "threshold" in made:
                assert windows is not None
                made["threshold"] = key_norm_threshold(copy, plan.layer, plan.retain, windows)
            copy.gates[plan.layer] = made


def new_gate(merge: Merge, hidden_size: int, kv_heads: int) -> dict[str, Tensor]:
    """Tensors of a gate that decides nothing yet."""
    made = {name: torch.zeros(shape) for name, shape in gate_shapes(merge, hidden_size, kv_heads).items()}
    if "norm" in made:
        made["norm"] += 1.0
    if "channel_bits" in made:
        made["channel_bits"] = torch.ones(1).view(torch.int32)
    return made


def key_norm_threshold(copy: WorkingCopy, layer: int, merge: Merge, windows: Windows) -> Tensor:
    """[K]: the norm above which keys must go so that a sequence of the text's length reaches `merge.ratio`.

    Raises:
        PlanError: sequences of that length are shorter than what always stays, times the ratio.
    """
    tokens = windows.ids_BT.shape[1]
    rate = merge.drop_rate(tokens, merge.ratio)
    if rate > 1:
        raise PlanError(
            f"layer {layer}: the first {merge.protected} and the newest {merge.window} of {tokens} calibration tokens "
            f"always stay: {merge.ratio:g}x is out of reach. Use a smaller window, or longer calibration windows."
        )
    weights = copy.read(layer)
    norms_PK = torch.cat([_key_norms(weights, x) for x in projection_inputs(copy.model, copy.sites[layer], windows)])
    return torch.quantile(norms_PK, 1 - rate, dim=0)


def _key_norms(weights: AttentionWeights, x_PD: Tensor) -> Tensor:
    """[tokens, K], as the gate sees keys: normed where their norm comes first, not rotated."""
    k_KPH = torch.einsum("pd,khd->kph", x_PD, weights.k_KHD)
    if weights.k_bias_KH is not None:
        k_KPH = k_KPH + weights.k_bias_KH[:, None]
    if weights.k_norm is not None and not weights.k_norm.after_rotary:
        k_KPH = apply_norm(k_KPH[None], weights.k_norm, weights.k_norm_KH, weights.k_norm_bias_KH)[0]
    return k_KPH.norm(dim=-1).T
