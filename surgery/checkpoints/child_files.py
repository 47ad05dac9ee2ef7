"""Write a converted checkpoint tensor by tensor: neither the parent nor the child is ever in memory as a whole."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..anatomy import examine
from ..attention.weights import like, parameter_names, write_changed
from ..calibration.layers import layer_parameters, shell_of, stack_of
from ..calibration.working_copy import WorkingCopy
from ..console import progress
from ..errors import PlanError, UnsupportedModel
from ..plan import Plan
from ..planning.parent_class import meta_model, native_config, without_unbuilt_layers
from ..runtime.calling import called_kinds
from ..runtime.canonical import kept_weights, origin_of
from ..runtime.layout import AttentionSite
from ..runtime.modeling import child_parts, surgery_class
from .companions import copy_companions
from .files import SINGLE, Checkpoint, Fit, exact_dtype, kept_back, read_json
from .hollow import hollow_model, is_as_stored, with_values
from .provenance import write_provenance
from .storage import copy_dtypes
from .writing import new_folder, write_shards

Named = Iterator[tuple[str, Tensor]]


class Parent:
    """A checkpoint as a parent whose decoder layers are read one at a time.

    Args:
        sites: its attentions, which stand in one list of layers.
    """

    def __init__(self, checkpoint: Checkpoint, fit: Fit, plan: Plan) -> None:
        self.checkpoint, self.fit = checkpoint, fit
        sites = plan.anatomy.sites
        self.stack, self.place = stack_of(sites)
        names = meta_model(plan.anatomy.config, plan.anatomy.kind)
        left = set(layer_parameters(names, sites))
        for name in checkpoint.names():
            if name in left or name in fit.unused:
                checkpoint.get(name)  # what is damaged is to be found before any work is done
        self.hollow = hollow_model(checkpoint, fit, left)
        dtype = exact_dtype(checkpoint, fit, plan.anatomy.config)
        own = getattr(torch, str(plan.anatomy.config.dtype).removeprefix("torch."), None)
        self._is_wide = torch.float32 in (dtype, own)

    def working_copy(self, plan: Plan) -> WorkingCopy:
        """The copy that methods convert."""
        sites = plan.anatomy.sites
        return WorkingCopy.of_checkpoint(
            plan.anatomy, lambda: shell_of(self.hollow, layer_parameters(self.hollow, sites), shares=True), self.read
        )

    def read(self, name: str) -> Tensor:
        """A parameter in the dtype in which the model would be loaded, which loses no digits."""
        if name not in self.fit.same:
            (name,) = self.fit.origins[name]
        found = self.checkpoint.get(name)
        return found.float() if self._is_wide and found.is_floating_point() else found

    def stored_dtype(self, name: str) -> torch.dtype | None:
        """The dtype of a parameter in the files; None for one that is no weight."""
        found = [self.checkpoint.weight_dtype(n) for n in self.fit.origins.get(name, ())]
        known = [dtype for dtype in found if dtype is not None]
        return reduce(torch.promote_types, known) if known else None

    def called(self, sites: tuple[AttentionSite, ...]) -> PreTrainedModel:
        """The hollow model with those layers in it that show how attention is called."""
        inside = tuple(f"{self.stack}.{self.place[site.layer]}." for site in called_kinds(self.hollow, sites).values())
        names = [name for name in layer_parameters(self.hollow, sites) if name.startswith(inside)]
        return with_values(self.hollow, {name: self.read(name) for name in names})


def can_read_by_layers(plan: Plan, fit: Fit) -> bool:
    """Whether files hold the model as it is, its attentions standing in one list of layers."""
    try:
        stack_of(plan.anatomy.sites)
    except UnsupportedModel:
        return False
    return is_as_stored(plan.anatomy.config, fit)


def write_child(
    parent: Parent,
    plan: Plan,
    copy_: WorkingCopy,
    origin: dict[str, Any],
    out: str | Path,
    *,
    tokenizer: Any = None,
    overwrite: bool = False,
) -> None:
    """Write what a plan and a working copy make of a parent, as `save_like` writes the model that they make.

    Memory: one tensor.

    Args:
        origin: the provenance.
        tokenizer: written in the place of the checkpoint's.
    """
    made, replaced, rewritten = (_in_parent_class if plan.native else _in_own_class)(parent, plan, copy_, origin)
    checkpoint = parent.checkpoint
    names = [name for name in checkpoint.names() if name not in parent.fit.unused and not replaced(name)]

    def tensors() -> Named:
        with progress("writing", len(names)) as advance:
            for name in names:
                advance(1)
                yield name, checkpoint.get(name)
        yield from rewritten

    with new_folder(out, overwrite) as folder:
        with kept_back([]):
            made.save_pretrained(folder, state_dict={})
        (folder / SINGLE).unlink(missing_ok=True)
        # A class computes in the dtype that its config names, whatever its files hold: that stays as it was, too.
        config = read_json(folder / "config.json")
        copy_dtypes(read_json(checkpoint.folder / "config.json"), config)
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        write_shards(folder, tensors())
        copy_companions(checkpoint.folder, folder, tokenizer)
        write_provenance(folder, origin)


def _in_parent_class(
    parent: Parent, plan: Plan, copy_: WorkingCopy, origin: dict[str, Any]
) -> tuple[PreTrainedModel, Callable[[str], bool], Named]:
    """The child without weights, which of the parent's tensors it has no more, and those that it has instead."""
    sites, kind = plan.anatomy.sites, type(parent.hollow)
    config = native_config(parent.hollow.config, sites, plan.after[0].project.kv_heads, kind)
    if config is None:
        raise PlanError(
            f"{kind.__name__} has no config field that gives all layers {plan.after[0].project.kv_heads} KV heads."
        )
    new_sites = {site.layer: site for site in examine(meta_model(config, kind)).sites}
    converted = [site for site in sites if site.layer in copy_.converted]
    gone = {name for site in converted for name in parameter_names(site)}

    def rewritten() -> Named:
        for site in converted:
            found = write_changed(copy_.read(site.layer), new_sites[site.layer], site, parent.read)
            for name, tensor in found.items():
                yield name, _as_stored(tensor, parent.stored_dtype(name))

    config.surgery = origin
    return _child(parent, kind, config), gone.__contains__, rewritten()


def _in_own_class(
    parent: Parent, plan: Plan, copy_: WorkingCopy, origin: dict[str, Any]
) -> tuple[PreTrainedModel, Callable[[str], bool], Named]:
    """As `_in_parent_class`."""
    sites = plan.anatomy.sites
    plan_of = {layer.layer: layer for layer in plan.after}

    def tensors_of(site: AttentionSite) -> dict[str, Tensor]:
        if site.layer not in copy_.converted:
            return kept_weights(site, plan_of[site.layer], parent.read)
        return {
            name: like(tensor, parent.read(origin_of(site, name) or site.k.weight))
            for name, tensor in copy_.canonical(site.layer).items()
        }

    def rewritten() -> Named:
        for site in sites:
            for name, tensor in tensors_of(site).items():
                dtype = parent.stored_dtype(origin_of(site, name) or site.k.weight)
                yield f"{site.module}.{name}", _as_stored(tensor, dtype)

    shapes = {site.layer: {n: t.to("meta") for n, t in tensors_of(site).items()} for site in sites}
    model = parent.called(sites)
    model.config = without_unbuilt_layers(model.config, type(model))
    config, _, _ = child_parts(model, sites, plan.after, origin, shapes)
    swapped = tuple(site.module + "." for site in sites)
    return _child(parent, surgery_class(type(model)), config), lambda name: name.startswith(swapped), rewritten()


def _child(parent: Parent, kind: type[PreTrainedModel], config: Any) -> PreTrainedModel:
    """A model on the meta device, for what is written beside its weights."""
    with torch.device("meta"):
        made = kind(config)
    if parent.hollow.can_generate():
        made.generation_config = parent.hollow.generation_config
    made.config.name_or_path = ""
    return made


def _as_stored(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
