"""Block reconstruction: it brings layers nearer to the parent's, in the shape that was planned, or changes nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model
from torch import Tensor
from transformers import AutoTokenizer

import surgery
from surgery.anatomy import examine
from surgery.calibration.text import Windows
from surgery.calibration.visit import Visit
from surgery.calibration.working_copy import WorkingCopy
from surgery.errors import RecipeError
from surgery.rewriters import gqa, share
from surgery.rewriters.common.refine import refine
from surgery.rewriters.latent import method

REFERENCE = Path(os.environ.get("SURGERY_REFERENCE", Path(__file__).parents[2] / "shared" / "reference"))

STEPS: dict[str, tuple[str, dict[str, Any]]] = {
    "gqa": ("llama", {"rewriter": "gqa", "kv_heads": 1}),
    "gqa under norms of q and k": ("qwen3", {"rewriter": "gqa", "kv_heads": 1}),
    "gqa with a norm after attention": ("gemma2", {"rewriter": "gqa", "kv_heads": 1}),
    "gqa, attention beside the MLP, tuples": ("gptj", {"rewriter": "gqa", "kv_heads": 2}),
    "mla": ("llama", {"rewriter": "mla", "keep": 0.4}),
    "lowrank": ("llama", {"rewriter": "lowrank", "keep": 0.4}),
    "lowrank by groups": ("gpt2", {"rewriter": "lowrank", "keep": 0.4, "layout": "grouped", "group": 2}),
    "share": ("llama", {"rewriter": "share", "layout": "cla2"}),
    "shared latents": ("llama", {"rewriter": "share", "layout": "cla2", "init": "latent", "keep": 0.4}),
    "shared values": ("llama", {"rewriter": "share", "layout": "svformer"}),
}


def text(windows: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 120, (windows, 24), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", STEPS)
def test_refined_layers_lead_no_further_from_the_parents(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family, step = STEPS[name]
    errors: list[tuple[float, float]] = []
    copies: list[WorkingCopy] = []

    def watched(visit: Visit, steps: int) -> None:
        before = visit.error()
        refine(visit, steps)
        errors.append((before, visit.error()))
        copies.append(visit.copy)

    for module in (gqa, share, method):
        monkeypatch.setattr(module, "refine", watched)
    child = surgery.convert(tiny_model(family), {"steps": [step | {"refine": 60}]}, calibration=text(64))
    assert errors
    assert all(after <= before for before, after in errors)
    # What was trained is what the runtime runs: no number of the form was trained that it does not have.
    with torch.no_grad():
        torch.testing.assert_close(child(text(4, 1)).logits, copies[0].model(text(4, 1)).logits, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize(
    "step",
    [
        {"rewriter": "gqa", "kv_heads": 1},
        pytest.param({"rewriter": "lowrank", "keep": 0.3}, marks=pytest.mark.slow),
    ],
)
def test_a_real_model_comes_nearer(step: dict[str, Any], stories: Any) -> None:
    """On text that was neither trained on nor looked at."""
    model, ids = stories
    held_out = Windows(ids[48:], torch.ones_like(ids[48:], dtype=torch.bool), "held out")
    found = []
    for steps in (0, 60):
        child = surgery.convert(model, {"steps": [step | {"refine": steps}]}, calibration=ids[:48])
        found.append(WorkingCopy(model, examine(model)).divergence_of(child, held_out))
    assert found[1] < 0.85 * found[0]


@pytest.fixture(scope="module")
def stories() -> Any:
    folder = Path(__file__).parent.parent.parent / "shared/reference"
    if not folder.exists():
        pytest.skip("the reference checkpoints are absent")
    texts = [
        json.loads(line)["text"] for line in (folder / "text/tinystories-917.jsonl").read_text().splitlines()[:400]
    ]
    model = surgery.load(folder / "checkpoints/stories260K-hf", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "checkpoints/stories260K-hf")
    rows = [ids for text in texts if len(ids := tokenizer(text).input_ids[:128]) == 128]
    return model, torch.tensor(rows[:64])


def test_what_does_not_help_on_held_out_windows_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    step = {"rewriter": "gqa", "kv_heads": 1}
    parent = tiny_model("llama")
    plain = surgery.convert(parent, {"steps": [step]}, calibration=text(16))
    honest = Visit.error_of
    monkeypatch.setattr(Visit, "error_of", lambda self, *args: -honest(self, *args))  # away from the parent
    spoiled = surgery.convert(parent, {"steps": [step | {"refine": 20}]}, calibration=text(16))
    for key, tensor in plain.state_dict().items():
        torch.testing.assert_close(spoiled.state_dict()[key], tensor, rtol=1e-4, atol=1e-5)


def test_a_number_of_steps_below_zero_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"refine: -1 must be a number of steps"):
        surgery.plan(tiny_model("llama"), {"steps": [{"rewriter": "gqa", "kv_heads": 1, "refine": -1}]})


@pytest.mark.parametrize("option", [{"refine": 5}, {"gain_fit": "global"}])
@pytest.mark.parametrize(
    "step", [{"rewriter": "gqa", "kv_heads": 1, "init": "mean"}, {"rewriter": "share", "init": "replace"}]
)
def test_what_is_asked_for_and_fitted_on_text_is_not_left_out_without_it(step, option):
    with pytest.raises(surgery.PlanError, match=f"{step['rewriter']} asks for calibration text"):
        surgery.convert(tiny_model("llama"), {"steps": [step | option]})
