"""Answers of commands as files, and the key under which one lies: a digest of all that it depends on.

The files are JSON with a checksum, beside the Hub's cache. What cannot be read is ignored, and what cannot be written
is left unwritten.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

FORM = 1
"""Of a file; a change of what files hold raises it."""
MOST_BYTES = 16 * 2**20
"""Of all files together; the oldest go first."""
_CODE = ("surgery", "torch", "transformers")
_SETTINGS = ("CUDA", "HF_", "HUGGINGFACE", "PYTHON", "PYTORCH", "SURGERY", "TORCH", "TRANSFORMERS", "USE_")


def folder() -> Path:
    """Where the files are: beside the Hub's cache, which `HF_HOME` or `XDG_CACHE_HOME` places."""
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "surgery" / "answers"


def digest(data: Any) -> str:
    """SHA-256 of plain data."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def read(key: str) -> Any:
    """What was written under `key`; None where nothing was, or the file is damaged."""
    try:
        entry = json.loads((folder() / f"{key}.json").read_text())
        return entry["answer"] if entry["checksum"] == digest(entry["answer"]) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write(key: str, answer: Any) -> None:
    """Write plain data, whole or not at all; no error where the folder cannot be written."""
    answer = json.loads(json.dumps(answer))
    entry = json.dumps({"checksum": digest(answer), "answer": answer}, separators=(",", ":"))
    with contextlib.suppress(OSError):
        folder().mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(dir=folder(), suffix=".part")
        try:
            with os.fdopen(handle, "w") as file:
                file.write(entry)
            os.replace(part, folder() / f"{key}.json")
        except OSError:
            os.unlink(part)
            raise
        _make_room()


def _make_room() -> None:
    """Remove the oldest files beyond `MOST_BYTES`."""
    files = [(stamp, path) for path in folder().iterdir() if (stamp := _stamp(path))]
    total = 0
    for (size, _), path in sorted(files, key=lambda entry: entry[0][1], reverse=True):
        total += size
        if total > MOST_BYTES:
            path.unlink(missing_ok=True)


def installation() -> dict[str, Any]:
    """What every answer depends on beside the question: code, versions, settings, interpreter, machine."""
    packages = [name for place in sys.path for name in _listing(place) if name.endswith((".dist-info", ".egg-info"))]
    return {
        "form": FORM,
        "code": {name: _code(name) for name in _CODE},
        "packages": sorted(packages),
        "settings": {k: v for k, v in os.environ.items() if k.startswith(_SETTINGS) and "TOKEN" not in k},
        "python": sys.version,
        "machine": [platform.node(), platform.machine(), *filter(os.path.exists, ("/dev/nvidiactl", "/dev/kfd"))],
    }


def checkpoint(model: Path) -> dict[str, Any] | None:
    """A folder with a config.json as it lies there, every file of it; None where `model` names no such folder."""
    where = model.parent if model.suffix == ".json" and model.is_file() else model
    config = text(where / "config.json")
    if config is None:
        return None
    return {
        "named": str(model),
        "folder": str(where.resolve()),
        "config": config,
        "files": {name: _stamp(where / name) for name in _listing(where)},
    }


def text(file: Path) -> str | None:
    """The text of a file; None where there is none."""
    try:
        return file.read_text()
    except (OSError, ValueError):
        return None


def _code(package: str) -> str:
    """Digest of names, sizes and times of a package's files of code, found without importing it."""
    spec = importlib.util.find_spec(package)
    lines = []
    for root, folders, files in os.walk(Path(str(spec and spec.origin)).parent, followlinks=True):
        folders[:] = [name for name in folders if name != "__pycache__"]
        paths = [os.path.join(root, name) for name in files if name.endswith((".py", ".so", ".pyd", ".yaml"))]
        lines += [(path, *_stamp(path)) for path in paths]
    return digest(sorted(lines))


def _stamp(path: str | Path) -> tuple[int, ...]:
    """Size and time of the last change; empty for a link to nowhere."""
    try:
        found = os.stat(path)
    except OSError:
        return ()
    return found.st_size, found.st_mtime_ns


def _listing(place: str | Path) -> list[str]:
    try:
        return os.listdir(place or ".")
    except OSError:
        return []
