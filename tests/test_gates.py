"""Learned merging and eviction: decisions, the training form, plans, gates that learn."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import tiny_model
from methods import METHODS, converted
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel
from typer.testing import CliRunner
from uptraining import make_home, run

import surgery
from surgery.calibration.text import Windows
from surgery.cli import app
from surgery.errors import CheckpointError, PlanError, RecipeError
from surgery.measure.gates import Counted, collapsed, count_layer, gated, read_gates
from surgery.measure.memory import tensor_bytes
from surgery.plan import plan
from surgery.report.data import Report
from surgery.report.page import write_report
from surgery.runtime.decisions import (
    hard_decisions,
    log_keep,
    order_of_packed,
    pooled,
    same_sequence,
    soft_bias,
    visible,
)
from surgery.runtime.layout import LayerPlan, Pool, Retain
from surgery.runtime.retain import RETAINS
from surgery.train.gates import Budget, budget_of, check_length, shortfall
from surgery.train.uptrain import uptrain

DMS = {"rewriter": "dms", "ratio": 2, "window": 4, "sinks": 2}
EVICT = {"rewriter": "evict", "window": 4, "sinks": 2}
DMC = {"rewriter": "dmc", "ratio": 2, "window": 3, "sinks": 0}
MLA = {"rewriter": "mla", "rank": 12, "rope_dims": 4}


def recipe(*steps: dict[str, object], **uptrain_: object) -> dict[str, object]:
    return {"name": "tiny", "steps": list(steps)} | ({"uptrain": uptrain_} if uptrain_ else {})


def tokens(batch: int = 2, length: int = 20, seed: int = 0) -> Tensor:
    return torch.randint(3, 120, (batch, length), generator=torch.Generator().manual_seed(seed))


def logits(model: PreTrainedModel, ids: Tensor, **more: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, use_cache=False, **more).logits
    return found


def retained(kind: str = "dms", **options: object) -> Retain:
    return RETAINS[kind](**{"ratio": 2.0, "window": 3, "sinks": 1} | options)  # type: ignore[arg-type]


# Decisions


@pytest.mark.parametrize("window", [1, 3, None])
@pytest.mark.parametrize("hard", [True, False])
def test_a_pooled_slot_is_the_weighted_mean_of_its_run(window: int | None, hard: bool) -> None:
    torch.manual_seed(0)
    x, weight, p = (torch.rand(shape, dtype=torch.float64) for shape in ((2, 2, 9, 3), (2, 2, 9), (2, 2, 9)))
    p = (p > 0.4).double() if hard else p
    p[..., 0] = 0
    want = torch.empty_like(x)
    for t in range(9):
        factor, top, bottom = torch.ones(2, 2).double(), 0.0, 0.0
        for s in range(t, -1 if window is None else max(-1, t - window), -1):
            top = top + (factor * weight[..., s])[..., None] * x[:, :, s]
            bottom = bottom + factor * weight[..., s]
            factor = factor * p[..., s]
        want[:, :, t] = top / bottom[..., None]
    torch.testing.assert_close(pooled(x, weight, p, window), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("window", [2, None])
def test_gradients_of_pooling_are_those_of_its_definition(window: int | None) -> None:
    torch.manual_seed(0)
    x, weight, p = (
        torch.rand(s, dtype=torch.float64, requires_grad=True) for s in ((1, 1, 5, 2), (1, 1, 5), (1, 1, 5))
    )
    assert torch.autograd.gradcheck(lambda *a: pooled(*a, window), (x, weight + 0.1, p * 0.8 + 0.1))


def test_a_run_of_one_token_is_that_token_to_the_last_bit() -> None:
    x, weight = torch.randn(1, 2, 6, 4), torch.rand(1, 2, 6) + 0.1
    assert torch.equal(pooled(x, weight, torch.zeros(1, 2, 6), 12), x)


def test_dms_hides_a_token_behind_the_window_if_its_own_decision_says_so() -> None:
    decisions = torch.tensor([[[0, 1, 0, 1, 0, 0]]], dtype=torch.bool)
    seen = visible(decisions, torch.arange(6)[None], retained(window=2))[0, 0]
    assert seen[5].tolist() == [True, False, True, False, True, True]
    assert seen[2].tolist() == [True, True, True, False, False, False]  # 1 is still in the window of 2


def test_dmc_leaves_the_newest_token_of_each_run_visible() -> None:
    decisions = torch.tensor([[[0, 1, 1, 0, 1, 0]]], dtype=torch.bool)
    seen = visible(decisions, torch.arange(6)[None], Pool(ratio=2.0, window=None))[0, 0]
    assert seen[5].tolist() == [False, False, True, False, True, True]
    assert seen[1].tolist() == [False, True, False, False, False, False]


@pytest.mark.parametrize("method", ["dms", "dmc"])
def test_certain_relaxed_decisions_hide_what_hard_ones_hide(method: str) -> None:
    merge = retained(method)
    order = order_of_packed(torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]]))
    a = torch.where(torch.rand(1, 2, 9) > 0.5, 1e4, -1e4)
    hard = hard_decisions(a, order, merge.protected)
    bias = soft_bias(log_keep(a, order, merge.protected, 0.3, None), order, merge)
    assert torch.equal(bias > -1e3, visible(hard, order, merge))


def test_padding_sinks_and_the_starts_of_documents_never_go() -> None:
    everything = torch.ones(1, 1, 8)
    padded = torch.arange(8)[None] - 2
    assert hard_decisions(everything, padded, retained(sinks=2).protected)[0, 0].tolist() == [False] * 4 + [True] * 4
    packed = order_of_packed(torch.tensor([[5, 6, 7, 0, 1, 2, 3, 4]]))
    assert hard_decisions(everything, packed, 1)[0, 0].tolist() == [False, True, True, False, True, True, True, True]
    # The token behind the sinks would merge into the last of them.
    assert Pool(ratio=2.0, window=None, sinks=2).protected == 3
    assert not same_sequence(packed)[0, 3, 2]


# The model


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize(
    "step",
    [DMS, DMC, *(s | {"gate": "borrowed"} for s in (DMS, DMC)), *(DMS | {"gate": gate} for gate in ("mlp", "head"))],
)
def test_at_conversion_logits_are_the_parents_to_the_last_bit(family: str, step: dict[str, object]) -> None:
    parent = tiny_model(family)
    child, ids = surgery.convert(parent, recipe(step)), tokens()
    assert torch.equal(logits(child, ids), logits(parent, ids))
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    padded = [logits(model, ids, attention_mask=mask)[mask.bool()] for model in (child, parent)]
    assert torch.equal(*padded)


@pytest.mark.parametrize("method", ["dms", "dmc", "shared_dmc"])
def test_packed_documents_and_left_padding_change_nothing(method: str) -> None:
    model, ids = converted(method, "llama"), tokens(1, 20)
    alone = [logits(model, part) for part in ids.split([8, 12], dim=1)]
    positions = torch.cat((torch.arange(8), torch.arange(12)))[None]
    packed = logits(model, ids, position_ids=positions)
    torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=1e-4, atol=1e-5)
    padded = torch.cat((torch.zeros(1, 5, dtype=torch.long), ids[:, :8]), 1)
    mask = torch.cat((torch.zeros(1, 5), torch.ones(1, 8)), 1).long()
    found = logits(model, padded, attention_mask=mask, position_ids=mask.cumsum(-1).sub(1).clamp_min(0))
    torch.testing.assert_close(found[:, 5:], alone[0], rtol=1e-4, atol=1e-5)


def test_decisions_change_what_the_model_says_and_only_behind_the_window() -> None:
    model, plain, ids = converted("dms", "llama"), converted("identity", "llama"), tokens()
    got, want = logits(model, ids), logits(plain, ids)
    first = METHODS["dms"].retain
    assert first is not None and first.window is not None
    reach = first.protected + first.window
    torch.testing.assert_close(got[:, :reach], want[:, :reach], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(got[:, reach:], want[:, reach:], atol=1e-3)


def test_training_draws_noise_and_evaluation_does_not() -> None:
    model, ids = converted("dmc", "llama"), tokens()
    assert torch.equal(logits(model, ids), logits(model, ids))
    model.train()
    assert not torch.equal(logits(model, ids), logits(model, ids))


def test_a_checkpoint_without_its_gates_is_refused(tmp_path: Path) -> None:
    surgery.save(surgery.convert(tiny_model("llama"), recipe(DMS)), tmp_path / "dms")
    file = tmp_path / "dms" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.self_attn.gate.weight"
    save_file({n: t for n, t in tensors.items() if n != name}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=name):
        surgery.load(tmp_path / "dms")
    save_file(tensors | {name: tensors[name][:1]}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match="gate.weight"):
        surgery.load(tmp_path / "dms")


def test_a_plan_written_before_there_were_gates_still_loads() -> None:
    data = json.loads(json.dumps(plan(tiny_model("llama"), recipe(DMS)).after[0].to_dict()))
    assert LayerPlan.from_dict(data).retain == retained(window=4, sinks=2)
    del data["retain"]
    assert LayerPlan.from_dict(data).retain is None


def test_borrowed_channels_fade_once_and_then_learn() -> None:
    model = surgery.convert(tiny_model("llama"), recipe(DMS | {"gate": "borrowed"}))
    layer = model.model.layers[0].self_attn
    rows = layer.k_proj.weight.unflatten(0, (-1, layer.head_dim))
    layer.set_ramp(0.05)
    assert 0 < float(layer.gate.channel) < 1
    assert rows[:, -1].abs().min() > 0
    layer.set_ramp(0.2)
    assert float(layer.gate.channel) == 0
    assert rows[:, -1].abs().max() == 0
    with torch.no_grad():
        layer.k_proj.weight += 1.0
    layer.set_ramp(0.3)
    assert rows[:, -1].abs().min() > 0
    assert 1 < layer.target_ratio < 2


# Recipes and plans


@pytest.mark.parametrize(
    ("step", "sentence"),
    [
        (DMS | {"ratio": 0.5}, "at least 1"),
        (DMS | {"window": 0}, "window: 0"),
        (DMS | {"gate": "adaptor"}, "Did you mean 'adapter'"),
        (DMC | {"gate": "score:key_norm"}, "not allowed"),
        (DMS | {"sinks": -1}, "sinks"),
        (DMS | {"page": 1000}, "page"),
    ],
)
def test_a_recipe_says_what_is_wrong_with_its_gate(step: dict[str, object], sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        surgery.Recipe.load(recipe(step))


GQA = {"rewriter": "gqa", "kv_heads": 1, "init": "mean"}


@pytest.mark.parametrize(
    ("steps", "family", "sentence"),
    [
        ([DMS | {"ratio": 60}], "llama", "out of reach: 4 newest tokens and the first 2"),
        ([DMS, GQA], "llama", "put gqa before dms"),
        ([DMS, DMC], "llama", "did already. A layer has one value per axis"),
        ([{"rewriter": "lowrank", "rank": 16}, DMC], "llama", "the mean of their positions"),
        ([{"rewriter": "share", "layout": "svformer"}, DMS], "llama", "reads its V|other layers read"),
        ([DMS], "gpt_oss", "cache is bounded already"),
        ([DMS], "bloom", "ALiBi"),
    ],
)
def test_a_plan_refuses_what_gates_cannot_do_yet(steps: list[dict[str, object]], family: str, sentence: str) -> None:
    with pytest.raises(PlanError, match=sentence):
        plan(tiny_model(family), recipe(*steps))


def test_a_plan_names_method_ratio_and_window_and_readers_follow_their_owner() -> None:
    made = plan(tiny_model("llama"), recipe({"rewriter": "share", "layout": {1: 0}, "init": "replace"}, DMS))
    assert "dms 2x window 4" in str(made)
    assert made.after[1].retain == made.after[0].retain
    child = surgery.convert(tiny_model("llama"), made.recipe)
    assert len(gated(child)) == 1
    assert made.parameters == child.num_parameters()


def test_gates_compose_with_merged_heads() -> None:
    both = surgery.convert(tiny_model("llama"), recipe(GQA, DMS))
    alone = surgery.convert(tiny_model("llama"), recipe(GQA))
    torch.testing.assert_close(logits(both, tokens()), logits(alone, tokens()), rtol=1e-4, atol=1e-5)
    assert both.model.layers[0].self_attn.gate.weight.shape[0] == 1


# Scores


def test_key_norm_reaches_its_ratio_on_the_text_it_was_calibrated_on() -> None:
    ids = tokens(12, 48)
    step = EVICT | {"scorer": "key_norm", "ratio": 2}
    with pytest.raises(PlanError, match="calibration text"):
        surgery.convert(tiny_model("llama"), recipe(step))
    model = surgery.convert(tiny_model("llama"), recipe(step), calibration=ids)
    found = read_gates(model, Windows(ids, torch.ones_like(ids, dtype=torch.bool), "test"))
    assert abs(found.total - 2) < 0.15


def test_the_window_score_keeps_sinks_and_window() -> None:
    ids = tokens(2, 48)
    model = surgery.convert(tiny_model("llama"), recipe(EVICT))
    found = read_gates(model, Windows(ids, torch.ones_like(ids, dtype=torch.bool), "test"))
    assert found.total == pytest.approx(48 / (2 + 4))
    assert len(found.warnings) == 2


# Training


def test_the_share_of_decisions_that_a_ratio_asks_for_gives_that_ratio() -> None:
    merge = retained(window=8, sinks=4)
    length = 64
    wanted = merge.drop_rate(length, 2.5)
    free = length - merge.always_kept
    a = torch.full((1, 1, length), -1.0)
    a[..., merge.protected : merge.protected + round(wanted * free)] = 1.0
    counted = count_layer(a, torch.arange(length)[None], merge)
    assert float(counted.tokens / counted.slots) == pytest.approx(2.5, abs=0.06)


def test_the_budget_pushes_only_while_too_few_tokens_go() -> None:
    a = torch.tensor([[[-1.0] * 6, [-1.0] * 3 + [1.0] * 3]], requires_grad=True)
    counted = count_layer(a, torch.arange(6)[None] + 8, retained(sinks=0))
    for target, missing in ((0.5, 0.25), (0.25, 0.0), (0.1, 0.0)):
        found = shortfall(counted, Budget(torch.full((2,), target), torch.ones(2)), False, lambda x: x)
        assert float(found.detach()) == pytest.approx(missing)
    per_head = shortfall(counted, Budget(torch.full((2,), 0.5), torch.ones(2)), True, lambda x: x)
    assert float(per_head.detach()) == pytest.approx(0.25)
    per_head.backward()
    assert a.grad is not None
    assert (a.grad[0, 0] < 0).all()


def test_a_budget_over_layers_with_unequal_windows_is_met_at_the_ratio_over_all_slots(home: Path) -> None:
    steps = [{**DMS, "window": window, "ratio": 3, "layers": str(i)} for i, window in enumerate((2, 12))]
    model = surgery.convert(surgery.load(home / "parent"), recipe(*steps))
    length, generator = 32, torch.Generator().manual_seed(0)
    for module in gated(model).values():
        module.set_ramp(1.0)
    rates = torch.linspace(0.2, 1.0, 9)
    for narrow, wide in torch.cartesian_prod(rates, rates).tolist():
        parts = []
        for rate, module in zip((narrow, wide), gated(model).values(), strict=True):
            goes = torch.rand(64, module.heads.kv_heads, length, generator=generator) < rate
            parts.append(count_layer(goes.float() - 0.5, torch.arange(length).expand(64, -1), module.retain))
        counted = Counted(*(torch.cat(column) for column in zip(*parts, strict=True)))
        missing = float(shortfall(counted, budget_of(model, length), False, lambda x: x))
        at_risk = sum(length - m.retain.always_kept for m in gated(model).values()) / len(gated(model))
        slots = float(counted.slots.sum() / counted.tokens.sum()) * length
        assert missing == pytest.approx(max(0.0, (slots - length / 3) / at_risk), abs=0.02)


def test_windows_by_layer_are_longer_where_old_tokens_matter_and_cost_as_much_together(home: Path) -> None:
    parent = surgery.load(home / "parent")
    with torch.no_grad():
        parent.get_submodule("model.layers.1.self_attn.o_proj").weight.zero_()  # nobody misses its old tokens
    step = {**DMS, "window": 8, "windows": "sensitivity"}
    child = surgery.convert(parent, recipe(step), calibration=tokens(8, 32), seed=0)
    windows = {module.layer_idx: module.retain.window for module in gated(child).values()}
    assert windows[0] > 8 > windows[1] and sum(windows.values()) <= 16
    assert [layer["plan"]["retain"]["window"] for layer in child.config.surgery["layers"]] == list(windows.values())
    ids = tokens(2, 24)
    torch.testing.assert_close(child(ids).logits, parent(ids).logits, rtol=0, atol=0)


@pytest.mark.parametrize(("window", "said"), [(32, True), (40, True), (24, False)])
def test_windows_by_layer_never_shrink_for_want_of_long_text(home: Path, caplog, window, said) -> None:
    """Text of 32 tokens tells nothing of older ones; what layers do not ask for on it is shared out all the same."""
    step = {**DMS, "window": window, "windows": "sensitivity"}
    child = surgery.convert(surgery.load(home / "parent"), recipe(step), calibration=tokens(8, 32), seed=0)
    windows = [module.retain.window for module in gated(child).values()]
    assert sum(windows) in (2 * window, 2 * window - 1)
    assert ("Give a `length` of" in caplog.text) is said
    assert windows == [window] * 2 or not said


def test_windows_by_layer_need_text_and_layers_with_caches_of_their_own(home: Path) -> None:
    parent = surgery.load(home / "parent")
    with pytest.raises(PlanError, match="calibration text"):
        surgery.convert(parent, recipe({**DMS, "windows": "sensitivity"}))
    with pytest.raises(PlanError, match="windows: sensitivity shares windows out .* one layer is selected"):
        surgery.plan(parent, recipe({**DMS, "windows": "sensitivity", "layers": "1"}))
    share = {"rewriter": "share", "layout": {1: 0}, "init": "replace"}
    with pytest.raises(PlanError, match="one dms step for each window"):
        surgery.plan(parent, recipe(share, {**DMS, "windows": "sensitivity"}))


def test_a_window_asks_nothing_of_training_and_is_hard_there_too(home: Path) -> None:
    step = {"rewriter": "evict", "window": 4}
    assert plan(home / "parent", recipe(step)).after[0].retain.ratio == 256 / 8  # of the context, four sinks kept
    model = surgery.convert(surgery.load(home / "parent"), recipe(step))
    ids = tokens(2, 24)
    torch.testing.assert_close(model.train()(ids, use_cache=False).logits, model.eval()(ids, use_cache=False).logits)
    assert not any(part.any() for part in budget_of(model, 24))
    check_length(model, 6, per_head=False)
    cache = model(ids[:1], use_cache=True).past_key_values
    assert tensor_bytes(cache) == sum(layer.bytes_at(24) for layer in plan(home / "parent", recipe(step)).after)


def test_a_collapsed_gate_is_named() -> None:
    """Heads that are to keep everything or nothing old do so by design."""
    models = [converted(method, "llama") for method in ("dms", "dms_head")]
    plain, heads = (next(iter(gated(model).values())) for model in models)
    assert collapsed({"a": plain, "b": plain, "c": plain, "d": heads}, [0.0, 0.5, 1.0, 1.0]) == [
        "a: its gate lets no token go",
        "c: its gate lets every token go",
    ]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_home(tmp_path_factory.mktemp("merge"))
    mlp = [MLA, DMS | {"gate": "mlp"}]
    for name, steps in (("dms", [DMS]), ("dmc", [GQA, DMC]), ("mla", mlp)):
        parent, text = surgery.load(folder / "parent"), tokens(8, 48) if name == "mla" else None
        surgery.save(surgery.convert(parent, recipe(*steps), calibration=text), folder / name)
    return folder


@pytest.mark.parametrize("model", ["dms", "dmc", "mla"])
def test_gates_learn_to_keep_their_budget_and_nothing_else_moves(home: Path, tmp_path: Path, model: str) -> None:
    options = ("layer_local=0", "train=gates", "length=32", "batch=4", "tokens=5120", "learning_rate=0.02")
    summary = uptrain(run(home, tmp_path, *options, model=model, held_out=str(home / "held.jsonl"), save_steps=100))
    before, after = (load_file(f / "model.safetensors") for f in (home / model, tmp_path / "model"))
    changed = {name.split(".")[-2] for name in after if not torch.equal(after[name], before[name])}
    assert changed == {"gate"}
    log = json.loads((tmp_path / "uptraining.json").read_text())["log"]
    steps = [entry for entry in log if "gate_rate" in entry]
    assert steps[0]["gate_rate"] < 0.1
    assert steps[-1]["gate_rate"] > 0.5
    assert steps[-1]["gate_ratio"] > 1.2 * steps[0]["gate_ratio"]
    assert summary["after"]["ratio"] > summary["before"]["ratio"] == 1.0


@pytest.mark.parametrize("step", [DMS, DMC])
def test_borrowed_channels_become_gates_and_learn_to_keep_their_budget(home: Path, tmp_path: Path, step: dict) -> None:
    start = surgery.convert(surgery.load(home / "parent"), recipe({**step, "gate": "borrowed"}))
    surgery.save(start, tmp_path / "start")
    options = ("layer_local=0", "train=converted", "length=32", "batch=4", "tokens=10240", "learning_rate=0.03")
    summary = uptrain(
        run(home, tmp_path / "run", *options, model=str(tmp_path / "start"), held_out=str(home / "held.jsonl"))
    )
    model = surgery.load(tmp_path / "run" / "model")
    for module in gated(model).values():
        assert float(module.gate.channel) == 0
        rows = module.k_proj.weight[module.site.head_dim - 1 :: module.site.head_dim]
        assert rows.abs().sum() > 0  # set to zero, they have learned since
    assert summary["after"]["ratio"] > 1.2 * summary["before"]["ratio"]
    ids = tokens(2, 24)
    with torch.no_grad():
        whole, begun = model(ids).logits, model(ids[:, :9], use_cache=True)
        rest = model(ids[:, 9:], past_key_values=begun.past_key_values).logits
    torch.testing.assert_close(torch.cat((begun.logits, rest), dim=1), whole, rtol=0, atol=1e-5)


def test_gates_beside_other_weights_learn_at_a_rate_of_their_own(home: Path, tmp_path: Path) -> None:
    steps = {}
    for rate in (1, 5):
        out = tmp_path / str(rate)
        options = ("layer_local=0", "train=converted", "length=32", "batch=4", "tokens=128", "gate_ramp=0", "warmup=0")
        uptrain(run(home, out, *options, "decay=0", "learning_rate=1e-3", f"gate_rate={rate}", model="dmc"))
        before, after = (load_file(f / "model.safetensors") for f in (home / "dmc", out / "model"))
        steps[rate] = {name: (after[name] - before[name]).abs().max() for name in after}
    moved = {name: float(steps[5][name] / steps[1][name]) for name in steps[1] if steps[1][name] > 0}
    assert any(".gate." in name for name in moved) and any("q_proj" in name for name in moved)
    assert moved == {name: pytest.approx(5 if ".gate." in name else 1, rel=1e-3) for name in moved}


def test_checkpointing_trains_the_same_gates(home: Path, tmp_path: Path) -> None:
    options = ("layer_local=0", "train=gates", "length=32", "tokens=512", "learning_rate=0.02", "gate_ramp=0")
    made = {}
    for name, more in {"plain": {}, "again": {"checkpointing": True}}.items():
        uptrain(run(home, tmp_path / name, *options, model="dms", save_steps=100, **more))
        made[name] = load_file(tmp_path / name / "model" / "model.safetensors")
    before = load_file(home / "dms" / "model.safetensors")
    assert {name for name, tensor in made["plain"].items() if not tensor.equal(before[name])}  # it has trained
    for name, tensor in made["plain"].items():
        torch.testing.assert_close(made["again"][name], tensor, rtol=1e-4, atol=1e-6)


def test_training_refuses_gates_that_are_not_there_and_sequences_too_short_for_the_ratio(
    home: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match="none that can be trained alone"):
        uptrain(run(home, tmp_path, "layer_local=0", "train=gates"))
    with pytest.raises(RecipeError, match="always stay"):
        uptrain(run(home, tmp_path, "layer_local=0", "train=gates", "length=8", model="dms"))
    with pytest.raises(RecipeError, match="layer_local"):
        uptrain(run(home, tmp_path, "train=gates", model="dms"))


def test_inspect_shows_what_gates_decide(home: Path, tmp_path: Path) -> None:
    plot, out = tmp_path / "gates.png", tmp_path / "gates.json"
    arguments = ["inspect", "--gates", str(home / "dms"), "--text", str(home / "text.jsonl"), "--length", "16"]
    result = CliRunner().invoke(app, [*arguments, "--plot", str(plot), "--json", str(out)])
    assert result.exit_code == 0, result.output
    assert "its gate lets no token go" in result.output
    assert plot.stat().st_size > 1000
    found = json.loads(out.read_text())
    assert found["tokens_per_slot"] == 1.0
    assert found["window_start"] == []
    assert set(found["tokens_per_slot_by_head"]) == {"0", "1"}


def test_a_report_shows_what_gates_keep_and_draws_it(tmp_path: Path) -> None:
    ids, model = tokens(3, 24), surgery.convert(tiny_model("llama"), recipe(EVICT))
    report = surgery.evaluate(model, text=ids, path="prefill")
    assert report.model.gates is not None
    assert report.model.gates.total == pytest.approx(24 / 6)
    assert "one of 4.00 tokens" in str(report)
    assert Report.from_dict(json.loads(json.dumps(report.to_dict()))).model.gates == report.model.gates
    write_report([report], tmp_path / "page")
    assert (tmp_path / "page" / "plots" / "gates-1.png").stat().st_size > 1000


def test_padding_is_not_counted_among_tokens_or_slots() -> None:
    ids, model = tokens(2, 24), surgery.convert(tiny_model("llama"), recipe(EVICT))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, 12:] = False
    found = read_gates(model, Windows(ids, mask, "test"))
    assert found.total == pytest.approx((12 + 24) / (6 + 6))
    assert found.tokens == 36
    assert len(found.example) == 12


def test_models_without_gates_have_none_to_inspect() -> None:
    ids = tokens()
    with pytest.raises(CheckpointError, match="has no gates"):
        read_gates(tiny_model("llama"), Windows(ids, torch.ones_like(ids, dtype=torch.bool), "test"))


def test_a_step_that_would_do_nothing_is_refused() -> None:
    share = {"rewriter": "share", "layout": {1: 0}, "init": "replace"}
    with pytest.raises(PlanError, match="none of layers 1 keeps a cache of its own.*Select these: 0"):
        plan(tiny_model("llama"), {"steps": [share, DMS | {"layers": "1"}]})
    with pytest.raises(PlanError, match="layer 1: .* did already"):
        plan(tiny_model("llama"), {"steps": [DMS, DMS | {"layers": "1"}]})
    with pytest.raises(PlanError, match="layer 0: .* did already"):
        plan(tiny_model("llama"), recipe_of({"init": "mean"}, {"init": "first"}))


def recipe_of(*options: dict[str, object]) -> dict[str, object]:
    return {"steps": [{"rewriter": "gqa", "kv_heads": 1, **more} for more in options]}


def test_plans_of_readers_and_owners_are_json() -> None:
    layer = LayerPlan.from_dict(plan(tiny_model("llama"), recipe(DMC)).after[0].to_dict())
    assert layer == replace(layer)
    assert layer.retain == Pool(ratio=2.0, window=3, sinks=0)
