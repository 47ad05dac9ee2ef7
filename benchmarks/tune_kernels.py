"""Launch parameters: gates for those in use, pruning of the space without a GPU, choice on one.

python benchmarks/tune_kernels.py --table [--arch sm_90] [--shape "gqa 32/8"]   gates of every shape as it is launched
python benchmarks/tune_kernels.py --prune [--arch sm_90] [--shape "gqa 32/8"]   what of the space passes the gates
python benchmarks/tune_kernels.py [--seconds 540]                               time that, write configs/<arch>.json

The last form alone needs a GPU; it resumes, and begins no shape after `--seconds`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from common import ROOT
from gpu_kernels import COLD, Problem, graph_ms, heads, latents, unequal, words
from rich.console import Console
from rich.table import Table

from surgery.kernels import aot, tuned
from surgery.kernels.launching import device_of, power_of_two, triton
from surgery.kernels.shapes import SHAPES, failures, launches
from surgery.kernels.tuned import Config, bucket

SPACE = {"block_n": (16, 32, 64, 128), "warps": (2, 4, 8), "stages": (2, 3, 4, 5), "ctas_per_sm": (1, 2, 4)}
TUNED = {
    "decode_gqa_kernel": "decode_gqa", "decode_latent_kernel": "decode_latent",
    "decode_ragged_kernel": "decode_ragged", "decode_quant_kernel": "decode_quant",
}  # fmt: skip


def table(archs: list[str], shapes: list[str]) -> None:
    """Print the gates of every launch; exit with 1 where one fails."""
    shown = Table(title=f"machine code, Triton {triton.__version__}")
    for column in (
        "shape", "kernel", "arch", "grid", "registers", "spills B", "shared B", "16-byte copies", "narrow", "matrix",
        "loop", "CTAs/SM", "fails",
    ):  # fmt: skip
        shown.add_column(column)
    failed = False
    for name, arch in itertools.product(shapes, archs):
        for launch in launches(name, aot.DEVICES[arch]):
            found = aot.gates(launch, arch)
            fails = failures(name, found)
            failed = failed or bool(fails)
            shown.add_row(
                name, found.kernel.removesuffix("_kernel"), arch, "x".join(map(str, launch.grid)), str(found.registers),
                str(found.spills), str(found.shared), str(found.copies_128), str(found.loads_narrow), found.mma,
                str(found.instructions), str(found.ctas_per_sm), ", ".join(fails),
            )  # fmt: skip
    Console(width=170).print(shown)
    sys.exit(int(failed))


def compiling(name: str, arch: str) -> Iterator[tuple[str, Config, aot.Gates]]:
    """Configs of the shape's main kernel that pass the gates, with as many programs per multiprocessor as fit."""
    device = aot.DEVICES[arch]
    kernel = next((TUNED[x.kernel.__name__] for x in launches(name, device) if x.kernel.__name__ in TUNED), None)
    if kernel is None:
        return
    for block_n, warps, stages in itertools.product(SPACE["block_n"], SPACE["warps"], SPACE["stages"]):
        tuned.force(kernel, Config(block_n=block_n, warps=warps, stages=stages, ctas_per_sm=1))
        try:
            main = next(x for x in launches(name, device) if TUNED.get(x.kernel.__name__) == kernel)
            found = aot.gates(main, arch)
        except Exception as error:  # the compiler refuses some of the space, each in its own way
            Console(stderr=True).print(f"{name} {block_n}/{warps}/{stages}: {type(error).__name__}", style="dim")
            continue
        finally:
            tuned.force(kernel, None)
        if not failures(name, found):
            for ctas in SPACE["ctas_per_sm"]:
                if ctas <= found.ctas_per_sm:
                    yield kernel, Config(block_n=block_n, warps=warps, stages=stages, ctas_per_sm=ctas), found


def prune(arch: str, shapes: list[str]) -> None:
    """Print what is left of the space."""
    shown = Table(title=f"configs that pass on {arch}")
    for column in ("shape", "block_n", "warps", "stages", "CTAs/SM", "registers", "shared B", "loop"):
        shown.add_column(column)
    for name in shapes:
        for _, config, found in compiling(name, arch):
            shown.add_row(
                name, str(config.block_n), str(config.warps), str(config.stages), str(config.ctas_per_sm),
                str(found.registers), str(found.shared), str(found.instructions),
            )  # fmt: skip
    Console(width=120).print(shown)


def tuning_problems() -> dict[str, tuple[str, dict[str, Any], Any]]:
    """Name -> (shape whose gates hold for it, key in the table, maker)."""
    made: dict[str, tuple[str, dict[str, Any], Any]] = {}
    half, gqa = torch.bfloat16, {"dtype": "bfloat16", "width": 128}
    for B, S in ((1, 32768), (16, 32768), (64, 4096)):
        for K, shape in ((8, "gqa 32/8"), (32, "mha 32"), (1, "mqa 32")):
            key = {**gqa, "block_m": max(16, power_of_two(32 // K)), "rows": bucket(B * K), "paged": False}
            S_fits = min(S, 2**22 // (B * K))
            made[f"{shape} b{B}"] = shape, key, lambda d, B=B, K=K, S=S_fits: heads(d, B, 32, K, S, 128, half)
        key = {"dtype": "bfloat16", "width": 512, "block_m": 32, "rows": bucket(B)}
        made[f"latent b{B}"] = "latent 32 x 512+64", key, lambda d, B=B, S=S: latents(d, B, 32, S, 512, 64, half)
        for bits in (8, 4, 2):
            key = {**gqa, "bits": bits, "block_m": 16, "rows": bucket(8 * B)}
            name = f"int{bits} 32/8"
            made[f"{name} b{B}"] = name, key, lambda d, B=B, S=S, b=bits: words(d, B, 32, 8, S, 128, b, half)
        key = {**gqa, "block_m": 16, "rows": bucket(8 * B)}
        made[f"ragged b{B}"] = "ragged 32/8", key, lambda d, B=B, S=S: unequal(d, B, 32, 8, S, 128, half)
    return made


def choose(seconds: float) -> None:
    """Time every config that compiles well, and write the fastest of each shape into configs/<arch>.json."""
    started, dev = time.time(), torch.device("cuda")
    arch = device_of(torch.empty(1, device=dev)).arch
    path = ROOT / "kernels" / "configs" / f"{arch}.json"
    data: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rows": []}
    left = 0
    for name, (shape, key, make) in tuning_problems().items():
        if any(row.get("tuned") == name for row in data["rows"]):
            continue
        if time.time() - started > seconds:
            left += 1
            continue
        torch.manual_seed(0)
        first: Problem = make(dev)
        sets = [first, *(make(dev) for _ in range(min(63, max(1, -(-COLD // first.live_bytes)) - 1)))]
        best: tuple[float, Config] | None = None
        kernel = ""
        for kernel, config, _ in compiling(shape, arch):
            tuned.force(kernel, config)
            try:
                ms, _ = graph_ms([problem.ours for problem in sets], True)
            except Exception as error:
                Console(stderr=True).print(f"{name} {config}: {type(error).__name__}: {str(error)[:120]}", style="dim")
                continue
            finally:
                tuned.force(kernel, None)
            if best is None or ms < best[0]:
                best = ms, config
        if best is None:
            continue
        speed = first.live_bytes / best[0] / 1e6
        Console().print(f"{name}: {vars(best[1])}, {1e3 * best[0]:.1f} us, {speed:.0f} GB/s")
        data["rows"].append({"kernel": kernel, "where": key, "config": vars(best[1]), "tuned": name})
        path.write_text(json.dumps(data, indent=1) + "\n")
        del first, sets
        torch.cuda.empty_cache()
    Console().print(f"{left} shapes are left: run again." if left else "Nothing is left.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--prune", action="store_true")
    parser.add_argument("--arch", action="append", choices=list(aot.DEVICES))
    parser.add_argument("--shape", action="append", choices=list(SHAPES))
    parser.add_argument("--seconds", type=float, default=540)
    options = parser.parse_args()
    if triton is None:
        sys.exit("Triton is not installed, and compiles the kernels: pip install 'triton>=3.6'")
    shapes = options.shape or list(SHAPES)
    if options.table:
        table(options.arch or list(aot.DEVICES), shapes)
    elif options.prune:
        prune((options.arch or ["sm_90"])[0], shapes)
    elif torch.cuda.is_available():
        choose(options.seconds)
    else:
        sys.exit("There is no GPU here, so nothing can be timed; --table and --prune compile without one.")


if __name__ == "__main__":
    main()
