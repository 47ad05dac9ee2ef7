"""Conversion end to end: exact identity, results for stock transformers, untouched parent, planned bytes."""

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
import transformers
import warm
from closeness import assert_close
from families import FAMILIES, random_model, tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import surgery
from surgery import CheckpointError, PlanError
from surgery.bundled import SMALL
from surgery.calibration.text import load_tokenizer, load_windows
from surgery.measure.memory import cache_bytes
from surgery.rewriters.heads import Init

INITS = Init.__args__
NATIVE = ("llama", "qwen2", "qwen3", "phi3", "olmo2", "starcoder2", "stablelm", "stablelm_qk_norm", "cohere")
IDS = torch.arange(24).view(2, 12) * 5 % 120
CALIBRATION = torch.randint(0, 120, (32, 32), generator=torch.Generator().manual_seed(0))


def logits(model, ids=IDS, mask=None):
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, use_cache=False).logits


def gqa(kv_heads, **options):
    return {"steps": [{"rewriter": "gqa", "kv_heads": kv_heads, **options}]}


PLAIN = {"gain_fit": False, "refit_queries": False, "refit_output": False}


@pytest.fixture
def folder(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "parent")
    return tmp_path / "parent"


@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_all_heads_keeps_the_logits_of_every_family(family):
    parent = tiny_model(family)
    child = surgery.convert(parent, gqa("1/1"))
    assert_close(logits(child), logits(parent), 0.0 if type(child) is type(parent) else 1e-5)


@pytest.mark.parametrize("init", INITS)
def test_keeping_all_heads_is_exact_for_every_init(init):
    parent = tiny_model("llama")
    child = surgery.convert(parent, gqa("1/1", init=init), calibration=CALIBRATION)
    assert type(child) is type(parent)
    assert logits(child).equal(logits(parent))


@pytest.mark.parametrize("family", NATIVE)
def test_uniform_gqa_is_the_parents_own_class_with_fewer_heads(family):
    parent = tiny_model(family)
    before = copy.deepcopy(parent.state_dict())
    recipe = gqa(1, gain_fit=False)
    plan = surgery.plan(parent, recipe)
    child = surgery.convert(parent, recipe, calibration=CALIBRATION[:8])
    assert type(child) is type(parent)
    assert plan.native
    assert sum(p.numel() for p in child.parameters()) == plan.parameters
    assert cache_bytes(child, IDS[:1]) == plan.cache_bytes(IDS.shape[1])
    assert all(t.equal(before[name]) for name, t in parent.state_dict().items())
    assert torch.isfinite(logits(child)).all()


def test_calibrated_conversion_is_nearer_to_the_parent_than_mean_pooling():
    parent = surgery.load(SMALL, dtype=torch.float32)  # trained: of a random model, refits have nothing to find
    pages = [(SMALL.parents[2] / name).read_text() for name in ("README.md", "recipes/README.md", "CHANGELOG.md")]
    sizes = {"vocab_size": parent.config.vocab_size, "length": 128, "every_window": True}
    tokenizer = load_tokenizer(SMALL)
    fit = load_windows(pages[:2], tokenizer, samples=24, **sizes)
    held_out = load_windows(pages[2:], tokenizer, samples=8, **sizes)

    def kl(calibration, **options):
        child = surgery.convert(parent, gqa("1/2", **options), calibration=calibration)
        return surgery.evaluate(child, baseline=parent, text=held_out).kl

    mean = kl(None, init="mean", grouping="neighbour", **PLAIN)
    pooled, default = kl(fit.ids_BT, **PLAIN), kl(fit.ids_BT)
    assert 3 * pooled < mean
    assert 3 * default < pooled


def test_layers_that_are_not_selected_keep_their_heads():
    parent = tiny_model("llama")
    child = surgery.convert(parent, gqa(1, layers="1", gain_fit=False), calibration=CALIBRATION)
    assert type(child).__name__ == "SurgeryLlamaForCausalLM"
    assert cache_bytes(child, IDS[:1]) == surgery.plan(parent, gqa(1, layers="1")).cache_bytes(IDS.shape[1])


def test_explicit_groups_may_differ_in_size(tmp_path):
    parent = tiny_model("gpt2")  # four heads, no grouped form of its own
    recipe = {"steps": [{"rewriter": "gqa", "groups": [[0, 2, 3], [1]], "gain_fit": False}]}
    child = surgery.convert(parent, recipe, calibration=CALIBRATION)
    assert cache_bytes(child, IDS[:1]) == surgery.plan(parent, recipe).cache_bytes(IDS.shape[1])
    surgery.save(child, tmp_path / "out")
    assert logits(surgery.load(tmp_path / "out")).sub(logits(child)).abs().max() < 1e-6


def test_result_loads_without_surgery_in_a_fresh_process(folder, tmp_path):
    surgery.convert_checkpoint(folder, gqa(1, **PLAIN), tmp_path / "out")
    code = (
        "import sys, torch\n"
        "sys.modules['surgery'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        f"m = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'out')!r})\n"
        f"torch.save(m(input_ids=torch.tensor({IDS.tolist()})).logits, {str(tmp_path / 'logits.pt')!r})\n"
    )
    warm.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    here = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert here.equal(torch.load(tmp_path / "logits.pt"))


def test_streaming_from_disk_equals_conversion_in_memory(folder, tmp_path):
    recipe = gqa(1)
    surgery.convert_checkpoint(folder, recipe, tmp_path / "out")
    streamed = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    whole = surgery.convert(surgery.load(folder), recipe)
    assert logits(streamed).sub(logits(whole)).abs().max() < 1e-5
    assert {p.name for p in (tmp_path / "out").iterdir()} >= {"config.json", "recipe.yaml", "surgery.json"}
    provenance = json.loads((tmp_path / "out" / "surgery.json").read_text())
    assert provenance["plan"]["bytes_per_token"] == surgery.plan(folder, recipe).bytes_per_token


def test_same_seed_gives_the_same_model():
    parent = tiny_model("llama")
    one, two = (surgery.convert(parent, gqa(1, init="random"), calibration=CALIBRATION, seed=3) for _ in range(2))
    assert logits(one).equal(logits(two))


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (gqa(8), "asks for 8 KV heads, the parent has"),
        (gqa(3), "Use one of"),
        (gqa(1, layers="0-9"), "has no attention layer 2"),
        ({"steps": [{"rewriter": "gqa", "groups": [[0]]}]}, "place 1 KV heads"),
        ({"steps": [gqa(1)["steps"][0], gqa(2)["steps"][0]]}, "did already"),
    ],
)
def test_recipes_that_do_not_fit_are_refused_before_any_work(recipe, message):
    parent = tiny_model("llama")
    with pytest.raises(PlanError, match=message):
        surgery.convert(parent, recipe, calibration=["never read"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(folder, tmp_path, value):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.self_attn.k_proj.weight"
    tensors[name][0, 0] = value
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=name):
        surgery.convert_checkpoint(folder, gqa(1), tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["parent"]
    model = tiny_model("llama")
    model.state_dict()[name][0, 0] = value
    with pytest.raises(CheckpointError, match=name):
        surgery.convert(model, gqa(1))


def test_parent_on_disk_is_never_touched(folder, tmp_path):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    surgery.convert_checkpoint(folder, gqa(1), tmp_path / "out")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    with pytest.raises(CheckpointError, match="not empty"):
        surgery.convert_checkpoint(folder, gqa(1), folder)


@pytest.mark.parametrize(
    ("error", "raised", "words"),
    [
        (KeyboardInterrupt("by hand"), KeyboardInterrupt, "by hand"),
        (OSError(28, "No space left on device"), CheckpointError, "the disk is full. Nothing was written"),
    ],
)
def test_interrupted_conversion_leaves_nothing(folder, tmp_path, monkeypatch, error, raised, words):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("surgery.checkpoints.writing._Shard.close", fail)
    with pytest.raises(raised, match=words):
        surgery.convert_checkpoint(folder, gqa(1), tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["parent"]


def test_reference_duplicated_heads_merge_without_loss():
    reference = Path(__file__).parent.parent.parent / "shared" / "reference" / "checkpoints" / "stories260K-mha-hf"
    if not reference.is_dir():
        pytest.skip("the reference checkpoints are not here")
    parent = surgery.load(reference).float()
    ids = torch.randint(3, 512, (4, 64), generator=torch.Generator().manual_seed(0))
    child = surgery.convert(parent, gqa(4, gain_fit=False), calibration=ids)
    assert abs(surgery.evaluate(child, baseline=parent, text=ids).gap) < 1e-4


SINGULAR = {
    "gqa": gqa(1, gain_fit=False),
    "mla": {"steps": [{"rewriter": "mla", "keep": 0.5, "gain_fit": False}]},
    "freq": {"steps": [{"rewriter": "lowrank", "keep": 0.5, "layout": "freq", "gain_fit": False}]},
}


@pytest.mark.parametrize("method", SINGULAR)
def test_switched_off_layer_changes_nothing_and_is_named(method):
    """All gains of its input norm are zero: its attention gives zeros, whatever becomes of its heads."""
    parent = tiny_model("llama")
    parent.model.layers[1].input_layernorm.weight.data.zero_()
    recipe = {"steps": [{**SINGULAR[method]["steps"][0], "layers": "1"}]}
    with pytest.warns(UserWarning, match="layer 1: its projections read zeros only"):
        child = surgery.convert(parent, recipe, calibration=CALIBRATION[:4])
    assert all(t.isfinite().all() for t in child.state_dict().values() if t.is_floating_point())
    assert_close(logits(child), logits(parent))


@pytest.mark.parametrize("method", ["mla", "freq"])
def test_text_of_one_token_is_damped_and_its_layers_are_named(method):
    """What it says of that one token is kept."""
    parent, text = tiny_model("llama"), torch.full((4, 16), 7)
    with pytest.warns(UserWarning, match="layer 0: what its projections read is multiples of one vector"):
        child = surgery.convert(parent, SINGULAR[method], calibration=text)
    assert all(t.isfinite().all() for t in child.state_dict().values() if t.is_floating_point())
    assert_close(logits(child, text), logits(parent, text), 1e-2)


def test_settings_that_differ_by_layer_are_read_layer_by_layer():
    """Gemma 4: heads are wider where attention is full, and its config refuses to name one width."""
    config = transformers.Gemma4TextConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, global_head_dim=16, sliding_window=8, hidden_size_per_layer_input=0,
        vocab_size_per_layer_input=128, num_kv_shared_layers=0, max_position_embeddings=64,
        layer_types=["sliding_attention", "full_attention"], pad_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    parent = random_model(config)
    plan = surgery.plan(config, "gqa-2x")
    assert plan.native
    assert [(layer.project.kv_heads, layer.project.head_dim) for layer in plan.after] == [(1, 8), (1, 16)]
    child = surgery.convert(parent, gqa("1/1"))
    assert type(child) is type(parent) and logits(child).equal(logits(parent))
    fewer = surgery.convert(parent, gqa(1))
    assert cache_bytes(fewer, IDS[:1]) == surgery.plan(parent, gqa(1)).cache_bytes(IDS.shape[1])


def test_a_converted_folder_is_no_parent(folder, tmp_path):
    surgery.convert_checkpoint(folder, {"steps": [{"rewriter": "identity"}]}, tmp_path / "child")
    for step in (surgery.examine, lambda f: surgery.plan(f, gqa(1)), lambda f: surgery.convert(f, gqa(1))):
        with pytest.raises(surgery.UnsupportedModel, match="converted by surgery already"):
            step(tmp_path / "child")
