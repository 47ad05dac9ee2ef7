"""Gates of whole heads (`gate: head` of `dms`): how they mix, learn and become hard."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model
from methods import converted
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel
from typer.testing import CliRunner
from uptraining import make_home, run

import surgery
from surgery.cli import app
from surgery.errors import PlanError, RecipeError
from surgery.measure.gates import gated
from surgery.train.checkpoints import checkpoints
from surgery.train.gates import choose_heads
from surgery.train.uptrain import enable_checkpointing, uptrain

HEAD = {"rewriter": "dms", "gate": "head", "ratio": 1.6, "window": 4, "sinks": 2}
TRAINED = ("layer_local=0", "train=gates", "length=32", "batch=4", "tokens=5120", "learning_rate=0.01")
"""At this length 4 * (32 / 1.6 - 6) slots are left for heads that take 26 more than the others: for two."""


def recipe(step: dict[str, Any], **uptraining: Any) -> dict[str, Any]:
    return {"name": "tiny", "steps": [step]} | ({"uptrain": {"tokens": 9, **uptraining}} if uptraining else {})


def head_model() -> PreTrainedModel:
    return surgery.convert(tiny_model("llama"), recipe(HEAD))


def set_alphas(model: PreTrainedModel, alphas: list[list[float]]) -> None:
    for module, found in zip(gated(model).values(), alphas, strict=True):
        with torch.no_grad():
            module.gate.weight.copy_((torch.tensor(found) - 1) / module.retain.gain)


def alphas_of(model: PreTrainedModel) -> list[list[float]]:
    return [[round(a, 4) for a in module.gate.alpha_K.tolist()] for module in gated(model).values()]


@torch.no_grad()
def first_attention(model: PreTrainedModel, **more: Tensor) -> Tensor:
    """What the first layer's attention makes of a text."""
    seen: list[Tensor] = []
    module = next(iter(gated(model).values()))
    handle = module.register_forward_hook(lambda _, __, output: seen.append(output[0]))
    ids = torch.randint(3, 120, (2, 24), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, use_cache=False, **more)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_in_training_a_head_mixes_all_of_its_tokens_with_the_first_and_newest(implementation: str) -> None:
    model = head_model()
    model.set_attn_implementation(implementation)
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[0, :5] = 0
    found = {}
    for alpha in (0.0, 0.3, 1.0):
        set_alphas(model, [[alpha, 1.0], [1.0, 1.0]])
        hard, soft = (first_attention(model.train(m), attention_mask=mask)[mask.bool()] for m in (False, True))
        found[alpha] = soft
        if alpha != 0.3:
            torch.testing.assert_close(soft, hard)
    assert not torch.allclose(found[0.0], found[1.0], atol=1e-3)
    torch.testing.assert_close(found[0.3], 0.3 * found[1.0] + 0.7 * found[0.0])


def test_readers_mix_as_their_owner_does_and_teach_its_alphas() -> None:
    share = {"rewriter": "share", "layout": {1: 0}, "init": "replace"}
    model = surgery.convert(tiny_model("llama"), recipe(HEAD) | {"steps": [share, HEAD]})
    ids, found = torch.randint(3, 120, (2, 24)), []
    for alphas in ([0.0, 1.0], [0.3, 0.6]):
        set_alphas(model, [alphas])
        found += [model.train(soft)(ids, use_cache=False).logits for soft in (False, True)]
    torch.testing.assert_close(found[0], found[1])
    assert not torch.allclose(found[1], found[3], atol=1e-3)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            enable_checkpointing(model)
        model.zero_grad()
        model(ids, use_cache=False).logits.square().sum().backward()
        gradients.append(next(iter(gated(model).values())).gate.weight.grad.clone())
    assert gradients[0].abs().min() > 0
    torch.testing.assert_close(gradients[0], gradients[1])


def test_heads_of_the_largest_alphas_keep_everything_as_far_as_there_is_room() -> None:
    model = head_model()
    set_alphas(model, [[0.4, 0.9], [0.2, 0.3]])
    assert choose_heads(model, 32) == {0: pytest.approx([0.4, 0.9]), 1: pytest.approx([0.2, 0.3])}
    assert alphas_of(model) == [[1, 1], [0, 0]]
    set_alphas(model, [[0.4, 0.9], [0.2, 0.3]])
    choose_heads(model, 22)  # 4 * (22 / 1.6 - 6) are 31 slots, and a head takes 16
    assert alphas_of(model) == [[0, 1], [0, 0]]


def test_equal_alphas_on_both_sides_are_told(caplog: pytest.LogCaptureFixture) -> None:
    choose_heads(model := head_model(), 32)
    assert "nothing tells them apart" in caplog.text
    assert sum(sum(found) for found in alphas_of(model)) == 2


def test_gates_that_are_not_trained_are_not_chosen_anew() -> None:
    model = head_model().requires_grad_(False)
    set_alphas(model, [[0.4, 0.9], [0.2, 0.3]])
    assert choose_heads(model, 32) == {}
    assert alphas_of(model) == [[0.4, 0.9], [0.2, 0.3]]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A parent in which head 1 of the first layer and head 0 of the second do nothing, and its conversion."""
    folder = make_home(tmp_path_factory.mktemp("heads"))
    parent = surgery.load(folder / "parent")
    for layer, head in ((0, 1), (1, 0)):
        attention = parent.get_submodule(f"model.layers.{layer}.self_attn")
        read = attention.num_key_value_groups * attention.head_dim
        with torch.no_grad():
            attention.o_proj.weight[:, head * read : (head + 1) * read] = 0
    parent.save_pretrained(folder / "parent")
    surgery.save(surgery.convert(surgery.load(folder / "parent"), recipe(HEAD)), folder / "head")
    return folder


def test_heads_that_matter_learn_to_keep_everything_and_the_others_leave_the_cache(home: Path, tmp_path: Path) -> None:
    given = run(home, tmp_path, *TRAINED, model="head", held_out=str(home / "held.jsonl"), save_steps=20)
    summary = uptrain(given)
    assert summary["before"]["ratio"] == 1 < summary["after"]["ratio"]
    assert summary["before"]["kl"] == 0
    assert summary["after"]["kl"] == pytest.approx(0, abs=1e-6)  # nothing is lost by the right heads
    learned = [e["alphas"] for e in json.loads((tmp_path / "uptraining.json").read_text())["log"] if "alphas" in e]
    assert len(learned) == 1
    assert min(learned[0]["0"][0], learned[0]["1"][1]) > 0.9
    assert max(learned[0]["0"][1], learned[0]["1"][0]) < 0.4
    before, after = (load_file(f / "model.safetensors") for f in (home / "head", tmp_path / "model"))
    assert {name for name in after if not torch.equal(after[name], before[name])} == {
        f"model.layers.{layer}.self_attn.gate.weight" for layer in (0, 1)
    }
    model, ids = surgery.load(tmp_path / "model", dtype=torch.bfloat16).float(), torch.randint(3, 120, (1, 24))
    assert alphas_of(model.bfloat16().float()) == [[1, pytest.approx(0, abs=4e-3)], [pytest.approx(0, abs=4e-3), 1]]
    with torch.no_grad():
        whole, begun = model(ids).logits, model(ids[:, :15], use_cache=True)
        steps = [begun.logits]
        for t in range(15, 24):
            steps.append(model(ids[:, t : t + 1], past_key_values=begun.past_key_values).logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=0, atol=1e-5)
    assert [layer.lengths.tolist() for layer in begun.past_key_values.layers] == [[[24, 6]], [[6, 24]]]
    # The second half again, from the checkpoint in the middle.
    shutil.rmtree(checkpoints(tmp_path / "checkpoints")[-1])
    shutil.rmtree(tmp_path / "model")
    uptrain(given)
    again = load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(again[name], after[name]) for name in after)
    arguments = ["inspect", "--gates", str(tmp_path / "model"), "--text", str(home / "text.jsonl"), "--length", "16"]
    result = CliRunner().invoke(app, [*arguments, "--json", str(tmp_path / "gates.json")])
    assert result.exit_code == 0, result.output
    assert "its gate lets" not in result.output
    shown = json.loads((tmp_path / "gates.json").read_text())["tokens_per_slot_by_head"]
    assert shown["0"][0] == shown["1"][1] == 1 < shown["0"][1] == shown["1"][0]


def test_the_l1_penalty_pushes_alphas_without_a_budget(home: Path, tmp_path: Path) -> None:
    learned = {}
    for weight in (0, 1):
        uptrain(run(home, tmp_path / str(weight), *TRAINED, "tokens=256", "gate_budget=0", f"gate_l1={weight}",
                    model="head"))  # fmt: skip
        log = json.loads((tmp_path / str(weight) / "uptraining.json").read_text())["log"]
        learned[weight] = [
            alpha for entry in log if "alphas" in entry for row in entry["alphas"].values() for alpha in row
        ]
    assert learned[0] == [1.0] * 4
    assert max(learned[1]) < 1


@pytest.mark.parametrize(
    ("step", "more", "sentence"),
    [
        (HEAD, {"gate_budget_per": "head"}, "gate_budget_per: some heads keep everything"),
        (HEAD, {"gate_temperature": 1.0}, "gate_temperature: no decision is relaxed"),
        (HEAD, {"gate_l1": -1}, "must not be negative"),
        ({"rewriter": "dms"}, {"gate_l1": 0.1}, r"gate_l1: only gates of heads \(gate: head\)"),
        ({"rewriter": "dmc", "gate": "head"}, {"gate_ramp": 0.5}, "not allowed"),
    ],
)
def test_a_recipe_says_which_options_heads_do_not_read(step: dict, more: dict, sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        surgery.Recipe.load(recipe(step, **more))


def test_heads_that_cannot_keep_everything_are_refused(home: Path, tmp_path: Path) -> None:
    parent = tiny_model("llama")
    with pytest.raises(PlanError, match=r"ratio: 4 leaves none of 4 KV heads room .* at most 3.73,"):
        surgery.plan(parent, recipe(HEAD | {"ratio": 4}))
    surgery.plan(parent, recipe(HEAD | {"ratio": 3.73}))
    latent = recipe(HEAD) | {"steps": [{"rewriter": "mla", "rank": 12, "rope_dims": 4}, HEAD]}
    with pytest.raises(PlanError, match="one latent for all of them. Use `gate: adapter`"):
        surgery.plan(parent, latent)
    with pytest.raises(RecipeError, match="none of 4 KV heads has room for all of 10 tokens"):
        uptrain(run(home, tmp_path, *TRAINED, "length=10", model="head"))


def test_heads_decide_one_way_and_the_other_in_the_methods_that_are_tested() -> None:
    decided = [alpha > 0.5 for found in alphas_of(converted("dms_head", "llama")) for alpha in found]
    assert len(set(decided)) == 2
