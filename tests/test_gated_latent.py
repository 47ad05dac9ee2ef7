"""Latents whose tokens leave or are averaged: one decision for each, and otherwise what gated heads promise."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from closeness import assert_close
from families import tiny_model
from gated_models import GREEDY, contents, model_of, run, tokens
from transformers import PreTrainedModel

import surgery
import surgery.runtime.paged_attention
from surgery.calibration.text import Windows
from surgery.errors import PlanError
from surgery.measure.gates import read_gates
from surgery.measure.memory import tensor_bytes
from surgery.rewriters.tokens.gates import new_gate
from surgery.runtime.layout import Dense, Gate, Heads, Latent, LayerPlan, Pool
from surgery.runtime.paged_cache import PagedLayer
from surgery.train.gates import budget_of, check_length

FORMS = [("mla", "dms", 6), ("mla", "dmc", 3), ("mla", "dmc", None), ("lowrank", "dms", 6)]
every_form = pytest.mark.parametrize(("latent", "method", "window"), FORMS)
FAST = {"refit_queries": False, "refit_output": False, "gain_fit": False}
MLA = {"rewriter": "mla", "rank": 12, "rope_dims": 4, **FAST}
DMS = {"rewriter": "dms", "ratio": 2, "window": 4, "sinks": 2}
EVICT = {"rewriter": "evict", "window": 4, "sinks": 2}


def text() -> torch.Tensor:
    return torch.randint(3, 120, (8, 48), generator=torch.Generator().manual_seed(0))


def converted(*steps: dict[str, object], family: str = "llama") -> PreTrainedModel:
    return surgery.convert(tiny_model(family), {"name": "tiny", "steps": list(steps)}, calibration=text()).eval()


@torch.no_grad()
def whole(model: PreTrainedModel, ids: torch.Tensor, **more: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = model(ids, use_cache=False, **more).logits
    return found


@every_form
def test_whole_sequence_prefill_chunks_and_single_tokens_are_the_same(
    latent: str, method: str, window: int | None
) -> None:
    model, ids = model_of(method, window, latent=latent), tokens()
    want = whole(model, ids)
    held = []
    for ends in ([40], [9, 10, 25, 40], [10, *range(11, 41)]):
        logits, cache = run(model, ids, ends)
        assert_close(logits, want)
        held.append(contents(cache))
    assert all(layer.lengths.shape == (2, 1) for layer in cache.layers)
    assert int(cache.layers[0].lengths.max()) < 40
    for one, other in ((a, b) for rows in held[1:] for a, b in zip(held[0], rows, strict=True)):
        for x, y in zip(one, other, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@every_form
def test_padding_beams_and_every_cache_are_the_same(latent: str, method: str, window: int | None) -> None:
    model, ids = model_of(method, window, latent=latent), tokens(length=14)
    want = model.generate(ids, **GREEDY, use_cache=False)
    assert torch.equal(model.generate(ids, **GREEDY), want)
    assert torch.equal(model.generate(ids, **GREEDY, past_key_values=model.static_cache(26, ratio=1.0)), want)
    beams = model.generate(ids, **GREEDY, num_beams=3)
    assert torch.equal(beams, model.generate(ids, **GREEDY, num_beams=3, use_cache=False))
    mask = torch.ones_like(ids)
    ids[0, :5], mask[0, :5] = 0, 0
    batched = model.generate(ids, attention_mask=mask, **GREEDY)
    assert torch.equal(batched[:1, 5:], model.generate(ids[:1, 5:], **GREEDY))
    assert torch.equal(batched[1:], model.generate(ids[1:], **GREEDY))


@pytest.mark.parametrize(("latent", "method"), [("mla", "dms"), ("mla", "dmc"), ("lowrank", "dms")])
def test_packed_documents_do_not_see_each_other(latent: str, method: str) -> None:
    model, ids = model_of(method, 3, latent=latent), tokens(batch=1, length=30)
    positions = torch.cat((torch.arange(18), torch.arange(12)))[None]
    found = whole(model, ids, position_ids=positions)
    assert_close(found[:, :18], whole(model, ids[:, :18]))
    assert_close(found[:, 18:], whole(model, ids[:, 18:]))


def test_readers_follow_the_slots_of_their_owner() -> None:
    for latent, method, window in (("mla", "dms", 6), ("mla", "dmc", 3), ("lowrank", "dms", 6)):
        model, ids = model_of(method, window, latent=latent, shared=True), tokens()
        logits, cache = run(model, ids, [20, *range(21, 30), 40])
        assert_close(logits, whole(model, ids))
        assert tensor_bytes(cache) == sum(t.numel() * t.element_size() for t in cache.layers[0].tensors())


def test_decoding_without_the_kernels_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = model_of("dms", 6, latent="mla"), tokens()
    with_kernels, _ = run(model, ids, [20, *range(21, 41)])
    monkeypatch.setattr(surgery.runtime.paged_attention, "AVAILABLE", False)
    assert_close(run(model, ids, [20, *range(21, 41)])[0], with_kernels)


@pytest.mark.parametrize("family", ["gpt_oss", "gemma2"])
def test_sinks_and_soft_caps_count_as_they_do_without_gates(family: str) -> None:
    model, ids = model_of("dms", 6, latent="mla", family=family), tokens(length=24)
    logits, cache = run(model, ids, [10, *range(11, 20), 24])
    assert_close(logits, whole(model, ids), 2e-5)
    assert any(isinstance(layer, PagedLayer) for layer in cache.layers)


@every_form
def test_gates_that_keep_all_change_nothing(latent: str, method: str, window: int | None) -> None:
    model, ids = model_of(method, window, latent=latent, drops=0.0), tokens()
    plain = model_of("dms", 64, latent=latent)  # every token is inside the window
    assert_close(whole(model, ids), whole(plain, ids))
    assert_close(run(model, ids, [20, *range(21, 41)])[0], whole(plain, ids))


@pytest.mark.parametrize(
    ("latent", "method", "window"), [("mla", "dms", 12), ("mla", "dmc", 3), ("lowrank", "dms", 12)]
)
def test_the_plan_says_the_bytes_of_a_static_cache(latent: str, method: str, window: int | None) -> None:
    model = model_of(method, window, latent=latent)
    cache = model.static_cache(64)
    run(model, tokens(length=4), [4], cache)
    assert tensor_bytes(cache) == 2 * sum(plan.static_bytes(64) for plan in model.plans)


# Through the public door


def test_a_window_over_latents_converts_saves_loads_and_generates(tmp_path: Path) -> None:
    recipe = {"name": "tiny", "steps": [MLA, EVICT]}
    planned = surgery.plan(tiny_model("llama"), recipe)
    assert f"window {EVICT['window']}" in str(planned)
    model, ids = converted(MLA, EVICT), tokens(batch=1, length=44)
    assert planned.parameters == model.num_parameters()
    logits, cache = run(model, ids, [40, 41, 42, 43, 44])
    assert_close(logits, whole(model, ids))
    # 6 slots of 12 + 4 numbers in pages of 16, tables of 8 entries, and what the window remembers.
    assert tensor_bytes(cache) == planned.cache_bytes(44)
    assert [plan.entry() for plan in model.plans] == [(1, 16, 0)] * len(model.plans)
    surgery.save(model, tmp_path)
    again = surgery.load(tmp_path)
    assert torch.equal(again.generate(ids, **GREEDY), model.generate(ids, **GREEDY))


def test_a_window_longer_than_the_text_leaves_the_latent_as_it_was() -> None:
    both, alone, ids = converted(MLA, EVICT | {"window": 64}), converted(MLA), tokens()
    assert_close(whole(both, ids), whole(alone, ids))
    assert_close(run(both, ids, [20, *range(21, 41)])[0], whole(alone, ids))


def test_layers_with_heads_and_layers_with_latents_take_one_step() -> None:
    GQA = {"rewriter": "gqa", "kv_heads": 1, "init": "mean", "layers": "0"}
    model, ids = converted(GQA, MLA | {"layers": "1"}, DMS), tokens()
    heads, latent = (plan.project for plan in model.plans)
    assert isinstance(heads, Heads) and isinstance(latent, Latent)
    assert [plan.decisions for plan in model.plans] == [1, 1]
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.gate.weight.normal_(std=0.02)
    want = whole(model, ids)
    assert_close(run(model, ids, [20, *range(21, 41)])[0], want)
    static = model.static_cache(40, ratio=1.0)
    assert_close(run(model, ids, [20, *range(21, 41)], static)[0], want)


def test_gradients_reach_the_gate_and_the_budget_counts_one_decision_per_token() -> None:
    model, ids = converted(MLA, DMS).train(), tokens()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.gate.bias.fill_(0.2)
    model(ids, labels=ids).loss.backward()
    for layer in model.model.layers:
        attention = layer.self_attn
        assert attention.gate.weight.shape[0] == 1
        for parameter in (attention.gate.weight, attention.gate.bias, attention.kv_down.weight, attention.v_up):
            assert parameter.grad is not None and bool(parameter.grad.isfinite().all()) and bool(parameter.grad.any())
    assert len(budget_of(model, 40).rate) == len(model.plans)
    check_length(model, 40, per_head=False)
    found = read_gates(model, Windows(ids, torch.ones_like(ids, dtype=torch.bool), "test"))
    assert all(len(row) == 1 for row in found.ratio.values())


@pytest.mark.parametrize("step", [MLA, {"rewriter": "lowrank", "rank": 12, **FAST}])
def test_key_norm_reaches_its_ratio_on_the_text_it_was_calibrated_on(step: dict[str, object]) -> None:
    model, ids = converted(step, EVICT | {"scorer": "key_norm", "ratio": 2}), text()
    found = read_gates(model, Windows(ids, torch.ones_like(ids, dtype=torch.bool), "test"))
    assert abs(found.total - 2) < 0.15


def test_windows_of_latents_can_be_measured_on_text() -> None:
    model = converted(MLA, EVICT | {"windows": "sensitivity", "window": 8})
    windows = [plan.retain.window for plan in model.plans if plan.retain and plan.retain.window]
    assert len(windows) == len(model.plans) and sum(windows) <= 8 * len(windows)


def test_readers_of_a_shared_latent_follow_its_one_decision() -> None:
    SHARE = {"rewriter": "share", "layout": {1: 0}, "init": "latent", "keep": 0.5}
    model, ids = converted(SHARE, EVICT), tokens()
    owner, reader = model.plans
    assert isinstance(owner.project, Latent) and owner.decisions == 1 and reader.owner == 0
    want = whole(model, ids)
    logits, cache = run(model, ids, [20, *range(21, 41)])
    assert_close(logits, want)
    assert int(cache.layers[0].lengths.max()) == 6


@pytest.mark.parametrize("latent", ["mla", "lowrank"])
def test_bfloat16_decodes_as_it_prefills(latent: str) -> None:
    # Decisions near 0 may fall either way by rounding of the layers before: here all tokens go.
    model, ids = copy.deepcopy(model_of("dms", 6, latent=latent, drops=1.0)).bfloat16(), tokens()
    assert_close(run(model, ids, [20, *range(21, 41)])[0], whole(model, ids), 0.03)


@pytest.mark.parametrize(
    ("steps", "sentence"),
    [
        ([MLA, DMS | {"gate": "borrowed"}], "a latent is no key.*gate: adapter"),
        ([{"rewriter": "lowrank", "rank": 12}, {"rewriter": "dmc", "ratio": 2}], "the mean of their positions"),
    ],
)
def test_a_plan_refuses_what_latents_cannot_do(steps: list[dict[str, object]], sentence: str) -> None:
    with pytest.raises(PlanError, match=sentence):
        surgery.plan(tiny_model("llama"), {"name": "tiny", "steps": steps})


def test_the_values_say_which_forms_they_support() -> None:
    latent = Latent(rank=6, rope_dims=2, kv_heads=2, head_dim=4, value_dim=4)
    heads = Heads(kv_heads=2, head_dim=4, value_dim=4, groups=((0,), (1,)))
    gate, pool = Gate(ratio=2.0, window=4), Pool(ratio=2.0, window=None)
    assert gate.supports_project(latent) is pool.supports_project(latent) is None
    assert Gate(ratio=2.0, window=4, gate="borrowed").supports_project(heads) is None
    plan = LayerPlan(layer=0, project=latent, owner=0, retain=gate, store=Dense(dtype="float32"))
    assert plan.decisions == 1 and new_gate(gate, 16, plan.decisions)["weight"].shape == (1, 16)


def test_thresholds_are_measured_on_the_keys_that_the_runtime_scores() -> None:
    """Channels are in halves at calibration and in pairs in this parent; gains of its norm belong to one of the two."""
    ids = torch.randint(3, 128, (8, 48), generator=torch.Generator().manual_seed(0))
    lowrank = {"rewriter": "lowrank", "rank": 28, "k_share": 0.5}
    evict = {"rewriter": "evict", "scorer": "key_norm", "ratio": 2, "window": 4, "sinks": 1}
    model = surgery.convert(tiny_model("cohere_qk_norm"), {"steps": [lowrank, evict]}, calibration=ids).eval()
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    for layer in cache.layers:
        assert abs(float(layer.lengths.float().mean()) - 24) < 2
