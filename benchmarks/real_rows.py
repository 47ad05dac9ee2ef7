"""What `real_models.py` measures: every shipped recipe, and published forms with as many bytes per token.

A published form is a recipe too: the steps of this library with the method's own way to choose, nothing refitted and
one split for all layers. Its rows stand in the same `group` as the row of this library that they are compared with.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from common import ROOT
from latent_quality import KEPT

NO_FITS = {"refit_queries": False, "refit_output": False}
PLAIN_HEADS = {"grouping": "neighbour", **NO_FITS, "gain_fit": False}
SLOTS, SINKS = 128, 4
"""Tokens that the evicting rows keep, their sinks among them: a quarter of a window of text."""
REFINE = 200
FAMILIES = ("heads", "latent", "low rank", "shared", "evicted", "codes")


@dataclass(frozen=True)
class Row:
    """One child of the parent."""

    name: str
    family: str
    """Of `FAMILIES`; its colour in the plot."""
    recipe: Any
    """Name of a shipped recipe, or steps; None for the parent and for H2O, which convert nothing."""
    group: str = ""
    """Rows of one group have as many bytes per token, and are compared."""
    published: bool = False
    calibrated: bool = True
    """Whether it reads the calibration text; the others would give the same with it."""
    evicts: bool = False
    """Whether it holds fewer tokens than it read, so that its bytes per token fall with the length."""
    h2o_slots: int | None = None
    """Scored in one pass by an attention function that evicts from the first token on, as decoding every token would;
    the step `evict` lets a prompt see everything first (`evict_quality.py`)."""
    refines: str | None = None
    """The row of which this is the same with `refine`."""

    @property
    def folder(self) -> str:
        """Its name, as a folder can have it."""
        return "".join(c if c.isalnum() or c in "-." else "-" for c in self.name)


def step(rewriter: str, **options: Any) -> dict[str, Any]:
    """A recipe of one step."""
    return {"steps": [{"rewriter": rewriter, **options}]}


def shipped(name: str, **more: Any) -> dict[str, Any]:
    """A shipped recipe with further options in its last step."""
    recipe = yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text())
    recipe["steps"][-1] |= more
    return {"steps": recipe["steps"]}


def mla(keep: float, init: str, kv_dims: int) -> dict[str, Any]:
    """A published latent: one split for all layers, as in `latent_quality.py`."""
    rope_dims = round(int(keep * kv_dims) * KEPT[keep] / 2) * 2
    return step("mla", keep=keep, init=init, rope_dims=rope_dims, **NO_FITS)


def lowrank(keep: float, init: str) -> dict[str, Any]:
    """A published low-rank form: one split for all layers, nothing fitted, the mean not kept apart."""
    return step("lowrank", keep=keep, init=init, k_share=0.42, mean_split=False, **NO_FITS)


def share(init: str, layout: str, **more: Any) -> dict[str, Any]:
    """Caches shared as they are."""
    return step("share", init=init, layout=layout, **NO_FITS, gain_fit=False, **more)


def rows(kv_dims: int, layers: int, kv_heads: int) -> list[Row]:
    """All rows, the most telling ones first.

    Args:
        kv_dims: numbers per token and layer of the parent's K and V.
    """
    thirds, halves = layers - layers // 3, layers - layers // 2
    window = SLOTS - SINKS
    heads = f"heads, 1 of {kv_heads}"
    latents = {0.5: "latent, 50 %", 0.25: "latent, 25 %", 0.125: "latent, 12.5 %"}
    ranks = {0.5: "low rank, 50 %", 0.3: "low rank, 30 %"}
    caches = {halves: "shared, 1 of 2", thirds: "shared, 2 of 3"}
    evicted = f"evicted, {SLOTS} slots"
    return [
        Row("parent", "", None),
        Row("mqa", "heads", "mqa", heads),
        Row("mean", "heads", step("gqa", kv_heads=1, init="mean", **PLAIN_HEADS), heads, True, False),
        Row("kv-3bit", "codes", "kv-3bit", "codes, 3 bits"),
        Row("kivi, 3 bits", "codes", step("quantise", codec="kivi", k_bits=2), "codes, 3 bits", True, False),
        Row("mla-4x", "latent", "mla-4x", latents[0.25]),
        Row("transmla, 25 %", "latent", mla(0.25, "transmla", kv_dims), latents[0.25], True),
        Row("lowrank-2x", "low rank", "lowrank-2x", ranks[0.5]),
        Row("whitened low rank, 50 %", "low rank", lowrank(0.5, "whitened"), ranks[0.5], True),
        Row("cla2-latent", "shared", "cla2-latent", caches[halves]),
        Row("pairs, replace", "shared", share("replace", "cla2"), caches[halves], True, False),
        Row("kv-2bit", "codes", "kv-2bit", "codes, 2.25 bits"),
        Row("turbo, 2.25 bits", "codes", step("quantise", codec="turbo", k_bits=2), "codes, 2.25 bits", True, False),
        Row("kv-int4", "codes", "kv-int4", calibrated=False),
        Row("kv-int8", "codes", "kv-int8", calibrated=False),
        Row("mla-2x", "latent", "mla-2x", latents[0.5]),
        Row("transmla, 50 %", "latent", mla(0.5, "transmla", kv_dims), latents[0.5], True),
        Row("window and sinks", "evicted", step("evict", window=window), evicted, True, False, True),
        Row("windows by layer", "evicted", step("evict", window=window, windows="sensitivity"), evicted, evicts=True),
        Row("h2o", "evicted", None, evicted, True, False, True, SLOTS),
        Row("lowrank-3x", "low rank", "lowrank-3x", ranks[0.3]),
        Row("whitened low rank, 30 %", "low rank", lowrank(0.3, "whitened"), ranks[0.3], True),
        Row("cla2", "shared", "cla2", caches[halves]),
        Row("kvsharer, 1 of 2", "shared", share("replace", "kvsharer", kv_layers=halves), caches[halves], True),
        Row("mqa, refined", "heads", shipped("mqa", refine=REFINE), heads, refines="mqa"),
        Row("aligned", "heads", step("gqa", kv_heads=1, init="aligned", **PLAIN_HEADS), heads, True),
        Row("whitened, 25 %", "latent", mla(0.25, "whitened", kv_dims), latents[0.25], True),
        Row("svd, 25 %", "latent", mla(0.25, "svd", kv_dims), latents[0.25], True),
        Row("whitened, 50 %", "latent", mla(0.5, "whitened", kv_dims), latents[0.5], True),
        Row("svd, 50 %", "latent", mla(0.5, "svd", kv_dims), latents[0.5], True),
        Row("mla-8x", "latent", "mla-8x", latents[0.125]),
        Row("transmla, 12.5 %", "latent", mla(0.125, "transmla", kv_dims), latents[0.125], True),
        Row("mla-4x, refined", "latent", shipped("mla-4x", refine=REFINE), latents[0.25], refines="mla-4x"),
        Row("plain low rank, 50 %", "low rank", lowrank(0.5, "plain"), ranks[0.5], True),
        Row("plain low rank, 30 %", "low rank", lowrank(0.3, "plain"), ranks[0.3], True),
        Row("lowrank-freq-2x", "low rank", "lowrank-freq-2x", ranks[0.5]),
        Row("latents, 2 of 3", "shared", step("share", layout="mlkv", kv_layers=thirds, init="latent"), caches[thirds]),
        Row("kvsharer, 2 of 3", "shared", share("replace", "kvsharer", kv_layers=thirds), caches[thirds], True),
        Row("pattern, replace", "shared", share("replace", "mlkv", kv_layers=thirds), caches[thirds], True, False),
        Row("lowrank-3x, refined", "low rank", shipped("lowrank-3x", refine=REFINE), ranks[0.3], refines="lowrank-3x"),
        Row("cla2, refined", "shared", shipped("cla2", refine=REFINE), caches[halves], refines="cla2"),
        Row("whitened, 12.5 %", "latent", mla(0.125, "whitened", kv_dims), latents[0.125], True),
        Row("svd, 12.5 %", "latent", mla(0.125, "svd", kv_dims), latents[0.125], True),
        Row("key norm", "evicted", step("evict", scorer="key_norm", window=SLOTS // 2, ratio=4), evicted, True,
            evicts=True),
        Row("mla-4x-int4", "codes", "mla-4x-int4"),
        Row("cla2-int4", "codes", "cla2-int4"),
        Row("gqa-2x-int4", "codes", "gqa-2x-int4"),
        Row("yoco-half", "shared", "yoco-half"),
        Row("mlkv-4", "shared", "mlkv-4"),
        Row("gqa-2x", "heads", "gqa-2x"),
        Row("gqa-4x", "heads", "gqa-4x"),
        Row("cla2-gqa-2x", "shared", "cla2-gqa-2x"),
        Row("window-1k", "evicted", "window-1k", evicts=True),
        Row("snapkv-4x", "evicted", "snapkv-4x", calibrated=False, evicts=True),
        Row("ada-snapkv-4x", "evicted", "ada-snapkv-4x", calibrated=False, evicts=True),
        Row("ada-snapkv-4x-int4", "evicted", "ada-snapkv-4x-int4", calibrated=False, evicts=True),
        Row("snapkv, 12x", "evicted", step("evict", scorer="snapkv", budget="ada", ratio=12), "", True, False, True),
        Row("kvzip-2x", "evicted", "kvzip-2x", calibrated=False, evicts=True),
        Row("kvzip-4x", "evicted", "kvzip-4x", calibrated=False, evicts=True),
        Row("duo-2x", "evicted", "duo-2x", evicts=True),
        Row("quest-4x", "evicted", "quest-4x", calibrated=False, evicts=True),
        Row("h2o-4x", "evicted", "h2o-4x", calibrated=False, evicts=True),
        Row("streaming-1k", "evicted", "streaming-1k", calibrated=False, evicts=True),
        Row("identity", "", "identity", calibrated=False),
    ]  # fmt: skip


def needs_training(recipe: str) -> bool:
    """Whether a shipped recipe answers as its parent until its gates are trained, so that there is nothing to see."""
    steps = yaml.safe_load((ROOT / "recipes" / f"{recipe}.yaml").read_text())["steps"]
    return any(s["rewriter"] in ("dms", "dmc") for s in steps)


def untrained(known: list[Row]) -> list[str]:
    """Shipped recipes that are not among the rows, which must all be such as need training.

    Raises:
        AssertionError: one is neither measured nor a matter of training.
    """
    names = {row.recipe for row in known if isinstance(row.recipe, str)}
    left = sorted(path.stem for path in Path(ROOT / "recipes").glob("*.yaml") if path.stem not in names)
    if forgotten := [name for name in left if not needs_training(name)]:
        raise AssertionError(f"recipes without a row: {', '.join(forgotten)}")
    return left
