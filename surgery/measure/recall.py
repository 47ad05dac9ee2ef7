"""Recall: does a cache still hold what was said? Generated questions in plain words; nothing is downloaded.

Perplexity hides damage to single tokens; these tasks ask for one word that was said once, `length` tokens of context,
`depth` of the way into it. The word is asked for through the cache, one token at a time.

Tasks after RULER (arXiv:2404.06654) and passkey retrieval (arXiv:2305.16300), in words that small vocabularies have.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise, product
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..anatomy.positions import max_positions
from ..calibration.text import check_known_ids, encode, special_tokens
from ..console import progress
from ..errors import CheckpointError, RecipeError
from .scoring import DECODE_BATCH, decode

NAMES = "Tom Mary John Anna Peter Jane Paul Alice Henry Kate George Emma Robert Lucy James Rose"
THINGS = (
    "book lamp key ring coin sword letter rope clock mirror glass stone hat cup knife map flag bell drum boat shoe "
    "coat chair table horse dog cat bird fish tree flower apple"
)
COLOURS = "red blue green white black yellow brown golden grey silver pink dark"

FILLER = tuple(
    line.strip()
    for line in """
    The grass is green and the sky is blue.
    There is not much to see on this road.
    The sun was warm and the wind was still.
    A river runs through the valley to the sea.
    They walked for an hour and then they rested.
    It had been raining for most of the night.
    The old house stood at the end of the street.
    Nobody came to the door that day.
    The children played in the garden until it was late.
    We went on and spoke of other matters.
    The town was quiet in the early morning.
    He looked out of the window and said nothing.
    She closed the door and sat down by the fire.
    The men worked in the field all summer.
    There were clouds over the hills in the evening.
    After that they had bread and water for dinner.
    The way back was longer than they thought.
    Some days are like this one and some are not.
    The ship left the harbour before the end of the week.
    It was cold, but the room was light and clean.
    """.strip().splitlines()
)


class Question(NamedTuple):
    """Sentences to hide in filler, and what is asked behind them."""

    facts: tuple[str, ...]
    """In order; the answer stands in the last one."""
    others: tuple[str, ...]
    """Sentences of the same form about something else, anywhere."""
    ask: str
    answer: str


def associative(rng: random.Random, pairs: int = 6) -> Question:
    """Which thing lies in the box of this colour? `pairs` boxes."""
    colours, things = rng.sample(COLOURS.split(), pairs), rng.sample(THINGS.split(), pairs)
    facts = [f"The {c} box holds the {t}." for c, t in zip(colours, things, strict=True)]
    return Question((facts[0],), tuple(facts[1:]), f"The {colours[0]} box holds the", things[0])


def passkey(rng: random.Random) -> Question:
    """One word said once, in filler."""
    word = rng.choice(THINGS.split())
    return Question((f"The secret word is {word}.",), (), "The secret word is", word)


def multi_key(rng: random.Random, keys: int = 4) -> Question:
    """A secret word for each of `keys` people; one of them is asked for."""
    names, words = rng.sample(NAMES.split(), keys), rng.sample(THINGS.split(), keys)
    facts = [f"The secret word of {n} is {w}." for n, w in zip(names, words, strict=True)]
    return Question((facts[0],), tuple(facts[1:]), f"The secret word of {names[0]} is", words[0])


def tracking(rng: random.Random, moves: int = 2) -> Question:
    """Who has the thing after `moves` hand-overs? A second chain goes on beside it."""
    things, names = rng.sample(THINGS.split(), 2), rng.sample(NAMES.split(), 2 * (moves + 1))

    def chain(thing: str, people: Sequence[str]) -> tuple[str, ...]:
        gives = [f"{a} gives the {thing} to {b}." for a, b in pairwise(people)]
        return (f"{people[0]} has the {thing}.", *gives)

    mine, theirs = names[: moves + 1], names[moves + 1 :]
    return Question(chain(things[0], mine), chain(things[1], theirs), f"Now the {things[0]} belongs to", mine[-1])


TASKS: dict[str, Callable[[random.Random], Question]] = {
    "associative": associative,
    "passkey": passkey,
    "multi_key": multi_key,
    "tracking": tracking,
}
CHANCE = {"associative": 1 / 6, "passkey": 1 / len(THINGS.split()), "multi_key": 1 / 4, "tracking": 1 / 6}
"""Share answered right by who knows what kind of word is asked for, and names any that the context has of it."""


def check_tasks(names: Sequence[str]) -> None:
    """RecipeError for a name that is no task."""
    for name in names:
        if name not in TASKS:
            raise RecipeError(f"recall: no task {name!r}. Known: {', '.join(TASKS)}.")


def compose(question: Question, depth: float, lengths: Callable[[str], int], room: int, rng: random.Random) -> str:
    """The facts hidden in filler, and the question behind them.

    Args:
        depth: where the last fact stands: 0 at the start, 1 right before the question.
        lengths, room: length of a sentence, and of the whole; filler is added as long as it fits.
    """
    room -= sum(map(lengths, (*question.facts, *question.others, question.ask)))
    lines: list[str] = []
    while (room := room - lengths(line := rng.choice(FILLER))) >= 0:
        lines.append(line)
    place = round(depth * len(lines))
    # Earlier facts of a chain stand before the last one, in order; what is about something else stands anywhere.
    spots = [*sorted(rng.randint(0, place) for _ in question.facts[:-1]), place]
    placed = [(spot, 0, i, fact) for i, (spot, fact) in enumerate(zip(spots, question.facts, strict=True))]
    beside = sorted(rng.randint(0, len(lines)) for _ in question.others)
    placed += [(spot, 1, i, fact) for i, (spot, fact) in enumerate(zip(beside, question.others, strict=True))]
    for spot, _, _, fact in sorted(placed, reverse=True):
        lines.insert(spot, fact)
    return " ".join([*lines, question.ask])


def documents(seed: int, words: tuple[int, int] = (60, 300)) -> Iterator[str]:
    """Endless solved questions of all tasks, with between words[0] and words[1] words: to pretrain small models on."""
    rng = random.Random(seed)
    while True:
        question = TASKS[rng.choice(sorted(TASKS))](rng)
        text = compose(question, rng.random(), lambda line: line.count(" ") + 1, rng.randint(*words), rng)
        yield f"{text} {question.answer}."


@dataclass(frozen=True, kw_only=True)
class RecallCell:
    """Answers to `questions` questions of one task at one length and depth."""

    task: str
    length: int
    """Tokens of context, the question included."""
    depth: float
    questions: int
    exact: float
    """Share answered right by greedy decoding."""
    nats: float
    """Mean negative log-likelihood of the right answer, whole words; shows damage where a model cannot answer."""


Questions = dict[int, dict[tuple[str, float], list["Asked"]]]
"""Questions by length, then by task and depth; as many of each."""


def compose_questions(
    config: Any,
    tokenizer: Any,
    *,
    tasks: Sequence[str] = tuple(TASKS),
    lengths: Sequence[int] | None = None,
    depths: Sequence[float] = (0.0, 0.5, 1.0),
    questions: int = 8,
    seed: int = 0,
) -> Questions:
    """Questions of every task at every length and depth, in tokens that a model of this config knows.

    Args:
        lengths: tokens of context; default: a quarter, half and all of the model's context, at most 2048.
        questions: per length, task and depth.

    Raises:
        RecipeError: unknown task, or a length above the model's positions. CheckpointError: the tokenizer does not
        cover plain English, gives ids that the model does not know, or no question fits.
    """
    check_tasks(tasks)
    limit = max_positions(config)
    context = min(limit or 2048, 2048)
    lengths = lengths or (context // 4, context // 2, context - 8)
    reader = Reader(tokenizer)
    vocab_size = config.get_text_config(decoder=True).vocab_size
    found: Questions = {}
    for length in lengths:
        for task, depth in product(tasks, depths):
            rng = random.Random(f"{seed} {task} {length} {depth}")
            tried = [reader.ask(TASKS[task](rng), depth, length, rng) for _ in range(questions)]
            if None not in tried:  # else the facts alone are longer than that
                found.setdefault(length, {})[task, depth] = [a for a in tried if a is not None]
    if not found:
        raise CheckpointError(f"recall: no question fits into {max(lengths)} tokens of this tokenizer. Ask for longer.")
    for asked in (a for group in found.values() for some in group.values() for a in some):
        check_known_ids(asked.ids, vocab_size, "recall", tokenizer)
        if limit is not None and len(asked.ids) - 1 > limit:
            raise RecipeError(
                f"recall: questions of {len(asked.ids) - asked.answer} tokens and their answers need "
                f"{len(asked.ids) - 1} positions, the model has {limit}. Ask for shorter ones."
            )
    return found


def answer_questions(model: PreTrainedModel, questions: Questions) -> tuple[RecallCell, ...]:
    """Ask a model what `compose_questions` made.

    The context is prefilled; the question and the answer go through the cache token by token.
    """
    cells: list[RecallCell] = []
    with progress("recall", len(questions)) as advance:
        for length, group in questions.items():
            right, nats = answer_each(model, [a for some in group.values() for a in some])
            begin = 0
            for (task, depth), some in group.items():
                here = slice(begin, begin := begin + len(some))
                cells.append(
                    RecallCell(
                        task=task,
                        length=length,
                        depth=depth,
                        questions=len(some),
                        exact=float(right[here].mean()),
                        nats=float(nats[here].mean()),
                    )
                )
            advance(1)
    return tuple(cells)


class Asked(NamedTuple):
    """A question in tokens."""

    ids: list[int]
    """Context and question, then the answer."""
    ask: int
    """Tokens of the question."""
    answer: int
    """Tokens of the answer."""


class Reader:
    """Questions in the tokens of one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        plain = " ".join([*FILLER, NAMES, THINGS, COLOURS])
        self.lower = not self._covers(plain)
        if self.lower and not self._covers(plain.lower()):
            raise CheckpointError("recall: the tokenizer does not cover plain English words, so nothing can be asked.")
        self.start, _ = special_tokens(tokenizer, [plain.lower() if self.lower else plain])
        self.length = lru_cache(maxsize=None)(lambda line: len(self._ids(" " + line)))

    def _covers(self, text: str) -> bool:
        ids = encode(self.tokenizer, text, special=False)
        unknown = self.tokenizer.unk_token_id
        return (unknown is None or unknown not in ids) and self.tokenizer.decode(ids).strip() == text

    def _ids(self, text: str) -> list[int]:
        text = text.lower() if self.lower else text
        return encode(self.tokenizer, text, special=False)

    def ask(self, question: Question, depth: float, length: int, rng: random.Random) -> Asked | None:
        """Exactly `length` tokens before the answer, or None where the facts alone are longer."""
        slack = 2 * (len(question.facts) + len(question.others)) + len(self.start)  # tokens where sentences meet
        if sum(map(self.length, (*question.facts, *question.others, question.ask))) + slack > length:
            return None
        text = compose(question, depth, self.length, length - slack, rng)
        whole, prompt = self._ids(f"{text} {question.answer}"), self._ids(text)
        same = next((i for i, (a, b) in enumerate(zip(whole, prompt, strict=False)) if a != b), len(prompt))
        missing = length - len(self.start) - same
        if missing < 0:
            return None
        filler = self._ids(" ".join(FILLER))
        padding = (filler * (missing // len(filler) + 1))[len(filler) * (missing // len(filler) + 1) - missing :]
        ask = same - len(self._ids(text[: len(text) - len(question.ask) - 1]))
        return Asked([*self.start, *padding, *whole], max(1, min(ask, same - 1)), len(whole) - same)


def answer_each(model: PreTrainedModel, asked: Sequence[Asked]) -> tuple[Tensor, Tensor]:
    """Whether each answer is right (1 or 0, NaN where the model says NaN), and its nats; float64 [questions].

    Args:
        asked: of one length.
    """
    length = len(asked[0].ids) - asked[0].answer
    prefill = length - max(a.ask for a in asked)
    longest = max(a.answer for a in asked)
    ids_BT = torch.tensor([a.ids + [0] * (longest - a.answer) for a in asked])
    width = torch.tensor([a.answer for a in asked])
    nats, right = torch.zeros(len(asked), dtype=torch.float64), torch.ones(len(asked), dtype=torch.float64)
    with torch.inference_mode():
        for start in range(0, len(asked), DECODE_BATCH):
            rows = slice(start, start + DECODE_BATCH)
            for position, logp_B1V in decode(model, ids_BT[rows, :-1].to(model.device), prefill):
                if position < length - 1:
                    continue
                label, logp = ids_BT[rows, position + 1], logp_B1V[:, 0]
                counts = position - length + 1 < width[rows]
                nats[rows] -= torch.where(counts, logp.gather(-1, label[:, None])[:, 0], 0.0).double()
                right[rows] *= ((logp.argmax(-1) == label) | ~counts).double()
    return torch.where(nats.isnan(), nats, right), nats
