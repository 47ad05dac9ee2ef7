"""Several processes: each has its part of the windows, and the result is that of one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model
from safetensors.torch import load_file, save_file
from torch import Tensor

import surgery
from surgery.calibration import processes
from surgery.errors import CheckpointError
from surgery.runtime.layout import Ranked

STEPS: dict[str, dict[str, Any]] = {
    "gqa, refined": {"rewriter": "gqa", "kv_heads": 1, "refine": 6},
    "mla": {"rewriter": "mla", "keep": 0.5},
    "lowrank": {"rewriter": "lowrank", "keep": 0.5},
    "ranks": {"rewriter": "lowrank", "keep": 0.5, "ranks": "sensitivity"},
    "shared latents": {"rewriter": "share", "layout": "cla2", "init": "latent", "keep": 0.5},
    "key norm": {"rewriter": "evict", "scorer": "key_norm", "ratio": 2, "window": 4},
    "shares of heads": {"rewriter": "evict", "scorer": "streaming", "budget": "headkv", "ratio": 2, "recent": 3},
}


def text(windows: int = 28) -> Tensor:
    return torch.randint(3, 120, (windows, 20), generator=torch.Generator().manual_seed(0))


def converted(step: dict[str, Any]) -> dict[str, Tensor]:
    child = surgery.convert(tiny_model("llama"), {"steps": [step]}, calibration=text())
    found = {name: tensor.clone() for name, tensor in child.state_dict().items()}
    shares = [plan.retain.shares for plan in getattr(child, "plans", ()) if isinstance(plan.retain, Ranked)]
    return found | ({"shares": torch.tensor(shares)} if step.get("budget") else {})


def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    launched = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", __file__, str(tmp_path)]
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "MASTER_PORT": "0"}
    done = subprocess.run(launched, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, step in STEPS.items():
        together, alone = load_file(tmp_path / f"{name}.safetensors"), converted(step)
        assert together.keys() == alone.keys()
        for key, tensor in alone.items():
            if tensor.is_floating_point():
                scale = tensor.abs().max().item()
                distance = (together[key] - tensor).abs().max().item()
                assert distance <= 1e-6 * max(scale, 1.0), (name, key, distance)


def test_more_processes_than_batches_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "count", lambda: 3)
    with pytest.raises(CheckpointError, match="2 batches of windows to fit on for 3 processes"):
        processes.check_enough(2)


if __name__ == "__main__":
    with processes.joined():
        for name, step in STEPS.items():
            found = converted(step)
            if processes.rank() == 0:
                save_file(found, Path(sys.argv[1]) / f"{name}.safetensors")
