"""Recovery training of a converted model: short, distilled from its parent, resumable.

    surgery train --model ./smaller --data text.jsonl -o ./trained
    accelerate launch -m surgery.train.uptrain --model ./smaller --data text.jsonl -o ./trained

The loop, resuming, logging and FSDP are Hugging Face's Trainer; ours are the losses, the data, the checks before work,
and what is written down.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments

from surgery.checkpoints.files import read_json
from surgery.checkpoints.writing import new_folder
from surgery.errors import CheckpointError
from surgery.measure.gates import gated

from .callbacks import FreshOptimizer, HeadsChosen, HeldOut, Told
from .checkpoints import checkpoints, clean
from .data import PackedText
from .parent_logits import KeptLogits
from .prepare import packed_text, prepare
from .result import summarise, write_result
from .run import Run, Setup, parameter_groups, world_and_rank
from .schedule import Ramp, RampCallback
from .trainer import Uptrainer, core

_log = logging.getLogger(__name__)

RUN = "run.json"
_PROBE = 4
"""Sequences from which the scale of each layer's output is read."""


def uptrain(run: Run) -> dict[str, Any]:
    """Train, and write the trained model to `OUT/model`.

    Returns:
        The summary, as in `OUT/uptraining.json`: what was trained, tokens, time, losses before and after.

    Raises:
        RecipeError, CheckpointError, UnsupportedModel, PlanError: before any work. CheckpointError: also where the
        disk fills; `NonFinite`: loss or gradient was NaN too often. The last complete checkpoint then stays.
    """
    return train(prepare(run))


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
    _, rank = world_and_rank()
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
    if arguments.n_gpu > 1:
        _log.warning("one of %d GPUs is used: start training by accelerate launch to use them all", arguments.n_gpu)
        arguments._n_gpu = 1  # else Trainer splits batches over all of them, behind the losses
    text = packed_text(setup)
    kept = None
    if run.keep_logits is not None:
        k = min(run.keep_logits, core(setup.model).config.get_text_config(decoder=True).vocab_size)
        temperature = setup.uptrain.temperature
        parent = f"{setup.parent_name}, weights {setup.parent_digest}"
        kept = KeptLogits(out / "parent-logits", k=k, temperature=temperature, parent=parent)
    if run.checkpointing:
        enable_checkpointing(core(setup.model))
    callbacks: list[Any] = [FreshOptimizer(setup.schedule)]
    if rank == 0 and arguments.disable_tqdm:
        callbacks.append(Told())
    if gated(core(setup.model)):
        callbacks += [RampCallback(Ramp(end=setup.uptrain.gate_ramp)), HeadsChosen(setup.length)]
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
    if setup.uptrain.train == "lora" and rank == 0 and (resume is None or not (out / "base").exists()):
        with new_folder(out / "base", overwrite=True) as base:  # what the adapter in every checkpoint belongs to
            shutil.copytree(setup.base, base, dirs_exist_ok=True)
    trainer.go(resume)
    summary = summarise(setup, trainer, table)
    write_result(setup, trainer, summary)
    return summary


def _resume_from(setup: Setup) -> Path | None:
    """The checkpoint to go on from.

    Raises:
        CheckpointError: OUT belongs to another run.
    """
    run = setup.run
    if world_and_rank()[1] == 0:
        clean(run.out / "checkpoints")
    found = checkpoints(run.out / "checkpoints")
    if run.resume is None:
        if found:
            raise CheckpointError(f"{run.out}: holds checkpoints. Use --resume auto, another folder, or remove them.")
        return None
    chosen = (found[-1] if found else None) if run.resume == "auto" else Path(run.resume)
    if chosen is None or run.force:
        return chosen
    record = chosen.absolute().parents[1] / RUN  # of the run that wrote the checkpoint, wherever it lies
    if not record.is_file():
        raise CheckpointError(
            f"{chosen}: there is no {record}, which says of what run the checkpoint is. Put that file back, or pass "
            "--force."
        )
    old, new = read_json(record), json.loads(json.dumps(setup.identity()))
    changed = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    if changed:
        parts = [f"{name} was {old.get(name)!r}, is {new.get(name)!r}" for name in changed]
        raise CheckpointError(
            f"{record.parent}: its checkpoints are of another run ({'; '.join(parts)}). Choose another folder, or pass "
            "--force."
        )
    return chosen


def enable_checkpointing(model: PreTrainedModel) -> None:
    """Recompute whole decoder layers in the backward pass. Reentrant, it would drop gradients of shared KV."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def leave() -> None:
    """Close the process group of a launched run: gloo's threads abort an interpreter that ends before them."""
    from accelerate import PartialState

    PartialState().destroy_process_group()


if __name__ == "__main__":
    from surgery.cli import main

    sys.argv.insert(1, "train")
    main()
