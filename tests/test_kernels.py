"""Operators on a CPU: values, schemas, compilation, refusals."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import CASES, on_device, run

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_operator_agrees_with_float64(name: str, dtype: torch.dtype) -> None:
    run(name, on_device, dtype, "cpu")
