"""Launch parameters by kernel, shape and architecture: checked-in tables, never tuned while a model runs.

`configs/default.json` serves every device; `configs/<arch>.json`, which `benchmarks/tune_kernels.py` writes on a
machine with that GPU, is asked first. A row matches where all that its `where` names is equal; of matching rows the one
that names most wins.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "configs"


@dataclass(frozen=True, kw_only=True)
class Config:
    """How one kernel is launched."""

    block_n: int
    """Cached tokens per step of the inner loop."""
    warps: int
    stages: int
    """Depth of the software pipeline."""
    ctas_per_sm: int
    """Programs per multiprocessor that the number of splits aims at."""


_forced: dict[str, Config] = {}


def force(kernel: str, config: Config | None) -> None:
    """Use `config` for every shape of `kernel`; None ends that. For tuning."""
    if config is None:
        _forced.pop(kernel, None)
    else:
        _forced[kernel] = config


def config_for(kernel: str, arch: str, **key: Any) -> Config:
    """The most specific row for `kernel` with `key`; of the architecture's table, or else of the default one.

    Raises:
        KeyError: the default table has no row for the kernel.
    """
    return _forced.get(kernel) or _lookup(kernel, arch, tuple(sorted(key.items())))


@functools.lru_cache(maxsize=4096)
def _lookup(kernel: str, arch: str, key: tuple[tuple[str, Any], ...]) -> Config:
    wanted = dict(key)
    for name in (arch, "default"):
        rows = [
            row
            for row in _table(name)
            if row["kernel"] == kernel and all(wanted.get(k) == v for k, v in row["where"].items())
        ]
        if rows:
            return Config(**max(rows, key=lambda row: len(row["where"]))["config"])
    raise KeyError(f"configs/default.json has no row for {kernel}")


@functools.cache
def _table(name: str) -> list[dict[str, Any]]:
    path = FOLDER / f"{name}.json"
    return json.loads(path.read_text())["rows"] if path.exists() else []


def bucket(rows: int) -> int:
    """Sequences times KV heads, rounded up to a power of four, at most 1024: what the tables are keyed by."""
    return next((size for size in (1, 4, 16, 64, 256) if rows <= size), 1024)
