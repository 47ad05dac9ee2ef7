"""The `dmc` and `dms` steps: give layers a gate. Every other weight stays, to the last bit."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..calibrate import projection_inputs
from ..errors import PlanError
from ..recipe import DmsStep, MergeStep
from ..runtime.gates import gate_shapes
from ..runtime.layout import LayerPlan, Merge
from ..runtime.merged import SurgeryMergedAttention
from ..runtime.modeling import from_parent
from ..show import progress
from ..text import Windows
from ..working_copy import WorkingCopy
from .allocation import PARTS, share_out
from .attention_weights import AttentionWeights
from .reference import apply_norm

MEASURED = 16
"""Windows of text on which the cost of a layer's window is measured."""


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
            copy.windows |= windows_by_layer(copy, plans, windows)
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


def windows_by_layer(copy: WorkingCopy, plans: Sequence[LayerPlan], windows: Windows) -> dict[int, int]:
    """The window of each layer: together as many tokens as the plans', more of them in layers that miss them most.

    Layers trade with those whose tokens are as large as their own.
    """
    text = windows.take(MEASURED)
    alike: dict[int, dict[int, int]] = defaultdict(dict)
    for plan in plans:
        assert plan.retain is not None and plan.retain.window is not None
        alike[plan.project.dims][plan.layer] = plan.retain.window
    given: dict[int, int] = {}
    with progress("measuring windows", len(plans) * len(PARTS)) as advance:
        cost = window_costs(copy, plans, text, advance)
        for uniform in alike.values():
            given |= share_out(cost, uniform, dict.fromkeys(uniform, text.ids_BT.shape[1]))
    return given


def window_costs(
    copy: WorkingCopy, plans: Sequence[LayerPlan], text: Windows, advance: Callable[[int], None]
) -> Callable[[int, int], float]:
    """KL to the parent in nats per token where one layer drops all tokens behind a window, all others none.

    Args:
        advance: called with 1 whenever a cost is measured.
    """
    tokens = text.ids_BT.shape[1]
    kept = []
    for plan in map(copy.settle, plans):
        assert plan.retain is not None
        kept.append(replace(plan, retain=replace(plan.retain, gate="score:window", window=tokens)))
    model = from_parent(
        copy.model,
        [copy.sites[plan.layer] for plan in plans],
        kept,
        weights={plan.layer: copy.canonical(plan.layer) for plan in plans},
    ).eval()
    gates = {gate.layer_idx: gate for gate in model.modules() if isinstance(gate, SurgeryMergedAttention)}

    def cost(layer: int, window: int) -> float:
        whole = gates[layer].merge
        gates[layer].merge = replace(whole, window=window)
        found = copy.divergence_of(model, text)
        gates[layer].merge = whole
        advance(1)
        return found

    return cost


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
