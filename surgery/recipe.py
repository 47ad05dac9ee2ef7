"""Recipes: what to do to a model, as plain data from a name, a YAML file, a dict, or Python. Knows no tensors.

What steps there are, and what options each has, the registry of `rewriters` knows; this module names none of them.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from .errors import RecipeError
from .planning.schema import build, check_keys, nearest, plain
from .planning.uptrain import OF_GATES, Uptrain
from .rewriters import REWRITERS, options_of

__all__ = ["Recipe", "Step", "Text", "Uptrain", "parse_layers", "shipped_recipes"]

Text = Literal["none", "better", "needed"]
"""What calibration text is to a step: without effect, an improvement, or a condition."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One rewriter and its options. `layers` selects by index, for example `0-3,8`; None means every layer.

    A method derives its options from this class: fields are the recipe's keys, their docstrings the help.
    """

    rewriter: str
    layers: str | None = None

    def selects(self, layer: int) -> bool:
        """Whether this step rewrites decoder layer `layer`."""
        return self.layers is None or layer in parse_layers(self.layers)

    @property
    def text(self) -> Text:
        """Whether the step has a form without calibration text, and whether text makes it better."""
        return "none"

    @property
    def gates(self) -> Literal["none", "own", "borrowed", "heads"]:
        """Gates that the step leaves to training: none, with parameters of their own, with channels of q and k, or
        with a number for each KV head."""
        return "none"

    @property
    def asks_tokenizer(self) -> bool:
        """Whether something is still to be read from the tokenizer of the model."""
        return False

    def told(self, tokenizer: Any) -> Step:
        """The step with that; `tokenizer` None: the model comes without one.

        Raises:
            PlanError: nothing there says it.
        """
        return self

    def unread(self) -> dict[str, str]:
        """Options that nothing reads where the others are as they are -> why, and what to do, in sentences.

        A recipe that names one of them is refused: what is ignored in silence is a wrong result. Called before
        `validate`.
        """
        return {}

    def skipped(self, site: Any) -> dict[str, str]:
        """Fits of the step that an attention (`AttentionSite`) makes impossible -> why; the plan and the log say so."""
        return {}

    def validate(self, where: str) -> None:
        """Raise RecipeError for values that no model could satisfy."""
        if self.layers is not None:
            parse_layers(self.layers, where)

    @classmethod
    def upgraded(cls, data: dict[str, Any]) -> tuple[dict[str, Any], str]:
        """A step in the spelling of an earlier version in that of this one, and a notice; empty where nothing changed.

        `data` may come back with another `rewriter`.
        """
        return data, ""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Steps in order, and the training that follows. Build one with `Recipe.load`.

    Examples:
        >>> import surgery
        >>> recipe = surgery.Recipe.load("mla-4x")
        >>> [step.rewriter for step in recipe.steps]
        ['mla']
        >>> surgery.Recipe.load({"steps": [{"rewriter": "gqa", "kv_heads": "1/2"}]}).to_dict()
        {'name': 'recipe', 'steps': [{'rewriter': 'gqa', 'kv_heads': '1/2'}]}
    """

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

    @classmethod
    def recorded(cls, data: Mapping[str, Any]) -> Recipe:
        """The recipe by which a checkpoint says it was made; options that nothing read are left out, not refused."""
        return _recipe(dict(data), "recipe", strict=False)

    def told(self, tokenizer: Callable[[], Any]) -> Recipe:
        """The recipe with what its steps ask of the tokenizer, which is made where one asks; see `Step.told`."""
        if not any(step.asks_tokenizer for step in self.steps):
            return self
        made = tokenizer()
        return dataclasses.replace(
            self, steps=tuple(step.told(made) if step.asks_tokenizer else step for step in self.steps)
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `Recipe.load` reads back to an equal recipe."""
        return plain(self)

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
            near = nearest(str(source), known)
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


def _recipe(data: dict[str, Any], where: str, *, strict: bool = True) -> Recipe:
    data = dict(data)
    check_keys(data, [f.name for f in dataclasses.fields(Recipe)], where)
    steps = data.pop("steps", None)
    uptrain = data.pop("uptrain", None)
    if not isinstance(steps, (list, tuple)) or not steps:
        raise RecipeError(f"{where}: needs `steps`, a list with at least one rewriter.")
    built = tuple(_step(step, f"{where}: steps[{i}]", strict) for i, step in enumerate(steps))
    training = None
    if uptrain is not None:
        training = build(Uptrain, uptrain, f"{where}: uptrain", strict=strict, unread=_unread_of_gates(built))
    return build(Recipe, {**data, "steps": built, "uptrain": training}, where)


def _unread_of_gates(steps: Sequence[Step]) -> dict[str, str]:
    """As `Step.unread`, of the options of `uptrain` that are about gates."""
    gates = {step.gates for step in steps} - {"none"}
    if not gates:
        return dict.fromkeys(OF_GATES, "no step of the recipe has gates that are trained. Leave it out.")
    found = {}
    if gates == {"borrowed"}:
        found["gate_rate"] = "its gates are channels of q and k, which learn at the rate of these. Leave it out."
    if gates == {"heads"}:
        found["gate_temperature"] = "no decision is relaxed where alphas mix what heads make. Leave it out."
    if "heads" in gates:
        found["gate_budget_per"] = "some heads keep everything and others go for them: the budget is one. Leave it out."
    else:
        found["gate_l1"] = "only gates of heads (gate: head) have alphas. Leave it out."
    return found


def _step(data: Any, where: str, strict: bool) -> Step:
    """One step from plain data, in today's spelling or a former one."""
    if not isinstance(data, Mapping) or "rewriter" not in data:
        raise RecipeError(f"{where}: needs `rewriter`, one of {', '.join(REWRITERS)}.")
    kind = _known(data["rewriter"], where)
    newer, notice = kind.upgraded(dict(data))
    if notice:
        _log.warning("%s: %s", where, notice)
    made: Step = build(_known(newer["rewriter"], where), newer, where, strict=strict)
    return made


def _known(name: Any, where: str) -> type[Step]:
    if name not in REWRITERS:
        near = nearest(str(name), REWRITERS)
        raise RecipeError(f"{where}.rewriter: no rewriter {name!r}.{near} Known: {', '.join(REWRITERS)}.")
    return options_of(name)


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
            raise RecipeError(f"--set {text}: no step has {key!r}.{nearest(key, known)} Known: {', '.join(known)}.")
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
    known = isinstance(step, Mapping) and step.get("rewriter") in REWRITERS
    return [f.name for f in dataclasses.fields(options_of(step["rewriter"]))] if known else []


def __getattr__(name: str) -> Any:
    """The options of a method by the name of their class, such as `GqaStep`: they stand in the method's own file."""
    for method in REWRITERS if name.endswith("Step") else ():
        if options_of(method).__name__ == name:
            return options_of(method)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
