"""The README's table of engines says what was run, and plans say the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers as hf
from families import tiny_model
from vllm_models import CLA2, GQA, MLA, decoder

import surgery
from surgery.planning.engines import DEEPSEEK, ENGINES, NATIVE, NONE, PLUGIN, PLUGIN_PARENTS, REMOTE, REPEATED
from surgery.serve.engine import TESTED

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "engines.json"
BEGIN, END = "<!-- engines: written by benchmarks/engines.py --readme -->", "<!-- end of engines -->"


def results() -> dict[str, Any]:
    return dict(json.loads(RESULTS.read_text()))


def test_the_readme_says_what_the_engines_did() -> None:
    readme = (ROOT / "README.md").read_text()
    table = readme[readme.index(BEGIN) + len(BEGIN) : readme.index(END)].strip().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert cells[0][1:-1] == list(ENGINES)
    said = {row[0]: dict(zip(ENGINES, row[1:-1], strict=True)) for row in cells[2:]}
    for variant, row in results()["rows"].items():
        for engine, found in row["engines"].items():
            size = f", {found['bytes_per_token'] / 1024:.3g} KiB" if "bytes_per_token" in found else ""
            assert said[variant][engine] == f"{found['way']}{size}", (variant, engine)
    assert set(said) == set(results()["rows"])


def test_what_ran_gave_the_sources_tokens_and_what_was_refused_has_a_reason() -> None:
    for variant, row in results()["rows"].items():
        for engine, found in row["engines"].items():
            if found["way"] == NONE:
                assert found["reason"], (variant, engine)
            else:
                assert found["equal_greedy_tokens"] == found["greedy_tokens"] > 0, (variant, engine)
                assert found["relative_difference"] < 1e-3, (variant, engine)


def test_engines_cache_as_planned_where_they_run_the_plan_itself() -> None:
    rows = results()["rows"]
    for variant in ("GQA (`gqa-2x`)", "caches shared (`cla2`)", "GQA, heads by layer"):
        planned, found = rows[variant]["planned_bytes_per_token"], rows[variant]["engines"]["vLLM"]
        assert found["bytes_per_token"] == pytest.approx(planned, rel=0.02)
        assert str(TESTED[0]) in found["engine"]


@pytest.mark.parametrize(
    ("parent", "steps", "ways"),
    [
        (decoder, [GQA], (NATIVE, NATIVE, NATIVE)),
        (decoder, [{**GQA, "layers": "0"}], (REMOTE, PLUGIN, REPEATED)),
        (decoder, [CLA2], (REMOTE, PLUGIN, NONE)),
        (decoder, [{**CLA2, "layout": "svformer"}], (REMOTE, NONE, NONE)),
        (decoder, [MLA], (REMOTE, DEEPSEEK, DEEPSEEK)),
        (decoder, [{"rewriter": "lowrank", "keep": 0.5}], (REMOTE, NONE, NONE)),
        (decoder, [{"rewriter": "dmc"}], (REMOTE, NONE, NONE)),
        (lambda: tiny_model("phi3"), [CLA2], (REMOTE, NONE, NONE)),
    ],
    ids=["gqa", "by layer", "shared", "V shared", "mla", "lowrank", "dmc", "another family"],
)
def test_a_plan_names_the_engines_that_run_its_result(parent, steps, ways) -> None:
    text = surgery.plan(parent(), {"steps": steps}).engines
    if ways[0] == NATIVE:
        assert text == "everything that loads the parent (stock LlamaForCausalLM)"
        return
    assert text.startswith("transformers (with surgery, or remote code)")
    for engine, way in zip(ENGINES[1:], ways[1:], strict=True):
        assert (f"{engine} ({way})" in text) == (way != NONE)


def test_the_plugin_names_classes_that_transformers_has() -> None:
    assert all(hasattr(hf, name) for name in PLUGIN_PARENTS)
