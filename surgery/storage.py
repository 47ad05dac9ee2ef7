"""Load and save converted models, checked and complete."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

from .checkpoint import Checkpoint, copy_companions, local_folder, new_folder, read_json
from .provenance import provenance_of, write_provenance
from .runtime.modeling import load_converted


def load(model: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Load a converted checkpoint, or any other, checked before use.

    Args:
        model: folder or Hub id.
        kwargs: for `from_pretrained`; the dtype is the checkpoint's own unless given.

    Raises:
        CheckpointError: a shard is missing or damaged, a weight is NaN or of an unknown dtype.
    """
    folder = local_folder(model)
    checkpoint = Checkpoint(folder)
    for name in checkpoint.names():
        checkpoint.get(name)
    kwargs.setdefault("dtype", "auto")
    config = read_json(folder / "config.json")
    if "layers" in config.get("surgery", {}):
        return load_converted(str(folder), **kwargs)
    return AutoModelForCausalLM.from_pretrained(str(folder), **kwargs)


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
