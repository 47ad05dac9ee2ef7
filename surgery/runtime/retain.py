"""Retain axis: which tokens keep a slot of their own in the cache, decided per token and KV head, or latent."""

from __future__ import annotations

from dataclasses import dataclass
from math import floor
from typing import Literal

from .project import Latent, Project
from .ranked import Ranked
from .retained import Retain, unknown_name
from .scorers import SCORERS


@dataclass(frozen=True, kw_only=True)
class Trained(Retain):
    """What the values share whose decisions a trained gate makes."""

    gate: Literal["adapter", "mlp", "borrowed", "head"] = "adapter"
    """`adapter`: a linear map of the layer's input; `mlp`: two of them; `borrowed`: the last channel of q and k;
    `head`: one number for each KV head, whatever its tokens are. `Pool` has neither `mlp` nor `head`."""
    width: int = 64
    """Numbers between the two maps of `mlp`."""
    gain: float = 30.0
    """Factor on the output of maps, and on the number of a head."""
    offset: float = -5.0
    """Logit of an untrained gate that is no head's: the decision is 1 where the logit is above 0."""

    @property
    def is_trained(self) -> bool:
        return True

    @property
    def decided_by(self) -> str:
        return self.gate

    def supports_project(self, project: Project) -> str | None:
        if isinstance(project, Latent) and self.decided_by == "borrowed":
            return (
                "a borrowed channel is the last one of each key and its queries, and a latent is no key: all channels "
                "of it make K and V of every head. Use `gate: adapter`."
            )
        if isinstance(project, Latent) and self.decided_by == "head":
            return (
                "`gate: head` lets some KV heads keep everything and others not, and the layer caches one latent for "
                "all of them. Use `gate: adapter`."
            )
        return super().supports_project(project)


@dataclass(frozen=True, kw_only=True)
class Gate(Trained):
    """A trained gate drops tokens: one whose own decision is 1 goes once it is `window` tokens old.

    Source: Dynamic Memory Sparsification, arXiv:2506.05345; of `gate: head`, DuoAttention, arXiv:2410.10819.
    """

    kind: str = "dms"

    def heads_left(self, tokens: int, heads: int) -> int:
        """Of so many KV heads those that have room for all of `tokens` tokens, where the others keep the first and the
        newest alone (`gate: head`)."""
        return floor(heads * (1 - self.drop_rate(tokens, self.ratio)) + 1e-6)


@dataclass(frozen=True, kw_only=True)
class Pool(Trained):
    """A trained gate averages tokens: one whose decision is 1 goes into the slot before it.

    The key of a slot is rotated at the position of its newest token.

    Source: Dynamic Memory Compression, arXiv:2403.09636.
    """

    kind: str = "dmc"

    @property
    def averages(self) -> bool:
        return True

    def supports_project(self, project: Project) -> str | None:
        if isinstance(project, Latent) and project.keeps_positions:
            return (
                "K is rotated at read by the position that lies beside each latent, and a slot of several tokens would "
                "hold the mean of their positions. Use dms, or mla in the place of lowrank."
            )
        return super().supports_project(project)

    def newest_bytes(self, width: int, itemsize: int) -> int:
        """The open run: its running sum and weight, or the terms of its newest tokens."""
        return 4 * (width + 1) if self.window is None else self.window * (width * itemsize + 4)


@dataclass(frozen=True, kw_only=True)
class Evict(Retain):
    """A score that nothing was trained for drops tokens once they are `window` tokens old."""

    scorer: str
    """Name in `scorers.SCORERS`."""
    kind: str = "evict"

    @property
    def decided_by(self) -> str:
        return "score"

    @property
    def is_fixed(self) -> bool:
        """Where every token goes at the end of the window."""
        return self.scorer == "window"

    def label(self) -> str:
        return f"window {self.window}" if self.is_fixed else f"{self.scorer} {self.ratio:.3g}x window {self.window}"

    def unknown(self) -> str | None:
        return unknown_name("score", self.scorer, SCORERS)


RETAINS: dict[str, type[Retain]] = {"dms": Gate, "dmc": Pool, "evict": Evict, "ranked": Ranked}
"""`kind` -> class of the value."""
