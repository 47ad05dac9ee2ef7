"""Cross-layer sharing without training: loss of every layout and init at equal bytes, the parent in the same run.

    python benchmarks/share_quality.py             # all rows, about an hour on one core
    python benchmarks/share_quality.py --resume    # keep the rows that an interrupted run has written

The results are written after every row: an interrupted run keeps what it measured (`complete` is then false).

stories940K: stories 400 onward for evaluation, the first 200 for calibration, lower-cased for the character model,
first 256 tokens each. The bundled model: documents of the reference corpus that it was not trained on; 200 of those
that it was for calibration.

`replace`, `mean`, `kvsharer` and fixed patterns stand for what is published; `best` and `latent` are this library's.
Rows "pairs of best" share the same layers as the search of `best` found, so that only the init differs. No
language-model loss is used but for the gains, two numbers per query head.
"""

from __future__ import annotations

import argparse
import itertools
import json
import lzma
import time
from pathlib import Path
from typing import Any

import torch
from common import ROOT, environment, reference, write
from rich.console import Console
from rich.table import Table

import surgery
from surgery.bundled import SMALL

SEED = 0
BARE = {"refit_queries": False, "refit_output": False, "gain_fit": False}
PATTERN = {"replace": {"init": "replace", **BARE}, "mean": {"init": "mean", **BARE},
           "least_squares": {"init": "least_squares", **BARE}, "best": {"init": "best"},
           "latent": {"init": "latent"}}  # fmt: skip
BUDGETED = {
    "latent + search": {"layout": "search", "init": "latent"},
    "latent + search, closed forms without refits": {"layout": "search", "init": "latent", **BARE},
    "best + search": {"layout": "search", "init": "best"},
    "best + search, without refits": {"layout": "search", "init": "best", **BARE},
    "kvsharer": {"layout": "kvsharer", "init": "replace", **BARE},
    "pattern (CLA/MLKV), replace": {"layout": "mlkv", "init": "replace", **BARE},
    "pattern (CLA/MLKV), mean": {"layout": "mlkv", "init": "mean", **BARE},
    "pizza-bottom, replace": {"layout": "pizza-bottom", "init": "replace", **BARE},
    "sandwich-bottom, replace": {"layout": "sandwich-bottom", "init": "replace", **BARE},
}
SAME_PAIRS = {"pairs of best, replace": PATTERN["replace"], "pairs of best, mean": PATTERN["mean"],
              "pairs of best, least_squares": PATTERN["least_squares"]}  # fmt: skip
DECODED = ("latent + search", "cla2, latent")
"""Rows that are also scored token by token through the cache, on 40 documents: nothing is lost there."""


def texts_of(name: str) -> tuple[Any, list[str], list[str]]:
    """The model in float32, texts to calibrate on and to evaluate on."""
    if name == "small":
        train, valid = (_corpus(reference("corpus", f"{part}.jsonl.xz"), 200) for part in ("train", "valid"))
        return surgery.load(SMALL).float(), train, valid
    lines = reference("text", "tinystories-917.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"].lower() for line in lines]
    return surgery.load(reference("checkpoints", name)).float(), texts[:200], texts[400:]


def rows_of(name: str) -> list[tuple[str, int | None, dict[str, Any]]]:
    """(label, layers that keep a cache, step); those of `SAME_PAIRS` get their layout from the row of best + search."""
    fixed = [(f"cla2, {init}", None, {"layout": "cla2", **step}) for init, step in PATTERN.items()]
    return fixed + [
        (label, kv_layers, step | ({} if label in SAME_PAIRS else {"kv_layers": kv_layers}))
        for kv_layers in (3, 4)
        for label, step in (BUDGETED | SAME_PAIRS).items()
    ]


def measure(name: str, known: list[dict[str, Any]], save: Any) -> dict[str, Any]:
    parent, calibration, held_out = texts_of(name)
    found: dict[str, Any] = {"rows": []}
    for label, kv_layers, step in rows_of(name):
        row = next((r for r in known if (r["name"], r["kv_layers"]) == (label, kv_layers)), None)
        if row is None:
            if label in SAME_PAIRS:
                best = next(r for r in found["rows"] if (r["name"], r["kv_layers"]) == ("best + search", kv_layers))
                step = step | {"layout": {i: o for i, o in enumerate(best["owners"]) if i != o}}
            begun = time.monotonic()
            recipe = {"steps": [{"rewriter": "share", **step}]}
            child = surgery.convert(parent, recipe, calibration=calibration, length=256, seed=SEED)
            seconds = time.monotonic() - begun
            report = surgery.evaluate(child, baseline=parent, text=held_out, length=256, path="prefill")
            assert report.baseline is not None
            found |= {"parent": report.baseline.nats_per_token, "text": report.text_digest, "tokens": report.tokens}
            row = {
                "name": label,
                "kv_layers": kv_layers,
                "owners": [layer["plan"]["owner"] for layer in child.config.surgery["layers"]],
                "nats_per_token": report.model.nats_per_token,
                "gap": report.gap,
                "kl": report.kl,
                "kv_bytes_per_token": report.model.kv_bytes_per_token,
                "parent_kv_bytes_per_token": report.baseline.kv_bytes_per_token,
                "parameters": sum(p.numel() for p in child.parameters()),
                "seconds": seconds,
            }
            if label in DECODED and kv_layers in (None, 3):
                decoded = surgery.evaluate(child, baseline=parent, text=held_out[:40], length=256, path="both")
                row["cache_gap"] = decoded.model.cache_gap
            line = f"{name}, {label}, {kv_layers}: {row['nats_per_token']:.4f}, {row['owners']}, {seconds:.0f} s"
            print(line, flush=True)  # noqa: T201
        found["rows"].append(row)
        save(found)
    return found


def _corpus(path: Path, documents: int) -> list[str]:
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in itertools.islice(lines, documents)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resume", action="store_true")
    resume = parser.parse_args().resume
    torch.manual_seed(SEED)
    path = ROOT / "benchmarks" / "results" / "share_quality.json"
    old = json.loads(path.read_text())["results"] if resume and path.is_file() else {}
    results: dict[str, Any] = dict(old)
    data = {**environment(SEED), "complete": False, "results": results}
    for name in ("stories940K-tok105-hf", "small"):
        base = {k: v for k, v in old.get(name, {}).items() if k != "rows"}

        def save(found: dict[str, Any], name: str = name, base: dict[str, Any] = base) -> None:
            results[name] = base | found
            write("share_quality", data)

        measure(name, old.get(name, {}).get("rows", []), save)
    write("share_quality", {**data, "complete": True})
    console = Console(width=100)
    for name, result in results.items():
        table = Table(title=f"{name}, parent {result['parent']:.4f} nats/token, no training")
        for column in ("sharing", "owners", "nats/token", "gap", "KL", "bytes/token", "s"):
            table.add_column(column, justify="left" if column in ("sharing", "owners") else "right")
        for row in result["rows"]:
            numbers = [f"{row[key]:.4f}" for key in ("nats_per_token", "gap", "kl")]
            size = f"{row['kv_bytes_per_token']:.0f}"
            owners = " ".join(map(str, row["owners"]))
            table.add_row(row["name"], owners, *numbers, size, f"{row['seconds']:.0f}")
        console.print(table)


if __name__ == "__main__":
    main()
