"""Attention weights for `output_attentions`: transformers collects them by the class of the module that it built.

A converted attention is of another class, so it is told what its predecessor would have given, and gives that.
"""

from __future__ import annotations

from collections.abc import Set
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .attention import SurgeryAttention
from .calling import take_cache

Record = tuple[str, int]
"""Name of a model output, as `attentions`, and its place in what the attention returns."""


def running_model(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """The innermost model around the module of that name: its forward runs the layers, and collects what they give.

    Not always the base model: `OPTForCausalLM` calls the decoder inside of it.
    """
    found, module = model, model
    for part in name.split(".")[:-1]:
        module = getattr(module, part)
        found = module if isinstance(module, PreTrainedModel) else found
    return found


def records_of(model: PreTrainedModel, name: str, attention: nn.Module) -> tuple[Record, ...]:
    """What transformers collects from the parent's `attention`, called `name` in `model`."""
    found = []
    for key, wanted in (running_model(model, name)._can_record_outputs or {}).items():
        for record in wanted if isinstance(wanted, list) else [wanted]:
            # A class, or a recorder of one; what is found by the name of its module is found still.
            cls, inside = getattr(record, "target_class", record), getattr(record, "layer_name", None)
            named = inside is None or f".{inside.strip('.')}." in f".{name}."
            if isinstance(cls, type) and isinstance(attention, cls) and named:
                found.append((key, getattr(record, "index", int("hidden_states" not in key))))
    return tuple(found)


def prepare_recording(base_model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], keys: Set[str]) -> None:
    """Before a forward pass of the model around the attentions: have them give what is asked for.

    Args:
        base_model: that model.
        args, kwargs: of its forward.
        keys: names of what is collected from its attentions; `attentions` even where it takes those itself.

    Raises:
        ValueError: weights of gated attention through its cache, which keeps slots, not tokens.
    """
    asked = set()
    for key in keys:
        value = kwargs.get(f"output_{key}")
        if getattr(base_model.config, f"output_{key}", False) if value is None else value:
            asked.add(key)
    if not asked:
        return
    attentions: list[SurgeryAttention] = base_model.surgery_attentions  # type: ignore[assignment]
    for attention in attentions:
        for record in attention.records:
            if record[0] in asked and record not in attention.recorded:
                attention.recorded.append(record)
                attention.register_forward_hook(partial(_collect, record))
    use_cache = kwargs.get("use_cache")
    cached = take_cache(dict(kwargs)) is not None or (
        getattr(base_model.config, "use_cache", False) if use_cache is None else use_cache
    )
    if "attentions" not in asked or not cached or base_model.training:
        return
    for attention in attentions:
        if attention.plan.retain is not None and attention.gives_weights(kwargs):
            raise ValueError(
                f"layer {attention.layer_idx}: output_attentions: through its cache the layer attends to slots, which "
                f"tokens have merged into or left ({attention.plan.retain.kind}), so there are no weights by token. "
                "Pass use_cache=False and the whole sequence."
            )


def _collect(record: Record, attention: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    # Imported when it is used: a release that moves it must not keep converted models from loading.
    from transformers.utils.output_capturing import _active_collector

    key, index = record
    collected = _active_collector.get()
    value = output[index] if isinstance(output, tuple) else output
    if collected is not None and key in collected and value is not None:
        collected[key].append(value)
