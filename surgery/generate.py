"""Continue a text with a converted or any other causal LM."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .errors import CheckpointError
from .storage import load
from .text import tokenizer_of


def generate(
    model: Any, prompt: str, *, tokens: int = 100, temperature: float = 0.0, seed: int = 0, tokenizer: Any = None
) -> str:
    """`prompt` and its continuation.

    Args:
        model: model, folder or Hub id.
        tokens: new tokens at most.
        temperature: 0 takes the likeliest token each time.

    Raises:
        CheckpointError: the model or its tokenizer cannot be loaded, or the prompt is empty.
    """
    model = model if isinstance(model, nn.Module) else load(model)
    tokenizer = tokenizer or tokenizer_of(model.config)
    if tokenizer is None:
        raise CheckpointError(f"{model.config.name_or_path}: no tokenizer beside the model; pass tokenizer=...")
    encoded = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    if encoded["input_ids"].shape[1] == 0:
        raise CheckpointError("prompt: holds no token. Give some text to continue.")
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    out = model.generate(**encoded.to(model.device), max_new_tokens=tokens, pad_token_id=pad, **sampling)
    return str(tokenizer.decode(out[0], skip_special_tokens=True))
