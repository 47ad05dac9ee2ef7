"""Who can load a result is judged once: plans, the table of the documentation and exports give the same answer."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
import transformers as hf
from families import tiny_model
from vllm_models import CLA2, FP8, GQA, MLA, decoder

import surgery
from surgery.errors import PlanError
from surgery.export import TARGETS, Source, check, target_for
from surgery.export import gguf as gguf_target
from surgery.export.parity import Parity
from surgery.export.target import Written
from surgery.planning.targets import (
    DEEPSEEK,
    NATIVE,
    OWN_CODES,
    PLUGIN,
    PLUGIN_FP8,
    REMOTE,
    REPEATED,
    Refusal,
    Subject,
    Way,
    engines,
    target_class,
    ways,
)
from surgery.runtime.layout import Dense
from surgery.serve.engine import Engine
from surgery.serve.support import PLUGIN_PARENTS

ROOT = Path(__file__).parent.parent
ENGINES = ("transformers", "vLLM", "llama.cpp")
BY_LAYER = {**GQA, "layers": "0"}
BARE = {"refit_queries": False, "refit_output": False}


@pytest.fixture
def benchmark(monkeypatch) -> ModuleType:
    """`benchmarks/engines.py`, which writes the table of `docs/how-to/serve.md`."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("benchmark_of_engines", ROOT / "benchmarks" / "engines.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def subject(model: Any, *steps: dict[str, Any]) -> Subject:
    return Subject.of_plan(surgery.plan(model, {"steps": list(steps)}))


def by(verdict: Way | Refusal) -> str | None:
    return verdict.by if isinstance(verdict, Way) else None


def test_the_documentation_has_the_table_that_plans_give(benchmark) -> None:
    rows = json.loads((ROOT / "benchmarks" / "results" / "engines.json").read_text())["rows"]
    page = (ROOT / benchmark.PAGE).read_text()
    assert page.split(benchmark.BEGIN)[1].split(benchmark.END)[0].strip() == benchmark.table(rows)


@pytest.mark.parametrize(
    ("parent", "steps", "expected"),
    [
        (decoder, [GQA], (NATIVE, NATIVE, NATIVE)),
        (decoder, [BY_LAYER], (REMOTE, PLUGIN, REPEATED)),
        (decoder, [CLA2], (REMOTE, PLUGIN, None)),
        (decoder, [{**CLA2, "layout": "svformer"}], (REMOTE, None, None)),
        (decoder, [MLA], (REMOTE, PLUGIN, DEEPSEEK)),
        (decoder, [{**CLA2, "init": "latent"}], (REMOTE, PLUGIN, None)),
        (decoder, [{"rewriter": "lowrank", "keep": 0.5}], (REMOTE, PLUGIN, None)),
        (lambda: decoder("Mistral", sliding_window=8), [{**CLA2, "init": "latent"}], (REMOTE, None, None)),
        (decoder, [{**MLA, "layers": "0-2"}], (REMOTE, None, None)),
        (decoder, [FP8], (REMOTE, PLUGIN_FP8, OWN_CODES)),
        (decoder, [CLA2, FP8], (REMOTE, PLUGIN_FP8, None)),
        (decoder, [{**FP8, "codec": "int8"}], (REMOTE, None, OWN_CODES)),
        (decoder, [{**FP8, "layers": "0-2"}], (REMOTE, None, None)),
        (decoder, [{"rewriter": "dmc"}], (REMOTE, None, None)),
        (lambda: tiny_model("phi3"), [CLA2], (REMOTE, None, None)),
        (lambda: decoder("Qwen2"), [MLA], (REMOTE, PLUGIN, None)),
        (lambda: decoder(attention_bias=True), [MLA], (REMOTE, PLUGIN, None)),
        (lambda: tiny_model("llama_yarn"), [{**MLA, "rank": 30, "rope_dims": 12}], (REMOTE, PLUGIN, None)),
    ],
    ids=["gqa", "by layer", "shared", "V shared", "mla", "latents shared", "lowrank", "latents of a window",
         "latents and heads", "fp8", "fp8 shared", "int8", "fp8 by layer", "dmc", "another family",
         "bias on q", "biases", "rope"],
)  # fmt: skip
def test_a_plan_names_the_engines_that_run_its_result(parent, steps, expected) -> None:
    plan = surgery.plan(parent(), {"steps": steps})
    found = ways(Subject.of_plan(plan))
    assert tuple(found) == ENGINES
    assert tuple(map(by, found.values())) == expected
    if expected[0] == NATIVE:
        assert plan.engines == "everything that loads the parent (stock LlamaForCausalLM)"
        return
    assert plan.engines.startswith("transformers (with surgery, or remote code)")
    for engine, verdict in list(found.items())[1:]:
        shown = f"{engine} ({by(verdict)})" if isinstance(verdict, Way) else f"Not {engine}: {verdict.reason}"
        assert shown in plan.engines


@pytest.mark.parametrize("steps", [[GQA], [BY_LAYER], [CLA2], [MLA]], ids=["native", "by layer", "shared", "latents"])
def test_a_llama_with_gelu_is_promised_to_neither_vllm_nor_llama_cpp(steps) -> None:
    plan = surgery.plan(decoder(hidden_act="gelu"), {"steps": steps})
    assert "Not vLLM: its decoder computes silu, this model gelu" in plan.engines
    assert "Not llama.cpp: " in plan.engines
    assert "vLLM (" not in plan.engines
    assert "llama.cpp (" not in plan.engines


@pytest.mark.parametrize(
    ("field_name", "values"),
    [
        ("softcap", 30.0), ("sinks", "sinks"), ("alibi_slopes", (0.5,) * 4), ("clip_qkv", 1.0), ("gated_output", True),
        ("value_dim", 16), ("rotary", None),
    ],
)  # fmt: skip
def test_vllm_is_promised_for_no_attention_that_the_plugin_lacks(field_name, values) -> None:
    shared = subject(decoder(), CLA2)
    assert by(target_for("vllm").judge(shared)) == PLUGIN
    odd = replace(shared, sites=tuple(replace(site, **{field_name: values}) for site in shared.sites))
    verdict = target_for("vllm").judge(odd)
    assert isinstance(verdict, Refusal)
    assert "layer 0" in verdict.reason


@dataclass(frozen=True, kw_only=True)
class Codec:
    """A format that no target knows."""

    kind: str = "int4"
    dtype: str = "float32"

    def label(self) -> str:
        return "4-bit groups of 32"


STORES = {"dtype": Dense(dtype="int4"), "store": Codec()}


@pytest.mark.parametrize("axis", ["dtype", "store"])
@pytest.mark.parametrize("steps", [[GQA], [BY_LAYER], [CLA2], [MLA]], ids=["native", "by layer", "shared", "latents"])
def test_a_store_that_a_target_does_not_know_is_refused_with_its_label(steps, axis) -> None:
    dense = subject(decoder(), *steps)
    odd = replace(dense, plans=tuple(replace(plan, store=STORES[axis]) for plan in dense.plans))
    label = "int4" if axis == "dtype" else "4-bit groups of 32"
    for name in ("native", "vllm", "gguf"):
        verdict = target_for(name).judge(odd)
        assert isinstance(verdict, Refusal), name
        assert name == "native" or label in verdict.reason, (name, verdict)
        if name == "native" and steps != [GQA]:  # of a stock class it says that it is one
            assert label in verdict.reason or "caches heads" in verdict.reason
    if steps == [GQA]:
        assert isinstance(target_for("hub").judge(odd), Refusal)


FAMILIES = ("llama", "llama_yarn", "llama_bias_wide", "mistral", "qwen2", "qwen3", "phi3", "gpt_neox", "gemma2",
            "olmo2", "gpt_oss", "bloom", "mixtral")  # fmt: skip
RECIPES = {
    "uniform": [{"rewriter": "gqa", "kv_heads": 1, "init": "mean"}],
    "by layer": [BY_LAYER],
    "shared": [{"rewriter": "share", "layout": "cla2", "init": "replace", "gain_fit": False, **BARE}],
    "latents": [{"rewriter": "mla", "rank": 20, "rope_dims": 8, "selector": "top", **BARE}],
    "evicted": [{"rewriter": "dms", "window": 8}],
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_exports_refuse_and_take_what_plans_say(family, recipe, monkeypatch) -> None:
    monkeypatch.setattr(
        Engine, "find", classmethod(lambda cls, python=None: cls(python="", version="0.32.0", has_plugin=True))
    )
    monkeypatch.setattr(gguf_target, "_gguf", lambda: None)
    model = tiny_model(family)
    try:
        plan = surgery.plan(model, {"steps": RECIPES[recipe]})
    except surgery.errors.SurgeryError as error:
        pytest.skip(f"no such plan: {error}")
    calibration = torch.randint(3, 128, (4, 16), generator=torch.Generator().manual_seed(0))
    child = surgery.convert(model, {"steps": RECIPES[recipe]}, calibration=calibration if recipe == "latents" else None)
    source = Source(child)
    for name in ("hub", "native", "vllm", "gguf"):
        target = target_for(name)
        planned, judged = target.judge(Subject.of_plan(plan)), target.judge(source.subject)
        assert planned == judged, name
        if isinstance(judged, Way) and judged.before is None:
            check(target, source)
            continue
        reason = judged.reason if isinstance(judged, Refusal) else judged.before.reason
        with pytest.raises(PlanError) as caught:
            check(target, source)
        assert reason in str(caught.value)
        if isinstance(judged, Way):  # the export that comes before is one that is taken
            assert isinstance(target_for("native").judge(source.subject), Way)
    for engine, kind in engines().items():
        verdict = kind().judge(source.subject)
        if not plan.native:
            assert (f"{engine} (" in plan.engines) == isinstance(verdict, Way), engine
        assert (f"Not {engine}: " in plan.engines) == isinstance(verdict, Refusal), engine


@dataclass(frozen=True, kw_only=True)
class Toy:
    """A text file with the number of KV heads."""

    engine: ClassVar[str] = "toy engine"
    toy_title: str = field(default="heads", metadata={"help": "the first word of the file."})
    toy_loud: bool = field(default=False, metadata={"help": "in capitals."})

    def judge(self, subject: Subject) -> Way | Refusal:
        return Way(by="counting") if subject.caches_heads else Refusal(reason="it counts heads only")

    def check(self, source: Source) -> None:
        pass

    def write(self, source: Source, folder: Path) -> Written:
        text = f"{self.toy_title} {sum(plan.project.kv_heads for plan in source.subject.plans)}"
        (folder / "toy.txt").write_text(text.upper() if self.toy_loud else text)
        return Written(architecture="Toy")

    def parity(self, source: Source, folder: Path) -> Parity:
        return Parity(
            engine="toy engine", logit_difference=None, relative_difference=None, equal_greedy_tokens=0, greedy_tokens=0
        )


@pytest.fixture
def toy(monkeypatch) -> None:
    monkeypatch.setitem(TARGETS, "toy", Toy)


def command(monkeypatch, *arguments: Any) -> int:
    from surgery.cli import main

    monkeypatch.setattr("sys.argv", ["surgery", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


@pytest.mark.usefixtures("toy")
def test_a_class_and_a_line_are_a_target(tmp_path, monkeypatch, capsys) -> None:
    parent = decoder(num_hidden_layers=2)
    assert "toy engine (counting)" in surgery.plan(parent, {"steps": [BY_LAYER]}).engines
    assert "Not toy engine: it counts heads only" in surgery.plan(parent, {"steps": [MLA]}).engines
    child = surgery.convert(parent, {"steps": [BY_LAYER]})
    surgery.export(child, tmp_path / "python", to="toy", toy_title="kv")
    assert (tmp_path / "python" / "toy.txt").read_text() == "kv 3"
    with pytest.raises(PlanError, match="toy engine: it counts heads only. Use --to hub"):
        surgery.export(surgery.convert(parent, {"steps": [CLA2]}), tmp_path / "no", to="toy")
    surgery.save(child, tmp_path / "child")
    given = ("export", tmp_path / "child", "--to", "toy", "-o", tmp_path / "cli", "--toy-title", "kv", "--toy-loud")
    assert command(monkeypatch, *given) == 0
    assert (tmp_path / "cli" / "toy.txt").read_text() == "KV 3"
    capsys.readouterr()
    assert command(monkeypatch, "export", "--help") == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--toy-title" in shown
    assert "toy: the first word of the file." in shown
    assert "toy: A text file with the number of KV heads." in shown


def test_a_target_may_be_named_by_module_and_class(monkeypatch) -> None:
    monkeypatch.setitem(TARGETS, "toy", f"{Toy.__module__}:Toy")
    monkeypatch.setitem(sys.modules, Toy.__module__, sys.modules[__name__])
    assert target_class("toy") is Toy


def test_the_command_has_the_options_of_all_targets_and_refuses_those_of_another(tmp_path, monkeypatch, capsys) -> None:
    assert command(monkeypatch, "export", "--help") == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for flag, text in (
        ("--norm", "native: norm on the latent"), ("--text", "native: text"), ("--pad", "native: fill latents"),
        ("--python", "vllm: interpreter"), ("--python", "gguf: interpreter"), ("--link", "hub: hard links"),
    ):  # fmt: skip
        assert flag in shown
        assert text in shown, text
    decoder(num_hidden_layers=1).save_pretrained(tmp_path / "model")
    assert command(monkeypatch, "export", tmp_path / "model", "--to", "hub", "-o", tmp_path / "out", "--pad") == 2
    assert "target hub has no option 'pad'. It has link." in " ".join(capsys.readouterr().err.split())


def test_the_plugin_names_classes_that_transformers_has() -> None:
    assert all(hasattr(hf, name) for name in PLUGIN_PARENTS)
