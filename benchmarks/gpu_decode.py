"""Whole decode steps by cache layout; writes results/decode_<device>.json.

python benchmarks/gpu_decode.py [--seconds 540] [--shape llama-3-8b]    on a GPU: run again until nothing is left
python benchmarks/gpu_decode.py --session                               what matters most, for `gpu_session.sh`
python benchmarks/gpu_decode.py --cpu                                   small shapes, to know that the script works
python benchmarks/gpu_decode.py --session --rehearse                    the same on a CPU; writes nothing

The same loop as `surgery bench decode`: compiled, static caches, random weights of the real shape. It has no quantised
or evicting caches: `--session` also times whole models of transformers with those, their step compiled, beside the
parent's.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from typing import Any

import torch
from common import ROOT, environment, write
from cpu_decode import cache_for, prefilled
from retain_decode import child as with_gates
from rich.console import Console
from transformers import LlamaForCausalLM, PreTrainedModel

import surgery
from surgery.measure.decode_bench import DecodeBench, Row, build, decode, greedy_step, time_steps
from surgery.measure.decode_layouts import SHAPES
from surgery.measure.memory import tensor_bytes

SEED = 0


def recipe(name: str, *steps: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "steps": list(steps)}


def gqa(kv_heads: int) -> dict[str, Any]:
    return {"rewriter": "gqa", "kv_heads": kv_heads}


def mla(rank: int, rope_dims: int) -> dict[str, Any]:
    return {"rewriter": "mla", "rank": rank, "rope_dims": rope_dims}


RATIO = 4.0
SHARE: dict[str, Any] = {"rewriter": "share", "layout": "cla2"}
BASE, MQA, CLA = recipe("base", {"rewriter": "identity"}), recipe("mqa", gqa(1)), recipe("base+cla-2", SHARE)
RECIPES = (
    BASE,
    recipe("gqa-8", gqa(8)),
    recipe("gqa-4", gqa(4)),
    MQA,
    recipe("mla-512-64", mla(512, 64)),
    recipe("mla-256-64", mla(256, 64)),
    CLA,
    recipe("gqa-8+cla-2", gqa(8), SHARE),
)


def whole(shape: str, batch: int, context: int, device: str, dtype: torch.dtype, steps: int) -> list[dict[str, Any]]:
    """Steps of whole models with random weights over static caches: the parent, int4, and a quarter of the tokens.

    The prompt is random. dms has random gates that keep a quarter of it, in windows of a sixteenth, at most 256.
    """
    torch.manual_seed(SEED)
    config = SHAPES[shape].config(dtype, positions=2 * context)
    parent: PreTrainedModel = build(lambda: LlamaForCausalLM(config), dtype, torch.device(device))
    ids = torch.randint(config.vocab_size, (1, context), device=device)
    codes = {"rewriter": "quantise", "codec": "kivi", "k_bits": 4}
    gates = {"rewriter": "dms", "ratio": RATIO, "window": min(256, context // 16)}
    makers: dict[str, tuple[str, Any]] = {
        "parent": ("sdpa", lambda: parent),
        "int4": ("surgery", lambda: surgery.convert(parent, {"steps": [codes]}).eval()),
        "dms-4x": ("surgery", lambda: with_gates(parent, gates, ids)),
    }
    rows = []
    for name, (attention, make) in makers.items():
        row: dict[str, Any] = {"variant": name, "attention": attention, "batch": batch, "context": context}
        try:
            model = make()
            cache, _ = prefilled(model, ids.expand(batch, -1), cache_for(model, "static", context + 64))
            model.set_attn_implementation(attention)
            step = greedy_step(model, cache, batch, context)
            seconds = time_steps(step, torch.zeros(batch, dtype=torch.long, device=device), steps, True)
            row |= {"tokens_per_s": batch / seconds, "cache_bytes": tensor_bytes(cache)}
            row["over_parent"] = row["tokens_per_s"] / rows[0]["tokens_per_s"] if rows else 1.0
            del cache, step
        except Exception as error:  # the other rows are worth having
            row["failed"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
        rows.append(row)
        model = None
        if device == "cuda":
            torch.cuda.empty_cache()
        print(json.dumps(row), flush=True)  # noqa: T201
    return rows


def session(rehearse: bool, seconds: float) -> None:
    """Whole steps of an 8B shape: heads and latents in our loop beside transformers', codes and evicted tokens beside
    the parent's model."""
    device, dtype = ("cpu", torch.float32) if rehearse else ("cuda", torch.bfloat16)
    shape, contexts, batches = ("small", [256], (1, 2)) if rehearse else ("llama-3-8b", [8192], (1, 16))
    recipes = (
        [BASE, recipe("mqa", gqa(1))] if rehearse else [BASE, recipe("gqa-4x", gqa(2)), recipe("mla-4x", mla(448, 64))]
    )
    name = "decode_session"
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    data: dict[str, Any] = {**environment(SEED), "shape": shape, "loop": [], "whole": []}
    if path.exists() and not rehearse:
        data = json.loads(path.read_text())
    started = time.time()

    def keep() -> None:
        if not rehearse:
            write(name, data)

    for batch in batches:
        if any(row["batch"] == batch and "failed" not in row for row in data["whole"]):
            continue
        if time.time() - started < seconds:
            # Prompts are computed in one pass, which is what limits the sequences of a whole model.
            data["whole"] += whole(shape, min(batch, 4), contexts[0], device, dtype, 4 if rehearse else 32)
            keep()
    for batch in batches:
        for made in recipes:
            if any((r["variant"], r["batch"]) == (made["name"], batch) for r in data["loop"]):
                continue
            if time.time() - started > seconds:
                continue
            bench = decode(
                shape, [made], batches=[batch], contexts=contexts, dtype=str(dtype).removeprefix("torch."),
                device=device, steps=4 if rehearse else 32, layers=2 if rehearse else None,
            )  # fmt: skip
            data["loop"].append(bench.rows[0].to_dict())
            keep()
            Console(width=140).print(*bench.tables())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=540, help="begin no cell after that")
    parser.add_argument("--shape", action="append", help="default llama-3-8b and llama-2-7b")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--session", action="store_true", help="what matters most, of an 8B shape")
    parser.add_argument("--rehearse", action="store_true", help="with --session: tiny shapes of a CPU; writes nothing")
    options = parser.parse_args()
    if options.session and (options.rehearse or torch.cuda.is_available()):
        session(options.rehearse, options.seconds * (10 if options.rehearse else 1))
        return
    if not options.cpu and not torch.cuda.is_available():
        sys.exit("There is no GPU here, so nothing was measured; --cpu runs small shapes.")
    torch.manual_seed(SEED)
    if options.cpu:
        bench = decode(
            "small", [BASE, recipe("gqa-2", gqa(2)), MQA, recipe("mla-128-32", mla(128, 32)), CLA],
            batches=[1, 4], contexts=[8192], layers=2,
            dtype="float32", device="cpu", steps=15,
        )  # fmt: skip
        write("decode_cpu", {**environment(SEED), **bench.to_dict()})
        Console(width=140).print(*bench.tables())
        return
    started, left = time.time(), 0
    device = re.sub(r"\W+", "_", torch.cuda.get_device_name()).lower()
    path = ROOT / "benchmarks" / "results" / f"decode_{device}.json"
    data: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {**environment(SEED), "rows": []}
    done = {(r["shape"], r["variant"], r["batch"], r["context"]) for r in data["rows"]}
    shown: dict[str, tuple[DecodeBench, list[Row]]] = {}
    for shape in options.shape or ["llama-3-8b", "llama-2-7b"]:
        for context in (4096, 32768):
            for batch in (1, 16, 64):
                for layout in RECIPES:
                    if (shape, layout["name"], batch, context) in done:
                        continue
                    if time.time() - started > options.seconds:
                        left += 1
                        continue
                    bench = decode(shape, [layout], batches=[batch], contexts=[context])
                    shown.setdefault(shape, (bench, []))[1].extend(bench.rows)
                    about = {"shape": shape, "bandwidth_gb_per_s": bench.bandwidth_gb_per_s, "dtype": bench.dtype}
                    data["rows"].append({**about, **bench.rows[0].to_dict()})
                    write(path.stem, data)
                    torch.cuda.empty_cache()
    for bench, rows in shown.values():
        whole = DecodeBench(**{**vars(bench), "rows": tuple(rows)})
        Console(width=140).print(*whole.tables())
    Console().print(f"{left} cells are left: run again." if left else "Nothing is left.")


if __name__ == "__main__":
    main()
