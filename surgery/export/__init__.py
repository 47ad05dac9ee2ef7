"""Write converted models in forms that other software loads without this library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..errors import PlanError
from .native import ExportReport, export_native

__all__ = ["ExportReport", "export", "export_native"]


def export(model_or_path: PreTrainedModel | str | Path, out: str | Path, *, to: str, **options: Any) -> ExportReport:
    """Write a converted model for a target; see `export_native` for the options.

    Raises:
        PlanError: the target is not known, or cannot say the model.
    """
    if to != "native":
        raise PlanError(f"export: no target {to!r}. Known: native.")
    return export_native(model_or_path, out, **options)
