"""Stock classes, which need no code of ours: heads as the parent's own class, MLA as DeepSeek-V3.

The forms have a file each: `parent_class.py` and `deepseek.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..anatomy.positions import max_positions
from ..planning.targets import Refusal, Subject, Way, in_full
from ..runtime.layout import Codec
from . import deepseek, parent_class
from .parity import TOLERANCE, Ask, Parity, answers_alone, answers_of, compare
from .target import Source, Written, in_transformers


@dataclass(frozen=True, kw_only=True)
class Native:
    """A stock class of transformers: heads as the parent's own, mla as DeepSeek-V3, which the options are for."""

    norm: deepseek.Norm = field(
        default="neutral",
        metadata={
            "help": "norm on the latent: neutral (exact, needs biases) or calibrated (fitted to text; nearly exact "
            "with --pad)."
        },
    )
    text: Any = field(
        default=None,
        metadata={
            "help": "text (.txt, .jsonl, .parquet; in Python what convert takes) that a calibrated norm is fitted to.",
            "type": Path,
        },
    )
    pad: bool = field(
        default=False,
        metadata={
            "help": "fill latents up to plain rope with the parent's own frequencies, and to 512 + 64 numbers where "
            "they are not larger, as most MLA kernels want them."
        },
    )

    def judge(self, subject: Subject) -> Way | Refusal:
        """Say whether a stock class other than the result's own can say it.

        Judged by the weights in `check`: biases that training added, and, for `pad`, which
        frequencies the calibration text has chosen.
        """
        if subject.native:
            return Refusal(
                reason=f"{subject.architecture} is a stock class: every library that knows it loads it as it is",
                way_out="The native export is for models with caches of their own form.",
            )
        subject = in_full(subject)
        if subject.caches_heads:
            return parent_class.judge(subject)
        return deepseek.judge(subject, self.norm, self.pad)

    def check(self, source: Source) -> None:
        """Refuse what the weights have and the stock class has not."""
        if not source.subject.caches_heads:
            deepseek.check(source.model, self.norm, self.text, self.pad)

    def write(self, source: Source, folder: Path) -> Written:
        """Write the stock class."""
        if source.subject.caches_heads:
            written = parent_class.write(source, folder)
        else:
            written = deepseek.write(source, folder, self.norm, self.text, self.pad)
        written = replace(written, loading=(in_transformers(source, "any version with its class"),))
        coded = next((plan for plan in source.subject.plans if isinstance(plan.store, Codec)), None)
        if coded is None:
            return written
        line = f"caches are not {coded.store.label()} there, but in full: quantise them where it is served"
        return replace(written, lines=(*written.lines, line))

    def parity(self, source: Source, folder: Path) -> Parity:
        """Reload the folder in a process that does not know this library.

        With `norm` calibrated the answers may differ, and the report tells by how much.
        """
        model = source.model
        ask = Ask.of_vocabulary(model.config.get_text_config().vocab_size, max_positions(model.config))
        want = answers_of(model, ask)
        got, said = answers_alone(folder, ask, auto=source.auto)
        parity = compare(want, got, f"transformers {said['transformers']} ({said['class']})")
        exact = source.subject.caches_heads or self.norm == "neutral"
        return parity.require(TOLERANCE[model.dtype], same_tokens=False) if exact else parity
