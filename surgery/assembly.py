"""The model that a plan and a working copy make: in the parent's own class, or as `Surgery<Parent>`."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .anatomy import examine
from .attention.weights import like, parameter_names, write_changed
from .calibration.working_copy import WorkingCopy
from .checkpoints.files import Checkpoint, Fit
from .errors import PlanError
from .plan import Plan
from .planning.parent_class import meta_model, native_config, without_unbuilt_layers
from .runtime.canonical import origin_of
from .runtime.layout import AttentionSite
from .runtime.modeling import SurgeryMixin, from_parent, rebuild


def in_parent_class(parent: PreTrainedModel, plan: Plan, copy_: WorkingCopy, origin: dict[str, Any]) -> PreTrainedModel:
    """The result in the parent's own class: fewer KV heads in the config, smaller parameters, nothing else."""
    config = native_config(parent.config, plan.anatomy.sites, plan.after[0].project.kv_heads, type(parent))
    if config is None:
        raise PlanError(
            f"{type(parent).__name__} has no config field that gives all layers {plan.after[0].project.kv_heads} KV "
            "heads."
        )
    old = parent.state_dict()
    tensors: dict[str, Tensor] = {}
    new_sites = {site.layer: site for site in examine(meta_model(config, type(parent))).sites}
    for site in plan.anatomy.sites:
        if site.layer in copy_.converted:
            tensors |= write_changed(copy_.read(site.layer), new_sites[site.layer], site, old.__getitem__)
    # A norm with a parameter per head (StableLM) loses those of heads that are gone.
    rewritten = {name for site in plan.anatomy.sites for name in parameter_names(site) if site.layer in copy_.converted}
    # Clones: a parent that goes on training must not change what was made of it.
    tensors |= {name: tensor.clone() for name, tensor in old.items() if name not in rewritten}
    config.surgery = origin
    child = rebuild(parent, type(parent), config, tensors)
    if hasattr(parent, "_weight_conversions"):  # how files name what the class names otherwise (experts one by one)
        child._weight_conversions = parent._weight_conversions
    child.config.name_or_path = ""  # it lies nowhere yet
    return child


def in_own_class(parent: PreTrainedModel, plan: Plan, copy_: WorkingCopy, origin: dict[str, Any]) -> PreTrainedModel:
    """The result as `Surgery<Parent>`, for layers that differ from each other or that the class cannot say."""
    old = parent.state_dict()
    weights = {
        site.layer: {
            name: like(tensor, old[origin_of(site, name) or site.k.weight])
            for name, tensor in copy_.canonical(site.layer).items()
        }
        for site in plan.anatomy.sites
        if site.layer in copy_.converted
    }
    parent = copy.deepcopy(parent)
    parent.config = without_unbuilt_layers(parent.config, type(parent))
    child = from_parent(parent, plan.anatomy.sites, plan.after, origin, weights)
    child.config.name_or_path = ""
    return child


def stored_dtypes(
    model: PreTrainedModel, sites: Sequence[AttentionSite], checkpoint: Checkpoint, fit: Fit
) -> dict[str, torch.dtype]:
    """By name in the state dict of a result: the dtype in which the files hold what it comes from, if they do.

    Integers are left out: frequencies travel as the bits of float32 numbers, and no cast may touch them.
    """
    dtypes = {}
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        origin = name
        if isinstance(model, SurgeryMixin) and (
            site := next((s for s in sites if name.startswith(f"{s.module}.")), None)
        ):
            origin = origin_of(site, name.removeprefix(f"{site.module}.")) or site.k.weight
        found = [dtype for n in fit.origins.get(origin, ()) if (dtype := checkpoint.weight_dtype(n)) is not None]
        if found:
            dtypes[name] = reduce(torch.promote_types, found)
    return dtypes
