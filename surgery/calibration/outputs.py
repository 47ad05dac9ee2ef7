"""Which outputs of parent and child are compared, and how far apart they are."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import UnsupportedModel


def check_speaks(model: PreTrainedModel, what: str) -> None:
    """Raise UnsupportedModel where `model` gives no probabilities of tokens, which `what` needs."""
    if not speaks(model):
        raise UnsupportedModel(
            f"{type(model).__name__}: gives no probabilities of next tokens, and {what} needs them. Take a language "
            "model (ForCausalLM, ForConditionalGeneration)."
        )


def speaks(model: PreTrainedModel | type[PreTrainedModel]) -> bool:
    """Whether the model, or one of that class, gives probabilities of next tokens; classifiers do not."""
    return bool(model.can_generate())


def compared_module(model: PreTrainedModel) -> nn.Module:
    """The part of `model` whose outputs are compared: without the head of a classifier, which pools tokens."""
    return model if speaks(model) else model.base_model


def compared(model: PreTrainedModel, output: Any, mask_BT: Tensor) -> Tensor:
    """What is compared at real tokens: log-probabilities [P, V]; final hidden states [P, D] of a model without them.

    Args:
        output: of `compared_module(model)`.
        mask_BT: True at real tokens.
    """
    if speaks(model):
        log_probabilities: Tensor = output.logits[mask_BT].float().log_softmax(-1)
        return log_probabilities
    hidden: Tensor = output.last_hidden_state[mask_BT].float()
    return hidden


def answers(model: PreTrainedModel, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """`compared` of one batch."""
    output = compared_module(model)(input_ids=ids_BT.to(model.device), use_cache=False)
    return compared(model, output, mask_BT.to(model.device))


def distance(model: PreTrainedModel, found: Tensor, wanted: Tensor) -> Tensor:
    """How far `found` is from the parent's `wanted`, summed over tokens.

    KL(parent || child) in nats; between hidden states their squared difference over the parent's mean square.
    """
    if speaks(model):
        return F.kl_div(found, wanted, reduction="sum", log_target=True)
    return (found - wanted).square().sum() / wanted.square().mean().clamp_min(torch.finfo(wanted.dtype).tiny)
