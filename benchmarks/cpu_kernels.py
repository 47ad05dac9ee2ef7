"""The operators on a CPU beside what torch does with the same cache; writes results/cpu_kernels.json.

python benchmarks/cpu_kernels.py [--rounds 9]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from common import environment, write
from torch import Tensor

from surgery.kernels.decode_gqa import decode_gqa
from surgery.kernels.decode_latent import decode_latent
from surgery.kernels.decode_ragged import decode_ragged
from surgery.kernels.ragged_schedule import ragged_schedule

SEED = 0


def timed(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each call, in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if i:
                seconds[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(values) for name, values in seconds.items()}


def row(
    kind: str, facts: dict[str, Any], ms: dict[str, float], ours: str, live_bytes: int, copy: float
) -> dict[str, Any]:
    ratios = {f"over_{name}": ms[name] / ms[ours] for name in ms if name != ours}
    speed = live_bytes / ms[ours] * 1e3
    return {"kind": kind, **facts, "ms": ms, **ratios, "gb_per_s": speed / 1e9, "of_read_bandwidth": speed / copy}


def heads(
    batch: int, kv_heads: int, length: int, capacity: int, dtype: torch.dtype, rounds: int, copy: float
) -> dict[str, Any]:
    """decode_gqa against sdpa: repeated K and V behind a static cache's mask, live slice repeated, `enable_gqa`."""
    N, H = 32, 128
    q = torch.randn(batch, N, H, dtype=dtype)
    k, v = (torch.randn(batch, kv_heads, capacity, H, dtype=dtype) for _ in range(2))
    lengths = torch.full((batch,), length, dtype=torch.int32)
    mask = (torch.arange(capacity) < length)[None, None, None]
    live_k, live_v = k[:, :, :length], v[:, :, :length]

    def repeated(k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        k, v = (t.repeat_interleave(N // kv_heads, 1) for t in (k, v))
        return F.scaled_dot_product_attention(q[:, :, None], k, v, attn_mask=mask)

    calls: dict[str, Callable[[], object]] = {
        "decode_gqa": lambda: decode_gqa(q, k, v, lengths, H**-0.5),
        "sdpa_enable_gqa": lambda: F.scaled_dot_product_attention(q[:, :, None], live_k, live_v, enable_gqa=True),
    }
    if kv_heads < N:
        calls["sdpa_repeated"] = lambda: repeated(live_k, live_v, None)
        calls["sdpa_repeated_static_mask"] = lambda: repeated(k, v, mask)
    facts = {
        "batch": batch,
        "heads": N,
        "kv_heads": kv_heads,
        "length": length,
        "capacity": capacity,
        "dtype": str(dtype),
    }
    live = 2 * batch * kv_heads * length * H * dtype.itemsize
    return row("decode_gqa", facts, timed(calls, rounds), "decode_gqa", live, copy)


def latents(batch: int, length: int, dtype: torch.dtype, rounds: int, copy: float) -> dict[str, Any]:
    """decode_latent, with its two small products, against expanding K and V of every head as transformers does."""
    N, H, R, P = 32, 128, 512, 64
    cache = torch.randn(batch, 1, length, R + P, dtype=dtype)
    q_nope, q_rope = torch.randn(batch, N, H, dtype=dtype), torch.randn(batch, N, P, dtype=dtype)
    k_up, v_up = torch.randn(N, H, R, dtype=dtype) / H**0.5, torch.randn(N, H, R, dtype=dtype) / R**0.5
    lengths, scale = torch.full((batch,), length, dtype=torch.int32), (H + P) ** -0.5

    def absorbed() -> Tensor:
        q = torch.cat((torch.einsum("bnh,nhr->bnr", q_nope, k_up), q_rope), -1)
        mean, _ = decode_latent(q, cache, lengths, scale, R)
        return torch.einsum("bnr,nhr->bnh", mean, v_up)

    def expanded() -> Tensor:
        latent, rope = cache[:, 0, :, :R], cache[:, :, :, R:]
        k = torch.cat((torch.einsum("bsr,nhr->bnsh", latent, k_up), rope.expand(-1, N, -1, -1)), -1)
        v = torch.einsum("bsr,nhr->bnsh", latent, v_up)
        return F.scaled_dot_product_attention(torch.cat((q_nope, q_rope), -1)[:, :, None], k, v, scale=scale)

    assert torch.allclose(absorbed().float(), expanded()[:, :, 0].float(), rtol=0.1, atol=0.1)
    facts = {"batch": batch, "heads": N, "rank": R, "rope_dims": P, "length": length, "dtype": str(dtype)}
    live = batch * length * (R + P) * dtype.itemsize
    ms = timed({"decode_latent": absorbed, "expanded": expanded}, max(3, rounds // 3))
    return row("decode_latent", facts, ms, "decode_latent", live, copy)


def unequal(batch: int, length: int, dtype: torch.dtype, rounds: int, copy: float) -> dict[str, Any]:
    """decode_ragged with lengths spread 8:1, against sdpa over the padded cache behind a mask per head."""
    N, K, H, page = 32, 8, 128, 64
    spread = torch.logspace(-3, 0, K, base=2.0)
    lengths = (length * spread).int().expand(batch, K).contiguous()
    M = -(-length // page)
    k, v = (torch.randn(batch * K * M, page, H, dtype=dtype) for _ in range(2))
    pages = torch.randperm(batch * K * M).to(torch.int32).view(batch, K, M)
    plan = ragged_schedule(lengths[None], 8, page)[0]
    q = torch.randn(batch, N, H, dtype=dtype)
    dense = [t[pages.long()].flatten(2, 3) for t in (k, v)]
    mask = (torch.arange(M * page) < lengths[..., None]).repeat_interleave(N // K, 1)[:, :, None]
    repeated = [t.repeat_interleave(N // K, 1) for t in dense]
    calls: dict[str, Callable[[], object]] = {
        "decode_ragged": lambda: decode_ragged(q, k, v, pages, lengths, plan, H**-0.5),
        "sdpa_padded_mask": lambda: F.scaled_dot_product_attention(q[:, :, None], *repeated, attn_mask=mask),
    }
    facts = {"batch": batch, "heads": N, "kv_heads": K, "longest": length, "dtype": str(dtype)}
    live = 2 * int(lengths.sum()) * H * dtype.itemsize
    return row("decode_ragged", facts, timed(calls, rounds), "decode_ragged", live, copy)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    torch.manual_seed(SEED)
    source = torch.ones(2**26)
    target = torch.empty_like(source)
    copy_ms = timed({"copy": lambda: target.copy_(source)}, rounds)["copy"]
    copy = source.numel() * 4 / copy_ms * 1e3
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for batch, kv_heads, length, capacity in (
            (1, 8, 8192, 8192), (4, 8, 8192, 8192), (1, 32, 8192, 8192), (1, 1, 8192, 8192), (1, 8, 2048, 8192),
            (1, 8, 512, 512),
        ):  # fmt: skip
            rows.append(heads(batch, kv_heads, length, capacity, dtype, rounds, copy))
        rows.extend(latents(batch, length, dtype, rounds, copy) for batch, length in ((1, 512), (1, 4096), (4, 1024)))
        rows.append(unequal(2, 4096, dtype, rounds, copy))
    data = {**environment(SEED), "rounds": rounds, "read_gb_per_s_of_a_copy": copy / 1e9, "rows": rows}
    write("cpu_kernels", data)


if __name__ == "__main__":
    main()
