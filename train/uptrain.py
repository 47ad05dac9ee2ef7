"""Recovery training of a converted model: short, distilled from its parent, resumable.

    surgery train --model ./smaller --data text.jsonl -o ./trained
    accelerate launch -m surgery.train.uptrain --model ./smaller --data text.jsonl -o ./trained

The loop, resuming, logging and FSDP are Hugging Face's Trainer; ours are the losses, the data, the checks before work,
and what is written down.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments

from surgery.calibration.text import Windows, has_surplus_ids, read_windows, window_length
from surgery.checkpoints.adapters import adapter_in
from surgery.checkpoints.companions import copy_companions
from surgery.checkpoints.files import check_output, local_folder, new_folder, read_json
from surgery.checkpoints.provenance import provenance_of, versions, write_provenance
from surgery.checkpoints.storage import load
from surgery.errors import CheckpointError, RecipeError, UnsupportedModel
from surgery.measure.gates import gated
from surgery.plan import Plan, plan
from surgery.recipe import Recipe, Uptrain
from surgery.runtime.attention import SurgeryAttention
from surgery.runtime.canonical import canonical_weights

from .data import PackedText, split_batch
from .documents import Documents, open_documents, training_tokenizer
from .gates import check_length
from .kept import KeptLogits
from .parent import Parent, check_parent, check_sites, different_weights, read_head
from .schedule import Ramp, RampCallback, Schedule, schedule
from .trainer import FreshOptimizer, HeldOut, Uptrainer, checkpoints, clean, core

RUN = "run.json"
SUMMARY = "uptraining.json"
_PROBE = 4
"""Sequences from which the scale of each layer's output is read."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """The arguments of one training run. The command line has the same."""

    model: str
    """Folder of the converted model."""
    data: str
    """What `open_documents` takes."""
    out: Path
    """Folder for checkpoints, logs, and the trained model in `OUT/model`."""
    parent: str | None = None
    """Folder or Hub id; what the model says it was converted from, where None."""
    recipe: str | None = None
    """Recipe whose `uptrain` section is used; the model's own where None."""
    overrides: tuple[str, ...] = ()
    """`key=value` for the `uptrain` section."""
    uptrain: Mapping[str, Any] | None = None
    """The section itself, from a run file; stands before the recipe's."""
    control: bool = False
    """Train the parent instead of the model, by cross-entropy, on the same tokens: what the text alone does."""
    held_out: str | None = None
    """Text to score before, during and after."""
    held_out_windows: int = 64
    eval_steps: int | None = None
    save_steps: int = 200
    keep: int = 2
    log_steps: int = 10
    micro_batch: int | None = None
    """Sequences per forward pass on one device; the rest is accumulated. None: all at once."""
    checkpointing: bool = False
    """Recompute activations in the backward pass."""
    keep_logits: int | None = None
    """Keep the parent's so many likeliest tokens per position in OUT/parent-logits, and repeat the same sequences in
    every epoch: from the second on the parent is not run."""
    share_parent: bool | None = None
    """Let the parent use the model's weights outside attention. None: wherever they are equal and frozen."""
    resume: str | None = "auto"
    """`auto` goes on from the last complete checkpoint in OUT, if any; a checkpoint's folder; None starts anew."""
    force: bool = False
    """Resume although the recipe, data or model changed, and take a parent whose other weights differ."""
    nonfinite_limit: int = 3
    seed: int = 0
    bf16: bool | None = None
    """Compute in bfloat16 (autocast); None: on a GPU."""
    report_to: str = "none"


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a run consists of, all of it checked. Nothing has been trained or written."""

    run: Run
    uptrain: Uptrain
    length: int
    model: nn.Module
    """With `requires_grad` at what is trained; wrapped by peft for `lora`."""
    origin: dict[str, Any]
    """Provenance of the model; empty for a control."""
    folder: Path
    parent_name: str
    parent: Parent | None
    trained_attention: tuple[str, ...]
    documents: Documents
    tokenizer: Any
    schedule: Schedule
    world: int
    micro_batch: int
    accumulation: int
    held_out: Windows | None
    head: tuple[float, float | None]
    dtype: torch.dtype = field(default=torch.float32)
    """Of the weights as they lay on disk, and will again."""

    @property
    def tokens(self) -> int:
        """Tokens of the whole run: whole steps."""
        return self.schedule.steps * self.uptrain.batch * self.length

    def identity(self) -> dict[str, Any]:
        """What must stay the same for a resumed run to be the same run."""
        return {
            "model": _weights_digest(self.folder),
            "parent": self.parent_name,
            "control": self.run.control,
            "data": self.documents.digest,
            "seed": self.run.seed,
            "keep_logits": self.run.keep_logits,
            "length": self.length,
            **{f"uptrain.{name}": value for name, value in _plain(self.uptrain).items()},
        }


def uptrain(run: Run) -> dict[str, Any]:
    """Train, and write the trained model to `OUT/model`.

    Returns:
        The summary, as in `OUT/uptraining.json`: what was trained, tokens, time, losses before and after.

    Raises:
        RecipeError, CheckpointError, UnsupportedModel, PlanError: before any work. CheckpointError: also where the
        disk fills; `NonFinite`: loss or gradient was NaN too often. The last complete checkpoint then stays.
    """
    return train(prepare(run))


def prepare(run: Run) -> Setup:
    """Read and check everything that a run needs."""
    world, _ = _world()
    folder = local_folder(run.model)
    if run.resume not in (None, "auto") and not (Path(str(run.resume)) / "trainer_state.json").is_file():
        raise CheckpointError(f"{run.resume}: no checkpoint of a training run. Use --resume auto, or name its folder.")
    check_output(run.out, overwrite=True)
    model = load(folder, dtype=torch.float32)
    origin = provenance_of(model)
    section = resolve_uptrain(run, origin)
    if run.control:
        section = dataclasses.replace(section, kl=0.0, ce=1.0, hidden=0.0, layer_local=0.0)
    if section.train == "lora":
        _peft()
    if run.keep_logits is not None and (section.hidden or not section.kl):
        raise RecipeError("--keep-logits: serves the KL alone. Set kl above 0 and hidden=0, or leave it out.")
    parent_name, parent = _load_parent(run, origin, folder)
    check_parent(model, parent, parent_name)
    made = plan(parent, origin["recipe"])
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
    wrapped = select(student, section, trained, str(folder))
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
    )
    if has_surplus_ids(tokenizer, config.vocab_size):
        _text(setup).check(setup.schedule.steps + 1)  # Trainer fetches one batch ahead
    return setup


def _text(setup: Setup) -> PackedText:
    """What this device reads."""
    world, rank = _world()
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
    recipe = Recipe.load(run.recipe or origin["recipe"])
    data = recipe.to_dict()
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
            "uptrain.train: gates, but the model has none that can be trained alone (gate: adapter has). Set "
            "train=converted."
        )
    if section.train != "lora":
        return model
    peft = _peft()
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if section.lora_targets is None:
        targets = [name for name in linear if name.startswith(inside)]
    else:
        targets = [name for name in linear if name.rpartition(".")[2] in section.lora_targets]
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


@torch.no_grad()
def local_scales(setup: Setup) -> dict[str, float]:
    """E|y|² of the parent's output in each attention that the layer-local stage fits.

    Read from the first sequences of the data, the same on every device and after every resume.
    """
    if setup.parent is None or not setup.uptrain.layer_local:
        return {}
    text = PackedText(
        setup.documents, setup.tokenizer, batch=min(_PROBE, setup.uptrain.batch), length=setup.length,
        seed=setup.run.seed, separate=setup.uptrain.separate_documents,
        vocab_size=core(setup.model).config.get_text_config(decoder=True).vocab_size,
    )  # fmt: skip
    inputs = next(iter(text))
    inputs.pop("labels")
    plain = core(setup.model)
    found: dict[str, float] = {}

    def record(name: str) -> Any:
        def hook(_: nn.Module, args: Any, output: Any) -> None:
            y: Tensor = output[0] if isinstance(output, tuple) else output
            found[name] = float(y.float().square().sum(-1).mean())

        return hook

    names = setup.trained_attention
    handles = [setup.parent.attention[name].register_forward_hook(record(name)) for name in names]
    try:
        setup.parent.last_hidden(plain, {name: t.to(plain.device) for name, t in inputs.items()})
    finally:
        for handle in handles:
            handle.remove()
    return {name: max(found[name], 1e-12) for name in names}


def train(setup: Setup) -> dict[str, Any]:
    """Carry out a prepared run."""
    run = setup.run
    _, rank = _world()
    out = run.out
    resume = _resume_from(setup)
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        (out / RUN).write_text(json.dumps(setup.identity(), indent=1) + "\n")
    gpu = torch.cuda.is_available()
    torch.manual_seed(run.seed)
    arguments = TrainingArguments(
        output_dir=str(out / "checkpoints"),
        max_steps=setup.schedule.steps,
        per_device_train_batch_size=setup.micro_batch,
        gradient_accumulation_steps=setup.accumulation,
        learning_rate=max(stage.learning_rate for stage in setup.schedule.stages),
        weight_decay=setup.uptrain.weight_decay,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        bf16=gpu if run.bf16 is None else run.bf16,
        use_cpu=not gpu,
        dataloader_pin_memory=gpu,
        logging_steps=run.log_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_steps=run.save_steps,
        ignore_data_skip=True,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
        average_tokens_across_devices=True,
        seed=run.seed,
        report_to=run.report_to,
        disable_tqdm=rank != 0 or not sys.stderr.isatty(),
    )
    text = _text(setup)
    kept = None
    if run.keep_logits is not None:
        k = min(run.keep_logits, core(setup.model).config.get_text_config(decoder=True).vocab_size)
        temperature = setup.uptrain.temperature
        kept = KeptLogits(out / "parent-logits", k=k, temperature=temperature, parent=setup.parent_name)
    if run.checkpointing:
        enable_checkpointing(core(setup.model))
    callbacks: list[Any] = [FreshOptimizer(setup.schedule)]
    if gated(core(setup.model)):
        callbacks.append(RampCallback(Ramp(end=setup.uptrain.gate_ramp)))
    scorer = HeldOut(setup.held_out, run.eval_steps) if setup.held_out is not None else None
    trainer = Uptrainer(
        setup.model,
        arguments,
        text=text,
        schedule=setup.schedule,
        uptrain=setup.uptrain,
        parent=setup.parent,
        local=dict.fromkeys(setup.trained_attention if setup.uptrain.layer_local else (), 1.0),
        companions=setup.folder,
        nonfinite_limit=run.nonfinite_limit,
        keep=run.keep,
        head=setup.head,
        kept=kept,
        callbacks=callbacks + ([scorer] if scorer else []),
    )
    if scorer is not None:
        scorer.trainer = trainer
    if setup.parent is not None:
        setup.parent.to(core(setup.model).device)
        trainer.local = local_scales(setup)
        setup.parent.to(arguments.device, setup.dtype if arguments.bf16 else None)
    table = parameter_groups(setup)
    if setup.uptrain.train == "lora" and rank == 0 and not (out / "base").exists():
        with new_folder(out / "base") as base:  # what the adapter in every checkpoint belongs to
            shutil.copytree(setup.folder, base, dirs_exist_ok=True)
    trainer.go(resume)
    summary = _summary(setup, trainer, table)
    _export(setup, trainer, summary)
    return summary


def _resume_from(setup: Setup) -> Path | None:
    """The checkpoint to go on from.

    Raises:
        CheckpointError: OUT belongs to another run.
    """
    run = setup.run
    if _world()[1] == 0:
        clean(run.out / "checkpoints")
    found = checkpoints(run.out / "checkpoints")
    if run.resume is None:
        if found:
            raise CheckpointError(f"{run.out}: holds checkpoints. Use --resume auto, another folder, or remove them.")
        return None
    chosen = (found[-1] if found else None) if run.resume == "auto" else Path(run.resume)
    if chosen is None or run.force or not (run.out / RUN).is_file():
        return chosen
    old, new = read_json(run.out / RUN), json.loads(json.dumps(setup.identity()))
    changed = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    if changed:
        parts = [f"{name} was {old.get(name)!r}, is {new.get(name)!r}" for name in changed]
        raise CheckpointError(
            f"{run.out}: its checkpoints are of another run ({'; '.join(parts)}). Choose another folder, or pass "
            "--force."
        )
    return chosen


def enable_checkpointing(model: PreTrainedModel) -> None:
    """Recompute whole decoder layers in the backward pass. Reentrant, it would drop gradients of shared KV."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def parameter_groups(setup: Setup) -> dict[str, dict[str, int]]:
    """Numbers of trained and frozen parameters by group."""
    plain = core(setup.model)
    inside = tuple(name + "." for name in setup.trained_attention)
    embeddings = {id(m.weight) for m in (plain.get_input_embeddings(), plain.get_output_embeddings()) if m is not None}
    groups: dict[str, dict[str, int]] = {}
    for name, parameter in plain.named_parameters():
        kind = "LoRA" if ".lora_" in name else "embeddings" if id(parameter) in embeddings else "other"
        if name.startswith(inside) and kind == "other":
            kind = "converted attention" if setup.uptrain.train in ("converted", "lora") else "attention"
            kind = "gates" if ".gate." in name else kind
        entry = groups.setdefault(kind, {"trained": 0, "frozen": 0})
        entry["trained" if parameter.requires_grad else "frozen"] += parameter.numel()
    return groups


def _summary(setup: Setup, trainer: Uptrainer, groups: dict[str, dict[str, int]]) -> dict[str, Any]:
    history = trainer.state.log_history
    scores = [entry for entry in history if "held_out_nats_per_token" in entry]
    return {
        "tokens": setup.tokens,
        "steps": setup.schedule.steps,
        "seconds": round(history[-1].get("seconds", 0.0), 1),
        "control": setup.run.control,
        "uptrain": _plain(setup.uptrain),
        "length": setup.length,
        "stages": [dataclasses.asdict(stage) for stage in setup.schedule.stages],
        "parameters": groups,
        "parent": setup.parent_name,
        "parent_bytes": None if setup.parent is None else setup.parent.bytes,
        "data": {
            "source": Path(setup.run.data).name,
            "documents": len(setup.documents),
            "digest": setup.documents.digest,
            "start": setup.tokenizer.convert_ids_to_tokens(trainer.text.start),
        },
        "seed": setup.run.seed,
        "devices": setup.world,
        "skipped_steps": trainer.nonfinite,
        "before": _score(scores[0]) if scores else None,
        "after": _score(scores[-1]) if scores else None,
        "held_out": None if setup.held_out is None else setup.held_out.digest,
        "versions": versions(),
    }


def _score(entry: dict[str, Any]) -> dict[str, float]:
    return {name.removeprefix("held_out_"): value for name, value in entry.items() if name.startswith("held_out_")}


def _export(setup: Setup, trainer: Uptrainer, summary: dict[str, Any]) -> None:
    """Write the trained model, in the dtype it came in, with `uptrained` in its provenance."""
    run = setup.run
    model = setup.model
    state: dict[str, Tensor] | None = None
    if trainer.is_fsdp_enabled:
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.is_world_process_zero():
        target = run.out / "model"
        if setup.uptrain.train == "lora":
            with new_folder(run.out / "adapter", overwrite=True) as folder:
                model.save_pretrained(folder)  # type: ignore[operator]
            model = model.merge_and_unload()  # type: ignore[operator]
        if state is None:
            state = {name: t.detach() for name, t in model.state_dict().items()}
        plain = core(model)
        cast = {name: t.to(setup.dtype) if t.is_floating_point() else t for name, t in state.items()}
        fresh = type(plain).from_pretrained(None, config=_final_config(setup, plain, summary), state_dict=cast,
                                            dtype=setup.dtype)  # fmt: skip
        fresh.generation_config = copy.deepcopy(plain.generation_config)
        with new_folder(target, overwrite=True) as folder:
            fresh.save_pretrained(folder)
            copy_companions(local_folder(setup.parent_name) if run.control else setup.folder, folder)
            if setup.origin:
                write_provenance(folder, provenance_of(fresh))
        record = {**summary, "log": trainer.state.log_history}
        (run.out / SUMMARY).write_text(json.dumps(record, indent=1) + "\n")
    trainer.accelerator.wait_for_everyone()


def _final_config(setup: Setup, model: PreTrainedModel, summary: dict[str, Any]) -> Any:
    config = copy.deepcopy(model.config)
    config.name_or_path = ""
    if setup.origin:
        surgery = copy.deepcopy(config.surgery)
        origin = surgery.get("provenance", surgery)
        origin["recipe"] = {**origin["recipe"], "uptrain": _plain(setup.uptrain)}
        origin["uptrained"] = [*origin.get("uptrained", ()), json.loads(json.dumps(summary))]
        config.surgery = surgery
    return config


def _plain(section: Uptrain) -> dict[str, Any]:
    """Every option of the section that is not at its default, as JSON knows it; `tokens` always."""
    options = {f.name: getattr(section, f.name) for f in dataclasses.fields(section)}
    kept = {f.name: options[f.name] for f in dataclasses.fields(section) if options[f.name] != f.default}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in kept.items()}


def _disk_dtype(folder: Path) -> torch.dtype:
    """The dtype that the checkpoint's config names."""
    fields = read_json(folder / "config.json")
    name = fields.get("dtype") or fields.get("torch_dtype") or "float32"
    return getattr(torch, str(name))


def _weights_digest(folder: Path) -> list[list[Any]]:
    """Names and sizes of the weight files with the digest of their headers."""
    found = []
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            head = stream.read(2**20)
            stream.seek(max(0, file.stat().st_size - 2**20))
            found.append([file.name, file.stat().st_size, hashlib.sha256(head + stream.read()).hexdigest()[:16]])
    return found


def _world() -> tuple[int, int]:
    """(devices, this one) of the launched run."""
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available())
    return state.num_processes, state.process_index


def leave() -> None:
    """Close the process group of a launched run: gloo's threads abort an interpreter that ends before them."""
    from accelerate import PartialState

    PartialState().destroy_process_group()


if __name__ == "__main__":
    from surgery.cli import main

    sys.argv.insert(1, "train")
    main()
