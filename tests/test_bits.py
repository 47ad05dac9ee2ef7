"""What a conversion does not rewrite keeps its bits, its dtype, and all that is known of it, on every path."""

import contextlib
import json
import logging

import pytest
import torch
import transformers as hf
from families import tiny_model
from safetensors.torch import load_file, save_file

import surgery

CALIBRATION = torch.randint(3, 120, (8, 16), generator=torch.Generator().manual_seed(0))
REWRITTEN = ("q_proj", "k_proj", "v_proj", "o_proj")
MOE = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def gqa(kv_heads, **options):
    return {"steps": [{"rewriter": "gqa", "kv_heads": kv_heads, **options}]}


def glm4_moe():
    """bfloat16, and float32 where its class keeps that: the bias of the router."""
    config = hf.Glm4MoeConfig(**MOE, n_routed_experts=4, num_experts_per_tok=2, first_k_dense_replace=0, n_group=1,
                              topk_group=1, use_qk_norm=True)  # fmt: skip
    model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    router = model.model.layers[0].mlp.gate
    router.e_score_correction_bias = torch.rand(4, generator=torch.Generator().manual_seed(1))
    return model


def ernie4_5_moe():
    config = hf.Ernie4_5_MoeConfig(**MOE, moe_num_experts=4, moe_k=2, moe_num_shared_experts=1, moe_layer_start_index=0)
    model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    router = model.model.layers[0].mlp.gate
    router.float()
    router.moe_statics.e_score_correction_bias.data.uniform_(generator=torch.Generator().manual_seed(1))
    return model


def gemma3():
    """Gains with an offset, and a tied head."""
    config = hf.Gemma3TextConfig(**{**MOE, "layer_types": ["full_attention"]})
    model = hf.AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.normal_(std=0.3, generator=torch.Generator().manual_seed(2))
    return model


def qwen3_moe():
    """Experts, which files hold one by one."""
    return hf.AutoModelForCausalLM.from_config(hf.Qwen3MoeConfig(**MOE, num_experts=4, num_experts_per_tok=2),
                                               dtype=torch.float16)  # fmt: skip


PARENTS = {"glm4_moe": glm4_moe, "ernie4_5_moe": ernie4_5_moe, "gemma3": gemma3, "qwen3_moe": qwen3_moe}


def stored(folder):
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def change_files(folder, change):
    tensors = stored(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def read_config(folder):
    return json.loads((folder / "config.json").read_text())


def by_every_path(folder, recipe, where, texts=(None, CALIBRATION)):
    """Folders of the result: from disk and from memory, without text (streamed, where that can be) and with it."""
    results = {}
    for text in texts:
        kind = "plain" if text is None else "calibrated"
        results[f"disk_{kind}"] = where / f"disk_{kind}"
        surgery.convert_checkpoint(folder, recipe, where / f"disk_{kind}", calibration=text)
        results[f"memory_{kind}"] = where / f"memory_{kind}"
        surgery.save(surgery.convert(surgery.load(folder), recipe, calibration=text), where / f"memory_{kind}")
    return results


def differences(found, wanted):
    """Names of tensors that are not the same to the bit, those of projections left out."""
    kept = {name for name in {*found, *wanted} if not any(f".self_attn.{part}." in name for part in REWRITTEN)}
    return {
        name
        for name in kept
        if name not in found or name not in wanted
        or found[name].dtype != wanted[name].dtype or not found[name].equal(wanted[name])
    }  # fmt: skip


@pytest.mark.parametrize("kind", PARENTS)
def test_all_paths_keep_what_they_do_not_rewrite_to_the_bit(tmp_path, kind):
    PARENTS[kind]().save_pretrained(tmp_path / "parent")
    wanted = stored(tmp_path / "parent")
    recipe = gqa(1, gain_fit=kind == "gemma3")  # the slow part, once: it runs the whole model
    results = {path: stored(folder) for path, folder in by_every_path(tmp_path / "parent", recipe, tmp_path).items()}
    for path, found in results.items():
        assert not differences(found, wanted), path
        assert {name: t.dtype for name, t in found.items()} == {name: t.dtype for name, t in wanted.items()}, path
    for kind in ("plain", "calibrated"):
        disk, memory = results[f"disk_{kind}"], results[f"memory_{kind}"]
        assert all(tensor.equal(memory[name]) for name, tensor in disk.items()), kind


EXTRA = {
    "model.layers.1.eh_proj.weight": torch.ones(32, 64, dtype=torch.bfloat16),
    "model.layers.1.self_attn.k_proj.weight": torch.ones(16, 32, dtype=torch.bfloat16),
    "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    "v_head.counts": torch.ones(2, dtype=torch.int64),
}


def test_what_the_class_does_not_load_is_in_no_result_and_is_named(tmp_path, caplog):
    """A layer that predicts a further token: with the parent's heads, it would not fit the config of the result."""
    glm4_moe().save_pretrained(tmp_path / "parent")
    wanted = stored(tmp_path / "parent")
    change_files(tmp_path / "parent", lambda tensors: tensors.update(EXTRA))
    assert read_config(tmp_path / "parent")["num_nextn_predict_layers"] == 1
    assert "left out: 1 layer that num_nextn_predict_layers counts" in str(surgery.plan(tmp_path / "parent", gqa(1)))
    with caplog.at_level(logging.WARNING, logger="surgery"):
        results = by_every_path(tmp_path / "parent", gqa(1, gain_fit=False), tmp_path)
    surgery.convert_checkpoint(tmp_path / "parent", "identity", tmp_path / "own")
    for path, folder in {**results, "own": tmp_path / "own"}.items():
        found = stored(folder)
        assert not set(found) & set(EXTRA), path
        assert path == "own" or set(found) == set(wanted), path
        assert read_config(folder)["num_nextn_predict_layers"] == 0, path
        provenance = json.loads((folder / "surgery.json").read_text())
        assert provenance["plan"]["left_out"] == {"num_nextn_predict_layers": 1}, path
        if not path.startswith("memory"):
            assert sorted(provenance["left_out"]) == [
                "model.layers.0.self_attn.rotary_emb.inv_freq",
                "model.layers.1 (2 tensors)",
                "v_head.counts",
            ], path
    assert "model.layers.1 (2 tensors)" in caplog.text


@pytest.mark.parametrize("kind", ["glm4_moe", "ernie4_5_moe"])
def test_replaced_attention_leaves_the_rest_to_the_bit_and_gives_the_parents_logits(tmp_path, kind):
    PARENTS[kind]().save_pretrained(tmp_path / "parent")
    parent = surgery.load(tmp_path / "parent")
    ids = CALIBRATION[:2]
    with torch.no_grad():
        wanted = parent(ids).logits
    for path, folder in by_every_path(tmp_path / "parent", "identity", tmp_path, texts=[None]).items():
        child = surgery.load(folder)
        assert not differences(child.state_dict(), parent.state_dict()), path
        with torch.no_grad():
            assert (child(ids).logits - wanted).abs().max() <= 2e-2 * wanted.abs().max(), path


def test_float32_in_the_files_of_a_bfloat16_model_is_not_rounded(tmp_path):
    """Its class computes in bfloat16, as the parent's does; what the files hold stays."""
    wide = ("model.norm.weight", "model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight")
    parent = tmp_path / "parent"
    tiny_model("llama").to(torch.bfloat16).save_pretrained(parent)
    change_files(parent, lambda tensors: tensors.update({n: torch.randn(tensors[n].shape) for n in wide}))
    wanted = stored(parent)
    for recipe in (gqa(1), gqa(1, layers="1")):
        for text in (None, CALIBRATION) if recipe == gqa(1) else (None,):
            out = tmp_path / "out"
            surgery.convert_checkpoint(parent, recipe, out, calibration=text, overwrite=True)
            found = stored(out)
            assert not differences(found, wanted)
            assert {n for n, t in found.items() if t.dtype == torch.float32} == set(wide)
            assert read_config(out)["dtype"] == "bfloat16"
            assert surgery.load(out).model.norm.weight.dtype == torch.bfloat16


def test_parts_that_a_user_cast_or_froze_stay_as_they_are():
    parent = tiny_model("llama").to(torch.bfloat16)
    parent.lm_head.float()
    parent.model.norm.weight.data += 1  # edited in memory: no file has it
    parent.model.layers[0].requires_grad_(False)
    parent.model.layers[1].mlp.train()
    parent.generation_config.max_new_tokens = 7
    wanted = parent.state_dict()
    for recipe in (gqa(1), gqa(1, layers="1"), "identity"):
        child = surgery.convert(parent, recipe)
        assert not differences(child.state_dict(), wanted)
        assert {name: t.dtype for name, t in child.state_dict().items()} == {n: t.dtype for n, t in wanted.items()}
        flags = {name: p.requires_grad for name, p in child.named_parameters()}
        assert flags == {name: not name.startswith("model.layers.0.") for name in flags}
        training = {name for name, module in child.named_modules() if module.training}
        assert training and all(name.startswith("model.layers.1.mlp") for name in training)
        assert child.generation_config.max_new_tokens == 7


def test_frozen_fused_projections_stay_frozen_when_they_are_taken_apart():
    parent = tiny_model("gpt_neox").requires_grad_(False)
    child = surgery.convert(parent, "identity")
    assert not any(p.requires_grad for p in child.parameters())


def test_heads_that_files_hold_apart_are_not_tied_by_the_config(tmp_path):
    """`tie_word_embeddings` says one matrix, the files have two that differ: transformers keeps both."""
    parent = tiny_model("llama")
    parent.save_pretrained(tmp_path / "parent")
    config = read_config(tmp_path / "parent") | {"tie_word_embeddings": True}
    (tmp_path / "parent" / "config.json").write_text(json.dumps(config))
    wanted = stored(tmp_path / "parent")
    for folder in by_every_path(tmp_path / "parent", gqa(1), tmp_path, texts=[None]).values():
        assert not differences(stored(folder), wanted)
    child = surgery.convert(surgery.load(tmp_path / "parent"), "identity")
    assert child.lm_head.weight.equal(parent.lm_head.weight)


@pytest.mark.parametrize("recipe", [gqa(1), "identity"], ids=["gqa", "identity"])
def test_tensors_that_lie_in_memory_in_other_ways_are_saved_with_their_values(tmp_path, recipe):
    """Negated on read, transposed, one row for many, one tensor under two names, two in one storage."""
    parent = tiny_model("llama")
    layers = parent.model.layers
    with torch.no_grad():
        layers[0].mlp.up_proj.weight = torch.nn.Parameter(torch._neg_view(layers[0].mlp.up_proj.weight.detach()))
        layers[0].mlp.down_proj.weight = torch.nn.Parameter(layers[0].mlp.down_proj.weight.t().contiguous().t())
        layers[1].mlp.up_proj.weight = torch.nn.Parameter(layers[1].mlp.up_proj.weight[:1].expand(96, 64))
        layers[1].mlp.gate_proj.weight = layers[0].mlp.gate_proj.weight
        layers[1].self_attn.q_proj.weight = layers[0].self_attn.q_proj.weight
        both = torch.randn(2, 64)
        layers[0].input_layernorm.weight, layers[1].input_layernorm.weight = map(torch.nn.Parameter, both)
    wanted = {name: t.clone() for name, t in parent.state_dict().items()}
    child = surgery.convert(parent, recipe)
    assert child.model.layers[1].mlp.gate_proj.weight is child.model.layers[0].mlp.gate_proj.weight
    surgery.save(child, tmp_path / "child")
    loaded = surgery.load(tmp_path / "child")
    for found in (stored(tmp_path / "child"), child.state_dict(), loaded.state_dict()):
        assert not differences(found, wanted)
    if recipe == "identity":
        with torch.no_grad():
            assert torch.allclose(loaded(CALIBRATION).logits, parent(CALIBRATION).logits, atol=1e-4)


@contextlib.contextmanager
def inside_out():
    torch.set_default_dtype(torch.bfloat16)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        yield


@contextlib.contextmanager
def by_default():
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    with torch.no_grad():
        yield


@pytest.fixture
def torch_defaults():
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


def modes():
    return (
        torch.is_inference_mode_enabled(), torch.is_grad_enabled(), torch.get_default_dtype(),
        torch.get_default_device(), torch.is_autocast_enabled("cpu"), torch.get_rng_state(),
    )  # fmt: skip


@pytest.mark.parametrize("surroundings", [inside_out, by_default])
def test_the_callers_torch_modes_change_nothing_and_stay_as_they_are(tmp_path, torch_defaults, surroundings):
    """Nor do the random numbers that the caller draws afterwards."""
    parent = _one_layer_llama()
    parent.save_pretrained(tmp_path / "parent")
    own, text = "identity", CALIBRATION[:2]
    wanted = surgery.convert(parent, gqa(1), calibration=text).state_dict()
    wanted_plan = surgery.plan(parent, own)
    with surroundings():
        before = modes()
        found = surgery.convert(parent, gqa(1), calibration=text)
        plan = surgery.plan(parent, own)
        child = surgery.convert(surgery.load(tmp_path / "parent"), own)
        surgery.convert_checkpoint(tmp_path / "parent", gqa(1), tmp_path / "out", calibration=text)
        after = modes()
    assert before[:-1] == after[:-1] and before[-1].equal(after[-1])
    assert plan.to_dict() == wanted_plan.to_dict() and plan.anatomy.sites == wanted_plan.anatomy.sites
    for tensors in (found.state_dict(), stored(tmp_path / "out")):
        assert {name: t.dtype for name, t in tensors.items()} == {name: t.dtype for name, t in wanted.items()}
        assert all(t.equal(wanted[name]) for name, t in tensors.items())
    with torch.device("cpu"), torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        torch.set_default_dtype(torch.float32)
        for model in (found, child):
            model(text).logits.sum().backward()
        with torch.no_grad():
            assert torch.allclose(child(text).logits, parent(text).logits, atol=1e-5)


def test_conversion_leaves_the_random_state_of_the_caller_alone():
    parent = _one_layer_llama()
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    surgery.examine(parent.config)
    surgery.convert(parent, gqa(1, init="random"), calibration=CALIBRATION[:2], seed=9)
    assert torch.rand(3).equal(wanted)


def _one_layer_llama():
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**MOE)).eval()


def test_frequencies_of_latents_travel_as_bits_through_folders(tmp_path):
    """They are float32 numbers seen as integers: cast to the dtype of the weights, rotations would be others."""
    parent = tiny_model("llama", head_dim=32).to(torch.bfloat16)
    parent.save_pretrained(tmp_path / "parent")
    step = {"rewriter": "mla", "rank": 20, "rope_dims": 12, "refit_queries": False, "refit_output": False}
    ids = torch.randint(3, 128, (8, 24), generator=torch.Generator().manual_seed(0))
    want = surgery.convert(tmp_path / "parent", {"steps": [step]}, calibration=ids)
    surgery.convert_checkpoint(tmp_path / "parent", {"steps": [step]}, tmp_path / "child", calibration=ids)
    got = surgery.load(tmp_path / "child")
    assert got.state_dict().keys() == want.state_dict().keys()
    assert [name for name, t in want.state_dict().items() if not torch.equal(t, got.state_dict()[name])] == []
