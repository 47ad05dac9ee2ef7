"""Damaged input and interrupted output: the error names the file or tensor, and nothing is left behind."""

import errno
import json
import re

import pytest
import torch
from families import tiny_model
from safetensors.torch import load_file, save_file

import surgery
from surgery import CheckpointError
from surgery.checkpoints.files import INDEX, SINGLE, Checkpoint
from surgery.checkpoints.places import local_folder
from surgery.checkpoints.storage import check_whole
from surgery.checkpoints.writing import check_output, check_space, new_folder, write_shards


@pytest.fixture
def sharded(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    tensors = [(f"w{i}", torch.full((64, 64), float(i))) for i in range(4)]
    write_shards(folder, tensors, shard_bytes=2 * 64 * 64 * 4)
    return folder


def test_shards_hold_what_was_written(sharded):
    checkpoint = Checkpoint(sharded)
    assert checkpoint.names() == ["w0", "w1", "w2", "w3"]
    assert len(list(sharded.glob("model-*-of-00002.safetensors"))) == 2
    assert all(checkpoint.get(f"w{i}").eq(i).all() for i in range(4))


def test_one_small_checkpoint_is_one_file(tmp_path):
    write_shards(tmp_path, [("w", torch.ones(2))])
    assert load_file(tmp_path / SINGLE)["w"].eq(1).all()
    assert not (tmp_path / INDEX).exists()


def test_missing_shard_is_named(sharded):
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00002.safetensors: this shard is missing"):
        Checkpoint(sharded)


def test_truncated_shard_is_named(sharded):
    file = sharded / "model-00001-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="model-00001-of-00002.safetensors: damaged or cut short"):
        Checkpoint(sharded)


def test_tensor_that_the_index_promises_is_named(sharded):
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["w9"] = "model-00001-of-00002.safetensors"
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="w9"):
        Checkpoint(sharded)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weight_that_is_not_finite_is_named(tmp_path, value):
    (tmp_path / "config.json").write_text("{}")
    weight = torch.ones(4, 4)
    weight[1, 2] = value
    save_file({"layers.0.w": weight}, tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match=r"layers\.0\.w has 1 values that are NaN or inf"):
        Checkpoint(tmp_path).get("layers.0.w")


def test_quantised_weight_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    save_file({"w": torch.ones(4, 4).to(torch.float8_e4m3fn)}, tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match="w is float8_e4m3fn"):
        Checkpoint(tmp_path).get("w")


def test_pickle_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is a pickle"):
        Checkpoint(tmp_path)


def test_folder_without_config_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        Checkpoint(tmp_path)


def test_name_that_is_no_folder_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        local_folder(str(tmp_path / "nowhere" / "at" / "all"))


def test_new_folder_appears_complete(tmp_path):
    with new_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("a")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "a").read_text() == "a"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, CheckpointError])
def test_interrupted_writing_leaves_nothing(tmp_path, error):
    with pytest.raises(error), new_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("a")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_interrupted_overwriting_keeps_the_old(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "out", overwrite=True):
        raise KeyboardInterrupt
    assert (tmp_path / "out" / "old").read_text() == "old"
    with new_folder(tmp_path / "out", overwrite=True) as folder:
        (folder / "new").write_text("new")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_full_disk_is_said_and_leaves_nothing(tmp_path):
    with pytest.raises(CheckpointError, match="the disk is full"), new_folder(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_too_little_space_is_said_before_the_work(tmp_path):
    with pytest.raises(CheckpointError, match="GB are free"):
        check_space(tmp_path / "out", 10**18)


def test_existing_output_is_refused(tmp_path):
    (tmp_path / "a").write_text("a")
    with pytest.raises(CheckpointError, match="not empty"):
        check_output(tmp_path)
    check_output(tmp_path, overwrite=True)
    with pytest.raises(CheckpointError, match="is a file"):
        check_output(tmp_path / "a")


def test_output_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write everywhere
    with pytest.raises(CheckpointError, match="cannot be written"):
        check_output(tmp_path / "out")


@pytest.fixture(params=["llama", "mixtral", "gpt2"])
def whole(request, tmp_path):
    """A checkpoint, and the name of one of its weights; Mixtral's files name experts otherwise than the model does."""
    model = tiny_model(request.param)
    model.save_pretrained(tmp_path)
    names = Checkpoint(tmp_path).names()
    return tmp_path, next(name for name in names if ".1." in name and name.endswith(("k_proj.weight", "c_attn.weight")))


def edit(folder, name, change):
    tensors = load_file(folder / SINGLE)
    tensor = change(tensors.pop(name))
    save_file(tensors if tensor is None else {**tensors, name: tensor}, folder / SINGLE, metadata={"format": "pt"})


def test_whole_checkpoint_passes(whole):
    check_whole(Checkpoint(whole[0]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: None, "no tensor NAME in its safetensors files"),
        (lambda w: w[:-1].clone(), r"NAME has shape \[.*\], its config asks for \["),
        (lambda w: w.to(torch.int8), "NAME is I8, needs float32, bfloat16 or float16"),
    ],
)
def test_weight_that_transformers_would_fill_at_random_or_cast_is_refused(whole, change, message):
    folder, name = whole
    edit(folder, name, change)
    with pytest.raises(CheckpointError, match=message.replace("NAME", re.escape(name))):
        check_whole(Checkpoint(folder))


def test_missing_expert_is_refused(tmp_path):
    tiny_model("mixtral").save_pretrained(tmp_path)
    edit(tmp_path, "model.layers.1.block_sparse_moe.experts.2.w1.weight", lambda w: None)
    with pytest.raises(CheckpointError, match=r"layers\.1\..*experts"):
        check_whole(Checkpoint(tmp_path))


def test_converted_checkpoint_is_judged_by_its_own_shapes(tmp_path):
    surgery.save(surgery.convert(tiny_model("gpt2"), {"steps": [{"rewriter": "gqa", "kv_heads": 1}]}), tmp_path)
    check_whole(Checkpoint(tmp_path))
    edit(tmp_path, "transformer.h.1.attn.k_proj.weight", lambda w: None)
    with pytest.raises(CheckpointError, match=r"no tensor transformer\.h\.1\.attn\.k_proj\.weight"):
        surgery.load(tmp_path)
