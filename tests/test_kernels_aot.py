"""What the kernels compile to for GPUs that are not here: spills, shared memory, wide loads, matrix instructions.

The whole table, every shape for every architecture, is printed by `python benchmarks/tune_kernels.py --table`.
"""

from __future__ import annotations

import importlib.util

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from surgery.kernels.aot import DEVICES, SHARED_LIMIT, Gates, gates
from surgery.kernels.shapes import GATED, SHAPES, failures, launches

EVERYWHERE = ["gqa 32/8", "latent 32 x 512+64", "append 32/8"]
ON_SM_90 = [
    "gqa 32/8 visible", "mqa 64", "ragged 32/8", "ragged latent 32 x 512+64", "ragged schedule", "merge append",
    "compact", "int8 32/8", "int4 32/8", "int2 32/8", "append int4",
    "int4 32/8 visible, 4 scales",
]  # fmt: skip
CI = [(name, arch) for name in EVERYWHERE for arch in DEVICES] + [(name, "sm_90") for name in ON_SM_90]
REST = [(name, arch) for name in SHAPES for arch in DEVICES if (name, arch) not in CI]


def check(name: str, arch: str) -> None:
    made = launches(name, DEVICES[arch])
    assert made
    for launch in made:
        found = gates(launch, arch)
        assert not failures(name, found), f"{name} on {arch}: {failures(name, found)} ({found})"


@pytest.mark.parametrize(("name", "arch"), CI)
def test_kernel_compiles_within_its_gates(name: str, arch: str) -> None:
    check(name, arch)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "arch"), REST)
def test_every_shape_compiles_within_its_gates(name: str, arch: str) -> None:
    check(name, arch)


def test_gates_see_what_they_refuse() -> None:
    good = Gates(
        kernel="decode_gqa_kernel", arch="sm_90", registers=128, spills=0, shared=71680, copies_128=49, loads_narrow=0,
        mma="HMMA", instructions=341, ctas_per_sm=3,
    )  # fmt: skip
    assert "decode_gqa_kernel" in GATED and not failures("gqa 32/8", good)
    for change in (
        {"spills": 8}, {"shared": SHARED_LIMIT["sm_90"] + 1}, {"copies_128": 0}, {"loads_narrow": 1}, {"mma": ""},
        {"instructions": 5000},
    ):  # fmt: skip
        assert len(failures("gqa 32/8", Gates(**{**vars(good), **change}))) == 1
