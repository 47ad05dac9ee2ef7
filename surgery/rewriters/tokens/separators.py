"""Which tokens of a vocabulary separate parts of a text."""

from __future__ import annotations

from typing import Any

MARKS = frozenset(".,?!;:")


def separators_of(tokenizer: Any) -> tuple[int, ...]:
    """Ids of all tokens that are one punctuation mark, with spaces around it or not, or white space alone.

    Source: SepLLM, arXiv:2412.12094, whose lists for single models have the same marks.
    """
    special = set(tokenizer.all_special_ids)
    texts = {i: tokenizer.decode([i]) for i in sorted(set(tokenizer.get_vocab().values()) - special)}
    return tuple(i for i, text in texts.items() if text.strip(" ") in MARKS or (text and not text.strip()))
