"""How many positions a decoder has."""

from __future__ import annotations

from typing import Any

_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "n_ctx")


def max_positions(config: Any) -> int | None:
    """Tokens that the model of a transformers config can tell the positions of; None where the config names no limit.

    Configs call it by several names (MPT: `max_seq_len`).
    """
    text = config.get_text_config(decoder=True)
    found = (getattr(text, name, None) for name in _NAMES)
    return next((limit for limit in found if isinstance(limit, int) and limit > 0), None)
