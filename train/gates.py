"""The budget of learned merging: how many tokens the gates are to let go, and how many are missing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from surgery.decisions import Counted, gated
from surgery.errors import RecipeError


def target_rates(model: nn.Module, length: int) -> Tensor:
    """Part of the decisions that is to be 1 by now, for each KV head of each gated layer."""
    rates = [
        torch.full((module.heads.kv_heads,), min(1.0, module.merge.drop_rate(length, module.target_ratio)))
        for module in gated(model).values()
    ]
    return torch.cat(rates)


def check_length(model: nn.Module, length: int) -> None:
    """Raise RecipeError where sequences of `length` tokens cannot reach the ratio that the model's gates are for."""
    for name, module in gated(model).items():
        merge = module.merge
        if merge.drop_rate(length, merge.ratio) > 1:
            raise RecipeError(
                f"uptrain.length: {name} is to keep one of {merge.ratio:g} tokens, and {merge.always_kept} of {length} "
                f"always stay: {length / merge.always_kept:.1f} at most. Train on longer sequences, or convert with a "
                "smaller window or ratio."
            )


def shortfall(counted: Counted, target: Tensor, per_head: bool, total: Callable[[Tensor], Tensor]) -> Tensor:
    """How far the part of decisions that are 1 is below `target`, at least 0: of all together, or the mean over heads.

    Args:
        total: sum over devices. The value is that of all devices; the gradient is this device's share of it.
    """
    target = target.to(counted.gone.device)
    gone, free = (total(x.detach()) for x in (counted.gone, counted.free))
    own = counted.gone - counted.gone.detach()
    if per_head:
        return (target - (gone + own) / free.clamp_min(1)).clamp_min(0).mean()
    weight = free.sum().clamp_min(1)
    return ((target * free).sum() / weight - (gone.sum() + own.sum()) / weight).clamp_min(0)


def summed(sums: dict[str, Any]) -> dict[str, float]:
    """What the log says of sums of `slots`, `tokens_seen`, `gone` and `free`: the ratio, and the part of decisions."""
    return {
        "gate_ratio": sums["gate_tokens"] / max(sums["gate_slots"], 1.0),
        "gate_rate": sums["gate_gone"] / max(sums["gate_free"], 1.0),
    }
