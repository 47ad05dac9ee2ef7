"""Operators on a CPU: values, schemas, refusals, the tables of launch parameters."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_cases import CASES, module, on_device, paged, quantised, random, run
from torch import Tensor

from surgery.kernels import tuned
from surgery.kernels.launching import ASSUMED
from surgery.kernels.tuned import Config, bucket, config_for

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
F32: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_operator_agrees_with_float64(name: str, dtype: torch.dtype) -> None:
    run(name, on_device, dtype, "cpu")


def int32(*values: Any) -> Tensor:
    return torch.tensor(values[0] if len(values) == 1 else values, dtype=torch.int32)


def gqa() -> dict[str, Any]:
    return {
        "q": random(2, 4, 16, **F32), "k": random(2, 2, 48, 16, **F32), "v": random(2, 2, 48, 16, **F32),
        "lengths": int32(48, 9), "scale": 0.3,
    }  # fmt: skip


def latent() -> dict[str, Any]:
    return {
        "q": random(2, 4, 24, **F32), "cache": random(2, 1, 48, 24, **F32), "lengths": int32(48, 9), "scale": 0.3,
        "rank": 16,
    }  # fmt: skip


def append() -> dict[str, Any]:
    return {
        "q": random(2, 4, 16, **F32), "k": random(2, 2, 16, **F32), "v": random(2, 2, 16, **F32),
        "cos": random(2, 8, **F32), "sin": random(2, 8, **F32), "slots": int32(0, 47),
        "k_cache": random(2, 2, 48, 16, **F32), "v_cache": random(2, 2, 48, 16, **F32),
    }  # fmt: skip


def schedule() -> dict[str, Any]:
    return {"lengths": int32([[[4, 70], [0, 16]]]), "programs": 5, "page": 16}


def ragged() -> dict[str, Any]:
    lengths = int32([[4, 70], [0, 16]])
    pages, (k, v) = paged(lengths, 16, 16, 16, **F32)
    return {
        "q": random(2, 4, 16, **F32), "k": k, "v": v, "pages": pages, "lengths": lengths,
        "plan": on_device("ragged_schedule")(lengths[None], 5, 16)[0], "scale": 0.3,
    }  # fmt: skip


def merge() -> dict[str, Any]:
    given = {k: v for k, v in ragged().items() if k in ("q", "pages", "lengths")}
    caches = ragged()
    return {
        "q": given["q"], "k": random(2, 2, 16, **F32), "v": random(2, 2, 16, **F32),
        "merge": torch.tensor([[True, False], [False, True]]), "weight": torch.ones(2, 2),
        "cos": random(2, 8, **F32), "sin": random(2, 8, **F32), "pages": given["pages"], "k_cache": caches["k"],
        "v_cache": caches["v"], "sums_k": torch.ones(2, 2, 16), "sums_v": torch.ones(2, 2, 16),
        "z": torch.ones(2, 2), "lengths": given["lengths"],
    }  # fmt: skip


def compact() -> dict[str, Any]:
    given = ragged()
    keep = torch.rand(2, 2, given["pages"].shape[2] * 16) > 0.5
    return {"k": given["k"], "v": given["v"], "pages": given["pages"], "keep": keep, "lengths": given["lengths"]}


QUANTISED = ("k_words", "k_scale", "k_low", "v_words", "v_scale", "v_low", "k_ring", "v_ring")


def quant() -> dict[str, Any]:
    lengths = int32(200, 0)
    cache = quantised(lengths, 2, 64, 64, 4, 64, torch.float32, "cpu")
    named = dict(zip(QUANTISED, cache, strict=True))
    return {"q": random(2, 4, 64, **F32), **named, "lengths": lengths, "bits": 4, "scale": 0.3}


def quant_append() -> dict[str, Any]:
    named = {name: quant()[name] for name in QUANTISED}
    return {"k": random(2, 2, 64, **F32), "v": random(2, 2, 64, **F32), "slots": int32(63, 3), **named, "bits": 4}


def combine() -> dict[str, Any]:
    return {"partial": random(2, 3, 4, 16, **F32), "lse": random(2, 3, 4, **F32), "dtype": torch.float32}


GOOD: dict[str, Callable[[], dict[str, Any]]] = {
    "decode_gqa": gqa, "decode_latent": latent, "rope_append_": append, "ragged_schedule": schedule,
    "decode_ragged": ragged, "merge_append_": merge, "compact_": compact, "decode_quant": quant,
    "quant_append_": quant_append, "combine": combine,
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_schema_fake_and_functionalisation_are_right(name: str) -> None:
    on_device(name)
    arguments = list(GOOD[name]().values())
    torch.library.opcheck(getattr(torch.ops.surgery, name).default, tuple(arguments))


def wrong(name: str, change: Callable[[Tensor], Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda given: {**given, name: change(given[name])}


BAD: list[tuple[str, Callable[[dict[str, Any]], dict[str, Any]], str]] = [
    ("decode_gqa", wrong("k", lambda t: t[..., :8]), r"decode_gqa: k has shape \[2, 2, 48, 8\], expected \[B, K, S, H"),
    ("decode_gqa", wrong("k", lambda t: t[:1]), r"k has shape \[1, 2, 48, 16\].*B = 2"),
    ("decode_gqa", wrong("v", torch.Tensor.half), "v has dtype torch.float16, expected torch.float32, that of q"),
    ("decode_gqa", wrong("q", torch.Tensor.double), "q has dtype float64, expected bfloat16 or float16 or float32"),
    ("decode_gqa", wrong("q", lambda t: t[:, :3]), "N = 3 heads, expected a multiple of the K = 2"),
    ("decode_gqa", wrong("k", lambda t: t.transpose(2, 3).contiguous().transpose(2, 3)), "k has strides"),
    ("decode_gqa", wrong("lengths", torch.Tensor.long), "lengths has dtype int64, expected int32"),
    ("decode_gqa", wrong("lengths", lambda t: t + 1), "lengths has values from 10 to 49, expected 0 to 48"),
    ("decode_gqa", wrong("lengths", lambda t: t - 10), "lengths has values from -1"),
    ("decode_gqa", lambda g: {**g, "pages": int32([[0], [1]]), "k": g["k"][:, :, :24], "v": g["v"][:, :, :24]},
     "pages of 24 tokens, expected a power of two from 16"),
    ("decode_latent", wrong("cache", lambda t: t.expand(2, 2, 48, 24)), r"cache has shape \[2, 2, 48, 24\]"),
    ("decode_latent", lambda g: {**g, "rank": 25}, "rank is 25, expected 1 to W = 24"),
    ("decode_latent", lambda g: {**g, "q": torch.zeros(2, 4, 640), "cache": torch.zeros(2, 1, 8, 640), "rank": 640},
     "rank is 640; ranks above 512"),
    ("rope_append_", wrong("slots", lambda t: t + 1), "slots has values from 1 to 48, expected -1 to 47"),
    ("rope_append_", lambda g: {**g, "v_cache": None}, "v and v_cache go together"),
    ("rope_append_", lambda g: {**g, "start": 1}, "start = 1 and F = 8 pairs do not lie within H = 16"),
    ("ragged_schedule", lambda g: {**g, "page": 24}, "24 tokens, expected a power of two"),
    ("ragged_schedule", lambda g: {**g, "programs": 0}, "programs is 0"),
    ("decode_ragged", wrong("plan", lambda t: t[:6]), "plan has 6 numbers"),
    ("decode_ragged", wrong("lengths", lambda t: t + 1000), "lengths has values"),
    ("decode_ragged", wrong("pages", torch.Tensor.long), "pages has dtype int64"),
    ("merge_append_", wrong("merge", torch.Tensor.int), "merge has dtype int32, expected bool"),
    ("merge_append_", wrong("lengths", lambda t: t + 1000), "lengths has values"),
    ("compact_", wrong("keep", lambda t: t[..., :16].contiguous()), "keep has S = 16 places"),
    ("decode_quant", lambda g: {**g, "bits": 3}, "bits is 3, expected 2, 4 or 8"),
    ("decode_quant", lambda g: {**g, "bits": 8}, r"k_words has shape \[2, 2, 192, 16\], expected \[B, K, L, 32\]"),
    ("decode_quant", lambda g: {**g, "q": g["q"][..., :48], "k_ring": g["k_ring"][..., :48].contiguous()},
     "width H = 48 in 4 bits: expected a power"),
    ("decode_quant", wrong("v_scale", torch.Tensor.float), "v_scale has dtype float32, expected float16"),
    ("quant_append_", wrong("slots", lambda t: t + 200), "slots has values"),
    ("combine", wrong("lse", lambda t: t[:, :2].contiguous()), r"lse has shape \[2, 2, 4\]"),
    ("combine", lambda g: {**g, "dtype": torch.float64}, "dtype is torch.float64"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "message"), BAD)
def test_wrong_arguments_are_refused_by_name(name: str, change: Any, message: str) -> None:
    on_device(name)
    with pytest.raises(ValueError, match=message):
        getattr(torch.ops.surgery, name)(**change(GOOD[name]()))


def test_tensors_of_two_devices_are_refused() -> None:
    given = gqa()
    with pytest.raises(ValueError, match="k is on meta, expected cpu"):
        module("decode_gqa").decode_gqa_cpu(given["q"], given["k"].to("meta"), given["v"], None, 0.3)


def test_refusals_come_while_compiling() -> None:
    step = torch.compile(lambda q, k, v: on_device("decode_gqa")(q, k, v, None, 0.3)[0], backend="eager")
    with pytest.raises(Exception, match=r"k has shape \[2, 2, 48, 8\]"):
        step(gqa()["q"], gqa()["k"][..., :8], gqa()["v"])


@pytest.mark.parametrize("name", ["decode_gqa", "decode_latent", "decode_ragged", "decode_quant", "rope_append_"])
def test_no_sequences_are_no_work(name: str) -> None:
    on_device(name)
    batch = {"q", "lengths", "slots", "cos", "sin", "k_cache", "v_cache", "pages", "cache", *QUANTISED}
    batch |= {"k", "v"} - ({"k", "v"} if name == "decode_ragged" else set())
    given = {key: t[:0] if isinstance(t, Tensor) and key in batch else t for key, t in GOOD[name]().items()}
    out = getattr(torch.ops.surgery, name)(**given)
    assert (out if isinstance(out, Tensor) else out[0]).shape[0] == 0


def test_few_sequences_on_many_cores_are_read_in_parts() -> None:
    cpu, threads = module("cpu"), torch.get_num_threads()
    q, k, v = (random(1, 1, n, 16, seed=i, **F32) for i, n in enumerate((4, 1601, 1601)))
    want, want_lse = cpu.attend_plainly(q, k, v, 0.3, None)
    torch.set_num_threads(3)
    try:
        assert cpu._chunks(1, 1601) == 3
        out, lse = cpu.attend(q, k, v, 0.3)
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, want_lse)


def test_splits_follow_the_capacity_and_fill_the_device() -> None:
    splits_for, config = module("decode_gqa").splits_for, Config(block_n=64, warps=4, stages=3, ctas_per_sm=2)
    assert splits_for(8, 131072, config, ASSUMED) == 33
    assert splits_for(4 * 132, 32768, config, ASSUMED) == 1
    assert splits_for(1, 256, config, ASSUMED) == 1
    for rows in (1, 8, 100, 128, 300, 527):
        assert 1 <= splits_for(rows, 32768, config, ASSUMED) <= 128


def test_tables_of_launch_parameters_are_whole_and_the_closest_row_wins(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    tables = sorted(tuned.FOLDER.glob("*.json"))
    assert "default.json" in [file.name for file in tables]
    for file in tables:
        rows = json.loads(file.read_text())["rows"]
        assert rows, file.name
        for row in rows:
            assert {"kernel", "where", "config"} <= set(row)
            Config(**row["config"])
    table = {"rows": [
        {"kernel": "x", "where": {}, "config": {"block_n": 1, "warps": 1, "stages": 1, "ctas_per_sm": 1}},
        {"kernel": "x", "where": {"width": 128}, "config": {"block_n": 2, "warps": 1, "stages": 1, "ctas_per_sm": 1}},
    ]}  # fmt: skip
    (tmp_path / "sm_77.json").write_text(json.dumps(table))
    (tmp_path / "default.json").write_text(json.dumps({"rows": [{**table["rows"][0], "kernel": "y"}]}))
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    tuned._table.cache_clear()
    tuned._lookup.cache_clear()
    try:
        assert config_for("x", "sm_77", width=128).block_n == 2
        assert config_for("x", "sm_77", width=64).block_n == 1
        assert config_for("y", "sm_77", width=64).block_n == 1
        with pytest.raises(KeyError, match="no row for z"):
            config_for("z", "sm_77")
    finally:
        tuned._table.cache_clear()
        tuned._lookup.cache_clear()
    assert [bucket(n) for n in (1, 2, 64, 65, 5000)] == [1, 4, 64, 256, 1024]
