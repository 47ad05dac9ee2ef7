"""Config of a converted model: the parent's config with one more field, `surgery`."""

from __future__ import annotations

from typing import Any

import transformers
from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .parallel import ParentPlan

PREFIX = "surgery_"
_MADE: dict[type[PreTrainedConfig], type[PreTrainedConfig]] = {}


def config_class(parent: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """The config class of models converted from those of `parent`; its `model_type` is `surgery_<parent's>`.

    The field `surgery` is a JSON dict: `parent` (model type and architecture), `layers` (one entry per converted
    attention: `site`, `plan`, `call`, `shapes`) and `provenance`.
    """
    if parent in _MADE:
        return _MADE[parent]
    namespace: dict[str, Any] = {
        "__module__": __name__,
        "__doc__": f"{parent.__name__} of a model whose attention was rewritten.",
        "__annotations__": {"surgery": dict | None},
        "surgery": None,
        "model_type": PREFIX + parent.model_type,
        **{plan: ParentPlan(plan, parent) for plan in ("base_model_tp_plan", "base_model_pp_plan")},
    }
    _MADE[parent] = strict(type(f"Surgery{parent.__name__}", (parent,), namespace))
    return _MADE[parent]


def __getattr__(name: str) -> Any:
    """`Surgery<Parent>Config` by name: engines pickle configs into processes that have made no such class yet."""
    parent = getattr(transformers, name.removeprefix("Surgery"), None) if name.startswith("Surgery") else None
    if isinstance(parent, type) and issubclass(parent, PreTrainedConfig):
        return config_class(parent)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def converted_config(parent: PreTrainedConfig, surgery: dict[str, Any]) -> PreTrainedConfig:
    """A copy of the parent's config that carries `surgery`; the parent's own object stays as it is."""
    fields = parent.to_diff_dict()  # as it is saved: some nested configs refuse the rest of their own `to_dict`
    fields.pop("model_type", None)
    fields.pop("quantization_config", None)  # the weights that we write are plain
    config = config_class(type(parent))(**{**fields, "surgery": surgery})
    config._attn_implementation = _attentions(parent)
    return config


def _attentions(config: PreTrainedConfig) -> Any:
    """What `_attn_implementation` is set to: a part of a config may run by another one than the whole (PaliGemma 2)."""
    parts = {name: getattr(config, name, None) for name in config.sub_configs}
    inner = {name: _attentions(part) for name, part in parts.items() if part is not None}
    return {"": config._attn_implementation, **inner} if inner else config._attn_implementation
