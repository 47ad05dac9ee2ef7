"""The `evict` step: tokens leave by a score that nothing is trained for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..anatomy import Anatomy
from ..calibration.text import Windows
from ..calibration.working_copy import WorkingCopy
from ..console import spans
from ..errors import PlanError, RecipeError
from ..planning.schema import check_name
from ..recipe import Text
from ..runtime.budgets import BUDGETS, OverLayers
from ..runtime.layout import Evict, LayerPlan, Ranked
from ..runtime.merging import MERGES
from ..runtime.rankers import RANKERS
from ..runtime.reading import READERS
from ..runtime.scorers import SCORERS
from .tokens.gates import GatedMethod
from .tokens.options import WindowStep, plan_retained
from .tokens.retrieval import retained
from .tokens.separators import separators_of

_OBSERVE, _POOL, _RECENT = 32, 5, 64
_NONE = 1e-9
"""A part of all tokens and heads that counts as none: fractions are rounded."""
_OF_RANKS = ("budget", "slots", "merge", "positions", "distance", "read", "read_ratio", "whole", "part", "recent")
"""Options that are read wherever a score orders slots."""


@dataclass(frozen=True, kw_only=True)
class EvictStep(WindowStep):
    """Drop tokens by a score that nothing is trained for.

    Two kinds of scores. `window` and `key_norm` judge a token alone: it goes once it is `window` tokens old, or stays
    for good. All others order the slots that are there, and a `budget` keeps the best of them: of every `ratio` tokens
    one, on average over layers and heads, or `slots` whatever the length, and always the first `sinks` and the newest
    `recent`.

    Where the score is `window` there is no `ratio`: every token goes at its end (StreamingLLM).
    """

    rewriter: Literal["evict"] = "evict"
    scorer: str = "window"
    """`window`: every token goes at its end. `key_norm`: long keys go, above a threshold from calibration text. Others:
    see `surgery.runtime.rankers`."""
    budget: str | None = None
    """How slots are shared out between layers and heads where a score orders them, see `surgery.runtime.budgets`;
    `uniform` where absent."""
    slots: int | None = None
    """Slots per head, on average, where a score orders them: whatever the length, in the place of `ratio`."""
    merge: str | None = None
    """What becomes of slots that leave where a score orders them, by a name in `surgery.runtime.merging`; dropped where
    absent."""
    positions: Literal["text", "cache", "capped"] | None = None
    """Where a score orders slots: `cache` turns those that stay to where they lie in the cache when others leave
    (StreamingLLM), `capped` sees those that are more than `distance` tokens back at that distance (LM-Infinite,
    arXiv:2308.16137), `text` or absent leaves them at the positions of their tokens."""
    distance: int | None = None
    """With `positions: capped`, how many tokens back a slot seems at most; the model's context where absent."""
    whole: dict[int, tuple[int, ...]] | None = None
    """Layer -> its KV heads that keep all of their tokens, where a score orders slots; `surgery.retrieval_heads` finds
    them. The budget is that of the others."""
    part: float | None = None
    """Of all KV heads, how many keep all of their tokens where the budget finds out which (`duo`, `razor`); the others
    share what is left of `ratio`. Absent: of `duo` as many as `ratio` leaves when the others keep `sinks` and `recent`
    alone, of `razor` 0.15."""
    separators: tuple[int, ...] | None = None
    """Ids of the tokens that separate parts of the text, for the score `sepllm`; where absent all that are punctuation
    (. , ? ! ; :) or white space to the tokenizer of the model."""
    read: str | None = None
    """What a step of one token reads of the slots that are there, where a score orders slots, by a name in
    `surgery.runtime.reading`; all where absent. It saves reads, not memory: with `ratio: 1` everything stays."""
    read_ratio: float | None = None
    """With `read`: slots that are there per slot that such a step reads; 4 where absent."""
    recent: int | None = None
    """Newest tokens that stay where a score orders slots; 64 where absent."""
    observe: int | None = None
    """Newest queries of a prompt whose attention counts, for scores that observe some; 32 where absent."""
    pool: int | None = None
    """Neighbours that share their scores, for scores that pool; odd; 5 where absent."""

    @property
    def ranks(self) -> bool:
        """Whether the score orders slots, rather than judging each token alone."""
        return self.scorer in RANKERS

    @property
    def asks_tokenizer(self) -> bool:
        return self.ranks and RANKERS[self.scorer].separators and self.separators is None

    def told(self, tokenizer: Any) -> EvictStep:
        found = () if tokenizer is None else separators_of(tokenizer)
        if not found:
            raise PlanError(
                f"evict: {self.scorer} asks which tokens separate parts of the text, and "
                + ("the model comes without a tokenizer" if tokenizer is None else "the tokenizer has none")
                + ". Give their ids: separators: [...]."
            )
        return replace(self, separators=found)

    @property
    def text(self) -> Text:
        if self.ranks:
            budget = BUDGETS[self.budget or "uniform"]
            return "needed" if budget.finds != "nothing" and budget.by == "text" else "none"
        return "needed" if SCORERS[self.scorer].has_threshold else super().text

    @property
    def always(self) -> int:
        """Slots that stay whatever a score says of them."""
        counts = self.merge is not None and self.merge in MERGES and MERGES[self.merge].counts
        return self.sinks + counts + (self.recent or _RECENT)

    def whole_part(self) -> float | None:
        """Part of the KV heads that keep all of their tokens where the budget finds out which; else None."""
        budget = BUDGETS[self.budget or "uniform"]
        return (self.part or budget.part or 1 / self.ratio) if budget.finds == "whole" else None

    @property
    def _nothing_chosen(self) -> str | None:
        """Why no slot stays or leaves by its score, though one orders them; None where some do."""
        if self.budget not in (None, *BUDGETS) or self.ratio < 1:
            return None  # `validate` says so
        if self.slots is not None:
            return f"slots: {self.slots} are those that always stay" if self.slots == self.always else None
        if self.ratio == 1:
            return "with ratio: 1 nothing leaves"
        if (part := self.whole_part()) is not None and abs(1 / self.ratio - part) <= _NONE:
            return f"{self.budget} leaves heads that do not keep everything what always stays alone"
        return None

    def unread(self) -> dict[str, str]:
        """What the score does not read, and what the budget, the positions and the reading of slots do not."""
        if self.scorer in RANKERS:
            reads = ("ratio", "sinks", "page", *_OF_RANKS, *RANKERS[self.scorer].reads)
        elif self.scorer in SCORERS:
            reads = ("ratio",) * SCORERS[self.scorer].has_threshold + ("sinks", "page", "window", "windows")
        else:
            return {}  # `validate` says so
        others = ("window", "windows", *_OF_RANKS, "observe", "pool", "separators", "ratio")
        reason = f"the score {self.scorer} does not read it. It reads {', '.join(reads)}."
        found = {name: reason for name in others if name not in reads}
        if not self.ranks:
            return found
        finding = [name for name, budget in BUDGETS.items() if budget.finds == "whole"]
        if self.budget not in finding:
            found["part"] = f"only budgets that find heads read it: {', '.join(finding)}."
        if self.positions != "capped":
            found["distance"] = "only positions: capped reads it. Add that, or leave it out."
        if self.read is None:
            found["read_ratio"] = f"nothing reads less. Add read: {' or '.join(READERS)}."
        if (why := self._nothing_chosen) is not None:
            chooses_nothing = f"{why}, so that no slot is chosen by its score. Leave it out."
            found = dict.fromkeys(RANKERS[self.scorer].reads, chooses_nothing) | found
        return found

    def validate(self, where: str) -> None:
        super().validate(where)
        check_name(f"{where}.scorer", "scorer", self.scorer, [*SCORERS, *RANKERS])
        if self.budget is not None:
            check_name(f"{where}.budget", "budget", self.budget, BUDGETS)
        if self.merge is not None:
            check_name(f"{where}.merge", "merging", self.merge, MERGES)
        self._validate_pairs(where)
        self._validate_heads(where)
        self._validate_distance(where)
        self._validate_reading(where)
        for name, least in (("recent", 1), ("observe", 1), ("pool", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise RecipeError(f"{where}.{name}: {value} must be at least {least}.")
        if self.slots is not None and self.ratio != 4:
            raise RecipeError(f"{where}.slots: {self.slots} slots and ratio {self.ratio:g}: give one of them.")
        if self.separators is not None and (not self.separators or min(self.separators) < 0):
            raise RecipeError(
                f"{where}.separators: {list(self.separators)}; give at least one id, none of them negative."
            )
        if self.slots is not None and self.slots < self.always:
            mean = self.always - self.sinks - (self.recent or _RECENT)
            raise RecipeError(
                f"{where}.slots: {self.slots} are fewer than the {self.always} that always stay: sinks {self.sinks}, "
                f"recent {self.recent or _RECENT}{' and the mean' * mean}."
            )
        if self.pool is not None and self.pool % 2 == 0:
            raise RecipeError(f"{where}.pool: {self.pool} must be odd: as many neighbours before a token as behind it.")
        reads = RANKERS[self.scorer].reads if self.ranks else ()
        if "observe" in reads and (self.observe or _OBSERVE) > (self.recent or _RECENT):
            raise RecipeError(
                f"{where}.observe: {self.observe or _OBSERVE} queries, but only the newest {self.recent or _RECENT} "
                "tokens are sure to stay (`recent`), and those that are observed must be among them."
            )

    def _validate_distance(self, where: str) -> None:
        """Refuse scores that would read what is further away.

        Raises:
            RecipeError: says what to give.
        """
        if self.positions != "capped":
            return
        if self.distance is not None and self.distance < 1:
            raise RecipeError(f"{where}.distance: {self.distance} must be at least 1.")
        blind = [name for name, r in RANKERS.items() if not r.attends]
        if self.scorer not in blind:
            raise RecipeError(
                f"{where}.positions: {self.scorer} goes by attention, which it would read at distances that are not "
                f"capped. Use {', '.join(blind)}, or positions: cache."
            )

    def _validate_reading(self, where: str) -> None:
        """Refuse a reading that is not known, or that something else would undo.

        Raises:
            RecipeError: says what to give.
        """
        if self.read is None:
            return
        check_name(f"{where}.read", "reading", self.read, READERS)
        if self.read_ratio is not None and not 1 <= self.read_ratio < float("inf"):
            raise RecipeError(f"{where}.read_ratio: {self.read_ratio:g} must be at least 1: slots there per slot read.")
        if self.positions == "capped" or (self.merge is not None and MERGES[self.merge].counts):
            what = "positions: capped" if self.positions == "capped" else f"merge: {self.merge}"
            raise RecipeError(f"{where}.read: {what} is computed over all slots. Leave one of them out.")
        ranker = RANKERS.get(self.scorer)
        if ranker is not None and ranker.while_decoding and ranker.attends:
            fits = [name for name, r in RANKERS.items() if not (r.while_decoding and r.attends)]
            raise RecipeError(
                f"{where}.read: {self.scorer} reads all slots at every step itself. Use {', '.join(fits)}, with "
                "ratio: 1 where nothing is to leave."
            )

    def _validate_heads(self, where: str) -> None:
        """Refuse options about heads that the budget decides itself, or that leave the other heads nothing.

        Raises:
            RecipeError: says what to give.
        """
        budget = BUDGETS[self.budget or "uniform"]
        if budget.finds != "nothing" and self.whole is not None:
            raise RecipeError(
                f"{where}.whole: {self.budget} finds the heads when the model is converted. Leave whole out, or the "
                "budget."
            )
        if budget.finds != "whole":
            return
        if self.slots is not None:
            raise RecipeError(
                f"{where}.slots: with {self.budget} the ratio says how many heads keep everything, and what is left "
                "for the others. Give ratio, and `recent` for how many of the newest tokens these keep."
            )
        if self.part is not None and not 0 < self.part <= 1:
            raise RecipeError(f"{where}.part: {self.part:g} of the KV heads; give a number above 0 and at most 1.")
        part = self.whole_part() or 0.0
        if part * self.ratio > 1 + _NONE:
            raise RecipeError(
                f"{where}.part: {part:g} of the KV heads keep everything, which is more than one of {self.ratio:g} "
                f"tokens. Use a part of at most {1 / self.ratio:.3g}, or a ratio of at most {1 / part:.3g}."
            )

    def _validate_pairs(self, where: str) -> None:
        """Refuse a budget or a merging that asks for what the score has not.

        Raises:
            RecipeError: names what has it.
        """
        ranker, budget = RANKERS.get(self.scorer), BUDGETS[self.budget or "uniform"]
        if ranker is None:
            return
        if isinstance(budget, OverLayers):
            waiting = {name: r for name, r in RANKERS.items() if not r.while_decoding}
            if self.scorer not in waiting:
                raise RecipeError(
                    f"{where}.budget: {self.budget} divides slots over the layers once a prompt is there, and those of "
                    f"{self.scorer} leave while tokens are decoded, too. Use a scorer that waits for prompts: "
                    f"{', '.join(waiting)}."
                )
            if not budget.by_mass and ranker.rehearses:
                raise RecipeError(
                    f"{where}.budget: {self.budget} looks at the newest queries of a prompt, and {self.scorer} at a "
                    "second reading of it. Use the budget ada, dynamic or prefix."
                )
        if budget.by_mass and not ranker.is_attention:
            fits = [n for n, r in RANKERS.items() if not (isinstance(budget, OverLayers) and r.while_decoding)]
            raise RecipeError(
                f"{where}.budget: {self.budget} adds up scores of slots, and those of {self.scorer} are no parts of "
                f"attention. Use {', '.join(n for n in fits if RANKERS[n].is_attention)}, or another budget: "
                f"{', '.join(name for name, b in BUDGETS.items() if not b.by_mass)}."
            )
        summing = [name for name, r in RANKERS.items() if r.gathers and r.is_attention and not r.rehearses]
        if self.merge is not None and MERGES[self.merge].by_attention and self.scorer not in summing:
            raise RecipeError(
                f"{where}.merge: {self.merge} weighs slots by the attention that was summed up for them, and "
                f"{self.scorer} has no such sum. Use {', '.join(summing)}, or another merging: "
                f"{', '.join(name for name, m in MERGES.items() if not m.by_attention)}."
            )


class Evicting(GatedMethod):
    """The method of `EvictStep`."""

    Options = EvictStep
    step: EvictStep

    def convert(self, copy: WorkingCopy, plans: Sequence[LayerPlan], windows: Windows | None) -> None:
        """Find the heads that need their tokens, where the budget asks for that; otherwise as other gates."""
        if self.step.ranks and BUDGETS[self.step.budget or "uniform"].finds != "nothing":
            copy.retain_of |= retained(copy, plans, windows, self.seed)
        super().convert(copy, plans, windows)

    @classmethod
    def offers(cls, anatomy: Anatomy, context: int) -> list[list[dict[str, Any]]]:
        """Windows of some parts of the context, and H2O at some ratios."""
        windows = {context // part // 16 * 16 for part in (4, 8, 16)}
        return [
            *([{"scorer": "window", "window": window}] for window in sorted(windows - {0}, reverse=True)),
            *([{"scorer": "h2o", "ratio": ratio}] for ratio in (2.0, 4.0, 8.0)),
        ]

    def plan(self, anatomy: Anatomy, layers: tuple[LayerPlan, ...], where: str) -> tuple[LayerPlan, ...]:
        """A score in each selected layer that keeps a cache; where it orders slots, in those without a window."""
        step = self.step
        if not step.ranks:
            value = Evict(ratio=step.ratio, window=step.window, scorer=step.scorer, sinks=step.sinks, page=step.page)
            return plan_retained(step, value, anatomy, layers, where)
        distance = (step.distance or anatomy.max_positions) if step.positions == "capped" else 0
        if distance is None:
            raise PlanError(f"{where}.distance: the config of the model names no context. Give a number of tokens.")
        ranked = Ranked(
            ratio=step.ratio, window=step.recent or _RECENT, scorer=step.scorer, budget=step.budget or "uniform",
            slots=step.slots, observe=step.observe or _OBSERVE, pool=step.pool or _POOL, sinks=step.sinks,
            page=step.page, merge=step.merge, positions=step.positions or "text", distance=distance,
            separators=step.separators or (), read=step.read, read_ratio=step.read_ratio or 4.0,
        )  # fmt: skip
        part = step.whole_part()
        if part is not None:
            left = 1 / step.ratio - part  # of all tokens and heads, for those that do not keep everything
            others: dict[str, Any] = {"ratio": (1 - part) / left} if left > _NONE else {"slots": ranked.always_kept}
            ranked, context = replace(ranked, part=part, **others), anatomy.max_positions
            if left > _NONE and context is not None and ranked.drop_rate(context, ranked.ratio) > 1:
                raise PlanError(
                    f"{where}.part: where {part:g} of the KV heads keep everything, the others keep one of "
                    f"{ranked.ratio:.3g} tokens, fewer than the {ranked.always_kept} of the model's context of "
                    f"{context} that always stay. Use a smaller part, ratio or recent."
                )
        planned = plan_retained(step, ranked, anatomy, layers, where, leave_windows=step.layers is None)
        changed = {new.owner for old, new in zip(layers, planned, strict=True) if new.retain != old.retain}
        mine = [layer.retain for layer in planned if layer.layer in changed and isinstance(layer.retain, Ranked)]
        ranked = mine[0] if mine else ranked
        heads = {layer.layer: layer.decisions for layer in planned if layer.layer in changed}
        whole = self._whole(heads, where)
        # Layers whose heads keep everything stay as they are.
        owners = sorted(layer for layer, count in heads.items() if len(whole[layer]) < count)
        if RANKERS[step.scorer].rehearses and {layer.owner for layer in planned} != set(owners):
            rest = sorted({layer.owner for layer in planned} - set(owners))
            raise PlanError(
                f"{where}: {step.scorer} reads each prompt twice, and layers {spans(rest)} would keep it twice: slots "
                "must leave in all layers. Use another scorer."
            )
        depths = {layer: place / (len(owners) - 1) if len(owners) > 1 else 0.5 for place, layer in enumerate(owners)}
        made = {layer: replace(ranked, depth=depths[layer], whole=whole[layer]) for layer in owners}
        return tuple(
            replace(layer, retain=made.get(layer.owner)) if layer.owner in changed else layer for layer in planned
        )

    def _whole(self, heads: dict[int, int], where: str) -> dict[int, tuple[int, ...]]:
        """The KV heads of each layer that evicts, of so many, that keep all of their tokens.

        Raises:
            PlanError: another layer is named, or a head that the layer does not have.
        """
        named = self.step.whole or {}
        for layer, some in named.items():
            if layer not in heads:
                raise PlanError(
                    f"{where}.whole: names layer {layer}, where no tokens leave. They do in {spans(sorted(heads))}."
                )
            if not set(some) <= set(range(heads[layer])):
                raise PlanError(
                    f"layer {layer}: {where}.whole: names heads {', '.join(map(str, some))}; it caches {heads[layer]}."
                )
        return {layer: tuple(sorted(set(named.get(layer, ())))) for layer in heads}

    def notes(self, plan: Any) -> list[str]:
        """What decides, and when tokens leave."""
        step = self.step
        if not step.ranks:
            return [f"evict: tokens go by {step.scorer}, for which nothing is trained"]
        ranker, budget = RANKERS[step.scorer], BUDGETS[step.budget or "uniform"]
        lines = [f"evict: {ranker.describes}; {budget.describes}"]
        if step.merge is not None:
            lines.append(f"evict: {MERGES[step.merge].describes}")
        if budget.finds != "nothing":
            lines.append(
                "evict: heads are told apart once, when the model is converted, "
                + ("on calibration text" if budget.by == "text" else "by reading random tokens that come again")
                + "; bytes of single layers above are means"
            )
        if step.asks_tokenizer:
            lines.append("evict: separators are those that the tokenizer has, found when the model is converted")
        if step.positions == "cache":
            lines.append("evict: slots close up when others leave, and distances are those in the cache")
        if step.read is not None:
            lines.append(f"evict: {READERS[step.read].describes}; that saves reads, and no bytes of memory")
        if step.positions == "capped":
            lines.append("evict: far slots are seen at a distance that is capped, in plain torch, which takes longer")
        if ranker.rehearses:
            lines.append("evict: prompts are read twice, which takes more than twice as long, and dynamic caches alone")
        if ranker.while_decoding:
            lines.append("evict: bytes are those of any time, but for a page per head between two evictions")
        else:
            lines.append(
                "evict: slots leave after each prompt or chunk of several tokens, which see all that was there; what "
                "is decoded one by one stays until the next. Bytes above are those of a prompt"
                + ("" if ranker.rehearses else ", and a static cache has room for all tokens unless it is told a ratio")
            )
        mine = [layer for layer in plan.after if isinstance(layer.retain, Ranked)]
        if any(not layer.owns_cache for layer in mine):
            lines.append("evict: scores read the attention of layers that own a cache, not that of its readers")
        left = [layer.layer for layer in plan.after if layer.window is not None and step.selects(layer.layer)]
        if left:
            lines.append(f"evict: layers {spans(left)} keep their windows as they are")
        return lines
