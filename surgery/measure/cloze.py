"""Cloze questions from any text: which word ends this sentence? The other choices end other sentences of the text."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..errors import CheckpointError

CHOICES = 4
MOST = 100
"""Questions at most."""
CONTEXT = 96
"""Tokens before the word at most: each of them is decoded one by one."""
_SENTENCE = re.compile(r"[^.!?]+[.!?]")
_WORDS = 8, 40
"""Words of a sentence that is asked about."""
_LAST = re.compile(r"[a-z]{4,}")


@dataclass(frozen=True, kw_only=True)
class Cloze:
    """A text without its last word, the choices, and which of them is right."""

    text: str
    choices: tuple[str, ...]
    label: int


def cloze_questions(
    texts: Sequence[str], length: Callable[[str], int], *, seed: int = 0, context: int = CONTEXT, most: int = MOST
) -> list[Cloze]:
    """Ask for the last word of sentences, each after as much of the text before it as fits.

    The choices are equally often right, are not in the sentence, and differ from the right one by at most two letters
    in length where the text has such words.

    Args:
        length: tokens of a text.
        context: tokens of a question at most.

    Raises:
        CheckpointError: the texts give no question.
    """
    rng = random.Random(f"{seed} cloze")
    asked: list[tuple[str, str]] = []
    for text in texts:
        before = ""
        for match in _SENTENCE.finditer(" ".join(text.split())):
            sentence = match[0].strip()
            *rest, last = sentence[:-1].split(" ")
            if _WORDS[0] <= len(rest) + 1 <= _WORDS[1] and _LAST.fullmatch(last) and last not in rest:
                asked.append((f"{before} {' '.join(rest)}".strip(), last))
            before = f"{before} {sentence}".strip()
    rng.shuffle(asked)
    words = sorted({word for _, word in asked})
    questions: list[Cloze] = []
    for text, word in asked:
        if len(questions) == most:
            break
        shown = _end_of(text, length, context)
        others = [other for other in words if other != word and other not in shown.split(" ")]
        near = [other for other in others if abs(len(other) - len(word)) <= 2]
        pool = near if len(near) >= CHOICES - 1 else others
        if not shown or len(pool) < CHOICES - 1:
            continue
        choices = rng.sample(pool, CHOICES - 1)
        label = len(questions) % CHOICES
        choices.insert(label, word)
        questions.append(Cloze(text=shown, choices=tuple(choices), label=label))
    if not questions:
        raise CheckpointError(
            f"tasks: surgery_cloze found no sentence of {_WORDS[0]} to {_WORDS[1]} words to ask about. Give more text."
        )
    return questions


def _end_of(text: str, length: Callable[[str], int], most: int) -> str:
    """The last words of a text that take `most` tokens at most."""
    words = text.split(" ")
    few, many = 0, len(words)
    while few < many:  # the longest end that fits
        count = (few + many + 1) // 2
        if length(" ".join(words[-count:])) <= most:
            few = count
        else:
            many = count - 1
    return " ".join(words[len(words) - few :])
