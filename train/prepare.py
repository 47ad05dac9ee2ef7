"""Read and check everything that a training run needs, before any work."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from surgery.assembly import stored_dtypes
from surgery.calibration.text import has_surplus_ids, read_windows, window_length
from surgery.checkpoints.adapters import adapter_in
from surgery.checkpoints.files import Checkpoint, read_json
from surgery.checkpoints.places import local_folder
from surgery.checkpoints.provenance import provenance_of
from surgery.checkpoints.storage import check_whole, load
from surgery.checkpoints.writing import check_output
from surgery.errors import CheckpointError, RecipeError, UnsupportedModel
from surgery.plan import Plan, plan
from surgery.recipe import Recipe, Uptrain
from surgery.runtime.attention import SurgeryAttention
from surgery.runtime.canonical import canonical_weights

from .data import PackedText, split_batch
from .documents import open_documents, training_tokenizer
from .gates import check_length
from .parent import Parent, check_parent, check_sites, different_weights, output_embedding, read_head
from .run import Run, Setup, world_and_rank
from .schedule import schedule
from .trainer import core


def prepare(run: Run) -> Setup:
    """Read and check everything that a run needs."""
    world, _ = world_and_rank()
    folder = local_folder(run.model)
    if run.resume not in (None, "auto") and not (Path(str(run.resume)) / "trainer_state.json").is_file():
        raise CheckpointError(f"{run.resume}: no checkpoint of a training run. Use --resume auto, or name its folder.")
    check_output(run.out, overwrite=True)
    model = load(folder, dtype=torch.float32)
    origin = provenance_of(model)
    section = resolve_uptrain(run, origin)
    if run.control:
        section = dataclasses.replace(section, kl=0.0, ce=1.0, hidden=0.0, layer_local=0.0)
    for name in ("held_out_windows", "eval_steps") if run.held_out is None else ():
        if getattr(run, name) != getattr(Run, name):
            raise RecipeError(f"--{name.replace('_', '-')}: is of held-out text. Give --held-out, or leave it out.")
    if section.train == "lora":
        _peft()
    if run.keep_logits is not None and (section.hidden or not section.kl):
        raise RecipeError("--keep-logits: serves the KL alone. Set kl above 0 and hidden=0, or leave it out.")
    parent_name, parent = _load_parent(run, origin, folder)
    if run.control and section.train == "lora" and adapter_in(local_folder(parent_name)) is not None:
        raise RecipeError(
            f"uptrain.train: lora, and {parent_name} holds an adapter itself, so that the new one would have no base "
            "on disk. Save the merged model and pass --parent, or set train=attention."
        )
    check_parent(model, parent, parent_name)
    made = plan(parent, Recipe.recorded(origin["recipe"]))
    check_sites(model, made.anatomy.sites, parent_name)
    converted = changed_attention(model, parent, made)
    if not converted:
        raise RecipeError(f"{origin['recipe'].get('name')}: changes no layer, so there is nothing to train.")
    config = model.config.get_text_config(decoder=True)
    length = window_length(model.config, section.length, 4096, "uptrain.length")
    micro_batch, accumulation = split_batch(section.batch, world, run.micro_batch)
    documents = open_documents(run.data)
    tokenizer = training_tokenizer(str(folder))
    held_out = None
    if run.held_out is not None:
        held_out = read_windows(
            model.config, run.held_out, tokenizer, length=length, samples=run.held_out_windows, where="held-out text"
        )
    attention = tuple(dict.fromkeys(site.module for site in made.anatomy.sites))
    student = parent if run.control else model
    trained = tuple(converted if section.train in ("converted", "lora") else attention)
    head = read_head(student)
    teacher = None
    if not run.control and (section.kl or section.hidden or section.layer_local or held_out is not None):
        teacher = _teacher(run, section, model, parent, attention, converted, trained, head, str(parent_name), origin)
    if section.separate_documents:
        check_separates(student)
    torch.manual_seed(run.seed)  # of adapters
    check_length(student, length, section.gate_budget_per == "head")
    wrapped = select(student, section, trained, str(local_folder(parent_name) if run.control else folder))
    setup = Setup(
        run=run,
        uptrain=section,
        length=length,
        model=wrapped,
        origin={} if run.control else origin,
        folder=folder,
        parent_name=str(parent_name),
        parent=teacher,
        trained_attention=trained,
        documents=documents,
        tokenizer=tokenizer,
        schedule=schedule(section, length, config.hidden_size),
        world=world,
        micro_batch=micro_batch,
        accumulation=accumulation,
        held_out=held_out,
        head=head,
        dtype=_disk_dtype(folder),
        dtypes=_other_dtypes(student, local_folder(parent_name) if run.control else folder, _disk_dtype(folder)),
    )
    if has_surplus_ids(tokenizer, config.vocab_size):
        packed_text(setup).check(setup.schedule.steps + 1)  # Trainer fetches one batch ahead
    return setup


def packed_text(setup: Setup) -> PackedText:
    """What this device reads."""
    world, rank = world_and_rank()
    return PackedText(
        setup.documents,
        setup.tokenizer,
        batch=setup.uptrain.batch,
        length=setup.length,
        seed=setup.run.seed,
        rank=rank,
        world=world,
        micro_batch=setup.micro_batch,
        separate=setup.uptrain.separate_documents,
        repeat=setup.run.keep_logits is not None,
        vocab_size=core(setup.model).config.get_text_config(decoder=True).vocab_size,
    )


def _load_parent(run: Run, origin: Mapping[str, Any], folder: Path) -> tuple[str, PreTrainedModel]:
    """Name of the parent, and the parent in float32: the one given, else what the model says it was converted from.

    Raises:
        CheckpointError: the model does not say it, or had an adapter merged that lies nowhere.
    """
    adapter = origin.get("adapter") or {}
    name = run.parent or (adapter.get("folder") if adapter else origin.get("parent"))
    if not name:
        raise CheckpointError(
            f"{folder}: its parent was {origin.get('parent')} with an adapter ({adapter['kinds']}) merged in memory. "
            "Save that merged model, and pass --parent."
            if adapter
            else f"{folder}: does not say what it was converted from. Pass --parent."
        )
    if not adapter or adapter_in(local_folder(name)) is None:
        return name, load(name, dtype=torch.float32)
    # In its own dtype, as the conversion merged it: rounded before, it would be another parent.
    return name, load(name, merge_adapter=True).float()


def resolve_uptrain(run: Run, origin: Mapping[str, Any]) -> Uptrain:
    """The `uptrain` section: of the run file, else of the recipe named, else of the model's own; then the overrides.

    `layer_local` is settled by how the model was converted.

    Raises:
        RecipeError: there is none, or a key or value is wrong.
    """
    own = Recipe.recorded(origin["recipe"])
    recipe = Recipe.load(run.recipe) if run.recipe else own
    # Beside the model's own steps, whosever section it is: they say whether there are gates.
    data = {**recipe.to_dict(), "steps": own.to_dict()["steps"]}
    if run.uptrain is not None:
        data["uptrain"] = dict(run.uptrain)
    overrides = [o if o.startswith("uptrain.") else f"uptrain.{o}" for o in run.overrides]
    if data.get("uptrain") is None and not any(o.startswith("uptrain.tokens=") for o in overrides):
        raise RecipeError(f"{recipe.name}: has no `uptrain` section. Pass --set tokens=..., or --recipe.")
    section = Recipe.load(data, overrides).uptrain
    assert section is not None
    if section.layer_local is None:
        local = 0.0 if origin.get("calibration") or section.train == "gates" else 0.1
        section = dataclasses.replace(section, layer_local=local)
    return section


def _teacher(
    run: Run,
    section: Uptrain,
    model: PreTrainedModel,
    parent: PreTrainedModel,
    attention: tuple[str, ...],
    converted: list[str],
    trained: tuple[str, ...],
    head: tuple[float, float | None],
    where: str,
    origin: Mapping[str, Any],
) -> Parent:
    differ = different_weights(model, parent, set(attention))
    if differ and not origin.get("uptrained") and not run.force:
        raise CheckpointError(
            f"{where}: {differ[0]} (and {len(differ) - 1} more) differs from the model's, though conversion leaves it "
            "alone: not its parent, or the model was trained since. Pass --force to distil from it all the same."
        )
    if differ and section.layer_local:
        raise RecipeError(
            "uptrain.layer_local: weights outside attention differ from the parent's, so the parent's inputs cannot be "
            "had in one pass. Set layer_local=0."
        )
    inside = section.train != "all" and not (section.train == "lora" and section.lora_targets)
    shared = inside and not differ if run.share_parent is None else run.share_parent
    if shared and not (inside and not differ):
        raise RecipeError(
            "--share-parent: weights outside attention are trained or differ, so the parent needs its own."
        )
    modules = {name: parent.get_submodule(name) for name in attention}
    if shared:
        # Where attention is untouched and frozen the model's own module serves both.
        keep = {*converted, *trained}
        return Parent(None, {name: module for name, module in modules.items() if name in keep}, *head)
    return Parent(parent, modules, *head)


def changed_attention(model: PreTrainedModel, parent: PreTrainedModel, made: Plan) -> list[str]:
    """Names of attention modules that are not the parent's: of another form, or with other weights (an owner that was
    fitted to its readers keeps its form)."""
    changed = {site.module for site, _ in made.changed()}
    tensors = parent.state_dict()
    for site in made.anatomy.sites:
        module = model.get_submodule(site.module)
        own: dict[str, Tensor] = dict(module.named_parameters())
        theirs: dict[str, Tensor] = dict(parent.get_submodule(site.module).named_parameters())
        if isinstance(module, SurgeryAttention):
            theirs = canonical_weights(site, tensors.__getitem__)
        if own.keys() != theirs.keys() or any(
            own[key].shape != theirs[key].shape or not torch.equal(own[key], theirs[key]) for key in own
        ):
            changed.add(site.module)
    return [site.module for site in made.anatomy.sites if site.module in changed]


@torch.no_grad()
def check_separates(model: PreTrainedModel) -> None:
    """Raise UnsupportedModel where packed documents see each other although their positions start again."""
    vocab = model.config.get_text_config(decoder=True).vocab_size
    ids = (torch.arange(24, device=model.device) * 7 + 3)[None] % vocab
    positions = torch.cat((torch.arange(10), torch.arange(14)))[None].to(model.device)
    was = model.training
    model.eval()
    packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, 10:].float()
    alone = model(input_ids=ids[:, 10:], use_cache=False).logits.float()
    model.train(was)
    if float((packed - alone).norm()) > 1e-2 * float(alone.norm()):
        raise UnsupportedModel(
            f"{type(model).__name__}: documents packed into one sequence see each other. Set separate_documents=false."
        )


def select(model: PreTrainedModel, section: Uptrain, attention: tuple[str, ...], base: str) -> nn.Module:
    """Set `requires_grad` at what `section.train` names; for `lora`, wrap the model.

    Raises:
        RecipeError: a LoRA target names no linear layer.
    """
    inside = tuple(name + "." for name in attention)
    for name, parameter in model.named_parameters():
        chosen = section.train == "all" or name.startswith(inside)
        if section.train == "gates":
            chosen = chosen and ".gate." in name
        parameter.requires_grad_(chosen and parameter.is_floating_point() and section.train != "lora")
    if section.train == "gates" and not any(p.requires_grad for p in model.parameters()):
        raise RecipeError(
            "uptrain.train: gates, but the model has none that can be trained alone (gate: adapter, mlp, head have). "
            "Set train=converted."
        )
    if section.train != "lora":
        return model
    peft = _peft()
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    head = next((name for name, module in model.named_modules() if module is output_embedding(model)), "")
    if section.lora_targets is None:
        targets = [name for name in linear if name.startswith(inside)]
    else:
        targets = [name for name in linear if name.rpartition(".")[2] in section.lora_targets]
        if head in targets:
            raise RecipeError(
                f"uptrain.lora_targets: {head} makes the logits, and the loss reads its weight, which an adapter does "
                "not change. Leave it out, or set train=all."
            )
        absent = set(section.lora_targets) - {name.rpartition(".")[2] for name in targets}
        if absent:
            known = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            raise RecipeError(f"uptrain.lora_targets: no linear layer is called {sorted(absent)[0]}. Known: {known}.")
    settings = peft.LoraConfig(
        r=section.lora_rank,
        lora_alpha=section.lora_alpha,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    model.config.name_or_path = base
    return peft.get_peft_model(model, settings)


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise RecipeError("uptrain.train: lora needs the library peft. Run: pip install 'kv-surgery[train]'") from None
    return peft


def _other_dtypes(model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """By name in the state dict of a model that lies in `folder`: the types of weights that lie there in another."""
    if adapter_in(folder) is not None:  # merged by now; the model lies elsewhere
        return {}
    checkpoint = Checkpoint(folder)
    found = stored_dtypes(model, (), checkpoint, check_whole(checkpoint))
    return {name: kind for name, kind in found.items() if kind != dtype}


def _disk_dtype(folder: Path) -> torch.dtype:
    """The dtype that the checkpoint's config names."""
    fields = read_json(folder / "config.json")
    name = fields.get("dtype") or fields.get("torch_dtype") or "float32"
    return getattr(torch, str(name))
