"""The working copy: any mix of forms on its layers, whatever the device, and nothing of the caller's touched."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import surgery
from surgery.anatomy import examine
from surgery.calibration.statistics import layer_activations
from surgery.calibration.text import Windows
from surgery.calibration.working_copy import WorkingCopy
from surgery.convert import _own
from surgery.plan import Plan, plan
from surgery.rewriters import rewriter_for
from surgery.rewriters.tokens.windows import window_costs
from surgery.runtime.gated import SurgeryGatedAttention

GQA = {"rewriter": "gqa", "kv_heads": 2, "gain_fit": False}
MLA = {"rewriter": "mla", "keep": 0.5}
LOWRANK = {"rewriter": "lowrank", "keep": 0.5}
SHARE = {"rewriter": "share", "gain_fit": False}
DMS = {"rewriter": "dms", "window": 8, "ratio": 2}
DMC = {"rewriter": "dmc", "ratio": 2}

MIXES: dict[str, tuple[list[dict[str, Any]], list[str]]] = {
    "heads, latents": ([GQA | {"layers": "0-1"}, MLA | {"layers": "2-3"}], ["heads 2", "heads 2", "latent", "latent"]),
    "latents, heads": (
        [LOWRANK | {"layers": "0-1"}, GQA | {"layers": "2-3"}],
        ["latent", "latent", "heads 2", "heads 2"],
    ),
    "heads, shared latents": (
        [GQA | {"layers": "0-1"}, SHARE | {"layers": "2-3", "layout": {3: 2}, "init": "latent", "keep": 0.5}],
        ["heads 2", "heads 2", "latent", "latent of 2"],
    ),
    "latents, shared heads": (
        [MLA | {"layers": "0-1"}, SHARE | {"layers": "2-3", "layout": {3: 2}}],
        ["latent", "latent", "heads 4", "heads 4 of 2"],
    ),
    "shared heads, latents after them": (
        [MLA | {"layers": "2-3"}, SHARE | {"layers": "0-1", "layout": {1: 0}}],
        ["heads 4", "heads 4 of 0", "latent", "latent"],
    ),
    "pooled heads that are shared, latents": (
        [GQA | {"layers": "0-2"}, MLA | {"layers": "3"}, SHARE | {"layers": "1-2", "layout": {2: 1}, "init": "mean"}],
        ["heads 2", "heads 2", "heads 2 of 1", "latent"],
    ),
    "shared values, latents": (
        [MLA | {"layers": "2-3", "gain_fit": True}, SHARE | {"layers": "0-1", "layout": "svformer"}],
        ["heads 4", "heads 4, V of 0", "latent", "latent"],
    ),
    "heads and latents, gates on heads": (
        [GQA | {"layers": "0-1"}, MLA | {"layers": "3"}, DMS | {"layers": "0"}, DMC | {"layers": "2"}],
        ["heads 2 dms", "heads 2", "heads 4 dmc", "latent"],
    ),
}


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        initializer_range=0.2,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config).eval()


def ids(windows: int = 16, length: int = 20) -> Tensor:
    return torch.randint(3, 96, (windows, length), generator=torch.Generator().manual_seed(1))


def text(windows: int = 16) -> Windows:
    found = ids(windows)
    return Windows(found, torch.ones_like(found, dtype=torch.bool), f"random {windows}")


def run(work: WorkingCopy, model: LlamaForCausalLM, steps: list[dict[str, Any]], windows: Windows | None) -> Plan:
    """Carry out the steps; the settled plan."""
    planned = plan(model, {"steps": steps})
    for step in planned.recipe.steps:
        rewriter_for(step).convert(work, [after for _, after in planned.changed(step)], windows)
    return planned.settled(map(work.settle, planned.after))


def said(layer: Any) -> str:
    form = "latent" if layer.project.kind == "latent" else f"heads {layer.project.kv_heads}"
    form += f" of {layer.owner}" if layer.owner != layer.layer else ""
    form += f", V of {layer.value_owner}" if layer.value_owner is not None else ""
    return form + (f" {layer.retain.kind}" if layer.retain else "")


@pytest.mark.parametrize("name", MIXES)
def test_mixed_forms_give_the_result_that_was_calibrated(name: str) -> None:
    steps, wanted = MIXES[name]
    model = tiny()
    work = WorkingCopy(model, examine(model))
    settled = run(work, model, steps, text())
    assert [said(layer) for layer in settled.after] == wanted
    child = _own(model, settled, work, {})
    with torch.no_grad():
        found, want = work.model(ids(2)).logits, child(ids(2)).logits
        assert (found - model(ids(2)).logits).abs().max() > 1e-3
    torch.testing.assert_close(found, want, atol=1e-4, rtol=1e-4)


def test_heads_alone_put_no_hook_on_the_copy() -> None:
    model = tiny()
    work = WorkingCopy(model, examine(model))
    run(work, model, [GQA], text())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in work.model.modules())


def test_a_form_can_be_given_back() -> None:
    model = tiny()
    work = WorkingCopy(model, examine(model))
    want = work.model(ids(2)).logits
    before = work.form(3)
    work.read_from(3, 1)
    assert work.owners == {3: 1}
    assert not torch.equal(work.model(ids(2)).logits, want)
    work.take_form(3, before)
    assert torch.equal(work.model(ids(2)).logits, want)


def test_activations_bring_the_inputs_that_they_were_computed_with() -> None:
    model = tiny()
    work = WorkingCopy(model, examine(model))
    work.read_from(3, 1)
    batches = work.activations(3, text())
    first = [a.inputs[1].clone() for a in batches]
    # Neither another pass over the model nor a second iterator changes what a batch holds.
    pair = zip(batches, layer_activations(work, work.sites[2], text(8), (1,)), strict=False)
    for (a, _), want in zip(pair, first, strict=False):
        work.model(ids(3))
        assert torch.equal(a.inputs[1], want)
        assert torch.equal(a.inputs[3], a.x_student_BTD)


def test_measuring_windows_leaves_gates_as_they_were_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    work = WorkingCopy(model, examine(model))
    planned = plan(model, {"steps": [{"rewriter": "evict", "window": 6, "sinks": 2}]})
    seen: list[Any] = []

    def fail(built: Any, _: Windows) -> float:
        seen.append(built)
        raise KeyboardInterrupt

    monkeypatch.setattr(work, "divergence_of", fail)
    with pytest.raises(KeyboardInterrupt):
        window_costs(work, planned.after, text(), lambda _: None)(1, 6)
    gates = [m for m in seen[0].modules() if isinstance(m, SurgeryGatedAttention)]
    assert [gate.retain.window for gate in gates] == [20] * 4


@pytest.mark.parametrize("step", [GQA | {"init": "random"}, MLA, SHARE, DMS | {"windows": "sensitivity"}])
def test_conversion_neither_uses_nor_changes_the_callers_random_state(step: dict[str, Any]) -> None:
    model, found = tiny(), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        before = torch.get_rng_state(), random.getstate(), repr(np.random.get_state())
        found.append(surgery.convert(model, {"steps": [step]}, calibration=ids()).state_dict())
        assert torch.equal(torch.get_rng_state(), before[0])
        assert (random.getstate(), repr(np.random.get_state())) == before[1:]
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())
