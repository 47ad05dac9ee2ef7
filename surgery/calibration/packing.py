"""Values of this library as one safetensors file: tensors, numbers, containers and dataclasses of them; no pickle."""

from __future__ import annotations

import dataclasses
import json
import os
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

_PLAIN = (str, int, float, bool, type(None))
_SEQUENCES: dict[str, Any] = {"list": list, "tuple": tuple, "set": set}


def save_packed(value: Any, file: Path) -> None:
    """Write `value`; the file is there whole, or not at all.

    Raises:
        TypeError: something in it is of another kind than `pack` knows.
    """
    tensors: list[Tensor] = []
    described = _pack(value, tensors)
    named = {str(number): tensor for number, tensor in enumerate(tensors)}
    unfinished = file.with_name(f"{file.name}.partial")
    save_file(named, unfinished, metadata={"value": json.dumps(described)})
    os.replace(unfinished, file)


def load_packed(file: Path, *, mapped: bool) -> Any:
    """What `save_packed` wrote.

    Args:
        mapped: the numbers of tensors stay in the file, and take no memory of their own.
    """
    with safe_open(file, framework="pt") as opened:
        described = json.loads(opened.metadata()["value"])
        return _unpack(described, opened if mapped else _Copies(opened))


class _Copies:
    """Tensors of an open file in memory of their own."""

    def __init__(self, opened: Any) -> None:
        self._opened = opened

    def get_tensor(self, name: str) -> Tensor:
        found: Tensor = self._opened.get_tensor(name)
        return found.clone()


def _pack(value: Any, tensors: list[Tensor]) -> Any:
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, Tensor):
        if value.is_complex():  # which safetensors does not know in every width
            return {"complex": _pack(torch.view_as_real(value.detach().resolve_conj()), tensors)}
        # Fresh memory: safetensors writes none twice.
        tensors.append(value.detach().cpu().clone(memory_format=torch.contiguous_format))
        return {"tensor": len(tensors) - 1}
    if isinstance(value, dict):
        return {"dict": [[_pack(part, tensors) for part in pair] for pair in value.items()]}
    fields = _fields(type(value))
    if fields is not None:
        return {"class": _named(type(value)), "fields": [_pack(getattr(value, name), tensors) for name in fields]}
    for kind, made in _SEQUENCES.items():
        if type(value) is made:
            return {kind: [_pack(part, tensors) for part in value]}
    raise TypeError(f"{type(value).__name__}: cannot be written between two layers.")


def _unpack(described: Any, opened: Any) -> Any:
    if not isinstance(described, dict):
        return described
    if "tensor" in described:
        return opened.get_tensor(str(described["tensor"]))
    if "complex" in described:
        return torch.view_as_complex(_unpack(described["complex"], opened))
    if "dict" in described:
        return {_unpack(key, opened): _unpack(part, opened) for key, part in described["dict"]}
    if "class" in described:
        module, _, name = described["class"].partition(":")
        made = getattr(import_module(module), name)
        fields = _fields(made)
        assert fields is not None
        return made(**dict(zip(fields, (_unpack(part, opened) for part in described["fields"]), strict=True)))
    ((kind, parts),) = described.items()
    return _SEQUENCES[kind](_unpack(part, opened) for part in parts)


def _fields(kind: type) -> list[str] | None:
    """Names of the fields of a dataclass or named tuple; None for another kind."""
    if dataclasses.is_dataclass(kind):
        return [field.name for field in dataclasses.fields(kind)]
    return list(kind._fields) if issubclass(kind, tuple) and hasattr(kind, "_fields") else None


def _named(kind: type) -> str:
    """`module:Class`, for classes of this library alone: others are not imported by the name in a file."""
    package = __name__.partition(".")[0]
    if kind.__module__.partition(".")[0] != package:
        raise TypeError(f"{kind.__module__}.{kind.__name__}: cannot be written between two layers.")
    return f"{kind.__module__}:{kind.__qualname__}"
