"""KV heads that keep more than others: how they are found, what plans say of them, and what caches hold."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_close
from families import tiny_model
from gated_models import run, tokens
from torch import Tensor
from transformers import PreTrainedModel

import surgery
from surgery.calibration.gradients import output_gradients
from surgery.calibration.text import Windows
from surgery.calibration.working_copy import WorkingCopy
from surgery.measure.memory import tensor_bytes
from surgery.rewriters.tokens.retrieval import TIMES, best, divided, looking_up, streaming_costs
from surgery.runtime.budgets import BUDGETS
from surgery.runtime.calling import cache_argument
from surgery.runtime.layout import Ranked
from surgery.runtime.ranked_cache import RankedLayer

FOUR = {"num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
STEP: dict[str, Any] = {"rewriter": "evict", "scorer": "streaming", "recent": 4, "sinks": 2, "ratio": 2}
TEXT = torch.randint(0, 100, (9, 24), generator=torch.Generator().manual_seed(2))
FINDING = [name for name, budget in BUDGETS.items() if budget.finds != "nothing"]


@functools.cache
def model(family: str = "llama") -> PreTrainedModel:
    torch.manual_seed(0)
    return tiny_model(family, **FOUR).eval()


@functools.cache
def anatomy() -> surgery.Anatomy:
    return surgery.examine(model())


@functools.cache
def found(budget: str, **options: Any) -> PreTrainedModel:
    text = TEXT if BUDGETS[budget].by == "text" else None
    return surgery.convert(model(), {"steps": [STEP | {"budget": budget} | options]}, calibration=text).eval()


def attentions(ids: Tensor) -> tuple[Tensor, ...]:
    eager = tiny_model("llama", **FOUR).eval()
    eager.load_state_dict(model().state_dict())
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        return eager(ids, output_attentions=True).attentions


def layers_of(plan: surgery.Plan) -> list[Any]:
    return [layer for _, layer in plan.changed()]


def drawn(logp_BTV: Tensor, seed: int) -> Tensor:
    """What gradients are taken of: roots of the probabilities, with signs drawn window by window."""
    random = torch.Generator().manual_seed(seed)
    signs = torch.stack([torch.randint(2, row.shape, generator=random) * 2 - 1 for row in logp_BTV])
    return (2 * signs * (logp_BTV / 2).exp()).sum()


def test_squared_gradients_of_answers_are_twice_the_kl_of_a_small_change() -> None:
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 1, 7, generator=random, dtype=torch.float64, requires_grad=True)
    change = 1e-3 * torch.randn(7, generator=random, dtype=torch.float64)
    logp = logits.log_softmax(-1)
    products = [
        float((torch.autograd.grad(drawn(logp, seed), logits, retain_graph=True)[0] * change).sum())
        for seed in range(4000)
    ]
    after = (logits + change).log_softmax(-1)
    kl = float((logp.exp() * (logp - after)).sum().detach())
    assert sum(x**2 for x in products) / len(products) == pytest.approx(2 * kl, rel=0.1)


def gradients_of_answers(ids: Tensor, seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """By layer: the values, and the gradient of the answers at what the attention gives; by autograd, in one go."""
    values, added = [], []

    def add(_: Any, __: Any, out: Tensor) -> Tensor:
        added.append(torch.zeros_like(out, requires_grad=True))
        return out + added[-1]

    handles = []
    for layer in model().model.layers:
        handles.append(layer.self_attn.v_proj.register_forward_hook(lambda _, args, out: values.append(out.detach())))
        handles.append(layer.self_attn.o_proj.register_forward_hook(add))
    logp = model()(ids).logits.log_softmax(-1)
    for handle in handles:
        handle.remove()
    return values, list(torch.autograd.grad(drawn(logp, seed), added))


def test_costs_are_what_answers_lose_when_one_head_streams() -> None:
    plan = surgery.plan(anatomy(), {"steps": [STEP | {"budget": "duo"}]})
    windows = Windows(TEXT, torch.ones_like(TEXT, dtype=torch.bool), "text")
    with torch.no_grad():
        costs = streaming_costs(WorkingCopy(model(), plan.anatomy), layers_of(plan), windows, 2, 12, seed=5)
    ids = TEXT[:8, :12].repeat(1, 2)  # the last window is one to compare on
    values, gradients = gradients_of_answers(ids, 5)
    behind = torch.arange(24)[:, None] - torch.arange(24)
    near = (behind < 12) | (torch.arange(24) < 2)
    for i, weights in enumerate(attentions(ids)):
        value = values[i].unflatten(-1, (4, 8)).transpose(1, 2).repeat_interleave(2, dim=1).double()
        streaming = weights.double() * near
        lost = (weights.double() - streaming / streaming.sum(-1, keepdim=True)) @ value  # [B, N, T, H]
        for k in range(4):
            alone = lost.masked_fill((torch.arange(8) // 2 != k)[:, None, None], 0.0).transpose(1, 2).flatten(2)
            change = alone @ model().model.layers[i].self_attn.o_proj.weight.detach().double().T
            want = (change * gradients[i]).sum(-1).square().mean() / 2
            assert float(costs[i][k]) == pytest.approx(float(want), rel=1e-3)


@pytest.mark.parametrize("family", ["falcon", "gemma2", "granite", "phi", "opt", "mixtral"])
def test_gradients_of_layers_run_one_by_one_are_those_of_the_whole_model(family: str) -> None:
    """By a change of what one attention gives that is small enough: the answers drawn change by the product."""
    whole = tiny_model(family).eval()
    ids = torch.randint(3, 100, (3, 12), generator=torch.Generator().manual_seed(1))
    anatomy = surgery.examine(whole)
    windows, copy = Windows(ids, torch.ones_like(ids, dtype=torch.bool), "text"), WorkingCopy(whole, anatomy)
    last, added = anatomy.sites[-1], []
    for site in (anatomy.sites[0], last):
        o = whole.get_submodule(site.o.weight.rpartition(".")[0])
        with output_gradients(copy, windows, [site.layer], 7) as found:
            got = found[site.layer][0]
        handle = o.register_forward_hook(lambda _, args, out: out + added[-1].reshape(out.shape))
        added.append(torch.zeros(2, 12, last.hidden_size, requires_grad=True))
        logp = whole(ids[:2], use_cache=False).logits.log_softmax(-1)
        handle.remove()
        want = torch.autograd.grad(drawn(logp, 7), added[-1])[0]
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_heads_that_look_up_what_came_before_are_found() -> None:
    """Of two sorts, one of fifteen the echo heads: against the weights that transformers gives."""
    plan = surgery.plan(anatomy(), {"steps": [STEP | {"budget": "razor", "part": 0.5}]})
    copy = WorkingCopy(model(), plan.anatomy)
    chosen = looking_up(copy, layers_of(plan), 0.5, seed=3)
    limit = model().config.max_position_embeddings
    period = limit // TIMES
    assert period < 500 and sum(map(len, chosen.values())) == 6
    rows = 1 + -(-model().config.hidden_size // (TIMES * period))
    random = torch.Generator().manual_seed(3)
    ids = torch.randint(model().config.vocab_size, (rows, period), generator=random).repeat(1, TIMES)
    ids = ids[: Windows(ids, torch.ones_like(ids, dtype=torch.bool), "").split()[0].ids_BT.shape[0]]
    place = torch.arange(ids.shape[1])
    behind = place[:, None] - place
    scores = {}
    for kind, n in (("echo", 0), ("induction", 1)):
        counts = ((behind + n) % period == 0) & (behind >= 0) & (behind + n > 0) & (place[:, None] >= period)
        for i, weights in enumerate(attentions(ids)):
            scores[kind, i] = (weights * counts).sum((0, 2, 3)).view(4, 2).amax(-1)
    order = sorted(
        ((i, k) for i in range(3) for k in range(4)), key=lambda at: -float(scores["induction", at[0]][at[1]])
    )
    assert {(i, k) for i, heads in chosen.items() for k in heads} == set(order[:6])  # 0.4 echo heads are none
    assert copy.held_out is None
    many = looking_up(copy, layers_of(plan), 1.0, seed=3)
    assert many == {i: (0, 1, 2, 3) for i in range(3)}
    with pytest.raises(surgery.RecipeError, match="part: 2 of the KV heads"):
        surgery.retrieval_heads(model(), 2)
    whole = surgery.retrieval_heads(model(), 0.5, seed=3)
    assert whole == chosen
    cache = surgery.cache(model(), evict="streaming", ratio=8, recent=4, whole=whole)
    model()(tokens(length=64), **{cache_argument(model()): cache})
    for layer, head in itertools.product(range(3), range(4)):
        held = cache.layers[layer]
        count = held.lengths[0, head] if isinstance(held, RankedLayer) else held.get_seq_length()
        assert count == (64 if head in whole.get(layer, ()) else 8)


def test_shares_are_proportional_and_nobody_has_more_than_all() -> None:
    costs = torch.tensor([8.0, 1.0, 1.0, 2.0, 0.0, 0.0]).double()
    shares = divided(costs, 1 / 6, 4.0)
    assert float(shares.sum()) == pytest.approx(6) and (shares <= 4).all() and (shares > 0).all()
    assert shares[0] == pytest.approx(1 / 6 + 5 * 8 / 12)
    capped = divided(costs, 1 / 6, 2.0)
    assert float(capped.sum()) == pytest.approx(6) and capped[0] == 2
    left = capped[1:]
    assert left[2] - left[3] == pytest.approx(float(2 * (left[0] - left[3])))  # the even part apart, as the costs
    assert_close(divided(torch.zeros(3).double(), 1 / 6, 2.0), torch.ones(3).double())
    assert_close(divided(costs, 1 / 6, 1.0), torch.ones(6).double())


@pytest.mark.parametrize("budget", FINDING)
@torch.no_grad()
def test_what_was_found_stands_in_the_plan_and_the_cache_holds_that(budget: str, tmp_path: Path) -> None:
    made, ids = found(budget), tokens(length=90)
    plans = [plan.retain for plan in made.plans]
    assert any(isinstance(r, Ranked) for r in plans)
    if budget == "headkv":
        shares = torch.tensor([r.shares for r in plans])
        assert shares.shape == (3, 4) and float(shares.mean()) == pytest.approx(1) and len(shares.unique()) > 6
    else:
        whole = sum(4 if r is None else len(r.whole) for r in plans)
        assert whole == (6 if budget == "duo" else 2) and all(r is None or r.part == 0 for r in plans)
    logits, cache = run(made, ids, [60, *range(61, 91)])
    for layer, plan in zip(cache.layers, made.plans, strict=True):
        if plan.retain is None:
            assert layer.get_seq_length() == 90
            continue
        want = plan.retain.slots_by_head(60)
        held = run(made, ids, [60])[1].layers[plan.layer].lengths
        by_head = [60 if k in plan.retain.whole else (want * 4)[k if len(want) > 1 else 0] for k in range(4)]
        assert held.tolist() == [by_head] * 2
    assert tensor_bytes(run(made, ids, [60])[1]) == 2 * sum(plan.bytes_at(60) for plan in made.plans)
    surgery.save(made, tmp_path / "child")
    again = surgery.load(tmp_path / "child").eval()
    assert again.plans == made.plans
    assert torch.equal(run(again, ids, [60, *range(61, 91)])[0], logits)


@pytest.mark.parametrize("budget", FINDING)
@torch.no_grad()
def test_a_budget_for_all_heads_changes_nothing(budget: str) -> None:
    options = {"part": 1.0} if budget == "razor" else {}
    made = found(budget, ratio=1, **options)
    assert_close(run(made, tokens(length=40), [30, *range(31, 41)])[0], run(model(), tokens(length=40), [40])[0])


def test_checkpoints_find_the_same_heads_layer_by_layer(tmp_path: Path) -> None:
    model().save_pretrained(tmp_path / "parent")
    recipe = {"steps": [STEP | {"budget": "duo"}]}
    plan = surgery.convert_checkpoint(tmp_path / "parent", recipe, tmp_path / "child", calibration=TEXT)
    assert plan.after == found("duo").plans


def test_heads_are_those_that_are_left_of_earlier_steps() -> None:
    """Two KV heads of four in the first layers, readers in the last; costs of a reader count for its owner."""
    gqa = {"rewriter": "gqa", "kv_heads": 2, "layers": "0"}
    made = surgery.convert(model(), {"steps": [gqa, STEP | {"budget": "duo"}]}, calibration=TEXT)
    assert sum(made.plans[i].decisions if (r := made.plans[i].retain) is None else len(r.whole) for i in range(3)) == 5
    share = {"rewriter": "share", "layout": {2: 1}, "init": "replace"}
    made = surgery.convert(model(), {"steps": [share, STEP | {"budget": "headkv"}]}, calibration=TEXT)
    assert made.plans[2].retain == made.plans[1].retain and len(made.plans[1].retain.shares) == 4
    plan = made.plans[:2]
    assert sum(sum(layer.retain.shares) for layer in plan) == pytest.approx(8)


@pytest.mark.parametrize(
    ("step", "sentence"),
    [
        ({"budget": "ada", "part": 0.5}, "part: only budgets that find heads read it: duo, razor"),
        ({"budget": "headkv", "part": 0.5}, "part: only budgets that find heads read it: duo, razor"),
        ({"budget": "duo", "whole": {0: [1]}}, "whole: duo finds the heads when the model is converted"),
        ({"budget": "razor", "slots": 20, "ratio": 4}, "slots: with razor the ratio says how many heads"),
        (
            {"budget": "duo", "part": 0.7},
            "part: 0.7 of the KV heads keep everything, which is more than one of 2 tokens",
        ),
        ({"budget": "razor", "ratio": 8}, "Use a part of at most 0.125, or a ratio of at most 6.67"),
        ({"budget": "duo", "scorer": "snapkv", "pool": 3}, "pool: duo leaves heads .* what always stays alone"),
        ({"budget": "razor", "scorer": "snapkv", "part": 0.5, "observe": 3}, "observe: razor leaves heads"),
        ({"budget": "duo", "part": 1.5}, "part: 1.5 of the KV heads; give a number above 0"),
    ],
)
def test_options_about_heads_that_do_not_go_together_are_refused(step: dict[str, Any], sentence: str) -> None:
    with pytest.raises(surgery.RecipeError, match=sentence):
        surgery.plan(anatomy(), {"steps": [STEP | step]})


def test_what_cannot_be_found_is_refused_before_work_begins() -> None:
    duo = {"steps": [STEP | {"budget": "duo"}]}
    with pytest.raises(surgery.PlanError, match="evict asks for calibration text"):
        surgery.convert(model(), duo)
    with pytest.raises(surgery.PlanError, match="windows of 6 tokens, of which heads that stream keep the first 2"):
        surgery.convert(model(), duo, calibration=TEXT[:, :6])
    mla = {"rewriter": "mla", "rank": 24, "rope_dims": 4}
    with pytest.raises(surgery.PlanError, match="layer 0: .* duo tells KV heads apart, and the layer caches a latent"):
        surgery.plan(anatomy(), {"steps": [mla, *duo["steps"]]})
    with pytest.raises(surgery.PlanError, match="budget 'razor' finds out about heads when a model is converted"):
        surgery.cache(model(), evict="streaming", budget="razor", recent=4)
    assert best({0: torch.tensor([1.0, 2.0]), 1: torch.tensor([3.0])}, 0.1) == {1: (0,)}
