"""Where a converted model comes from: all that is needed to make it again. Travels in config and surgery.json."""

from __future__ import annotations

import json
import platform
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from ..calibration.text import Windows
from ..errors import CheckpointError
from ..plan import Plan
from ..recipe import Recipe
from .places import GGUF, local_folder
from .restored import facts_in, is_kept

FILE = "surgery.json"
RECIPE_FILE = "recipe.yaml"


def provenance(
    plan: Plan,
    config: Any,
    windows: Windows | None,
    seed: int,
    left_out: Sequence[str] = (),
    told: dict[str, Any] | None = None,
    held_out: float | None = None,
) -> dict[str, Any]:
    """Parent and revision, recipe, seed, calibration digest, versions, plan with predicted bytes.

    Where the parent was converted itself, into its own class, `before` is its provenance.

    Args:
        left_out: tensors of the parent's files that its class does not load; the result has none of them.
        told: facts about the parent beside its name: the adapter that was merged, the GGUF it came from.
        held_out: KL of the result to its parent in nats per token, on calibration windows that nothing was fitted on.
    """
    before = getattr(config, "surgery", None)
    # Read from a file, a config names that file.
    parent = config.name_or_path.removesuffix("config.json").rstrip("/") or None
    gguf = facts_in(parent)
    return {
        "parent": gguf["file"] if gguf is not None and is_kept(parent) else parent,
        "parent_revision": getattr(config, "_commit_hash", None),
        **({} if gguf is None else {"gguf": gguf}),
        **(told or {}),
        "recipe": plan.recipe.to_dict(),
        "seed": seed,
        "calibration": None
        if windows is None
        else {
            "windows": len(windows),
            "tokens": windows.tokens,
            "digest": windows.digest,
            "start": None if windows.start is None else list(windows.start),
            "held_out_kl": held_out,
        },
        "versions": versions(),
        "plan": plan.to_dict(),
        "left_out": list(left_out),
        **({} if before is None else {"before": before.get("provenance", before)}),
    }


def provenance_of(model: PreTrainedModel) -> dict[str, Any]:
    """What `convert` wrote into the model's config.

    Raises:
        CheckpointError: the model was not converted.
    """
    surgery = getattr(model.config, "surgery", None)
    if not surgery:
        raise CheckpointError(f"{type(model).__name__}: not converted by surgery. Use model.save_pretrained(...).")
    return dict(surgery.get("provenance", surgery))


def parent_folder(data: dict[str, Any]) -> Path | None:
    """Where the files of the parent lie that `data`, a provenance, names; fetched where they lie on the Hub.

    None for a parent that was made in memory or is gone, and, with a warning, where the Hub cannot be reached.
    """
    parent, revision = data.get("parent"), data.get("parent_revision")
    if not parent or Path(parent).is_dir():
        return Path(parent) if parent else None
    is_gguf = parent.endswith(GGUF) and Path(parent).is_file()
    if not revision and not is_gguf:
        return None
    try:
        return local_folder(parent if is_gguf else f"{parent}@{revision}", weights=False)
    except CheckpointError as error:
        warnings.warn(f"{error} Written without the tokenizer and other files of {parent}.", stacklevel=2)
        return None


def write_provenance(folder: Path, data: dict[str, Any]) -> None:
    """Write `recipe.yaml` and `surgery.json`."""
    (folder / RECIPE_FILE).write_text(Recipe.recorded(data["recipe"]).to_yaml())
    (folder / FILE).write_text(json.dumps(data, indent=2) + "\n")


def versions() -> dict[str, str]:
    """What a number depends on beside the code."""
    from .. import __version__

    return {
        "surgery": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
