"""How long `surgery inspect` and `surgery plan` take, the first time and again, beside another build in the same run.

    python benchmarks/inspect_time.py MODEL --base DIR

MODEL is the folder of a checkpoint, DIR a checkout of the other build. Every call is a process of its own; each pair of
a first and a second call begins with an empty cache, and builds take turns. `imports` is what the libraries below take
alone: a process that imports the model's class from transformers, and does nothing. Medians and least, in seconds; the
processor's are those of user and system together.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from common import ROOT, environment, write

COMMANDS = {"inspect": [], "plan": ["-r", "mla-2x"]}
SETTINGS = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def timed(arguments: list[str], tree: Path, cache: str) -> dict[str, float]:
    """Wall and processor seconds of one Python process that sees the library in `tree`."""
    settings = {name: value for name, value in os.environ.items() if name != "SURGERY_CACHE"}
    settings |= {**SETTINGS, "PYTHONPATH": str(tree), "HF_HOME": cache}
    begun = time.monotonic()
    process = subprocess.Popen([sys.executable, *arguments], cwd=tree, env=settings, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    wall = time.monotonic() - begun
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(arguments)} in {tree} ended with {process.returncode}.")
    return {"wall": wall, "processor": used.ru_utime + used.ru_stime}


def summary(runs: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Median and least of the runs, by kind of seconds."""
    columns = {kind: [run[kind] for run in runs] for kind in ("wall", "processor")}
    return {kind: {"median": round(statistics.median(x), 2), "least": round(min(x), 2)} for kind, x in columns.items()}


def main(
    model: Annotated[Path, typer.Argument(help="Folder of a checkpoint.", exists=True)],
    base: Annotated[Path, typer.Option(help="Checkout of the other build.", exists=True)],
    repeats: Annotated[int, typer.Option(min=1, help="Pairs of calls of each command and build.")] = 5,
) -> None:
    """Measure both builds in turn, and write results/inspect_time.json."""
    (kind,) = json.loads((model / "config.json").read_text())["architectures"]
    trees = {"base": base.resolve(), "here": ROOT.resolve()}
    runs: dict[tuple[str, ...], list[dict[str, float]]] = {}
    for repeat in range(repeats + 1):
        taken: list[tuple[tuple[str, ...], dict[str, float]]] = []
        with tempfile.TemporaryDirectory() as cache:
            taken.append((("imports",), timed(["-c", f"from transformers import {kind}"], trees["here"], cache)))
        for command, options in COMMANDS.items():
            arguments = ["-m", "surgery", command, str(model.resolve()), *options]
            for build, tree in trees.items():
                with tempfile.TemporaryDirectory() as cache:
                    for call in ("first", "second"):
                        taken.append(((build, command, call), timed(arguments, tree, cache)))
        for key, seconds in taken if repeat else ():  # the first round only fills the caches of the system
            runs.setdefault(key, []).append(seconds)
    result: dict[str, Any] = {"imports": summary(runs.pop(("imports",)))}
    for (build, command, call), found in runs.items():
        result.setdefault(build, {}).setdefault(command, {})[call] = summary(found)
    revision = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=base)
    data = {
        "model": model.name,
        "layers": json.loads((model / "config.json").read_text()).get("num_hidden_layers"),
        "options": COMMANDS,
        "threads_of_each_call": 1,
        "repeats": repeats,
        "base_commit": revision.stdout.strip(),
        "seconds": result,
    }
    write("inspect_time", {**environment(seed=0), **data})
    print(json.dumps(result, indent=2))  # noqa: T201


if __name__ == "__main__":
    typer.run(main)
