"""What several models continue a prompt with, side by side, with the words marked in which they differ."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import SequenceMatcher


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A model's continuation in pieces, each with whether the first model says something else there."""

    model: str
    pieces: tuple[tuple[str, bool], ...]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One prompt and its answers; the first is what the others are compared with."""

    prompt: str
    answers: tuple[Answer, ...]


def side_by_side(samples: Iterable[tuple[str, str, str]]) -> list[Sample]:
    """Gather (model, prompt, continuation) by prompt, in the order of their first appearance."""
    by_prompt: dict[str, list[tuple[str, str]]] = {}
    for model, prompt, text in samples:
        by_prompt.setdefault(prompt, []).append((model, text))
    return [
        Sample(
            prompt=prompt,
            answers=tuple(Answer(model=model, pieces=differing(said[0][1], text)) for model, text in said),
        )
        for prompt, said in by_prompt.items()
    ]


def differing(first: str, text: str) -> tuple[tuple[str, bool], ...]:
    """Cut `text` into pieces that `first` has too and pieces that it has not, by words; together they are `text`."""
    # Each word with the space before it: marks cover runs of words, and nothing of the text is lost.
    ours, theirs = (re.findall(r"\s*\S+|\s+$", part) for part in (text, first))
    before, now = ([word.strip() for word in words] for words in (theirs, ours))
    pieces = []
    for kind, _, _, start, end in SequenceMatcher(None, before, now, autojunk=False).get_opcodes():
        piece = "".join(ours[start:end])
        if kind == "equal" or not piece.strip():
            pieces.append((piece, False))
        else:
            head, body, tail = re.fullmatch(r"(\s*)(.*?)(\s*)", piece, re.DOTALL).groups()  # type: ignore[union-attr]
            pieces += [(head, False), (body, True), (tail, False)]
    return tuple((piece, differs) for piece, differs in pieces if piece)
