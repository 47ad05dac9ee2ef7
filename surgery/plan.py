"""Anatomy and recipe give a Plan: what each layer will cache, what that costs in bytes, and who can load it.

Everything that can be refused is refused here, before a weight is touched. Each method plans and refuses for itself
(`rewriters`); this module puts their values together, axis by axis.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from .anatomy import Anatomy, examine
from .console import render, spans
from .errors import PlanError
from .planning.legality import check_layers, check_one_value, check_steps, check_values
from .planning.parent_class import meta_model, native_config, stated_heads, unbuilt_layers
from .planning.table import headline, layers_table, notes, totals_table
from .planning.targets import Subject, sentence
from .recipe import Recipe, Step
from .rewriters import rewriter_for
from .runtime.caches import has_own_layer
from .runtime.gates import gate_shapes
from .runtime.layout import AttentionSite, Dense, Heads, LayerPlan
from .torch_state import plain_torch


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The cache of every attention layer before and after, and what the result is.

    `print(plan)` is the table that a user decides from.

    Examples:
        >>> import surgery
        >>> from surgery.bundled import SMALL
        >>> plan = surgery.plan(SMALL, "gqa-2x")
        >>> plan.parent_bytes_per_token, plan.bytes_per_token, plan.native
        (6144, 3072, True)
        >>> plan.cache_bytes(tokens=1000)
        3072000
    """

    recipe: Recipe
    anatomy: Anatomy
    before: tuple[LayerPlan, ...]
    after: tuple[LayerPlan, ...]
    changes: tuple[frozenset[int], ...]
    """For each step, the layers whose plan it changed."""
    native: bool
    """The result is the parent's own class: every library that loads the parent loads it."""
    parameters: int
    """Parameters of the result."""

    def changed(self, step: Step | None = None) -> list[tuple[AttentionSite, LayerPlan]]:
        """The layers that `step` (default: any) rewrites. One that keeps its heads is left alone, to the last bit."""
        layers = zip(self.anatomy.sites, self.before, self.after, strict=True)
        if step is None:
            return [(site, after) for site, before, after in layers if before != after]
        mine = self.changes[next(i for i, other in enumerate(self.recipe.steps) if other is step or other == step)]
        return [(site, after) for site, _, after in layers if site.layer in mine and step.selects(site.layer)]

    def methods(self) -> list[Any]:
        """The `Rewriter` of each step."""
        return [rewriter_for(step) for step in self.recipe.steps]

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one more token adds to the cache of the result, all layers, windows not yet full."""
        return sum(layer.bytes_per_token for layer in self.after)

    @property
    def parent_bytes_per_token(self) -> int:
        """The same of the parent."""
        return sum(layer.bytes_per_token for layer in self.before)

    def cache_bytes(self, tokens: int, parent: bool = False) -> int:
        """Bytes of the whole cache of one sequence after `tokens` tokens."""
        return sum(layer.bytes_at(tokens) for layer in (self.before if parent else self.after))

    def static_cache_bytes(self, tokens: int) -> int:
        """Bytes that a static cache for one sequence of `tokens` tokens allocates at once."""
        return sum(layer.static_bytes(tokens) for layer in self.after)

    @property
    def engines(self) -> str:
        """Who can load the result and by what, and who cannot and why: what `surgery export` judges by, too."""
        return sentence(Subject.of_plan(self))

    @property
    def needs_calibration(self) -> bool:
        """Whether the recipe has no form without text."""
        return any(step.text == "needed" for step in self.recipe.steps)

    @property
    def wants_calibration(self) -> bool:
        """Whether text makes the result better."""
        return any(step.text != "none" for step in self.recipe.steps)

    @property
    def left_out(self) -> dict[str, int]:
        """Layers that the parent's config counts and its class does not load, by the setting that counts them."""
        return unbuilt_layers(self.anatomy.config, self.anatomy.kind)

    @property
    def skipped(self) -> list[str]:
        """Sentences about fits that the recipe has and attentions make impossible: layers and reason."""
        found: dict[tuple[str, str], list[int]] = {}
        for step in self.recipe.steps:
            for site, _ in self.changed(step):
                by_reason: dict[str, list[str]] = {}
                for option, reason in step.skipped(site).items():
                    by_reason.setdefault(reason, []).append(option)
                for reason, options in by_reason.items():
                    found.setdefault((f"{step.rewriter}: {', '.join(options)}", reason), []).append(site.layer)
        return [f"{what} left out in layers {spans(layers)}: {reason}" for (what, reason), layers in found.items()]

    def settled(self, layers: Iterable[LayerPlan]) -> Plan:
        """The plan with what the calibration text has decided: all its `layers`."""
        after = tuple(layers)
        return replace(self, after=after, parameters=_parameters(self.anatomy, self.before, after))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for `surgery.json`."""
        return {
            "bytes_per_token": self.bytes_per_token,
            "parent_bytes_per_token": self.parent_bytes_per_token,
            "parameters": self.parameters,
            "parent_parameters": self.anatomy.parameters,
            "native": self.native,
            "left_out": self.left_out,
            "layers": [layer.to_dict() for layer in self.after],
        }

    def __str__(self) -> str:
        return render(self.tables())

    def tables(self) -> list[Any]:
        """What `print(plan)` shows, as rich renderables."""
        return [headline(self), layers_table(self), totals_table(self), *notes(self)]


@plain_torch()
def plan(model_or_path: Any, recipe: Any) -> Plan:
    """Decide what `recipe` does to a model, without touching or loading a weight.

    Args:
        model_or_path: model, config, Anatomy, folder or Hub id.
        recipe: what `Recipe.load` takes.

    Raises:
        RecipeError, UnsupportedModel, PlanError: before any work is done.

    Examples:
        >>> import surgery
        >>> from surgery.bundled import SMALL
        >>> print(surgery.plan(SMALL, "kv-int8"))
        kv-int8 on LlamaForCausalLM, 3.74M parameters, bfloat16
        <BLANKLINE>
         layers   attention                  KV heads   window   bytes/token   saved
         ───────────────────────────────────────────────────────────────────────────
         0-5      8 q heads x 32   8 → 8, int8 8 bits      all   1,024 → 544     47%
        ...
    """
    recipe = Recipe.load(recipe)
    anatomy = model_or_path if isinstance(model_or_path, Anatomy) else examine(model_or_path)
    methods = [rewriter_for(step) for step in recipe.steps]
    check_steps(recipe, methods)
    before = tuple(_current(site, anatomy.dtype) for site in anatomy.sites)
    after, changes = before, []
    decided: dict[tuple[int, str], str] = {}
    for i, (step, method) in enumerate(zip(recipe.steps, methods, strict=True)):
        where = f"{recipe.name}: steps[{i}]"
        check_layers(step, [site.layer for site in anatomy.sites], where)
        made = tuple(method.plan(anatomy, after, where))
        check_one_value(decided, after, made, method, step, where)
        check_values(anatomy.sites, made, where)
        changes.append(frozenset(new.layer for old, new in zip(after, made, strict=True) if old != new))
        after = made
    _check_cache_layers(anatomy, after)
    kv_heads = None if any(method.needs_own_class for method in methods) else stated_heads(after)
    config = None
    if kv_heads is not None:
        config = native_config(anatomy.config, anatomy.sites, kv_heads, anatomy.kind)
    if config is not None:
        parameters = sum(p.numel() for p in meta_model(config, anatomy.kind).parameters())
    else:
        _check_replaceable(recipe, anatomy)
        parameters = _parameters(anatomy, before, after)
    return Plan(
        recipe=recipe,
        anatomy=anatomy,
        before=before,
        after=after,
        changes=tuple(changes),
        native=config is not None,
        parameters=parameters,
    )


def _current(site: AttentionSite, dtype: str) -> LayerPlan:
    """The plan that changes nothing."""
    return LayerPlan(
        layer=site.layer, project=Heads.of(site), owner=site.layer, window=site.window, store=Dense(dtype=dtype)
    )


def _check_cache_layers(anatomy: Anatomy, after: tuple[LayerPlan, ...]) -> None:
    """Refuse codes and slots where the model keeps more than keys and values in a layer of its cache (Falcon-H1)."""
    own = [layer.layer for layer in after if has_own_layer(layer)]
    made = DynamicCache(config=anatomy.config).layers if own else []
    for layer in own:
        if layer >= len(made) or type(made[layer]) is not DynamicLayer:
            raise PlanError(
                f"layer {layer}: {anatomy.architecture} keeps its cache in a form of its own, which neither codes nor "
                "slots that leave can take the place of. Leave the layer out: layers: '...'."
            )


def _check_replaceable(recipe: Recipe, anatomy: Anatomy) -> None:
    """Refuse results that the model's own class cannot say where its attentions cannot be replaced."""
    for layer, reason in anatomy.irreplaceable.items():
        raise PlanError(
            f"layer {layer}: {recipe.name} would put an attention of this library in the place of "
            f"{anatomy.architecture}'s, which is not possible here: {reason}. Results of the model's own class (gqa "
            "with one number of KV heads, where the class can say it) leave it in its place."
        )


def _parameters(anatomy: Anatomy, before: tuple[LayerPlan, ...], after: tuple[LayerPlan, ...]) -> int:
    """Parameters of a result whose attentions are ours."""
    layers = zip(anatomy.sites, before, after, strict=True)
    kept = anatomy.parameters - sum(_kv_parameters(site, b) - _kv_parameters(site, a) for site, b, a in layers)
    norms = [
        norm
        for site, a in zip(anatomy.sites, after, strict=True)
        for name, norm in (("k_norm", site.k_norm), ("v_norm", site.v_norm))
        if norm is not None and name in a.absent
    ]
    names = {name for norm in norms for part in (norm.weight, norm.bias) for name in _names(part)}
    if names:
        twin = meta_model(anatomy.config, anatomy.kind)
        kept -= sum(p.numel() for name, p in twin.named_parameters() if name in names)
    return kept


def _names(parameter: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (parameter,) if isinstance(parameter, str) else parameter or ()


def _kv_parameters(site: AttentionSite, layer: LayerPlan) -> int:
    """Parameters that make K and V and decide which stay, biases included."""
    gate = 0
    if layer.retain is not None and layer.owns_cache:
        shapes = gate_shapes(layer.retain, site.hidden_size, layer.decisions)
        gate = sum(prod(shape) for name, shape in shapes.items() if not name.endswith("_bits"))
    return gate + layer.project.parameters(site, layer.absent)
