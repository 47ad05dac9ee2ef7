"""A tokenizer as GGUF has it: byte-level BPE of known pre-tokenizers, or SentencePiece; others are refused."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import PlanError

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PRE_TOKENIZERS = {_WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe", _WORDS + r"\p{N}" + _REST: "qwen2"}
"""Regular expression of the splits before byte-level BPE -> llama.cpp's name for it."""


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """What llama.cpp needs to know of a tokenizer."""

    kind: str
    """`gpt2` (byte-level BPE), `llama` (SentencePiece), or `none`."""
    folder: Path | None = None
    pre: str | None = None
    tokens: list[bytes] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    left_out: int = 0
    """Added tokens beyond the embeddings: llama.cpp wants a row for each."""

    @property
    def says(self) -> str:
        """For the terminal."""
        if self.kind == "none":
            return "none beside the model; llama.cpp takes token ids only"
        without = f", {self.left_out} without an embedding left out" if self.left_out else ""
        return f"{len(self.tokens)} tokens, {self.kind}" + (f" ({self.pre})" if self.pre else "") + without

    def write(self, writer: Any, config: Any) -> None:
        """Add it to a `GGUFWriter`."""
        import gguf

        writer.add_tokenizer_model(self.kind)
        if self.folder is None:
            return
        writer.add_tokenizer_pre(self.pre or "default")
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.scores:
            writer.add_token_scores(self.scores)
        special = gguf.SpecialVocab(self.folder, load_merges=self.kind == "gpt2", n_vocab=config.vocab_size)
        special.add_to_gguf(writer, quiet=True)


def tokens_of(folder: Path, vocab_size: int) -> Tokens:
    """The tokenizer beside a model, filled up to its embeddings, or without the added tokens that have none.

    Raises:
        PlanError: llama.cpp has no such tokenizer, or other tokens have no embedding; says which part.
    """
    if (folder / "tokenizer.model").is_file():
        return _sentencepiece(folder, vocab_size)
    if (folder / "tokenizer.json").is_file():
        return _bpe(folder, vocab_size)
    return Tokens(kind="none")


def _sentencepiece(folder: Path, vocab_size: int) -> Tokens:
    import gguf

    try:
        vocabulary = gguf.SentencePieceVocab(folder)
        rows = list(vocabulary.all_tokens())
    except RuntimeError as error:
        raise PlanError(f"GGUF: {folder / 'tokenizer.model'}: {error} (pip install sentencepiece).") from None
    except ValueError as error:  # ids of added_tokens.json with a gap
        raise PlanError(f"GGUF: {folder / 'added_tokens.json'}: {error}.") from None
    _check_rows(folder / "tokenizer.model", vocabulary.vocab_size_base, vocab_size)
    added = _added_tokens(folder)
    left_out = sum(number >= vocab_size for number in {*range(len(rows)), *added})
    rows = rows[:vocab_size]
    while len(rows) < vocab_size:
        rows.append((f"[PAD{len(rows)}]".encode(), -10000.0, gguf.TokenType.UNUSED))
    for number, (text, special) in added.items():
        is_added = number >= vocabulary.vocab_size_base
        if number < vocab_size and (is_added or rows[number][0] != text.encode()):
            kind = gguf.TokenType.CONTROL if special else gguf.TokenType.USER_DEFINED
            rows[number] = (text.encode(), -1000.0, kind)
    return Tokens(
        kind="llama", folder=folder, tokens=[text for text, _, _ in rows], scores=[score for _, score, _ in rows],
        types=[int(kind) for _, _, kind in rows], left_out=left_out,
    )  # fmt: skip


def _added_tokens(folder: Path) -> dict[int, tuple[str, bool]]:
    """Id -> text, and whether it is special, of tokens that were added to a vocabulary.

    The gguf package reads those of `added_tokens.json` alone, and many tokenizers have them elsewhere.
    """
    found: dict[int, tuple[str, bool]] = {}
    config, whole = (folder / name for name in ("tokenizer_config.json", "tokenizer.json"))
    if config.is_file():
        decoder = json.loads(config.read_text(encoding="utf-8")).get("added_tokens_decoder") or {}
        found |= {int(number): (token["content"], bool(token.get("special"))) for number, token in decoder.items()}
    if whole.is_file():
        added = json.loads(whole.read_text(encoding="utf-8")).get("added_tokens") or ()
        found |= {token["id"]: (token["content"], bool(token["special"])) for token in added}
    return found


def _bpe(folder: Path, vocab_size: int) -> Tokens:
    import gguf

    data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    model = data["model"]
    if model["type"] != "BPE" or model.get("byte_fallback"):
        kind = model["type"] + (" with byte fallback" if model.get("byte_fallback") else "")
        raise PlanError(
            f"GGUF: {folder / 'tokenizer.json'} is {kind}; llama.cpp takes byte-level BPE from it, "
            "and SentencePiece from a tokenizer.model. Put that beside the "
            "model."
        )
    pre = _pre_tokenizer(data, folder)
    added = {token["id"]: token for token in data.get("added_tokens") or ()}
    plain = [number for number in model["vocab"].values() if number not in added]
    _check_rows(folder / "tokenizer.json", max(plain, default=-1) + 1, vocab_size)
    words = {number: word for word, number in model["vocab"].items()} | {n: t["content"] for n, t in added.items()}
    tokens, types = [], []
    for number in range(vocab_size):
        tokens.append(words.get(number, f"[PAD{number}]").encode())
        if number in added:
            types.append(int(gguf.TokenType.CONTROL if added[number]["special"] else gguf.TokenType.USER_DEFINED))
        else:
            types.append(int(gguf.TokenType.NORMAL if number in words else gguf.TokenType.UNUSED))
    left_out = sum(number >= vocab_size for number in added)
    return Tokens(kind="gpt2", folder=folder, pre=pre, tokens=tokens, types=types, left_out=left_out)


def _check_rows(file: Path, tokens: int, vocab_size: int) -> None:
    if tokens > vocab_size:
        raise PlanError(
            f"GGUF: {file} has {tokens} tokens beside the added ones, the model {vocab_size} embeddings; llama.cpp "
            "wants one for each. This tokenizer belongs to another model."
        )


def _pre_tokenizer(data: dict[str, Any], folder: Path) -> str:
    """llama.cpp's name of the splits before BPE."""
    parts = [data.get("pre_tokenizer") or {}]
    if parts[0].get("type") == "Sequence":
        parts = parts[0]["pretokenizers"]
    byte_level = parts[-1].get("type") == "ByteLevel" and not parts[-1].get("add_prefix_space")
    if byte_level and not data.get("normalizer") and len(parts) == 1 and parts[0].get("use_regex", True):
        return "gpt-2"
    # Digits one by one, then as GPT-2; llama.cpp has several names for it (starcoder, refact).
    digits = parts[0].get("type") == "Digits" and parts[0].get("individual_digits")
    if byte_level and not data.get("normalizer") and len(parts) == 2 and digits and parts[1].get("use_regex", True):
        return "smollm"
    split = parts[0]
    if byte_level and len(parts) == 2 and split.get("type") == "Split":
        name = PRE_TOKENIZERS.get(split.get("pattern", {}).get("Regex", ""))
        normal = (data.get("normalizer") or {}).get("type")
        if name is not None and normal in (None, "NFC"):
            return name
    known = ", ".join(["gpt-2", "smollm", *PRE_TOKENIZERS.values()])
    raise PlanError(
        f"GGUF: {folder / 'tokenizer.json'}: its splits before BPE are none of {known}. "
        "llama.cpp's own converter knows more of them; it reads the native folder."
    )
