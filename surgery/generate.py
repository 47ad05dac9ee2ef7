"""Continue a text with a converted or any other causal LM."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .calibration.outputs import check_speaks
from .calibration.text import check_known_ids, encode, special_tokens, tokenizer_of
from .checkpoints.storage import load
from .compiled_steps import generate_ids
from .errors import CheckpointError, RecipeError


def generate(
    model: Any,
    prompt: str,
    *,
    tokens: int = 100,
    temperature: float = 0.0,
    seed: int = 0,
    tokenizer: Any = None,
    compiled: bool | None = None,
) -> str:
    """`prompt` and its continuation.

    Args:
        model: model, folder or Hub id.
        tokens: new tokens at most.
        temperature: 0 takes the likeliest token each time.
        seed: of the tokens that are drawn, where the temperature is above 0.
        compiled: whether decode steps go through torch.compile, with a static cache. None: where two measured steps
            promise that all of them together take less time so; see the log.

    Raises:
        CheckpointError: the model or its tokenizer cannot be loaded, or the prompt is empty or has tokens that the
        model does not know.
        RecipeError: a seed at temperature 0, where nothing is drawn.
        UnsupportedModel: the model predicts no tokens.

    Examples:
        >>> import surgery
        >>> from surgery.bundled import SMALL
        >>> surgery.generate(SMALL, "Once upon a time", tokens=5).startswith("Once upon a time")
        True
    """
    if seed and not temperature:
        raise RecipeError("seed: is of drawn tokens, and temperature 0 draws none. Give one above 0, or leave it out.")
    model = model if isinstance(model, nn.Module) else load(model)
    check_speaks(model, "generate")
    tokenizer = tokenizer or tokenizer_of(model.config)
    if tokenizer is None:
        raise CheckpointError(
            f"{model.config.name_or_path}: no tokenizer beside the model. Put its files there "
            "(tokenizer.json, tokenizer_config.json), or pass tokenizer=... in Python."
        )
    ids = prompt_ids_1T(model.config, prompt, tokenizer).to(model.device)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    more = {"attention_mask": torch.ones_like(ids), "pad_token_id": pad, **sampling}
    out = generate_ids(model, ids, tokens=tokens, seed=seed, compiled=compiled, **more)
    return str(tokenizer.decode(out[0], skip_special_tokens=True))


def prompt_ids_1T(config: Any, prompt: str, tokenizer: Any) -> Tensor:
    """The tokens of a text to continue, [1, T].

    Raises:
        CheckpointError: it has none, or some that the model does not know.
    """
    start, _ = special_tokens(tokenizer, [prompt])
    plain = encode(tokenizer, prompt, special=False)
    # What a tokenizer puts after a text would end it here.
    ids_1T = torch.tensor([[*start, *plain] if plain else encode(tokenizer, prompt)], dtype=torch.long)
    if ids_1T.shape[1] == 0:
        raise CheckpointError("prompt: holds no token. Give some text to continue.")
    check_known_ids(ids_1T, config.get_text_config(decoder=True).vocab_size, "prompt", tokenizer)
    return ids_1T
