"""Training text: packed with its documents apart, the same on any number of devices, resumable to the token."""

import gzip
import json
import lzma

import pytest
import torch
from tokenizing import FIRST, said, word_tokenizer

from surgery.errors import CheckpointError
from surgery.train.data import PackedText, permutation, split_batch
from surgery.train.documents import PIECE, open_documents
from surgery.train.losses import IGNORE

END = 1


class Letters:
    """A tokenizer of letters; token 1 ends a document."""

    eos_token_id = END

    def __call__(self, text):
        return {"input_ids": [ord(c) for c in text]}


class Texts(list):
    digest = "texts"


@pytest.fixture
def texts():
    """23 documents of 1 to 40 letters, one of them blank."""
    lengths = torch.randint(1, 40, (23,), generator=torch.Generator().manual_seed(0)).tolist()
    found = Texts(chr(97 + i) * n for i, n in enumerate(lengths))
    found[7] = "  "
    return found


def stream(texts, **options):
    return PackedText(texts, Letters(), **{"batch": 4, "length": 16, "seed": 3, **options})


def steps(text, count):
    """The first `count` whole steps of one device, micro-batches joined."""
    batches = iter(text)
    found = []
    for _ in range(count):
        parts = [next(batches) for _ in range(text.accumulation)]
        found.append({name: torch.cat([part[name] for part in parts]) for name in parts[0]})
    return found


@pytest.mark.parametrize(("world", "micro"), [(1, 2), (2, None), (2, 1), (4, None)])
def test_the_steps_are_the_same_on_any_number_of_devices(texts, world, micro):
    alone = steps(stream(texts), 6)
    parts = [steps(stream(texts, rank=rank, world=world, micro_batch=micro), 6) for rank in range(world)]
    for n, whole in enumerate(alone):
        for name, tensor in whole.items():
            assert torch.equal(tensor, torch.cat([part[n][name] for part in parts]))


def test_positions_start_again_and_first_tokens_are_not_predicted(texts):
    for batch in steps(stream(texts), 5):
        ids, positions, labels = batch["input_ids"], batch["position_ids"], batch["labels"]
        assert ids.shape == positions.shape == labels.shape == (4, 16)
        assert (positions[:, 0] == 0).all()
        begins = torch.zeros_like(ids, dtype=torch.bool)
        begins[:, 0] = True
        begins[:, 1:] = ids[:, :-1] == END
        assert torch.equal(positions == 0, begins)
        assert torch.equal(labels == IGNORE, begins)
        assert torch.equal(labels[~begins], ids[~begins])


def test_joined_documents_are_predicted_across_their_borders(texts):
    batch = steps(stream(texts, separate=False), 1)[0]
    assert "position_ids" not in batch
    assert (batch["labels"][:, 0] == IGNORE).all()
    assert torch.equal(batch["labels"][:, 1:], batch["input_ids"][:, 1:])


def test_one_epoch_reads_every_document_once(texts):
    wanted = sorted(text for text in texts if text.strip())
    tokens = sum(len(text) + 1 for text in wanted)
    ids = torch.cat([b["input_ids"].flatten() for b in steps(stream(texts, batch=1), tokens // 16 + 1)])[:tokens]
    found = "".join(map(chr, ids.tolist())).split(chr(END))
    assert sorted(found[:-1]) == wanted


def test_order_depends_on_seed_and_epoch():
    orders = [tuple(permutation(50, seed, epoch).tolist()) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert len(set(orders)) == 3
    assert all(sorted(order) == list(range(50)) for order in orders)


def words(lengths):
    """Documents of the words w8, w9, ..."""
    return Texts(said(*(FIRST + (7 * n + i) % 120 for i in range(n))) for n in lengths)


LENGTHS = torch.randint(1, 40, (23,), generator=torch.Generator().manual_seed(1)).tolist()
FRONTS = {(): [], ("<s>",): [1], ("[gMASK]", "<s>"): [3, 1]}


@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("start", FRONTS)
def test_every_sequence_starts_as_the_tokenizer_starts_a_text(start, separate):
    front = FRONTS[start]
    text = PackedText(
        words(LENGTHS), word_tokenizer(start=start), batch=1, length=16, seed=3, separate=separate, vocab_size=128
    )
    order = permutation(len(LENGTHS), 3, 0).tolist()
    stream, read, cut = [], [], 0
    for i in order:
        stream += [*front, *(FIRST + (7 * LENGTHS[i] + k) % 120 for k in range(LENGTHS[i])), 2]
    batches = iter(text)
    while len(read) < len(stream):
        batch = {name: row[0].tolist() for name, row in next(batches).items()}
        ids, labels = batch["input_ids"], batch["labels"]
        at, skip = 0, 1
        assert len(ids) == 16 and ids[: len(front)] == front
        begins = not read or read[-1] == 2
        if not begins and front:
            # A document's own start may have been cut: it is read again as a whole.
            inside = next(n for n in range(len(read) + 1) if n == len(read) or read[-1 - n] == 2)
            if inside <= len(front):
                del read[len(read) - inside :]
            else:
                at, skip, cut = len(front), len(front) + 1, cut + 1
        read += ids[at:]
        assert labels[:skip] == [IGNORE] * skip
        for n in range(skip, 16):
            starts = separate and ids[n - 1] == 2
            assert labels[n] == (IGNORE if starts else ids[n])
        if separate:
            wanted = []
            for n in range(16):
                wanted.append(0 if n == 0 or ids[n - 1] == 2 else wanted[-1] + 1)
            assert batch["position_ids"] == wanted
    assert read[: len(stream)] == stream[: len(read)]
    assert cut > 5 or not front


def test_a_stream_with_started_sequences_goes_on_at_the_exact_token(tmp_path):
    def make(**options):
        return PackedText(
            words(LENGTHS), word_tokenizer(start=("[gMASK]", "<s>")), batch=4, length=16, seed=3, **options
        )

    whole = steps(make(), 7)
    for after in (1, 2, 3, 5):
        text = make()
        steps(text, after)
        text.save(tmp_path, after, 0)
        again = make()
        again.load(tmp_path)
        for n, batch in enumerate(steps(again, 7 - after)):
            for name, tensor in batch.items():
                assert torch.equal(tensor, whole[after + n][name])


def test_a_document_with_an_id_that_the_model_does_not_know_is_found_before_training():
    documents = words(LENGTHS)
    tokenizer = word_tokenizer(words=121)
    text = PackedText(documents, tokenizer, batch=2, length=16, seed=3, vocab_size=128)
    text.check(10**9)  # reads every document once, not for ever
    documents[5] += " w128"
    text = PackedText(documents, tokenizer, batch=2, length=16, seed=3, vocab_size=128)
    with pytest.raises(CheckpointError, match=r"training text, document 6: token id 128 \('w128'\)"):
        text.check(10**9)
    place = permutation(len(documents), 3, 0).tolist().index(5)
    assert place >= 2
    PackedText(documents, tokenizer, batch=2, length=4, seed=3, vocab_size=128).check(1)  # it is not read


@pytest.mark.parametrize("after", [1, 2, 4])
def test_a_stream_goes_on_at_the_exact_token_on_another_number_of_devices(texts, tmp_path, after):
    whole = steps(stream(texts), 7)
    for rank in range(2):
        text = stream(texts, rank=rank, world=2)
        steps(text, after)
        text.save(tmp_path, after, rank)
    for world in (1, 4):
        parts = []
        for rank in range(world):
            text = stream(texts, rank=rank, world=world)
            text.load(tmp_path)
            assert text.step == after
            parts.append(steps(text, 7 - after))
        for n in range(7 - after):
            for name in whole[0]:
                assert torch.equal(whole[after + n][name], torch.cat([part[n][name] for part in parts]))


def test_state_is_that_of_the_step_also_when_more_was_read(texts, tmp_path):
    text = stream(texts)
    steps(text, 5)
    text.save(tmp_path, 3, 0)
    again = stream(texts)
    again.load(tmp_path)
    assert torch.equal(steps(again, 1)[0]["input_ids"], steps(stream(texts), 4)[3]["input_ids"])


def test_a_state_without_this_devices_lanes_is_refused(texts, tmp_path):
    text = stream(texts, rank=0, world=2)
    text.save(tmp_path, 0, 0)
    with pytest.raises(CheckpointError, match="how far part 2 of the text was read"):
        stream(texts).load(tmp_path)


def test_batches_that_do_not_come_out_even_are_refused():
    assert split_batch(8, 2, 2) == (2, 2)
    with pytest.raises(CheckpointError, match=r"7 sequences cannot be split over 2 devices"):
        split_batch(7, 2, None)
    with pytest.raises(CheckpointError, match="--micro-batch"):
        split_batch(8, 1, 3)


LINES = [{"text": "one two"}, {"text": "three\nfour ünf"}, {"text": "six"}]


def write_jsonl(path, rows=LINES):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n")
    return path


def test_jsonl_is_read_by_number_plain_and_compressed(tmp_path):
    plain = write_jsonl(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(plain.read_bytes()))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    for name in ("a.jsonl", "a.jsonl.xz", "a.jsonl.gz"):
        documents = open_documents(tmp_path / name)
        assert [documents[i] for i in (2, 0, 1)] == ["six", "one two", "three\nfour ünf"]
        assert len(documents) == 3


def test_a_txt_is_cut_at_empty_lines_and_loses_nothing(tmp_path):
    text = "\n\n".join(f"Paragraph {i} " + "word " * 50 for i in range(900))
    (tmp_path / "a.txt").write_text(text)
    documents = open_documents(tmp_path / "a.txt")
    pieces = [documents[i] for i in range(len(documents))]
    assert len(pieces) == -(-len(text) // (PIECE + 300))
    assert "".join(pieces) == text


def test_a_folder_joins_its_files_parquet_too(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    write_jsonl(tmp_path / "a.jsonl")
    parquet.write_table(pyarrow.table({"text": ["from", "parquet"]}), tmp_path / "b.parquet")
    (tmp_path / "c.txt").write_text("plain text")
    documents = open_documents(tmp_path)
    assert [documents[i] for i in range(len(documents))][2:] == ["six", "from", "parquet", "plain text"]


def test_digest_follows_the_content(tmp_path):
    first = open_documents(write_jsonl(tmp_path / "a.jsonl")).digest
    assert open_documents(tmp_path / "a.jsonl").digest == first
    assert open_documents(write_jsonl(tmp_path / "a.jsonl", [*LINES[:2], {"text": "sax"}])).digest != first


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "a.jsonl: this shard is empty"),
        ("a.jsonl", '{"text": "  "}\n{"text": ""}\n', "a.jsonl: holds no text"),
        ("a.txt", "\n \n", "a.txt: holds no text"),
        ("a.jsonl", '{"words": "one"}\n', "document 1 is no JSON object with a field `text`"),
        ("a.jsonl", '{"text": 5}\n', "`text` is int, needs a string"),
        ("a.csv", "text\none\n", "format .csv not known"),
        ("a.jsonl.xz", "not compressed", "cannot be read"),
    ],
)
def test_data_without_text_is_refused_before_work(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        open_documents(tmp_path / name)


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_text("words", encoding="utf-8-sig")
    (tmp_path / "b.jsonl").write_text('{"text": "words"}\n', encoding="utf-8-sig")
    documents = open_documents(tmp_path)
    assert [documents[0], documents[1]] == ["words", "words"]


def test_an_empty_shard_of_a_folder_is_named(tmp_path):
    write_jsonl(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").touch()
    with pytest.raises(CheckpointError, match="b.jsonl: this shard is empty"):
        open_documents(tmp_path)


def test_parquet_without_a_text_column_and_missing_files_are_refused(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"words": ["one"]}), tmp_path / "a.parquet")
    with pytest.raises(CheckpointError, match="no column `text`; it has words"):
        open_documents(tmp_path / "a.parquet")
    with pytest.raises(CheckpointError, match="no such text file"):
        open_documents(tmp_path / "b.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no .jsonl"):
        open_documents(tmp_path / "empty")


def test_repeated_epochs_have_the_same_sequences(texts):
    ids = [batch["input_ids"] for batch in steps(stream(texts, batch=1, repeat=True), 60)]
    first = next(n for n in range(1, 60) if torch.equal(ids[n], ids[0]))
    assert first < 50
    for n in range(60 - first):
        assert torch.equal(ids[n], ids[n + first])
    fresh = [batch["input_ids"] for batch in steps(stream(texts, batch=1), 60)]
    assert not torch.equal(fresh[first + 1], fresh[1])


def test_repeated_epochs_leave_out_no_part_of_a_document_also_where_lanes_are_many():
    """Lanes beyond the documents read whole documents too, not the start of one for ever."""
    long = Texts("".join(map(chr, range(100 * (i + 1), 100 * (i + 1) + 40))) for i in range(2))
    batches = steps(stream(long, batch=3, length=8, repeat=True, separate=False), 5)
    third = torch.cat([batch["input_ids"][2] for batch in batches]).tolist()
    assert any(set(map(ord, text)) <= set(third) for text in long)
