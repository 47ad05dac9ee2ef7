"""Requests per second of concurrent clients of vLLM's HTTP server, and the tokens that its cache holds: SmolLM2.

    SURGERY_VLLM_PYTHON=.venv-vllm/bin/python python benchmarks/vllm_serving.py --model FOLDER
    python benchmarks/vllm_serving.py --model FOLDER --only cla2-latent   # and the parent, with which it is compared
    python benchmarks/vllm_serving.py --tiny                              # the same code on the bundled model

`--model` is a ready checkpoint; without it `smollm2.py` restores one, from a package. Children are converted with
little text: how fast they are does not depend on what they answer. One server at a time holds one model, all with the
same `VLLM_CPU_KVCACHE_SPACE`; 16 clients send prompts of WikiText-2 and wait for the answer, of fixed length, before
they send the next one. The parent is served first and once more at last, for a machine that is slow at times; the ratio
is to the better of both. `cache_tokens` is what the server's log says; the goal for requests is the parent's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import socket
import subprocess
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import calibration_text, environment, file_digest, measured_on, reference, write
from rich.console import Console
from rich.table import Table
from smollm2 import restore

import surgery
from surgery.bundled import SMALL
from surgery.calibration.text import load_tokenizer
from surgery.serve.engine import Engine

SEED, CLIENTS, SPACE = 0, 16, 1
GOALS = {"cla2-latent": {"tokens": 1.95, "requests": 1.0}, "mla-4x": {"tokens": 3.5, "requests": 1.0}}
CHILDREN: dict[str, Any] = {
    "cla2": "cla2",
    "cla2-latent": "cla2-latent",
    "mla-4x": "mla-4x",
    "fp8": {"steps": [{"rewriter": "quantise", "codec": "fp8", "sinks": 0, "recent": 0}]},
}
"""Name -> what it is converted with."""


class Bench:
    """The parent, its children, and how they are asked."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.engine = Engine.find()
        self.folder: Path = arguments.folder.resolve() / ("tiny" if arguments.tiny else "full")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.dtype: str = arguments.dtype
        self.requests, self.prompt, self.new = (32, 24, 8) if arguments.tiny else (96, 256, 64)
        self.model: Path = SMALL if arguments.tiny else (arguments.model or arguments.folder / "smollm2").resolve()
        if not (self.model / "config.json").is_file():
            restore(self.model)
        held_out = reference("text", "wikitext2-test.txt")
        self.text = file_digest(held_out)
        ids = load_tokenizer(self.model)(held_out.read_text()[: 8 * self.prompt * (self.requests + CLIENTS)])[
            "input_ids"
        ]
        self.prompts = [ids[i * self.prompt :][: self.prompt] for i in range(self.requests + CLIENTS)]

    def child(self, name: str) -> Path:
        """The converted checkpoint; made once."""
        out = self.folder / name
        if not out.is_dir():
            text = {"calibration": str(calibration_text(self.folder)), "samples": 4, "length": 128}
            surgery.convert_checkpoint(self.model, CHILDREN[name], out, seed=SEED, **text)
        return out

    def measure(self, folder: Path) -> dict[str, Any]:
        """Serve a model, let the clients ask, and read the log."""
        with self.server(folder) as (url, log):
            self.ask(url, self.prompts[:CLIENTS])  # what a first request compiles and allocates
            begun = time.monotonic()
            tokens = self.ask(url, self.prompts[CLIENTS:])
            seconds = time.monotonic() - begun
            said = re.search(r"KV cache size: ([\d,]+) tokens", log.read_text())
        if tokens != self.requests * self.new:
            raise SystemExit(f"{folder.name}: {tokens} tokens came back, not {self.requests * self.new}")
        if said is None:
            raise SystemExit(f"{folder.name}: the server's log names no tokens of its cache")
        return {
            "cache_tokens": int(said[1].replace(",", "")),
            "requests_per_second": self.requests / seconds,
            "tokens_per_second": tokens / seconds,
            "seconds": round(seconds, 1),
            **measured_on(),
        }

    def ask(self, url: str, prompts: list[list[int]]) -> int:
        """Let the clients send all prompts; the number of tokens that came back."""
        waiting, answered, lock, failed = list(prompts), [0], threading.Lock(), []

        def client() -> None:
            while True:
                with lock:
                    if not waiting or failed:
                        return
                    prompt = waiting.pop()
                body = {"model": "m", "prompt": prompt, "max_tokens": self.new, "temperature": 0, "ignore_eos": True}
                try:
                    request = urllib.request.Request(
                        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
                    )
                    with urllib.request.urlopen(request, timeout=600) as response:
                        found = json.load(response)["usage"]["completion_tokens"]
                except OSError as error:
                    failed.append(error)
                    return
                with lock:
                    answered[0] += found

        threads = [threading.Thread(target=client) for _ in range(CLIENTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failed:
            raise SystemExit(f"the server did not answer: {failed[0]}")
        return answered[0]

    @contextlib.contextmanager
    def server(self, folder: Path) -> Iterator[tuple[str, Path]]:
        """Its address and its log, from when it is ready."""
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        log, url = self.folder / "serve.log", f"http://127.0.0.1:{port}"
        command = [
            self.engine.python, "-P", "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--port",
            str(port), "--host", "127.0.0.1", "--served-model-name", "m", "--dtype", self.dtype, "--enforce-eager",
            "--max-model-len", str(2 * (self.prompt + self.new)), "--no-enable-prefix-caching",
        ]  # fmt: skip
        settings = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": str(SPACE), "HF_HUB_OFFLINE": "1"}
        with log.open("w") as out:
            process = subprocess.Popen(command, stdout=out, stderr=out, env=settings, cwd=self.folder)
            try:
                deadline = time.monotonic() + 600
                while not _is_ready(url):
                    if process.poll() is not None or time.monotonic() > deadline:
                        raise SystemExit(f"the server of {folder} did not start:\n{log.read_text()[-2000:]}")
                    time.sleep(0.5)
                yield url, log
            finally:
                process.terminate()
                try:
                    process.wait(60)
                except subprocess.TimeoutExpired:
                    process.kill()


def _is_ready(url: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
        return True
    return False


def show(rows: dict[str, Any]) -> None:
    """Print the table."""
    table = Table(title=f"{CLIENTS} concurrent clients of vLLM's server on a CPU")
    for name in ("served", "tokens that fit", "of the parent", "requests/s", "of the parent"):
        table.add_column(name, justify="left" if name == "served" else "right")
    for name, row in rows.items():
        table.add_row(
            name, f"{row['cache_tokens']:,}", f"{row['cache_tokens_ratio']:.2f}x", f"{row['requests_per_second']:.2f}",
            f"{row['requests_ratio']:.2f}x",
        )  # fmt: skip
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "vllm_serving")
    parser.add_argument("--model", type=Path, help="a ready checkpoint of SmolLM2, from `smollm2.py`")
    parser.add_argument("--only", nargs="+", choices=CHILDREN, default=list(CHILDREN), help="children; default: all")
    parser.add_argument("--dtype", default="bfloat16", help="of weights and caches; default: bfloat16")
    parser.add_argument("--tiny", action="store_true", help="the bundled model; results stay in --folder")
    arguments = parser.parse_args()
    bench = Bench(arguments)
    folders = {"parent": bench.model} | {name: bench.child(name) for name in arguments.only}
    folders["parent, again"] = bench.model
    rows: dict[str, Any] = {}
    for name, folder in folders.items():
        rows[name] = bench.measure(folder)
        print(name, rows[name], flush=True)  # noqa: T201
    best = max(rows[name]["requests_per_second"] for name in ("parent", "parent, again"))
    for row in rows.values():
        row["cache_tokens_ratio"] = row["cache_tokens"] / rows["parent"]["cache_tokens"]
        row["requests_ratio"] = row["requests_per_second"] / best
    show(rows)
    data = {
        **environment(SEED), "engine": str(bench.engine), "dtype": bench.dtype, "clients": CLIENTS, "space_gib": SPACE,
        "requests": bench.requests, "prompt_tokens": bench.prompt, "new_tokens": bench.new, "text": bench.text,
        "goals": GOALS, "rows": rows,
    }  # fmt: skip
    if arguments.tiny:
        (bench.folder / "results.json").write_text(json.dumps(data, indent=2) + "\n")
    else:
        write("vllm_serving", data)


if __name__ == "__main__":
    main()
