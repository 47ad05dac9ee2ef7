"""`surgery bench decode`: every layout runs, counts its bytes, and refuses what it cannot stand for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from methods import converted
from typer.testing import CliRunner

from surgery.cli import app
from surgery.errors import RecipeError
from surgery.measure import decode_bench as bench
from surgery.measure.decode_layouts import SHAPES, Shape, layouts, of_model
from surgery.measure.decode_loop import DecodeLoop
from surgery.runtime.layout import LayerPlan

TINY: dict[str, Any] = {
    "batches": [2], "contexts": [20], "layers": 2, "steps": 1, "dtype": "float32", "device": "cpu", "compiled": False,
}  # fmt: skip
MLA = {"name": "mla-32-16", "steps": [{"rewriter": "mla", "rank": 32, "rope_dims": 16}]}


def test_every_layout_is_timed_and_counted() -> None:
    result = bench.decode("small", ["identity", "gqa-4x", "mqa", MLA, "cla2", "cla2-gqa-2x"], **TINY)
    assert [row.variant for row in result.rows] == ["identity", "gqa-4x", "mqa", "mla-32-16", "cla2", "cla2-gqa-2x"]
    assert [row.kv_bytes_per_token for row in result.rows] == [8192, 2048, 1024, 384, 4096, 2048]
    assert [row.is_parent for row in result.rows] == [True] + [False] * 5
    assert all(row.tokens_per_s and row.ideal_tokens_per_s for row in result.rows)
    assert [row.transformers_tokens_per_s is not None for row in result.rows] == [True] * 3 + [False] * 3
    assert json.loads(json.dumps(result.to_dict()))["rows"][0]["over_transformers"] > 0


@torch.no_grad()
def test_the_loop_attends_to_what_it_appends() -> None:
    shape = SHAPES["small"]
    small = Shape(**{**vars(shape), "layers": 1, "vocabulary": 64})
    for layout in layouts(small, "float32", ["identity", MLA]):
        loop = DecodeLoop(small, layout.layers, 2, 8).eval()
        loop.start(3)
        before = loop.cache0_0.clone()
        loop(torch.tensor([1, 2]))
        changed = (loop.cache0_0 != before).any(-1).any(1)
        assert changed.tolist() == [[i == 3 for i in range(8)]] * 2
        assert loop.places.tolist() == [4, 4]


@torch.no_grad()
def test_a_layer_that_reads_anothers_latents_stores_none() -> None:
    small = Shape(**{**vars(SHAPES["small"]), "layers": 2, "vocabulary": 64})
    (layout,) = layouts(small, "float32", [MLA])
    loop = DecodeLoop(small, [replace(plan, owner=0) for plan in layout.layers], 2, 8).eval()
    loop.start(3)
    assert loop(torch.tensor([1, 2])).shape == (2,)
    assert [name for name, _ in loop.named_buffers() if name.startswith("cache")] == ["cache0_0"]


@pytest.mark.parametrize("method", ["per_layer_heads", "mla"])
def test_a_converted_model_brings_its_own_layout(method: str, tmp_path: Path) -> None:
    model = converted(method, "llama")
    model.save_pretrained(tmp_path / "child")
    arguments = {key: value for key, value in TINY.items() if key != "layers"}
    result = bench.decode(None, ["identity"], model=str(tmp_path / "child"), transformers=False, **arguments)
    plans = [LayerPlan.from_dict(layer["plan"]) for layer in model.config.surgery["layers"]]
    assert [row.variant for row in result.rows] == ["child", "identity"]
    assert result.rows[0].kv_bytes_per_token == sum(plan.bytes_per_token for plan in plans)


def test_what_the_loop_lacks_is_refused(tmp_path: Path) -> None:
    converted("unequal_groups", "llama").save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match="layer 0 has (groups of )?unequal"):
        of_model(str(tmp_path), "float32")
    for recipe, reason in (("lowrank-2x", "rotates its keys at read"), ("dms-4x", r"averages or drops tokens \(dms\)")):
        with pytest.raises(RecipeError, match=f"{recipe}: layer 0 {reason}.*surgery eval --speed"):
            layouts(SHAPES["small"], "float32", [recipe])
    positive = "must name positive numbers"
    for change, words in (
        ({"dtype": "int8"}, "dtype 'int8' is unknown"),
        ({"steps": 0}, positive),
        ({"batches": [0]}, positive),
    ):
        with pytest.raises(RecipeError, match=words):
            bench.decode("small", ["identity"], **{**TINY, **change})
    with pytest.raises(RecipeError, match="'large' is unknown"):
        bench.decode("large", ["identity"], **TINY)


def test_what_does_not_fit_is_skipped() -> None:
    result = bench.decode("small", ["identity"], **{**TINY, "memory": 60 * 2**20, "contexts": [100000]})
    assert result.rows[0].skipped == "does not fit" and result.rows[0].tokens_per_s is None


def test_the_command_writes_its_numbers(tmp_path: Path) -> None:
    command = "bench decode --shape small --layers 1 --device cpu --dtype float32 --context 16 --batch 1 --steps 1"
    out = tmp_path / "decode.json"
    result = CliRunner().invoke(app, [*command.split(), "--recipe", "mqa", "--eager", "--alone", "--json", str(out)])
    assert result.exit_code == 0, result.output
    assert json.loads(out.read_text())["rows"][0]["variant"] == "mqa"


def test_the_command_names_recipes_where_a_layout_is_asked_for_by_its_former_name() -> None:
    result = CliRunner().invoke(app, ["bench", "decode", "--shape", "small", "--variant", "mla-512-64"])
    assert isinstance(result.exception, RecipeError) and "Use --recipe" in str(result.exception)
