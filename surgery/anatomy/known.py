"""Descriptions that this process has read and proved already: planning, converting and comparing ask for them anew."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Hashable
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from .equal_layers import digest
from .model import Anatomy
from .twin import buffer_values, make_twin

MOST = 64
"""So many are kept, those that were asked for last."""
_KNOWN: dict[Hashable, Anatomy] = {}


def read_once(source: PreTrainedModel | PretrainedConfig, read: Callable[[], Anatomy]) -> Anatomy:
    """What `read` gives; what it gave before, while all that it depends on is the same."""
    key = _key_of(source)
    found = None if key is None else _KNOWN.pop(key, None)
    if found is None:
        found = read()
    if key is not None:
        _KNOWN[key] = found
        while len(_KNOWN) > MOST:
            del _KNOWN[next(iter(_KNOWN))]
    return found


def _key_of(source: PreTrainedModel | PretrainedConfig) -> Hashable | None:
    """All that a description depends on: the class, the config, the values of the buffers, and the code.

    The code is every class of a module, its forward, and whatever functions and classes the files of those classes
    have under their names: some packages put their own in the place of transformers', at any time. Of a model, what is
    compared with its class counts too: names and shapes of its parameters, and the code of its modules.

    Returns:
        None where the model cannot be built or its config cannot be written, which only a reading can tell of.
    """
    model = source if isinstance(source, PreTrainedModel) else None
    config: Any = source if model is None else model.config
    try:
        twin = make_twin(source, "eager")
        values = buffer_values(twin, model)
        fields = {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}
        written = json.dumps(fields, sort_keys=True, default=repr)
    except Exception:  # whatever a stranger's modelling code may raise
        return None
    modules = [*twin.modules(), *(() if model is None else model.modules())]
    kinds = dict.fromkeys(type(module) for module in modules)
    names = tuple(
        (file, name, value)
        for file in dict.fromkeys(kind.__module__ for kind in kinds)
        for name, value in getattr(sys.modules.get(file), "__dict__", {}).items()
        if callable(value) and type(value).__hash__ is not None
    )
    return (
        type(twin),
        type(config),
        written,
        tuple((name, digest(values[name]) if name in values else None) for name, _ in twin.named_buffers()),
        tuple((kind, kind.forward) for kind in kinds),
        names,
        _form(model),
    )


def _form(model: PreTrainedModel | None) -> Hashable:
    if model is None:
        return None
    parameters = tuple((name, tuple(x.shape)) for name, x in model.named_parameters(remove_duplicate=False))
    return parameters, tuple((name, type(module)) for name, module in model.named_modules())
