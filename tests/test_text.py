"""Text for calibration and evaluation: formats, windows, refusals."""

import json

import pyarrow
import pyarrow.parquet
import pytest
import torch
from families import tiny_model
from tokenizing import said, word_tokenizer
from transformers import AutoConfig

import surgery
from surgery import CheckpointError
from surgery.calibration.text import encode, load_tokenizer, load_windows, read_texts, read_windows, special_tokens
from surgery.generate import generate


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


def test_the_first_windows_that_hold_so_many_tokens():
    many = windows(["abcd", "ab", "abcd", "abc"])
    assert [len(many.reaching(tokens)) for tokens in (1, 4, 5, 6, 7, 13, 14)] == [1, 1, 2, 2, 3, 4, 4]
    assert many.reaching(6).ids_BT.equal(many.ids_BT[:2])


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
        ("a.jsonl", b'{"text": null}\n', "line 1: `text` is NoneType, needs a string"),
        ("a.jsonl", b'{"text": 5}\n', "line 1: `text` is int, needs a string"),
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


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_text("words", encoding="utf-8-sig")
    (tmp_path / "a.jsonl").write_text('{"text": "words"}\n', encoding="utf-8-sig")
    assert read_texts(tmp_path / "a.txt") == read_texts(tmp_path / "a.jsonl") == ["words"]


def test_numbers_in_a_column_of_text_are_refused(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(CheckpointError, match="column `text` holds int"):
        read_texts(tmp_path / "a.parquet")


# How a tokenizer starts and ends a text

FRAMES = [
    ((), (), [], []),
    (("<s>",), (), [1], []),
    ((), ("</s>",), [], [2]),
    (("[gMASK]", "<s>"), ("</s>",), [3, 1], [2]),
    (("</s>",), (), [2], []),
]


@pytest.mark.parametrize(("start", "end", "front", "back"), FRAMES)
@pytest.mark.parametrize("text", [said(8, 9), said(*range(8, 100)) + " " + said(*range(8, 100)) * 9, "unknown words"])
def test_what_a_tokenizer_puts_around_a_text_is_found(start, end, front, back, text):
    assert special_tokens(word_tokenizer(start=start, end=end), [text]) == (front, back)


def test_an_empty_text_says_nothing_and_the_next_one_does():
    assert special_tokens(word_tokenizer(), ["", said(8)]) == ([1], [])


def test_every_window_of_a_long_text_starts_as_the_tokenizer_starts_a_text():
    found = load_windows([said(*range(8, 18))], word_tokenizer(), vocab_size=128, length=4)
    assert found.ids_BT.tolist() == [[1, 8, 9, 10], [1, 11, 12, 13], [1, 14, 15, 16]]
    assert found.start == ("<s>",)
    assert found.take(2).start == found.split()[1].start == ("<s>",)


def test_tokens_that_end_a_text_stand_at_its_end_alone():
    tokenizer = word_tokenizer(start=("[gMASK]", "<s>"), end=("</s>",))
    texts = [said(*range(8, 13)), said(20, 21)]
    found = load_windows(texts, tokenizer, vocab_size=128, length=5, every_window=True)
    assert found.ids_BT.tolist() == [[3, 1, 8, 9, 10], [3, 1, 11, 12, 2], [3, 1, 20, 21, 2]]
    assert found.start == ("[gMASK]", "<s>")


def test_a_tokenizer_that_puts_nothing_in_front_gives_the_windows_it_always_gave():
    found = load_windows([said(*range(8, 18))], word_tokenizer(start=()), vocab_size=128, length=4)
    assert found.ids_BT.tolist() == [[8, 9, 10, 11], [12, 13, 14, 15]]
    assert found.digest == "b023ba3c20a3d76d"
    assert found.start == ()


def test_first_windows_of_documents_are_as_they_always_were():
    texts = [said(*range(8, 18)), said(30, 31)]
    found = load_windows(texts, word_tokenizer(end=("</s>",)), vocab_size=128, length=4)
    assert found.ids_BT.tolist() == [[1, 8, 9, 10], [1, 30, 31, 2]]
    assert found.digest == "1b5540d8b64a03e1"


def test_windows_without_room_for_text_are_refused():
    tokenizer = word_tokenizer(start=("[gMASK]", "<s>"))
    with pytest.raises(CheckpointError, match="filled by the tokens that the tokenizer puts before every text"):
        load_windows([said(*range(8, 18))], tokenizer, vocab_size=128, length=2)


def test_long_rows_of_token_ids_are_cut_and_go_on_as_they_start():
    ids = torch.arange(8, 28).view(2, 10)
    ids[0, 0] = 1
    found = load_windows(ids, word_tokenizer(), vocab_size=128, length=4)
    assert found.ids_BT.tolist() == [
        [1, 9, 10, 11], [1, 12, 13, 14], [1, 15, 16, 17],  # began with <s>
        [18, 19, 20, 21], [22, 23, 24, 25],
    ]  # fmt: skip
    assert found.start is None
    assert load_windows(ids, vocab_size=128, length=5).ids_BT.equal(ids.view(4, 5))
    assert load_windows(ids, vocab_size=128, length=5, samples=3).ids_BT.equal(ids.view(4, 5)[:3])


def test_truncation_kept_in_a_tokenizer_file_does_not_shorten_texts(tmp_path):
    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.model_max_length = 4
    tokenizer.save_pretrained(tmp_path)
    found = load_windows([said(*range(8, 18))], load_tokenizer(tmp_path), vocab_size=128, length=6)
    assert found.ids_BT.tolist() == [[1, 8, 9, 10, 11, 12], [1, 13, 14, 15, 16, 17]]
    assert load_tokenizer(tmp_path).model_max_length == 4


def test_a_prompt_is_continued_although_the_tokenizer_ends_every_text():
    model, plain = tiny_model("llama"), word_tokenizer()
    wanted = generate(model, said(8, 9, 10), tokens=8, tokenizer=plain)
    assert generate(model, said(8, 9, 10), tokens=8, tokenizer=word_tokenizer(end=("</s>",))) == wanted
    ids = model.generate(torch.tensor([encode(plain, said(8, 9, 10))]), max_new_tokens=8, do_sample=False)
    assert plain.decode(ids[0], skip_special_tokens=True) == wanted


# A tokenizer with more ids than the model has embeddings


def test_surplus_ids_do_not_matter_until_a_text_uses_them():
    tokenizer = word_tokenizer(words=121)  # w128 is one too many
    known = load_windows([said(*range(8, 18))], word_tokenizer(), vocab_size=128, length=4)
    found = load_windows([said(*range(8, 18))], tokenizer, vocab_size=128, length=4)
    assert found.ids_BT.equal(known.ids_BT) and found.digest == known.digest
    with pytest.raises(CheckpointError, match=r"document 2: token id 128 \('w128'\), but the model knows 128"):
        load_windows([said(*range(8, 18)), said(8, 128)], tokenizer, vocab_size=128, length=4)
    # Behind the window that is used it is not in the way.
    load_windows([said(8, 9, 10, 11, 128), said(8)], tokenizer, vocab_size=128, length=4)


def test_a_prompt_with_a_surplus_id_is_refused_by_name():
    model, tokenizer = tiny_model("llama"), word_tokenizer(words=121)
    assert generate(model, said(8), tokens=2, tokenizer=tokenizer).startswith("w8")
    with pytest.raises(CheckpointError, match=r"prompt: token id 128 \('w128'\)"):
        generate(model, said(8, 128), tokens=2, tokenizer=tokenizer)


# What lies beside a model


@pytest.mark.parametrize("kind", ["gemma3_text", "gpt2", "qwen3"])
@pytest.mark.parametrize("settings", [False, True])
def test_a_folder_without_a_vocabulary_has_no_tokenizer(tmp_path, kind, settings):
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    if settings:
        (tmp_path / "tokenizer_config.json").write_text("{}")
    assert load_tokenizer(tmp_path) is None


def test_a_damaged_tokenizer_is_named_and_not_called_absent(tmp_path):
    word_tokenizer().save_pretrained(tmp_path)
    tiny_model("llama").save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(file.read_text()[:200])
    model = surgery.load(tmp_path)
    with pytest.raises(CheckpointError, match="its tokenizer cannot be loaded"):
        read_windows(model.config, ["text"])
    ids = torch.arange(8, 108).view(2, 50)
    assert surgery.evaluate(model, baseline=model, text=ids, path="prefill").gap == 0  # reads no text


# How many positions a model has


@pytest.mark.parametrize(
    ("family", "name"), [("mpt", "max_seq_len"), ("gpt2", "n_positions"), ("llama", "max_position_embeddings")]
)
def test_windows_are_no_longer_than_the_models_positions(family, name):
    config = tiny_model(family).config
    setattr(config, name, 64)
    ids = torch.arange(8, 108).repeat(2, 2)
    assert read_windows(config, ids).ids_BT.equal(torch.cat([ids[:, :192].unflatten(1, (3, 64))]).flatten(0, 1))
    assert read_windows(config, ids, length=10).ids_BT.equal(ids.view(40, 10))
    assert read_windows(config, ids[:, :30]).ids_BT.equal(ids[:, :30])
    text = [said(*range(8, 128)) + " " + said(*range(8, 128))]
    assert read_windows(config, text, word_tokenizer()).ids_BT.shape == (3, 64)
    for source in (ids, text):
        with pytest.raises(CheckpointError, match="windows of 65 tokens, but the model has 64 positions"):
            read_windows(config, source, word_tokenizer(), length=65)
    with pytest.raises(CheckpointError, match="windows of 100 tokens were given, but length=64 was asked for"):
        read_windows(config, load_windows(ids, vocab_size=128, length=100))


def test_a_model_without_a_limit_has_windows_of_512():
    config = tiny_model("bloom").config
    assert read_windows(config, [said(*range(8, 128)) + " "] * 9, word_tokenizer()).ids_BT.shape[1] == 121
    assert read_windows(config, [(said(*range(8, 128)) + " ") * 9], word_tokenizer()).ids_BT.shape == (2, 512)
