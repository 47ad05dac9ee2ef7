"""Text in, token windows out: what calibration and evaluation read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..anatomy.positions import max_positions
from ..errors import CheckpointError

MOST = 512
"""Tokens per window where nobody says and the model has as many positions."""


@dataclass(frozen=True)
class Windows:
    """Token windows of equal length, short ones padded on the right.

    `ids_BT` [W, T] int64; `mask_BT` [W, T] bool, False on padding; `digest` names their content.
    """

    ids_BT: Tensor
    mask_BT: Tensor
    digest: str
    start: tuple[str, ...] | None = None
    """Tokens that every window starts with because the tokenizer starts a text so; None where ids were given."""

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
        return self.take(cut), self._part(slice(len(self) - held, None), f"-{held}:")

    def take(self, count: int) -> Windows:
        """The first `count` windows."""
        return self._part(slice(count), f":{count}")

    def reaching(self, tokens: int) -> Windows:
        """The first windows that hold so many tokens together; all of them where they hold fewer."""
        held = self.mask_BT.sum(1).cumsum(0)
        return self.take(int((held < tokens).sum()) + 1)

    def pick(self, places: Sequence[int]) -> Windows:
        """The windows at these places."""
        name = hashlib.sha256(str(list(places)).encode()).hexdigest()[:8]
        return replace(self, ids_BT=self.ids_BT[places], mask_BT=self.mask_BT[places], digest=f"{self.digest}[{name}]")

    def _part(self, rows: slice, name: str) -> Windows:
        return replace(self, ids_BT=self.ids_BT[rows], mask_BT=self.mask_BT[rows], digest=f"{self.digest}[{name}]")


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
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    text = json.loads(line)["text"]
                except (json.JSONDecodeError, KeyError, TypeError):
                    raise CheckpointError(f"{path}: line {number} is no JSON object with a field `text`.") from None
                if not isinstance(text, str):
                    raise CheckpointError(f"{path}: line {number}: `text` is {type(text).__name__}, needs a string.")
                yield text


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
                for text in batch.column(0).to_pylist():
                    if text is not None and not isinstance(text, str):
                        raise CheckpointError(f"{path}: column `text` holds {type(text).__name__}, needs strings.")
                    yield text or ""
    except pyarrow.ArrowInvalid as error:
        raise CheckpointError(f"{path}: not a readable parquet file ({error}).") from None


_READERS: dict[str, Any] = {
    ".txt": lambda path: iter([path.read_text(encoding="utf-8-sig")]),
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


def read_windows(
    config: Any,
    source: Any,
    tokenizer: Any = None,
    *,
    length: int | None = None,
    most: int = MOST,
    samples: int | None = None,
    every_window: bool = False,
    where: str = "calibration text",
) -> Windows:
    """`load_windows` for the model of a config, with its tokenizer and vocabulary, no longer than its positions.

    Args:
        source: what `load_windows` takes. Without `length`, token ids are windows as they are, cut only where the
            model has fewer positions.
        tokenizer: defaults to the one beside the model.
        length: tokens per window; default: the model's positions, at most `most`.

    Raises:
        CheckpointError: as `load_windows`; `length` is above the model's positions.
    """
    if length is None and isinstance(source, (Tensor, Windows)):
        length = min(_width(source, where), max_positions(config) or _width(source, where))
    length = window_length(config, length, most, where)
    if tokenizer is None and (not isinstance(source, (Tensor, Windows)) or _width(source, where) > length):
        tokenizer = tokenizer_of(config)
    vocab_size = config.get_text_config(decoder=True).vocab_size
    return load_windows(source, tokenizer, vocab_size=vocab_size, length=length, samples=samples,
                        every_window=every_window, where=where)  # fmt: skip


def _width(source: Tensor | Windows, where: str) -> int:
    ids = source.ids_BT if isinstance(source, Windows) else source
    if ids.dim() != 2 or ids.is_floating_point() or not ids.numel():
        raise CheckpointError(f"{where}: token ids of shape {list(ids.shape)}; needs integers [windows, tokens].")
    return ids.shape[1]


def window_length(config: Any, length: int | None, most: int = MOST, where: str = "text") -> int:
    """Tokens per window: `length`, or by default the model's positions, at most `most`.

    Raises:
        CheckpointError: less than two tokens, or more than the model has positions.
    """
    limit = max_positions(config)
    if length is None:
        return min(limit or most, most)
    if length < 2:
        raise CheckpointError(f"{where}: windows of {length} tokens leave nothing to predict. Use two or more.")
    if limit is not None and length > limit:
        raise CheckpointError(
            f"{where}: windows of {length} tokens, but the model has {limit} positions. Use fewer "
            "(length=..., --length)."
        )
    return length


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
    """Cut text into windows of `length` tokens, each of which starts as the tokenizer starts a text.

    A document longer than `length` gives its first window only, so that many documents beat one long one; a single
    document (a `.txt` file), or any with `every_window`, is cut into consecutive windows. Tokens that the tokenizer
    puts in front of a text (BOS) stand in front of each of them: a model that was trained with them needs them.

    Args:
        source: what `read_texts` takes; or token ids [W, T], of which longer rows are cut into consecutive windows; or
            Windows (returned as they are).
        tokenizer: callable of transformers. Token ids need none; where rows of them are cut, it says with what the
            windows after the first start in rows that start as it starts a text.
        vocab_size: rows of the model's embedding; larger ids are refused.
        samples: at most so many windows.

    Raises:
        CheckpointError: no text, less than one window of it, no tokenizer, or ids that the model does not know.
    """
    if isinstance(source, Windows):
        if _width(source, where) > length:
            raise CheckpointError(
                f"{where}: windows of {_width(source, where)} tokens were given, but length={length} was "
                "asked for. Cut them to that, or leave length out."
            )
        return source if samples is None else source.take(samples)
    start: tuple[str, ...] | None = None
    if isinstance(source, Tensor):
        rows = _rows_of_ids(source, tokenizer, length, where)[:samples]
        check_known_ids(torch.cat(rows), vocab_size, where)
    else:
        texts = read_texts(source)
        if tokenizer is None:
            raise CheckpointError(
                f"{where}: needs a tokenizer. None lies beside the model: put its files there "
                "(tokenizer.json, tokenizer_config.json), or pass tokenizer=... in Python."
            )
        first, _ = special_tokens(tokenizer, texts)
        start = tuple(map(str, tokenizer.convert_ids_to_tokens(first))) if first else ()
        pairs: list[tuple[str, Tensor]] = []
        for number, text in enumerate(texts, 1):
            tokens = torch.tensor(encode(tokenizer, text), dtype=torch.long)
            if len(texts) == 1 or every_window:
                cut = _cut(tokens, length, first, where)
                cut = [row for row in cut if len(row) == length or row is cut[0]]
            else:
                cut = [tokens[:length]]
            pairs += [(f"{where}, document {number}" if len(texts) > 1 else where, row) for row in cut]
            if samples is not None and len(pairs) >= samples:
                break
        pairs = [(origin, row) for origin, row in pairs[:samples] if len(row) > 1]
        rows = [row for _, row in pairs]
        total = sum(map(len, rows))
        if total < length:
            raise CheckpointError(
                f"{where}: {total} tokens, shorter than one sequence of {length}. Give more text, or "
                "shorter sequences (length=..., --length)."
            )
        for origin, row in pairs:
            check_known_ids(row, vocab_size, origin, tokenizer)
    ids_BT = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    mask_BT = torch.arange(ids_BT.shape[1])[None] < lengths[:, None]
    digest = hashlib.sha256(ids_BT.numpy().tobytes() + lengths.numpy().tobytes()).hexdigest()[:16]
    return Windows(ids_BT, mask_BT, digest, start)


def _cut(tokens: Tensor, length: int, start: Sequence[int], where: str) -> list[Tensor]:
    """Consecutive windows, each with `start` in front where the tokens begin with it; the last may be shorter."""
    if tokens[: len(start)].tolist() != list(start) or not start:
        return list(tokens.split(length))
    if length <= len(start):
        raise CheckpointError(
            f"{where}: windows of {length} tokens are filled by the tokens that "
            "the tokenizer puts before every text. Use longer windows (length=..., --length)."
        )
    front, body = tokens.split((len(start), len(tokens) - len(start)))
    return [torch.cat((front, piece)) for piece in body.split(length - len(start))]


def _rows_of_ids(ids_WT: Tensor, tokenizer: Any, length: int, where: str) -> list[Tensor]:
    """The rows, or where they are longer, consecutive windows of exactly `length` tokens from each."""
    width, ids_WT = _width(ids_WT, where), ids_WT.long().cpu()
    if width <= length:
        return list(ids_WT)
    start: list[int] = []
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        start, _ = special_tokens(tokenizer, (str(tokenizer.decode(row, skip_special_tokens=True)) for row in ids_WT))
    return [window for row in ids_WT for window in _cut(row, length, start, where) if len(window) == length]


def check_known_ids(ids: Tensor | Sequence[int], vocab_size: int, where: str, tokenizer: Any = None) -> None:
    """Refuse token ids that the model has no embedding for. A tokenizer may have more of them than its model.

    Raises:
        CheckpointError: names the id and its token.
    """
    ids = torch.as_tensor(ids)
    if not ids.numel():
        return
    largest = int(ids.max())
    if largest >= vocab_size:
        named, what = "", "Give ids of the model's own tokenizer."
        if isinstance(tokenizer, PreTrainedTokenizerBase):
            named = f" ({tokenizer.convert_ids_to_tokens(largest)!r})"
            what = "The tokenizer has more ids than the model has embeddings: leave this token out of the text."
        raise CheckpointError(f"{where}: token id {largest}{named}, but the model knows {vocab_size}. {what}")
    if int(ids.min()) < 0:
        raise CheckpointError(f"{where}: negative token ids.")


def has_surplus_ids(tokenizer: Any, vocab_size: int) -> bool:
    """Whether some text may give token ids that the model has no embedding for."""
    return max(tokenizer.get_vocab().values()) >= vocab_size


def encode(tokenizer: Any, text: str, special: bool = True) -> list[int]:
    """Token ids of a text of any length, with or without what the tokenizer puts around it."""
    options: dict[str, bool] = {} if special else {"add_special_tokens": False}
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        options["verbose"] = False  # no warning for long documents: windows are cut from them
    return list(tokenizer(text, **options)["input_ids"])


def special_tokens(tokenizer: Any, texts: Iterable[str]) -> tuple[list[int], list[int]]:
    """Ids that a tokenizer puts before and after every text.

    Found by tokenising with and without them, which holds whatever its settings say. A callable that is no tokenizer
    of transformers is taken to put none.

    Args:
        texts: read up to the first that tells; any that the tokenizer knows a token of.

    Raises:
        CheckpointError: it does otherwise than to put tokens around.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        return [], []
    for text in texts:
        if len(text) > _ENOUGH:  # whole words: some tokenizers know no others
            text = (text[:_ENOUGH].rsplit(maxsplit=1) or [""])[0]
        plain, whole = encode(tokenizer, text, special=False), encode(tokenizer, text)
        size = len(plain)
        places = [at for at in range(len(whole) - size + 1) if whole[at : at + size] == plain]
        if not places:
            raise CheckpointError(
                f"{type(tokenizer).__name__}: tokenises a text otherwise with its special tokens than without, so that "
                "windows of it cannot be cut. Give token ids."
            )
        if len(places) == 1 and plain:
            return whole[: places[0]], whole[places[0] + size :]
    return [], []


_ENOUGH = 1000
"""Characters of a text from which the tokens around it are seen."""


def tokenizer_of(config: Any, told: dict[str, Any] | None = None) -> Any:
    """The tokenizer beside a model in memory: in its folder, or in its parent's where it was just converted.

    `told` is what a provenance would tell of the adapter or the GGUF that the model came with.
    """
    surgery = getattr(config, "surgery", None) or {}
    origin = where_named(surgery.get("provenance", surgery)) | (told or {})
    adapter, gguf = (origin.get("adapter") or {}).get("folder"), origin.get("gguf_file")
    for name in (adapter, config.name_or_path, origin.get("parent")):
        if name:
            tokenizer = load_tokenizer(name)
            if tokenizer is None and gguf:
                tokenizer = load_tokenizer(name, gguf_file=gguf)
            if tokenizer is not None:
                return tokenizer
    return None


def where_named(origin: dict[str, Any]) -> dict[str, Any]:
    """A provenance, or the nearest before it that names a parent. One converted in memory has no name."""
    while not origin.get("parent") and origin.get("before"):
        origin = origin["before"]
    return origin


def load_tokenizer(name_or_path: str | Path, gguf_file: str | None = None) -> Any:
    """The tokenizer beside a model, or None where there is none. It may have more ids than the model has embeddings.

    Args:
        gguf_file: the one inside this file.

    Raises:
        CheckpointError: there is one in that folder, and it cannot be loaded.
    """
    from transformers import AutoTokenizer

    folder = Path(name_or_path)
    if (
        gguf_file is None
        and folder.is_dir()
        and not any(file for pattern in _TOKENIZER_FILES for file in folder.glob(pattern))
    ):
        return None  # transformers would make an empty one for many model types
    try:
        options = {} if gguf_file is None else {"gguf_file": gguf_file}
        tokenizer = AutoTokenizer.from_pretrained(str(name_or_path), trust_remote_code=False, **options)
    except Exception as error:  # the tokenizers library raises nothing narrower
        if folder.is_dir() and gguf_file is None:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise CheckpointError(f"{name_or_path}: its tokenizer cannot be loaded ({reason}).") from None
        if gguf_file is not None or isinstance(error, (OSError, ValueError, KeyError, ImportError)):
            return None
        raise
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        return None  # settings without a vocabulary: it knows no text
    return tokenizer


_TOKENIZER_FILES = ("tokenizer*.json", "*.model", "*.tiktoken", "vocab.*", "tekken.json")
