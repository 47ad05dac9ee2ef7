"""Recall in a race: what was said once is asked for through the cache, where the parent does better than by chance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import CheckpointError, RecipeError
from ..measure.recall import CHANCE, Asked, answer_each, compose_questions
from ..measure.statistics import Estimate, bootstrap

TASKS = ("associative", "passkey")
DEPTHS = (0.0, 0.5)
QUESTIONS = 4
"""Of each task at each depth."""
LENGTH = 512
"""Tokens of a question at most, with room for the answer; the length of the race's windows, if they are shorter."""
ROOM = 8
LUCK = 0.05
"""Probability below which as many right answers are no luck."""


@dataclass(frozen=True, kw_only=True)
class Recall:
    """Whether what was said once is found as often as by the best other."""

    tasks: tuple[str, ...]
    """Those that the parent answers better than by chance; see `surgery.measure.recall`."""
    length: int
    """Tokens of context of a question."""
    questions: int
    parent: float
    """Share that the parent answers right."""
    lead: Estimate | None
    """Share of the composition less that of the best other recipe, on the same questions; None without another."""


@dataclass(frozen=True, kw_only=True)
class Exam:
    """Questions of one length that the parent answers better than by chance."""

    tasks: tuple[str, ...]
    length: int
    asked: Sequence[Asked]
    parent: float
    """Share that it answers right."""

    def right(self, model: PreTrainedModel) -> Tensor:
        """1 where the model answers right, else 0; float64 [questions]."""
        return answer_each(model, self.asked)[0].nan_to_num(0.0)

    def compared(self, own: Tensor, other: Tensor | None, seed: int) -> Recall:
        """What came of it.

        Args:
            own, other: what `right` gave for the composition, and for the best other recipe.
        """
        lead = None if other is None else bootstrap((own - other)[:, None], torch.ones_like(own)[:, None], seed)
        return Recall(
            tasks=self.tasks, length=self.length, questions=len(self.asked), parent=self.parent, lead=lead
        )  # fmt: skip


def exam_for(parent: PreTrainedModel, tokenizer: Any, length: int, seed: int) -> Exam | str:
    """Questions for a race, or why there are none."""
    if tokenizer is None:
        return "there is no tokenizer to ask in"
    length = min(length, LENGTH) - ROOM
    try:
        made = compose_questions(
            parent.config, tokenizer, tasks=TASKS, lengths=[length], depths=DEPTHS, questions=QUESTIONS, seed=seed
        )[length]
    except (CheckpointError, RecipeError) as error:
        return str(error).removeprefix("recall: ")
    by_task = {task: [a for (name, _), some in made.items() if name == task for a in some] for task in TASKS}
    answers = {task: answer_each(parent, asked)[0].nan_to_num(0.0) for task, asked in by_task.items() if asked}
    can = tuple(task for task, right in answers.items() if _luck(int(right.sum()), len(right), CHANCE[task]) < LUCK)
    if not can:
        said = " and ".join(f"{int(right.sum())} of {len(right)} {task}" for task, right in answers.items())
        return f"the parent answers {said} questions of {length} tokens, which may be chance"
    return Exam(
        tasks=can,
        length=length,
        asked=[a for task in can for a in by_task[task]],
        parent=float(torch.cat([answers[task] for task in can]).mean()),
    )


def _luck(right: int, of: int, chance: float) -> float:
    """Probability of at least so many right answers by chance."""
    return sum(comb(of, n) * chance**n * (1 - chance) ** (of - n) for n in range(right, of + 1))
