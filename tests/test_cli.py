"""The command line: exit codes, one-line errors, help with examples."""

import json
import subprocess
import sys

import pytest
from families import tiny_model

from surgery.cli import main


def run(monkeypatch, capsys, *arguments):
    """(exit code, stdout, stderr) of one command."""
    monkeypatch.setattr(sys, "argv", ["surgery", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    captured = capsys.readouterr()
    return caught.value.code, captured.out, captured.err


@pytest.fixture
def call(monkeypatch, capsys):
    return lambda *arguments: run(monkeypatch, capsys, *arguments)


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
        (("plan", "FOLDER"), "Missing option"),
        (("convert", "FOLDER", "-r", "mqa", "-o", "OUT", "--calibration", "missing.txt"), "no such text file"),
        (("eval", "FOLDER", "--text", "missing.txt"), "missing.txt"),
        (("generate", "FOLDER", "--prompt", "x"), "tokenizer"),
        (("frobnicate",), "No such command"),
    ],
)
def test_errors_are_one_line_and_exit_2(call, folder, tmp_path, arguments, words):
    named = {"FOLDER": folder, "OUT": tmp_path / "out"}
    code, _, err = call(*(named.get(a, a) for a in arguments))
    assert code == 2
    assert words in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["inspect", "plan", "convert", "eval", "generate", "demo"])
def test_help_shows_an_example(call, command):
    code, out, _ = call(command, "--help")
    assert code == 0
    assert "Example" in out


def test_module_runs_as_a_program():
    done = subprocess.run([sys.executable, "-m", "surgery.cli", "--help"], capture_output=True, text=True, check=True)
    assert "convert" in done.stdout
