"""What commands print and where: --json, --quiet, exit codes, progress without a terminal, completion, doctor."""

import json
import logging
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from families import tiny_model

import surgery
from surgery import console
from surgery.cli import doctor
from surgery.cli.verbs import EXIT_CODES


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "parent"
    tiny_model("llama").save_pretrained(folder)
    return folder


def test_json_to_standard_output_is_all_that_is_there_and_what_a_file_holds(call, folder, tmp_path):
    code, out, _ = call("inspect", folder, "--json", "-")
    assert code == 0
    _, table, _ = call("inspect", folder, "--json", tmp_path / "result.json")
    assert table.strip()
    assert json.loads((tmp_path / "result.json").read_text()) == json.loads(out)


def test_quiet_prints_nothing_but_errors(call, folder, tmp_path):
    asked = ("convert", folder, "-r", "mqa", "-o", tmp_path / "out", "-q", "--json", tmp_path / "result.json")
    assert call(*asked) == (0, "", "")
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["written"] == str(tmp_path / "out") and result["layers"]
    code, out, err = call(*asked)
    assert (code, out) == (2, "") and "--overwrite" in err


def test_the_text_of_generate_is_printed_under_quiet_too(call, folder, monkeypatch):
    monkeypatch.setattr(import_module("surgery.generate"), "generate", lambda *_, **__: "said [bold]")
    assert call("generate", folder, "--prompt", "x", "-q")[1] == "said [bold]\n"
    assert json.loads(call("generate", folder, "--prompt", "x", "--json", "-")[1]) == {"text": "said [bold]"}


def test_exit_codes_are_those_of_the_help(call, folder, monkeypatch):
    assert list(EXIT_CODES) == [0, 1, 2, 130]
    assert call("plan", folder, "-r", "mqa")[0] == 0
    assert call("plan", folder, "-r", "nothing-of-that-name")[0] == 2
    assert call("plan", "--frob")[0] == 2
    for error, code, words in (
        (RuntimeError("surprise"), 1, "RuntimeError: surprise (this is a bug; run again with --debug"),
        (KeyboardInterrupt(), 130, "Interrupted. Nothing was written."),
    ):

        def fail(*_, error=error):
            raise error

        monkeypatch.setattr(import_module("surgery.plan"), "plan", fail)
        found = call("plan", folder, "-r", "mqa")
        assert found[0] == code and words in found[2]


def test_an_interruption_says_where_work_is_kept(call, folder, tmp_path, monkeypatch):
    (tmp_path / "out.unfinished").mkdir()

    def fail(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(import_module("surgery.convert"), "convert_checkpoint", fail)
    code, _, err = call("convert", folder, "-r", "mqa", "-o", tmp_path / "out")
    assert code == 130 and f"kept in {tmp_path / 'out.unfinished'}, and the same command goes on" in err


def test_usage_errors_name_the_command_whose_help_to_read(call):
    assert call("plan", "--frob")[2] == "No such option: --frob (Possible options: --ratio). See: surgery plan --help\n"
    assert "Did you mean 'bench'? See: surgery --help" in call("bnch")[2]
    for words in ((), ("bench",)):
        code, out, err = call(*words)
        assert (code, out) == (2, "") and err.startswith("Usage: surgery") and err.endswith("\n")


@pytest.mark.parametrize("flag", ["-V", "--version"])
def test_the_version_is_told_without_torch(flag):
    code = f"import sys; sys.argv = ['surgery', '{flag}']\nfrom surgery.cli import main\ntry: main()\n"
    code += "finally: assert not {'torch', 'transformers'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"surgery {surgery.__version__}\n"


@pytest.mark.parametrize(
    ("words", "found"),
    [("surgery pl", {"plan"}), ("surgery plan ./m -r mlkv", {"mlkv-4"}), ("surgery convert --ov", {"--overwrite"})],
)
def test_a_shell_completes_commands_options_and_recipes(call, monkeypatch, words, found):
    monkeypatch.setenv("_SURGERY_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(words.count(" ")))
    assert set(call()[1].split()) == found


def test_progress_without_a_terminal_is_lines_with_the_time_left(capsys, monkeypatch):
    monkeypatch.setattr(console, "LINE_SECONDS", 0.0)
    for quiet in (False, True):
        with console.output(quiet=quiet), console.progress("counting", 2000) as advance:
            advance(1000)
            advance(1000)
        assert capsys.readouterr().err == ("" if quiet else "counting: 1,000 of 2,000, about 0:00 left\n")
    with console.output(), console.stage("loading"):
        assert capsys.readouterr().err == "loading\n"
    assert logging.getLogger("surgery").handlers == []
    assert console.time_left(83.4) == "about 1:23 left"


def test_json_to_standard_output_sends_what_others_print_to_stderr(capsys):
    with console.output(json_file=Path("-")):
        sys.stdout.write("a library speaks\n")
        console.show("a table")
        console.write_json({"n": 1})
    assert capsys.readouterr() == ('{\n  "n": 1\n}\n', "a library speaks\n")


@pytest.mark.parametrize(
    ("versions", "state", "words"),
    [
        ({"torch": "2.10.1"}, "fault", "pip install -U 'torch>=2.11'"),
        ({"transformers": None}, "fault", "pip install -U 'transformers>=5.16'"),
        ({"transformers": "6.1.0"}, "note", "Newer than what was tested"),
        ({"transformers": "5.16.3"}, "ok", ""),
    ],
)
def test_doctor_judges_versions_by_the_ranges_of_the_distribution(call, monkeypatch, versions, state, words):
    installed = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: versions.get(name, installed(name)))
    monkeypatch.setattr(doctor, "optional", lambda: [])
    code, out, _ = call("doctor", "--json", "-")
    found = json.loads(out)
    one = next(finding for finding in found["findings"] if finding["name"] in versions)
    assert (one["state"], words in one["advice"]) == (state, True)
    assert (code, found["ready"]) == ((1, False) if state == "fault" else (0, True))


def test_doctor_names_engines_in_other_environments_and_why_they_do_not_run(monkeypatch):
    monkeypatch.setenv("SURGERY_LLAMA_PYTHON", "/nowhere/python")
    monkeypatch.delenv("SURGERY_VLLM_PYTHON", raising=False)
    found = {finding.name: finding for finding in doctor.optional()}
    assert found["llama.cpp"].state == "note" and "/nowhere/python" in found["llama.cpp"].advice
    assert {"peft", "lm-eval", "gguf", "vLLM"} <= found.keys()
    assert all(finding.advice for finding in found.values() if finding.state == "absent")


def test_doctor_says_where_an_installed_package_does_not_import(monkeypatch):
    def broken(name):
        raise OSError("libtorch.so: cannot open shared object file")

    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    found = [finding for finding in doctor.needed() if finding.state == "fault"]
    assert [finding.name for finding in found] == ["import torch", "import transformers"]
    assert "libtorch.so" in found[0].found
