"""Uptraining on two processes: launched as the documentation says, over gloo, on the CPU."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from uptraining import BASE, losses, make_home, run

import surgery
from surgery.train.checkpoints import checkpoints
from surgery.train.uptrain import uptrain

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = make_home(tmp_path_factory.mktemp("uptrain"))
    steps = [
        {"rewriter": "gqa", "kv_heads": 1, "init": "mean", "grouping": "neighbour"},
        {"rewriter": "dms", "gate": "head", "ratio": 1.3, "window": 4, "sinks": 2},  # learns without noise
    ]
    surgery.save(surgery.convert(surgery.load(folder / "parent"), {"steps": steps}), folder / "gated")
    return folder


def launch(home, out, port, *overrides, model="native"):
    """Two processes of a run that logs every step."""
    arguments = ["--model", home / model, "--data", home / "text.jsonl", "-o", out, "--log-steps", 1]
    for override in (*BASE, *overrides):
        arguments += ["--set", override]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", ROOT / "train/configs/cpu-2.yaml"]
    command += ["--main_process_port", port, "-m", "surgery.train.uptrain", *arguments, "--save-steps", 4]
    return subprocess.Popen(
        list(map(str, command)), env=ENVIRONMENT, cwd=out.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def test_two_processes_train_as_one_does_and_one_goes_on_with_their_checkpoint(home, tmp_path):
    uptrain(run(home, tmp_path / "one", model="gated"))
    job = launch(home, tmp_path / "two", 29611, model="gated")
    output = job.communicate(timeout=240)[0].decode()
    assert job.returncode == 0, output
    assert output.count("written to") == 1
    assert json.loads((tmp_path / "two" / "uptraining.json").read_text())["devices"] == 2
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == len(two) == 10
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
    # The first half of the run on two devices, the second on one.
    shutil.rmtree(checkpoints(tmp_path / "two" / "checkpoints")[-1])
    uptrain(run(home, tmp_path / "two", model="gated"))
    for a, b in zip(one, losses(tmp_path / "two"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)


def test_when_one_worker_dies_the_run_ends_and_its_checkpoints_are_whole(home, tmp_path):
    out = tmp_path / "out"
    job = launch(home, out, 29613, "tokens=640000")
    end = time.monotonic() + 240
    while not checkpoints(out / "checkpoints") and time.monotonic() < end and job.poll() is None:
        time.sleep(0.05)
    workers = [p for p in psutil.Process(job.pid).children(recursive=True) if "surgery.train.uptrain" in p.cmdline()]
    os.kill(workers[-1].pid, signal.SIGKILL)
    job.communicate(timeout=120)
    assert job.returncode != 0
    assert not any(p.is_running() for p in workers)
    found = checkpoints(out / "checkpoints")
    assert found
    for folder in found:
        for name in ("model.safetensors", "optimizer.pt", "trainer_state.json", "data-0.json", "data-1.json"):
            assert (folder / name).is_file()


def test_sharded_gradients_of_layers_that_share_caches_equal_those_of_one_process(home, tmp_path):
    command = ["-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port", 29617]
    command += [ROOT / "tests/fsdp_worker.py", home, tmp_path, "shared"]
    job = subprocess.run(
        [sys.executable, *map(str, command)], env=ENVIRONMENT, cwd=tmp_path, capture_output=True, timeout=240
    )
    assert job.returncode == 0, job.stderr.decode()[-3000:]
    found = torch.load(tmp_path / "gradients.pt")
    assert found.keys() == {"layer-local", "logits"}
    for stage, (alone, sharded) in found.items():
        assert alone.keys() == sharded.keys() and alone, stage
        for name, grad in alone.items():
            assert float(grad.norm()) > 0
            assert float((grad - sharded[name]).norm()) <= 1e-5 * float(grad.norm()), (stage, name)
