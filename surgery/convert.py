"""The main path: parent and recipe in, converted model out."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .anatomy import examine
from .checkpoint import Checkpoint, check_model, check_output, check_space, local_folder
from .errors import PlanError
from .native import native_config
from .plan import Plan
from .plan import plan as make_plan
from .provenance import provenance
from .recipe import LatentStep, Recipe, ShareStep
from .rewriters import rewriter_for
from .rewriters.attention_weights import parameter_names, write_attention
from .rewriters.latent_steps import LatentStepCopy
from .rewriters.share_copy import SharedCopy
from .runtime.modeling import from_parent
from .storage import check_whole, load, save
from .streaming import can_stream, stream
from .text import Windows, load_tokenizer, load_windows, tokenizer_of
from .working_copy import WorkingCopy


def convert(
    model_or_path: Any,
    recipe: Any,
    *,
    calibration: Any = None,
    tokenizer: Any = None,
    samples: int = 256,
    length: int | None = None,
    seed: int = 0,
) -> PreTrainedModel:
    """Convert a pretrained model; the parent stays as it is.

    Args:
        model_or_path: model, folder or Hub id.
        recipe: shipped name, path, dict or Recipe.
        calibration: text that the statistics are streamed from: a file, a list of strings, or token ids
            [windows, tokens]. None uses the data-free form of the recipe.
        tokenizer: defaults to the one beside the model's `name_or_path`.
        samples, length: at most `samples` windows of `length` tokens (default: the context, at most 512).
        seed: of everything random.

    Returns:
        A model in the parent's dtype. Where the result can be said in the parent's own class (see `Plan.native`) it
        is one; otherwise a `Surgery<Parent>` that runs with this library. `config.surgery` holds the provenance.

    Raises:
        RecipeError, PlanError, UnsupportedModel, CheckpointError: before any work is done.
    """
    recipe = Recipe.load(recipe)
    parent = model_or_path if isinstance(model_or_path, PreTrainedModel) else load(model_or_path)
    check_model(parent)
    plan = make_plan(parent, recipe)
    _check_calibration(plan, calibration)
    windows = _windows(calibration, parent.config, tokenizer, length, samples)
    torch.manual_seed(seed)
    copy_ = _copy_for(recipe)(parent, plan.anatomy)
    for step in recipe.steps:
        rewriter_for(step, seed).convert(copy_, [layer for _, layer in plan.changed(step)], windows)
    if not plan.native:
        plan = plan.settled(map(copy_.settle, plan.after))
    origin = provenance(plan, parent.config, windows, seed)
    return (_native if plan.native else _own)(parent, plan, copy_, origin)


def _copy_for(recipe: Recipe) -> type[WorkingCopy]:
    """The working copy that the steps need: one runs latents, one lets layers read the caches of others."""
    if any(isinstance(step, ShareStep) for step in recipe.steps):
        return SharedCopy
    return LatentStepCopy if any(isinstance(step, LatentStep) for step in recipe.steps) else WorkingCopy


def _check_calibration(plan: Plan, calibration: Any) -> None:
    if calibration is None and plan.needs_calibration:
        step = next(step.rewriter for step in plan.recipe.steps if step.needs_text)
        raise PlanError(f"{plan.recipe.name}: {step} asks for calibration text. Give a few hundred documents of it.")


def _windows(calibration: Any, config: Any, tokenizer: Any, length: int | None, samples: int) -> Windows | None:
    if calibration is None:
        return None
    if not isinstance(calibration, (Tensor, Windows)) and tokenizer is None:
        tokenizer = tokenizer_of(config)
    length = length or min(getattr(config, "max_position_embeddings", None) or 512, 512)
    return load_windows(calibration, tokenizer, vocab_size=config.vocab_size, length=length, samples=samples)


def _native(parent: PreTrainedModel, plan: Plan, copy_: WorkingCopy, origin: dict[str, Any]) -> PreTrainedModel:
    """The result in the parent's own class: fewer KV heads in the config, smaller parameters, nothing else."""
    config = native_config(plan.anatomy.config, plan.anatomy.sites, plan.after[0].project.kv_heads)
    if config is None:
        raise PlanError(f"{type(parent).__name__} cannot say {plan.after[0].project.kv_heads} KV heads.")
    rewritten = {name for site, _ in plan.changed() for name in parameter_names(site)}
    kept = {name: tensor for name, tensor in parent.state_dict().items() if name not in rewritten}
    tensors = {name: tensor.detach().clone() for name, tensor in kept.items()}
    for site in examine(config).sites:
        if site.layer in copy_.converted:
            tensors |= write_attention(copy_.read(site.layer), site, copy_.tensor)
    tensors = {
        name: tensor.to(parent.dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()
    }
    config.surgery = origin
    child = type(parent).from_pretrained(None, config=config, state_dict=tensors, dtype=parent.dtype)
    return _finish(child, parent)


def _own(parent: PreTrainedModel, plan: Plan, copy_: WorkingCopy, origin: dict[str, Any]) -> PreTrainedModel:
    """The result as `Surgery<Parent>`, for layers that differ from each other or that the class cannot say."""
    weights = {layer: copy_.canonical(layer) for layer in copy_.converted}
    weights = {
        layer: {name: t.to(parent.dtype) if t.is_floating_point() else t for name, t in tensors.items()}
        for layer, tensors in weights.items()
    }
    child = from_parent(copy.deepcopy(parent), plan.anatomy.sites, plan.after, origin, weights)
    return _finish(child, parent)


def _finish(child: PreTrainedModel, parent: PreTrainedModel) -> PreTrainedModel:
    child.config.name_or_path = ""  # it lies nowhere yet
    if parent.can_generate():
        child.generation_config = copy.deepcopy(parent.generation_config)
    torch.nn.Module.to(child, parent.device)  # transformers wraps its own `to` without its type
    return child.train(parent.training)


def convert_checkpoint(
    source: str | Path,
    recipe: Any,
    out: str | Path,
    *,
    calibration: Any = None,
    tokenizer: Any = None,
    samples: int = 256,
    length: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> Plan:
    """Convert a checkpoint on disk into another.

    Without calibration, and where the result is of the parent's own class, tensors are read, rewritten and written
    layer by layer: the model is never in memory as a whole. Otherwise as `convert`, then `save`.

    Returns:
        The plan that was carried out.

    Raises:
        RecipeError, PlanError, UnsupportedModel, CheckpointError: `out` then does not exist, or is as it was.
    """
    recipe = Recipe.load(recipe)
    check_output(out, overwrite)
    folder = local_folder(source)
    checkpoint = Checkpoint(folder)
    plan = make_plan(folder, recipe)
    _check_calibration(plan, calibration)
    check_whole(checkpoint)
    load_tokenizer(folder, plan.anatomy.vocab_size)  # refuses one that does not belong to the model
    check_space(out, sum(f.stat().st_size for f in folder.glob("*.safetensors")))
    if calibration is None and can_stream(plan, checkpoint):
        stream(checkpoint, plan, out, seed=seed, overwrite=overwrite)
        return plan
    if calibration is not None:
        reader = tokenizer or load_tokenizer(folder, plan.anatomy.vocab_size)
        calibration = _windows(calibration, plan.anatomy.config, reader, length, samples)
    model = convert(load(folder), recipe, calibration=calibration, seed=seed)
    save(model, out, tokenizer=tokenizer, overwrite=overwrite)
    return plan
