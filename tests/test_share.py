"""The share axis: layouts, refusals, and readers that lose nothing where nothing need be lost."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import relative_error
from families import FAMILIES, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention

import surgery
from surgery.anatomy import examine
from surgery.calibration.text import Windows
from surgery.calibration.working_copy import WorkingCopy
from surgery.console import render
from surgery.errors import PlanError, RecipeError
from surgery.measure.capacity import capacity
from surgery.measure.memory import cache_bytes
from surgery.plan import plan
from surgery.planning.share_layouts import owners_of
from surgery.recipe import Recipe
from surgery.rewriters.layers.maps import assign, input_gain, mean_weights
from surgery.rewriters.layers.search import mean_caches

BARE = {"refit_queries": False, "refit_output": False, "gain_fit": False}


def recipe(**step: Any) -> dict[str, Any]:
    return {"steps": [{"rewriter": "share", **step}]}


def deep(family: str = "llama", layers: int = 4) -> PreTrainedModel:
    torch.manual_seed(0)
    data = {**FAMILIES[family]().to_dict(), "num_hidden_layers": layers}
    data.pop("layer_types", None)
    config = AutoConfig.for_model(**data)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def text(windows: int = 24, length: int = 24) -> torch.Tensor:
    return torch.randint(3, 128, (windows, length), generator=torch.Generator().manual_seed(1))


def twins(family: str = "llama", layers: int = 2) -> PreTrainedModel:
    """A model whose last two layers read the same residual stream: the first of them adds nothing to it."""
    model = deep(family, layers)
    first, second = model.model.layers[-2:]
    with torch.no_grad():
        first.self_attn.o_proj.weight.zero_()
        first.mlp.down_proj.weight.zero_()
        second.input_layernorm.weight.copy_(first.input_layernorm.weight)
    return model


@torch.no_grad()
def distance(a: PreTrainedModel, b: PreTrainedModel) -> float:
    ids = text(4)
    return relative_error(b(ids).logits, a(ids).logits)


@pytest.mark.parametrize(
    ("layout", "kv_layers", "owners"),
    [
        ("cla2", None, {1: 0, 3: 2, 5: 4, 7: 6}),
        ("cla(3)", None, {1: 0, 2: 0, 4: 3, 5: 3, 7: 6}),
        ("mlkv(layers=2)", None, {1: 0, 2: 0, 3: 0, 5: 4, 6: 4, 7: 4}),
        ("mlkv", 0.25, {1: 0, 2: 0, 3: 0, 5: 4, 6: 4, 7: 4}),
        ("pizza-bottom", 6, {6: 5, 7: 5}),
        ("sandwich-bottom", 6, {3: 2, 4: 2}),
        ("lasagna-bottom", 4, {1: 0, 3: 2, 5: 4, 7: 6}),
        ("yoco", None, {5: 4, 6: 4, 7: 4}),
    ],
)
def test_named_layouts_say_who_reads_whom(layout: str, kv_layers: Any, owners: dict[int, int]) -> None:
    assert owners_of(layout, range(8), kv_layers, "here") == owners


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"layout": "sandwich-middle", "kv_layers": 4}, "not there yet when they run"),
        ({"layout": "sandwich-top", "kv_layers": 4}, "LCKV"),
        ({"layout": "cla"}, "such as cla2"),
        ({"layout": "clay2"}, "no layout 'clay2'"),
        ({"layout": "mlkv"}, "needs `kv_layers`"),
        ({"layout": "cla2", "kv_layers": 3}, "Leave out kv_layers"),
        ({"layout": "search", "kv_layers": 1.5}, "a part of them"),
        ({"layout": "search", "kv_layers": 0}, "a part of them"),
        ({"layout": {}}, "the map is empty"),
        ({"layout": {"one": 0}}, "layout"),
        ({"keep": 0.5}, "Set init: latent"),
        ({"init": "latent", "keep": 0}, "above 0"),
        ({"init": "nearest"}, "Allowed: best"),
        ({"layout": "svformer", "init": "latent"}, "no svformer layout"),
    ],
)
def test_impossible_recipes_are_refused(step: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.load(recipe(**step))


@pytest.mark.parametrize(
    ("family", "step", "message"),
    [
        ("llama", {"layout": {0: 1}}, "layer 0 cannot read the cache of layer 1: the first"),
        ("llama", {"layout": {1: 2}}, "layer 1 cannot read the cache of layer 2: it is not there yet"),
        ("llama", {"layout": {1: 1}}, "layer 1 cannot read the cache of layer 1"),
        ("llama", {"layout": {1: 0, 2: 1}}, "Write 2: 1 as 2: 0"),
        ("llama", {"layout": {1: 9}}, "no attention layer 9"),
        ("llama", {"layout": {2: 1}, "layers": "0-1"}, "not among layers"),
        ("llama", {"layout": "mlkv", "kv_layers": 9}, "9 of 4 layers"),
        ("gemma2", {"layout": "cla2"}, "layer 1 cannot read the cache of layer 0: a window of all tokens against 8"),
        ("gemma3", {"layout": {2: 1}}, "layer 2 cannot read the cache of layer 1: a window"),
        ("smollm3", {"layout": {3: 0}}, "layer 3 cannot read the cache of layer 0: rotary frequencies none against"),
        ("falcon", {}, "hands its attentions no keyword arguments"),
        ("olmo", {}, "clamps keys and values"),
        ("qwen3", {"init": "latent"}, "normed per head"),
        ("gemma2", {"layout": "search", "kv_layers": 1}, "Use kv_layers: "),
        ("llama", {"layers": "3"}, "layout cla2 lets none of the layers read .* Select more layers.$"),
        ("llama", {"layout": "search", "kv_layers": 4, "init": "latent"}, "or use a smaller kv_layers"),
    ],
)
def test_maps_that_cannot_run_are_refused_while_planning(family: str, step: dict[str, Any], message: str) -> None:
    model = deep() if family == "llama" else tiny_model(family)
    with pytest.raises(PlanError, match=message):
        plan(model, recipe(**step))


def test_frequencies_that_vary_with_the_length_hinder_nobody_from_sharing() -> None:
    """They read positions before the first attention, and there are none without weights: once taken for a refusal."""
    parent = tiny_model("llama_dynamic").eval()
    child = surgery.convert(parent, recipe(layout={1: 0}, init="replace")).eval()
    assert [layer.owner for layer in child.plans] == [0, 0]
    assert torch.isfinite(child(torch.arange(3, 20)[None]).logits).all()


@pytest.mark.parametrize(
    ("first", "init"),
    [
        ({"rewriter": "mla", "rank": 20, "rope_dims": 8, "refit_queries": False, "refit_output": False}, "replace"),
        ({"rewriter": "lowrank", "rank": 28, "k_share": 0.5, "refit_queries": False, "refit_output": False}, "latent"),
        ({"rewriter": "gqa", "kv_heads": 1, "init": "mean"}, "latent"),
    ],
)
def test_a_search_leaves_alone_what_earlier_steps_have_decided(first: dict[str, Any], init: str) -> None:
    model = deep()
    with torch.no_grad():  # layer 1 hardly matters: the search would take it first
        model.model.layers[1].self_attn.o_proj.weight *= 1e-3
    share = {"rewriter": "share", "layout": "search", "kv_layers": 3, "init": init, "gain_fit": False}
    steps = [first | {"layers": "0-1"}, share | ({"keep": 0.5} if init == "latent" else {})]
    planned = plan(model, {"steps": steps})
    child = surgery.convert(model, {"steps": steps}, calibration=text()).eval()
    assert [layer.project.dims for layer in child.plans] == [layer.project.dims for layer in planned.after]
    assert [layer.owner for layer in child.plans] == [0, 1, 2, 2]
    assert torch.isfinite(child(torch.arange(3, 20)[None]).logits).all()


def test_a_search_that_finds_too_few_readers_says_so() -> None:
    share = {"rewriter": "share", "layout": "search", "kv_layers": 1, "init": "replace", "gain_fit": False}
    with pytest.warns(UserWarning, match=r"share: 2 layers keep a cache in the place of 1"):
        surgery.convert(deep(layers=6), {"steps": [share]}, calibration=text())


def test_layers_of_different_heads_cannot_share() -> None:
    steps = [{"rewriter": "gqa", "kv_heads": 1, "layers": "1"}, {"rewriter": "share", "layout": {1: 0}}]
    with pytest.raises(PlanError, match=r"layer 1 cannot read .* layer 0: 1 KV heads of 16 \+ 16 against 2"):
        plan(deep(), {"steps": steps})


class UnevenConfig(LlamaConfig):
    model_type = "uneven_llama"


class Uneven(LlamaForCausalLM):
    """Layers differ in how many KV heads they have, as in some models whose shape was searched."""

    config_class = UnevenConfig

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        for layer, heads in enumerate((4, 4, 2, 2)):
            own = UnevenConfig(**config.to_dict() | {"num_key_value_heads": heads})
            self.model.layers[layer].self_attn = LlamaAttention(own, layer)


@pytest.mark.parametrize("layout", [{1: 0, 3: 2}, "search"])
def test_each_owner_gets_a_latent_as_large_as_its_own_heads_ask_for(layout: Any) -> None:
    torch.manual_seed(0)
    data = FAMILIES["llama"](num_hidden_layers=4).to_dict()
    model = Uneven(UnevenConfig(**{name: value for name, value in data.items() if name != "model_type"})).eval()
    budget = {"kv_layers": 2} if layout == "search" else {}
    step = recipe(layout=layout, init="latent", keep=0.25, refit_queries=False, refit_output=False, **budget)
    child = surgery.convert(model, step, calibration=text(8))
    assert [layer.owner for layer in child.plans] == [0, 0, 2, 2]
    assert [layer.project.dims for layer in child.plans] == [32, 32, 16, 16]
    if layout != "search":
        assert [layer.project for layer in plan(model, step).after] == [layer.project for layer in child.plans]


def test_steps_in_an_order_that_cannot_work_are_refused() -> None:
    share = {"rewriter": "share", "layout": "cla2"}
    with pytest.raises(PlanError, match="put gqa before share"):
        plan(deep(), {"steps": [share, {"rewriter": "gqa", "kv_heads": 1}]})
    with pytest.raises(
        PlanError, match=r"layer 0: .*\(share\) decides how K and V are made, and .*\(gqa\) did already"
    ):
        plan(deep(), {"steps": [{"rewriter": "gqa", "kv_heads": 1}, {**share, "init": "latent"}]})
    with pytest.raises(PlanError, match="an earlier step has given this one a latent of its own"):
        plan(deep(), {"steps": [{"rewriter": "mla", "keep": 0.5}, share]})
    with pytest.raises(PlanError, match="who reads whose cache is one map"):
        plan(deep(), {"steps": [share, share]})


KVSHARER = {"init": "replace", "layout": "kvsharer", "kv_layers": 2}


def test_inits_that_need_text_ask_for_it() -> None:
    for step in ({}, {"init": "latent"}, {"init": "replace", "gain_fit": True}, KVSHARER):
        with pytest.raises(PlanError, match="share asks for calibration text"):
            surgery.convert(deep(), recipe(**step))
    assert not plan(deep(), recipe(init="mean")).needs_calibration


@pytest.mark.parametrize(
    "step",
    [
        {"init": "replace"},
        {"init": "mean"},
        {"init": "least_squares"},
        {"init": "best"},
        {"init": "latent"},
        {"layout": "svformer"},
    ],
)
def test_a_duplicated_layer_is_shared_without_loss(step: dict[str, Any]) -> None:
    model = twins()
    first, second = (layer.self_attn for layer in model.model.layers)
    with torch.no_grad():
        second.k_proj.weight.copy_(first.k_proj.weight)
        second.v_proj.weight.copy_(first.v_proj.weight)
    child = surgery.convert(model, recipe(**step, **BARE), calibration=text())
    assert distance(model, child) < 2e-4
    assert 0 in [child.config.surgery["layers"][1]["plan"][name] for name in ("owner", "value_owner")]


def test_least_squares_undoes_what_heads_can_be_turned_and_mixed_by() -> None:
    model = twins()
    first, second = (layer.self_attn for layer in model.model.layers)
    (K, H), generator = (2, 16), torch.Generator().manual_seed(2)
    with torch.no_grad():
        k, v = (p.weight.view(K, H, -1).flip(0) for p in (first.k_proj, first.v_proj))  # heads change places
        turn = torch.polar(1 + torch.rand(K, H // 2, generator=generator), torch.rand(K, H // 2, generator=generator))
        pairs = torch.complex(k[:, : H // 2], k[:, H // 2 :]) * turn[..., None]
        second.k_proj.weight.copy_(torch.cat((pairs.real, pairs.imag), 1).flatten(0, 1))
        second.v_proj.weight.copy_((torch.randn(K, H, H, generator=generator) @ v).flatten(0, 1))
    assert distance(model, surgery.convert(model, recipe(init="least_squares", **BARE), calibration=text())) < 2e-3
    assert distance(model, surgery.convert(model, recipe(init="replace", **BARE), calibration=text())) > 0.05


def test_a_latent_serves_readers_whose_weights_differ() -> None:
    model = twins()  # the same input, other K and V: heads cannot be shared, a latent of the input can
    assert distance(model, surgery.convert(model, recipe(init="latent", **BARE), calibration=text(64))) < 2e-3
    assert distance(model, surgery.convert(model, recipe(init="best", **BARE), calibration=text())) > 0.05


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "step"),
    [
        ("llama", {"init": "best"}),
        ("llama", {"init": "latent", "keep": 0.75, "gain_fit": False}),
        ("llama_bias_wide", {"init": "latent", "keep": 0.3, **BARE}),
        ("qwen3", {"init": "least_squares", **BARE}),
        ("mistral", {"init": "latent", "keep": 0.75, **BARE}),
        ("phi3", {"init": "best", **BARE}),
        ("qwen3", {"layout": "svformer", "gain_fit": False}),
    ],
)
def test_the_cache_holds_what_is_planned_and_readers_lose_their_projections(family: str, step: dict[str, Any]) -> None:
    model = deep(family)
    planned = plan(model, recipe(**step))
    child = surgery.convert(model, recipe(**step), calibration=text(12))
    ids = text(1)
    assert cache_bytes(child, ids) == planned.cache_bytes(ids.shape[1]) < cache_bytes(model, ids)
    assert sum(p.numel() for p in child.parameters()) == planned.parameters
    assert not [name for name, _ in child.named_parameters() if name.startswith("model.layers.1") and "v_proj" in name]
    logits = child(ids).logits
    cache = None
    for i in range(ids.shape[1]):
        step_out = child(ids[:, i : i + 1], past_key_values=cache, use_cache=True)
        cache = step_out.past_key_values
        torch.testing.assert_close(step_out.logits[:, 0], logits[:, i], atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("init", ["best", "latent"])
def test_the_working_copy_computes_what_the_result_does(init: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[WorkingCopy] = []
    settle = WorkingCopy.settle
    monkeypatch.setattr(WorkingCopy, "settle", lambda self, plan: kept.append(self) or settle(self, plan))
    child = surgery.convert(deep(), recipe(init=init, gain_fit=False), calibration=text())
    ids = text(4)
    torch.testing.assert_close(kept[0].model(ids).logits, child(ids).logits, atol=1e-4, rtol=1e-4)


def test_merged_heads_can_be_shared() -> None:
    merge = {"rewriter": "gqa", "kv_heads": "1/2", "gain_fit": False}
    steps = [merge, {"rewriter": "share", "layout": "cla2", "gain_fit": False}]
    model = deep()
    child = surgery.convert(model, {"steps": steps}, calibration=text())
    assert cache_bytes(child, text(1)) * 4 == cache_bytes(model, text(1))
    assert {layer["plan"]["owner"] for layer in child.config.surgery["layers"]} == {0, 2}


def test_a_model_that_shares_is_saved_and_loaded(tmp_path: Path) -> None:
    child = surgery.convert(deep(), recipe(init="mean", **BARE))
    surgery.save(child, tmp_path / "out")
    assert distance(child, surgery.load(tmp_path / "out")) < 1e-6


def test_the_search_finds_the_layers_that_are_alike() -> None:
    model = twins(layers=4)
    first, second = (layer.self_attn for layer in model.model.layers[-2:])
    with torch.no_grad():
        second.k_proj.weight.copy_(first.k_proj.weight)
        second.v_proj.weight.copy_(first.v_proj.weight)
    child = surgery.convert(model, recipe(layout="search", kv_layers=3, **BARE), calibration=text())
    owners = [layer["plan"]["owner"] for layer in child.config.surgery["layers"]]
    # Layer 2 adds nothing, so that it may read anything just as well.
    assert owners in ([0, 1, 2, 2], [0, 1, 0, 3], [0, 1, 1, 3])
    assert distance(model, child) < 2e-4


@pytest.mark.parametrize("layout", ["search", "kvsharer"])
@pytest.mark.parametrize("init", ["best", "latent"])
def test_searches_keep_to_their_budget(layout: str, init: str) -> None:
    model = deep()
    step = {"layout": layout, "kv_layers": 0.5, "init": init}
    child = surgery.convert(model, recipe(**step, **BARE), calibration=text(8))
    assert len({layer["plan"]["owner"] for layer in child.config.surgery["layers"]}) == 2
    held = cache_bytes(child, text(1))
    assert held == sum(layer.bytes_at(24) for layer in child.plans)
    # Which owners become latents is known after the search; each keeps 24 positions of four bytes beside its numbers.
    more = held - plan(model, recipe(**step)).cache_bytes(24)
    assert more in ((0,) if init == "best" else (0, 24 * 4))


def test_mean_caches_do_not_know_what_texts_are_filled_up_with() -> None:
    model = deep(layers=2)
    lengths = torch.tensor([24, 5] * 8)
    mask = torch.arange(24) < lengths[:, None]
    found = []
    for padding in (0, 7):
        ids = text(16).masked_fill(~mask, padding)
        found.append(mean_caches(WorkingCopy(model, examine(model)), {0, 1}, Windows(ids, mask, "x")))
    for layer in (0, 1):
        for a, b in zip(found[0][layer], found[1][layer], strict=True):
            assert a.shape[1] == 24
            torch.testing.assert_close(a, b)


def test_the_mean_is_true_and_takes_norm_gains_along() -> None:
    model = deep(layers=3)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight.copy_(0.5 + torch.rand(64, generator=generator))
    work = WorkingCopy(model, examine(model))
    gains = [layer.input_layernorm.weight.double() for layer in model.model.layers]
    for layer, gain in enumerate(gains):
        torch.testing.assert_close(input_gain(work.layers, work.sites[layer]), gain, atol=1e-6, rtol=1e-6)
    made = mean_weights(work, {layer: work.read(layer) for layer in range(3)}, 0).k_KHD.flatten(0, 1).double()
    rows = [layer.self_attn.k_proj.weight.double() for layer in model.model.layers]
    want = sum(w * g for w, g in zip(rows, gains, strict=True)) / 3 / gains[0]
    torch.testing.assert_close(made, want, atol=1e-5, rtol=1e-5)


def test_the_assignment_of_heads_is_a_good_permutation() -> None:
    for seed in range(20):
        gain = torch.rand(5, 5, generator=torch.Generator().manual_seed(seed))
        chosen = assign(gain)
        best = max(sum(gain[i, p[i]] for i in range(5)) for p in itertools.permutations(range(5)))
        assert sorted(chosen) == list(range(5))
        assert sum(gain[i, c] for i, c in enumerate(chosen)) >= 0.99 * best


def test_capacity_counts_what_fits_beside_the_weights() -> None:
    model = deep()
    weights = sum(p.numel() for p in model.parameters()) * 4
    per_sequence = plan(model, "identity").cache_bytes(100)
    found = capacity(model, [recipe(init="mean")], memory=weights + 10 * per_sequence, contexts=[100, 10**6])
    before, after = found.rows
    assert before.batches == (10, 0)
    gained = (before.weight_bytes - after.weight_bytes) // (per_sequence // 2)
    assert after.batches == (20 + gained, 0)
    assert "none fits" in render(found.tables())
    with pytest.raises(PlanError, match="contexts"):
        capacity(model, [], memory=1, contexts=[])


def test_converting_leaves_the_parent_as_it_was() -> None:
    model = deep()
    before = copy.deepcopy(model.state_dict())
    surgery.convert(model, recipe(gain_fit=False), calibration=text(8))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
