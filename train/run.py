"""One training run: its arguments, and what it consists of once all of it is checked."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from surgery.calibration.text import Windows
from surgery.checkpoints.adapters import base_folder
from surgery.checkpoints.places import local_folder
from surgery.checkpoints.unfinished import file_digest
from surgery.recipe import Uptrain

from .documents import Documents
from .parent import Parent
from .schedule import Schedule
from .trainer import core


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
    """Resume although the recipe, text, model or parent changed, and take a parent whose other weights differ."""
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
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    """Of those that lay there in another, by name in the state dict: they will again, too."""

    @property
    def base(self) -> Path:
        """Where the model lies that is trained: the converted one, or for a control the parent."""
        return local_folder(self.parent_name) if self.run.control else self.folder

    @functools.cached_property
    def parent_digest(self) -> str:
        """Names the parent's weights."""
        return weights_digest(local_folder(self.parent_name))

    @property
    def tokens(self) -> int:
        """Tokens of the whole run: whole steps."""
        return self.schedule.steps * self.uptrain.batch * self.length

    def identity(self) -> dict[str, Any]:
        """What must stay the same for a resumed run to be the same run."""
        return {
            "model": weights_digest(self.folder),
            "parent": self.parent_name,
            "parent_weights": self.parent_digest,
            "control": self.run.control,
            "data": self.documents.digest,
            "held_out": None if self.held_out is None else self.held_out.digest,
            "seed": self.run.seed,
            "keep_logits": self.run.keep_logits,
            "length": self.length,
            **{f"uptrain.{name}": value for name, value in plain_options(self.uptrain).items()},
        }


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


def plain_options(section: Uptrain) -> dict[str, Any]:
    """Every option of the section that is not at its default, as JSON knows it; `tokens` always."""
    options = {f.name: getattr(section, f.name) for f in dataclasses.fields(section)}
    kept = {f.name: options[f.name] for f in dataclasses.fields(section) if options[f.name] != f.default}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in kept.items()}


def weights_digest(folder: Path) -> str:
    """Names the weights in a folder, and those of the base of an adapter that lies there."""
    files = {file for place in (folder, base_folder(folder)) for file in place.glob("*.safetensors")}
    found = [[file.name, *file_digest(file).values()] for file in sorted(files)]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16]


def world_and_rank() -> tuple[int, int]:
    """(devices, this one) of the launched run."""
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available())
    return state.num_processes, state.process_index
