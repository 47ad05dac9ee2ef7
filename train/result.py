"""What a training run leaves: the trained model with its provenance, and a summary."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from surgery.checkpoints.companions import copy_companions
from surgery.checkpoints.files import Checkpoint
from surgery.checkpoints.provenance import provenance_of, versions, write_provenance
from surgery.checkpoints.storage import write_like
from surgery.checkpoints.writing import new_folder

from .run import Setup, plain_options
from .trainer import Uptrainer, core

SUMMARY = "uptraining.json"


def summarise(setup: Setup, trainer: Uptrainer, groups: dict[str, dict[str, int]]) -> dict[str, Any]:
    history = trainer.state.log_history
    scores = [entry for entry in history if "held_out_nats_per_token" in entry]
    return {
        "tokens": setup.tokens,
        "steps": setup.schedule.steps,
        "seconds": round(history[-1].get("seconds", 0.0), 1),
        "control": setup.run.control,
        "uptrain": plain_options(setup.uptrain),
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


def write_result(setup: Setup, trainer: Uptrainer, summary: dict[str, Any]) -> None:
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
        dtypes = {name: setup.dtypes.get(name, setup.dtype) for name, t in state.items() if t.is_floating_point()}
        cast = {name: t.to(dtypes.get(name, t.dtype)) for name, t in state.items()}
        fresh = type(plain).from_pretrained(None, config=_final_config(setup, plain, summary), state_dict=cast,
                                            dtype=torch.float32 if setup.dtypes else setup.dtype)  # fmt: skip
        fresh.generation_config = copy.deepcopy(plain.generation_config)
        with new_folder(target, overwrite=True) as folder:
            if setup.dtypes:
                write_like(fresh, Checkpoint(setup.base), dtypes, folder)
            else:
                fresh.save_pretrained(folder)
            copy_companions(setup.base, folder)
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
        origin["recipe"] = {**origin["recipe"], "uptrain": plain_options(setup.uptrain)}
        origin["uptrained"] = [*origin.get("uptrained", ()), json.loads(json.dumps(summary))]
        config.surgery = surgery
    return config
