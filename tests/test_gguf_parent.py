"""GGUF files as parents: restored to the value, in tokens, settings and weights, or refused by name."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch
import transformers
from gguf_files import TEMPLATE, VOCABULARY, byte_tokenizer, small, write_gguf
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import surgery
from surgery.checkpoints import places, restored
from surgery.checkpoints.gguf import llama3_rope
from surgery.checkpoints.restored import restore
from surgery.errors import CheckpointError, UnsupportedModel
from surgery.export.llama_cpp import LlamaCpp

gguf = pytest.importorskip("gguf", reason="no gguf: install kv-surgery[gguf]")

CHAT = [{"role": "user", "content": "In 2024 the cat sat."}]
TEXT = "In 2024 the  cat sat;<|im_end|>\n\nthen <think> 31 tths"
IDS = torch.arange(48).reshape(2, 24)
"""Below the vocabulary of every model here."""
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64, "rope_theta": 10000.0,
}  # fmt: skip
GQA = {"steps": [{"rewriter": "gqa", "kv_heads": 1, "init": "mean"}]}


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


@pytest.fixture(autouse=True)
def shelf(tmp_path, monkeypatch):
    """Restored checkpoints of a test lie in its own folder; llama.cpp is not asked."""
    monkeypatch.setattr(restored, "shelf", lambda: tmp_path / "shelf")
    monkeypatch.setattr(LlamaCpp, "find", classmethod(lambda cls, python=None: None))
    return tmp_path / "shelf"


@pytest.fixture
def written(tmp_path):
    """Exports a model, with a tokenizer unless told otherwise, as a GGUF that lies alone; gives its path."""

    return lambda model, tokenizer=True: write_gguf(model, tmp_path, tokenizer)


def test_a_file_without_the_ending_is_known_by_how_it_begins(written):
    file = written(small())
    plain = file.rename(file.with_name("mistral"))
    assert surgery.load(plain).config.num_hidden_layers == 2


def with_biases():
    model = small(attention_bias=True)
    assert model.model.layers[0].self_attn.o_proj.bias.abs().max() > 0.1
    return model


PARENTS = {
    "llama": small,
    "tied": lambda: small(tie_word_embeddings=True, rms_norm_eps=1e-5),
    "biases": with_biases,
    "llama3 rope": lambda: small(rope_parameters=LLAMA3),
    "bfloat16": lambda: small().to(torch.bfloat16),
    "qwen2": lambda: small("Qwen2", hidden_size=128),
    "qwen3": lambda: small("Qwen3", rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
}


@pytest.mark.parametrize("name", PARENTS)
def test_a_gguf_gives_back_the_checkpoint_that_it_was_made_of(name, written, tmp_path):
    parent = PARENTS[name]()
    file = written(parent)
    facts = restore(file, tmp_path / "back")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype="auto")
    assert type(back) is type(parent)
    assert back.dtype is parent.dtype
    parent = AutoModelForCausalLM.from_pretrained(tmp_path / "parent", dtype="auto")  # its rotary table in float32
    theirs = parent.state_dict()
    assert {key for key, value in back.state_dict().items() if not torch.equal(value, theirs[key])} == set()
    assert back.config.rms_norm_eps == parent.config.rms_norm_eps
    assert back.config.tie_word_embeddings == parent.config.tie_word_embeddings
    assert torch.equal(logits(back), logits(parent))
    assert (back.generation_config.bos_token_id, back.generation_config.eos_token_id) == (1, 2)
    assert [note for note in facts["notes"] if "llama3" in note] == [note for note in facts["notes"] if "rope" in note]
    mine, own = AutoTokenizer.from_pretrained(tmp_path / "back"), byte_tokenizer()
    assert mine(TEXT)["input_ids"] == own(TEXT)["input_ids"]
    assert mine.apply_chat_template(CHAT, tokenize=False) == own.apply_chat_template(CHAT, tokenize=False)
    for special in ("bos_token", "eos_token", "unk_token", "pad_token"):
        assert getattr(mine, special) == getattr(own, special)
    said = gguf.GGUFReader(file).fields["tokenizer.ggml.tokens"].contents()
    assert mine.convert_ids_to_tokens(range(len(own))) == said[: len(own)]


def quantised(file, out, kind):
    """The same file with its matrices quantised, and every setting as it was."""
    reader = gguf.GGUFReader(file)
    writer = gguf.GGUFWriter(out, "llama")
    for name, value in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            sub = value.types[-1] if value.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, value.contents(), value.types[0], sub)
    for tensor in reader.tensors:
        if len(tensor.shape) == 1:
            writer.add_tensor(tensor.name, tensor.data)
        else:
            writer.add_tensor(tensor.name, gguf.quantize(tensor.data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def test_quantised_weights_are_unpacked_to_the_value_and_it_is_said(written, tmp_path):
    (tmp_path / "q8").mkdir()
    file = quantised(written(small()), tmp_path / "q8" / "model.gguf", gguf.GGMLQuantizationType.Q8_0)
    facts = restore(file, tmp_path / "back")
    back = surgery.load(tmp_path / "back")
    own = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    assert torch.equal(logits(back), logits(own))
    up = next(t for t in gguf.GGUFReader(file).tensors if t.name == "blk.1.ffn_up.weight")
    assert np.array_equal(gguf.dequantize(up.data, up.tensor_type), back.model.layers[1].mlp.up_proj.weight.detach())
    assert back.dtype is torch.float32
    assert facts["types"] == {"Q8_0": 16, "F32": 5}
    assert any("quantised (16 Q8_0, 5 F32)" in note for note in facts["notes"])


def test_a_gguf_is_converted_and_loaded_by_its_path(written, tmp_path, shelf, caplog):
    parent = small()
    file = written(parent)
    surgery.convert_checkpoint(file, GQA, tmp_path / "out")
    [kept] = shelf.glob("*/model.safetensors")
    made = kept.stat().st_mtime_ns
    child = surgery.load(tmp_path / "out")
    assert torch.equal(logits(child), logits(surgery.convert(parent, GQA)))
    told = json.loads((tmp_path / "out" / "surgery.json").read_text())
    assert told["parent"] == told["gguf"]["file"] == str(file)
    assert len(told["gguf"]["sha256"]) == 64
    assert not (tmp_path / "out" / "gguf.json").exists()
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(TEXT)["input_ids"] == byte_tokenizer()(TEXT)["input_ids"]
    # The folder that holds the file alone is as good as the file, and what was restored is found again.
    assert torch.equal(logits(surgery.load(file.parent)), logits(parent))
    assert kept.stat().st_mtime_ns == made
    assert [record for record in caplog.records if "written as a checkpoint" in record.message]


def test_a_changed_file_is_restored_anew(written, shelf):
    first = logits(surgery.load(written(small())))
    other = small()
    with torch.no_grad():
        other.model.embed_tokens.weight.mul_(2)
    assert not torch.equal(logits(surgery.load(written(other))), first)
    assert len(list(shelf.iterdir())) == 2


def test_the_tokenizer_beside_a_gguf_is_taken_and_must_have_its_tokens(written, tmp_path):
    file = written(small(), tokenizer=False)
    with pytest.raises(CheckpointError, match=r"model\.gguf: holds no tokenizer\. Put that of the model"):
        restore(file, tmp_path / "back")
    byte_tokenizer().save_pretrained(file.parent)
    restore(file, tmp_path / "back")
    assert AutoTokenizer.from_pretrained(tmp_path / "back").chat_template == TEMPLATE
    file = written(small())
    core = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=core).save_pretrained(file.parent)
    with pytest.raises(UnsupportedModel, match=r"token 0 is '<\|endoftext\|>' in the file, and 'w0' in the tokenizer"):
        restore(file, tmp_path / "two")


@pytest.mark.parametrize("length", [64, 8192])
def test_parameters_of_llama3_rope_are_found_from_its_factors(length):
    theirs = {**LLAMA3, "rope_theta": 5e5, "original_max_position_embeddings": length, "factor": 32.0}
    config = LlamaConfig(hidden_size=256, num_attention_heads=2, head_dim=128, rope_parameters=theirs)
    slowed = ROPE_INIT_FUNCTIONS["llama3"](config, device=torch.device("cpu"))[0].double()
    plain = 5e5 ** -(torch.arange(64, dtype=torch.float64) / 64)
    config.rope_parameters = {"rope_type": "default", "rope_theta": 5e5}
    factors = (plain / slowed).float()
    assert llama3_rope(factors, config) == theirs
    factors[40] *= 1.01
    assert llama3_rope(factors, config) is None


def test_text_is_cut_and_begun_as_the_name_of_the_splits_says(written, tmp_path):
    def back(pre, number):
        restore(rewritten(written(small()), {"tokenizer.ggml.pre": pre}), tmp_path / f"back{number}")
        return AutoTokenizer.from_pretrained(tmp_path / f"back{number}")

    digits = back("smollm", 0)
    pieces = [piece for piece, _ in digits.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a\n\n12 cats")]
    assert pieces == ["a", "ĊĊ", "1", "2", "Ġcats"]
    assert digits("a")["input_ids"] == byte_tokenizer()("a")["input_ids"]
    llama3 = back("llama-bpe", 1)
    assert llama3("a")["input_ids"] == [1, *byte_tokenizer()("a")["input_ids"]]
    assert llama3.backend_tokenizer.model.ignore_merges
    facts = restore(rewritten(written(small()), {"tokenizer.ggml.pre": "poro-chat"}), tmp_path / "other")
    assert any("its splits before BPE (poro-chat) are not known here" in note for note in facts["notes"])


# Families that no export of ours writes

TINY = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.3, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
SHAPE = {
    "context_length": 128, "embedding_length": 32, "block_count": 2, "feed_forward_length": 48,
    "attention.head_count": 4, "attention.head_count_kv": 2,
}  # fmt: skip
FAMILIES = {
    "starcoder2": (
        "Starcoder2Config", {**TINY, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        {"rope.freq_base": 1e6, "attention.layer_norm_epsilon": 1e-5},
    ),
    "gemma2": (
        "Gemma2Config",
        {**TINY, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8, "attn_logit_softcapping": 20.0,
         "final_logit_softcapping": 10.0},
        {"attention.key_length": 16, "attention.value_length": 16, "attention.layer_norm_rms_epsilon": 1e-6,
         "attention.sliding_window": 8, "attn_logit_softcapping": 20.0, "final_logit_softcapping": 10.0},
    ),
    "phi3": (
        "Phi3Config", {**TINY, "sliding_window": 4, "partial_rotary_factor": 0.5},
        {"attention.layer_norm_rms_epsilon": 1e-5, "rope.dimension_count": 4, "rope.freq_base": 10000.0,
         "attention.sliding_window": 4},
    ),
    "stablelm": (
        "StableLmConfig", {**TINY, "partial_rotary_factor": 0.5, "rope_theta": 50000.0},
        {"attention.layer_norm_epsilon": 1e-5, "rope.dimension_count": 4, "rope.freq_base": 50000.0},
    ),
    "gpt2": (
        "GPT2Config",
        {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "initializer_range": 0.3},
        {"attention.layer_norm_epsilon": 1e-5},
    ),
}  # fmt: skip
"""Settings in which a model of each differs from what its class has by default."""


def as_stored(family, name, tensor):
    """A tensor as llama.cpp's converter writes it."""
    if family == "gemma2" and "norm" in name:
        return tensor + 1
    return tensor.T if family == "gpt2" and ".h." in name and tensor.ndim == 2 else tensor


@pytest.mark.parametrize("family", FAMILIES)
def test_settings_that_transformers_leaves_out_are_taken_from_the_file(family, tmp_path):
    kind, changes, settings = FAMILIES[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, kind)(**changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter)).mul_(2**10).round_().div_(2**10)  # + 1 and - 1 are exact
    (tmp_path / "only").mkdir()
    file = tmp_path / "only" / "model.gguf"
    writer = gguf.GGUFWriter(file, family)
    for name, value in {**SHAPE, **settings}.items():
        (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(f"{family}.{name}", value)
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == family)
    names = gguf.get_tensor_name_map(arch, 2)
    for name, tensor in model.named_parameters():
        stored = as_stored(family, name, tensor.detach()).contiguous().numpy()
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    words = [f"t{i}" for i in range(64)]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=core).save_pretrained(file.parent)
    back = surgery.load(file)
    assert type(back) is type(model)
    assert torch.equal(logits(back), logits(model))
    assert back.config.max_position_embeddings == 128


# Bad input


def rewritten(file, changes, tensors=True):
    """The same file with other settings; a name that is None goes."""
    reader = gguf.GGUFReader(file)
    out = file.with_name("changed.gguf")
    kind = changes.get("general.architecture", "llama")
    writer = gguf.GGUFWriter(out, kind)
    for name, value in reader.fields.items():
        if name.startswith("GGUF.") or name in changes:
            continue
        sub = value.types[-1] if value.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name.replace("llama.", f"{kind}."), value.contents(), value.types[0], sub)
    for name, value in changes.items():
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif name != "general.architecture":
            writer.add_string(name, value)
    for tensor in reader.tensors if tensors else ():
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file.unlink()
    return out.rename(file)


def cut(file):
    data = file.read_bytes()
    file.write_bytes(data[: len(data) * 2 // 3])
    return file


def cut_in_the_header(file):
    file.write_bytes(file.read_bytes()[:3000])
    return file


BAD = {
    "cut short": (cut, CheckpointError, "damaged or cut short"),
    "cut in its header": (cut_in_the_header, CheckpointError, "damaged or cut short"),
    "no GGUF": (lambda f: f.write_bytes(b"PK\3\4" * 99), CheckpointError, "does not begin as a GGUF does"),
    "encoder": (lambda f: rewritten(f, {"general.architecture": "bert"}), UnsupportedModel, r"is an encoder \(bert\)"),
    "family": (
        lambda f: rewritten(f, {"general.architecture": "deepseek2"}), UnsupportedModel,
        "is of the family deepseek2, which transformers .* does not read from a GGUF",
    ),
    "part": (lambda f: rewritten(f, {"split.count": 3}), CheckpointError, "is one of 3 parts. Join them by"),
    "vision": (lambda f: rewritten(f, {"general.type": "mmproj"}), UnsupportedModel, "holds no language model"),
    "yarn": (
        lambda f: rewritten(f, {"llama.rope.scaling.type": "yarn"}), UnsupportedModel,
        r"scales its rotary frequencies \(rope\.scaling\.type yarn\)",
    ),
    "a factor alone": (
        lambda f: rewritten(f, {"llama.rope.scaling.factor": 4.0}), UnsupportedModel,
        r"scales its rotary frequencies \(rope\.scaling\.factor 4\.0\)",
    ),
    "an old factor": (
        lambda f: rewritten(f, {"llama.rope.scale_linear": 2.0}), UnsupportedModel,
        r"scales its rotary frequencies \(rope\.scale_linear 2\.0\)",
    ),
    "no tensors": (lambda f: rewritten(f, {}, tensors=False), UnsupportedModel, "holds 0 numbers, of which .* has"),
    "window": (
        lambda f: rewritten(f, {"llama.attention.sliding_window": 16}), UnsupportedModel, "attends to 16 tokens at most"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_gguf_that_cannot_be_a_parent_is_refused_in_one_line_that_names_it(name, written, tmp_path, call, shelf):
    change, error, message = BAD[name]
    file = written(small())
    change(file)
    with pytest.raises(error, match=message) as caught:
        surgery.load(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)
    assert "Give" in str(caught.value) or "Fetch" in str(caught.value) or "decoders" in str(caught.value)
    code, _, said = call("convert", file, "-r", "mqa", "-o", tmp_path / "out")
    assert code == 2 and len(said.strip().splitlines()) == 1 and str(file) in said
    assert not (tmp_path / "out").exists()
    assert not list(shelf.glob("*/*.safetensors"))


def test_tensors_that_the_class_has_no_place_for_are_refused_by_name(written):
    file = written(small(attention_bias=True))
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    with pytest.raises(UnsupportedModel, match=r"it has no place for blk\.0\.attn_.\.bias"):
        surgery.convert(model, GQA)


def test_a_model_in_memory_whose_settings_got_lost_is_refused(written):
    file = written(small(rope_parameters={"rope_type": "default", "rope_theta": 5e5}))
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    surgery.convert(model, GQA)
    model.config.rope_parameters["rope_theta"] = 10000.0  # as of a family whose base transformers does not read
    with pytest.raises(UnsupportedModel, match=r"has rope_theta 500000\.0, and the model 10000\.0.*Pass the path"):
        surgery.convert(model, GQA)


def test_settings_that_nothing_reads_are_told(written, call, shelf, caplog):
    file = rewritten(written(small()), {"llama.some.factor": 0.5})
    code, out, _ = call("plan", file, "-r", "mqa")
    assert code == 0 and "nothing reads its setting llama.some.factor = 0.5" in " ".join(out.split())
    assert not list(shelf.glob("*/*.safetensors"))  # a plan reads no weights
    with caplog.at_level(logging.WARNING, "surgery"):
        surgery.load(file)
    assert "Note: nothing reads its setting llama.some.factor = 0.5" in caplog.text


def test_several_files_in_a_folder_are_refused_by_name(written):
    file = written(small())
    file.with_name("other.gguf").write_bytes(file.read_bytes())
    with pytest.raises(CheckpointError, match=r"holds 2 GGUF files, such as model\.gguf and other\.gguf\. Give one"):
        surgery.load(file.parent)
    with pytest.raises(CheckpointError, match=r"nothing/here\.gguf: no such file"):
        surgery.load("./nothing/here.gguf")


def test_a_file_in_a_repository_of_the_hub_is_fetched_and_restored(written, monkeypatch):
    file, asked = written(small()), []

    def fetch(name, path, revision=None):
        asked.append((name, path, revision))
        return str(file)

    monkeypatch.setattr(places, "hf_hub_download", fetch)
    assert torch.equal(logits(surgery.load("me/small-GGUF/Q8/model.gguf@v1")), logits(small()))
    assert asked == [("me/small-GGUF", "Q8/model.gguf", "v1")]
