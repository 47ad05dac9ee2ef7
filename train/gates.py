"""The budget of gates: how many tokens they are to let go, how many are missing, and which heads keep everything."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from surgery.errors import RecipeError
from surgery.measure.gates import Counted, gated
from surgery.runtime.gated import SurgeryGatedAttention

logger = logging.getLogger(__name__)


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
    whole = [gate for gate in gates if gate.retain.decided_by == "head"]
    if whole and min(_more(gate, length) for gate in whole) > _room(whole, length):
        raise RecipeError(
            f"uptrain.length: at the ratio of the recipe none of {sum(gate.plan.decisions for gate in whole)} KV heads "
            f"has room for all of {length} tokens, beside what the window and the first tokens take in the others. "
            "Train on longer sequences, or convert with a smaller window or ratio."
        )


def _more(gate: SurgeryGatedAttention, length: int) -> float:
    """Slots that a head takes beyond those that always stay where it keeps all of `length` tokens."""
    return max(0.0, length - gate.retain.always_kept)


def _room(gates: Sequence[SurgeryGatedAttention], length: int) -> float:
    """Slots that the ratios of `gates` leave for such heads, all together; rounding does not take one."""
    always = (gate.plan.decisions * (length / gate.retain.ratio - gate.retain.always_kept) for gate in gates)
    return sum(always) + 1e-6


@torch.no_grad()
def choose_heads(model: nn.Module, length: int) -> dict[int, list[float]]:
    """Make the gates of heads hard (`gate: head`): those of the largest alphas keep everything, as many as have room.

    They are taken in the order of their alphas, over all layers, until the next one has no room at the ratio on
    sequences of `length` tokens. Gates that are not trained stay as they are.

    Returns:
        The alphas that were learned, by layer; empty where there are none.

    Source: DuoAttention, arXiv:2410.10819, section 2.3, which takes a quantile.
    """
    gates = [
        module
        for module in gated(model).values()
        if module.retain.decided_by == "head" and module.gate.weight.requires_grad
    ]
    for module in gates:
        module.gate.bound()
    alphas = [_gathered(module.gate.alpha_K).tolist() for module in gates]
    order = sorted(((alpha, -i, -k) for i, found in enumerate(alphas) for k, alpha in enumerate(found)), reverse=True)
    whole = [torch.zeros(len(found)) for found in alphas]
    room, last = _room(gates, length), None
    for alpha, i, k in order:
        room -= _more(gates[-i], length)
        if room < 0:
            if alpha == last:
                logger.warning(
                    "heads with an alpha of %.3g are among those that keep everything and among the others: nothing "
                    "tells them apart. Train longer, at a higher rate, or with more weight on gate_budget.", alpha
                )  # fmt: skip
            break
        whole[-i][-k], last = 1.0, alpha
    for module, whole_K in zip(gates, whole, strict=True):
        module.gate.choose(_placed(whole_K, module.gate.weight))
        kept = ", ".join(str(k) for k in whole_K.nonzero()[:, 0].tolist())
        logger.info("layer %d: heads that keep everything: %s", module.layer_idx, kept or "none")
    return {module.layer_idx: found for module, found in zip(gates, alphas, strict=True)}


def _gathered(x: Tensor) -> Tensor:
    """All of a tensor that may lie in parts on several devices."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def _placed(x: Tensor, like: Tensor) -> Tensor:
    """`x` where `like` lies, in the same parts."""
    x = x.to(like.device, like.dtype)
    return distribute_tensor(x, like.device_mesh, like.placements) if isinstance(like, DTensor) else x


def mean_alpha(model: nn.Module, counted: Counted) -> Tensor:
    """Mean alpha of the gates of heads, with its gradient; 0 where there are none."""
    modules = gated(model).values()
    of_heads = torch.cat([torch.full((m.plan.decisions,), m.retain.decided_by == "head") for m in modules])
    of_heads = of_heads.to(counted.gone.device)
    alpha = 1 - counted.gone[of_heads] / counted.free[of_heads].clamp_min(1)
    return alpha.sum() / max(1, len(alpha))


def shortfall(counted: Counted, budget: Budget, per_head: bool, total: Callable[[Tensor], Tensor]) -> Tensor:
    """How far the part of decisions that are 1 is below the budget, at least 0: of all together, or mean over heads.

    Args:
        total: sum over devices. The value is that of all devices; the gradient is this device's share of it times their
            number, for gradients are averaged over devices.
    """
    rate, weight = (x.to(counted.gone.device) for x in budget)
    gone, free = (total(x.detach()) for x in (counted.gone, counted.free))
    gone = gone + total(torch.ones_like(gone)) * (counted.gone - counted.gone.detach())
    if per_head:
        return (rate.clamp_max(1) - gone / free.clamp_min(1)).clamp_min(0).mean()
    return (((rate * free - gone) * weight).sum() / (free * weight).sum().clamp_min(1e-9)).clamp_min(0)


def summed(sums: dict[str, Any]) -> dict[str, float]:
    """What the log says of sums of `slots`, `tokens_seen`, `gone` and `free`: the ratio, and the part of decisions."""
    return {
        "gate_ratio": sums["gate_tokens"] / max(sums["gate_slots"], 1.0),
        "gate_rate": sums["gate_gone"] / max(sums["gate_free"], 1.0),
    }
