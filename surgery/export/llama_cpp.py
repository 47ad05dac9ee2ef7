"""The llama.cpp that a GGUF file is checked with: llama-cpp-python, of this environment or another."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import CheckpointError, PlanError
from . import llama_answers
from .parity import Ask, Parity, compare

PYTHON = "SURGERY_LLAMA_PYTHON"
"""Environment variable: interpreter of the environment that has llama-cpp-python."""
CONTEXT = 4096
"""Tokens that llama.cpp is asked to make room for, so that its log tells bytes per token."""


@dataclass(frozen=True, kw_only=True)
class LlamaCpp:
    """An installed llama-cpp-python."""

    python: str

    @classmethod
    def find(cls, python: str | None = None) -> LlamaCpp | None:
        """That of `python`, else of the interpreter that the environment names, else of this one; None without it.

        Raises:
            PlanError: an interpreter was named, and has none.
        """
        chosen = python or os.environ.get(PYTHON)
        probe = [chosen or sys.executable, "-P", "-c", "import importlib.util as u; print(u.find_spec('llama_cpp'))"]
        try:
            done = subprocess.run(probe, capture_output=True, text=True, check=False)
        except OSError:
            raise PlanError(f"llama.cpp: no interpreter at {chosen}.") from None
        if not done.returncode and done.stdout.strip() != "None":
            return cls(python=probe[0])
        if chosen:
            raise PlanError(f"llama.cpp: {chosen} has no llama-cpp-python (tested: 0.3.36).")
        return None

    def compare(self, want: dict[str, Tensor], file: Path, ask: Ask, model: Any) -> Parity:
        """Ask for what `want` holds of `model`.

        Raises:
            CheckpointError: llama.cpp does not load the file; its own words.
        """
        ends = getattr(model.generation_config, "eos_token_id", None)
        request = {
            "file": str(file), "prompts": ask.prompts_BT.tolist(), "start": ask.start, "new_tokens": ask.new_tokens,
            "ends": [ends] if isinstance(ends, int) else list(ends or ()), "context": CONTEXT,
        }  # fmt: skip
        with tempfile.TemporaryDirectory(prefix="surgery-llama-") as scratch:
            asked, result = Path(scratch, "request.json"), Path(scratch, "result.npz")
            asked.write_text(json.dumps(request))
            done = subprocess.run(
                [self.python, "-P", str(llama_answers.__file__), str(asked), str(result)],
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            if done.returncode:
                reasons = [line for line in done.stderr.splitlines() if "error" in line.lower()]
                raise CheckpointError(f"llama.cpp does not run the file: {reasons[0] if reasons else done.returncode}")
            with np.load(result) as found:
                got = {"logits": torch.from_numpy(found["logits"]), "dynamic": torch.from_numpy(found["tokens"])}
                version = str(found["version"])
        cache = bytes_per_token(done.stderr)
        says = "" if cache is None else f", {cache:g} KV bytes per token (float32)"
        return compare({name: want[name] for name in got}, got, f"llama.cpp (llama-cpp-python {version}){says}")


def bytes_per_token(log: str) -> float | None:
    """Of the cache, by llama.cpp's own account; None where its log says nothing of it."""
    found = re.search(r"llama_kv_cache: +size = +([\d.]+) MiB \( *(\d+) cells", log)
    return None if found is None else round(float(found[1]) * 2**20 / int(found[2]), 2)
