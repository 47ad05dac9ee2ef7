"""GQA without training: loss of every init on real checkpoints, the parent and mean pooling in the same run.

    python benchmarks/gqa_quality.py            # all rows, about 30 minutes on one core
    python benchmarks/gqa_quality.py --fast     # the oracle and the main rows

The results are written after every row: an interrupted run keeps what it measured (`complete` is then false).

Text: stories 400 onward for evaluation, the first 200 for calibration, lower-cased for the character model, first 256
tokens each.

The default refits every row of q_proj (to the parent's attention scores) and o_proj (to its output) in closed form on
calibration text. No language-model loss is used but for the gains, one number per query head; the rows without refits
say what pooling alone does.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from typing import Any

import torch
from common import environment, reference, write
from rich.console import Console
from rich.table import Table

import surgery

SEED = 0
CLOSED = {"refit_queries": False, "refit_output": False, "gain_fit": False}
PLAIN = {"grouping": "neighbour", **CLOSED}
ROWS: dict[str, dict[str, Any]] = {
    "mean (published)": {"init": "mean", **PLAIN},
    "sqrt_g": {"init": "sqrt_g", **PLAIN},
    "first": {"init": "first", **PLAIN},
    "random": {"init": "random", **PLAIN},
    "weighted": {"init": "weighted", **PLAIN},
    "key_norm": {"init": "key_norm", **CLOSED},
    "asym (unequal groups)": {"init": "asym", **CLOSED, "equal_groups": False},
    "qcqa (unequal groups)": {"init": "qcqa", **CLOSED, "equal_groups": False},
    "dha": {"init": "dha", **PLAIN},
    "aligned": {"init": "aligned", **PLAIN, "renorm": False},
    "aligned + renorm": {"init": "aligned", **PLAIN},
    "aligned + renorm + search": {"init": "aligned", **PLAIN, "grouping": "search"},
    "rank1": {"init": "rank1", **PLAIN},
    "rank1 + search": {"init": "rank1", **PLAIN, "grouping": "search"},
    "rank1 + search + gain": {"init": "rank1", **PLAIN, "grouping": "search", "gain_fit": True},
    "rank1 + search + output refit": {"init": "rank1", **PLAIN, "grouping": "search", "refit_output": True},
    "default (all of it)": {"init": "rank1"},
}
DEFAULT = "default (all of it)"
ORACLE = ("mean (published)", "rank1 + search", DEFAULT)
FAST = (
    "mean (published)",
    "aligned + renorm",
    "rank1",
    "rank1 + search",
    "rank1 + search + gain",
    DEFAULT,
)


def stories(lower: bool) -> list[str]:
    lines = reference("text", "tinystories-917.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    return [text.lower() for text in texts] if lower else texts


def measure(name: str, kv_heads: tuple[int, ...], lower: bool, rows: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """All that is known so far, after each row."""
    parent = surgery.load(reference("checkpoints", name)).float()
    texts = stories(lower)
    found: dict[str, Any] = {"rows": []}
    for heads in kv_heads:
        for label in rows:
            begun = time.monotonic()
            recipe = {"steps": [{"rewriter": "gqa", "kv_heads": heads, **ROWS[label]}]}
            try:
                child = surgery.convert(parent, recipe, calibration=texts[:200], length=256, seed=SEED)
            except surgery.SurgeryError as error:
                found["rows"].append({"kv_heads": heads, "init": label, "refused": str(error)})
                yield found
                continue
            seconds = time.monotonic() - begun
            # A cache of fewer heads loses nothing, so decoding gives the same numbers: shown where it matters most.
            path = "both" if label == DEFAULT else "prefill"
            report = surgery.evaluate(child, baseline=parent, text=texts[400:], length=256, path=path)
            assert report.baseline is not None
            found |= {"parent": report.baseline.nats_per_token, "text": report.text_digest, "tokens": report.tokens}
            row = {"kv_heads": heads, "init": label, "nats_per_token": report.model.nats_per_token, "gap": report.gap}
            row |= {
                "cache_gap": report.model.cache_gap,
                "kl": report.kl,
                "kv_bytes_per_token": report.model.kv_bytes_per_token,
                "seconds": seconds,
            }
            found["rows"].append(row)
            print(name, label, heads, round(report.model.nats_per_token, 4), f"{seconds:.0f} s", flush=True)  # noqa: T201
            yield found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true")
    fast = parser.parse_args().fast
    torch.manual_seed(SEED)
    runs: dict[str, tuple[tuple[int, ...], bool, tuple[str, ...]]] = {
        "stories260K-mha-hf": ((4,), False, ORACLE),
        "stories940K-tok105-hf": ((2, 1), True, FAST if fast else tuple(ROWS)),
    }
    results: dict[str, dict[str, Any]] = {}
    data = {**environment(SEED), "rows": "main" if fast else "all", "complete": False, "results": results}
    for name, run in runs.items():
        for found in measure(name, *run):
            results[name] = found
            write("gqa_quality", data)
    write("gqa_quality", {**data, "complete": True})
    console = Console(width=100)
    for name, result in results.items():
        table = Table(title=f"{name}, parent {result['parent']:.4f} nats/token, no training")
        for column in ("KV heads", "init", "nats/token", "gap", "KL", "s"):
            table.add_column(column, justify="left" if column == "init" else "right")
        for row in result["rows"]:
            if "refused" in row:
                table.add_row(str(row["kv_heads"]), row["init"], "refused", "", "", "")
                continue
            numbers = [f"{row[key]:.4f}" for key in ("nats_per_token", "gap", "kl")]
            table.add_row(str(row["kv_heads"]), row["init"], *numbers, f"{row['seconds']:.0f}")
        console.print(table)


if __name__ == "__main__":
    main()
