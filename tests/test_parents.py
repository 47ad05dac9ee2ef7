"""What is given as a parent: wrapped, adapted, offloaded, quantised, from a GGUF. Converted, or refused by name."""

import functools
import json
import shutil

import accelerate
import peft
import pytest
import torch
from closeness import assert_close, assert_close_in_norm
from families import tiny_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from vllm_models import decoder

import surgery
from surgery.bundled import SMALL
from surgery.checkpoints.adapters import CONFIG, WEIGHTS
from surgery.checkpoints.files import Checkpoint
from surgery.checkpoints.parents import plain_parent
from surgery.checkpoints.storage import check_whole
from surgery.errors import CheckpointError, UnsupportedModel
from surgery.export import export
from surgery.export.llama_cpp import LlamaCpp

IDS = torch.arange(24).reshape(2, 12)
GQA = {"steps": [{"rewriter": "gqa", "kv_heads": 1, "init": "mean"}]}
LINEAR = ["q_proj", "v_proj", "down_proj"]
Lora = peft.LoraConfig


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


@functools.cache
def converted_logits():
    """Of tiny_model("llama") with GQA."""
    return logits(surgery.convert(tiny_model("llama"), GQA))


def spread(model):
    """Random numbers on what an adapter trains: most begin as no change."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def adapted(base, config, inject=False):
    if inject:
        peft.inject_adapter_in_model(config, base)  # as `base.add_adapter` does
        base._hf_peft_config_loaded = True
        return spread(base)
    return spread(peft.get_peft_model(base, config))


def tied():
    return decoder(num_hidden_layers=2, tie_word_embeddings=True)


# Adapters in memory

ADAPTED = {
    "lora": lambda: adapted(tiny_model("llama"), Lora(target_modules=LINEAR)),
    "injected dora": lambda: adapted(tiny_model("llama"), Lora(target_modules=LINEAR, use_dora=True), inject=True),
    "head of its own on a tied model": lambda: adapted(
        tied(), Lora(target_modules=LINEAR, modules_to_save=["lm_head"])
    ),
}
MERGED = {
    "norms of its own, injected": lambda: adapted(
        tiny_model("llama"), Lora(target_modules=LINEAR, modules_to_save=["norm"]), inject=True
    ),
    "tied embedding alone": lambda: adapted(tied(), Lora(target_modules=["embed_tokens"])),
    "tokens of a tied model": lambda: adapted(tied(), Lora(target_modules=LINEAR, trainable_token_indices=[1, 2])),
    "biases": lambda: adapted(tiny_model("qwen2"), Lora(target_modules=LINEAR, bias="all")),
    "Conv1D": lambda: adapted(tiny_model("gpt2"), Lora(target_modules=["c_attn"], fan_in_fan_out=True)),
    "experts": lambda: adapted(
        tiny_model("mixtral"), Lora(target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])
    ),
    "ia3": lambda: adapted(
        tiny_model("llama"), peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    ),
    "layer norms": lambda: adapted(tiny_model("llama"), peft.LNTuningConfig(target_modules=["input_layernorm"])),
}


@pytest.mark.parametrize("name", ADAPTED)
def test_a_model_whose_adapter_is_merged_on_request_answers_as_it_did(name):
    parent = ADAPTED[name]()
    wanted, before = logits(parent), {name: t.clone() for name, t in parent.state_dict().items()}
    child = surgery.convert(parent, "identity", merge_adapter=True)
    assert_close_in_norm(logits(child), wanted)
    assert child.config.surgery["provenance"]["adapter"]["kinds"] == "LORA default"
    assert all(t.equal(before[name]) for name, t in parent.state_dict().items())
    assert all(p.requires_grad for p in child.parameters())


@pytest.mark.parametrize("name", MERGED)
def test_every_kind_of_adapter_that_is_a_change_of_weights_is_merged(name):
    parent = MERGED[name]()
    plain, _ = plain_parent(parent, merge_adapter=True)
    assert_close_in_norm(logits(plain), logits(parent))
    assert {type(module).__module__.partition(".")[0] for module in plain.modules()} <= {"torch", "transformers"}
    assert [n for n, _ in plain.named_parameters()] == [n for n, _ in type(plain)(plain.config).named_parameters()]


def test_a_head_that_an_adapter_unties_stays_untied_through_conversion_and_saving(tmp_path):
    parent = ADAPTED["head of its own on a tied model"]()
    plain = parent.merge_and_unload()  # what peft makes of it, in memory alone
    child = surgery.convert(ADAPTED["head of its own on a tied model"](), GQA, merge_adapter=True)
    assert type(child) is LlamaForCausalLM
    assert not child.config.tie_word_embeddings
    surgery.save(child, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(loaded), logits(child))
    assert_close_in_norm(loaded.lm_head.weight, plain.lm_head.weight)
    assert not torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)


def test_adapters_that_are_active_are_merged_and_the_others_left_out():
    parent = adapted(tiny_model("llama"), Lora(target_modules=["q_proj"]))
    parent.add_adapter("second", Lora(target_modules=["v_proj", "q_proj"]))
    parent.add_adapter("idle", Lora(target_modules=["up_proj"], modules_to_save=["lm_head"]))
    parent.base_model.set_adapter(["default", "second"])
    spread(parent)
    plain, told = plain_parent(parent, merge_adapter=True)
    assert_close_in_norm(logits(plain), logits(parent))
    assert told["adapter"]["names"] == ["default", "second"]


def test_a_merge_is_rounded_once_to_the_dtype_of_the_base():
    parent = adapted(tiny_model("llama").to(torch.bfloat16), Lora(target_modules=LINEAR))
    plain, _ = plain_parent(parent, merge_adapter=True)
    assert {p.dtype for p in plain.parameters()} == {torch.bfloat16}
    layer = parent.get_base_model().model.layers[1].self_attn.q_proj
    exact = layer.base_layer.weight.float() + layer.get_delta_weight("default").float()
    assert torch.equal(plain.model.layers[1].self_attn.q_proj.weight, exact.to(torch.bfloat16))


@pytest.mark.parametrize("name", ["lora", "injected dora"])
def test_an_adapter_that_nobody_asked_to_merge_is_refused_by_name(name):
    parent = ADAPTED[name]()
    for work in (surgery.convert, surgery.plan):
        with pytest.raises(UnsupportedModel, match=r"LlamaForCausalLM: carries an adapter \(LORA default\)"):
            work(parent, GQA)


def switched_off():
    parent = adapted(tiny_model("llama"), Lora(target_modules=LINEAR), inject=True)
    for module in parent.modules():
        if isinstance(module, BaseTunerLayer):
            module.enable_adapters(False)  # as `parent.disable_adapters` does
    return parent


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (switched_off, "the adapter is switched off"),
        (
            lambda: adapted(tiny_model("llama"), peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")),
            r"PROMPT_TUNING default\): adds tokens or keys at run time",
        ),
        (
            lambda: adapted(
                tiny_model("llama"),
                Lora(target_modules=["q_proj"], alora_invocation_tokens=[3, 10], task_type="CAUSAL_LM"),
            ),
            "cannot be merged: aLoRA",
        ),
        (lambda: tiny_model("llama"), "has no adapter to merge"),
    ],
)
def test_what_cannot_be_merged_is_refused_with_the_reason(make, message):
    with pytest.raises(UnsupportedModel, match=message):
        surgery.convert(make(), GQA, merge_adapter=True)


def test_a_merge_that_answers_otherwise_is_refused(monkeypatch):
    from peft.tuners.lora import Linear

    monkeypatch.setattr(Linear, "get_delta_weight", lambda self, name: torch.zeros_like(self.get_base_layer().weight))
    with pytest.raises(UnsupportedModel, match="answers otherwise once it is merged"):
        surgery.convert(ADAPTED["lora"](), GQA, merge_adapter=True)


# Adapters in a folder


@pytest.fixture
def folders(tmp_path):
    """An adapted model, a folder with its base and its adapter, and one with the adapter alone.

    transformers loads neither the magnitudes of a DoRA nor, in some versions, modules of an adapter's own.
    """
    base = tiny_model("llama")
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = base.config.name_or_path = str(tmp_path / "base")
    model = adapted(base, Lora(target_modules=LINEAR, use_dora=True, modules_to_save=["lm_head"]))
    model.save_pretrained(tmp_path / "alone")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(SMALL / name, tmp_path / "alone" / name)
    (tmp_path / "base" / "preprocessor_config.json").write_text("{}")
    shutil.copytree(tmp_path / "base", tmp_path / "beside")
    shutil.copytree(tmp_path / "alone", tmp_path / "beside", dirs_exist_ok=True)
    return model, tmp_path


@pytest.mark.parametrize("place", ["beside", "alone"])
def test_an_adapter_in_a_folder_is_merged_on_request_and_else_refused_by_name(folders, place, call):
    model, root = folders
    wanted = logits(model)
    with pytest.raises(
        CheckpointError, match=r"holds an adapter \(LORA\) (beside its weights|and no model of its own)"
    ):
        surgery.convert_checkpoint(root / place, "identity", root / "out")
    assert not (root / "out").exists()
    for work in (
        surgery.load,
        lambda folder: surgery.convert(folder, GQA),
        lambda folder: export(folder, "x", to="hub"),
    ):
        with pytest.raises(CheckpointError, match=r"--merge-adapter"):
            work(root / place)
    code, _, _ = call("convert", root / place, "-r", "identity", "-o", root / "out", "--merge-adapter")
    assert code == 0
    assert not (root / "out" / CONFIG).exists()
    assert (root / "out" / "preprocessor_config.json").exists()
    assert (
        surgery.calibration.text.load_tokenizer(root / "out").get_vocab()
        == surgery.calibration.text.load_tokenizer(SMALL).get_vocab()
    )
    assert_close_in_norm(logits(surgery.load(root / "out")), wanted)
    native = surgery.convert(root / place, GQA, merge_adapter=True)
    surgery.save(native, root / "native")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(root / "native")), logits(native))
    assert native.config.surgery["adapter"]["folder"] == str(root / place)


def drop(file, name):
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})


NAME = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: drop(folder / WEIGHTS, NAME), f"{NAME} is missing"),
        (lambda folder: (folder / WEIGHTS).unlink(), f"has {CONFIG}, but no {WEIGHTS}"),
        (lambda folder: (folder / WEIGHTS).rename(folder / "adapter_model.bin"), "adapter_model.bin is a pickle"),
        (
            lambda folder: (folder / CONFIG).write_text(
                (folder / CONFIG).read_text().replace("/base", "/nowhere/at/all")
            ),
            r"adapter_config\.json: its base model: .*no such folder",
        ),
        (
            lambda folder: (folder / CONFIG).write_text(
                (folder / CONFIG)
                .read_text()
                .replace('"init_lora_weights": true', '"init_lora_weights": "pissa_niter_4"')
            ),
            r"adapter_config\.json: init_lora_weights: pissa_niter_4 was trained on a base that peft cannot make",
        ),
    ],
)
def test_a_damaged_adapter_is_refused_by_name(folders, spoil, message):
    spoil(folders[1] / "alone")
    with pytest.raises(CheckpointError, match=message):
        surgery.convert_checkpoint(folders[1] / "alone", GQA, folders[1] / "out", merge_adapter=True)


def test_a_folder_without_an_adapter_has_none_to_merge(folders):
    with pytest.raises(CheckpointError, match="no adapter to merge"):
        surgery.convert_checkpoint(folders[1] / "base", GQA, folders[1] / "out", merge_adapter=True)


# Wrapped models


def compiled_layers():
    model = tiny_model("llama")
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = torch.compile(layer, backend="eager")
    return model


def hooked():
    return accelerate.dispatch_model(tiny_model("llama"), {"": "cpu"}, force_hooks=True)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda: torch.compile(tiny_model("llama"), backend="eager"),
        compiled_layers,
        hooked,
        lambda: nn.DataParallel(tiny_model("llama")),
    ],
    ids=["compiled", "compiled layers", "hooked", "DataParallel"],
)
def test_a_wrapper_that_changes_no_answer_is_left_out(wrap):
    given = wrap()
    child = surgery.convert(given, GQA)
    assert type(child) is LlamaForCausalLM
    assert torch.equal(logits(child), converted_logits())
    kept = zip(given.parameters(), tiny_model("llama").parameters(), strict=True)
    assert all(torch.equal(mine, its) for mine, its in kept)


class Holder(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model


class Pipeline:
    def __init__(self, model):
        self.model = model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda model: (model, None), r"tuple: is no model, but holds one\. Pass \[0\]"),
        (Holder, r"Holder of .*: is no model, but holds one\. Pass \.model"),
        (Pipeline, r"Pipeline of .*: is no model, but holds one\. Pass \.model"),
        (lambda model: model.config, "LlamaConfig of transformers: needs a model"),
        (lambda model: model.state_dict(), "OrderedDict of collections: needs a model"),
        (lambda model: model.to("meta"), r"embed_tokens\.weight has no values .* its weights were never loaded"),
    ],
)
def test_what_is_no_model_is_refused_with_what_to_pass(make, message):
    with pytest.raises(UnsupportedModel, match=message):
        surgery.convert(make(tiny_model("llama")), GQA)


# Weights elsewhere


@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
def test_weights_that_accelerate_keeps_elsewhere_are_brought_together(tmp_path, is_tied):
    plain = tied() if is_tied else decoder(num_hidden_layers=2)
    plain.save_pretrained(tmp_path / "parent")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "disk",
              "model.rotary_emb": "cpu", "lm_head": "cpu" if is_tied else "disk"}  # fmt: skip
    given = AutoModelForCausalLM.from_pretrained(
        tmp_path / "parent", device_map=places, offload_folder=tmp_path / "elsewhere"
    )
    assert given.model.norm.weight.is_meta
    assert torch.equal(logits(surgery.convert(given, "identity")), logits(plain))
    assert torch.equal(logits(surgery.convert(given, GQA)), logits(surgery.convert(plain, GQA)))
    assert given.model.norm.weight.is_meta
    assert torch.equal(logits(given), logits(plain))


def test_weights_that_accelerate_offloaded_with_buffers_are_brought_together():
    given = accelerate.cpu_offload(tiny_model("gemma2"), execution_device="cpu", offload_buffers=True)
    assert torch.equal(logits(surgery.convert(given, "identity")), logits(tiny_model("gemma2")))


# Quantised parents


class Packed(torch.Tensor):
    """Weights in a form of their own, as torchao's."""

    @staticmethod
    def __new__(cls, data):
        return torch.Tensor._make_subclass(cls, data, False)


class QLinear(nn.Linear):
    """Rounds its weight at run time, as quanto's before they are frozen."""

    def forward(self, x):
        return nn.functional.linear(x, (self.weight * 8).round() / 8)


def with_weight(weight):
    model = tiny_model("llama")
    model.model.layers[1].self_attn.q_proj.weight = nn.Parameter(weight, requires_grad=False)
    return model


def with_module():
    model = tiny_model("llama")
    old = model.model.layers[1].mlp.up_proj
    model.model.layers[1].mlp.up_proj = QLinear(old.in_features, old.out_features, bias=False)
    return model


QUANTISED = {
    "a tensor of its own": (lambda: with_weight(Packed(torch.ones(64, 64))), "q_proj.weight is of type Packed"),
    "integers": (lambda: with_weight(torch.ones(64, 32, dtype=torch.uint8)), "q_proj.weight is uint8"),
    "8 bits": (lambda: with_weight(torch.ones(64, 64).to(torch.float8_e4m3fn)), "q_proj.weight is float8_e4m3fn"),
    "a module of its own": (with_module, "up_proj is of type QLinear .*by its config Linear"),
}


@pytest.mark.parametrize("name", QUANTISED)
def test_a_quantised_model_in_memory_is_refused_by_name_before_work(name):
    make, message = QUANTISED[name]
    model = make()
    with pytest.raises(UnsupportedModel, match=message + ".*quantised, adapted or edited"):
        surgery.convert(model, GQA)
    model.config.quantization_config = {"quant_method": "torchao"}
    with pytest.raises(UnsupportedModel, match=message + r".*is quantised \(torchao\)"):
        surgery.plan(model, GQA)


def pack(tensors):
    """As GPTQ lays a weight on disk."""
    tensors["model.layers.1.self_attn.q_proj.qweight"] = torch.ones(8, 64, dtype=torch.int32)
    tensors["model.layers.1.self_attn.q_proj.scales"] = torch.ones(1, 64)
    del tensors["model.layers.1.self_attn.q_proj.weight"]


def round_to_8_bits(tensors):
    name = "model.layers.1.self_attn.q_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)


def add_scale(tensors):
    tensors["model.layers.1.self_attn.q_proj.input_scale"] = torch.ones(1)


@pytest.mark.parametrize(
    ("change", "message"),
    [(pack, "qweight of I32"), (round_to_8_bits, "q_proj.weight of F8_E4M3"), (add_scale, "input_scale of F32")],
)
def test_a_quantised_checkpoint_is_refused_by_name_before_work(tmp_path, change, message):
    tiny_model("llama").save_pretrained(tmp_path / "parent")
    file = tmp_path / "parent" / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((tmp_path / "parent" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "parent" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=rf"quantised \(gptq\): it holds .*{message}\. Give the checkpoint that"):
        surgery.convert_checkpoint(tmp_path / "parent", GQA, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_config_that_speaks_of_quantisation_over_plain_weights_passes_the_check(tmp_path):
    model = tiny_model("llama")
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    child = surgery.convert(model, GQA)
    assert torch.equal(logits(child), converted_logits())
    assert not hasattr(child.config, "quantization_config")
    tiny_model("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    check_whole(Checkpoint(tmp_path))


# GGUF

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64, "rope_theta": 10000.0,
}  # fmt: skip


@pytest.fixture
def gguf(tmp_path, monkeypatch):
    """Writes a model as a GGUF, and gives the folder that holds nothing else."""
    pytest.importorskip("gguf", reason="no gguf: install kv-surgery[gguf]")
    monkeypatch.setattr(LlamaCpp, "find", classmethod(lambda cls, python=None: None))

    def write(model):
        export(model, tmp_path / "written", to="gguf")
        (tmp_path / "only").mkdir()
        (tmp_path / "written" / "model.gguf").rename(tmp_path / "only" / "model.gguf")
        return tmp_path / "only"

    return write


def test_a_model_loaded_from_a_gguf_is_converted_saved_and_loaded(gguf, tmp_path):
    plain = decoder(num_hidden_layers=2)
    parent = AutoModelForCausalLM.from_pretrained(gguf(plain), gguf_file="model.gguf")
    assert torch.equal(logits(parent), logits(plain))
    for recipe in ("identity", GQA):
        child = surgery.convert(parent, recipe)
        assert torch.equal(logits(child), logits(plain if recipe == "identity" else surgery.convert(plain, GQA)))
        surgery.save(child, tmp_path / "out", overwrite=True)
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert "quantization_config" not in config
        assert config["architectures"] == [type(child).__name__]
        assert torch.equal(logits(surgery.load(tmp_path / "out")), logits(child))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(child))


def test_a_gguf_whose_rope_scaling_got_lost_is_refused(gguf):
    plain = decoder(num_hidden_layers=2, rope_parameters=LLAMA3)
    folder = gguf(plain)
    with pytest.raises(UnsupportedModel, match=r"model\.gguf scales its rotary frequencies \(rope_freqs\.weight\)"):
        surgery.convert(AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf"), GQA)
    told = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", config=plain.config)
    assert torch.equal(logits(surgery.convert(told, "identity")), logits(plain))


# What a Trainer left


@pytest.mark.parametrize("recipe", ["identity", GQA])
def test_a_parent_that_a_trainer_told_to_use_no_cache_says_so_in_its_child(recipe):
    parent = tiny_model("llama")
    parent.config.use_cache = False
    child = surgery.convert(parent, recipe)
    assert child.config.use_cache is False
    assert child.generate(IDS, max_new_tokens=2, do_sample=False, use_cache=True).shape[1] == IDS.shape[1] + 2


@pytest.mark.parametrize("family", ["llama_dynamic", "phi3_longrope"])
def test_a_parent_that_has_read_a_long_text_is_converted_as_before_it(family):
    """Its rotary module holds the frequencies of that text until the next one comes."""
    parent = tiny_model(family, max_position_embeddings=80)
    short, long = torch.arange(3, 23)[None], torch.arange(100)[None]
    with torch.no_grad():
        wanted = [parent(ids).logits for ids in (short, long)]
        child = surgery.convert(parent, "identity")
        for ids, logits in zip((short, long, short), (*wanted, wanted[0]), strict=True):
            assert_close(child(ids).logits, logits)
