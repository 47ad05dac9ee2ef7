"""The Triton kernels under Triton's interpreter, in a process of its own: it is chosen when a kernel is decorated."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from kernel_cases import CASES

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
if importlib.metadata.version("triton").startswith("3.6") and not importlib.metadata.version("numpy") < "2.4":
    pytest.skip("the interpreter of Triton 3.6 cannot loop beside numpy >= 2.4", allow_module_level=True)

# bfloat16 is left out: the interpreter computes with its bits as if they were integers, without an error.
REQUESTS = [f"{name}-{dtype}" for name in CASES for dtype in ("float32", "float16")]


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> dict[str, dict[str, str]]:
    """All selected cases, run at once."""
    selected = [i.callspec.params["name"] for i in request.session.items if i.path == request.path]  # type: ignore[attr-defined]
    run = subprocess.run(
        [sys.executable, Path(__file__).with_name("kernel_cases.py"), *selected],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    return {line["case"]: line for line in lines} | {"stderr": {"error": run.stderr[-2000:]}}


@pytest.mark.parametrize("name", REQUESTS)
def test_kernel_agrees_with_float64(name: str, results: dict[str, dict[str, str]]) -> None:
    assert name in results, results["stderr"]["error"]
    assert results[name]["error"] is None, results[name]["error"]
