"""The budget of learned merging: how many tokens the gates let go, how many they are to, and what the cache then takes.

Decisions are counted as evaluation takes them, without noise, with the gradient of sigmoid(logit): the probability of
the decision under the logistic noise of training (straight-through).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from surgery.errors import RecipeError
from surgery.runtime.layout import Merge
from surgery.runtime.merged import SurgeryMergedAttention
from surgery.runtime.merging import hard_decisions, order_of_packed


class Counted(NamedTuple):
    """Sums over one batch of sequences, [all KV heads of all gated layers, layer by layer]."""

    gone: Tensor
    """Decisions that are 1; carries the gradient."""
    free: Tensor
    """Decisions that the gate is asked for."""
    slots: Tensor
    """Slots that the sequences take at their ends."""
    tokens: Tensor


def gated(model: nn.Module) -> dict[str, SurgeryMergedAttention]:
    """Attentions with a gate by qualified name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, SurgeryMergedAttention) and m.owns_cache}


@contextmanager
def decisions(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Record the logits [B, K, T] of every gate in the forward pass inside, by name of the attention."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: tuple[Tensor, Tensor | None]) -> None:
            seen.setdefault(name, output[0])  # of the first pass: activation checkpointing runs layers again

        return hook

    handles = [module.gate.register_forward_hook(keep(name)) for name, module in gated(model).items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def count(model: nn.Module, logits: dict[str, Tensor], inputs: dict[str, Tensor]) -> Counted:
    """Count the decisions of one forward pass.

    Args:
        inputs: of that pass: `input_ids`, and `position_ids` that start again at every document.
    """
    positions = inputs.get("position_ids")
    if positions is None:
        positions = torch.arange(inputs["input_ids"].shape[1], device=inputs["input_ids"].device)[None]
    order_BT = order_of_packed(positions).expand(*inputs["input_ids"].shape)
    modules = gated(model)
    parts = [count_layer(logits[name], order_BT, modules[name].merge) for name in modules]
    return Counted(*(torch.cat(column) for column in zip(*parts, strict=True)))


def count_layer(logits_BKT: Tensor, order_BT: Tensor, merge: Merge) -> Counted:
    """`Counted` of one layer, [K] each."""
    hard = hard_decisions(logits_BKT, order_BT, merge.protected)
    free_BT = order_BT >= merge.protected
    p = torch.sigmoid(logits_BKT.float())
    straight = torch.where(free_BT[:, None], hard + (p - p.detach()), 0.0)
    dropped = hard if merge.method == "dmc" else hard & (left(order_BT) >= (merge.window or 0))[:, None]
    tokens = torch.full_like(p[0, :, 0], order_BT.numel())
    return Counted(
        gone=straight.sum((0, 2)),
        free=torch.full_like(tokens, float(free_BT.sum())),
        slots=tokens - dropped.sum((0, 2)),
        tokens=tokens,
    )


def left(order_BT: Tensor) -> Tensor:
    """[B, T]: tokens behind each one in its own sequence."""
    last = torch.cat((order_BT[:, 1:] == 0, torch.ones_like(order_BT[:, :1], dtype=torch.bool)), dim=1)
    places = torch.arange(order_BT.shape[1], device=order_BT.device).expand_as(order_BT)
    end = torch.where(last, places, order_BT.shape[1]).flip(1).cummin(1).values.flip(1)
    return end - places


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


def collapsed(names: list[str], counted: Counted, heads: list[int]) -> list[str]:
    """One sentence for each layer whose gate lets all tokens go, or none."""
    told = []
    for name, gone, free in zip(names, counted.gone.split(heads), counted.free.split(heads), strict=True):
        rate = float(gone.sum() / free.sum().clamp_min(1))
        if rate >= 0.999 or rate == 0.0:
            told.append(f"{name}: its gate lets {'every token' if rate else 'no token'} go")
    return told


def summed(sums: dict[str, Any]) -> dict[str, float]:
    """What the log says of sums of `slots`, `tokens_seen`, `gone` and `free`: the ratio, and the part of decisions."""
    return {
        "gate_ratio": sums["gate_tokens"] / max(sums["gate_slots"], 1.0),
        "gate_rate": sums["gate_gone"] / max(sums["gate_free"], 1.0),
    }
