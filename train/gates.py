"""The budget of learned merging: how many tokens the gates are to let go, and how many are missing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from surgery.errors import RecipeError
from surgery.measure.gates import Counted, gated


class Budget(NamedTuple):
    """What is asked of all gated layers, layer by layer, [heads] each; a latent counts as one head."""

    rate: Tensor
    """Part of the decisions that is to be 1. Above 1 where a head's window is longer than its share of slots: the
    others make up for that."""
    weight: Tensor
    """Part of the decisions that a window leaves any effect."""


def budget_of(model: nn.Module, length: int) -> Budget:
    """The budget by now, of sequences of `length` tokens; nothing is asked of scores."""
    rates, weights = [], []
    for module in gated(model).values():
        retain, heads = module.retain, (module.plan.decisions,)
        at_risk = max(length - retain.always_kept, 1e-9) / (length - retain.protected)
        rates.append(torch.full(heads, retain.drop_rate(length, module.target_ratio) * retain.is_trained))
        weights.append(torch.full(heads, at_risk * retain.is_trained))
    return Budget(torch.cat(rates), torch.cat(weights))


def check_length(model: nn.Module, length: int, per_head: bool) -> None:
    """Raise RecipeError where sequences of `length` tokens cannot reach the ratio that the model's gates are for."""
    gates = [gate for gate in gated(model).values() if gate.retain.is_trained]
    if not gates:
        return
    for group in [[gate] for gate in gates] if per_head else [gates]:
        heads = sum(gate.plan.decisions for gate in group)
        kept = sum(min(gate.retain.always_kept, length) * gate.plan.decisions for gate in group) / heads
        wanted = sum(length / gate.retain.ratio * gate.plan.decisions for gate in group) / heads
        if kept > wanted:
            raise RecipeError(
                f"uptrain.length: {f'layer {group[0].layer_idx}' if per_head else 'the model'} is to keep one of "
                f"{length / wanted:.3g} tokens, and {kept:.0f} of {length} always stay: {length / kept:.1f} at most. "
                "Train on longer sequences, or convert with a smaller window or ratio."
            )


def shortfall(counted: Counted, budget: Budget, per_head: bool, total: Callable[[Tensor], Tensor]) -> Tensor:
    """How far the part of decisions that are 1 is below the budget, at least 0: of all together, or mean over heads.

    Args:
        total: sum over devices. The value is that of all devices; the gradient is this device's share of it.
    """
    rate, weight = (x.to(counted.gone.device) for x in budget)
    gone, free = (total(x.detach()) for x in (counted.gone, counted.free))
    gone = gone + counted.gone - counted.gone.detach()
    if per_head:
        return (rate.clamp_max(1) - gone / free.clamp_min(1)).clamp_min(0).mean()
    return (((rate * free - gone) * weight).sum() / (free * weight).sum().clamp_min(1e-9)).clamp_min(0)


def summed(sums: dict[str, Any]) -> dict[str, float]:
    """What the log says of sums of `slots`, `tokens_seen`, `gone` and `free`: the ratio, and the part of decisions."""
    return {
        "gate_ratio": sums["gate_tokens"] / max(sums["gate_slots"], 1.0),
        "gate_rate": sums["gate_gone"] / max(sums["gate_free"], 1.0),
    }
