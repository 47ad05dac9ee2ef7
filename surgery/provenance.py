"""Where a converted model comes from: all that is needed to make it again. Travels in config and surgery.json."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from .errors import CheckpointError
from .plan import Plan
from .recipe import Recipe
from .text import Windows

FILE = "surgery.json"
RECIPE_FILE = "recipe.yaml"


def provenance(plan: Plan, config: Any, windows: Windows | None, seed: int) -> dict[str, Any]:
    """Parent and revision, recipe, seed, calibration digest, versions, plan with predicted bytes."""
    return {
        # Read from a file, a config names that file.
        "parent": config.name_or_path.removesuffix("config.json").rstrip("/") or None,
        "parent_revision": getattr(config, "_commit_hash", None),
        "recipe": plan.recipe.to_dict(),
        "seed": seed,
        "calibration": None
        if windows is None
        else {"windows": len(windows), "tokens": windows.tokens, "digest": windows.digest},
        "versions": versions(),
        "plan": plan.to_dict(),
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


def write_provenance(folder: Path, data: dict[str, Any]) -> None:
    """Write `recipe.yaml` and `surgery.json`."""
    (folder / RECIPE_FILE).write_text(Recipe.load(data["recipe"]).to_yaml())
    (folder / FILE).write_text(json.dumps(data, indent=2) + "\n")


def versions() -> dict[str, str]:
    """What a number depends on beside the code."""
    from . import __version__

    return {
        "surgery": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
