"""The class that a checkpoint names goes through every path: task heads, bare decoders, vision-language models."""

import json
from dataclasses import replace

import pytest
import torch
import transformers as hf
from closeness import assert_close
from families import FAMILIES, tiny_model
from safetensors.torch import load_file, save_file
from vision_models import IMAGE, VLMS, tiny_vlm, with_image

import surgery
from surgery import CheckpointError, PlanError, UnsupportedModel
from surgery.anatomy import examine
from surgery.calibration.outputs import answers, distance
from surgery.checkpoints.classes import model_class
from surgery.checkpoints.files import Checkpoint
from surgery.convert import convert_checkpoint
from surgery.export import Source, check, target_for
from surgery.runtime.calling import cache_argument, once
from surgery.runtime.layout import Rotary

TEXT_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "max_position_embeddings", "initializer_range", "pad_token_id", "bos_token_id", "eos_token_id",
)  # fmt: skip
IDS = torch.randint(3, 90, (1, 12), generator=torch.Generator().manual_seed(0))
TEXT = torch.randint(3, 90, (8, 16), generator=torch.Generator().manual_seed(1))
GQA = {"name": "half", "steps": [{"rewriter": "gqa", "kv_heads": "1/2"}]}
WITHOUT_GAINS = {"name": "half", "steps": [{**GQA["steps"][0], "gain_fit": False}]}
FULL = {"name": "full", "steps": [{"rewriter": "lowrank", "rank": 64, "k_share": 0.5}]}
DMS = {"name": "drop", "steps": [{"rewriter": "dms", "ratio": 2, "window": 8}]}
HEADS = {
    "LlamaForSequenceClassification": {
        "num_labels": 3, "id2label": {0: "bad", 1: "fair", 2: "good"}, "label2id": {"bad": 0, "fair": 1, "good": 2},
        "problem_type": "single_label_classification", "tie_word_embeddings": True,
    },
    "Qwen3ForTokenClassification": {"num_labels": 5},
    "LlamaForQuestionAnswering": {},
    "LlamaModel": {},
    "GPT2Model": {},
}  # fmt: skip
FAMILY_OF = {"Llama": "llama", "Qwen3": "qwen3", "GPT2": "gpt2"}


def with_head(name, **settings):
    """A tiny model of the class `name`."""
    config = FAMILIES[next(family for start, family in FAMILY_OF.items() if name.startswith(start))]()
    for key, value in (HEADS.get(name, {}) | settings).items():
        setattr(config, key, value)
    torch.manual_seed(0)
    return getattr(hf, name)._from_config(config, dtype=torch.float32).eval()


@torch.no_grad()
def outputs(model, **inputs):
    """All numbers that the model puts out, in one row."""
    found = model(**(inputs or {"input_ids": IDS}), return_dict=True).values()
    return torch.cat([x.flatten() for x in found if isinstance(x, torch.Tensor)])


def untouched(model):
    """Tensors outside of the attentions of the text."""
    attention = ("self_attn", "attn")
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if "vis" in name or not any(part in name.split(".") for part in attention)
    }


def assert_same_tensors(found, wanted):
    assert found.keys() == wanted.keys()
    assert all(found[name].equal(tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize("name", HEADS)
def test_class_is_the_one_that_architectures_names(name):
    config = with_head(name).config
    config.architectures = [name]
    assert model_class(config) is getattr(hf, name)
    assert examine(config).architecture == name


def test_class_without_usable_architectures_is_what_transformers_has_for_the_config():
    config = FAMILIES["llama"]()
    assert model_class(config) is hf.LlamaForCausalLM
    config.architectures = ["SomebodysLlama", "MistralForCausalLM"]
    assert model_class(config) is hf.LlamaForCausalLM
    assert model_class(VLMS["llava"].config()) is hf.LlavaForConditionalGeneration
    assert model_class(hf.CLIPVisionConfig()) is hf.CLIPVisionModel
    with pytest.raises(UnsupportedModel, match="has no language model"):
        model_class(hf.PreTrainedConfig())


@pytest.mark.parametrize("name", HEADS)
def test_identity_from_a_folder_keeps_class_head_labels_and_outputs(name, tmp_path):
    parent = with_head(name)
    parent.save_pretrained(tmp_path / "parent")
    convert_checkpoint(tmp_path / "parent", "identity", tmp_path / "child")
    child = surgery.load(tmp_path / "child").eval()
    assert type(child).__name__ == f"Surgery{name}"
    assert isinstance(child, type(parent))
    assert outputs(child).equal(outputs(parent))
    assert_same_tensors(untouched(child), untouched(parent))
    for field in ("num_labels", "id2label", "label2id", "problem_type"):
        assert getattr(child.config, field) == getattr(parent.config, field)


@pytest.mark.parametrize("name", ["LlamaForSequenceClassification", "LlamaForQuestionAnswering", "LlamaModel"])
def test_streamed_and_in_memory_results_are_the_same_class_and_bits(name, tmp_path):
    parent = with_head(name)
    parent.save_pretrained(tmp_path / "parent")
    plan = convert_checkpoint(tmp_path / "parent", GQA, tmp_path / "streamed")
    assert plan.native
    surgery.save(surgery.convert(parent, GQA), tmp_path / "memory")
    files = [load_file(tmp_path / path / "model.safetensors") for path in ("streamed", "memory")]
    assert_same_tensors(*files)
    child = surgery.load(tmp_path / "streamed")
    assert type(child) is type(parent)
    assert child.config.num_key_value_heads == 1
    assert child.config.id2label == parent.config.id2label
    assert_same_tensors(untouched(child), untouched(parent))


@pytest.mark.parametrize("name", ["LlamaForSequenceClassification", "GPT2Model"])
def test_calibrated_result_keeps_the_head_and_is_nearer_than_the_data_free_one(name, tmp_path):
    parent = with_head(name)
    parent.save_pretrained(tmp_path / "parent")
    recipe = {"name": "half", "steps": [{"rewriter": "gqa", "kv_heads": "1/2", "layers": "1"}]}
    convert_checkpoint(tmp_path / "parent", recipe, tmp_path / "plain")
    convert_checkpoint(tmp_path / "parent", recipe, tmp_path / "child", calibration=TEXT)
    wanted = answers(parent, TEXT, torch.ones_like(TEXT).bool())
    found = {}
    for path in ("plain", "child"):
        child = surgery.load(tmp_path / path).eval()
        assert isinstance(child, type(parent))
        assert_same_tensors(untouched(child), untouched(parent))
        with torch.no_grad():
            found[path] = float(distance(child, answers(child, TEXT, torch.ones_like(TEXT).bool()), wanted))
    assert 0 < found["child"] < 0.8 * found["plain"]


def test_latent_of_full_rank_is_the_classifier_itself(tmp_path):
    parent = with_head("LlamaForSequenceClassification")
    parent.save_pretrained(tmp_path / "parent")
    convert_checkpoint(tmp_path / "parent", FULL, tmp_path / "child", calibration=TEXT)
    child = surgery.load(tmp_path / "child").eval()
    torch.testing.assert_close(outputs(child), outputs(parent), rtol=1e-3, atol=1e-4)


def test_model_in_memory_is_of_its_own_class_whatever_its_config_names(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    parent = hf.LlamaModel.from_pretrained(tmp_path).eval()
    assert parent.config.architectures == ["LlamaForCausalLM"]
    assert surgery.plan(parent, GQA).native
    child = surgery.convert(parent, GQA)
    assert type(child) is hf.LlamaModel
    assert child.layers[0].self_attn.k_proj.weight.shape[0] == 16


def test_class_that_transformers_lacks_is_refused_where_its_head_would_be_lost(tmp_path):
    parent = with_head("LlamaModel")
    parent.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"architectures": ["LlamaForReward"], "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = {f"model.{name}": t for name, t in load_file(tmp_path / "model.safetensors").items()}
    save_file(tensors | {"reward.weight": torch.ones(1, 64)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="is a LlamaForReward, which transformers does not have.*lose reward"):
        convert_checkpoint(tmp_path, GQA, tmp_path / "child")
    assert not (tmp_path / "child").exists()


def test_evaluation_and_generation_of_a_classifier_are_refused_with_the_reason():
    model = with_head("LlamaForSequenceClassification")
    with pytest.raises(UnsupportedModel, match="SequenceClassification: gives no probabilities of next tokens"):
        surgery.evaluate(model, text=TEXT)
    with pytest.raises(UnsupportedModel, match="generate needs them"):
        surgery.generate(model, "once")


def test_export_of_a_classifier_runs_without_this_library_under_its_auto_class(tmp_path):
    parent = with_head("Qwen3ForTokenClassification")
    child = surgery.convert(parent, "identity")
    report = surgery.export(child, tmp_path / "out", to="hub")
    assert report.parity.logit_difference == 0
    assert report.architecture == "SurgeryQwen3ForTokenClassification"
    named = json.loads((tmp_path / "out" / "config.json").read_text())["auto_map"]
    assert set(named) == {"AutoConfig", "AutoModel", "AutoModelForTokenClassification"}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "pipeline_tag: token-classification" in card
    assert 'AutoModelForTokenClassification.from_pretrained("FOLDER_OR_ID"' not in card  # filled in
    assert "AutoModelForTokenClassification.from_pretrained(" in card


def test_serving_engines_are_refused_for_a_classifier():
    child = surgery.convert(with_head("LlamaForSequenceClassification"), GQA)
    with pytest.raises(PlanError, match="LlamaForSequenceClassification predicts no tokens"):
        check(target_for("vllm"), Source(child))


@pytest.mark.parametrize("name", VLMS)
def test_identity_of_a_vision_language_model_keeps_what_it_says_of_an_image(name, tmp_path):
    parent, inputs = tiny_vlm(name), with_image(name)
    parent.save_pretrained(tmp_path / "parent")
    convert_checkpoint(tmp_path / "parent", "identity", tmp_path / "child")
    child = surgery.load(tmp_path / "child").eval()
    wanted = outputs(parent, **inputs)
    assert outputs(child, **inputs).equal(wanted)
    assert outputs(child, **inputs, use_cache=False).equal(outputs(parent, **inputs, use_cache=False))
    assert_same_tensors(untouched(child), untouched(parent))
    plain = outputs(parent, **inputs | {"pixel_values": inputs["pixel_values"] + 0.5})
    assert not plain.allclose(wanted, atol=1e-3)  # the image counts
    said = [m.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False) for m in (parent, child)]
    assert said[0].equal(said[1])


@pytest.mark.parametrize("name", ["gemma3", "qwen2_5_vl"])
def test_uniform_gqa_of_a_vision_language_model_says_its_heads_in_the_text_config(name, tmp_path):
    parent = tiny_vlm(name)
    parent.save_pretrained(tmp_path / "parent")
    plan = convert_checkpoint(tmp_path / "parent", GQA, tmp_path / "folder")
    surgery.save(surgery.convert(parent, GQA), tmp_path / "memory")
    assert plan.native
    text = parent.config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    assert plan.parent_bytes_per_token == 2 * plan.bytes_per_token == 2 * 2 * 2 * head_dim * 4  # the text tower alone
    child = surgery.load(tmp_path / "folder").eval()
    assert type(child) is type(parent)
    assert child.config.text_config.num_key_value_heads == 1
    assert_same_tensors(untouched(child), untouched(parent))
    assert outputs(child, **with_image(name)).isfinite().all()
    assert_same_tensors(*(load_file(tmp_path / path / "model.safetensors") for path in ("folder", "memory")))


def test_calibrated_gqa_of_a_vision_language_model_is_nearer_to_the_parent_on_text_and_image(tmp_path):
    parent, inputs = tiny_vlm("llava"), with_image("llava")
    parent.save_pretrained(tmp_path / "parent")
    convert_checkpoint(tmp_path / "parent", WITHOUT_GAINS, tmp_path / "child", calibration=TEXT)
    child = surgery.load(tmp_path / "child").eval()
    assert type(child) is type(parent)
    assert_same_tensors(untouched(child), untouched(parent))
    plain = surgery.convert(parent, {"name": "mean", "steps": [{**GQA["steps"][0], "init": "mean"}]})
    text = torch.randint(3, 90, (4, 16), generator=torch.Generator().manual_seed(2))
    kl = [surgery.evaluate(model, baseline=parent, text=text, path="prefill").kl for model in (child, plain)]
    assert kl[0] < kl[1]
    assert outputs(child, **inputs).isfinite().all()


def test_latent_of_full_rank_keeps_what_a_model_says_of_an_image():
    parent, inputs = tiny_vlm("llava"), with_image("llava")
    child = surgery.convert(parent, FULL, calibration=TEXT)
    torch.testing.assert_close(outputs(child, **inputs), outputs(parent, **inputs), rtol=1e-3, atol=1e-3)
    said = [m.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False) for m in (parent, child)]
    assert said[0].equal(said[1])


@pytest.mark.parametrize(
    ("name", "axes"),
    [("qwen2_5_vl", (0, 0, 1, 1, 1, 2, 2, 2)), ("qwen3_vl", (0, 1, 2, 0, 1, 2, 0, 1)), ("llava", None)],
)
def test_axes_of_the_positions_are_read_pair_by_pair(name, axes):
    assert {site.rotary.axes for site in examine(VLMS[name].config()).sites} == {axes}


def test_angles_are_taken_from_the_axis_of_each_pair():
    rotary = Rotary(dims=6, inv_freq=(1.0, 0.1, 0.01), axes=(2, 0, 1))
    table = torch.arange(3.0)[:, None, None, None] * 100 + torch.arange(6.0).expand(3, 1, 4, 6) % 3
    assert once(table, "halves", rotary)[0, 0].tolist() == [200.0, 1.0, 102.0]
    assert once(table[1], "halves", replace(rotary, axes=None))[0, 0].tolist() == [100.0, 101.0, 102.0]


def test_latents_are_refused_where_tokens_have_several_positions():
    with pytest.raises(PlanError, match="tokens of an image have several positions each"):
        surgery.plan(VLMS["qwen2_5_vl"].config(), FULL)


def test_dropping_tokens_is_refused_where_tokens_of_an_image_see_later_ones():
    with pytest.raises(PlanError, match="tokens of an image see later ones"):
        surgery.plan(VLMS["gemma3"].config(), {**DMS, "steps": [{**DMS["steps"][0], "layers": "1"}]})
    assert surgery.plan(VLMS["llava"].config(), DMS).after[0].retain is not None


def test_an_image_is_there_when_a_stock_model_reads_its_prompt_again():
    model, named, options = tiny_vlm("llava"), with_image("llava"), {"ratio": 2, "recent": 2, "sinks": 1}
    child = surgery.convert(model, {"steps": [{"rewriter": "evict", "scorer": "kvzip", **options}]})
    logits = []
    for each, cache in ((model, surgery.cache(model, evict="kvzip", **options)), (child, hf.DynamicCache())):
        with torch.no_grad():
            each(**named, use_cache=True, **{cache_argument(each): cache})
            logits.append(each(torch.tensor([[20]]), use_cache=True, **{cache_argument(each): cache}).logits)
    assert_close(*logits)


def test_evaluation_of_a_vision_language_model_measures_its_text():
    model = tiny_vlm("smolvlm")
    report = surgery.evaluate(model, text=TEXT, path="prefill")
    with torch.no_grad():
        logp = model(input_ids=TEXT).logits.log_softmax(-1)[:, :-1]
    wanted = -float(logp.gather(-1, TEXT[:, 1:, None]).mean())
    assert report.model.quality["prefill"].nats_per_token.value == pytest.approx(wanted, rel=1e-5)
    assert report.model.cache.bytes == report.model.cache.predicted_bytes


def test_export_of_a_vision_language_model_runs_without_this_library(tmp_path):
    parent = tiny_vlm("llava")
    parent.save_pretrained(tmp_path / "parent")
    convert_checkpoint(tmp_path / "parent", GQA, tmp_path / "child")
    report = surgery.export(tmp_path / "child", tmp_path / "out", to="hub")
    assert report.parity.logit_difference == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.get("image_token_index", config.get("image_token_id")) == IMAGE


@pytest.mark.parametrize(
    "leftover",
    [
        {"quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic"}},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        {"attn_implementation": "flash_attention_2"},
        {"_attn_implementation": "flash_attention_3"},
    ],
    ids=["fp8", "bitsandbytes", "attn_implementation", "_attn_implementation"],
)
def test_what_is_not_installed_here_does_not_matter_for_plain_weights(leftover, tmp_path):
    parent = tiny_model("llama")
    parent.save_pretrained(tmp_path / "parent")
    file = tmp_path / "parent" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | leftover))
    assert surgery.plan(tmp_path / "parent", GQA).native
    convert_checkpoint(tmp_path / "parent", "identity", tmp_path / "identity")
    assert outputs(surgery.load(tmp_path / "identity").eval())[: IDS.numel() * 128].equal(parent(IDS).logits.flatten())
    for path, options in (("streamed", {}), ("calibrated", {"calibration": TEXT})):
        convert_checkpoint(tmp_path / "parent", WITHOUT_GAINS, tmp_path / path, **options)
        hf.AutoModelForCausalLM.from_pretrained(tmp_path / path)
        written = json.loads((tmp_path / path / "config.json").read_text())
        assert not {"quantization_config", *leftover} & set(written)


def test_weights_that_are_quantised_are_refused_before_work(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="up_proj.weight is F8_E4M3, needs float32"):
        convert_checkpoint(tmp_path, GQA, tmp_path / "child")
    assert name in Checkpoint(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitnet", "quantization_mode": "online"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match=r"quantised \(bitnet\) whenever the model runs"):
        surgery.plan(tmp_path, GQA)


def test_class_that_is_code_beside_the_weights_is_named(tmp_path):
    config = {"model_type": "homemade", "architectures": ["Homemade"], "auto_map": {"AutoConfig": "own.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text("raise SystemExit('this must not run')")
    with pytest.raises(UnsupportedModel, match="model type homemade is code beside the weights"):
        surgery.plan(tmp_path, GQA)


def tiny_paligemma(kind: str) -> hf.PreTrainedModel:
    """Of a text model of that kind."""
    text = {**VLMS["gemma3"].config().text_config.to_dict(), "model_type": kind, "query_pre_attn_scalar": 24}
    vision = {**VLMS["llava"].config().vision_config.to_dict(), "model_type": "siglip_vision_model"}
    text = {name: text[name] for name in (*TEXT_SIZES, "query_pre_attn_scalar", "model_type", "head_dim")}
    sizes = {"vision_use_head": False, "image_size": 8, "projection_dim": 64}
    config = hf.PaliGemmaConfig(
        text_config=text, vision_config={**vision, **sizes}, image_token_index=IMAGE, projection_dim=64, hidden_size=64
    )
    torch.manual_seed(0)
    return hf.PaliGemmaForConditionalGeneration(config).eval()


def test_a_part_of_a_model_runs_by_the_attention_that_it_ran_by() -> None:
    """PaliGemma 2: Gemma 2 asks for eager attention, the whole for another."""
    parent = tiny_paligemma("gemma2")
    parent.set_attn_implementation({"text_config": "eager"})  # what transformers 5.23 chooses by itself
    child = surgery.convert(parent, "identity")
    of = {name: getattr(child.config, name)._attn_implementation for name in ("text_config", "vision_config")}
    assert of == {name: getattr(parent.config, name)._attn_implementation for name in of}
    assert of["text_config"] == "eager" != child.config._attn_implementation == parent.config._attn_implementation
    with torch.no_grad():
        assert_close(child(input_ids=IDS).logits, parent(input_ids=IDS).logits)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_tokens_of_a_prompt_without_a_mask_see_what_those_of_the_parent_see(attention: str, tmp_path) -> None:
    """PaliGemma hands sdpa no mask for a prompt, whose tokens then see each other; in the turn behind it, too."""
    parent = tiny_paligemma("gemma")
    parent.set_attn_implementation(attention)
    child = surgery.convert(parent, "identity")
    surgery.save(child, tmp_path / "child")
    loaded = surgery.load(tmp_path / "child")
    loaded.set_attn_implementation(attention)
    said = []
    for model in (parent, child, loaded):
        with torch.no_grad():
            first = model(input_ids=IDS, use_cache=True)
            second = model(input_ids=IDS[:, :5], past_key_values=first.past_key_values, use_cache=True)
        said.append(torch.cat([first.logits, second.logits], 1))
    assert_close(said[1], said[0])
    assert_close(said[2], said[0])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_latent_of_full_rank_is_fitted_to_text_of_a_parent_whose_prompts_see_ahead(attention: str) -> None:
    """PaliGemma with sdpa, whose layers would read text both ways while fits are of tokens that see earlier ones."""
    parent = tiny_paligemma("gemma")
    parent.set_attn_implementation(attention)
    text = torch.randint(3, 90, (16, 32), generator=torch.Generator().manual_seed(1))
    before = parent(input_ids=IDS).logits.detach()
    child = surgery.convert(parent, {"steps": [{"rewriter": "lowrank", "rank": 128, "k_share": 0.5}]}, calibration=text)
    with torch.no_grad():
        assert torch.equal(parent(input_ids=IDS).logits, before)
        assert_close(child(input_ids=IDS).logits, before)


def tiny_mllama() -> hf.PreTrainedModel:
    """One of four layers reads images."""
    text = {**VLMS["llava"].config().text_config.to_dict(), "model_type": "mllama_text_model"}
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_global_layers": 1, "image_size": 16,
        "attention_heads": 2, "patch_size": 4, "max_num_tiles": 1, "supported_aspect_ratios": [[1, 1]],
        "intermediate_layers_indices": [0], "vision_output_dim": 64,
    }  # fmt: skip
    layers = {"num_hidden_layers": 4, "cross_attention_layers": [1]}
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    config = hf.MllamaConfig(
        text_config={**{name: text[name] for name in TEXT_SIZES}, **layers, "rope_parameters": rope},
        vision_config=vision, image_token_index=IMAGE,
    )  # fmt: skip
    torch.manual_seed(0)
    return hf.MllamaForConditionalGeneration(config).eval()


def test_a_setting_that_sizes_other_attentions_too_is_not_said_by_the_parents_class() -> None:
    """Mllama: one number of KV heads, of text and of what reads images."""
    child = surgery.convert(tiny_mllama(), GQA)
    assert type(child).__name__ == "SurgeryMllamaForConditionalGeneration"
    with torch.no_grad():
        whole = child(input_ids=IDS, use_cache=False).logits
        cache = child(input_ids=IDS[:, :8], use_cache=True).past_key_values
        assert_close(child(input_ids=IDS[:, 8:], past_key_values=cache).logits, whole[:, 8:])


@pytest.mark.parametrize(
    "step",
    [
        {"rewriter": "quantise", "codec": "fp16", "recent": 4, "group": 4, "sinks": 1},
        {"rewriter": "evict", "scorer": "window", "window": 64},
    ],
)
def test_a_parent_that_asks_how_much_each_layer_holds_is_told(step: dict) -> None:
    """Mllama asks that of every layer, to know whether an image was read."""
    parent = tiny_mllama()
    child = surgery.convert(parent, {"name": "x", "steps": [step]})
    image = {
        "pixel_values": torch.randn(1, 1, 1, 3, 16, 16, generator=torch.Generator().manual_seed(1)),
        "aspect_ratio_ids": torch.tensor([[1]]),
        "aspect_ratio_mask": torch.ones(1, 1, 1, dtype=torch.long),
    }
    with torch.no_grad():
        for of_image in (image, {}):
            more = {"cross_attention_mask": torch.ones(1, IDS.shape[1], 1, 1, dtype=torch.long)} if of_image else {}
            said = [
                model.generate(IDS[:1], **of_image, **more, max_new_tokens=8, do_sample=False, eos_token_id=-1)
                for model in (parent, child)
            ]
            assert torch.equal(*said)


@pytest.mark.parametrize("recipe", ["kv-int4", "snapkv-4x"])
def test_layers_that_keep_more_than_keys_and_values_are_refused_before_work(recipe) -> None:
    """Falcon-H1 has attention and a recurrent state in every layer."""
    config = hf.FalconH1Config(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, head_dim=16,
        num_key_value_heads=2, mamba_d_ssm=128, mamba_n_heads=8, mamba_d_head=16, mamba_d_state=16, mamba_n_groups=1,
        mamba_chunk_size=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    assert surgery.plan(config, GQA).native
    with pytest.raises(PlanError, match="layer 0: FalconH1ForCausalLM keeps its cache in a form of its own"):
        surgery.plan(config, recipe)
