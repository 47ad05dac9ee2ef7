"""The tokenizer inside a GGUF as transformers builds it, held against what the file itself says."""

from __future__ import annotations

from typing import Any

from ..errors import CheckpointError, UnsupportedModel
from .gguf import Gguf

_NORMAL, _CONTROL, _USER = 1, 3, 4
"""Kinds of tokens."""
_FILES = ("tokenizer.json", "tokenizer.model")
_SPECIAL = {
    "bos_token": "bos_token_id", "eos_token": "eos_token_id", "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}  # fmt: skip
"""Name of a tokenizer -> name in a file."""
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
_LLAMA3 = ("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral")
"""Splits before BPE with which llama.cpp begins a text by BOS, and looks words up before it merges, if nothing else
is said."""
_GPT2 = ("gpt-2", "gpt2", "phi-2", "olmo", "jais", "default")
_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
"""Splits of GPT-2 with each digit alone."""


def tokenizer_in(file: Gguf) -> tuple[Any, list[str]]:
    """The tokenizer beside a GGUF, or else the one inside; and notes on what the file does not say of it.

    Raises:
        CheckpointError: there is none. UnsupportedModel: it has other tokens than the file names.
    """
    from transformers import AutoTokenizer

    folder = file.file.parent
    if any((folder / name).is_file() for name in _FILES):
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        _check_tokens(file, tokenizer)
        return tokenizer, []
    if not file.tokens or file.settings.get("tokenizer.ggml.model") in (None, "none", "no_vocab"):
        raise CheckpointError(
            f"{file.file}: holds no tokenizer. Put that of the model (tokenizer.json, tokenizer_config.json) beside it."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), gguf_file=file.file.name, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises nothing narrower
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UnsupportedModel(
            f"{file.file}: transformers cannot build its tokenizer ({reason}). Put that of the model (tokenizer.json, "
            "tokenizer_config.json) beside it."
        ) from None
    notes = _take_splits(file, tokenizer)
    _take_special(file, tokenizer)
    notes += _take_added(file, tokenizer)
    notes += _take_start(file, tokenizer)
    if "tokenizer.chat_template" not in file.settings:
        notes.append("it has no chat template")
    _check_tokens(file, tokenizer)
    return tokenizer, notes


def ends_of(file: Gguf) -> list[int]:
    """Ids that end an answer."""
    found = [file.settings.get(f"tokenizer.ggml.{name}") for name in _ENDS]
    return list(dict.fromkeys(int(number) for number in found if number is not None))


def _take_splits(file: Gguf, tokenizer: Any) -> list[str]:
    """Where byte-level BPE cuts a text first. transformers knows some ways, and takes GPT-2's for all others."""
    from tokenizers import pre_tokenizers

    kind = file.settings.get("tokenizer.ggml.pre", "default")
    if file.settings["tokenizer.ggml.model"] != "gpt2":
        return []
    backend = tokenizer.backend_tokenizer
    if kind in _DIGITS:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    elif kind in _LLAMA3:
        backend.model.ignore_merges = True
    elif kind not in _GPT2 and not isinstance(backend.pre_tokenizer, pre_tokenizers.Sequence):
        return [f"its splits before BPE ({kind}) are not known here: text may be cut otherwise than the model learned"]
    return []


def _take_special(file: Gguf, tokenizer: Any) -> None:
    for name, key in _SPECIAL.items():
        number = file.settings.get(f"tokenizer.ggml.{key}")
        if number is not None and number < len(file.tokens):
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(int(number)))


def _take_added(file: Gguf, tokenizer: Any) -> list[str]:
    """Tokens that are found whole in a text: control tokens, and those that a user defined."""
    from transformers import AddedToken

    broken = []
    known = tokenizer.get_vocab()
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    for number, (text, kind) in enumerate(zip(file.tokens, file.token_types, strict=False)):
        if kind not in (_CONTROL, _USER) or text in added:
            continue
        if known.get(text) == number:
            token = AddedToken(text, normalized=False, special=kind == _CONTROL)
            tokenizer.add_tokens(token, special_tokens=kind == _CONTROL)
        else:
            broken.append(text)
    if not broken:
        return []
    return [f"{len(broken)} of its added tokens are not found whole in a text, such as {broken[0]!r}"]


def _take_start(file: Gguf, tokenizer: Any) -> list[str]:
    """Whether a text begins with BOS and ends with EOS."""
    kind, pre = (file.settings.get(f"tokenizer.ggml.{name}") for name in ("model", "pre"))
    told = file.settings.get("tokenizer.ggml.add_bos_token")
    start = (kind == "llama" or pre in _LLAMA3) if told is None else bool(told)
    end = bool(file.settings.get("tokenizer.ggml.add_eos_token", False))
    first, last = tokenizer.bos_token_id, tokenizer.eos_token_id
    if kind not in ("gpt2", "llama"):
        return []

    def as_told() -> bool:
        ids = tokenizer("a")["input_ids"]
        return (bool(ids) and ids[0] == first) == start and (bool(ids) and ids[-1] == last) == end

    if not as_told() and hasattr(tokenizer, "update_post_processor"):
        tokenizer.add_bos_token, tokenizer.add_eos_token = start and first is not None, end and last is not None
        tokenizer.update_post_processor()
    if as_told():
        return []
    return [f"its text begins{'' if start else ' not'} with BOS and ends{'' if end else ' not'} with EOS in llama.cpp, "
            "which the tokenizer of transformers does otherwise"]  # fmt: skip


def _check_tokens(file: Gguf, tokenizer: Any) -> None:
    """Hold the tokenizer's vocabulary against the file's, id by id; unused ids may be called anything."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    spelling = bytes_to_unicode()
    known = set(spelling.values())
    found = tokenizer.convert_ids_to_tokens(list(range(min(len(file.tokens), len(tokenizer)))))
    for number, (mine, theirs) in enumerate(zip(found, file.tokens, strict=False)):
        kind = file.token_types[number] if number < len(file.token_types) else _NORMAL
        if mine == theirs or kind not in (_NORMAL, _CONTROL, _USER):
            continue
        bytewise = "".join(spelling[byte] for byte in theirs.encode())
        if mine in (bytewise, "▁" * len(theirs)) and (not set(theirs) <= known or not theirs.strip()):
            continue
        raise UnsupportedModel(
            f"{file.file}: token {number} is {theirs!r} in the file, and {mine!r} in the tokenizer "
            "that transformers makes of it. Put the original tokenizer (tokenizer.json) beside the file, or give the "
            "original checkpoint."
        )
