"""One file and one line each: a method, a score, a format and a target of this file's own pass through the public door.

Each toy is registered under the name `toy` by one assignment, and goes through plan, convert, generate, save and load
(a target through plan and export).
"""

import ast
import sys
import types
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from closeness import relative_error
from families import tiny_model
from transformers.cache_utils import DynamicLayer

import surgery
from surgery.checkpoints.provenance import provenance_of
from surgery.measure.memory import tensor_bytes
from surgery.recipe import Step
from surgery.rewriters import REWRITERS, Method
from surgery.runtime.budgets import BUDGETS, Budget
from surgery.runtime.caches import CACHE_LAYERS
from surgery.runtime.codecs import CODECS, CodecKind, Decoded
from surgery.runtime.layout import Heads
from surgery.runtime.rankers import RANKERS, Ranker
from surgery.runtime.scorers import SCORERS
from surgery.runtime.store import STORES

# A method on the project axis: every layer keeps its first KV head, and all queries read it.


@dataclass(frozen=True, kw_only=True)
class ToyStep(Step):
    rewriter: Literal["toy"] = "toy"
    head: int = 0


class ToyMethod(Method):
    Options = ToyStep
    axis = "project"

    def plan(self, anatomy, layers, where):
        return tuple(
            replace(layer, project=Heads.of(site, 1)) if self.step.selects(site.layer) else layer
            for site, layer in zip(anatomy.sites, layers, strict=True)
        )

    def convert(self, copy, layers, windows):
        for plan in layers:
            weights, head = copy.read(plan.layer), [self.step.head]
            groups = (tuple(range(weights.heads)),)
            copy.write(
                plan.layer, replace(weights, k_KHD=weights.k_KHD[head], v_KVD=weights.v_KVD[head], groups=groups)
            )


# A score: tokens whose queries are long leave.


class ToyScorer:
    has_threshold = True
    describes = "norm of the mean query"

    def score(self, hidden_BTD, q_BTNH, k_BTKH):
        return q_BTNH.float().mean(2, keepdim=True).norm(dim=-1).expand(k_BTKH.shape[:-1])


# A score that orders slots: those with small values stay; and a budget: each layer keeps half of what it might.


class ToyRanker(Ranker):
    describes = "small values stay"

    def score(self, ranking):
        return -ranking.slots.value_BKSV.float().norm(dim=-1)


class ToyBudget(Budget):
    describes = "half"

    def of_layer(self, mean, most, depth):
        return mean / 2


# A format on the store axis: whole numbers of eight bits, one scale per token and head; and a step that asks for it.


@dataclass(frozen=True, kw_only=True)
class ToyStore:
    dtype: str = "float32"
    kind: Literal["toy"] = "toy"

    def label(self):
        return "8 bits"

    def supports(self, site):
        return None

    def bytes_at(self, tokens, entry):
        heads, key, value = entry
        return tokens * heads * (key + value + 2 * 4)

    static_bytes = bytes_at


def encode(x):
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-9) / 127
    return (x / scale).round().to(torch.int8), scale


class ToyLayer(DynamicLayer):
    """Keeps codes and scales; gives back numbers."""

    def __init__(self, plan, max_length=None):
        super().__init__()
        self.held = None

    def update(self, key_states, value_states, *args, **kwargs):
        new = [*encode(key_states), *encode(value_states)]
        self.held = new if self.held is None else [torch.cat(pair, 2) for pair in zip(self.held, new, strict=True)]
        self.is_initialized = True
        k, k_scale, v, v_scale = self.held
        return (k * k_scale).to(key_states.dtype), (v * v_scale).to(value_states.dtype)

    def get_seq_length(self):
        return 0 if self.held is None else self.held[0].shape[2]

    @property
    def keys(self):
        return None

    @keys.setter
    def keys(self, value):
        pass

    values = keys


@dataclass(frozen=True, kw_only=True)
class ToyStoreStep(Step):
    rewriter: Literal["toy_store"] = "toy_store"


class ToyStoreMethod(Method):
    Options = ToyStoreStep
    axis = "store"

    def plan(self, anatomy, layers, where):
        return tuple(replace(layer, store=ToyStore(dtype=layer.dtype)) for layer in layers)

    def convert(self, copy, layers, windows):
        """The weights stay."""


@pytest.fixture
def registered(monkeypatch):
    """The lines that register the toys, one for each name."""
    monkeypatch.setitem(REWRITERS, "toy", ToyMethod)
    monkeypatch.setitem(SCORERS, "toy", ToyScorer())
    monkeypatch.setitem(RANKERS, "toy_rank", ToyRanker())
    monkeypatch.setitem(BUDGETS, "toy", ToyBudget())
    monkeypatch.setitem(STORES, "toy", ToyStore)
    monkeypatch.setitem(CACHE_LAYERS, "toy", ToyLayer)
    monkeypatch.setitem(REWRITERS, "toy_store", ToyStoreMethod)


TEXT = torch.randint(3, 128, (8, 48), generator=torch.Generator().manual_seed(0))
PROMPT = TEXT[:2, :24]


def through_the_door(steps, tmp_path, calibration=None):
    """Plan, convert, generate, save, load, generate again; returns the plan and the model that was loaded."""
    parent = tiny_model("llama").eval()
    plan = surgery.plan(parent, {"steps": steps})
    model = surgery.convert(parent, {"steps": steps}, calibration=calibration).eval()
    greedy = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False}
    made = model.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), **greedy)
    surgery.save(model, tmp_path / "child")
    loaded = surgery.load(tmp_path / "child").eval()
    assert torch.equal(loaded.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), **greedy), made)
    assert [step["rewriter"] for step in provenance_of(loaded)["recipe"]["steps"]] == [s["rewriter"] for s in steps]
    return plan, loaded


def test_a_method_of_ones_own(registered, tmp_path):
    plan, model = through_the_door([{"rewriter": "toy", "head": 1}], tmp_path)
    parent = tiny_model("llama")
    assert plan.native and plan.bytes_per_token * 2 == plan.parent_bytes_per_token
    kept = parent.model.layers[0].self_attn.k_proj.weight[16:]
    assert torch.equal(model.model.layers[0].self_attn.k_proj.weight, kept)
    parent.save_pretrained(tmp_path / "parent")
    surgery.convert_checkpoint(tmp_path / "parent", {"steps": [{"rewriter": "toy", "head": 1}]}, tmp_path / "two")
    two = surgery.load(tmp_path / "two")
    assert torch.equal(two.model.layers[1].self_attn.v_proj.weight, model.model.layers[1].self_attn.v_proj.weight)
    with pytest.raises(surgery.RecipeError, match="unknown key 'haed'. Did you mean 'head'"):
        surgery.plan(parent, {"steps": [{"rewriter": "toy", "haed": 1}]})


def test_a_method_of_ones_own_stands_beside_those_of_the_house(registered, tmp_path):
    steps = [{"rewriter": "toy"}, {"rewriter": "share", "layout": {1: 0}, "init": "replace"}]
    plan, _ = through_the_door(steps, tmp_path)
    assert [layer.owner for layer in plan.after] == [0, 0]
    with pytest.raises(surgery.PlanError, match=r"layer 0: .*\(gqa\) decides how K and V are made, and .*\(toy\) did"):
        surgery.plan(tiny_model("llama"), {"steps": [{"rewriter": "toy"}, {"rewriter": "gqa", "groups": [[0], [1]]}]})


def test_a_score_of_ones_own(registered, tmp_path):
    step = {"rewriter": "evict", "scorer": "toy", "ratio": 2, "window": 4, "sinks": 2}
    plan, model = through_the_door([step], tmp_path, TEXT)
    assert plan.needs_calibration
    cache = model(PROMPT, use_cache=True).past_key_values
    held = [layer.lengths.float().mean().item() for layer in cache.layers]
    assert len(held) == 2
    assert all(length < PROMPT.shape[1] for length in held), held
    with pytest.raises(surgery.RecipeError, match="no scorer 'tot'. Did you mean 'toy'"):
        surgery.plan(tiny_model("llama"), {"steps": [step | {"scorer": "tot"}]})


def test_a_score_and_a_budget_of_ones_own_that_rank(registered, monkeypatch, tmp_path):
    step = {"rewriter": "evict", "scorer": "toy_rank", "budget": "toy", "ratio": 2, "recent": 2, "sinks": 1}
    plan, model = through_the_door([step], tmp_path)
    cache = model(PROMPT, use_cache=True).past_key_values
    assert [layer.lengths.tolist() for layer in cache.layers] == [[[3 + 5] * 2] * 2] * 2  # 12 of 24: 3 and half of 9
    assert tensor_bytes(cache) == len(PROMPT) * plan.cache_bytes(PROMPT.shape[1])
    with pytest.raises(surgery.PlanError, match="has a ToyRanker, whose code is not part of surgery"):
        surgery.export(model, tmp_path / "hub", to="hub")
    monkeypatch.delitem(BUDGETS, "toy")
    with pytest.raises(ValueError, match="tokens leave by the budget 'toy', which is not known here"):
        surgery.load(tmp_path / "child")


def test_a_format_of_ones_own(registered, tmp_path):
    plan, model = through_the_door([{"rewriter": "toy_store"}], tmp_path)
    assert not plan.native and "8 bits" in str(plan)
    assert plan.bytes_per_token == 2 * 2 * (16 + 16 + 8)  # layers, heads, codes and scales
    cache = model(PROMPT, use_cache=True).past_key_values
    held = sum(t.numel() * t.element_size() for layer in cache.layers for t in layer.held)
    assert held == len(PROMPT) * plan.cache_bytes(PROMPT.shape[1])
    with torch.no_grad():
        want, got = (m(PROMPT, use_cache=True).logits for m in (tiny_model("llama").eval(), model))
    error = relative_error(got, want)
    assert 0 < error < 0.05, error  # encoded, and still the model


class Halves(Decoded):
    """Numbers of 16 bits, whatever was asked for."""

    def encode(self, x_BKTW, skip_BT=None):
        return (x_BKTW.half(),)

    def decode(self, parts, width, *, turned=False):
        return parts[0].float()

    def basis(self, width, device=None):
        return None

    def bytes_of(self, tokens, heads, width):
        return 2 * tokens * heads * width


def test_a_codec_of_ones_own(monkeypatch, tmp_path):
    kind = CodecKind(
        bits=(16,), default=16, keys=lambda *_: Halves(), values=lambda *_: Halves(), describes="half of float32"
    )
    monkeypatch.setitem(CODECS, "halves", kind)
    step = {"rewriter": "quantise", "codec": "halves", "group": 4, "recent": 4, "sinks": 1}
    plan, model = through_the_door([step], tmp_path)
    assert plan.bytes_per_token * 2 == plan.parent_bytes_per_token
    cache = model(PROMPT, use_cache=True).past_key_values
    assert tensor_bytes(cache) == len(PROMPT) * plan.cache_bytes(PROMPT.shape[1])
    assert cache.layers[0].streams[0].packed == 16
    with pytest.raises(surgery.PlanError, match="has a Halves, whose code is not part of surgery"):
        surgery.export(model, tmp_path / "hub", to="hub")


def test_formats_that_no_cache_layer_holds_are_refused_while_planning(registered, monkeypatch):
    window = {"rewriter": "evict", "window": 4}
    with pytest.raises(surgery.PlanError, match="layer 0: .* pages hold plain numbers, not 8 bits"):
        surgery.plan(tiny_model("llama"), {"steps": [window, {"rewriter": "toy_store"}]})
    with pytest.raises(surgery.PlanError, match="layer 0: .* keeps its newest 8 tokens in a cache layer"):
        surgery.plan(tiny_model("mistral"), {"steps": [{"rewriter": "toy_store"}]})
    monkeypatch.setattr(ToyStore, "supports", lambda self, site: "its keys are too tall. Use gqa.")
    with pytest.raises(surgery.PlanError, match="layer 0: recipe: steps.0.: its keys are too tall"):
        surgery.plan(tiny_model("llama"), {"steps": [{"rewriter": "toy_store"}]})


def test_checkpoints_with_parts_that_nobody_registered_say_so(registered, monkeypatch, tmp_path):
    step = {"rewriter": "evict", "scorer": "toy", "ratio": 2, "window": 4, "sinks": 2}
    _, model = through_the_door([step], tmp_path, TEXT)
    with pytest.raises(surgery.PlanError, match="has a ToyScorer, whose code is not part of surgery"):
        surgery.export(model, tmp_path / "hub", to="hub")
    monkeypatch.delitem(SCORERS, "toy")
    with pytest.raises(ValueError, match="tokens leave by the score 'toy', which is not known here"):
        surgery.load(tmp_path / "child")


def test_the_examples_of_the_documentation_run(monkeypatch):
    text = (Path(__file__).parent.parent / "docs" / "extending.md").read_text()
    examples = [part.partition("```")[0] for part in text.split("```python\n")[1:]]
    assert len(examples) == 3
    monkeypatch.setattr("surgery.rewriters.REWRITERS", dict(REWRITERS))
    monkeypatch.setitem(RANKERS, "long_values", None)
    registry = sys.modules["surgery.rewriters"].REWRITERS
    monkeypatch.setattr("surgery.recipe.REWRITERS", registry)
    module = types.ModuleType("example")
    monkeypatch.setitem(sys.modules, "example", module)  # hints of its dataclass are looked up there
    for code in examples:
        exec(compile(code, "extending.md", "exec"), vars(module))
    parent = tiny_model("llama")
    ids = torch.randint(3, 128, (32, 32), generator=torch.Generator().manual_seed(1))
    plain = surgery.convert(parent, {"steps": [{"rewriter": "first_head", "head": 1}]})
    fitted = surgery.convert(parent, {"steps": [{"rewriter": "fitted_head", "head": 1}]}, calibration=ids)
    untold = surgery.convert(parent, {"steps": [{"rewriter": "fitted_head", "head": 1}]})
    step = {"rewriter": "evict", "scorer": "long_values", "budget": "ada", "ratio": 4, "recent": 4, "observe": 4}
    ranked = surgery.convert(parent, {"steps": [step]}).eval()
    assert ranked(ids[:1], use_cache=True).past_key_values.layers[0].lengths.sum() == 2 * 8
    for child, is_plain in ((plain, True), (untold, True), (fitted, False)):
        assert child.config.num_key_value_heads == 1
        q, o = (
            torch.equal(*(m.model.layers[0].self_attn.get_parameter(f"{name}.weight") for m in (plain, child)))
            for name in ("q_proj", "o_proj")
        )
        assert (q, o) == (True, is_plain)


def test_each_toy_is_one_class_and_one_line():
    """Nothing in the library names them: the demonstration counts what a method, a score and a format touch."""
    root = Path(surgery.__file__).parent
    assert not [file for file in root.rglob("*.py") if "toy" in file.read_text().lower()]
    lines = ast.unparse(ast.parse(Path(__file__).read_text())).splitlines()
    registering = [line.strip() for line in lines if line.strip().startswith("monkeypatch.setitem(") and "toy" in line]
    assert len(registering) == 7  # a format is registered twice: how it is planned, and what holds it
