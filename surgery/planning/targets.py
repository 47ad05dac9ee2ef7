"""Who can run a result, and by what: one judgement for each target of `surgery export`, asked by plans and exports.

A target is a class with `judge` (see `surgery.export.target.Target`) and one line of `TARGETS`. Its module is imported
when it is asked for, so that plans, which stand below exports, import none of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import transformers
from transformers import PreTrainedModel

from ..errors import PlanError
from ..runtime.layout import AttentionSite, Codec, Dense, Heads, Latent, LayerPlan

TARGETS: dict[str, str | type[Any]] = {
    "hub": "surgery.export.hub:Hub",
    "native": "surgery.export.native:Native",
    "vllm": "surgery.export.vllm:Vllm",
    "gguf": "surgery.export.gguf:Gguf",
}
"""Name of the target -> its class, or "module:Class"."""
NATIVE, REMOTE, PLUGIN, PLUGIN_FP8, REPEATED, DEEPSEEK, OWN_CODES, NONE = (
    "native", "remote code", "plugin", "plugin, its own fp8", "native, heads repeated", "native, as DeepSeek-V3",
    "native, its own codes", "refused",
)  # fmt: skip
"""By what an engine runs a result; the documentation's table and plans use these words."""
DENSE = ("float32", "bfloat16", "float16")
"""Formats of one cached number that stock classes and engines have."""


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A target cannot run the result, or not as it is."""

    reason: str
    """Names the layer or the part."""
    way_out: str = "Use --to hub."

    def __str__(self) -> str:
        return f"{self.reason}. {self.way_out}".strip()


@dataclass(frozen=True, kw_only=True)
class Way:
    """A target runs the result."""

    by: str
    """What runs it there; the words above."""
    before: Refusal | None = None
    """Set where another export comes first: why the result is refused as it is, and which export to make."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is judged: a result as far as a plan knows it before there are weights."""

    architecture: str
    """Name of the parent's class."""
    kind: type[PreTrainedModel] | None
    """The parent's class; None where this transformers has none of that name."""
    config: Any
    """The parent's, or one with the same fields."""
    sites: tuple[AttentionSite, ...] = ()
    plans: tuple[LayerPlan, ...] = ()
    """One for each site; none of either for a stock class, of which only the config is known."""
    native: bool
    """Whether the result is of the parent's own class."""

    @classmethod
    def of_plan(cls, plan: Any) -> Subject:
        """What `plan`, a `surgery.plan.Plan`, makes."""
        anatomy = plan.anatomy
        return cls(
            architecture=anatomy.architecture, kind=anatomy.kind, config=anatomy.config, sites=anatomy.sites,
            plans=tuple(plan.after), native=plan.native,
        )  # fmt: skip

    @classmethod
    def of_config(cls, config: Any) -> Subject:
        """What a `Surgery<Parent>` with this config is."""
        name = config.surgery["parent"]["architecture"]
        layers = config.surgery["layers"]
        return cls(
            architecture=name, kind=getattr(transformers, name, None), config=config,
            sites=tuple(AttentionSite.from_dict(layer["site"]) for layer in layers),
            plans=tuple(LayerPlan.from_dict(layer["plan"]) for layer in layers), native=False,
        )  # fmt: skip

    @property
    def caches_heads(self) -> bool:
        """Whether every layer has a cache of heads of its own, with all its tokens."""
        return bool(self.plans) and all(isinstance(plan.project, Heads) and _keeps_all(plan) for plan in self.plans)

    @property
    def caches_latents(self) -> bool:
        """Whether every layer has a cache of latents of its own, with all its tokens."""
        return bool(self.plans) and all(isinstance(plan.project, Latent) and _keeps_all(plan) for plan in self.plans)


def target_class(name: str) -> type[Any]:
    """The class of the target called `name`.

    Raises:
        PlanError: there is none of that name.
    """
    if name not in TARGETS:
        raise PlanError(f"export: no target {name!r}. Known: {', '.join(TARGETS)}.")
    found = TARGETS[name]
    if isinstance(found, str):
        module, _, attribute = found.partition(":")
        found = getattr(import_module(module), attribute)
    return found


def engines() -> dict[str, type[Any]]:
    """Name of an engine -> the target that is made for it; targets without an engine are formats only."""
    kinds = [target_class(name) for name in TARGETS]
    return {kind.engine: kind for kind in kinds if getattr(kind, "engine", "")}


def ways(subject: Subject) -> dict[str, Way | Refusal]:
    """Engine -> by what it runs the result, or why it does not."""
    return {engine: kind().judge(subject) for engine, kind in engines().items()}


def sentence(subject: Subject) -> str:
    """The same for a terminal."""
    found = ways(subject)
    if subject.native and not any(unknown_to_parent(plan) for plan in subject.plans):
        return ". ".join([f"everything that loads the parent (stock {subject.architecture})", *_refused(found)])
    by = dict(found)
    first = by.pop("transformers", None)
    here = "transformers (with surgery, or remote code)" if isinstance(first, Way) else "transformers (with surgery)"
    others = [f"{engine} ({way.by})" for engine, way in by.items() if isinstance(way, Way)]
    return ". ".join([", ".join([here, *others]), *_refused(found)])


def stored_otherwise(plan: LayerPlan) -> str | None:
    """How the layer stores what it caches, where that is no dense format; None where it is one.

    What is allowed is listed: each target that asks here refuses values of other kinds until it knows them.
    """
    if plan.dtype not in DENSE:
        return f"caches numbers of type {plan.dtype}"
    if type(plan.project) not in (Heads, Latent):
        return f"caches {plan.project.label()}"
    return None if isinstance(plan.store, Dense) else f"is stored as {plan.store.label()}"


def in_full(subject: Subject) -> Subject:
    """The result with caches that are not packed, where packing has changed no weights: what stock classes say of it.

    Codecs that read tables of calibration text stay: without those the model is another one.
    """
    plans = tuple(
        dataclasses.replace(plan, store=Dense(dtype=plan.dtype))
        if isinstance(plan.store, Codec) and not plan.store.calibrated
        else plan
        for plan in subject.plans
    )
    return dataclasses.replace(subject, plans=plans)


def unknown_to_parent(plan: LayerPlan) -> Refusal | None:
    """Why the parent's own class does not cache as the plan says, with any number of KV heads; None where it may."""
    other = stored_otherwise(plan)
    if other is None and not isinstance(plan.project, Heads):
        other = "caches a latent"
    if other is None and plan.retain is not None:
        other = "averages or evicts tokens"
    if other is None and plan.lenders:
        other = f"reads the cache of layer {plan.lenders[0]}"
    return None if other is None else Refusal(reason=f"layer {plan.layer} {other}; the parent's own class does not")


def refused_as_native(subject: Subject) -> Refusal | None:
    """Why the result cannot be of the parent's own class; None where nothing in the plan contradicts that."""
    return next(filter(None, map(unknown_to_parent, subject.plans)), None)


def option_fields() -> Mapping[str, Sequence[tuple[str, dataclasses.Field[Any]]]]:
    """Option -> the targets that have it, with the dataclass field of each; the command line is made of these."""
    found: dict[str, list[tuple[str, dataclasses.Field[Any]]]] = {}
    for name in TARGETS:
        for field in dataclasses.fields(target_class(name)):
            found.setdefault(field.name, []).append((name, field))
    return found


def _refused(found: Mapping[str, Way | Refusal]) -> list[str]:
    return [f"Not {engine}: {way.reason}" for engine, way in found.items() if isinstance(way, Refusal)]


def _keeps_all(plan: LayerPlan) -> bool:
    return not plan.lenders and plan.retain is None
