"""Rewrite the attention of pretrained language models so that their KV cache gets small.

The names of `__all__` are imported when the first of them is asked for, so that a command which needs neither torch nor
transformers starts at once.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .versions import transformers_version, warn_of_untested_transformers

if TYPE_CHECKING:
    from .anatomy import Anatomy, examine
    from .checkpoints.storage import load, save
    from .composing.compose import compose
    from .convert import convert, convert_checkpoint
    from .errors import CheckpointError, PlanError, RecipeError, SurgeryError, UnsupportedModel
    from .export import export
    from .generate import generate
    from .measure.evaluate import evaluate
    from .plan import Plan, plan
    from .quick_cache import cache, quantise_cache, retrieval_heads
    from .recipe import Recipe
    from .report.data import Report

__version__ = "0.1.0"

__all__ = [
    "Anatomy",
    "CheckpointError",
    "Plan",
    "PlanError",
    "Recipe",
    "RecipeError",
    "Report",
    "SurgeryError",
    "UnsupportedModel",
    "cache",
    "compose",
    "convert",
    "convert_checkpoint",
    "evaluate",
    "examine",
    "export",
    "generate",
    "load",
    "plan",
    "quantise_cache",
    "retrieval_heads",
    "save",
]

_DEFINED_IN = {
    "anatomy": ("Anatomy", "examine"),
    "checkpoints.storage": ("load", "save"),
    "composing.compose": ("compose",),
    "convert": ("convert", "convert_checkpoint"),
    "errors": ("CheckpointError", "PlanError", "RecipeError", "SurgeryError", "UnsupportedModel"),
    "export": ("export",),
    "generate": ("generate",),
    "measure.evaluate": ("evaluate",),
    "plan": ("Plan", "plan"),
    "quick_cache": ("cache", "quantise_cache", "retrieval_heads"),
    "recipe": ("Recipe",),
    "report.data": ("Report",),
}


class _Surgery(ModuleType):
    """This package: it imports all public names at the first use of one, and a module at its first use."""

    def __getattr__(self, name: str) -> Any:
        if name in __all__:
            for module, names in _DEFINED_IN.items():
                found = import_module(f"{__name__}.{module}")
                vars(self).update({public: getattr(found, public) for public in names})
            return vars(self)[name]
        # `from .. import runtime` asks here first: only that module, for the one that asks is half imported.
        if not name.startswith("__") and find_spec(f"{__name__}.{name}") is not None:
            return import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        # Python puts every imported submodule here, and `surgery.plan` is the function, not the module that holds it.
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*vars(self), *__all__})


sys.modules[__name__].__class__ = _Surgery
warn_of_untested_transformers(transformers_version())
