"""The two doors of uptraining: `surgery train` and `python -m surgery.train.uptrain`."""

import json

import pytest
from uptraining import BASE, make_home

from surgery.errors import RecipeError
from surgery.train.command import make_run


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("uptrain"))


def arguments(home, out):
    found = ["train", "--model", home / "native", "--data", home / "text.jsonl", "-o", out]
    return found + [word for override in BASE for word in ("--set", override)]


def test_a_dry_run_shows_the_plan_in_100_columns_and_writes_nothing(call, home, tmp_path):
    code, out, err = call(*arguments(home, tmp_path / "out"), "--dry-run")
    assert code == 0, err
    for text in ("640 in 10 steps of 4 x 16", "layer-local", "KL(parent || model)", "converted attention", "memory"):
        assert text in out
    assert max(map(len, out.splitlines())) <= 100
    assert not (tmp_path / "out").exists()
    code, shown, _ = call(*arguments(home, tmp_path / "out"), "--dry-run", "--json", "-")
    assert code == 0 and json.loads(shown).keys() == {"tokens", "steps", "parameters", "bytes"}


def test_a_run_ends_with_a_table_and_a_summary(call, home, tmp_path):
    out = tmp_path / "out"
    more = ("--held-out", home / "held.jsonl", "--json", tmp_path / "summary.json")
    code, shown, err = call(*arguments(home, out), *more)
    assert code == 0, err
    assert "KL to the parent" in shown and "written to" in shown
    assert max(map(len, shown.splitlines())) <= 100
    assert json.loads((tmp_path / "summary.json").read_text())["tokens"] == 640
    assert "step 1 of 10: loss" in err and "step 10 of 10: held out nats per token" in err  # no terminal: lines
    assert (out / "model" / "config.json").is_file()


def test_a_run_file_gives_every_option_and_the_command_line_wins(call, home, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        f"model: {home / 'native'}\ndata: {home / 'text.jsonl'}\nout: {tmp_path / 'out'}\nseed: 7\n"
        "uptrain:\n  tokens: 6400\n  batch: 4\n  length: 16\n"
    )
    code, out, err = call("train", "--config", file, "--set", "tokens=1280", "--set", "uptrain.ce=0.5", "--dry-run")
    assert code == 0, err
    assert "1.28k in 20 steps of 4 x 16" in out
    assert "KL(parent || model) + 0.5" in out
    run = make_run(file, {"seed": 9, "model": None}, ())
    assert (run.seed, run.model) == (9, str(home / "native"))


@pytest.mark.parametrize(
    ("content", "message"),
    [("modl: a\n", "unknown key 'modl'"), ("- a\n", "holds list"), ("model: a\ndata: b\n", "--out is missing")],
)
def test_a_wrong_run_file_is_refused(tmp_path, content, message):
    (tmp_path / "run.yaml").write_text(content)
    with pytest.raises(RecipeError, match=message):
        make_run(tmp_path / "run.yaml", {}, ())


def test_faults_of_the_user_are_one_line_and_exit_code_2(call, home, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    for words, message in (
        (("--data", tmp_path / "empty.jsonl"), "empty"),
        (("--data", tmp_path / "absent.jsonl"), "no such text file"),
        (("--set", "tokns=1"), "Did you mean 'tokens'"),
        (("--micro-batch", 3), "--micro-batch"),
        (("--model", tmp_path), "config.json"),
    ):
        code, _, err = call(*arguments(home, tmp_path / "out"), *words)
        assert (code, err.count("\n")) == (2, 1), err
        assert message in err
    assert not (tmp_path / "out").exists()


def test_help_has_examples(call):
    code, out, _ = call("train", "--help")
    assert code == 0
    assert "Examples:" in out and "--dry-run" in out
