"""MLA as a stock DeepSeek-V3: the same logits in a process that does not know this library, or a refusal."""

import json

import families
import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

import surgery
from surgery.bundled import SMALL
from surgery.cli import main
from surgery.errors import CheckpointError, PlanError
from surgery.export import export

FAST = {"refit_queries": False, "refit_output": False}


def text() -> torch.Tensor:
    return torch.randint(3, 128, (8, 16), generator=torch.Generator().manual_seed(0))


def converted(family="llama", **options):
    step = {"rewriter": "mla", **FAST, **options}
    return surgery.convert(families.tiny_model(family), {"steps": [step]}, calibration=text())


def drift(child, folder) -> float:
    alone = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        want = child(text()).logits.float()
        return float((alone(text()).logits.float() - want).abs().max() / want.abs().max())


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"keep": 0.5}),
        ("llama", {"rank": 20, "rope_dims": 0}),
        ("llama_yarn", {"rank": 30, "rope_dims": 12}),
        ("llama_llama3", {"keep": 0.75}),
    ],
    ids=["each layer its own split", "no rotated part", "yarn", "llama3"],
)
def test_a_neutral_norm_keeps_the_logits_in_a_process_of_its_own(family, options, tmp_path) -> None:
    child = converted(family, **options)
    report = export(child, tmp_path / "out", to="native", text=text())
    assert report.parity.relative_difference < 1e-5
    assert report.parity.equal_greedy_tokens == report.parity.greedy_tokens == 48
    assert drift(child, tmp_path / "out") < 1e-5
    assert json.loads((tmp_path / "out" / "export.json").read_text())["facts"]["norm"] == "neutral"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["DeepseekV3ForCausalLM"]
    assert "auto_map" not in config


def test_the_bundled_model_keeps_its_logits_and_its_greedy_tokens(tmp_path) -> None:
    parent = surgery.load(SMALL, dtype=torch.float32)
    ids = torch.randint(3, 4096, (4, 64), generator=torch.Generator().manual_seed(0))
    step = {"rewriter": "mla", "rank": 96, "rope_dims": 32, **FAST}
    child = surgery.convert(parent, {"steps": [step]}, calibration=ids)
    report = export(child, tmp_path / "out", to="native", text=ids)
    assert report.parity.relative_difference < 1e-4
    assert report.parity.equal_greedy_tokens == 48


def test_the_cache_of_the_export_has_the_reported_size_and_answers_end_as_the_sources(tmp_path) -> None:
    child = converted(keep=0.5)
    child.generation_config.eos_token_id = [2, 9]
    report = export(child, tmp_path / "out", to="native", text=text())
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    cache = DynamicCache(config=alone.config)
    alone(text()[:1], past_key_values=cache)
    numbers = sum(layer.keys.shape[-1] + layer.values.shape[-1] for layer in cache.layers)
    assert numbers == report.facts["numbers_per_token"]
    assert report.facts["numbers_per_token"] >= report.facts["planned_numbers_per_token"]
    assert f"takes **{4 * numbers:,} bytes per token**" in (tmp_path / "out" / "README.md").read_text()
    assert alone.generation_config.eos_token_id == [2, 9]


def test_a_bias_of_keys_and_values_rides_on_the_neutral_norm_only(tmp_path) -> None:
    child = converted(rank=20, rope_dims=8)
    for layer in child.model.layers:  # what a parent with biases on k and v gives
        layer.self_attn.kv_down.bias = torch.nn.Parameter(torch.randn(28) / 4)
    assert export(child, tmp_path / "out", to="native", text=text()).parity.relative_difference < 1e-5
    with pytest.raises(PlanError, match="carries none"):
        export(child, tmp_path / "two", to="native", norm="calibrated", text=text())


def test_a_calibrated_norm_is_an_approximation_and_says_how_far(tmp_path) -> None:
    child = converted(keep=0.5)
    report = export(child, tmp_path / "out", to="native", norm="calibrated", text=text())
    assert 1e-4 < report.parity.relative_difference < 1
    assert any("train the exported model" in note for note in report.notes)
    assert not any("bias" in name for name in AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict())
    with pytest.raises(PlanError, match="fits its gains to text"):
        export(child, tmp_path / "two", to="native", norm="calibrated")


def test_a_bfloat16_model_stays_within_its_rounding(tmp_path) -> None:
    child = converted(keep=0.5).to(torch.bfloat16)
    assert export(child, tmp_path / "out", to="native", text=text()).parity.relative_difference < 5e-2


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("qwen2", "bias on q"),
        ("gemma2", "caps its scores"),
        ("mistral", "window of 8"),
        ("gpt_oss", "attention sinks"),
        ("bloom", "ALiBi"),
        ("gptj", "built otherwise"),
    ],
)
def test_what_the_format_cannot_say_is_refused(family, message, tmp_path) -> None:
    with pytest.raises(PlanError, match=message):
        export(converted(family, rank=20), tmp_path / "out", to="native")
    assert not (tmp_path / "out").exists()


def test_forms_that_are_no_mla_are_refused(tmp_path) -> None:
    parent = families.tiny_model("llama")
    with pytest.raises(PlanError, match="stock class"):
        export(parent, tmp_path / "out", to="native")
    with pytest.raises(PlanError, match="no target 'onnx'"):
        export(parent, tmp_path / "out", to="onnx")
    with pytest.raises(PlanError, match="no option 'nrom'. It has norm, text"):
        export(parent, tmp_path / "out", to="native", nrom="neutral")
    low = surgery.convert(parent, {"steps": [{"rewriter": "lowrank", "keep": 0.5, **FAST}]}, calibration=text())
    with pytest.raises(PlanError, match="rotates keys at read"):
        export(low, tmp_path / "out", to="native")
    with pytest.raises(PlanError, match="caches heads"):
        export(converted(rank=20, layers="0"), tmp_path / "out", to="native")


def test_a_model_that_computes_something_else_is_not_written(tmp_path) -> None:
    child = converted(rank=20)
    child.model.layers[0].mlp.act_fn = torch.nn.ReLU()
    with pytest.raises(CheckpointError, match="Nothing was written"):
        export(child, tmp_path / "out", to="native")
    assert not (tmp_path / "out").exists()


def test_the_command_writes_a_folder_from_a_folder(tmp_path, monkeypatch, capsys) -> None:
    surgery.save(converted(keep=0.5), tmp_path / "child")
    command = ["surgery", "export", str(tmp_path / "child"), "--to", "native", "-o", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 0
    assert "48 of 48 greedy tokens agree" in " ".join(capsys.readouterr().out.split())
    assert drift(surgery.load(tmp_path / "child"), tmp_path / "out") < 1e-5
