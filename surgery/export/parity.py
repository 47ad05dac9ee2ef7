"""Whether an export computes what its source computes: both answer the same prompts, and the difference is measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from ..errors import CheckpointError
from . import answers

PROMPTS = 2
PROMPT_TOKENS = 64
START = 8
NEW_TOKENS = 24
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}
"""Largest logit difference over the largest logit, where an export computes the same by other arithmetic."""


@dataclass(frozen=True, kw_only=True)
class Ask:
    """The questions: whole prompts for logits, their first `start` tokens to be continued greedily."""

    prompts_BT: Tensor
    start: int = START
    new_tokens: int = NEW_TOKENS
    caches: tuple[str, ...] = ("dynamic",)

    @classmethod
    def of_vocabulary(cls, size: int, context: int | None = None, **kwargs: Any) -> Ask:
        """Fixed random prompts out of `size` tokens, short enough for `context`."""
        tokens = min(PROMPT_TOKENS, context or PROMPT_TOKENS)
        generator = torch.Generator().manual_seed(0)
        kwargs.setdefault("start", min(START, tokens // 2))
        kwargs.setdefault("new_tokens", min(NEW_TOKENS, tokens - kwargs["start"]))
        return cls(prompts_BT=torch.randint(size, (PROMPTS, tokens), generator=generator), **kwargs)

    def arguments(self) -> dict[str, Any]:
        """Of `answers.answers`, but for the prompts."""
        return {"start": self.start, "new_tokens": self.new_tokens, "caches": list(self.caches)}


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How far the answers of an export are from its source's."""

    engine: str
    """What loaded the export, with its version."""
    logit_difference: float | None
    """Largest absolute difference; None where the engine shows no logits."""
    relative_difference: float | None
    """The same over the largest logit."""
    equal_greedy_tokens: int
    greedy_tokens: int
    caches: tuple[str, ...] = ("dynamic",)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def line(self) -> str:
        """What a terminal shows."""
        logits = (
            "logits not shown by it"
            if self.logit_difference is None
            else f"logits differ by {self.logit_difference:.2e} ({self.relative_difference:.1e} of the largest)"
        )
        if not self.greedy_tokens and self.logit_difference is not None:
            return f"parity in {self.engine}: {logits}"
        return (
            f"parity in {self.engine}: {logits}, {self.equal_greedy_tokens} of {self.greedy_tokens} greedy tokens "
            f"agree ({' and '.join(self.caches)} cache)"
        )

    def require(self, relative: float, same_tokens: bool = True) -> Parity:
        """Self, where the logits differ by at most `relative` of the largest and the greedy tokens are the same.

        Raises:
            CheckpointError: they are not; says by how much.
        """
        # Written so that NaN fails.
        if self.relative_difference is not None and not self.relative_difference <= relative:
            raise CheckpointError(
                f"{self.engine}: the export's logits differ from the source's by {self.relative_difference:.1e} of the "
                f"largest, more than {relative:.0e}: it computes something else. Nothing was written."
            )
        if same_tokens and self.equal_greedy_tokens != self.greedy_tokens:
            raise CheckpointError(
                f"{self.engine}: {self.equal_greedy_tokens} of {self.greedy_tokens} greedy tokens of the export are "
                "the source's: it computes something else. Nothing was written."
            )
        return self


def answers_of(model: Any, ask: Ask) -> dict[str, Tensor]:
    """What a model in this process answers (see `answers.answers`); it stays in its mode."""
    was = model.training
    try:
        return answers.answers(model, ask.prompts_BT, **ask.arguments())
    finally:
        model.train(was)


def answers_alone(
    folder: Path, ask: Ask, auto: str = "AutoModelForCausalLM", **kwargs: Any
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What the model in `folder` answers in a process of its own, where `surgery` cannot be imported.

    Args:
        auto: the Auto class of transformers that loads it there.
        kwargs: for `from_pretrained`; JSON.

    Returns:
        The answers, and what answered: `class`, `transformers`, `torch`.

    Raises:
        CheckpointError: it does not load or does not run there.
    """
    with tempfile.TemporaryDirectory(prefix="surgery-parity-") as scratch:
        request, result = Path(scratch, "request.json"), Path(scratch, "answers.safetensors")
        questions = {"prompts": ask.prompts_BT.tolist(), **ask.arguments()}
        request.write_text(json.dumps({"folder": str(folder), "auto": auto, "kwargs": kwargs, "ask": questions}))
        # Code of the export is copied into a cache of modules before it runs: into one that goes afterwards.
        environment = {**os.environ, "HF_MODULES_CACHE": str(Path(scratch, "modules")), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [sys.executable, "-P", answers.__file__, str(request), str(result)],
            capture_output=True, text=True, check=False, env=environment,
        )  # fmt: skip
        if done.returncode:
            said = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
            raise CheckpointError(f"the export does not run without surgery: {said[0]} Nothing was written.")
        with safe_open(result, framework="pt") as file:
            said_by = dict(file.metadata())
        return load_file(result), said_by


def compare(want: Mapping[str, Tensor], got: Mapping[str, Tensor], engine: str) -> Parity:
    """Measure two sets of answers to the same questions."""
    caches = tuple(name for name in want if name != "logits")
    difference = relative = None
    if "logits" in got:
        difference = float((got["logits"] - want["logits"]).abs().max())
        relative = difference / float(want["logits"].abs().max().clamp_min(1e-30))
    return Parity(
        engine=engine, logit_difference=difference, relative_difference=relative,
        equal_greedy_tokens=sum(int((want[name] == got[name]).sum()) for name in caches),
        greedy_tokens=sum(want[name].numel() for name in caches), caches=caches,
    )  # fmt: skip
