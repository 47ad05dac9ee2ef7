"""The main path: parent and recipe in, converted model out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .anatomy import examine
from .assembly import in_own_class, in_parent_class, stored_dtypes
from .calibration import processes
from .calibration.journal import Journal, stream_bytes
from .calibration.text import Windows, load_tokenizer, read_windows, tokenizer_of
from .calibration.working_copy import WorkingCopy
from .checkpoints.adapters import base_folder, check_adapter
from .checkpoints.child_files import Parent, can_read_by_layers, write_child
from .checkpoints.classes import without_loader
from .checkpoints.files import Checkpoint, check_model, exact_dtype
from .checkpoints.parents import plain_parent
from .checkpoints.places import local_folder
from .checkpoints.provenance import provenance
from .checkpoints.storage import check_whole, load_parent, save_like
from .checkpoints.streaming import can_stream, stream
from .checkpoints.unfinished import manifest, work_folder
from .checkpoints.writing import check_output, check_space
from .errors import PlanError, UnsupportedModel
from .plan import Plan
from .plan import plan as make_plan
from .recipe import Recipe
from .rewriters import rewriter_for
from .runtime.layout import LayerPlan
from .runtime.modeling import SurgeryMixin
from .torch_state import plain_torch

_log = logging.getLogger(__name__)

SAMPLES = 256
"""Windows of calibration text at most."""
STREAMS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""Formats of the hidden states over the calibration text that are kept between layers."""


@dataclass(frozen=True)
class _Work:
    """What a plan is carried out with."""

    windows: Windows | None
    seed: int
    streams: torch.dtype
    journal: Journal | None = None
    """Where layers that are done are put away."""


@plain_torch()
def convert(
    model_or_path: Any,
    recipe: Any,
    *,
    calibration: Any = None,
    tokenizer: Any = None,
    samples: int = SAMPLES,
    length: int | None = None,
    seed: int = 0,
    streams: str = "float32",
    merge_adapter: bool = False,
) -> PreTrainedModel:
    """Convert a pretrained model; the parent stays as it is.

    Args:
        model_or_path: model, folder, GGUF or Hub id. A model under torch.compile or DataParallel is taken out of it;
            one with weights offloaded by accelerate is brought together on the CPU.
        recipe: shipped name, path, dict or Recipe.
        calibration: text that the statistics are streamed from: a file, a list of strings, or token ids
            [windows, tokens]. None uses the data-free form of the recipe.
        tokenizer: defaults to the one beside the model's `name_or_path`.
        samples, length: at most `samples` windows of `length` tokens (default: the model's positions, at most 512;
            token ids: as they are).
        seed: of everything random.
        streams: format of the hidden states over the text that are kept between layers: `float32`, or `bfloat16` for
            half of that memory, which rounds what is fitted on.
        merge_adapter: merge the adapter (of the library peft) of the model, or of the folder, into its weights first.

    Returns:
        A model in the parent's dtype. Where the result can be said in the parent's own class (see `Plan.native`) it
        is one; otherwise a `Surgery<Parent>` that runs with this library. `config.surgery` holds the provenance.

    Raises:
        RecipeError, PlanError, UnsupportedModel, CheckpointError: before any work is done.

    Examples:
        >>> import surgery
        >>> from surgery.bundled import SMALL
        >>> parent = surgery.load(SMALL)
        >>> child = surgery.convert(parent, "gqa-2x")
        >>> type(child).__name__, parent.config.num_key_value_heads, child.config.num_key_value_heads
        ('LlamaForCausalLM', 8, 4)
    """
    recipe, stream_dtype = Recipe.load(recipe), _stream_dtype(streams)
    parent, told = _parent(model_or_path, merge_adapter)
    if isinstance(parent, SurgeryMixin):
        raise UnsupportedModel(
            f"{type(parent).__name__}: was converted by surgery already. Convert its parent, with all steps in one "
            "recipe."
        )
    check_model(parent)
    recipe = recipe.told(lambda: tokenizer or tokenizer_of(parent.config, told))
    plan = make_plan(parent, recipe)
    _check_calibration(plan, calibration, samples, length, streams)
    for name, layers in plan.left_out.items():
        _log.warning("%s loads none of the layers that %s counts (%d).", plan.anatomy.architecture, name, layers)
    if calibration is not None and tokenizer is None and told:
        tokenizer = tokenizer_of(parent.config, told)
    windows = _windows(calibration, parent.config, tokenizer, length, samples)
    return _carry_out(without_loader(parent), plan, _Work(windows, seed, stream_dtype), told)[0]


def _stream_dtype(name: str) -> torch.dtype:
    if name not in STREAMS:
        raise PlanError(f"streams: {name!r} must be one of {', '.join(STREAMS)}.")
    return STREAMS[name]


def _carry_out(
    parent: PreTrainedModel, plan: Plan, work: _Work, told: dict[str, Any], left_out: Sequence[str] = ()
) -> tuple[PreTrainedModel, Plan]:
    """The result of a plan, and the plan with what the text has decided.

    Args:
        left_out: tensors of the parent's files that are not in the result; its provenance names them.
    """
    copy_ = WorkingCopy(parent, plan.anatomy)
    plan = _rewrite(copy_, plan, work)
    origin = provenance(plan, parent.config, work.windows, work.seed, left_out, told, copy_.held_out)
    return (in_parent_class if plan.native else in_own_class)(parent, plan, copy_, origin), plan


def _rewrite(copy_: WorkingCopy, plan: Plan, work: _Work) -> Plan:
    """Carry out the steps of a plan on a working copy; returns the plan with what the text has decided."""
    for line in plan.skipped if work.windows is not None else ():
        _log.warning("%s", line)
    copy_.journal, copy_.stream_dtype = work.journal, work.streams
    carry_out_steps(copy_, plan, work.windows, work.seed)
    return plan if plan.native else plan.settled(map(copy_.settle, plan.after))


def carry_out_steps(copy_: WorkingCopy, plan: Plan, windows: Windows | None, seed: int, done: int = 0) -> None:
    """Rewrite a working copy by the steps of a plan, in order, but for the first `done` ones.

    Neighbours that go together are carried out as one.
    """
    together: list[tuple[str, Any, list[LayerPlan]]] = []
    for step in plan.recipe.steps[done:]:
        method, layers = rewriter_for(step, seed), [layer for _, layer in plan.changed(step)]
        if together and getattr(method, "goes_with", lambda _: False)(together[-1][1]):
            together[-1][2].extend(layers)
        else:
            together.append((step.rewriter, method, layers))
    for name, method, layers in together:
        copy_.doing = name
        method.convert(copy_, layers, windows)


def _parent(model_or_path: Any, merge_adapter: bool) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The plain parent, and what there is to tell of the way to it."""
    if not isinstance(model_or_path, (str, Path)):
        return plain_parent(model_or_path, merge_adapter)
    loaded, told = load_parent(model_or_path, merge_adapter)
    parent, more = plain_parent(loaded)
    return parent, told | more


def _check_calibration(plan: Plan, calibration: Any, samples: int, length: int | None, streams: str) -> None:
    """Refuse a recipe without its text, and what is about text where there is none; say where text is not read."""
    if calibration is not None:
        if not plan.wants_calibration:
            _log.warning("%s: no step reads calibration text; the result is as without.", plan.recipe.name)
        return
    if plan.needs_calibration:
        step = next(step.rewriter for step in plan.recipe.steps if step.text == "needed")
        raise PlanError(f"{plan.recipe.name}: {step} asks for calibration text. Give a few hundred documents of it.")
    for name, is_given in (("samples", samples != SAMPLES), ("length", length), ("streams", streams != "float32")):
        if is_given:
            raise PlanError(f"{name}: is of calibration text, and none is given. Give some, or leave it out.")


def _windows(calibration: Any, config: Any, tokenizer: Any, length: int | None, samples: int) -> Windows | None:
    if calibration is None:
        return None
    return read_windows(config, calibration, tokenizer, length=length, samples=samples)


@plain_torch()
def convert_checkpoint(
    source: str | Path,
    recipe: Any,
    out: str | Path,
    *,
    calibration: Any = None,
    tokenizer: Any = None,
    samples: int = SAMPLES,
    length: int | None = None,
    seed: int = 0,
    streams: str = "float32",
    overwrite: bool = False,
    merge_adapter: bool = False,
) -> Plan:
    """Convert a checkpoint on disk into another.

    Tensors are read, rewritten and written layer by layer, where the files hold them as the model does and no adapter
    is merged: the model is never in memory as a whole. Otherwise as `convert`, then `save`.

    With calibration, layers that are done lie in a folder beside `out`, whose name ends in `.unfinished`, until
    all is done: the same call goes on from there after an interruption. In several processes (see
    `calibration.processes.joined`) each reads its part of the text, the first one writes, and nothing is put away.

    The adapter that lies in the folder, beside weights or alone, is merged into them where `merge_adapter` says so.

    Returns:
        The plan that was carried out, with what the text has decided: what the checkpoint's own config says.

    Raises:
        RecipeError, PlanError, UnsupportedModel, CheckpointError: `out` then does not exist, or is as it was.

    Examples:
        >>> import surgery, tempfile
        >>> from surgery.bundled import SMALL
        >>> out = tempfile.mkdtemp() + "/child"
        >>> plan = surgery.convert_checkpoint(SMALL, "gqa-2x", out)
        >>> surgery.load(out).config.num_key_value_heads
        4
    """
    recipe, stream_dtype = Recipe.load(recipe), _stream_dtype(streams)
    check_output(out, overwrite)
    folder = local_folder(source)
    check_adapter(folder, merge_adapter)
    base = base_folder(folder)
    checkpoint = Checkpoint(base)
    recipe = recipe.told(lambda: tokenizer or load_tokenizer(folder) or load_tokenizer(base))
    plan = make_plan(base, recipe)
    _check_calibration(plan, calibration, samples, length, streams)
    fit = check_whole(checkpoint)
    left_out = fit.left_out
    if left_out:
        _log.warning(
            "%s: %s does not load %s; the result is without.", base, plan.anatomy.architecture, ", ".join(left_out)
        )
    check_space(out, sum(f.stat().st_size for f in base.glob("*.safetensors")))
    if calibration is None and not merge_adapter and can_stream(plan, fit):
        stream(checkpoint, plan, fit, out, tokenizer=tokenizer, seed=seed, overwrite=overwrite)
        return plan
    windows = None
    if calibration is not None:
        reader = tokenizer
        if tokenizer is None and not isinstance(calibration, (Tensor, Windows)):
            reader = load_tokenizer(folder) or load_tokenizer(base)
        windows = _windows(calibration, plan.anatomy.config, reader, length, samples)
    work = _Work(windows, seed, stream_dtype)
    with _journal(out, folder, base, plan, work) as journal:
        work = replace(work, journal=journal)
        if not merge_adapter and can_read_by_layers(plan, fit):
            plan, write = _by_layers(Parent(checkpoint, fit, plan), plan, work, left_out)
        else:
            parent, told = load_parent(folder, merge_adapter, dtype=exact_dtype(checkpoint, fit, plan.anatomy.config))
            model, plan = _carry_out(parent, _as_built(plan, parent), work, told, left_out)
            dtypes = stored_dtypes(model, plan.anatomy.sites, checkpoint, fit)
            write = partial(save_like, model, checkpoint, dtypes)
        if processes.rank() == 0:
            write(out, tokenizer=tokenizer, overwrite=overwrite)
        return plan


def _by_layers(parent: Parent, plan: Plan, work: _Work, left_out: Sequence[str]) -> tuple[Plan, Callable[..., None]]:
    """Convert a parent that is not in memory; returns the plan with what the text has decided, and what writes."""
    plan = _as_built(plan, parent.hollow)
    copy_ = parent.working_copy(plan)
    plan = _rewrite(copy_, plan, work)
    origin = provenance(plan, parent.hollow.config, work.windows, work.seed, left_out, held_out=copy_.held_out)
    return plan, partial(write_child, parent, plan, copy_, origin)


@contextmanager
def _journal(out: str | Path, folder: Path, base: Path, plan: Plan, work: _Work) -> Iterator[Journal | None]:
    """Where the layers of a conversion to `out` are put away; None without text, and in several processes."""
    if work.windows is None or processes.count() > 1:
        yield None
        return
    width = plan.anatomy.sites[0].hidden_size
    lenders = {lender for layer in plan.after for lender in layer.lenders}
    # The result is at most as large as the parent, and so are the layers that are put away, but in float32.
    weights = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    numbers = sum(2 * site.hidden_size * (site.heads + site.kv_heads) * site.head_dim for site, _ in plan.changed())
    check_space(out, weights + 4 * numbers + stream_bytes(work.windows, width, work.streams, len(lenders)))
    streams = str(work.streams).removeprefix("torch.")
    with work_folder(out, manifest(folder, base, plan, work.windows, work.seed, streams)) as journal:
        yield journal


def _as_built(plan: Plan, parent: PreTrainedModel) -> Plan:
    """The plan for a parent whose files may hold buffers that say otherwise than its config."""
    # Caches are in the dtype that the class computes in, whatever the files hold.
    anatomy = replace(examine(parent), dtype=plan.anatomy.dtype)
    return plan if anatomy.sites == plan.anatomy.sites else make_plan(anatomy, plan.recipe)
