"""Parameters of whole models: their dtype, their places, and those that two layers have in common."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def wide(tensor: Tensor) -> Tensor:
    """Weights in float32; integers as they are."""
    return tensor.float() if tensor.is_floating_point() else tensor


def set_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Put a parameter into the place of that name."""
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, parameter)


def untie(model: PreTrainedModel, names: list[str]) -> None:
    """Give each of these parameters a tensor of its own: layers that share one are rewritten apart."""
    seen: set[int] = set()
    for name in names:
        parameter = model.get_parameter(name)
        if id(parameter) in seen:
            parameter = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
            set_parameter(model, name, parameter)
        seen.add(id(parameter))


def is_float32(model: PreTrainedModel) -> bool:
    """Whether all parameters are in float32."""
    return all(p.dtype == torch.float32 for p in model.parameters())
