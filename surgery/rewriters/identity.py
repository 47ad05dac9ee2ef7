"""Change nothing: every attention becomes ours with the parent's weights. Proves the anatomy on a real model."""

from __future__ import annotations

from typing import Any


class Identity:
    """The rewriter of `IdentityStep`: no layer changes its plan, so no layer is handed to it."""

    def __init__(self, step: Any, seed: int = 0) -> None:
        del step, seed

    def convert(self, *args: Any) -> None:
        """Nothing to convert."""
