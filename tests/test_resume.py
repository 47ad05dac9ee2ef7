"""Interrupted conversions go on from the last layer that is done, to the same bits."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from families import tiny_config, tiny_model
from test_lazy_conversion import LAYERS, TEXT, compare, step

import surgery
from surgery import CheckpointError
from surgery.calibration.packing import load_packed, save_packed
from surgery.calibration.pipeline import Pipeline
from surgery.calibration.text import load_windows, read_windows
from surgery.calibration.working_copy import WorkingCopy
from surgery.checkpoints.unfinished import manifest

RECIPES = {
    "gqa": step("gqa", kv_heads=1),
    "refined": step("gqa", kv_heads=1, refine=4),
    "mla": step("mla", keep=0.5),
    "lowrank": step("lowrank", keep=0.5),
    "share": step("share", layout="cla2"),
    "share_latent": step("share", layout="cla(4)", init="latent", keep=0.5),
    "search": step("share", layout="search", kv_layers=2),
    "evict": step("evict", scorer="key_norm", ratio=1.2, window=4, sinks=0),
    "duo": step("evict", scorer="streaming", budget="duo", ratio=2, recent=4, sinks=2),
    "two": {"steps": [{"rewriter": "gqa", "kv_heads": 1}, {"rewriter": "share", "layout": "cla2"}]},
}


OFTEN = "refined", "share_latent", "search", "two"
"""Recipes that stand for the others, which `-m slow` runs."""


class Killed(BaseException):
    """Ends a conversion as a signal would."""


@pytest.fixture
def parent(tmp_path):
    tiny_model("llama", **LAYERS).save_pretrained(tmp_path / "parent")
    return tmp_path / "parent"


def die_at(monkeypatch, place, count):
    """Raise in the `count`th call of one of the pipeline's functions."""
    seen, inner = [], getattr(Pipeline, place)

    def counted(self, *args, **kwargs):
        seen.append(1)
        if len(seen) == count:
            raise Killed
        return inner(self, *args, **kwargs)

    monkeypatch.setattr(Pipeline, place, counted)
    return seen


@pytest.mark.parametrize(
    "recipe", [pytest.param(name, marks=() if name in OFTEN else pytest.mark.slow) for name in RECIPES]
)
def test_a_conversion_goes_on_where_it_was(tmp_path, monkeypatch, parent, recipe):
    whole, again = tmp_path / "whole", tmp_path / "again"
    # Layers whose cache alone is changed are not run.
    place, least = ("_take", 2) if recipe in ("evict", "duo") else ("student_step", 1)
    with monkeypatch.context() as patch:
        all_steps = die_at(patch, place, -1)
        surgery.convert_checkpoint(parent, RECIPES[recipe], whole, calibration=TEXT)
    total = len(all_steps)
    for part in (1, 2, 3):
        with monkeypatch.context() as patch:
            die_at(patch, place, max(least, total * part // 8))
            with pytest.raises(Killed):
                surgery.convert_checkpoint(parent, RECIPES[recipe], again, calibration=TEXT)
        assert not again.exists()
    with monkeypatch.context() as patch:
        steps = die_at(patch, place, -1)
        surgery.convert_checkpoint(parent, RECIPES[recipe], again, calibration=TEXT)
    assert len(steps) < total
    compare(again, whole)
    assert {file.name for file in tmp_path.iterdir()} == {"parent", "whole", "again"}


def test_a_conversion_goes_on_where_the_parent_has_to_be_loaded(tmp_path, monkeypatch, parent):
    monkeypatch.setattr(sys.modules["surgery.convert"], "can_read_by_layers", lambda *_: False)
    surgery.convert_checkpoint(parent, RECIPES["mla"], tmp_path / "whole", calibration=TEXT)
    with monkeypatch.context() as patch:
        die_at(patch, "_advance", 3)
        with pytest.raises(Killed):
            surgery.convert_checkpoint(parent, RECIPES["mla"], tmp_path / "again", calibration=TEXT)
    with monkeypatch.context() as patch:
        passed = die_at(patch, "_advance", -1)
        surgery.convert_checkpoint(parent, RECIPES["mla"], tmp_path / "again", calibration=TEXT)
    assert len(passed) == 2
    compare(tmp_path / "again", tmp_path / "whole")


def test_layers_that_are_done_are_not_visited_again(tmp_path, monkeypatch, parent):
    out, visited, inner = tmp_path / "out", [], WorkingCopy.visits

    def noted(self, *args, **kwargs):
        for visit in inner(self, *args, **kwargs):
            visited.append(visit.layer)
            if visit.layer == 2 and visited.count(2) == 1:
                raise Killed
            yield visit

    monkeypatch.setattr(WorkingCopy, "visits", noted)
    with pytest.raises(Killed):
        surgery.convert_checkpoint(parent, RECIPES["gqa"], out, calibration=TEXT)
    surgery.convert_checkpoint(parent, RECIPES["gqa"], out, calibration=TEXT)
    assert visited == [0, 1, 2, 2, 3]


PROGRAM = """
import sys, torch, surgery
text = torch.load(sys.argv[4])
surgery.convert_checkpoint(sys.argv[1], {"steps": [{"rewriter": sys.argv[2], **eval(sys.argv[3])}]}, sys.argv[5],
                           calibration=text)
"""


def test_a_conversion_goes_on_after_it_was_killed(tmp_path, parent):
    torch.save(TEXT, tmp_path / "text.pt")
    whole, again = tmp_path / "whole", tmp_path / "again"
    options = "share", "dict(layout='cla2', init='latent', keep=0.5)"
    arguments = [sys.executable, "-c", PROGRAM, str(parent), *options, str(tmp_path / "text.pt")]
    subprocess.run([*arguments, str(whole)], check=True)
    unfinished = tmp_path / "again.unfinished"
    for layers in (0, 2):
        program = subprocess.Popen([*arguments, str(again)])
        # The moment after a layer's file is there differs from run to run.
        while program.poll() is None and len(list(unfinished.glob("way-*.safetensors"))) <= layers:
            time.sleep(0.002)
        os.kill(program.pid, signal.SIGKILL)
        program.wait()
    subprocess.run([*arguments, str(again)], check=True)
    compare(again, whole)
    assert not unfinished.exists()


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"recipe": step("gqa", kv_heads=2)}, "recipe"),
        ({"calibration": TEXT[:20]}, "text"),
        ({"seed": 1}, "seed"),
        ({"source": "other"}, "model"),
    ],
)
def test_what_is_unfinished_is_of_one_conversion(tmp_path, monkeypatch, parent, changed, named):
    tiny_model("llama", seed=1, **LAYERS).save_pretrained(tmp_path / "other")
    options = {"source": parent, "recipe": RECIPES["gqa"], "calibration": TEXT}
    with monkeypatch.context() as patch:
        die_at(patch, "student_step", 12)
        with pytest.raises(Killed):
            surgery.convert_checkpoint(**options, out=tmp_path / "out")
    if "source" in changed:
        changed = {"source": tmp_path / changed["source"]}
    with pytest.raises(CheckpointError, match=f"differs in: {named}. Delete that folder"):
        surgery.convert_checkpoint(**{**options, **changed}, out=tmp_path / "out")
    assert json.loads((tmp_path / "out.unfinished" / "manifest.json").read_text())["seed"] == 0


def test_an_adapter_is_known_by_its_config_too(tmp_path, parent):
    plan, windows = surgery.plan(parent, RECIPES["gqa"]), load_windows(TEXT, vocab_size=128, length=TEXT.shape[1])
    found = []
    for alpha in (8, 16):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": alpha}))
        found.append(manifest(tmp_path, parent, plan, windows, 0, "float32")["model"])
    assert found[0].keys() == found[1].keys()
    assert found[0] != found[1]


def test_nothing_is_left_where_no_layer_was_done(tmp_path, monkeypatch, parent):
    die_at(monkeypatch, "student_step", 1)
    with pytest.raises(Killed):
        surgery.convert_checkpoint(parent, RECIPES["gqa"], tmp_path / "out", calibration=TEXT)
    assert {file.name for file in tmp_path.iterdir()} == {"parent"}


def test_a_disk_without_room_is_said_before_work_begins(tmp_path, monkeypatch, parent):
    monkeypatch.setattr("surgery.calibration.journal.STREAMS", 10**12)
    with pytest.raises(CheckpointError, match="GB are free"):
        surgery.convert_checkpoint(parent, RECIPES["gqa"], tmp_path / "out", calibration=TEXT)
    assert {file.name for file in tmp_path.iterdir()} == {"parent"}


def test_large_streams_go_to_files(monkeypatch):
    model = tiny_model("llama", **LAYERS)
    wanted = surgery.convert(model, RECIPES["share_latent"], calibration=TEXT)
    monkeypatch.setattr("surgery.calibration.journal.HELD_BYTES", 0)
    found = surgery.convert(model, RECIPES["share_latent"], calibration=TEXT)
    for name, tensor in wanted.state_dict().items():
        assert found.state_dict()[name].equal(tensor), name


def test_a_log_has_one_line_per_layer(tmp_path, call, parent):
    (tmp_path / "ids.txt").write_text("no tokenizer reads this")
    with pytest.MonkeyPatch.context() as patch:
        windows = read_windows(tiny_config("LlamaConfig"), TEXT)
        patch.setattr(sys.modules["surgery.convert"], "_windows", lambda *_: windows)
        options = ("-r", "mqa", "-o", tmp_path / "out", "--calibration", tmp_path / "ids.txt")
        code, _, err = call("convert", parent, *options)
    lines = [line for line in err.splitlines() if line.startswith("layer ")]
    assert code == 0
    numbers = r"[\d.]+ s, error [\d.e-]+, about \d+:\d\d left"
    assert [re.sub(numbers, "NUMBERS", line) for line in lines] == [
        f"layer {i} of 4: gqa, NUMBERS" for i in (1, 2, 3, 4)
    ]


def test_two_processes_do_not_work_on_one_result(tmp_path, monkeypatch, parent):
    inner = Pipeline.visits

    def nested(self, *args):
        with pytest.raises(CheckpointError, match="another process works there"):
            surgery.convert_checkpoint(parent, RECIPES["gqa"], tmp_path / "out", calibration=TEXT)
        return inner(self, *args)

    monkeypatch.setattr(Pipeline, "visits", nested)
    surgery.convert_checkpoint(parent, RECIPES["gqa"], tmp_path / "out", calibration=TEXT)


def test_complex_numbers_are_kept_between_layers(tmp_path):
    value = {
        "phase": torch.randn(3, 2, dtype=torch.complex128),
        "conjugate": torch.randn(2, dtype=torch.complex64).conj(),
    }
    save_packed(value, tmp_path / "kept.safetensors")
    found = load_packed(tmp_path / "kept.safetensors", mapped=True)
    assert all(found[name].dtype == value[name].dtype and found[name].equal(value[name]) for name in value)
