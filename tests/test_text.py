"""Text for calibration and evaluation: formats, windows, refusals."""

import json

import pyarrow
import pyarrow.parquet
import pytest
import torch

from surgery import CheckpointError
from surgery.text import load_windows, read_texts


def letters(text):
    """A tokenizer: one token per character."""
    return {"input_ids": [ord(c) - 96 for c in text if c.isalpha()]}


def windows(source, length=4, **options):
    return load_windows(source, letters, vocab_size=27, length=length, **options)


def test_all_formats_give_the_same_documents(tmp_path):
    texts = ["first text", "second text"]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    (tmp_path / "a.txt").write_text("first text")
    assert read_texts(tmp_path / "a.jsonl") == read_texts(tmp_path / "a.parquet") == read_texts(texts) == texts
    assert read_texts(tmp_path / "a.txt") == ["first text"]


def test_documents_give_one_window_each_and_one_document_all_of_its():
    many = windows(["abcdefgh", "ab"])
    assert many.ids_BT.tolist() == [[1, 2, 3, 4], [1, 2, 0, 0]]
    assert many.mask_BT.tolist() == [[True] * 4, [True, True, False, False]]
    assert many.tokens == 6
    assert windows(["abcdefghij"]).ids_BT.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]


def test_digest_tells_texts_apart_and_repeats():
    assert windows(["abcd"]).digest == windows(["abcd"]).digest != windows(["abce"]).digest


def test_token_ids_need_no_tokenizer():
    ids = torch.arange(8).view(2, 4)
    assert load_windows(ids, vocab_size=8, length=4).ids_BT.equal(ids)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "holds no text"),
        (["", "  "], "holds no text"),
        (["abc"], "3 tokens, shorter than one sequence of 4"),
        ([1, 2], "a list of int"),
        ("missing.txt", "missing.txt: no such text file"),
        (torch.zeros(2, 3), "needs integers"),
        (torch.full((1, 4), 99), "token id 99, but the model knows 27"),
    ],
)
def test_unusable_text_is_refused(source, message):
    with pytest.raises(CheckpointError, match=message):
        windows(source)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"x", "format .csv not known"),
        ("a.txt", b"", "holds no text"),
        ("a.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("a.jsonl", b'{"body": "x"}\n', "line 1"),
        ("a.jsonl", b"nonsense\n", "line 1"),
        ("a.parquet", b"nonsense", "parquet"),
    ],
)
def test_unusable_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        windows(tmp_path / name)
    assert name in str(caught.value)


def test_missing_tokenizer_is_said():
    with pytest.raises(CheckpointError, match="needs a tokenizer"):
        load_windows(["abcd"], None, vocab_size=27, length=4)
