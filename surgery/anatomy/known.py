"""Descriptions that this process has read and proved already: planning, converting and comparing ask for them anew."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Hashable

from transformers import PretrainedConfig, PreTrainedModel

from .equal_layers import digest
from .model import Anatomy
from .twin import buffer_values

MOST = 64
"""So many are kept, those that were asked for last."""
_ORIGIN = ("_name_or_path", "architectures")
_KNOWN: dict[Hashable, Anatomy] = {}


def read_once(
    twin: PreTrainedModel | None, source: PreTrainedModel | PretrainedConfig, read: Callable[[], Anatomy]
) -> Anatomy:
    """What `read` gives; what it gave before, while all that it depends on is the same.

    Args:
        twin: `source` without weights, with which a model agrees; None where it cannot be built, which only a reading
            can tell of.
    """
    key = None if twin is None else _key_of(twin, source)
    found = None if key is None else _KNOWN.pop(key, None)
    if found is None:
        found = read()
    if key is not None:
        _KNOWN[key] = found
        while len(_KNOWN) > MOST:
            del _KNOWN[next(iter(_KNOWN))]
    return found


def _key_of(twin: PreTrainedModel, source: PreTrainedModel | PretrainedConfig) -> Hashable | None:
    """All that a description depends on: the class, the config, the values of the buffers, and the code.

    The config is the twin's, which says neither a dtype of weights nor how they were quantised; where it came from, and
    which class it is for, is left out. The code is every class of a module, its forward, and whatever functions and
    classes the files of those classes have under their names: some packages put their own in the place of
    transformers', at any time. A model has no more to say than its config: its names, shapes and modules are the
    twin's.

    Returns:
        None where the config cannot be written down.
    """
    model = source if isinstance(source, PreTrainedModel) else None
    try:
        values = buffer_values(twin, model)
        fields = {name: value for name, value in twin.config.to_dict().items() if name not in _ORIGIN}
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
        type(source if model is None else model.config),
        written,
        tuple((name, digest(values[name]) if name in values else None) for name, _ in twin.named_buffers()),
        tuple((kind, kind.forward) for kind in kinds),
        names,
    )
