"""Which class of transformers a model is of: decided once, for reading, building, checking and loading alike."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_MAPPING,
    PreTrainedModel,
)

from ..errors import UnsupportedModel


def model_class(config: Any) -> type[PreTrainedModel]:
    """The class of the model whose config this is.

    The one that `config.architectures` names, where transformers has it for such a config; else what transformers has
    for the config: a causal language model, a language model that sees images, a decoder without head, in that order.

    Raises:
        UnsupportedModel: transformers has no class for such a config.
    """
    named = getattr(config, "architectures", None) or ()
    known: list[Any] = [getattr(transformers, name, None) for name in named]
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_MAPPING):
        found = mapping.get(type(config), ())
        known += found if isinstance(found, (tuple, list)) else (found,)
    for kind in known:
        if isinstance(kind, type) and issubclass(kind, PreTrainedModel) and _takes(kind, config):
            return kind
    raise UnsupportedModel(
        f"{type(config).__name__} (model type {config.model_type}, architectures {', '.join(named) or 'none'}): "
        f"transformers {transformers.__version__} has no language model for such a config."
    )


def _takes(kind: type[PreTrainedModel], config: Any) -> bool:
    return kind.config_class is not None and isinstance(config, kind.config_class)


def plain_config(config: Any) -> Any:
    """A copy of `config` that says nothing of how weights were quantised: what we write is not."""
    config = copy.deepcopy(config)
    for part in (config, config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    return config


def without_loader(model: PreTrainedModel) -> PreTrainedModel:
    """A model of plain weights without the quantiser that unpacked them, and its config without a word of it."""
    if getattr(model, "hf_quantizer", None) is None and not hasattr(model.config, "quantization_config"):
        return model
    plain = copy.copy(model)
    for name in ("hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        vars(plain).pop(name, None)
    plain.config = plain_config(model.config)
    plain.config.architectures = [type(model).__name__]
    return plain


def settle_attention(config: Any) -> None:
    """Leave the choice to transformers where the attention that `config`, or a part of it, names is not installed."""
    parts = (config, *(getattr(config, name, None) for name in config.sub_configs))
    if not any(getattr(part, "_attn_implementation", None) for part in parts):
        return
    try:
        with torch.device("meta"):
            model_class(config)._from_config(copy.deepcopy(config))
    except (ImportError, ValueError, OSError):
        config._attn_implementation = None
