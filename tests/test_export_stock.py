"""Stock forms of converted models: repeated KV heads in the parent's class, and GGUF read back tensor by tensor."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from families import tiny_model
from transformers import AutoModelForCausalLM, DynamicCache
from vllm_models import CLA2, GQA, MLA, converted, decoder, text

import surgery
from surgery.cli import main
from surgery.errors import CheckpointError, PlanError
from surgery.export import export, llama_cpp
from surgery.export import gguf as gguf_target
from surgery.export.llama_cpp import LlamaCpp, bytes_per_token
from surgery.reference import SMALL

BY_LAYER = {**GQA, "layers": "0"}


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "qwen3", "olmo2", "phi3"])
def test_kv_heads_by_layer_become_the_parents_own_class(family, tmp_path) -> None:
    child = converted(tiny_model(family), BY_LAYER)
    kept = [layer["plan"]["project"]["kv_heads"] for layer in child.config.surgery["layers"]]
    report = export(child, tmp_path / "out", to="native")
    assert report.architecture == child.config.surgery["parent"]["architecture"]
    assert report.parity.relative_difference < 1e-5
    assert report.parity.equal_greedy_tokens == report.parity.greedy_tokens
    assert report.facts["kv_heads"] == max(kept) > min(kept)
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    cache = DynamicCache(config=alone.config)
    alone(torch.zeros(1, 3, dtype=torch.long), past_key_values=cache)
    numbers = sum(layer.keys[0, :, 0].numel() + layer.values[0, :, 0].numel() for layer in cache.layers)
    assert numbers == report.facts["numbers_per_token"] > report.facts["planned_numbers_per_token"]


def test_unequal_groups_become_equal_ones(tmp_path) -> None:
    step = {**GQA, "kv_heads": 2, "groups": [[0, 1, 2], [3]]}
    child = converted(decoder("Qwen2", num_key_value_heads=4), step)
    report = export(child, tmp_path / "out", to="native")
    assert (report.facts["kv_heads"], report.parity.relative_difference < 1e-5) == (4, True)


def test_a_norm_over_all_keys_forbids_unequal_repetition(tmp_path) -> None:
    config = tiny_model("olmo2").config
    config.num_key_value_heads = 4
    torch.manual_seed(0)
    step = {**GQA, "kv_heads": 2, "groups": [[0, 1, 2], [3]], "layers": "0"}
    child = converted(AutoModelForCausalLM.from_config(config).eval(), step)
    with pytest.raises(PlanError, match="layer 0 norms all keys together"):
        export(child, tmp_path / "out", to="native")


def test_shared_caches_have_no_stock_class(tmp_path) -> None:
    with pytest.raises(PlanError, match="caches heads"):
        export(converted(decoder(), CLA2), tmp_path / "out", to="native")


def test_padded_latents_have_plain_rope_and_the_size_of_kernels(tmp_path) -> None:
    child = converted(decoder(), MLA)
    report = export(child, tmp_path / "out", to="native", pad=True)
    assert report.parity.relative_difference < 1e-5
    assert (report.facts["rope_type"], report.facts["rope_dims"], report.facts["rank"]) == ("default", 64, 512)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_parameters"]["rope_type"] == "default"


@pytest.mark.parametrize(
    ("options", "step", "message"),
    [
        ({}, {"selector": "energy", "rope_dims": 40}, "rotated parts repeat one"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, {}, "not a plain one"),
    ],
    ids=["a frequency twice", "another rope"],
)
def test_latents_that_plain_rope_cannot_turn_are_not_padded(options, step, message, tmp_path) -> None:
    parent = decoder(num_hidden_layers=1, **options)
    child = surgery.convert(parent, {"steps": [{**MLA, **step}]}, calibration=text())
    with pytest.raises(PlanError, match=message):
        export(child, tmp_path / "out", to="native", pad=True)


def test_a_calibrated_norm_does_not_feel_the_epsilon_of_engines(tmp_path) -> None:
    """transformers adds 1e-6 there, vLLM and llama.cpp what `rms_norm_eps` says."""
    export(converted(decoder(), MLA), tmp_path / "out", to="native", norm="calibrated", text=text(), pad=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        want = model(text()).logits
        for layer in model.model.layers:
            layer.self_attn.kv_a_layernorm.variance_epsilon = 1e-5
        assert (model(text()).logits - want).abs().max() < 1e-4 * want.abs().max()


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
    assert "no llama-cpp-python here" in report.parity.engine
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert len(found) == report.facts["tensors"]
    v = model.model.layers[1].self_attn.v_proj.weight.detach()
    data = np.ascontiguousarray(found["blk.1.attn_v.weight"].data)
    back = torch.from_numpy(data.view(np.int16)).view(torch.bfloat16) if name == "bfloat16" else torch.from_numpy(data)
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
    import subprocess

    small = tmp_path / "small"
    surgery.save(converted(surgery.load(SMALL), {**GQA, "kv_heads": 0.5}), small)
    export(small, tmp_path / "out", to="gguf", python=llama())
    sentence = "Once upon a time, there were 3 cats; they didn't sleep!"
    code = (
        "import sys, llama_cpp; m = llama_cpp.Llama(model_path=sys.argv[1], vocab_only=True, verbose=False); "
        "print(m.tokenize(sys.argv[2].encode(), add_bos=False))"
    )
    command = [str(llama()), "-P", "-c", code, str(tmp_path / "out" / "model.gguf"), sentence]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    tokenizer = surgery.text.load_tokenizer(SMALL)
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
    with pytest.raises(PlanError, match="its splits before BPE are none of gpt-2, llama-bpe, qwen2"):
        export(tmp_path / "small", tmp_path / "two", to="gguf")


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


def test_the_command_pads_latents(tmp_path, monkeypatch, capsys) -> None:
    surgery.save(converted(decoder(num_hidden_layers=1), MLA), tmp_path / "child")
    command = ["surgery", "export", str(tmp_path / "child"), "--to", "native", "--pad", "-o", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 0
    assert "latent 512 + 64 per layer, rope default" in " ".join(capsys.readouterr().out.split())
    assert Path(tmp_path / "out" / "export.json").is_file()
