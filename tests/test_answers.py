"""Answers of `inspect` and `plan` on disk: found again where nothing has changed, and only there."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import yaml
from families import tiny_config, tiny_model

import surgery
from surgery.cli import answer_files
from surgery.cli.answers import Answer, answer_of

RECIPE = {"steps": [{"rewriter": "gqa", "kv_heads": 1}]}
CASES = [
    ("llama", "inspect"),
    ("gemma2", "inspect"),
    ("bamba", "inspect"),
    ("gpt2_inverse", "inspect"),
    ("llama", "plan"),
    ("qwen3", "plan", "-r", "lowrank-2x"),
    ("llama", "plan", "-r", "mla-2x"),
]


@pytest.fixture
def files(monkeypatch, tmp_path):
    """The folder of answers; this process counts as one that has imported neither torch nor transformers."""
    monkeypatch.delenv("SURGERY_CACHE", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # the first plan of a process sets it, after the question was asked
    monkeypatch.setattr("surgery.cli.answers.untouched", lambda: True)
    monkeypatch.setattr(answer_files, "folder", lambda: tmp_path / "answers")
    return tmp_path / "answers"


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return path


def model_folder(path, family="llama"):
    tiny_model(family).save_pretrained(path)
    return path


def no_work(*_):
    raise AssertionError("worked out again")


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_the_same_question_gets_the_same_answer_without_work(call, files, recipe, tmp_path, monkeypatch, case):
    family, command, *options = case
    folder = model_folder(tmp_path / "model", family)
    options = options or (["-r", recipe] if command == "plan" else [])
    first = call(command, folder, *options, "--json", tmp_path / "first.json")
    monkeypatch.setattr("surgery.cli.answers.open_libraries", no_work)
    assert first[0] == 0, first[2]
    assert len(list(files.iterdir())) == 1
    assert call(command, folder, *options, "--json", tmp_path / "second.json") == first
    assert (tmp_path / "first.json").read_text() == (tmp_path / "second.json").read_text()


def test_a_known_anatomy_equals_that_of_the_library(call, files, tmp_path):
    folder = model_folder(tmp_path / "model")
    for _ in range(2):
        call("inspect", folder, "--json", tmp_path / "anatomy.json")
    anatomy = surgery.examine(folder).to_dict()
    assert json.loads((tmp_path / "anatomy.json").read_text()) == json.loads(json.dumps(anatomy))


def other_config(folder, recipe, monkeypatch, tmp_path):
    before = (folder / "config.json").read_text()
    changed = before.replace('"num_attention_heads": 4', '"num_attention_heads": 2')
    assert len(changed) == len(before) and changed != before
    (folder / "config.json").write_text(changed)


def other_file(folder, recipe, monkeypatch, tmp_path):
    (folder / "adapter_config.json").write_text("{}")


def other_recipe(folder, recipe, monkeypatch, tmp_path):
    recipe.write_text(recipe.read_text().replace("1", "2"))


def other_package(folder, recipe, monkeypatch, tmp_path):
    (tmp_path / "packages" / "transformers-9.0.dist-info").mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "packages")])


def other_settings(folder, recipe, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_ANYTHING", "1")


def other_machine(folder, recipe, monkeypatch, tmp_path):
    monkeypatch.setattr("platform.node", lambda: "another")


CHANGES = [other_config, other_file, other_recipe, other_package, other_settings, other_machine]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_whatever_changes_makes_it_another_question(files, recipe, tmp_path, monkeypatch, change):
    folder = tmp_path / "model"
    tiny_config("LlamaConfig", num_key_value_heads=2).save_pretrained(folder)
    count = iter(range(9))

    def ask():
        answer = answer_of(lambda: Answer(parts=(), data={"n": next(count)}), "plan", str(folder), str(recipe), "a=1")
        return answer.data["n"]

    assert (ask(), ask()) == (0, 0)
    change(folder, recipe, monkeypatch, tmp_path)
    assert (ask(), ask()) == (1, 1)


def test_changed_code_makes_it_another_question(tmp_path, monkeypatch):
    assert answer_files.installation()["code"].keys() == {"surgery", "torch", "transformers"}
    package = tmp_path / "some_library"
    package.mkdir()
    (package / "__init__.py").write_text("a = 1")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(answer_files, "_CODE", ("some_library",))
    seen = [answer_files.installation()]
    (package / "__init__.py").write_text("a = 11")
    seen.append(answer_files.installation())
    (package / "more.py").write_text("")
    seen.append(answer_files.installation())
    assert "some_library" not in sys.modules
    assert len({part["code"]["some_library"] for part in seen}) == 3


def test_other_options_and_commands_are_other_questions(files, recipe, tmp_path):
    folder = model_folder(tmp_path / "model")
    asked = [("inspect", folder), ("plan", folder, recipe), ("plan", folder, recipe, "a=1"), ("plan", folder, "mqa")]
    asked += [("inspect", folder / "config.json")]
    for _ in range(2):
        for question in asked:
            want = {"asked": [str(part) for part in question]}
            assert answer_of(lambda want=want: Answer(parts=("text",), data=want), *want["asked"]).data == want
    assert len(list(files.iterdir())) == len(asked)


def cut(text):
    return text[: len(text) // 2]


def altered(text):
    return text.replace("LlamaForCausalLM", "LlamaForCausalML", 1)


@pytest.mark.parametrize("damage", [cut, altered, lambda text: "", lambda text: "[]", lambda text: '{"answer": 1}'])
def test_damaged_answers_are_ignored_and_replaced(call, files, tmp_path, damage):
    folder = model_folder(tmp_path / "model")
    first = call("inspect", folder)
    (file,) = files.iterdir()
    whole = file.read_text()
    file.write_text(damage(whole))
    assert file.read_text() != whole
    assert call("inspect", folder) == first
    assert [f.read_text() for f in files.iterdir()] == [whole]


def test_a_folder_that_cannot_be_written_is_no_error(call, files, tmp_path):
    folder = model_folder(tmp_path / "model")
    files.write_text("a file stands in its place")
    first = call("inspect", folder)
    assert first[0] == 0 and call("inspect", folder) == first
    assert files.is_file()


def test_nothing_is_kept_where_that_is_switched_off(call, files, tmp_path, monkeypatch):
    monkeypatch.setenv("SURGERY_CACHE", "0")
    assert call("inspect", model_folder(tmp_path / "model"))[0] == 0
    assert not files.exists()


def test_nothing_is_kept_in_a_process_that_had_torch_before(call, files, tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.delenv("SURGERY_CACHE", raising=False)
    monkeypatch.setattr(answer_files, "write", no_work)
    monkeypatch.setattr(answer_files, "read", no_work)
    assert call("inspect", model_folder(tmp_path / "model"))[0] == 0


@pytest.mark.parametrize(("imported", "kept"), [("sys", True), ("surgery", True), ("surgery.rewriters", False)])
def test_a_process_in_which_methods_may_be_registered_keeps_nothing(imported, kept):
    code = f"import {imported}; from surgery.cli.answers import untouched; assert untouched() is {kept}"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)


def test_refusals_and_answers_with_a_warning_are_not_kept(call, files, tmp_path, caplog, recwarn):
    folder = model_folder(tmp_path / "model")
    assert call("plan", folder, "-r", "gqa-2x", "--set", "kv_heads=99")[0] == 2
    old = {"steps": [{"rewriter": "dms", "gate": "score:window", "ratio": 2}]}
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(old))
    assert call("plan", folder, "-r", tmp_path / "old.yaml")[0] == 0
    assert "is spelled `rewriter: evict`" in caplog.text

    def warned():
        warnings.warn("something", stacklevel=1)
        return Answer(parts=(), data={})

    answer_of(warned, "inspect", str(folder))
    assert [str(w.message) for w in recwarn] == ["something"]
    assert not files.exists()


def test_an_answer_from_files_that_changed_meanwhile_is_not_kept(files, tmp_path):
    folder = model_folder(tmp_path / "model")

    def work():
        (folder / "config.json").write_text("{}")
        return Answer(parts=(), data={})

    answer_of(work, "inspect", str(folder))
    assert not files.exists()


def test_the_oldest_answers_make_room(files, monkeypatch):
    monkeypatch.setattr(answer_files, "MOST_BYTES", 1000)
    for i in range(9):
        answer_files.write(str(i), "x" * 200)
    assert answer_files.read("8") and answer_files.read("7") and answer_files.read("0") is None
    assert sum(file.stat().st_size for file in files.iterdir()) <= 1000


def test_the_second_call_imports_no_torch(tmp_path, monkeypatch):
    monkeypatch.delenv("SURGERY_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    folder = model_folder(tmp_path / "model")
    code = (
        "import atexit, sys\n"
        "from surgery.cli import main\n"
        "atexit.register(lambda: print('with torch' if 'torch' in sys.modules else 'without', file=sys.stderr))\n"
        "main()"
    )

    def ask():
        command = [sys.executable, "-c", code, "inspect", str(folder)]
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent)

    first, second = ask(), ask()
    assert first.stdout == second.stdout != ""
    assert (first.stderr.split("\n")[-2], second.stderr) == ("with torch", "without\n")
    assert [file.suffix for file in (tmp_path / "hub" / "surgery" / "answers").iterdir()] == [".json"]


def test_inspect_and_plan_read_no_file_of_the_model_but_its_config(tmp_path):
    """Only the config is part of the question by its text; of other files, the question has size and time."""
    folder = model_folder(tmp_path / "model")
    opened, watching = set(), True

    def look(event, arguments):
        if watching and event == "open":
            opened.add(str(arguments[0]))

    sys.addaudithook(look)  # stays until the process ends
    surgery.plan(folder, "mla-2x")
    watching = False
    assert {Path(file).name for file in opened if file.startswith(str(folder))} == {"config.json"}
