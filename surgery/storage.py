"""Load and save converted models, checked and complete."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from transformers import AutoModelForCausalLM, PreTrainedModel

from .anatomy.reader import load_config
from .checkpoint import Checkpoint, check_fits, copy_companions, local_folder, new_folder, read_json
from .native import meta_model
from .provenance import provenance_of, write_provenance
from .runtime.modeling import converted_class, load_converted


def load(model: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Load a converted checkpoint, or any other, checked before use.

    Args:
        model: folder or Hub id.
        kwargs: for `from_pretrained`; the dtype is the checkpoint's own unless given.

    Raises:
        CheckpointError: a shard or a tensor is missing or damaged, a weight is NaN or of an unknown dtype or shape.
    """
    folder = local_folder(model)
    checkpoint = Checkpoint(folder)
    check_whole(checkpoint)
    for name in checkpoint.names():
        checkpoint.get(name)
    kwargs.setdefault("dtype", "auto")
    if _is_converted(folder):
        made = load_converted(str(folder), **kwargs)
        if hasattr(made.config, "auto_map"):
            del made.config.auto_map  # it names the code of an export, which this model does without
        return made
    return AutoModelForCausalLM.from_pretrained(str(folder), **kwargs)


def check_whole(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError where tensors are missing or do not fit the config. Reads no tensor."""
    config: Any
    if _is_converted(checkpoint.folder):
        architecture = converted_class(str(checkpoint.folder))  # makes its config known to transformers
        config = cast(Any, architecture.config_class).from_pretrained(checkpoint.folder)
    else:
        config = load_config(checkpoint.folder)
        architecture = type(meta_model(config))
    check_fits(checkpoint, architecture, config)


def _is_converted(folder: Path) -> bool:
    return "layers" in (read_json(folder / "config.json").get("surgery") or {})


def save(model: PreTrainedModel, folder: str | Path, *, tokenizer: Any = None, overwrite: bool = False) -> None:
    """Write a converted model with all that belongs to it: tokenizer, generation config, recipe, provenance.

    Args:
        tokenizer: defaults to the files beside the parent.
        overwrite: replace a folder that is not empty.

    Raises:
        CheckpointError: the folder cannot be written, or is not empty.
    """
    data = provenance_of(model)
    with new_folder(folder, overwrite) as target:
        model.save_pretrained(target)
        if tokenizer is not None:
            tokenizer.save_pretrained(target)
        elif data.get("parent") and Path(data["parent"]).is_dir():
            copy_companions(Path(data["parent"]), target)
        write_provenance(target, data)
