"""Text in, token windows out: what calibration and evaluation read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import CheckpointError


@dataclass(frozen=True)
class Windows:
    """Token windows of equal length, short ones padded on the right.

    `ids_BT` [W, T] int64; `mask_BT` [W, T] bool, False on padding; `digest` names their content.
    """

    ids_BT: Tensor
    mask_BT: Tensor
    digest: str

    def __len__(self) -> int:
        return len(self.ids_BT)

    @property
    def tokens(self) -> int:
        """Tokens that are not padding."""
        return int(self.mask_BT.sum())

    def batches(self, size: int = 8) -> Iterator[tuple[Tensor, Tensor]]:
        """(ids, mask) in order, `size` windows at a time, cut to the longest of each batch."""
        for start in range(0, len(self), size):
            mask = self.mask_BT[start : start + size]
            longest = int(mask.sum(1).max())
            yield self.ids_BT[start : start + size, :longest], mask[:, :longest]

    def split(self) -> tuple[Windows, Windows]:
        """Seven eighths to fit on, the rest (at most 32 windows) to check on; one window serves both."""
        held = min(32, max(1, len(self) // 8))
        cut = max(1, len(self) - held)
        rest = slice(len(self) - held, None)
        return self.take(cut), Windows(self.ids_BT[rest], self.mask_BT[rest], f"{self.digest}[-{held}:]")

    def take(self, count: int) -> Windows:
        """The first `count` windows."""
        return Windows(self.ids_BT[:count], self.mask_BT[:count], f"{self.digest}[:{count}]")


def read_texts(source: str | Path | Sequence[str]) -> list[str]:
    """Documents from `.txt` (one document), `.jsonl` (field `text`), `.parquet` (column `text`), or a list of strings.

    Raises:
        CheckpointError: no such file, another format, or no text in it.
    """
    if not isinstance(source, (str, Path)):
        texts, where = list(source), "text"
        if not all(isinstance(text, str) for text in texts):
            kinds = sorted({type(text).__name__ for text in texts})
            raise CheckpointError(f"text: a list of {', '.join(kinds)}; needs strings, or one tensor of token ids.")
    else:
        path = Path(source)
        where = str(path)
        if not path.is_file():
            raise CheckpointError(f"{path}: no such text file.")
        try:
            texts = list(_READERS[path.suffix](path))
        except KeyError:
            known = ", ".join(_READERS)
            raise CheckpointError(f"{path}: format {path.suffix or 'without suffix'} not known. Use {known}.") from None
        except UnicodeDecodeError:
            raise CheckpointError(f"{path}: not UTF-8 text.") from None
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise CheckpointError(f"{where}: holds no text.")
    return texts


def _read_jsonl(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield str(json.loads(line)["text"])
                except (json.JSONDecodeError, KeyError, TypeError):
                    raise CheckpointError(f"{path}: line {number} is no JSON object with a field `text`.") from None


def _read_parquet(path: Path) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise CheckpointError(f"{path}: reading parquet needs pyarrow. Run: pip install pyarrow") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            if "text" not in table.schema_arrow.names:
                raise CheckpointError(f"{path}: no column `text`; it has {', '.join(table.schema_arrow.names)}.")
            for batch in table.iter_batches(columns=["text"]):
                yield from (str(text) for text in batch.column(0).to_pylist() if text is not None)
    except pyarrow.ArrowInvalid as error:
        raise CheckpointError(f"{path}: not a readable parquet file ({error}).") from None


_READERS: dict[str, Any] = {
    ".txt": lambda path: iter([path.read_text(encoding="utf-8")]),
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


def load_windows(
    source: Any,
    tokenizer: Any = None,
    *,
    vocab_size: int,
    length: int,
    samples: int | None = None,
    every_window: bool = False,
    where: str = "calibration text",
) -> Windows:
    """Cut text into windows of `length` tokens.

    A document longer than `length` gives its first window only, so that many documents beat one long one; a single
    document (a `.txt` file), or any with `every_window`, is cut into consecutive windows.

    Args:
        source: what `read_texts` takes, or token ids [W, T], or Windows (returned as they are).
        tokenizer: callable of transformers; not needed for token ids.
        vocab_size: rows of the model's embedding; larger ids are refused.
        samples: at most so many windows.

    Raises:
        CheckpointError: no text, less than one window of it, no tokenizer, or ids that the model does not know.
    """
    if isinstance(source, Windows):
        return source if samples is None else source.take(samples)
    if isinstance(source, Tensor):
        if source.dim() != 2 or source.is_floating_point() or not source.numel():
            raise CheckpointError(
                f"{where}: token ids of shape {list(source.shape)}; needs integers [windows, tokens]."
            )
        ids = source.long().cpu()[:samples]
        rows = list(ids)
    else:
        texts = read_texts(source)
        if tokenizer is None:
            raise CheckpointError(f"{where}: needs a tokenizer. None lies beside the model; pass tokenizer=...")
        rows = []
        for text in texts:
            tokens = torch.tensor(tokenizer(text)["input_ids"], dtype=torch.long)
            cut = list(tokens.split(length))
            whole = len(texts) == 1 or every_window
            rows += [row for row in cut if len(row) == length or row is cut[0]] if whole else cut[:1]
            if samples is not None and len(rows) >= samples:
                break
        rows = [row for row in rows[:samples] if len(row) > 1]
        total = sum(map(len, rows))
        if total < length:
            raise CheckpointError(
                f"{where}: {total} tokens, shorter than one sequence of {length}. Give more text, or shorter sequences."
            )
    largest = max(int(row.max()) for row in rows)
    if largest >= vocab_size:
        raise CheckpointError(
            f"{where}: token id {largest}, but the model knows {vocab_size}. This tokenizer belongs to another model."
        )
    if min(int(row.min()) for row in rows) < 0:
        raise CheckpointError(f"{where}: negative token ids.")
    ids_BT = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    mask_BT = torch.arange(ids_BT.shape[1])[None] < lengths[:, None]
    digest = hashlib.sha256(ids_BT.numpy().tobytes() + lengths.numpy().tobytes()).hexdigest()[:16]
    return Windows(ids_BT, mask_BT, digest)


def tokenizer_of(config: Any) -> Any:
    """The tokenizer beside a model in memory: in its folder, or in its parent's where it was just converted."""
    surgery = getattr(config, "surgery", None) or {}
    origin = surgery.get("provenance", surgery)
    for name in (config.name_or_path, origin.get("parent")):
        if name:
            tokenizer = load_tokenizer(name, config.vocab_size)
            if tokenizer is not None:
                return tokenizer
    return None


def load_tokenizer(name_or_path: str | Path, vocab_size: int | None = None) -> Any:
    """The tokenizer beside a model, or None where there is none.

    Raises:
        CheckpointError: it knows more tokens than the model has embeddings.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(name_or_path))
    except (OSError, ValueError, KeyError, ImportError):
        return None
    if vocab_size is not None and len(tokenizer) > vocab_size:
        raise CheckpointError(
            f"{name_or_path}: the tokenizer has {len(tokenizer)} tokens, the model {vocab_size} embeddings. "
            "This tokenizer belongs to another model."
        )
    tokenizer.model_max_length = 10**9  # windows are cut here; no warning for long documents
    return tokenizer
