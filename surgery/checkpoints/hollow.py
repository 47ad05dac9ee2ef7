"""A checkpoint's model without the weights of its decoder layers: what is needed to read those one at a time."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from ..anatomy.reader import load_config
from ..anatomy.twin import make_twin
from .classes import model_class, settle_attention
from .files import Checkpoint, Fit, kept_back


def is_as_stored(config: Any, fit: Fit) -> bool:
    """Whether every parameter and persistent buffer of the model is in the files under the model's own name.

    Names that are tied to such a one may be absent.
    """
    return not _strange(make_twin(config, "eager"), fit)


def _strange(model: PreTrainedModel, fit: Fit) -> list[str]:
    first: dict[int, str] = {}
    found = []
    state = model.state_dict(keep_vars=True)
    for name in sorted(state, key=lambda name: name not in fit.same):
        source = first.setdefault(id(state[name]), name)
        if name not in fit.same and (source == name or fit.origins.get(name) != (source,)):
            found.append(name)
    return found


def hollow_model(checkpoint: Checkpoint, fit: Fit, left: Collection[str]) -> PreTrainedModel:
    """The model of a checkpoint in float32, as transformers loads it, but for the parameters `left`.

    Those are zeros that take no memory: one number stands in all places.

    Args:
        fit: of a checkpoint whose files hold all tensors under the model's names (`is_as_stored`).
    """
    config = load_config(checkpoint.folder)
    settle_attention(config)
    tensors: dict[str, Tensor] = {}
    for name in checkpoint.names():
        if name in left:
            tensors[name] = torch.zeros(()).expand(checkpoint.shape(name))
        elif name not in fit.unused:
            tensor = checkpoint.get(name)
            # A copy: what the files hold must not stay mapped.
            tensors[name] = tensor.to(torch.float32, copy=True) if tensor.is_floating_point() else tensor.clone()
    report: list[str] = []
    with kept_back(report):
        loader: Any = model_class(config)
        made: PreTrainedModel = loader.from_pretrained(None, config=config, state_dict=tensors, dtype=torch.float32)
    made.config.name_or_path = made.name_or_path = str(checkpoint.folder)
    if made.can_generate() and (checkpoint.folder / "generation_config.json").is_file():
        made.generation_config = GenerationConfig.from_pretrained(str(checkpoint.folder))
    return made.eval()


def with_values(hollow: PreTrainedModel, values: dict[str, Tensor]) -> PreTrainedModel:
    """A copy of `hollow` that has these parameters, and shares all others."""
    memo: dict[int, Any] = {id(parameter): parameter for parameter in hollow.parameters()}
    made = copy.deepcopy(hollow, memo)
    for name, value in values.items():
        owner, _, attribute = name.rpartition(".")
        setattr(made.get_submodule(owner), attribute, torch.nn.Parameter(value.float(), requires_grad=False))
    return made
