"""Anatomy and recipe give a Plan: what each layer will cache, what that costs in bytes, and who can load it.

Everything that can be refused is refused here, before a weight is touched.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from .anatomy import Anatomy, examine
from .console import count, human_bytes, render, spans
from .errors import PlanError
from .planning.engines import sentence
from .planning.latent_size import aligned_rank, full_rank, input_columns, kept_numbers, latent_budget, turning_numbers
from .planning.parent_class import hands_down_keywords, meta_model, native_config, unbuilt_layers
from .planning.share_layouts import SEARCHED, SVFORMER, check_map, owners_of, sharable
from .recipe import GqaStep, LatentStep, LowrankStep, MergeStep, MlaStep, Recipe, ShareStep, Step, parse_layers
from .runtime.caches import static_bytes
from .runtime.gated import merge_refusal
from .runtime.gates import gate_shapes
from .runtime.latent import latent_refusal
from .runtime.layout import AttentionSite, Heads, Latent, LayerPlan, Merge, Project
from .torch_state import plain_torch

CONTEXTS = {"4k": 4096, "32k": 32768, "128k": 131072}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The cache of every attention layer before and after, and what the result is.

    `print(plan)` is the table that a user decides from.
    """

    recipe: Recipe
    anatomy: Anatomy
    before: tuple[LayerPlan, ...]
    after: tuple[LayerPlan, ...]
    native: bool
    """The result is the parent's own class: every library that loads the parent loads it."""
    parameters: int
    """Parameters of the result."""

    def changed(self, step: Step | None = None) -> list[tuple[AttentionSite, LayerPlan]]:
        """The layers that `step` (default: any) rewrites. One that keeps its heads is left alone, to the last bit."""
        layers = zip(self.anatomy.sites, self.before, self.after, strict=True)
        return [
            (site, after)
            for site, before, after in layers
            if _differs(before, after, step) and (step is None or step.selects(site.layer))
        ]

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
        rest = (layer for layer in self.after if layer.retain is None)
        stock = (layer.bytes_per_token * min(tokens, layer.window or tokens) for layer in rest)
        return sum(stock) + static_bytes(self.after, tokens)

    @property
    def engines(self) -> str:
        """Who can load the result; see `engines.py`."""
        return sentence(self.anatomy.architecture, self.after, self.native)

    @property
    def needs_calibration(self) -> bool:
        """Whether the recipe has no form without text."""
        return any(step.needs_text for step in self.recipe.steps)

    @property
    def wants_calibration(self) -> bool:
        """Whether text makes the result better: all but `mean`-like inits and identity."""
        return self.needs_calibration or any(
            isinstance(s, ShareStep) or (isinstance(s, GqaStep) and s.init not in ("mean", "sqrt_g", "first", "random"))
            for s in self.recipe.steps
        )

    @property
    def left_out(self) -> dict[str, int]:
        """Layers that the parent's config counts and its class does not load, by the setting that counts them."""
        return unbuilt_layers(self.anatomy.config, self.anatomy.kind)

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
        return [_headline(self), _layers(self), _totals(self), *_notes(self)]


@plain_torch()
def plan(model_or_path: Any, recipe: Any) -> Plan:
    """Decide what `recipe` does to a model, without touching or loading a weight.

    Args:
        model_or_path: model, config, Anatomy, folder or Hub id.
        recipe: what `Recipe.load` takes.

    Raises:
        RecipeError, UnsupportedModel, PlanError: before any work is done.
    """
    recipe = Recipe.load(recipe)
    anatomy = model_or_path if isinstance(model_or_path, Anatomy) else examine(model_or_path)
    before = tuple(_current(site, anatomy.dtype) for site in anatomy.sites)
    after = before
    _check_order(recipe)
    for i, step in enumerate(recipe.steps):
        after = _apply(step, f"{recipe.name}: steps[{i}]", anatomy, after)
    kv_heads = {layer.project.kv_heads for layer in after}
    config = None
    if (
        not any(step.rewriter == "identity" or _is_uneven(step) for step in recipe.steps)
        and all(isinstance(layer.project, Heads) and layer.project.is_uniform for layer in after)
        and not any(layer.lenders or layer.retain for layer in after)
        and len(kv_heads) == 1
    ):
        config = native_config(anatomy.config, anatomy.sites, min(kv_heads), anatomy.kind)
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
        native=config is not None,
        parameters=parameters,
    )


def _check_replaceable(recipe: Recipe, anatomy: Anatomy) -> None:
    """Refuse results that the model's own class cannot say where its attentions cannot be replaced."""
    for layer, reason in anatomy.irreplaceable.items():
        raise PlanError(
            f"layer {layer}: {recipe.name} would put an attention of this library in the place of "
            f"{anatomy.architecture}'s, which is not possible here: {reason}. Results of the model's own class (gqa "
            "with one number of KV heads, where the class can say it) leave it in its place."
        )


def _check_order(recipe: Recipe) -> None:
    """Refuse recipes whose steps cannot work on one copy of the model."""
    merge = next((i for i, step in enumerate(recipe.steps) if isinstance(step, MergeStep)), len(recipe.steps))
    late = next((step for step in recipe.steps[merge:] if not isinstance(step, MergeStep)), None)
    if late is not None:
        raise PlanError(
            f"{recipe.name}: {late.rewriter} comes after {recipe.steps[merge].rewriter}: gates decide for the heads "
            f"that are cached in the end. Put {recipe.steps[merge].rewriter} last."
        )
    share = next((i for i, step in enumerate(recipe.steps) if isinstance(step, ShareStep)), None)
    searches = share is not None and getattr(recipe.steps[share], "layout", None) in SEARCHED
    some = next((step for step in recipe.steps[merge:] if step.layers is not None), None)
    if searches and some is not None:
        raise PlanError(
            f"{recipe.name}: text decides which layers read which, so that {some.rewriter} cannot be for layers "
            f"{some.layers} alone. Leave out its layers, or write the layout of share as a map."
        )
    by_layer = next((s for s in recipe.steps if getattr(s, "windows", "uniform") != "uniform"), None)
    if share is not None and by_layer is not None:
        raise PlanError(
            f"{recipe.name}: {by_layer.rewriter} asks for windows: sensitivity, which is measured on layers that keep "
            "caches of their own. Beside share, write one dms step for each window, with its `layers`."
        )
    if share is not None and share < merge - 1:
        raise PlanError(
            f"{recipe.name}: steps[{share + 1}] is {recipe.steps[share + 1].rewriter}, after share: heads are merged "
            "before caches are shared, and a model shares once. Put share last, before dms and dmc."
        )
    kinds = {step.rewriter: i for i, step in enumerate(recipe.steps) if isinstance(step, (GqaStep, LatentStep))}
    if share is not None:
        step = recipe.steps[share]
        assert isinstance(step, ShareStep)
        other = next((name for name in kinds if name != "gqa" or step.init == "latent"), None)
        if other is not None:
            raise PlanError(
                f"{recipe.name}: steps[{kinds[other]}] is {other}, steps[{share}] shares caches"
                f"{' of latents' if step.init == 'latent' else ''}: one cache has one form. Take share with init: "
                "latent and `keep`, which makes one latent for all its readers."
            )
    if "gqa" in kinds and len(kinds) > 1:
        other = next(name for name in kinds if name != "gqa")
        raise PlanError(
            f"{recipe.name}: steps[{kinds['gqa']}] is gqa, steps[{kinds[other]}] is {other}: a latent is made from the "
            "parent's own heads, and one recipe cannot do both yet. Take one of them; a smaller `keep` saves as much."
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


def _differs(before: LayerPlan, after: LayerPlan, step: Step | None) -> bool:
    """Whether the layer is another one, in what `step` decides."""
    retains = before.retain != after.retain
    if isinstance(step, MergeStep):
        return retains
    made = (before.project, before.lenders) != (after.project, after.lenders)
    return made or (retains and step is None)


def _is_uneven(step: Step) -> bool:
    """Whether the calibration text decides on groups of unequal size."""
    return isinstance(step, GqaStep) and not step.equal_groups and step.init in ("asym", "qcqa", "key_norm")


def _current(site: AttentionSite, dtype: str) -> LayerPlan:
    """The plan that changes nothing."""
    return LayerPlan(
        layer=site.layer, project=_heads(site, site.kv_heads), owner=site.layer, window=site.window, dtype=dtype
    )


def _heads(site: AttentionSite, kv_heads: int, sizes: tuple[int, ...] | None = None) -> Heads:
    """Consecutive groups of query heads; `sizes` where they differ, else as even as can be."""
    if sizes is None:
        sizes = tuple(site.heads // kv_heads + (i < site.heads % kv_heads) for i in range(kv_heads))
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    groups = tuple(tuple(range(start, start + size)) for start, size in zip(starts, sizes, strict=True))
    return Heads(kv_heads=kv_heads, head_dim=site.head_dim, value_dim=site.value_dim, groups=groups)


def _kv_parameters(site: AttentionSite, layer: LayerPlan) -> int:
    """Parameters that make K and V and decide which stay, biases included."""
    project = layer.project
    gate = 0
    if layer.retain is not None and layer.owner == layer.layer:
        shapes = gate_shapes(layer.retain, site.hidden_size, project.kv_heads)
        gate = sum(prod(shape) for name, shape in shapes.items() if not name.endswith("_bits"))
    if isinstance(project, Latent):
        maps = project.head_dim * (project.key_rank + project.rope_dims) + project.value_dim * project.value_rank
        down = project.dims * input_columns(site) if layer.owner == layer.layer else 0
        means = 0
        if project.means:  # K's where it is added at read, V's in a bias of o that the parent may have already
            means = (
                project.rotate_on_read * project.kv_heads * project.head_dim + (site.o.bias is None) * site.hidden_size
            )
        return down + project.kv_heads * maps + means
    return gate + sum(
        project.kv_heads * width * (site.hidden_size + (projection.bias is not None))
        for name, projection, width in (("k_proj", site.k, site.head_dim), ("v_proj", site.v, site.value_dim))
        if name not in layer.absent
    )


def _apply(step: Step, where: str, anatomy: Anatomy, layers: tuple[LayerPlan, ...]) -> tuple[LayerPlan, ...]:
    if step.layers is not None:
        present = {site.layer for site in anatomy.sites}
        absent = sorted(parse_layers(step.layers, where) - present)
        if absent:
            raise PlanError(
                f"{where}.layers: the model has no attention layer {absent[0]}; it has {spans(sorted(present))}."
            )
    if isinstance(step, ShareStep):
        return _share(step, where, anatomy, layers)
    if isinstance(step, MergeStep):
        return _retain(step, where, anatomy, layers)
    if not isinstance(step, (GqaStep, LatentStep)):
        return layers
    done = []
    for site, layer in zip(anatomy.sites, layers, strict=True):
        if step.selects(site.layer) and layer.project != _heads(site, site.kv_heads):
            raise PlanError(
                f"{where}: layer {site.layer} is rewritten by an earlier step already. Select other layers."
            )
        if not step.selects(site.layer):
            done.append(layer)
        elif isinstance(step, GqaStep):
            done.append(_merge_heads(step, where, site, layer))
        else:
            done.append(replace(layer, project=_make_latent(step, where, site)))
    return tuple(done)


def _merge_heads(step: GqaStep, where: str, site: AttentionSite, layer: LayerPlan) -> LayerPlan:
    old = layer.project.kv_heads
    divisors = ", ".join(str(d) for d in range(1, old + 1) if old % d == 0)
    kv_heads = step.kv_heads_of(old)
    if kv_heads is None:
        raise PlanError(
            f"layer {site.layer}: {step.kv_heads} of {old} KV heads is no whole number. Use one of {divisors}."
        )
    if kv_heads > old:
        raise PlanError(
            f"layer {site.layer}: the recipe asks for {kv_heads} KV heads, the parent has {old}. Use one of {divisors}."
        )
    if step.groups is not None:
        members = sum(len(group) for group in step.groups)
        if members != old:
            raise PlanError(f"layer {site.layer}: {where}.groups place {members} KV heads, the parent has {old}.")
        sizes = [len(group) * site.heads // old for group in step.groups]
        return replace(layer, project=_heads(site, kv_heads, tuple(sizes)))
    if _is_uneven(step):
        if step.init == "key_norm" and site.heads != old:
            raise PlanError(
                f"layer {site.layer}: {where}: `key_norm` shares queries out one by one, and the KV heads here have "
                f"{site.heads // old} each already. Set equal_groups: true."
            )
        return replace(layer, project=_heads(site, kv_heads))
    if old % kv_heads:
        raise PlanError(
            f"layer {site.layer}: cannot group {old} KV heads into {kv_heads} ({old} % {kv_heads} != 0). "
            f"Use one of {divisors}, or write the groups out: groups: [[0, 1], [2], ...]."
        )
    return replace(layer, project=_heads(site, kv_heads))


def _share(step: ShareStep, where: str, anatomy: Anatomy, layers: tuple[LayerPlan, ...]) -> tuple[LayerPlan, ...]:
    sites = {site.layer: site for site in anatomy.sites}
    plans = {layer.layer: layer for layer in layers}
    chosen = [layer for layer in sorted(sites) if step.selects(layer)]
    if not hands_down_keywords(anatomy):
        raise PlanError(
            f"{where}: {anatomy.architecture} hands its attentions no keyword arguments, so that no layer can be given "
            "the cache of another. Use gqa."
        )
    if isinstance(step.layout, str):
        owners = owners_of(step.layout, chosen, step.kv_layers, where)
        if step.layout in SEARCHED:
            possible = {reader: found for reader, found in sharable(chosen, sites, plans).items() if found}
            if len(possible) < len(owners):
                raise PlanError(
                    f"{where}: {len(owners)} layers are to read the cache of an earlier one, and only {len(possible)} "
                    f"find one like their own. Use kv_layers: {len(chosen) - len(possible)} or more."
                )
            readers = sorted(possible)[-len(owners) :] if owners else []
            owners = {reader: max(set(possible[reader]) - set(readers)) for reader in readers}
    else:
        owners = dict(step.layout)
        outside = sorted(set(owners) - set(chosen))
        if outside and outside[0] in sites:
            raise PlanError(f"{where}: layer {outside[0]} is in the map, and not among layers: {step.layers}.")
    check_map(owners, sites, plans)
    for layer in sorted({*owners, *owners.values()}):
        for fault, is_there in (
            (f"clamps keys and values to {sites[layer].clip_qkv}", sites[layer].clip_qkv is not None),
            ("gates its head outputs", sites[layer].gated_output),
        ):
            if is_there:
                raise PlanError(f"layer {layer}: {where} fits what readers read, and this attention {fault}. Use gqa.")
    if step.init == "latent":
        groups = {owner for owner in owners.values()}
        for layer in sorted({*owners, *groups}):
            at = sites[layer]
            reason = latent_refusal(at)
            if reason:
                raise PlanError(f"layer {layer}: {where} makes a latent, but {reason}")
            plans[layer] = replace(plans[layer], project=_shared_latent(step, at))
    for layer, owner in owners.items():
        plan = plans[layer]
        plans[layer] = replace(plan, value_owner=owner) if step.layout == SVFORMER else replace(plan, owner=owner)
    return tuple(plans[layer.layer] for layer in layers)


def _retain(step: MergeStep, where: str, anatomy: Anatomy, layers: tuple[LayerPlan, ...]) -> tuple[LayerPlan, ...]:
    """Gates for the layers that `step` selects; readers follow the slots of their owner, whether selected or not."""
    merge = Merge(
        method="dms" if step.rewriter == "dms" else "dmc", ratio=step.ratio, window=getattr(step, "window", None),
        gate=step.gate, sinks=step.sinks, page=step.page,
    )  # fmt: skip
    context = anatomy.max_positions
    if step.gate == "score:window":
        merge = replace(merge, ratio=max(1.0, (context or 0) / merge.always_kept))
    elif context is not None and merge.drop_rate(context, step.ratio) > 1:
        most = context / merge.always_kept
        kept = f"{merge.window} newest tokens and " if merge.method == "dms" else ""
        raise PlanError(
            f"{where}.ratio: {step.ratio:g} is out of reach: {kept}the first {merge.protected} of the model's context "
            f"of {context} tokens always stay, so that {most:.1f} is the most. Use a smaller "
            f"{'window or ' if merge.method == 'dms' else ''}ratio."
        )
    free = [site.layer for site in anatomy.sites if merge_refusal(site) is None]
    done: dict[int, LayerPlan] = {}
    for site, layer in zip(anatomy.sites, layers, strict=True):
        done[site.layer] = layer
        if layer.owner != site.layer:
            owner = done[layer.owner]
            done[site.layer] = replace(layer, retain=owner.retain)
            continue
        if not step.selects(site.layer):
            continue
        at = f"layer {site.layer}: {where}"
        if layer.retain is not None:
            raise PlanError(f"{at} gives it a gate, and an earlier step did already. Select other layers.")
        reason = merge_refusal(site)
        if reason is not None:
            can = f" Layers that can: {spans(free)}." if free else ""
            raise PlanError(f"{at} asks for {step.rewriter}, but {reason}{can}")
        if isinstance(layer.project, Latent):
            raise PlanError(
                f"{at} asks for {step.rewriter} on a latent: gates decide per KV head, and a latent is one for all of "
                "them. Take gqa with dms, or the latent alone."
            )
        if layer.value_owner is not None:
            raise PlanError(
                f"{at} asks for {step.rewriter}, but the layer reads V of layer {layer.value_owner}, whose slots are "
                "not those of its own K. Use another layout of share."
            )
        if site.layer in {other.value_owner for other in layers}:
            raise PlanError(f"{at} asks for {step.rewriter}, but other layers read its V beside keys of their own.")
        done[site.layer] = replace(layer, retain=merge)
    return tuple(done[layer.layer] for layer in layers)


def _shared_latent(step: ShareStep, site: AttentionSite) -> Latent:
    """K of all readers is rotated at read: its mean over layers has no rotated part that suits them all."""
    numbers = min(kept_numbers(step.keep, site), input_columns(site))
    return _latent_of(site, numbers, 0, rotate_on_read=True)


def _make_latent(step: LatentStep, where: str, site: AttentionSite) -> Latent:
    at = f"layer {site.layer}"
    reason = latent_refusal(site, isinstance(step, LowrankStep) and step.layout != "freq")
    if reason:
        raise PlanError(f"{at}: {where} asks for {step.rewriter}, but {reason}")
    if step.mean_split and site.sinks is not None:
        raise PlanError(f"{at}: {where}.mean_split: sinks take a part of each softmax. Set mean_split: false.")
    assert isinstance(step, (MlaStep, LowrankStep))
    made = _mla(step, at, site) if isinstance(step, MlaStep) else _lowrank(step, at, site)
    return replace(made, means=step.splits_mean and site.sinks is None)


def _mla(step: MlaStep, at: str, site: AttentionSite) -> Latent:
    pairs = 0 if site.rotary is None else site.rotary.dims // 2
    if step.fold != "auto" and pairs % step.fold:
        raise PlanError(f"{at}: fold {step.fold} does not divide {pairs} rotary frequencies. Use 1, or auto.")
    if step.keep is not None:
        return _latent_of(site, *latent_budget(kept_numbers(step.keep, site), site, step.rope_dims))
    assert step.rank is not None
    turning, full, rope_dims = turning_numbers(site), full_rank(site), step.rope_dims
    if rope_dims is not None and rope_dims > turning:
        raise PlanError(
            f"{at}: rope_dims {rope_dims} is more than the {turning} rotated numbers of K. Use at most that."
        )
    if step.rank > full:
        raise PlanError(f"{at}: rank {step.rank} is above full: K and V together have rank {full}. Use less.")
    if rope_dims is None:
        rope_dims = min(turning, max(2, step.rank // 6 * 2)) if turning else 0
    if step.rank + rope_dims > site.kv_dims:
        raise PlanError(
            f"{at}: rank {step.rank} + rope_dims {rope_dims} caches {step.rank + rope_dims} numbers per token where "
            f"the parent caches {site.kv_dims}. Use less."
        )
    return _latent_of(site, aligned_rank(step.rank, rope_dims, min(full, site.kv_dims - rope_dims)), rope_dims)


def _lowrank(step: LowrankStep, at: str, site: AttentionSite) -> Latent:
    inputs = input_columns(site)
    full = min(site.kv_heads * site.head_dim, inputs) + min(site.kv_heads * site.value_dim, inputs)
    if step.rank is not None and step.rank > min(full, site.kv_dims):
        raise PlanError(f"{at}: rank {step.rank} is above full: K and V have {full} numbers. Use less.")
    numbers = aligned_rank(step.rank, 0, full) if step.rank is not None else kept_numbers(step.keep or 0, site)
    if step.layout == "grouped" and site.kv_heads % step.group:
        raise PlanError(f"{at}: groups of {step.group} do not divide {site.kv_heads} KV heads. Set group.")
    share = 0.42 if step.k_share is None else step.k_share
    if step.layout == "freq":
        if site.rotary is None or site.rotary.dims != site.head_dim:
            turning = 0 if site.rotary is None else site.rotary.dims
            raise PlanError(
                f"{at}: layout freq caches rotated keys, and {site.head_dim - turning} of {site.head_dim} key channels "
                "do not turn. Use layout joint, or mla."
            )
        rope_dims = min(site.kv_heads * site.head_dim, max(2, round(numbers * share / 2) * 2))
        if numbers - rope_dims < 1:
            raise PlanError(f"{at}: {numbers} numbers per token leave none for V. Raise keep or rank.")
        return _latent_of(site, numbers - rope_dims, rope_dims, k_rank=0)
    if numbers < 2:
        raise PlanError(f"{at}: {numbers} numbers per token are too few: K and V need one each. Raise keep or rank.")
    k_rank = min(numbers - 1, max(1, round(numbers * share)))
    return _latent_of(site, numbers, 0, rotate_on_read=True, k_rank=k_rank)


def _latent_of(site: AttentionSite, rank: int, rope_dims: int, **more: Any) -> Latent:
    keeps_positions = site.rotary is not None and bool(more.get("rotate_on_read"))
    return Latent(
        rank=rank, rope_dims=rope_dims, kv_heads=site.kv_heads, head_dim=site.head_dim, value_dim=site.value_dim,
        keeps_positions=keeps_positions, **more,
    )  # fmt: skip


def _headline(plan: Plan) -> str:
    a = plan.anatomy
    return f"[bold]{plan.recipe.name}[/bold] on {a.architecture}, {count(a.parameters)} parameters, {a.dtype}"


def _layers(plan: Plan) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("layers", "attention", "KV heads", "window", "bytes/token", "saved"):
        table.add_column(name, justify="left" if name in ("layers", "attention") else "right")

    def row(site: AttentionSite, b: LayerPlan, a: LayerPlan) -> tuple[str, ...]:
        saved = 1 - a.bytes_per_token / b.bytes_per_token if b.bytes_per_token else 0
        return (
            f"{site.heads} q heads x {site.head_dim}",
            f"{cached_form(b.project)}{' heads' if isinstance(a.project, Latent) else ''} → {cached_form(a.project)}"
            + (f", {retained_form(a.retain)}" if a.retain else "")
            + (f", {'V ' if a.value_owner is not None else ''}of layer {a.lenders[0]}" if a.lenders else ""),
            "all" if site.window is None else str(site.window),
            f"{b.bytes_per_token:,} → {a.bytes_per_token:,}",
            f"{saved:.0%}",
        )

    rows: dict[tuple[str, ...], list[int]] = {}
    for site, b, a in zip(plan.anatomy.sites, plan.before, plan.after, strict=True):
        rows.setdefault(row(site, b, a), []).append(site.layer)
    for cells, layers in rows.items():
        table.add_row(spans(layers), *cells)
    return table


def cached_form(project: Project) -> str:
    """What is cached, in a word."""
    if isinstance(project, Latent):
        if project.k_rank:
            return f"latent {project.k_rank} K, {project.value_rank} V"
        return f"latent {project.rank}" + (f" + {project.rope_dims}" if project.rope_dims else "")
    sizes = sorted({len(group) for group in project.groups})
    uneven = "" if len(sizes) == 1 else f" ({'/'.join(map(str, sizes))} q each)"
    return f"{project.kv_heads}{uneven}"


def retained_form(merge: Merge) -> str:
    """Method, ratio and window, in a word."""
    window = "" if merge.window is None else f" window {merge.window}"
    return f"{merge.method} {merge.ratio:.3g}x{window}"


def _totals(plan: Plan) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    columns = {"1 token": 1, **CONTEXTS}
    for i, name in enumerate(("KV cache, one sequence", *columns)):
        table.add_column(name, justify="right" if i else "left")
    for name, parent in (("before", True), ("after", False)):
        table.add_row(name, *(human_bytes(plan.cache_bytes(tokens, parent)) for tokens in columns.values()))
    if any(layer.retain for layer in plan.after):
        # Its pool of pages is sized by the ratio: what the gates do not reach does not fit.
        static = (plan.static_cache_bytes(tokens) for tokens in columns.values())
        table.add_row("after, static", *map(human_bytes, static))
    ratios = (plan.cache_bytes(t, True) / max(plan.cache_bytes(t), 1) for t in columns.values())
    table.add_row("smaller by", *(f"{ratio:.2f}x" for ratio in ratios))
    return table


def _notes(plan: Plan) -> list[str]:
    notes = [f"parameters: {count(plan.anatomy.parameters)} → {count(plan.parameters)}", f"loads in: {plan.engines}"]
    if plan.needs_calibration:
        notes.append("needs: calibration text (a few hundred documents)")
        notes += _roundings(plan)
        if any(isinstance(step, LatentStep) and _searches(step) for step in plan.recipe.steps):
            notes.append("the text decides per layer how the numbers are split; their sum stays")
        if any(isinstance(step, ShareStep) and step.layout in SEARCHED for step in plan.recipe.steps):
            notes.append("the text decides which layers read which; how many keep a cache stays")
    elif plan.wants_calibration:
        notes.append("asks for: calibration text (a few hundred documents); without it, quality falls")
    for step in (step for step in plan.recipe.steps if isinstance(step, MergeStep)):
        if step.gate.startswith("score:"):
            notes.append(
                f"{step.rewriter}: tokens go by {step.gate.removeprefix('score:')}, for which nothing is trained"
            )
        else:
            notes.append(
                f"{step.rewriter}: nothing goes before the gates are trained; bytes above are for {step.ratio:g}x"
            )
    for name, layers in plan.left_out.items():
        notes.append(
            f"left out: {layers} layer{'s' * (layers > 1)} that {name} counts; {plan.anatomy.architecture} loads none"
        )
    if plan.recipe.uptrain:
        notes.append(f"uptraining afterwards: {count(plan.recipe.uptrain.tokens)} tokens suggested")
    return notes


def _roundings(plan: Plan) -> list[str]:
    """Where latents are not as large as the recipe says, so that cache entries fill whole aligned loads."""
    notes: dict[str, list[int]] = {}
    for step in (step for step in plan.recipe.steps if isinstance(step, LatentStep)):
        for site, layer in plan.changed(step):
            project = layer.project
            if not isinstance(project, Latent):
                continue
            rank = project.dims if isinstance(step, LowrankStep) else project.rank
            allowed = None if step.keep is None else int(step.keep * site.kv_dims + 1e-9)
            if step.rank is not None and rank != step.rank:
                notes.setdefault(f"rank {step.rank} → {rank}: entries of whole 16 bytes", []).append(site.layer)
            elif allowed is not None and allowed != kept_numbers(step.keep or 0, site):
                text = f"keep {step.keep:g}: {allowed} → {project.dims} numbers per token, whole 16 bytes"
                notes.setdefault(text, []).append(site.layer)
    return [f"layers {spans(layers)}: {text}" for text, layers in notes.items()]


def _searches(step: LatentStep) -> bool:
    """Whether calibration text chooses between forms of the same size."""
    if isinstance(step, MlaStep):
        return step.keep is not None and step.rope_dims is None
    return isinstance(step, LowrankStep) and step.k_share is None
