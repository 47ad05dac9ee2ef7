"""A program that uses every public name, for type checkers: `.ci/run` reads it with pyright; nothing runs it.

`assert_type` fails where a checker knows less than what stands there.
"""

from pathlib import Path
from typing import assert_type

from transformers import PreTrainedModel

import surgery


def read(folder: str) -> surgery.Plan:
    anatomy = surgery.examine(folder)
    assert_type(anatomy, surgery.Anatomy)
    assert_type(anatomy.sites[0].kv_heads, int)
    assert_type(surgery.Recipe.load("gqa-2x", ["kv_heads=4"]), surgery.Recipe)
    plan = surgery.plan(anatomy, {"steps": [{"rewriter": "gqa", "kv_heads": 4}]})
    assert_type(plan.bytes_per_token, int)
    return plan


def rewrite(folder: str, out: Path) -> surgery.Report:
    model = surgery.convert(folder, "gqa-2x", calibration=["a text"], seed=1)
    assert_type(model, PreTrainedModel)
    assert_type(surgery.convert_checkpoint(folder, "gqa-2x", out, overwrite=True), surgery.Plan)
    surgery.save(model, out)
    assert_type(surgery.load(out), PreTrainedModel)
    assert_type(surgery.generate(model, "Once", tokens=3), str)
    assert_type(surgery.export(model, out, to="hub").lines(), list[str])
    composed = surgery.compose(model, ratio=4, calibration=["a text"])
    assert_type(composed.recipe, surgery.Recipe)
    parent = surgery.load(folder)
    report = surgery.evaluate(model, baseline=parent, text="held-out.jsonl", recall_tasks=["all"], speed=True)
    assert_type(report.kl, float | None)
    return report


def hold_less(model: PreTrainedModel) -> None:
    surgery.quantise_cache(model, "int4")
    assert surgery.cache(model, evict="snapkv", ratio=4) and surgery.retrieval_heads(model)


def told(error: Exception) -> str:
    if isinstance(error, surgery.CheckpointError | surgery.PlanError | surgery.RecipeError | surgery.UnsupportedModel):
        assert_type(isinstance(error, surgery.SurgeryError), bool)
    return str(error)
