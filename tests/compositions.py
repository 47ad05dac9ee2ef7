"""Which steps stand together in one recipe: planned for every pair, and written as a table into `recipes/README.md`.

python tests/compositions.py      # write the table; test_compositions.py holds it equal
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

from families import tiny_model
from transformers import PreTrainedModel

import surgery

README = Path(__file__).parent.parent / "recipes" / "README.md"
BEGIN, END = "<!-- pairs: written by tests/compositions.py -->", "<!-- end of pairs -->"

STEPS: dict[str, dict[str, Any]] = {
    "gqa": {"rewriter": "gqa", "kv_heads": 2, "gain_fit": False},
    "mla": {"rewriter": "mla", "rank": 24, "rope_dims": 8},
    "lowrank": {"rewriter": "lowrank", "rank": 32, "k_share": 0.5},
    "share": {"rewriter": "share", "init": "least_squares", "gain_fit": False},
    "share, latent": {"rewriter": "share", "init": "latent", "keep": 0.5, "gain_fit": False},
    "share, V alone": {"rewriter": "share", "layout": "svformer", "init": "least_squares", "gain_fit": False},
    "dms": {"rewriter": "dms", "ratio": 1, "window": 4, "sinks": 2},
    "dmc": {"rewriter": "dmc", "ratio": 1, "window": 3, "sinks": 0},
    "evict": {"rewriter": "evict", "window": 4, "sinks": 2},
    "evict, by rank": {"rewriter": "evict", "scorer": "h2o", "recent": 32, "sinks": 2},
    "quantise": {"rewriter": "quantise", "codec": "int8", "group": 8, "recent": 4, "sinks": 2},
}
"""Each method, and forms of one that combine otherwise; in the order of their axes. Untrained gates drop nothing: 1."""
REASONS = {
    "A layer has one value per axis": "one value per axis",
    "an earlier step has given this one a latent": "one cache has one form: take `share` with `init: latent`",
    "who reads whose cache is one map": "one map says who reads whose cache",
    "K is rotated at read by the position": "a slot of several tokens has no one position to rotate K at, at read",
    "whose slots are not those of its own K": "K and V would lie in slots of different tokens",
    "pages hold plain numbers": "slots of tokens that leave lie in pages, which hold no codes",
    "other layers read its V beside keys": "K and V would lie in slots of different tokens",
}
"""A piece of a refusal -> the mathematical reason behind it, in short. A refusal that is not here fails the test."""


@functools.cache
def parent() -> PreTrainedModel:
    """Four layers of four KV heads."""
    return tiny_model("llama", num_hidden_layers=4, num_key_value_heads=4)


@functools.cache
def anatomy() -> surgery.Anatomy:
    return surgery.examine(parent())


def pairs() -> list[tuple[str, str]]:
    """Every two entries of `STEPS`, once, in the order of their axes."""
    names = list(STEPS)
    return [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]


def recipe(first: str, second: str, apart: bool) -> dict[str, Any]:
    """Both steps: on the same layers, or on two layers each."""
    steps = [STEPS[first], STEPS[second]]
    if apart:
        steps = [step | {"layers": layers} for step, layers in zip(steps, ("0-1", "2-3"), strict=True)]
    return {"name": f"{first} and {second}", "steps": steps}


def verdict(first: str, second: str, apart: bool) -> str:
    """`yes`, or the reason in short.

    Raises:
        KeyError: a refusal whose reason is not known.
    """
    try:
        surgery.plan(anatomy(), recipe(first, second, apart))
    except surgery.PlanError as error:
        found = [reason for piece, reason in REASONS.items() if piece in str(error)]
        if not found:
            raise KeyError(f"{first} and {second}: {error}") from None
        return found[0]
    return "yes"


def table() -> str:
    """The table as Markdown: pairs with the same verdicts share a row."""
    alike: dict[tuple[str, str], list[str]] = {}
    for first, second in pairs():
        verdicts = verdict(first, second, False), verdict(first, second, True)
        alike.setdefault(verdicts, []).append(f"{first} + {second}")
    lines = ["| steps | on the same layers | on different layers |", "|---|---|---|"]
    for (same, apart), names in sorted(alike.items(), reverse=True):
        lines.append(f"| {'; '.join(names)} | {same} | {apart} |")
    return "\n".join(lines)


def write() -> None:
    before, _, rest = README.read_text().partition(BEGIN)
    README.write_text(f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    sys.stdout.write(table() + "\n")
    write()
