"""Whole decode steps by cache layout; writes results/decode_<device>.json.

python benchmarks/gpu_decode.py [--seconds 540] [--shape llama-3-8b]    on a GPU: run again until nothing is left
python benchmarks/gpu_decode.py --cpu                                   small shapes, to know that the script works

The same loop as `surgery bench decode`: compiled, static caches, random weights of the real shape.
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
from rich.console import Console

from surgery.measure.decode_bench import DecodeBench, Row, decode

SEED = 0


def recipe(name: str, *steps: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "steps": list(steps)}


def gqa(kv_heads: int) -> dict[str, Any]:
    return {"rewriter": "gqa", "kv_heads": kv_heads}


def mla(rank: int, rope_dims: int) -> dict[str, Any]:
    return {"rewriter": "mla", "rank": rank, "rope_dims": rope_dims}


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=540, help="begin no cell after that")
    parser.add_argument("--shape", action="append", help="default llama-3-8b and llama-2-7b")
    parser.add_argument("--cpu", action="store_true")
    options = parser.parse_args()
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
