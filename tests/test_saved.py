"""Checkpoints, recipes and exports of an earlier version (`saved/write.py`) load, and answer as they did there."""

import functools
import json
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_export_hub import bare, run_bare  # noqa: F401
from transformers import AutoModelForCausalLM, LlamaConfig

import surgery
from surgery.runtime.layout import LayerPlan

SAVED = Path(__file__).parent / "saved"
NAMES = sorted(folder.parent.name for folder in SAVED.glob("*/config.json"))
EXPORTS = sorted(file.name.removesuffix("-hub.tar.gz") for file in SAVED.glob("*-hub.tar.gz"))
METHODS = {"identity", "gqa", "mla", "lowrank", "share", "dms", "dmc", "evict"}
every = pytest.mark.parametrize("name", NAMES)


def expected(name: str) -> dict[str, torch.Tensor]:
    return load_file(SAVED / f"{name}.safetensors")


@functools.cache
def anatomy(kv_heads: int) -> surgery.Anatomy:
    """Of the parent with that many KV heads."""
    return surgery.examine(LlamaConfig.from_json_file(SAVED / f"parent-{kv_heads}.json"))


@torch.no_grad()
def check(model, name: str) -> None:
    want, model = expected(name), model.eval()
    torch.testing.assert_close(model(want["ids"]).logits, want["logits"], rtol=1e-5, atol=1e-5)
    greedy = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False}
    tokens = model.generate(want["ids"], attention_mask=torch.ones_like(want["ids"]), **greedy)
    assert torch.equal(tokens, want["tokens"])


def test_every_method_is_stored() -> None:
    assert len(NAMES) == 14 and EXPORTS == ["dms", "mla"]
    assert sorted(file.stem for file in SAVED.glob("*.safetensors")) == NAMES
    recipes = [surgery.Recipe.load(SAVED / name / "recipe.yaml") for name in NAMES]
    assert {step.rewriter for recipe in recipes for step in recipe.steps} == METHODS
    for name in NAMES:
        want = expected(name)
        assert want["ids"].shape == (1, 24) and want["tokens"].shape == (1, 40) and want["logits"].shape == (1, 24, 64)


@every
def test_surgery_loads_it(name: str) -> None:
    check(surgery.load(SAVED / name), name)


@every
def test_transformers_loads_it_once_surgery_has_loaded_one_of_the_family(name: str) -> None:
    surgery.load(SAVED / "identity")
    model = AutoModelForCausalLM.from_pretrained(SAVED / name)
    assert type(model).__name__ == "SurgeryLlamaForCausalLM"
    check(model, name)


@pytest.mark.parametrize("name", ["identity", "gqa-uneven", "mla", "lowrank", "share-cla2", "dms-window", "dmc"])
def test_it_is_saved_again_as_it_is(name: str, tmp_path) -> None:
    model = surgery.load(SAVED / name)
    surgery.save(model, tmp_path / "again")
    was, now = (load_file(folder / "model.safetensors") for folder in (SAVED / name, tmp_path / "again"))
    assert was.keys() == now.keys() and all(torch.equal(was[key], now[key]) for key in was)
    check(surgery.load(tmp_path / "again"), name)


@every
def test_its_recipe_plans_the_layers_that_it_has(name: str) -> None:
    recipe = surgery.Recipe.load(SAVED / name / "recipe.yaml")
    saved = json.loads((SAVED / name / "surgery.json").read_text())
    assert recipe == surgery.Recipe.load(saved["recipe"])
    config = json.loads((SAVED / name / "config.json").read_text())
    plan = surgery.plan(anatomy(config["num_key_value_heads"]), recipe)
    assert list(plan.after) == [LayerPlan.from_dict(layer) for layer in saved["plan"]["layers"]]
    assert plan.parameters == saved["plan"]["parameters"]
    assert plan.bytes_per_token == saved["plan"]["bytes_per_token"]
    assert [layer["plan"] for layer in config["surgery"]["layers"]] == saved["plan"]["layers"]


ANSWERS = """
import importlib.util, json, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
assert importlib.util.find_spec("surgery") is None
for folder, asked, answers in json.loads(sys.argv[1]):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    ids = load_file(asked)["ids"]
    with torch.no_grad():
        logits = model(ids).logits.contiguous()
    greedy = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False}
    tokens = model.generate(ids, attention_mask=torch.ones_like(ids), **greedy)
    save_file({"logits": logits, "tokens": tokens.contiguous()}, answers)
"""


def test_exports_run_their_own_code_where_surgery_is_not(bare, tmp_path) -> None:  # noqa: F811
    asked = []
    for name in EXPORTS:
        with tarfile.open(SAVED / f"{name}-hub.tar.gz") as archive:
            archive.extractall(tmp_path, filter="data")
        paths = tmp_path / f"{name}-hub", SAVED / f"{name}.safetensors", tmp_path / f"{name}.safetensors"
        asked.append([str(path) for path in paths])
    run_bare(bare, ANSWERS, json.dumps(asked), modules=tmp_path / "modules")
    for name in EXPORTS:
        want, got = expected(name), load_file(tmp_path / f"{name}.safetensors")
        torch.testing.assert_close(got["logits"], want["logits"], rtol=1e-5, atol=1e-5)
        assert torch.equal(got["tokens"], want["tokens"])


@pytest.mark.parametrize("name", EXPORTS)
def test_surgery_loads_exports_by_its_own_code(name: str, tmp_path) -> None:
    with tarfile.open(SAVED / f"{name}-hub.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    folder = tmp_path / f"{name}-hub"
    for file in folder.glob("*.py"):
        file.unlink()
    check(surgery.load(folder), name)
