"""Stock forms of converted models: KV heads repeated in the parent's class, latents padded for engines."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from families import tiny_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM, DynamicCache
from vllm_models import CLA2, GQA, MLA, converted, decoder, text

import surgery
from surgery.calibration.text import load_windows
from surgery.cli import main
from surgery.errors import PlanError
from surgery.export import export
from surgery.export.latent_norm import fit_norm, read_by_layers
from surgery.runtime.layout import AttentionSite

BY_LAYER = {**GQA, "layers": "0"}


@pytest.mark.parametrize(
    "family",
    ["llama", "gpt_neox", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen3", "olmo2", "phi3"))],
)
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


def test_the_card_of_a_stock_class_counts_its_own_cache_and_says_how_to_load_it(tmp_path) -> None:
    child = surgery.convert(tiny_model("llama"), {"steps": [{"rewriter": "quantise", "codec": "int4"}]})
    plan = child.config.surgery["provenance"]["plan"]
    export(child, tmp_path / "native", to="native")
    export(tmp_path / "native", tmp_path / "again", to="hub")  # which knows the plan alone
    assert plan["bytes_per_token"] < plan["parent_bytes_per_token"]
    for folder in ("native", "again"):
        card = (tmp_path / folder / "README.md").read_text()
        assert f"takes **{plan['parent_bytes_per_token']:,} bytes per token**" in card
        assert 'AutoModelForCausalLM.from_pretrained("' in card
        assert "trust_remote_code" not in card
        assert "It runs code of its own" not in card
    assert "caches are not int4" in (tmp_path / "native" / "README.md").read_text()


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


def test_a_tied_head_is_written_apart(tmp_path) -> None:
    """vLLM and mlx-lm know no tied DeepSeek-V3."""
    report = export(converted(decoder(tie_word_embeddings=True), MLA), tmp_path / "out", to="native")
    assert report.parity.relative_difference < 1e-5
    assert not json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as tensors:
        assert torch.equal(tensors.get_tensor("lm_head.weight"), tensors.get_tensor("model.embed_tokens.weight"))


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


@pytest.mark.parametrize("tokens", [None, 2], ids=["all of the text", "two tokens"])
def test_padding_makes_a_calibrated_norm_nearly_exact(tokens, tmp_path) -> None:
    """All of a narrow model's inputs fit into the channels that padding adds: what is left is the parent's epsilon."""
    child = converted(decoder(), MLA)
    found = {
        pad: export(child, tmp_path / str(pad), to="native", norm="calibrated", text=given, pad=pad)
        for pad, given in ((False, text()), (True, text() if tokens is None else text()[:1, :tokens]))
    }
    assert found[False].facts["norm_spread"] > 0.05
    assert found[True].facts["norm_spread"] < 1e-3
    assert found[True].parity.relative_difference < 5e-3 < 0.05 < found[False].parity.relative_difference


@pytest.mark.parametrize("channels", [0, 6, 32])
def test_spare_channels_steer_the_norm_of_wider_models(channels) -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(600, 32, generator=generator) * torch.logspace(0, -2, 32)
    weight = torch.rand(32, generator=generator) + 0.5
    x = z / z.square().mean(-1, keepdim=True).sqrt() * weight
    down = torch.randn(4, 32, generator=generator) / 8
    norms = [fit_norm(x, down, weight, 4 + more) for more in (0, channels)]
    assert len(norms[1].rows_ED) == channels
    if channels:
        assert norms[1].spread < (1e-6 if channels == 32 else 0.5 * norms[0].spread)
    c = x @ down.mT
    whole = torch.cat([c, x @ norms[1].rows_ED.mT], 1)
    normed = c / whole.square().mean(-1, keepdim=True).sqrt() * norms[1].gain_R
    assert (normed - c).norm() / c.norm() <= 1.2 * norms[1].spread + 1e-6  # the spread is that of a quarter


def test_layers_are_read_in_as_many_runs_as_memory_asks_for(monkeypatch) -> None:
    child = converted(decoder(), MLA)
    sites = [AttentionSite.from_dict(entry["site"]) for entry in child.config.surgery["layers"]]
    windows = load_windows(text(), vocab_size=child.config.vocab_size, length=text().shape[1])
    whole = list(read_by_layers(child, sites, windows))
    monkeypatch.setattr(sys.modules[read_by_layers.__module__], "HELD", 1)
    assert len(whole) == len(sites) > 1
    for one, other in zip(read_by_layers(child, sites, windows), whole, strict=True):
        assert torch.equal(one, other)


def test_the_command_pads_latents(tmp_path, monkeypatch, capsys) -> None:
    surgery.save(converted(decoder(num_hidden_layers=1), MLA), tmp_path / "child")
    command = ["surgery", "export", str(tmp_path / "child"), "--to", "native", "--pad", "-o", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 0
    assert "latent 512 + 64 per layer, rope default" in " ".join(capsys.readouterr().out.split())
    assert Path(tmp_path / "out" / "export.json").is_file()
