"""GGUF files: read back tensor by tensor, and answered by llama.cpp where it is."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from families import tiny_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from vllm_models import CLA2, GQA, MLA, converted, decoder, text

import surgery
from surgery.bundled import SMALL
from surgery.errors import CheckpointError, PlanError
from surgery.export import Source, export, gguf_tokens, llama_cpp
from surgery.export import gguf as gguf_target
from surgery.export.llama_cpp import LlamaCpp, bytes_per_token


def llama() -> str | None:
    python = os.environ.get(llama_cpp.PYTHON)
    return python or (sys.executable if importlib.util.find_spec("llama_cpp") else None)


needs_llama = pytest.mark.skipif(
    llama() is None, reason="no llama-cpp-python: install it, or let SURGERY_LLAMA_PYTHON name an interpreter with it"
)
gguf = pytest.importorskip("gguf", reason="no gguf: install kv-surgery[gguf]")
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64, "rope_theta": 10000.0,
}  # fmt: skip
WRITTEN = {
    "gqa": lambda: converted(decoder(), GQA),
    "llama3 rope and biases": lambda: decoder(rope_parameters=LLAMA3, attention_bias=True, tie_word_embeddings=True),
    "mistral": lambda: decoder("Mistral", sliding_window=None),
    "qwen2": lambda: decoder("Qwen2", hidden_size=128),
    "qwen3": lambda: decoder("Qwen3"),
    "bfloat16": lambda: decoder().to(torch.bfloat16),
}


@pytest.fixture
def without_llama(monkeypatch) -> None:
    monkeypatch.setattr(LlamaCpp, "find", classmethod(lambda cls, python=None: None))


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.usefixtures("without_llama")
def test_every_tensor_of_a_gguf_file_reads_back_as_written(name, tmp_path) -> None:
    model = WRITTEN[name]()
    report = export(model, tmp_path / "out", to="gguf")
    assert "not loaded: no llama-cpp-python here" in report.parity.engine
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert len(found) == report.facts["tensors"]
    v = model.model.layers[1].self_attn.v_proj.weight.detach()
    data = np.ascontiguousarray(found["blk.1.attn_v.weight"].data)
    back = (
        torch.from_numpy(data.view(np.int16).copy()).view(torch.bfloat16) if name == "bfloat16" else torch.tensor(data)
    )
    assert torch.equal(back.reshape(v.shape), v)
    key = reader.fields[f"{report.architecture}.attention.head_count_kv"]
    assert int(key.parts[key.data[0]][0]) == model.config.num_key_value_heads


@needs_llama
@pytest.mark.parametrize("name", WRITTEN)
def test_llama_cpp_gives_the_tokens_and_logits_of_transformers(name, tmp_path) -> None:
    model = WRITTEN[name]()
    report = export(model, tmp_path / "out", to="gguf", python=llama())
    kv = model.config.num_key_value_heads
    assert f", {4 * kv * 2 * 32 * 4} KV bytes per token" in report.parity.engine
    if name != "bfloat16":
        assert report.parity.relative_difference < 1e-4
        assert report.parity.equal_greedy_tokens == report.parity.greedy_tokens == 48


@needs_llama
def test_llama_cpp_runs_a_native_mla(tmp_path) -> None:
    export(converted(decoder(), MLA), tmp_path / "mla", to="native", norm="calibrated", text=text(), pad=True)
    report = export(tmp_path / "mla", tmp_path / "out", to="gguf", python=llama())
    assert report.architecture == "deepseek2"
    assert report.parity.equal_greedy_tokens == report.parity.greedy_tokens == 48
    assert f", {4 * (512 + 64) * 4} KV bytes per token" in report.parity.engine


@needs_llama
def test_llama_cpp_reads_text_as_the_tokenizer_does(tmp_path) -> None:
    small = tmp_path / "small"
    surgery.save(converted(surgery.load(SMALL), GQA), small)
    export(small, tmp_path / "out", to="gguf", python=llama())
    sentence = "Once upon a time, there were 3 cats; they didn't sleep!"
    code = (
        "import sys, llama_cpp; m = llama_cpp.Llama(model_path=sys.argv[1], vocab_only=True, verbose=False); "
        "print(m.tokenize(sys.argv[2].encode(), add_bos=False))"
    )
    command = [str(llama()), "-P", "-c", code, str(tmp_path / "out" / "model.gguf"), sentence]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    tokenizer = surgery.calibration.text.load_tokenizer(SMALL)
    assert (
        json.loads(done.stdout.strip().splitlines()[-1]) == tokenizer(sentence, add_special_tokens=False)["input_ids"]
    )


@pytest.mark.usefixtures("without_llama")
def test_the_tokenizer_travels_in_the_file(tmp_path) -> None:
    shutil.copytree(SMALL, tmp_path / "small")
    report = export(tmp_path / "small", tmp_path / "out", to="gguf")
    assert report.facts["tokenizer"] == "gpt2"
    fields = gguf.GGUFReader(tmp_path / "out" / "model.gguf").fields
    words = json.loads((SMALL / "tokenizer.json").read_text())
    tokens = fields["tokenizer.ggml.tokens"]
    assert len(tokens.data) == 4096
    assert bytes(tokens.parts[tokens.data[300]]).decode() == {v: k for k, v in words["model"]["vocab"].items()}[300]
    assert len(fields["tokenizer.ggml.merges"].data) == len(words["model"]["merges"])
    data = {**words, "model": {**words["model"], "byte_fallback": True}}
    (tmp_path / "small" / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(PlanError, match="is BPE with byte fallback"):
        export(tmp_path / "small", tmp_path / "two", to="gguf")
    data = {**words, "pre_tokenizer": {"type": "Whitespace"}}
    (tmp_path / "small" / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(PlanError, match="its splits before BPE are none of gpt-2, smollm, llama-bpe, qwen2"):
        export(tmp_path / "small", tmp_path / "two", to="gguf")
    digits = {"type": "Digits", "individual_digits": True}
    parts = [digits, {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}]
    data = {**words, "pre_tokenizer": {"type": "Sequence", "pretokenizers": parts}}
    (tmp_path / "small" / "tokenizer.json").write_text(json.dumps(data))
    assert "gpt2 (smollm)" in export(tmp_path / "small", tmp_path / "digits", to="gguf").notes[0]


@pytest.mark.usefixtures("without_llama")
def test_added_tokens_without_an_embedding_are_left_out_and_others_refused(tmp_path) -> None:
    shutil.copytree(SMALL, tmp_path / "small")
    file = tmp_path / "small" / "tokenizer.json"
    words = json.loads(file.read_text())
    extra = {**words["added_tokens"][0], "id": 4096, "content": "<extra>"}
    file.write_text(json.dumps({**words, "added_tokens": [*words["added_tokens"], extra]}))
    report = export(tmp_path / "small", tmp_path / "out", to="gguf")
    assert "4096 tokens, gpt2 (gpt-2), 1 without an embedding left out" in report.notes[0]
    assert len(gguf.GGUFReader(tmp_path / "out" / "model.gguf").fields["tokenizer.ggml.tokens"].data) == 4096
    model = {**words["model"], "vocab": {**words["model"]["vocab"], "surplus": 4096}}
    file.write_text(json.dumps({**words, "model": model}))
    with pytest.raises(PlanError, match="has 4097 tokens beside the added ones, the model 4096 embeddings"):
        export(tmp_path / "small", tmp_path / "two", to="gguf")


def sentencepiece_model(folder) -> int:
    """A small SentencePiece tokenizer with chat tokens that only `tokenizer.json` names; returns the number of ids."""
    sentencepiece = pytest.importorskip("sentencepiece")
    words = " ".join(f"w{i} cat dog{i % 7} sleeps" for i in range(200))
    (folder / "corpus.txt").write_text("\n".join([words] * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"), model_prefix=str(folder / "tokenizer"), vocab_size=64, model_type="bpe",
        byte_fallback=False, bos_id=1, eos_id=2, unk_id=0, pad_id=-1,
    )  # fmt: skip
    (folder / "corpus.txt").unlink()
    pieces = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
    core = Tokenizer(WordLevel({pieces.id_to_piece(i): i for i in range(len(pieces))}, unk_token="<unk>"))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", unk_token="<unk>")
    fast.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|end|>"]})
    fast.add_tokens(["<tool>"])
    fast.save_pretrained(folder)
    return len(fast)


@pytest.mark.usefixtures("without_llama")
def test_chat_tokens_of_a_sentencepiece_tokenizer_travel(tmp_path, monkeypatch) -> None:
    folder = tmp_path / "parent"
    folder.mkdir()
    count = sentencepiece_model(folder)
    decoder(vocab_size=count + 5).save_pretrained(folder)
    (folder / "added_tokens.json").unlink(missing_ok=True)
    model = folder / "tokenizer.model"
    assert model.is_file()
    export(folder, tmp_path / "out", to="gguf")
    fields = gguf.GGUFReader(tmp_path / "out" / "model.gguf").fields
    tokens, types = (fields[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type"))
    added = Source(folder).tokenizer.get_added_vocab()
    assert {"<|user|>", "<|end|>", "<tool>"} <= added.keys()
    assert {t: bytes(tokens.parts[tokens.data[number]]).decode() for t, number in added.items()} == {
        t: t for t in added
    }
    kinds = {t: gguf.TokenType(int(types.parts[types.data[number]][0])).name for t, number in added.items()}
    assert (kinds["<|user|>"], kinds["<tool>"]) == ("CONTROL", "USER_DEFINED")
    monkeypatch.setattr(gguf_tokens, "_added_tokens", lambda folder: {})
    with pytest.raises(CheckpointError, match="in the tokenizer, and '.PAD"):
        export(folder, tmp_path / "two", to="gguf")


@pytest.mark.usefixtures("without_llama")
def test_buffers_that_the_class_does_not_load_stay_out_of_the_file(tmp_path) -> None:
    model = decoder()
    model.save_pretrained(tmp_path / "parent")
    file = tmp_path / "parent" / "model.safetensors"
    tensors = load_file(file)
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16), "model.position_ids": torch.arange(64)}
    save_file(tensors | extra, file, {"format": "pt"})
    report = export(tmp_path / "parent", tmp_path / "out", to="gguf")
    names = {tensor.name for tensor in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    assert not [name for name in names if "rope" in name or "rot" in name]
    assert report.facts["tensors"] == len(names) == len(tensors)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: converted(decoder(), CLA2), "no graph for SurgeryLlamaForCausalLM"),
        (lambda: tiny_model("phi3"), "Phi3ForCausalLM is not among"),
        (lambda: decoder("Mistral", sliding_window=8), "a window of 8 tokens"),
        (lambda: decoder("Qwen2"), "heads of 32, which is not hidden size over heads"),
        (lambda: tiny_model("llama_yarn"), "rope of type yarn"),
    ],
    ids=["shared", "family", "window", "wide heads", "rope"],
)
def test_what_llama_cpp_does_not_compute_is_refused(make, message, tmp_path) -> None:
    with pytest.raises(PlanError, match=message):
        export(make(), tmp_path / "out", to="gguf")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("without_llama")
def test_a_file_that_reads_back_otherwise_is_not_kept(tmp_path, monkeypatch) -> None:
    made = gguf_target._pairs
    calls = []

    def drifting(rows: torch.Tensor, heads: int) -> torch.Tensor:
        calls.append(heads)
        return made(rows, heads) + len(calls)

    monkeypatch.setattr(gguf_target, "_pairs", drifting)
    with pytest.raises(CheckpointError, match=r"blk\.0\.attn_. *.*reads back otherwise"):
        export(decoder(), tmp_path / "out", to="gguf")
    assert not (tmp_path / "out").exists()


def test_a_missing_gguf_package_is_said_with_what_to_install(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(PlanError, match=r"pip install 'kv-surgery\[gguf\]'"):
        export(decoder(), tmp_path / "out", to="gguf")


def test_an_interpreter_without_llama_cpp_is_refused_where_it_was_named(tmp_path) -> None:
    with pytest.raises(PlanError, match="no interpreter at"):
        LlamaCpp.find(str(tmp_path / "python"))
    stub = tmp_path / "python"
    stub.write_text("#!/bin/sh\necho None\n")
    stub.chmod(0o755)
    with pytest.raises(PlanError, match=r"has no llama-cpp-python \(tested: 0\.3\.36\)"):
        LlamaCpp.find(str(stub))


def test_cache_bytes_are_read_from_llama_cpps_log() -> None:
    log = "llama_kv_cache: size =   36.00 MiB (  4096 cells,   4 layers,  1/1 seqs), K (f32):   32.00 MiB"
    assert bytes_per_token(log) == 9216
    assert bytes_per_token("nothing") is None


@pytest.mark.parametrize(
    ("steps", "types"),
    [
        ([GQA, {"rewriter": "quantise", "codec": "int4"}], ("q4_0", "q4_0")),
        ([{"rewriter": "quantise", "codec": "int8"}], ("q8_0", "q8_0")),
        ([{"rewriter": "quantise", "codec": "kivi", "k_bits": 8, "v_bits": 4}], ("q8_0", "q4_0")),
        ([MLA, {"rewriter": "quantise", "codec": "int4"}], ("q4_0", "q4_0")),
    ],
    ids=["int4", "int8", "K and V", "latents"],
)
@pytest.mark.usefixtures("without_llama")
def test_plans_of_codes_name_the_types_of_cache_to_run_llama_cpp_with(steps, types, tmp_path) -> None:
    options = "--cache-type-k {} --cache-type-v {}".format(*types)
    plan = surgery.plan(decoder(), {"steps": steps})
    assert "llama.cpp (native, its own codes)" in plan.engines
    model = converted(decoder(), *steps)
    with pytest.raises(PlanError, match=options):
        export(model, tmp_path / "no", to="gguf")
    more = {"norm": "calibrated", "text": text(), "pad": True} if MLA in steps else {}
    native = export(model, tmp_path / "native", to="native", **more)
    assert "there, but in full" in native.notes[-1]
    rest = [step for step in steps if step["rewriter"] != "quantise"]
    if MLA not in steps:
        exact = converted(decoder(), *rest) if rest else decoder()
        assert torch.equal(surgery.load(tmp_path / "native")(text()).logits, exact(text()).logits)
    report = export(tmp_path / "native", tmp_path / "out", to="gguf")
    assert tuple(report.facts["cache_types"]) == types
    assert options in report.notes[1]
    assert f"model.gguf {options}" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"codec": "kivi"}, "layer 0 is stored as kivi 2 bits; its own caches have codes of 8, 5 and 4 bits"),
        ({"layers": "1-3"}, "layer 1 is stored as int4 4 bits, layer 0 is stored as float32; it has one type for all"),
    ],
    ids=["bits", "mixed"],
)
def test_codes_that_llama_cpp_has_not_are_refused_in_the_plan(step, message) -> None:
    plan = surgery.plan(decoder(), {"steps": [{"rewriter": "quantise", **step}]})
    assert f"Not llama.cpp: {message}" in plan.engines
