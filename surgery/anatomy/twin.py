"""A copy of a model without weights, made ready to be captured."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PretrainedConfig, PreTrainedModel

from ..checkpoints.classes import model_class, plain_config
from ..runtime.frequencies import at_rest, length_dependent


def make_twin(source: PreTrainedModel | PretrainedConfig, implementation: str) -> PreTrainedModel:
    """A copy of the architecture on the meta device, in float32, with the named attention implementation."""
    config = plain_config(source.config if isinstance(source, PreTrainedModel) else source)
    for part in (config, config.get_text_config()):
        part.use_cache = False
    arguments = {"attn_implementation": implementation, "dtype": torch.float32}
    kind = type(source) if isinstance(source, PreTrainedModel) else model_class(config)
    with torch.device("meta"):
        return kind._from_config(config, **arguments).eval()


def buffer_values(twin: PreTrainedModel, model: PreTrainedModel | None) -> dict[str, Tensor]:
    """Real values of the buffers: the user's own where there are any, else what the model's own init computes."""
    values = {}
    for prefix, module in () if model is None else model.named_modules():
        for name, buffer in module.named_buffers(prefix, recurse=False):
            if not buffer.is_meta:
                values[name] = at_rest(module, name.rpartition(".")[2], buffer).detach().cpu()
    for prefix, module in twin.named_modules():
        own = dict(module.named_buffers(recurse=False))
        names = {name: f"{prefix}.{name}" if prefix else name for name in own}
        if not own or all(full in values for full in names.values()):
            continue
        for name, buffer in own.items():
            fill = float("nan") if buffer.is_floating_point() else 0
            module._buffers[name] = torch.full(buffer.shape, fill, dtype=buffer.dtype, device="cpu")
        with torch.no_grad():
            twin._init_weights(module)
        for name, buffer in own.items():
            filled = module._buffers[name]
            if isinstance(filled, Tensor) and not filled.isnan().any():
                values.setdefault(names[name], filled.detach().clone())
            module._buffers[name] = buffer
    return values


def hold_frequencies_still(twin: PreTrainedModel) -> dict[str, Any]:
    """Keep rotary modules whose frequencies depend on the length at their first ones: a graph cannot hold the branch.

    Returns:
        What each rotary module's `rope_type` was, by module name.
    """
    kinds = {}
    for name, module in twin.named_modules():
        kind = getattr(module, "rope_type", None)
        if kind is None:
            continue
        kinds[name] = kind
        if isinstance(kind, dict):
            cast(Any, module).rope_type = {n: "default" if length_dependent(k) else k for n, k in kind.items()}
        elif length_dependent(kind):
            cast(Any, module).rope_type = "default"
    return kinds


def make_fake(twin: nn.Module, mode: FakeTensorMode) -> None:
    """Turn a meta model into one of CPU tensors without memory, so that constants of the trace keep their values."""
    made: dict[int, Tensor] = {}

    def fake(x: Tensor) -> Tensor:
        if id(x) not in made:
            with mode:
                empty = torch.empty(x.shape, dtype=x.dtype, device="cpu")
            made[id(x)] = nn.Parameter(empty, requires_grad=False) if isinstance(x, nn.Parameter) else empty
        return made[id(x)]

    originals = []  # keeps them alive: ids stay unique
    for module in twin.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, vars(module))
        for table in tables:
            for name, x in list(table.items()):
                if isinstance(x, Tensor):
                    originals.append(x)
                    table[name] = fake(x)
