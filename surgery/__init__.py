"""Rewrite the attention of pretrained language models so that their KV cache gets small."""

__version__ = "0.1.0"

import transformers as _transformers

from .anatomy import Anatomy, examine
from .checkpoints.storage import load, save
from .convert import convert, convert_checkpoint
from .errors import CheckpointError, PlanError, RecipeError, SurgeryError, UnsupportedModel
from .export import export
from .generate import generate
from .measure.evaluate import evaluate
from .plan import Plan, plan
from .recipe import Recipe
from .report.data import Report
from .versions import warn_of_untested_transformers

warn_of_untested_transformers(_transformers.__version__)

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
    "convert",
    "convert_checkpoint",
    "evaluate",
    "examine",
    "export",
    "generate",
    "load",
    "plan",
    "save",
]
