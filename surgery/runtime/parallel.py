"""What is left of a parent's plans for tensor and pipeline parallelism.

A parent's plan shards its attention by the names of its projections and by its number of heads. A converted attention
has other projections, and heads that need not divide among as many devices, so every device computes it whole; that
is exact, and the other layers are sharded as before. Layers that share caches cannot be put on different stages.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn


def without_attention(plan: Mapping[str, Any] | None, attentions: Iterable[str]) -> dict[str, Any] | None:
    """`plan` without its rules for these modules and what is in them.

    Args:
        plan: style by name of a module or parameter, layer numbers as `*`, from any model around the modules.
        attentions: full names of the modules.
    """
    if plan is None:
        return None
    kinds = {"." + re.sub(r"\d+", "*", name) for name in attentions}

    def inside(rule: str) -> bool:
        parts = re.sub(r"\d+", "*", rule).split(".")
        ends = (".".join(parts[:count]) for count in range(1, len(parts) + 1))
        return any(kind.endswith("." + end) for end in ends for kind in kinds)

    return {rule: style for rule, style in plan.items() if not inside(rule)}


class ParentPlan:
    """A plan in a config class, as the parent's without what a converted model cannot follow; a class attribute.

    Args:
        name: of the attribute, `base_model_tp_plan` or `base_model_pp_plan`.
        parent: the parent's config class.
    """

    def __init__(self, name: str, parent: type) -> None:
        self.name, self.parent = name, parent

    def __get__(self, config: Any, owner: type) -> dict[str, Any] | None:
        plan: dict[str, Any] | None = getattr(self.parent, self.name, None)
        layers = None if config is None else (config.surgery or {}).get("layers")
        if not layers:
            return plan
        if self.name == "base_model_pp_plan":
            shares = any(
                layer["plan"]["owner"] != layer["plan"]["layer"] or layer["plan"].get("value_owner") is not None
                for layer in layers
            )
            return None if shares else plan
        return without_attention(plan, [layer["site"]["module"] for layer in layers])


def drop_plans(model: nn.Module, attentions: Iterable[str], shares_caches: bool) -> None:
    """Take out of the plans of `model` and of the models in it what converted attentions cannot follow."""
    names = list(attentions)
    for module in model.modules():
        for plan in ("_tp_plan", "_pp_plan"):
            if isinstance(vars(module).get(plan), dict):
                kept = {} if plan == "_pp_plan" and shares_caches else without_attention(vars(module)[plan], names)
                setattr(module, plan, kept)
