"""Weights in, weights out: one file per method, one line here."""

from __future__ import annotations

from importlib import import_module
from typing import Any

REWRITERS = {
    "dmc": "surgery.rewriters.tokens.gates:Gates",
    "dms": "surgery.rewriters.tokens.gates:Gates",
    "gqa": "surgery.rewriters.gqa:Gqa",
    "identity": "surgery.rewriters.identity:Identity",
    "lowrank": "surgery.rewriters.latent.steps:Lowrank",
    "mla": "surgery.rewriters.latent.steps:Mla",
    "share": "surgery.rewriters.share:Share",
}


def rewriter_for(step: Any, seed: int = 0) -> Any:
    """The rewriter that a recipe's step names, with its options."""
    module, _, name = REWRITERS[step.rewriter].partition(":")
    return getattr(import_module(module), name)(step, seed)
