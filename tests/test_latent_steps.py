"""The `mla` and `lowrank` steps: from a recipe to a model that runs, saves and caches what was planned."""

import json
import typing

import families
import pytest
import torch
from closeness import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, LlamaConfig

import surgery
from surgery.errors import PlanError, RecipeError
from surgery.measure.memory import cache_size
from surgery.rewriters import latent
from surgery.rewriters.common.allocation import convex, share_out
from surgery.rewriters.latent import low_rank as latent_lowrank
from surgery.runtime.layout import Dense, Heads, Latent, LayerPlan
from surgery.runtime.modeling import from_parent

FAST = {"refit_queries": False, "refit_output": False, "gain_fit": False}


def text() -> torch.Tensor:
    return torch.randint(3, 128, (8, 16), generator=torch.Generator().manual_seed(0))


def one(rewriter: str, **options: object) -> dict[str, object]:
    return {"steps": [{"rewriter": rewriter, **options}]}


def test_both_kinds_of_project_survive_json_and_old_plans_are_heads() -> None:
    heads = Heads(kv_heads=2, head_dim=4, value_dim=4, groups=((0, 1), (2, 3)))
    a_latent = Latent(rank=6, rope_dims=2, kv_heads=2, head_dim=4, value_dim=4, k_rank=0)
    for project, numbers in ((heads, 2 * (4 + 4)), (a_latent, 6 + 2)):
        plan = LayerPlan(layer=0, project=project, owner=0, store=Dense(dtype="float16"))
        read = LayerPlan.from_dict(json.loads(json.dumps(plan.to_dict())))
        assert type(read.project) is type(project) and read == plan
        assert plan.bytes_per_token == 2 * numbers
    old = LayerPlan(layer=0, project=heads, owner=0).to_dict()
    del old["project"]["kind"], old["version"], old["store"]
    assert LayerPlan.from_dict(old | {"dtype": "float16"}) == LayerPlan(
        layer=0, project=heads, owner=0, store=Dense(dtype="float16")
    )
    with pytest.raises(ValueError, match="of version 9, and this surgery reads up to"):
        LayerPlan.from_dict(old | {"version": 9})
    with pytest.raises(ValueError, match="project is of kind 'rings', which is not known here. Known: heads, latent"):
        LayerPlan.from_dict(old | {"project": {"kind": "rings"}})


def test_layouts_of_recipes_are_those_of_the_fit_and_freq() -> None:
    assert set(typing.get_args(latent.Layout)) == {*typing.get_args(latent_lowrank.Layout), "freq"}


@pytest.mark.parametrize(
    "step",
    [
        one("mla", keep=0.5, rope_dims=8, **FAST),
        one("mla", rank=20, init="transmla", **FAST),
        one("mla", rank=20, mean_split=True, **FAST),
        one("lowrank", keep=0.5, k_share=0.4, **FAST),
        one("lowrank", keep=0.5, k_share=0.4, mean_split=False, **FAST),
        one("lowrank", rank=24, layout="freq", k_share=0.5, **FAST),
    ],
    ids=["mla", "transmla", "mla, means apart", "lowrank", "lowrank, means within", "freq"],
)
def test_a_converted_model_saves_loads_and_caches_what_was_planned(step, tmp_path) -> None:
    parent = families.tiny_model("llama")
    plan = surgery.plan(parent, step)
    assert not plan.native
    assert "latent" in str(plan)
    child = surgery.convert(parent, step, calibration=text())
    assert type(child).__name__ == "SurgeryLlamaForCausalLM"
    assert sum(p.numel() for p in child.parameters()) == plan.parameters
    size = cache_size(child, text())
    assert size.bytes == size.predicted_bytes == plan.cache_bytes(16)
    surgery.save(child, tmp_path / "child")
    with torch.no_grad():
        assert_close(surgery.load(tmp_path / "child")(text()).logits, child(text()).logits, 1e-6)


@torch.no_grad()
def test_all_components_rotated_keep_the_logits() -> None:
    parent = families.tiny_model("llama")
    step = one("mla", rank=32, rope_dims=32, **FAST)  # 2 KV heads of 16: all of K turns, the latent holds V
    child = surgery.convert(parent, step, calibration=text())
    assert_close(child(text()).logits, parent(text()).logits, 1e-4)


class LargestTensor(TorchDispatchMode):
    """Notes the largest storage that any operation returns, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return out


@torch.no_grad()
def test_decoding_one_token_makes_no_tensor_of_the_size_of_expanded_keys() -> None:
    child = surgery.convert(families.tiny_model("llama"), one("mla", rank=8, rope_dims=4, **FAST), calibration=text())
    cached = 600  # more than any weight of the tiny model has rows
    expanded = cached * 2 * 16 * 4
    largest = {}
    for tokens in (1, 2):
        cache = DynamicCache(config=child.config)
        child(torch.ones(1, cached, dtype=torch.long), past_key_values=cache)
        with LargestTensor() as seen:
            child(torch.ones(1, tokens, dtype=torch.long), past_key_values=cache)
        largest[tokens] = seen.bytes
    assert largest[1] < expanded / 2
    assert largest[2] >= expanded  # more tokens at once do expand


def test_steps_on_different_layers_share_a_recipe() -> None:
    parent = families.tiny_model("llama")
    steps = [
        {"rewriter": "mla", "rank": 20, "rope_dims": 8, "layers": "0", **FAST},
        {"rewriter": "lowrank", "rank": 30, "k_share": 0.5, "layers": "1", **FAST},
    ]
    child = surgery.convert(parent, {"steps": steps}, calibration=text())
    kinds = [layer["plan"]["project"]["rotate_on_read"] for layer in child.config.surgery["layers"]]
    assert kinds == [False, True]


def test_the_plan_that_comes_back_is_that_of_the_checkpoint(tmp_path) -> None:
    """Planned uniformly, then decided by the text: what is returned is what was written."""
    families.tiny_model("llama").save_pretrained(tmp_path / "parent")
    step = one("lowrank", keep=0.5, ranks="sensitivity", **FAST)
    plan = surgery.convert_checkpoint(tmp_path / "parent", step, tmp_path / "child", calibration=text())
    stored = surgery.load(tmp_path / "child")
    assert plan.after == stored.plans
    assert len({layer.project.dims for layer in plan.after}) == 2  # the text did decide
    assert plan.parameters == sum(p.numel() for p in stored.parameters())


def test_ranks_by_sensitivity_move_numbers_between_layers_and_add_none() -> None:
    parent = families.tiny_model("llama")
    with torch.no_grad():  # layer 0 hardly matters: it gets no more than the least
        parent.model.layers[0].self_attn.o_proj.weight *= 1e-3
    for step in (one("mla", keep=0.4, **FAST), one("lowrank", keep=0.4, **FAST)):
        child = surgery.convert(parent, surgery.Recipe.load(step, ["ranks=sensitivity"]), calibration=text())
        numbers = [layer["plan"]["project"] for layer in child.config.surgery["layers"]]
        first, second = (project["rank"] + project["rope_dims"] for project in numbers)
        assert first < second
        size = cache_size(child, text())
        assert size.bytes == size.predicted_bytes <= surgery.plan(parent, step).cache_bytes(16)


@pytest.mark.parametrize(("processes", "length", "windows"), [(1, 8, 80), (8, 8, 80), (1, 64, 16)])
def test_ranks_are_shared_out_on_ten_tokens_per_channel(monkeypatch, processes, length, windows) -> None:
    parent, seen = families.tiny_model("llama"), []
    assert parent.config.hidden_size == 64
    ids = torch.randint(3, parent.config.vocab_size, (200, length))

    class Stopped(Exception):
        pass

    def stop(copy, windows, *rest):
        seen.append(len(windows))
        raise Stopped

    monkeypatch.setattr("surgery.rewriters.latent.method.errors_alone", stop)
    monkeypatch.setattr("surgery.calibration.processes.count", lambda: processes)
    with pytest.raises(Stopped):
        surgery.convert(parent, one("lowrank", keep=0.5, ranks="sensitivity", **FAST), calibration=ids)
    assert seen == [windows]


def test_units_go_where_they_save_most_and_costs_need_not_be_convex() -> None:
    curves = {0: {4: 1.0, 6: 0.99, 8: 0.2, 11: 0.1, 16: 0.0}, 1: {4: 3.0, 6: 2.0, 8: 1.5, 11: 1.4, 16: 1.39}}
    found = share_out(lambda layer, n: curves[layer][n], {0: 8, 1: 8}, {0: 16, 1: 16})
    assert found == {0: 8, 1: 8}
    flat = {0: dict.fromkeys(curves[0], 0.5), 1: curves[1]}
    found = share_out(lambda layer, n: flat[layer][n], {0: 8, 1: 8}, {0: 16, 1: 16})
    assert found == {0: 4, 1: 12}
    found = share_out(lambda layer, n: 0.5, {0: 8, 1: 8, 2: 8}, {0: 6, 1: 16, 2: 16}, unit=2)
    assert found == {0: 6, 1: 10, 2: 8}  # nobody gains by more, and the budget is theirs all the same
    assert convex([(0, 4.0), (1, 3.9), (2, 1.0), (4, 0.0)]) == [(0, 4.0), (2, 1.0), (4, 0.0)]


def test_without_text_nothing_is_done() -> None:
    with pytest.raises(PlanError, match="asks for calibration text"):
        surgery.convert(families.tiny_model("llama"), one("mla", keep=0.5))


@pytest.mark.parametrize("rewriter", ["mla", "lowrank"])
def test_too_little_text_is_damped_and_said(rewriter) -> None:
    with pytest.warns(UserWarning, match=r"Give 640 tokens"):
        child = surgery.convert(families.tiny_model("llama"), one(rewriter, rank=20), calibration=text()[:3])
    assert child(text()).logits.isfinite().all()


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (one("mla"), "needs one of `keep`"),
        (one("mla", keep=0.5, rank=3), "not both"),
        (one("mla", keep=1.5), "at most 1"),
        (one("mla", rank=0), "at least 1"),
        (one("mla", rank=16, rope_dims=5), "must be even"),
        (one("mla", rank=16, init="transmlaa"), "Did you mean 'transmla'"),
        (one("lowrank", keep=0.5, rope_dims=4), "unknown key 'rope_dims'"),
        (one("lowrank", keep=0.5, k_share=1.0), "between 0 and 1"),
        (one("lowrank", keep=0.5, layout="freq", init="plain"), "no `freq` layout"),
    ],
)
def test_recipes_that_no_model_could_satisfy_are_refused(step, message) -> None:
    with pytest.raises(RecipeError, match=message):
        surgery.Recipe.load(step)


@pytest.mark.parametrize(
    ("family", "step", "message"),
    [
        ("llama", one("mla", rank=65), "more than the 64 that K and V have"),
        ("llama", one("mla", rank=60, rope_dims=16), "the parent caches 64"),
        ("llama", one("mla", rank=16, rope_dims=34), "rotated numbers of K"),
        ("llama", one("mla", keep=0.03), "none is left for the latent"),
        ("llama", one("lowrank", rank=65), "more than the 64 numbers of K and V"),
        ("llama", one("lowrank", keep=0.5), "groups of 4 do not divide"),
        ("gpt_neox", one("lowrank", keep=0.5, layout="freq"), "do not turn"),
        ("qwen3", one("mla", keep=0.5), "keys are normed"),
        ("olmo", one("mla", keep=0.5), "clamped"),
        ("gpt2", one("mla", keep=0.5, rotation="real"), "layer 0: rotation: real is about channels that turn"),
        ("gpt2", one("mla", keep=0.5, fold="auto"), "fold: auto is about channels that turn"),
        ("llama", one("mla", keep=0.5, ranks="sensitivity", layers="1"), "ranks: sensitivity .* one is selected"),
        (
            "bloom",
            one("gqa", kv_heads=2, init="asym", equal_groups=False),
            "ALiBi or a gate of the output fixes their places",
        ),
        ("llama_dynamic", one("lowrank", keep=0.5), "vary with the length"),
    ],
)
def test_models_that_a_step_does_not_fit_are_refused(family, step, message) -> None:
    if "groups" in message:
        step["steps"][0]["layout"] = "grouped"
    with pytest.raises(PlanError, match=message):
        surgery.plan(families.tiny_model(family), step)


def test_the_plan_says_where_it_rounds() -> None:
    config = LlamaConfig(
        vocab_size=32, hidden_size=512, intermediate_size=64, num_hidden_layers=2, num_attention_heads=8
    )
    rounded = surgery.plan(config, one("mla", rank=100, rope_dims=64))
    assert rounded.after[0].project.rank == 104
    assert "layers 0-1: rank 100 → 104" in str(rounded)
    kept = surgery.plan(config, one("lowrank", keep=0.3))
    assert kept.after[0].project.dims == 304
    assert "keep 0.3: 307 → 304 numbers per token" in str(kept)
    assert "→ 304" not in str(surgery.plan(config, one("lowrank", rank=304)))


def test_gqa_and_a_latent_of_the_same_layer_are_refused_and_of_others_are_not() -> None:
    gqa, mla = {"rewriter": "gqa", "kv_heads": 1, "layers": "0"}, {"rewriter": "mla", "keep": 0.5, "layers": "0-1"}
    with pytest.raises(PlanError, match=r"layer 0: .*\(mla\) decides how K and V are made, and .*\(gqa\) did already"):
        surgery.plan(families.tiny_model("llama"), {"steps": [gqa, mla]})
    both = surgery.plan(families.tiny_model("llama"), {"steps": [gqa, mla | {"layers": "1"}]})
    assert [layer.project.kind for layer in both.after] == ["heads", "latent"]


def test_the_runtime_refuses_weights_of_other_shapes() -> None:
    parent = families.tiny_model("llama")
    plan = surgery.plan(parent, one("mla", rank=20, rope_dims=8))
    with pytest.raises(ValueError, match="no weights are given"):
        from_parent(parent, plan.anatomy.sites, plan.after)
    child = surgery.convert(parent, one("mla", rank=20, rope_dims=8, **FAST), calibration=text())
    weights = {0: dict(child.model.layers[0].self_attn.state_dict()) | {"k_up": torch.zeros(2, 16, 19)}}
    with pytest.raises(ValueError, match="k_up has shape"):
        from_parent(parent, plan.anatomy.sites, plan.after, None, weights)


def test_folds_balances_rotations_and_selectors_are_options_of_mla() -> None:
    model, losses = families.tiny_model("llama"), {}
    ids = torch.randint(3, 128, (16, 24), generator=torch.Generator().manual_seed(1))
    for name, options in {
        "default": {},
        "searched": {"fold": "auto", "beta": "search"},
        "real": {"rotation": "real", "selector": "2norm", "fold": 2, "beta": 0.5},
    }.items():
        child = surgery.convert(model, one("mla", keep=0.5, **FAST, **options), calibration=ids)
        with torch.no_grad():
            want, got = (m(ids).logits.log_softmax(-1) for m in (model, child))
        losses[name] = float((want.exp() * (want - got)).sum(-1).mean())
    assert losses["searched"] <= losses["default"] * 1.2  # chosen on a held-out part of this text
    assert losses["default"] < losses["real"]


def test_folds_that_do_not_divide_the_frequencies_are_refused_while_planning() -> None:
    with pytest.raises(PlanError, match="fold 4 does not divide 2 rotary frequencies"):
        surgery.plan(families.tiny_model("gpt_neox"), one("mla", keep=0.5, fold=4))
    with pytest.raises(RecipeError, match="beta"):
        surgery.Recipe.load(one("mla", keep=0.5, beta=0))
