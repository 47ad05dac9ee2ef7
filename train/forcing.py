"""Hooks of the layer-local stage: every attention reads what it would in the parent."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .losses import squared_error


def detach(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Stop gradients at a module's inputs."""

    def cut(value: Any) -> Any:
        return value.detach() if isinstance(value, Tensor) else value

    return tuple(map(cut, args)), {name: cut(value) for name, value in kwargs.items()}


def forced_by(teacher: nn.Module, scale: float, errors: list[Tensor], connected: bool) -> Any:
    """A forward hook that measures a module's output against the teacher's, and hands on the teacher's."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        with torch.no_grad():
            target = teacher(*args, **kwargs)
        y, y_t = (o[0] if isinstance(o, tuple) else o for o in (output, target))
        errors.append(squared_error(y, y_t, scale))
        if connected:
            y_t = y_t + (y - y.detach())
        return (y_t, *target[1:]) if isinstance(target, tuple) else y_t

    return hook
