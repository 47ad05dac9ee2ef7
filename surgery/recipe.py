"""Recipes: what to do to a model, as plain data from a name, a YAML file, a dict, or Python. Knows no tensors."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from .errors import RecipeError
from .planning.share_layouts import SEARCHED, SVFORMER, check_layout

Init = Literal[
    "rank1", "aligned", "mean", "sqrt_g", "first", "medoid", "random", "weighted", "key_norm", "asym", "qcqa", "dha"
]  # fmt: skip
Grouping = Literal["search", "neighbour"]
MlaInit = Literal["default", "svd", "whitened", "transmla"]
Rotation = Literal["complex", "real", "none"]
Selector = Literal["gain", "energy", "2norm", "high", "low", "uniform", "top"]
LowrankInit = Literal["qw", "plain", "whitened"]
Layout = Literal["joint", "grouped", "head", "freq"]
Gate = Literal["adapter", "borrowed", "score:key_norm", "score:window"]
ShareInit = Literal["best", "latent", "replace", "mean", "least_squares"]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One rewriter and its options. `layers` selects by index, for example `0-3,8`; None means every layer."""

    rewriter: str
    layers: str | None = None

    def selects(self, layer: int) -> bool:
        """Whether this step rewrites decoder layer `layer`."""
        return self.layers is None or layer in parse_layers(self.layers)

    @property
    def needs_text(self) -> bool:
        """Whether there is no form without calibration text."""
        return False

    def validate(self, where: str) -> None:
        """Raise RecipeError for values that no model could satisfy."""
        if self.layers is not None:
            parse_layers(self.layers, where)


@dataclass(frozen=True, kw_only=True)
class IdentityStep(Step):
    """Replace every attention by ours and change nothing: the proof of the anatomy, and a debugging tool."""

    rewriter: Literal["identity"] = "identity"


@dataclass(frozen=True, kw_only=True)
class GqaStep(Step):
    """Merge KV heads into fewer, each shared by a group of query heads."""

    rewriter: Literal["gqa"] = "gqa"
    kv_heads: int | str | None = None
    """KV heads to keep: a number, or a fraction of the parent's such as `1/2`. Not needed beside `groups`."""
    init: Init = "rank1"
    """How the merged heads are made. `rank1` minimises the error of scores and outputs under the calibration text."""
    grouping: Grouping = "search"
    """Which heads merge: chosen per layer by the error that merging them costs, or simply neighbours."""
    groups: tuple[tuple[int, ...], ...] | None = None
    """Explicit groups of the parent's KV heads, sizes may differ: `[[0, 3], [1], [2]]`."""
    renorm: bool = True
    """`aligned` only: restore the norm that averaging takes from the keys."""
    equal_groups: bool = True
    """False lets `asym`, `qcqa` and `key_norm` make groups of unequal size, which only our own runtime can run."""
    refit_queries: bool = True
    """Refit `q_proj` by least squares to the parent's attention scores. Needs calibration text."""
    refit_output: bool = True
    """Refit `o_proj` by ridge regression to the parent's attention output. Needs calibration text."""
    gain_fit: bool = True
    """Fit one gain per query head on q and on o by KL to the parent, then fold. Needs calibration text."""

    def validate(self, where: str) -> None:
        super().validate(where)
        if self.groups is not None:
            heads = [head for group in self.groups for head in group]
            if not heads or not all(self.groups) or sorted(heads) != list(range(len(heads))):
                raise RecipeError(
                    f"{where}.groups: {[list(g) for g in self.groups]} must hold every KV head of the parent exactly "
                    "once and no empty group, for example [[0, 3], [1], [2]]."
                )
            if self.kv_heads is not None and self.kv_heads != len(self.groups):
                raise RecipeError(f"{where}: kv_heads {self.kv_heads} beside {len(self.groups)} groups. Leave one out.")
        elif self.kv_heads is None:
            raise RecipeError(f"{where}: needs `kv_heads` (a number, or a fraction such as 1/2) or `groups`.")
        else:
            self._fraction(where)

    def _fraction(self, where: str) -> Fraction | int:
        message = (
            f"{where}.kv_heads: {self.kv_heads!r} must be a whole number >= 1 or a fraction of the parent's heads "
            "between 0 and 1, such as 1/2."
        )
        if isinstance(self.kv_heads, int):
            if self.kv_heads < 1:
                raise RecipeError(message)
            return self.kv_heads
        try:
            fraction = Fraction(str(self.kv_heads))
        except (ValueError, ZeroDivisionError):
            raise RecipeError(message) from None
        if not 0 < fraction <= 1:
            raise RecipeError(message)
        return fraction

    def kv_heads_of(self, parent_kv_heads: int) -> int | None:
        """KV heads to keep of `parent_kv_heads`; None where the fraction does not give a whole number."""
        if self.groups is not None:
            return len(self.groups)
        wanted = self._fraction("kv_heads")
        if isinstance(wanted, int):
            return wanted
        kept = wanted * parent_kv_heads
        return int(kept) if kept.denominator == 1 else None


@dataclass(frozen=True, kw_only=True)
class LatentStep(Step):
    """What `mla` and `lowrank` share: a budget of cached numbers, and what is fitted around the latent."""

    keep: float | None = None
    """Part of the parent's KV bytes per token, never exceeded; above 0, at most 1. Or `rank`."""
    rank: int | None = None
    refit_queries: bool = True
    """Refit `q_proj` by least squares to the parent's attention scores."""
    refit_output: bool = True
    """Refit `o_proj` by ridge regression to the parent's attention output."""
    gain_fit: bool = False
    """Fit one gain per query head on q and on o by KL to the parent, then fold. Little is left to gain after refits."""
    mean_split: bool | None = None
    """Keep the means of K and V apart from the latent: no bytes, better below half of them. None: where `init` is
    `lowrank`'s own; not in `mla`, whose native export would need a bias on o that not every engine has."""

    ranks: Literal["uniform", "sensitivity"] = "uniform"
    """All layers alike, or more numbers where the text says that they are missed most; the same bytes in all."""

    @property
    def splits_mean(self) -> bool:
        """`mean_split`, decided."""
        return bool(self.mean_split)

    @property
    def needs_text(self) -> bool:
        return True

    def validate(self, where: str) -> None:
        super().validate(where)
        if (self.keep is None) == (self.rank is None):
            raise RecipeError(
                f"{where}: needs one of `keep` (part of the parent's KV bytes, such as 0.5) and `rank`, and not both."
            )
        if self.keep is not None and not 0 < self.keep <= 1:
            raise RecipeError(f"{where}.keep: {self.keep:g} must be above 0 and at most 1.")
        if self.rank is not None and self.rank < 1:
            raise RecipeError(f"{where}.rank: {self.rank} must be at least 1.")


@dataclass(frozen=True, kw_only=True)
class MlaStep(LatentStep):
    """Cache one latent for K and V and a small rotated key part (MLA). Needs calibration text.

    `rank` is the latent's; `rope_dims` numbers are cached beside it.
    """

    rewriter: Literal["mla"] = "mla"
    rope_dims: int | None = None
    """Cached numbers that are rotated, even. By default a quarter of all; beside `keep` the text decides per layer."""
    init: MlaInit = "default"
    """Ours, or a published form: `svd` (MHA2MLA), `whitened` (SVD-LLM, CARE), `transmla`."""
    rotation: Rotation | None = None
    """How heads are mixed within each rotary frequency. None: as `init` does (ours: `complex`, TransMLA: `real`)."""
    selector: Selector | None = None
    """Which components stay rotated. None: as `init` does (ours: `gain`, energy times phase sensitivity)."""
    fold: Literal[1, 2, 4, "auto"] = 1
    """Neighbouring frequencies that count as one; exact for 1 only. `auto`: what the text finds best in each layer."""
    beta: float | Literal["search"] = 1.0
    """V's error against K's, in parts of the default balance; `search` tries a few in each layer."""

    def validate(self, where: str) -> None:
        super().validate(where)
        if self.rope_dims is not None and (self.rope_dims < 0 or self.rope_dims % 2):
            raise RecipeError(
                f"{where}.rope_dims: {self.rope_dims} must be even and not negative: numbers turn in pairs. "
                f"Use {max(0, self.rope_dims - 1)} or {self.rope_dims + 1}."
            )
        if self.beta != "search" and self.beta <= 0:
            raise RecipeError(f"{where}.beta: {self.beta:g} must be above 0, or `search`.")


@dataclass(frozen=True, kw_only=True)
class LowrankStep(LatentStep):
    """Cache latents of K and of V before rotation; K is rotated at read, exactly. Needs calibration text.

    `rank` counts all numbers per token, K's and V's together.
    """

    rewriter: Literal["lowrank"] = "lowrank"
    layout: Layout = "joint"
    """One latent over all KV heads, one per `group` of them, one per head; `freq`: K cached rotated, not expanded."""
    group: int = 4
    """KV heads per latent in the `grouped` layout."""
    k_share: float | None = None
    """Part of the numbers that K gets; by default the text decides per layer."""
    init: LowrankInit = "qw"
    """Ours, weighted by queries and outputs, or a published form: `whitened` (Palu), `plain` (SVD of the weights)."""

    @property
    def splits_mean(self) -> bool:
        return self.init == "qw" if self.mean_split is None else self.mean_split

    def validate(self, where: str) -> None:
        super().validate(where)
        if self.group < 1:
            raise RecipeError(f"{where}.group: {self.group} must be at least 1.")
        if self.k_share is not None and not 0 < self.k_share < 1:
            raise RecipeError(f"{where}.k_share: {self.k_share:g} must lie between 0 and 1.")
        if self.layout == "freq" and self.init != "qw":
            raise RecipeError(f"{where}.init: {self.init!r} has no `freq` layout. Use layout: joint, grouped or head.")


@dataclass(frozen=True, kw_only=True)
class ShareStep(Step):
    """Let layers read the cache of an earlier layer and keep none of their own; `layers` selects those that may."""

    rewriter: Literal["share"] = "share"
    layout: str | dict[int, int] = "cla2"
    """`cla2`, `cla(3)`, `mlkv(layers=4)`, `yoco`; `mlkv`, `pizza-bottom`, `sandwich-bottom`, `lasagna-bottom` with
    `kv_layers`; `search` and `kvsharer`, which the text decides; `svformer`, where only V is shared, that of the first
    layer; or a map of readers to owners: `{1: 0, 3: 2}`."""
    kv_layers: int | float | None = None
    """Layers that keep a cache: how many, or what part of those selected."""
    init: ShareInit = "best"
    """How a reader learns to read: the best of `replace` (as it is), `mean` (owner gets the mean of the weights) and
    `least_squares` (maps folded into q and o) for each reader; or `latent`: the owner caches a latent of its input,
    made for all its readers."""
    keep: float = 1.0
    """`latent` only: numbers of an owner's cache as part of those it had."""
    refit_queries: bool = True
    """Refit the readers' `q_proj` by least squares to the parent's attention scores."""
    refit_output: bool = True
    """Refit `o_proj` by ridge regression to the parent's attention output."""
    gain_fit: bool = True
    """Fit one gain per query head on q and on o by KL to the parent, then fold."""

    @property
    def needs_text(self) -> bool:
        return self.init not in ("replace", "mean") or self.layout in SEARCHED

    def validate(self, where: str) -> None:
        super().validate(where)
        if isinstance(self.layout, str):
            check_layout(self.layout, self.kv_layers is not None, where)
        elif self.kv_layers is not None:
            raise RecipeError(f"{where}: a map says itself how many layers keep a cache. Leave out kv_layers.")
        elif not self.layout:
            raise RecipeError(f"{where}.layout: the map is empty. Write for example {{1: 0, 3: 2}}, reader: owner.")
        if self.kv_layers is not None and (
            self.kv_layers < 1 if isinstance(self.kv_layers, int) else not 0 < self.kv_layers <= 1
        ):
            raise RecipeError(
                f"{where}.kv_layers: {self.kv_layers} must be a number of layers (4) or a part of them (0.5)."
            )
        if not 0 < self.keep <= 1:
            raise RecipeError(f"{where}.keep: {self.keep:g} must be above 0 and at most 1.")
        if self.layout == SVFORMER and self.init in ("latent", "mean"):
            raise RecipeError(
                f"{where}.init: {self.init!r} has no svformer layout. Use best, least_squares or replace."
            )
        if self.keep < 1 and self.init != "latent":
            raise RecipeError(f"{where}.keep: {self.init} shares whole heads. Set init: latent, or leave out keep.")


@dataclass(frozen=True, kw_only=True)
class MergeStep(Step):
    """What `dmc` and `dms` share: a gate decides per KV head and token who keeps a slot of the cache.

    Conversion adds the gate and changes nothing else: the model is as it was until the gate is trained
    (`surgery train`), except under a `score:`, for which nothing is trained.
    """

    ratio: float = 4.0
    """Tokens seen per slot kept, at the length that is trained on; over all layers and heads together. Not read where
    the gate is `score:window`, for the window says it all."""
    gate: Gate = "adapter"
    """`adapter`: a linear map of the layer's input, zero at first. `borrowed`: the last channel of q and k, which
    training takes from attention first. `score:key_norm`: long keys go, by a threshold from calibration text;
    `score:window`: all go behind the window."""
    sinks: int = 4
    """First tokens of every sequence that always stay."""
    page: int = 16
    """Slots per page of the cache."""

    @property
    def needs_text(self) -> bool:
        return self.gate == "score:key_norm"

    def validate(self, where: str) -> None:
        super().validate(where)
        if not 1 <= self.ratio < float("inf"):
            raise RecipeError(
                f"{where}.ratio: {self.ratio:g} must be at least 1: it counts tokens per slot. For a quarter of the "
                "cache write 4."
            )
        window: int | None = getattr(self, "window", None)
        if window is not None and window < 1:
            raise RecipeError(f"{where}.window: {window} must be at least 1: the query's own token is counted.")
        if self.sinks < 0:
            raise RecipeError(f"{where}.sinks: {self.sinks} must not be negative.")
        if self.page not in (16, 32, 64, 128, 256):
            raise RecipeError(f"{where}.page: {self.page} slots; use 16, 32, 64, 128 or 256, which the kernels read.")


@dataclass(frozen=True, kw_only=True)
class DmsStep(MergeStep):
    """Drop tokens once they are `window` old, if their gate said so when they came (DMS)."""

    rewriter: Literal["dms"] = "dms"
    window: int = 256
    """Newest tokens that are never dropped."""
    windows: Literal["uniform", "sensitivity"] = "uniform"
    """`sensitivity`: `window` is the mean, and layers that miss older tokens more get a longer one, by what short
    windows cost the model on calibration text."""

    @property
    def needs_text(self) -> bool:
        return super().needs_text or self.windows == "sensitivity"


@dataclass(frozen=True, kw_only=True)
class DmcStep(MergeStep):
    """Average tokens into the slot before them where their gate says so (DMC)."""

    rewriter: Literal["dmc"] = "dmc"
    window: int | None = 12
    """Newest tokens of a run that its slot is the mean of; null: all."""

    def validate(self, where: str) -> None:
        super().validate(where)
        if self.gate.startswith("score:"):
            raise RecipeError(f"{where}.gate: {self.gate} says what to drop, not what to merge. Use rewriter: dms.")


STEPS: dict[str, type[Step]] = {
    "identity": IdentityStep, "gqa": GqaStep, "mla": MlaStep, "lowrank": LowrankStep, "share": ShareStep,
    "dms": DmsStep, "dmc": DmcStep,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Uptrain:
    """How the converted model is trained afterwards (`surgery train`). Conversion itself never trains."""

    tokens: int
    """Text to train on; repeated where there is less of it."""
    layer_local: float | None = None
    """Part of the tokens for the first stage: each converted attention is fitted on the parent's own inputs. None: 0.1
    after a conversion without calibration text, else 0, for calibration has fitted each layer already."""
    learning_rate: float | None = None
    """Peak, of the second stage. None: 0.06 / hidden size, which is 3e-5 at width 2048 and 3e-4 at 192; a model
    that was converted without calibration wants several times that."""
    local_learning_rate: float | None = None
    """Peak, of the first stage. None: that of the second, times 3."""
    schedule: Literal["wsd", "cosine"] = "wsd"
    warmup: float = 0.03
    """Part of the steps of each stage in which the learning rate rises."""
    decay: float = 0.2
    """`wsd` only: part of the steps, at the end, in which it falls to zero as 1 - sqrt."""
    kl: float = 1.0
    """Weight of KL(parent || model) on the logits in the second stage."""
    ce: float = 0.0
    """Weight of the cross-entropy on the text."""
    hidden: float = 0.0
    """Weight of the relative squared distance to the parent's last hidden state."""
    temperature: float = 1.0
    """Of both distributions in the KL, which is multiplied by its square."""
    train: Literal["converted", "attention", "all", "lora", "gates"] = "converted"
    """Attention that was converted, every attention, everything, low-rank adapters (`lora_*`), or the gates of `dms`
    and `dmc` alone."""
    lora_rank: int = 16
    lora_alpha: float = 32.0
    lora_targets: tuple[str, ...] | None = None
    """Names of linear layers, such as `q_proj`. None: every linear layer in the converted attention."""
    batch: int = 32
    """Sequences per optimizer step, over all devices."""
    length: int | None = None
    """Tokens per sequence. None: the model's context, at most 4096."""
    weight_decay: float = 0.1
    """Of matrices; vectors (gains, biases) have none."""
    gate_budget: float = 5.0
    """Weight of max(0, part of tokens that is to go - part that goes), where a step asks for a ratio."""
    gate_budget_per: Literal["model", "head"] = "model"
    """One budget for all layers and heads together, which then choose their own ratios, or one for each head."""
    gate_rate: float = 5.0
    """Learning rate of gates that are trained beside other weights, in units of theirs. Trained alone (`train: gates`)
    they have `learning_rate` itself."""
    gate_ramp: float = 0.8
    """Part of the run in which the ratio rises from 1 to that of the recipe."""
    gate_temperature: float = 0.3
    """Of relaxed decisions."""
    separate_documents: bool = True
    """Positions start again at each document of a packed sequence, and no attention crosses the border."""

    def validate(self, where: str) -> None:
        for name in ("tokens", "learning_rate", "local_learning_rate", "temperature", "batch", "lora_rank",
                     "gate_rate", "gate_temperature"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise RecipeError(f"{where}.{name}: {value} must be positive.")
        for name in ("layer_local", "warmup", "decay", "gate_ramp"):
            if not 0 <= (getattr(self, name) or 0.0) <= 1:
                raise RecipeError(f"{where}.{name}: {getattr(self, name)} is a part of the whole: give 0 to 1.")
        for name in ("kl", "ce", "hidden", "weight_decay", "gate_budget"):
            if getattr(self, name) < 0:
                raise RecipeError(f"{where}.{name}: {getattr(self, name)} must not be negative.")
        if self.layer_local != 1 and not (self.kl or self.ce or self.hidden):
            raise RecipeError(f"{where}: kl, ce and hidden are all 0: the second stage would learn nothing.")
        if self.train == "gates" and self.layer_local:
            raise RecipeError(
                f"{where}.layer_local: gates are trained by the logits; the layer-local stage would train nothing. Set "
                "layer_local: 0."
            )
        if self.length is not None and self.length < 8:
            raise RecipeError(f"{where}.length: {self.length} tokens; give at least 8.")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Steps in order, and the training that follows. Build one with `Recipe.load`."""

    steps: tuple[Step, ...]
    name: str = "recipe"
    description: str = ""
    uptrain: Uptrain | None = None

    @classmethod
    def load(cls, source: Any, overrides: Sequence[str] = ()) -> Recipe:
        """Read and validate a recipe.

        Args:
            source: a shipped name (`gqa-2x`), a path to a YAML file, a dict, or a Recipe.
            overrides: `key=value` strings. A bare key (`kv_heads=2`) sets that option in every step that has it;
                `steps.0.kv_heads=2` and `uptrain.tokens=1e6` set one place.

        Raises:
            RecipeError: names the file, the key, the nearest valid key and the allowed values.
        """
        if isinstance(source, Recipe):
            data, where = source.to_dict(), source.name
        elif isinstance(source, Mapping):
            data, where = dict(source), "recipe"
        else:
            data, where = _read(source)
        for override in overrides:
            _override(data, override)
        return _recipe(data, where)

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `Recipe.load` reads back to an equal recipe."""
        return _plain(self)

    def to_yaml(self) -> str:
        """The recipe as a YAML document."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, width=120)


def shipped_recipes() -> dict[str, str]:
    """Names of the recipes that come with the package, with their descriptions."""
    found = {}
    for file in resources.files("surgery.recipes").iterdir():
        if file.name.endswith(".yaml"):
            found[file.name.removesuffix(".yaml")] = str(yaml.safe_load(file.read_text()).get("description", ""))
    return dict(sorted(found.items()))


def parse_layers(text: str, where: str = "layers") -> frozenset[int]:
    """`"0-3,8"` to {0, 1, 2, 3, 8}.

    Raises:
        RecipeError: not of that form.
    """
    chosen: set[int] = set()
    for part in str(text).split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and (not last.isdigit() or int(last) < int(first))):
            raise RecipeError(f"{where}.layers: {text!r} is not a list of layers. Write for example 0-3,8.")
        chosen |= set(range(int(first), int(last or first) + 1))
    return frozenset(chosen)


def _read(source: str | Path) -> tuple[dict[str, Any], str]:
    """The document and the place that errors name."""
    path = Path(source)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        if not path.is_file():
            raise RecipeError(f"{path}: no such recipe file.")
        text, where = path.read_text(), str(path)
    else:
        known = shipped_recipes()
        if str(source) not in known:
            near = _nearest(str(source), known)
            raise RecipeError(f"{source}: no recipe of that name.{near} Shipped: {', '.join(known)}. Or give a path.")
        where = f"{source}.yaml"
        text = resources.files("surgery.recipes").joinpath(where).read_text()
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise RecipeError(f"{where}: holds {type(data).__name__}, needs a mapping with `steps`.")
    data.setdefault("name", path.stem)
    return data, where


def _recipe(data: dict[str, Any], where: str) -> Recipe:
    data = dict(data)
    _check_keys(data, [f.name for f in dataclasses.fields(Recipe)], where)
    steps = data.pop("steps", None)
    uptrain = data.pop("uptrain", None)
    if not isinstance(steps, (list, tuple)) or not steps:
        raise RecipeError(f"{where}: needs `steps`, a list with at least one rewriter.")
    built = []
    for i, step in enumerate(steps):
        at = f"{where}: steps[{i}]"
        if not isinstance(step, Mapping) or "rewriter" not in step:
            raise RecipeError(f"{at}: needs `rewriter`, one of {', '.join(STEPS)}.")
        if step["rewriter"] not in STEPS:
            near = _nearest(str(step["rewriter"]), STEPS)
            raise RecipeError(f"{at}.rewriter: no rewriter {step['rewriter']!r}.{near} Known: {', '.join(STEPS)}.")
        built.append(_build(STEPS[step["rewriter"]], step, at))
    training = None if uptrain is None else _build(Uptrain, uptrain, f"{where}: uptrain")
    return _build(Recipe, {**data, "steps": tuple(built), "uptrain": training}, where)


def _build(kind: type, data: Any, where: str) -> Any:
    """An instance of dataclass `kind` from a mapping, every key and value checked against its fields."""
    if not isinstance(data, Mapping):
        raise RecipeError(f"{where}: holds {data!r}, needs a mapping.")
    hints = typing.get_type_hints(kind)
    fields = {f.name: hints[f.name] for f in dataclasses.fields(kind)}
    _check_keys(data, fields, where)
    missing = [f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING and f.name not in data]
    if missing:
        raise RecipeError(f"{where}: needs {', '.join(f'`{name}`' for name in missing)}.")
    built = kind(**{key: _coerce(value, fields[key], f"{where}.{key}") for key, value in data.items()})
    if hasattr(built, "validate"):
        built.validate(where)
    return built


def _check_keys(data: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    for key in data:
        if key not in known:
            raise RecipeError(f"{where}: unknown key {key!r}.{_nearest(str(key), known)} Known: {', '.join(known)}.")


def _coerce(value: Any, hint: Any, where: str) -> Any:
    """`value` as `hint`, or RecipeError. Only widening is done: int to float, list to tuple, layers: 3 to "3"."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        for option in arguments:
            try:
                return _coerce(value, option, where)
            except RecipeError:
                continue
    elif origin is Literal:
        if value in arguments:
            return value
        near = _nearest(str(value), [str(a) for a in arguments])
        raise RecipeError(f"{where}: {value!r} is not allowed.{near} Allowed: {', '.join(map(str, arguments))}.")
    elif origin is dict:
        if isinstance(value, Mapping):
            return {
                _coerce(key, arguments[0], where): _coerce(item, arguments[1], f"{where}.{key}")
                for key, item in value.items()
            }
    elif origin is tuple:
        if isinstance(value, (list, tuple)):
            return tuple(_coerce(item, arguments[0], where) for item in value)
    elif hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-4 as a string
        except ValueError:
            pass
    elif hint is int and isinstance(value, str):
        try:
            if float(value).is_integer():
                return int(float(value))  # and 1e6 too
        except ValueError:
            pass
    elif hint is str and where.endswith(".layers") and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    elif isinstance(hint, type) and isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    name = getattr(hint, "__name__", None) if origin is None else None
    raise RecipeError(f"{where}: {value!r} is of type {type(value).__name__}, needs {name or _spell(hint)}.")


def _spell(hint: Any) -> str:
    return str(hint).replace("typing.", "").replace("NoneType", "null").replace("None", "null")


def _override(data: dict[str, Any], text: str) -> None:
    key, equals, raw = text.partition("=")
    if not equals or not key:
        raise RecipeError(f"--set {text}: write key=value, for example --set kv_heads=2.")
    value = yaml.safe_load(raw) if raw else ""
    data["steps"] = [dict(step) if isinstance(step, Mapping) else step for step in data.get("steps") or []]
    if "." not in key:
        owners = [step for step in data["steps"] if key in _fields(step)]
        if not owners:
            known = {name: None for step in data["steps"] for name in _fields(step) if name != "rewriter"}
            raise RecipeError(f"--set {text}: no step has {key!r}.{_nearest(key, known)} Known: {', '.join(known)}.")
        for step in owners:
            step[key] = value
        return
    head, *rest = key.split(".")
    if head == "steps" and len(rest) == 2 and rest[0].isdigit() and int(rest[0]) < len(data["steps"]):
        data["steps"][int(rest[0])][rest[1]] = value
    elif head == "uptrain" and len(rest) == 1:
        data["uptrain"] = {**(data.get("uptrain") or {}), rest[0]: value}
    else:
        raise RecipeError(
            f"--set {text}: no such place. Write kv_heads=2, steps.0.kv_heads=2 (the recipe has {len(data['steps'])} "
            "steps, counted from 0) or uptrain.tokens=1000000."
        )


def _fields(step: Any) -> list[str]:
    kind = STEPS.get(step.get("rewriter", "")) if isinstance(step, Mapping) else None
    return [f.name for f in dataclasses.fields(kind)] if kind else []


def _nearest(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def _plain(value: Any) -> Any:
    """Dataclasses to dicts without fields that hold their default (except the rewriter), tuples to lists."""
    if dataclasses.is_dataclass(value):
        return {
            f.name: _plain(getattr(value, f.name))
            for f in sorted(dataclasses.fields(value), key=lambda f: f.name not in ("name", "description", "rewriter"))
            if f.name in ("rewriter", "name") or getattr(value, f.name) != f.default
        }
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
