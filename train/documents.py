"""Documents of a text corpus by number: files and data sets that are never in memory as a whole."""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import mmap
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from surgery.calibration.text import load_tokenizer
from surgery.errors import CheckpointError

PIECE = 2**16
"""Bytes of the documents that a `.txt` file is cut into, at the next empty line."""
_OPENERS: dict[str, Callable[[Path], bytes]] = {
    ".xz": lambda path: lzma.decompress(path.read_bytes()),
    ".gz": lambda path: gzip.decompress(path.read_bytes()),
}
FORMATS = (".jsonl", ".txt", ".parquet")


class Documents(Protocol):
    """Texts by number, and what names their content."""

    digest: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> str: ...


def open_documents(source: str | Path) -> Documents:
    """A `.jsonl` (field `text`), `.txt` or `.parquet` (column `text`) file, the first two also as `.xz` or `.gz`; a
    directory of them; or the name of a data set for `datasets` (`name` or `name:split`).

    Plain files are mapped, compressed ones held in memory. Opening reads a `.jsonl` or `.txt` file once to find where
    its documents begin.

    Raises:
        CheckpointError: no such file, another format, a file without any text, or `datasets` is missing.
    """
    path = Path(source)
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.is_file() and _format(f) in FORMATS)
        if not files:
            raise CheckpointError(f"{path}: holds no {', '.join(FORMATS)} file.")
    elif path.is_file():
        files = [path]
    elif path.suffix or str(source).startswith((".", "/", "~")):
        raise CheckpointError(f"{path}: no such text file.")
    else:
        return _DataSet(str(source))
    parts = [_open(file) for file in files]
    return parts[0] if len(parts) == 1 else _Joined(parts)


def _format(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix in _OPENERS else path.suffix


def _open(path: Path) -> Documents:
    kind = _format(path)
    if kind not in FORMATS:
        raise CheckpointError(f"{path}: format {kind or 'without suffix'} not known. Use {', '.join(FORMATS)}.")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path}: this shard is empty. Remove it, or fetch it again.")
    documents: Documents = _DataSet(str(path)) if kind == ".parquet" else _File(path, kind)
    _check_text(documents, str(path))
    return documents


def _check_text(documents: Documents, where: str) -> None:
    """Raise CheckpointError where there is nothing but white space. Reads up to the first text."""
    if not any(documents[i].strip() for i in range(len(documents))):
        raise CheckpointError(f"{where}: holds no text. Remove this shard, or name another file.")


class _File:
    """Byte ranges of one file."""

    def __init__(self, path: Path, kind: str) -> None:
        self.path, self.kind = path, kind
        self._bytes: Any
        try:
            if path.suffix in _OPENERS:
                self._bytes = _OPENERS[path.suffix](path)
            else:
                with path.open("rb") as file:
                    self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (lzma.LZMAError, OSError, EOFError) as error:
            raise CheckpointError(f"{path}: cannot be read ({error}). Fetch it again.") from None
        cuts = _line_ends(self._bytes) if kind == ".jsonl" else _piece_ends(self._bytes)
        ends = np.append(cuts, len(self._bytes)) if not len(cuts) or cuts[-1] != len(self._bytes) else cuts
        starts = np.concatenate(([0], ends[:-1]))
        if kind == ".jsonl":  # an empty line at the end is no document
            keep = np.array(
                [bool(self._bytes[a:b].strip()) if b - a < 8 else True for a, b in zip(starts, ends, strict=True)]
            )
            starts, ends = starts[keep], ends[keep]
        self._starts, self._ends = starts, ends
        self.digest = _digest(path.name, self._bytes)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> str:
        raw = bytes(self._bytes[self._starts[index] : self._ends[index]])
        try:
            if self.kind == ".txt":
                return raw.decode("utf-8-sig")
            text = json.loads(raw)["text"]
        except UnicodeDecodeError:
            raise CheckpointError(f"{self.path}: not UTF-8 text, near byte {self._starts[index]}.") from None
        except (json.JSONDecodeError, KeyError, TypeError):
            raise CheckpointError(f"{self.path}: document {index + 1} is no JSON object with a field `text`.") from None
        if not isinstance(text, str):
            raise CheckpointError(
                f"{self.path}: document {index + 1}: `text` is {type(text).__name__}, needs a string."
            )
        return text


def _line_ends(data: Any) -> np.ndarray:
    """Positions behind each newline."""
    found = [
        start + 1 + np.flatnonzero(np.frombuffer(data[start : start + 2**26], dtype=np.uint8) == ord("\n"))
        for start in range(0, len(data), 2**26)
    ]
    return np.concatenate(found) if found else np.empty(0, dtype=np.int64)


def _piece_ends(data: Any) -> np.ndarray:
    """Positions behind the first empty line after each `PIECE` bytes."""
    border, ends, at = re.compile(rb"\n\s*\n"), [], PIECE
    while match := border.search(data, at):
        ends.append(match.end())
        at = match.end() + PIECE
    return np.array(ends, dtype=np.int64)


def _digest(name: str, data: Any) -> str:
    """Of the name, the length, and 64 blocks of 64 KiB spread over the file: quick also for a terabyte."""
    state = hashlib.sha256(f"{name} {len(data)}".encode())
    for at in np.linspace(0, max(0, len(data) - 2**16), 64, dtype=np.int64):
        state.update(bytes(data[int(at) : int(at) + 2**16]))
    return state.hexdigest()[:16]


class _DataSet:
    """A data set of the `datasets` library, which keeps it as Arrow on disk."""

    def __init__(self, source: str) -> None:
        try:
            import datasets
        except ImportError:
            raise CheckpointError(
                f"{source}: needs the library datasets. Run: pip install 'kv-surgery[train]'"
            ) from None
        datasets.disable_progress_bars()
        name, _, split = source.partition(":")
        try:
            if Path(source).is_file():
                data = datasets.load_dataset("parquet", data_files=source, split="train")
            else:
                data = datasets.load_dataset(name, split=split or "train")
        except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
            reason = str(error.__cause__ or error).strip().splitlines()[0]
            raise CheckpointError(f"{source}: no readable file or data set of that name ({reason}).") from None
        if "text" not in data.column_names:
            raise CheckpointError(f"{source}: no column `text`; it has {', '.join(data.column_names)}.")
        if not len(data):
            raise CheckpointError(f"{source}: this shard is empty. Remove it, or fetch it again.")
        self._texts = data.select_columns("text")
        if Path(source).is_file():
            self.digest = _digest(Path(source).name, Path(source).read_bytes())
        else:
            self.digest = str(data._fingerprint)

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int) -> str:
        return self._texts[int(index)]["text"] or ""


class _Joined:
    """Several sources one behind the other."""

    def __init__(self, parts: Sequence[Documents]) -> None:
        self.parts = parts
        self._ends = np.cumsum([len(part) for part in parts])
        self.digest = hashlib.sha256(" ".join(part.digest for part in parts).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> str:
        part = int(np.searchsorted(self._ends, index, side="right"))
        return self.parts[part][index - (int(self._ends[part - 1]) if part else 0)]


def training_tokenizer(folder: str) -> Any:
    """The tokenizer beside a model.

    Raises:
        CheckpointError: there is none, or it cannot be loaded.
    """
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        raise CheckpointError(f"{folder}: no tokenizer lies beside the model. Copy its files there.")
    return tokenizer
