"""Small tokenizers of whole words that begin and end a text with tokens of their own."""

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

FIRST = 8
"""Id of the word `w8`; smaller ids are special tokens."""


def word_tokenizer(
    words: int = 120, start: Sequence[str] = ("<s>",), end: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """Ids: `<pad>` 0, `<s>` 1, `</s>` 2, `[gMASK]` 3, unused ones up to 7, then the words `w8`, `w9`, ..."""
    special = ["<pad>", "<s>", "</s>", "[gMASK]", "<4>", "<5>", "<6>", "<7>"]
    vocab = {token: i for i, token in enumerate([*special, *(f"w{i}" for i in range(FIRST, FIRST + words))])}
    core = Tokenizer(WordLevel(vocab, unk_token="<pad>"))
    core.pre_tokenizer = WhitespaceSplit()
    if start or end:
        core.post_processor = TemplateProcessing(
            single=[*start, "$A", *end], special_tokens=[(token, vocab[token]) for token in {*start, *end}]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<pad>"
    )


def said(*ids: int) -> str:
    """The text of some words by their ids."""
    return " ".join(f"w{i}" for i in ids)
