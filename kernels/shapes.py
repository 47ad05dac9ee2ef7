"""Representative launches of every kernel, over tensors without memory: what gates and tuner compile."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .aot import SHARED_LIMIT, Gates
from .compact import compact__triton
from .decode_gqa import decode_gqa_triton
from .decode_latent import decode_latent_triton
from .decode_quant import decode_quant_triton
from .decode_ragged import decode_ragged_triton
from .launching import Device, Launch, recording
from .merge_append import merge_append__triton
from .quant_append import quant_append__triton
from .quant_format import halves_of, planes_of
from .ragged_schedule import ragged_schedule_triton
from .rope_append import rope_append__triton


def _new(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _lengths(*shape: int) -> Tensor:
    return _new(*shape, dtype=torch.int32)


def _gqa(
    *, batch: int = 16, heads: int = 32, kv_heads: int = 8, width: int = 128, capacity: int = 32768,
    dtype: torch.dtype = torch.bfloat16, paged: bool = False, visible: bool = False,
) -> Callable[[], object]:  # fmt: skip
    def run() -> object:
        lines = (batch * capacity // 64, kv_heads, 64) if paged else (batch, kv_heads, capacity)
        k = _new(*lines, width, dtype=dtype)
        return decode_gqa_triton(
            _new(batch, heads, width, dtype=dtype), k, torch.empty_like(k), _lengths(batch), 0.1,
            _new(batch, capacity, dtype=torch.bool) if visible else None,
            _lengths(batch, capacity // 64) if paged else None,
        )  # fmt: skip

    return run


def _latent(*, heads: int, rank: int = 512, rope: int = 64, batch: int = 16) -> Callable[[], object]:
    def run() -> object:
        cache = _new(batch, 1, 32768, rank + rope)
        return decode_latent_triton(_new(batch, heads, rank + rope), cache, _lengths(batch), 0.1, rank)

    return run


def _append(*, kv_heads: int, width: int, pairs: int, start: int, values: bool) -> Callable[[], object]:
    def run() -> object:
        cache, new = _new(16, kv_heads, 32768, width), _new(16, kv_heads, width)
        angles = _new(16, pairs, dtype=torch.float32)
        return rope_append__triton(
            _new(16, 32, width), new, new if values else None, angles, angles, _lengths(16), cache,
            cache if values else None, False, start,
        )  # fmt: skip

    return run


def _ragged(*, heads: int = 32, kv_heads: int = 8, width: int = 128, rank: int | None = None) -> Callable[[], object]:
    """`rank`: of latents, whose first numbers are the values."""

    def run() -> object:
        k = _new(16 * kv_heads * 512, 64, width)
        v = torch.empty_like(k) if rank is None else k[..., :rank]
        lengths, programs = _lengths(16, kv_heads), 2 * 132
        plan = _lengths(16 * kv_heads + 2 + programs)
        return decode_ragged_triton(_new(16, heads, width), k, v, _lengths(16, kv_heads, 512), lengths, plan, 0.1)

    return run


def _schedule() -> object:
    return ragged_schedule_triton(_lengths(32, 16, 8), 264, 64)


def _compact() -> None:
    k = _new(16 * 8 * 512, 64, 128)
    keep = _new(16, 8, 512 * 64, dtype=torch.bool)
    compact__triton(k, torch.empty_like(k), _lengths(16, 8, 512), keep, _lengths(16, 8))


def _merge() -> object:
    k, sums = _new(16 * 8 * 512, 64, 128), _new(16, 8, 128, dtype=torch.float32)
    small, new = _new(16, 8, dtype=torch.float32), _new(16, 8, 128)
    angles = _new(16, 64, dtype=torch.float32)
    return merge_append__triton(
        _new(16, 32, 128), new, new, _new(16, 8, dtype=torch.bool), small, angles, angles, _lengths(16, 8, 512), k,
        torch.empty_like(k), sums, sums, small, _lengths(16, 8),
    )  # fmt: skip


def _quantised(bits: int, width: int, kv_heads: int) -> tuple[Tensor, ...]:
    rows, scale = 32768 // halves_of(bits), torch.float16
    words = _new(16, kv_heads, rows, width // planes_of(bits), dtype=torch.int16)
    k_scale, v_scale = _new(16, kv_heads, 256, width, dtype=scale), _new(16, kv_heads, 32768, dtype=scale)
    ring = _new(16, kv_heads, 128, width)
    return words, k_scale, k_scale, words, v_scale, v_scale, ring, ring


def _quant(
    *, bits: int, heads: int = 32, kv_heads: int = 8, width: int = 128, parts: int = 0, visible: bool = False
) -> Callable[[], object]:
    def run() -> object:
        k_words, k_scale, k_low, v_words, v_scale, v_low, k_ring, v_ring = _quantised(bits, width, kv_heads)
        if parts:  # as the runtime has them, in groups of 32 tokens
            k_scale = k_low = _new(16, kv_heads, 1024, width, dtype=torch.float16)
            v_scale = v_low = _new(16, kv_heads, 32768, parts, dtype=torch.float16)
            k_ring = v_ring = _new(16, kv_heads, 32, width)
        words = (k_words, k_scale, k_low, v_words)
        tensors = (_new(16, heads, width), *words, v_scale, v_low, k_ring, v_ring, _lengths(16))
        seen = _new(16, 32768, dtype=torch.bool) if visible else None
        return decode_quant_triton(*tensors, bits, 0.1, seen)

    return run


def _quant_append(*, bits: int) -> Callable[[], object]:
    def run() -> None:
        new = _new(16, 8, 128)
        tensors = (new, new, _lengths(16), *_quantised(bits, 128, 8))
        quant_append__triton(*tensors, bits)  # type: ignore[call-arg, arg-type]

    return run


SHAPES: dict[str, Callable[[], object]] = {
    "gqa 32/8": _gqa(),
    "gqa 32/8 batch 1": _gqa(batch=1),
    "gqa 32/8 fp16": _gqa(dtype=torch.float16),
    "gqa 32/8 width 64": _gqa(width=64),
    "gqa 32/8 paged": _gqa(paged=True),
    "gqa 32/8 visible": _gqa(visible=True),
    "mha 32": _gqa(kv_heads=32),
    "mqa 32": _gqa(kv_heads=1),
    "mqa 64": _gqa(heads=64, kv_heads=1),
    "gqa 16/8 width 256": _gqa(heads=16, width=256),
    "latent 16 x 512+64": _latent(heads=16),
    "latent 32 x 512+64": _latent(heads=32),
    "latent 64 x 512+64": _latent(heads=64),
    "latent 32 x 256+32": _latent(heads=32, rank=256, rope=32),
    "latent 64 x 256+64": _latent(heads=64, rank=256),
    "latent 32 x 128": _latent(heads=32, rank=128, rope=0),
    "append 32/8": _append(kv_heads=8, width=128, pairs=64, start=0, values=True),
    "append latent": _append(kv_heads=1, width=576, pairs=32, start=512, values=False),
    "ragged 32/8": _ragged(),
    "ragged mha 32": _ragged(kv_heads=32),
    "ragged 32/8 width 64": _ragged(width=64),
    "ragged latent 32 x 128+32": _ragged(kv_heads=1, width=160, rank=128),
    "ragged latent 32 x 256+64": _ragged(kv_heads=1, width=320, rank=256),
    "ragged latent 32 x 512+64": _ragged(kv_heads=1, width=576, rank=512),
    "ragged schedule": _schedule,
    "compact": _compact,
    "merge append": _merge,
    "int8 32/8": _quant(bits=8),
    "int4 32/8": _quant(bits=4),
    "int4 mha 32": _quant(bits=4, kv_heads=32),
    "int2 32/8": _quant(bits=2),
    "int4 32/8 visible, 4 scales": _quant(bits=4, parts=4, visible=True),
    "append int4": _quant_append(bits=4),
    "append int2": _quant_append(bits=2),
}


def launches(name: str, device: Device) -> list[Launch]:
    """What a shape launches on `device`."""
    with recording(device) as made:
        SHAPES[name]()
    return made


GATED = {
    "decode_gqa_kernel": 1000,
    "decode_latent_kernel": 1100,
    "decode_ragged_kernel": 1100,
    "decode_quant_kernel": 1700,
}
"""Kernels whose loop must copy 16 bytes at a time and multiply matrices, with the most instructions their largest loop
may have on sm_80 and sm_90, about a fifth above what the widest shape was first compiled to."""


def failures(name: str, found: Gates) -> list[str]:
    """What of a kernel's machine code is out of bounds."""
    limits = {
        "spills": found.spills == 0,
        "registers": found.registers <= (512 if found.arch.startswith("gfx") else 255),
        "shared memory": found.shared <= SHARED_LIMIT[found.arch],
    }
    if found.kernel in GATED:
        limits["16-byte copies"] = found.copies_128 > 0
        # Masks are bytes, and the scales of values two bytes per token, which Triton 3.6 loads one by one.
        narrow = 32 if "scales" in name else 16 if name.startswith("int") else 4 if "visible" in name else 0
        limits["no narrow loads"] = found.loads_narrow <= narrow or found.arch.startswith("gfx")
        limits["matrix instruction"] = bool(found.mma)
        # Latents are several times as wide as heads.
        most = GATED[found.kernel] * (2 if name.startswith("ragged latent") else 1)
        limits["instructions"] = found.arch not in ("sm_80", "sm_90") or found.instructions <= most
    return [what for what, holds in limits.items() if not holds]
