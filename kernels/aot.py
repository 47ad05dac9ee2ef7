"""Compile recorded launches for a GPU that is not there, and read from the machine code what it will cost.

A launch is compiled exactly as Triton would on the device: same constants, same 16-byte alignment of pointers and of
integers that 16 divides. ptxas, cuobjdump and nvdisasm come with Triton's wheel.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .launching import Device, Launch, triton

_TYPES = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int64: "*i64", torch.int32: "*i32",
    torch.int16: "*i16", torch.uint16: "*u16", torch.int8: "*i8", torch.uint8: "*u8", torch.bool: "*i1",
}  # fmt: skip

DEVICES = {
    "sm_80": Device(arch="sm_80", multiprocessors=108),
    "sm_90": Device(arch="sm_90", multiprocessors=132),
    "sm_100": Device(arch="sm_100", multiprocessors=148),
    "gfx942": Device(arch="gfx942", multiprocessors=304),
}
SHARED_LIMIT = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
"""Bytes of shared memory that one program can have."""


@dataclass(frozen=True, kw_only=True)
class Gates:
    """What the machine code of one kernel shows."""

    kernel: str
    arch: str
    registers: int
    spills: int
    """Bytes of local memory per thread."""
    shared: int
    """Bytes per program."""
    copies_128: int
    """Asynchronous 16-byte copies from global to shared memory (LDGSTS.128); on AMD, 16-byte loads."""
    loads_narrow: int
    """Loads of 1 or 2 bytes from global memory."""
    mma: str
    """Kinds of matrix instruction found."""
    instructions: int
    """Of the largest loop, from its first to its last instruction."""
    ctas_per_sm: int
    """Programs that registers and shared memory allow at once on one multiprocessor."""


def compile_launch(launch: Launch, arch: str) -> Any:
    """Triton's compiled kernel of a recorded launch."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    target = GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch[3:]), 32)
    names = launch.kernel.arg_names
    options = dict(launch.options)
    given = dict(zip(names, launch.arguments, strict=False))
    given |= {name: options.pop(name) for name in names if name in options}
    constant = {parameter.name for parameter in launch.kernel.params if parameter.is_constexpr}
    signature, constexprs, attributes = {}, {}, {}
    for place, name in enumerate(names):
        value = given[name]
        # As Triton's own specialisation: 1 is a constant, multiples of 16 are marked.
        if name in constant or (isinstance(value, int) and value == 1):
            signature[name], constexprs[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = _TYPES[value.dtype]
            attributes[(place,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constexprs, attributes)
    return triton.compile(source, target=target, options=options)


def gates(launch: Launch, arch: str) -> Gates:
    """Compile, and read the machine code; on AMD targets only that it compiles, and its shared memory."""
    compiled = compile_launch(launch, arch)
    name, shared = launch.kernel.__name__, int(compiled.metadata.shared)
    if arch.startswith("gfx"):
        code = compiled.asm["amdgcn"]
        registers = int(_find(r"\.vgpr_count:\s*(\d+)", code))
        spills = int(_find(r"\.vgpr_spill_count:\s*(\d+)", code)) * 4
        mma = "MFMA" if "v_mfma" in code else ""
        wide = len(re.findall(r"(?:buffer|global)_load_dwordx4", code))
        narrow = len(re.findall(r"(?:buffer|global)_load_(?:ushort|ubyte|short|sbyte)", code))
        return Gates(
            kernel=name, arch=arch, registers=registers, spills=spills, shared=shared, copies_128=wide,
            loads_narrow=narrow, mma=mma, instructions=0, ctas_per_sm=0,
        )  # fmt: skip
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        usage = _tool("cuobjdump", "-res-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name)
    registers = int(_find(r"REG:(\d+)", usage))
    stack = int(_find(r"STACK:(\d+)", usage)) + int(_find(r"LOCAL:(\d+)", usage))
    found = [kind for kind in ("HGMMA", "HMMA", "IMMA", "UTCHMMA", "UTCQMMA") if re.search(rf"\b{kind}\b", code)]
    threads = int(compiled.metadata.num_warps) * 32
    per_register = -(-registers // 8) * 8 * threads
    return Gates(
        kernel=name,
        arch=arch,
        registers=registers,
        spills=stack,
        shared=shared,
        copies_128=len(re.findall(r"LDGSTS\.[\w.]*128", code)),
        loads_narrow=len(re.findall(r"LDG(?:STS)?\.[\w.]*[US](?:8|16)\b", code)),
        mma="+".join(found),
        instructions=_largest_loop(code),
        ctas_per_sm=min(65536 // per_register, (SHARED_LIMIT[arch] + 1024) // (shared + 1024), 2048 // threads),
    )


def _largest_loop(code: str) -> int:
    """Instructions between a label and the last branch back to it, of the longest such stretch."""
    lines = [line.strip() for line in code.splitlines()]
    place, count, longest = {}, 0, 0
    for line in lines:
        if label := re.match(r"(\.L_x_\d+):", line):
            place[label[1]] = count
        elif re.match(r"(/\*[0-9a-f]+\*/)?\s*[@{A-Z]", line) and line.endswith(";"):
            count += 1
            if (target := re.search(r"BRA.*?`\((\.L_x_\d+)\)", line)) and target[1] in place:
                longest = max(longest, count - place[target[1]])
    return longest


def _tool(name: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


def _find(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    return found[1] if found else "0"
