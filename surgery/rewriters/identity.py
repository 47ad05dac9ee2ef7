"""Change nothing: every attention becomes ours with the parent's weights. Proves the anatomy on a real model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ..recipe import Step
from . import Method


@dataclass(frozen=True, kw_only=True)
class IdentityStep(Step):
    """Replace every attention by ours and change nothing: the proof of the anatomy, and a debugging tool."""

    rewriter: Literal["identity"] = "identity"

    def unread(self) -> dict[str, str]:
        return {"layers": "every attention is replaced. Leave it out."}


class Identity(Method):
    """The method of `IdentityStep`: no layer changes its plan, so no layer is handed to it."""

    Options = IdentityStep
    axis = "project"
    decides = False

    @property
    def needs_own_class(self) -> bool:
        """Yes, although the parent's class could say the plan: that is the purpose."""
        return True

    def plan(self, anatomy: Any, layers: tuple[Any, ...], where: str) -> tuple[Any, ...]:
        """`layers` as they are."""
        return layers

    def convert(self, *args: Any) -> None:
        """Nothing to convert."""
