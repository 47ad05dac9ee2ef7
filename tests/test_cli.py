"""The command line: exit codes, one-line errors, help with examples."""

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import tiny_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast


@pytest.fixture
def folder(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "parent")
    return tmp_path / "parent"


def test_inspect_and_plan_need_no_weights(call, folder, tmp_path):
    (folder / "model.safetensors").unlink()
    code, out, _ = call("inspect", folder, "--json", tmp_path / "anatomy.json")
    assert code == 0
    assert "LlamaForCausalLM" in out
    assert json.loads((tmp_path / "anatomy.json").read_text())["sites"]
    code, out, _ = call("plan", folder, "-r", "gqa-2x")
    assert code == 0
    assert "loads in: everything that loads the parent" in out
    assert max(map(len, out.splitlines())) <= 100


def test_convert_writes_a_checkpoint_and_refuses_to_write_it_twice(call, folder, tmp_path):
    assert call("convert", folder, "-r", "mqa", "-o", tmp_path / "out")[0] == 0
    code, _, err = call("convert", folder, "-r", "mqa", "-o", tmp_path / "out")
    assert code == 2
    assert "--overwrite" in err
    assert call("convert", folder, "-r", "mqa", "-o", tmp_path / "out", "--overwrite")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("plan", "nowhere-at-all/x/y", "-r", "gqa-2x"), "no such folder"),
        (("plan", "FOLDER", "-r", "gqa-3x"), "no recipe of that name"),
        (("plan", "FOLDER", "-r", "gqa-2x", "--set", "kv_heads=99"), "asks for 99 KV heads"),
        (("plan", "FOLDER"), "give a recipe"),
        (("convert", "FOLDER", "-r", "mqa", "-o", "OUT", "--calibration", "missing.txt"), "no such text file"),
        (("eval", "FOLDER", "--text", "missing.txt"), "missing.txt"),
        (("generate", "FOLDER", "--prompt", "x"), "tokenizer"),
        (("frobnicate",), "No such command"),
        # options that nothing would read
        (("plan", "FOLDER", "-r", "mqa", "-o", "OUT"), "--out: is for a search within a budget"),
        (("plan", "FOLDER", "-r", "mqa", "--axes", "store", "--no-race"), "--axes, --no-race: is for a search"),
        (("plan", "FOLDER", "--ratio", "2", "--set", "kv_heads=1"), "--set: overrides options of a recipe"),
        (("inspect", "FOLDER", "--text", "OUT"), "--text: is for --gates"),
        (("inspect", "FOLDER", "--gates", "OUT"), "give one of them"),
        (("convert", "FOLDER", "-r", "mqa", "-o", "OUT", "--samples", "9"), "samples: is of calibration text"),
        (("convert", "FOLDER", "-r", "mqa", "-o", "OUT", "--streams", "bfloat16"), "streams: is of calibration text"),
        (("eval", "FOLDER", "--text", "OUT", "--questions", "9"), "questions: is of recall questions"),
        (("eval", "FOLDER", "--text", "OUT", "--merge-adapter"), "no adapter lies in the folder"),
        (("bench", "decode", "FOLDER", "--shape", "small"), "--shape: a model has a shape of its own"),
    ],
)
def test_errors_are_one_line_and_exit_2(call, folder, tmp_path, arguments, words):
    named = {"FOLDER": folder, "OUT": tmp_path / "out"}
    code, _, err = call(*(named.get(a, a) for a in arguments))
    assert code == 2
    assert words in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def add_tokenizer(folder, tokens):
    """A tokenizer that knows the words w0, w1, ..."""
    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(tokens)}, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)


@pytest.fixture
def refused(call, folder, tmp_path):
    """Runs a command on `folder` that must fail: one line on stderr, the parent untouched, no output."""

    def check(*arguments, code=2):
        before = {p.name: p.read_bytes() for p in folder.iterdir()}
        beside = sorted(p.name for p in tmp_path.iterdir())
        found, _, err = call(*arguments)
        assert found == code
        assert len(err.splitlines()) == 1 and "Traceback" not in err
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
        assert sorted(p.name for p in tmp_path.iterdir()) == beside
        return err

    return check


def test_a_tokenizer_with_more_ids_than_embeddings_serves_texts_that_do_not_use_them(call, refused, folder, tmp_path):
    add_tokenizer(folder, 200)
    (tmp_path / "text.txt").write_text("w1 w2 " * 200)
    (tmp_path / "other.txt").write_text("w1 w150 " * 200)
    for out, text, prompt in ((True, "text.txt", "w1"), (False, "other.txt", "w1 w150")):
        for i, arguments in enumerate(
            (
                ("convert", folder, "-r", "mqa", "-o", tmp_path / "out-1", "--calibration", tmp_path / text),
                ("eval", folder, "--text", tmp_path / text, "--length", "16", "--samples", "2"),
                ("generate", folder, "--prompt", prompt, "--tokens", "2"),
            )
        ):
            if out:
                code, _, err = call(*arguments)
                assert code == 0, err
            else:
                arguments = [tmp_path / "out-2" if a == tmp_path / "out-1" else a for a in arguments]
                where = ("calibration text", "evaluation text", "prompt")[i]
                assert f"{where}: token id 150 ('w150'), but the model knows 128" in refused(*arguments)
    assert call("convert", folder, "-r", "mqa", "-o", tmp_path / "out-3")[0] == 0
    assert (tmp_path / "out-3" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    ("text", "words"),
    [("w1 w2 w3", "3 tokens, shorter than one sequence of 256"), ("", "text.txt: holds no text")],
)
def test_too_little_text_is_refused(refused, folder, tmp_path, text, words):
    add_tokenizer(folder, 128)
    (tmp_path / "text.txt").write_text(text)
    convert = ("convert", folder, "-r", "mqa", "-o", tmp_path / "out", "--calibration", tmp_path / "text.txt")
    assert words in refused(*convert)
    assert words in refused("eval", folder, "--text", tmp_path / "text.txt")


def lose(folder):
    (folder / "model-00002-of-00002.safetensors").unlink()
    return "model-00002-of-00002.safetensors: this shard is missing"


def cut(folder):
    file = folder / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return "model-00002-of-00002.safetensors: damaged or cut short"


def spoil(change):
    def damage(folder):
        for file in folder.glob("*.safetensors"):
            tensors = load_file(file)
            if WEIGHT in tensors:
                tensors[WEIGHT] = change(tensors[WEIGHT])
                save_file(tensors, file, metadata={"format": "pt"})
        return WEIGHT

    return damage


WEIGHT = "model.layers.1.self_attn.k_proj.weight"
DAMAGES = {
    "missing shard": lose,
    "truncated shard": cut,
    "int8": spoil(lambda w: w.to(torch.int8)),
    "float64": spoil(torch.Tensor.double),
    "shape": spoil(lambda w: w[1:].clone()),
    "nan": spoil(lambda w: w.fill_(float("nan"))),
}


@pytest.mark.parametrize("recipe", ["mqa", "identity"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_refused(refused, tmp_path, folder, damage, recipe):
    """`mqa` streams from disk to disk, `identity` goes through memory."""
    tiny_model("llama").save_pretrained(folder, max_shard_size="200KB")
    (folder / "model.safetensors").unlink()
    words = DAMAGES[damage](folder)
    assert words in refused("convert", folder, "-r", recipe, "-o", tmp_path / "out")


@pytest.mark.parametrize("recipe", ["mqa", "identity"])
@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (OSError(errno.EROFS, "Read-only file system"), 2, "out: cannot be written ([Errno 30] Read-only file system)"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "out: the disk is full"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), 2, "out: the disk is full"),
        (KeyboardInterrupt(), 130, "Interrupted. Nothing was written."),
    ],
)
def test_failure_while_writing_leaves_nothing(refused, folder, tmp_path, monkeypatch, recipe, error, code, words):
    def fail(tensors, file, **_):
        Path(file).write_bytes(b"half")
        raise error

    monkeypatch.setattr("surgery.checkpoints.writing._Shard.close", lambda shard: fail({}, shard.folder / shard.name))
    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", fail)
    assert words in refused("convert", folder, "-r", recipe, "-o", tmp_path / "out", code=code)


def test_output_that_cannot_be_made_is_refused(refused, folder, tmp_path, monkeypatch):
    below = folder / "config.json" / "out"
    assert f"{below}: {folder / 'config.json'} cannot be written" in refused(
        "convert", folder, "-r", "mqa", "-o", below
    )
    assert "cannot be written" in refused("inspect", folder, "--json", below)

    def read_only(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("tempfile.mkdtemp", read_only)
    err = refused("convert", folder, "-r", "mqa", "-o", tmp_path / "out")
    assert f"{tmp_path / 'out'}: cannot be written (Read-only file system)" in err


@pytest.mark.parametrize("command", ["inspect", "plan", "convert", "eval", "generate", "demo"])
def test_help_shows_an_example(call, command):
    code, out, _ = call(command, "--help")
    assert code == 0
    assert "Example" in out


def test_module_runs_as_a_program():
    done = subprocess.run([sys.executable, "-m", "surgery", "--help"], capture_output=True, text=True, check=True)
    assert "convert" in done.stdout
