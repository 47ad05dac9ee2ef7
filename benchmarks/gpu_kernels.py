"""Check and time every decode kernel on a GPU beside its peers; writes results/gpu_kernels_<arch>.json.

python benchmarks/gpu_kernels.py [--seconds 540] [--only gqa ...] [--again] [--checks] [--rehearse]

Run it again until it says that nothing is left: rows that are done are kept, unless the kernels' files have changed.
Every call reads buffers that the last 256 MB of traffic did not touch; times are medians of CUDA-graph replays, with
eager times beside them; each row has its error against float64 and its share of the machine's measured read speed.
`--rehearse` walks through all of it on tiny tensors of a CPU, so that the script is known to work.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from common import ROOT, environment, write
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from surgery.kernels.decode_gqa import decode_gqa, decode_gqa_reference
from surgery.kernels.decode_latent import decode_latent, decode_latent_reference
from surgery.kernels.decode_quant import decode_quant, decode_quant_reference
from surgery.kernels.decode_ragged import decode_ragged, decode_ragged_reference
from surgery.kernels.launching import device_of
from surgery.kernels.merge_append import merge_append_
from surgery.kernels.quant_append import quant_append_
from surgery.kernels.quant_format import halves_of, planes_of
from surgery.kernels.ragged_schedule import programs_for, ragged_schedule
from surgery.kernels.rope_append import rope_append_

SEED = 0
COLD = 256 * 2**20
"""Bytes between two reads of the same buffer: far more than the L2 cache of any GPU."""
Call = Callable[[], object]


@dataclass
class Problem:
    """One set of tensors: what is timed on it, and the float64 answer."""

    ours: Call
    live_bytes: int
    peers: dict[str, Call]
    output: Callable[[], Tensor] | None = None
    reference: Callable[[], Tensor] | None = None


def heads(
    dev: torch.device, B: int, N: int, K: int, S: int, H: int, dtype: torch.dtype, *, capacity: int | None = None
) -> Problem:
    capacity = capacity or S
    q = torch.randn(B, N, H, device=dev, dtype=dtype)
    k, v = (torch.randn(B, K, capacity, H, device=dev, dtype=dtype) for _ in range(2))
    lengths = torch.full((B,), S, dtype=torch.int32, device=dev)
    scale, G = H**-0.5, N // K
    query, live_k, live_v = q[:, :, None], k[:, :, :S], v[:, :, :S]
    mask = (torch.arange(capacity, device=dev) < S)[None, None, None]

    def under(backend: SDPBackend) -> Call:
        def call() -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(query, live_k, live_v, enable_gqa=G > 1, scale=scale)

        return call

    peers: dict[str, Call] = {
        "sdpa_flash_exact": under(SDPBackend.FLASH_ATTENTION),
        "sdpa_cudnn_exact": under(SDPBackend.CUDNN_ATTENTION),
        "sdpa_repeated_static_mask": compiled(repeated_static, query, k, v, mask, G, scale),
        "naive_compiled": compiled(naive_heads, q, live_k, live_v, scale),
        "flex": compiled(flex, query, live_k, live_v, scale, G > 1),
        "flex_autotuned": compiled(flex, query, live_k, live_v, scale, G > 1, mode="max-autotune-no-cudagraphs"),
        "xformers_splitk": xformers_splitk(q, live_k, live_v, scale),
        "flashinfer": flashinfer_decode(q, live_k, live_v, scale),
    }
    return Problem(
        ours=lambda: decode_gqa(q, k, v, lengths, scale),
        live_bytes=2 * B * K * S * H * dtype.itemsize,
        peers=peers,
        output=lambda: decode_gqa(q, k, v, lengths, scale)[0][:1],
        reference=lambda: decode_gqa_reference(q[:1], live_k[:1], live_v[:1], None, scale)[0],
    )


def latents(dev: torch.device, B: int, N: int, S: int, R: int, P: int, dtype: torch.dtype) -> Problem:
    H, scale = 128, (128 + P) ** -0.5
    q = torch.randn(B, N, R + P, device=dev, dtype=dtype)
    cache = torch.randn(B, 1, S, R + P, device=dev, dtype=dtype)
    lengths = torch.full((B,), S, dtype=torch.int32, device=dev)
    k_up, v_up = (torch.randn(N, H, R, device=dev, dtype=dtype) / R**0.5 for _ in range(2))
    q_wide = torch.randn(B, N, 1, H + P, device=dev, dtype=dtype)

    peers: dict[str, Call] = {"naive_compiled": compiled(naive_latents, q, cache, scale, R)}
    if B * S * N * (2 * H + P) * dtype.itemsize < 16 * 2**30:
        peers["expanded_sdpa_compiled"] = compiled(expanded_latents, q_wide, cache, k_up, v_up, scale)
    return Problem(
        ours=lambda: decode_latent(q, cache, lengths, scale, R),
        live_bytes=B * S * (R + P) * dtype.itemsize,
        peers=peers,
        output=lambda: decode_latent(q, cache, lengths, scale, R)[0][:1],
        reference=lambda: decode_latent_reference(q[:1], cache[:1], None, scale, R)[0],
    )


def words(dev: torch.device, B: int, N: int, K: int, S: int, H: int, bits: int, dtype: torch.dtype) -> Problem:
    group = 128 if S >= 128 else 16
    shape = (B, K, S // halves_of(bits), H // planes_of(bits))
    k_words, v_words = (torch.randint(-(2**15), 2**15, shape, device=dev, dtype=torch.int16) for _ in range(2))
    k_scale, k_low = (torch.randn(B, K, S // group, H, device=dev).half() / 2**bits for _ in range(2))
    v_scale, v_low = (torch.randn(B, K, S, device=dev).half() / 2**bits for _ in range(2))
    k_ring, v_ring = (torch.randn(B, K, group, H, device=dev, dtype=dtype) for _ in range(2))
    q = torch.randn(B, N, H, device=dev, dtype=dtype)
    lengths = torch.full((B,), S, dtype=torch.int32, device=dev)
    cache = (k_words, k_scale, k_low, v_words, v_scale, v_low, k_ring, v_ring)
    k, v = (torch.randn(B, K, S, H, device=dev, dtype=dtype) for _ in range(2))
    scale = H**-0.5
    one = tuple(t[:1] for t in cache)
    return Problem(
        ours=lambda: decode_quant(q, *cache, lengths, bits, scale),
        live_bytes=sum(t.numel() * t.element_size() for t in cache[:6]),
        peers={"own_decode_gqa_same_dtype": lambda: decode_gqa(q, k, v, lengths, scale)},
        output=lambda: decode_quant(q, *cache, lengths, bits, scale)[0][:1],
        reference=lambda: decode_quant_reference(q[:1], *one, lengths[:1], bits, scale)[0],
    )


def unequal(dev: torch.device, B: int, N: int, K: int, S: int, H: int, dtype: torch.dtype) -> Problem:
    """Lengths between S / 8 and S."""
    page, scale = 64, H**-0.5
    spread = torch.logspace(-3, 0, K, base=2.0, device=dev)
    lengths = (S * spread).int().expand(B, K).contiguous()
    M = -(-S // page)
    k, v = (torch.randn(B * K * M, page, H, device=dev, dtype=dtype) for _ in range(2))
    pages = torch.randperm(B * K * M, device=dev).to(torch.int32).view(B, K, M)
    plan = ragged_schedule(lengths[None], programs_for(device_of(k)), page)[0]
    q = torch.randn(B, N, H, device=dev, dtype=dtype)
    padded = [torch.randn(B, K, S, H, device=dev, dtype=dtype) for _ in range(2)]
    same = torch.full((B,), int(lengths.float().mean()), dtype=torch.int32, device=dev)
    full = torch.full((B,), S, dtype=torch.int32, device=dev)
    return Problem(
        ours=lambda: decode_ragged(q, k, v, pages, lengths, plan, scale),
        live_bytes=2 * int(lengths.sum()) * H * dtype.itemsize,
        peers={
            "own_decode_gqa_padded": lambda: decode_gqa(q, *padded, full, scale),
            "own_decode_gqa_same_bytes": lambda: decode_gqa(q, *padded, same, scale),
        },
        output=lambda: decode_ragged(q, k, v, pages, lengths, plan, scale)[0][:1],
        reference=lambda: decode_ragged_reference(q[:1], k, v, pages[:1], lengths[:1], scale)[0],
    )


def append(dev: torch.device, B: int, N: int, K: int, H: int, dtype: torch.dtype) -> Problem:
    q, k, v = (torch.randn(B, n, H, device=dev, dtype=dtype) for n in (N, K, K))
    k_cache, v_cache = (torch.randn(B, K, 4096, H, device=dev, dtype=dtype) for _ in range(2))
    cos, sin = (torch.randn(B, H // 2, device=dev) for _ in range(2))
    slots = torch.full((B,), 100, dtype=torch.int32, device=dev)
    rows = torch.arange(B, device=dev)

    return Problem(
        ours=lambda: rope_append_(q, k, v, cos, sin, slots, k_cache, v_cache),
        live_bytes=2 * (q.numel() + k.numel() + v.numel()) * dtype.itemsize,
        peers={
            "separate_eager": lambda: append_separately(q, k, v, cos, sin, rows, slots, k_cache, v_cache),
            "separate_compiled": compiled(append_separately, q, k, v, cos, sin, rows, slots, k_cache, v_cache),
        },
    )


def merging(dev: torch.device, B: int, N: int, K: int, H: int, dtype: torch.dtype) -> Problem:
    q, k, v = (torch.randn(B, n, H, device=dev, dtype=dtype) for n in (N, K, K))
    cos, sin = (torch.randn(B, H // 2, device=dev) for _ in range(2))
    pages = torch.arange(B * K * 4, device=dev, dtype=torch.int32).view(B, K, 4)
    caches = [torch.randn(B * K * 4, 64, H, device=dev, dtype=dtype) for _ in range(2)]
    merge = torch.ones(B, K, dtype=torch.bool, device=dev)  # lengths stay, however often it runs
    state = [torch.zeros(B, K, H, device=dev), torch.zeros(B, K, H, device=dev), torch.ones(B, K, device=dev)]
    weight, lengths = torch.ones(B, K, device=dev), torch.full((B, K), 100, dtype=torch.int32, device=dev)
    return Problem(
        ours=lambda: merge_append_(q, k, v, merge, weight, cos, sin, pages, *caches, *state, lengths),
        live_bytes=2 * (q.numel() + k.numel() + v.numel()) * dtype.itemsize,
        peers={},
    )


def quantising(dev: torch.device, B: int, K: int, H: int, bits: int, dtype: torch.dtype) -> Problem:
    """The step that packs a full group."""
    k, v = (torch.randn(B, K, H, device=dev, dtype=dtype) for _ in range(2))
    shape = (B, K, 1024 // halves_of(bits), H // planes_of(bits))
    wide = [torch.zeros(shape, device=dev, dtype=torch.int16) for _ in range(2)]
    k_facts = [torch.zeros(B, K, 8, H, device=dev, dtype=torch.float16) for _ in range(2)]
    v_facts = [torch.zeros(B, K, 1024, device=dev, dtype=torch.float16) for _ in range(2)]
    rings = [torch.randn(B, K, 128, H, device=dev, dtype=dtype) for _ in range(2)]
    slots = torch.full((B,), 127, dtype=torch.int32, device=dev)
    return Problem(
        ours=lambda: quant_append_(k, v, slots, wide[0], *k_facts, wide[1], *v_facts, *rings, bits),
        live_bytes=sum(t.numel() * t.element_size() for t in rings),
        peers={},
    )


def problems(tiny: bool) -> dict[str, Callable[[torch.device], Problem]]:
    """Every row by name, the most telling first."""
    half = torch.bfloat16
    if tiny:
        return {
            "gqa 32/8 b2 96": lambda d: heads(d, 2, 8, 2, 96, 32, half, capacity=128),
            "mla 8 b2 96": lambda d: latents(d, 2, 8, 96, 32, 16, half),
            "int4 8/2 b2 128": lambda d: words(d, 2, 8, 2, 128, 64, 4, half),
            "ragged 8/2 b2 128": lambda d: unequal(d, 2, 8, 2, 128, 32, half),
            "append 8/2 b2": lambda d: append(d, 2, 8, 2, 32, half),
            "merge 8/2 b2": lambda d: merging(d, 2, 8, 2, 32, half),
            "pack int4 b2": lambda d: quantising(d, 2, 2, 64, 4, half),
        }
    made: dict[str, Callable[[torch.device], Problem]] = {}
    for B, S in ((16, 32768), (1, 4096), (1, 32768), (1, 131072), (16, 4096), (64, 4096)):
        made[f"gqa 32/8 b{B} {S}"] = lambda d, B=B, S=S: heads(d, B, 32, 8, S, 128, half)
        made[f"mla 32 512+64 b{B} {S}"] = lambda d, B=B, S=S: latents(d, B, 32, S, 512, 64, half)
        made[f"mqa 32 b{B} {S}"] = lambda d, B=B, S=S: heads(d, B, 32, 1, S, 128, half)
        if B * S <= 131072:
            made[f"mha 32 b{B} {S}"] = lambda d, B=B, S=S: heads(d, B, 32, 32, S, 128, half)
    for bits in (8, 4, 2):
        made[f"int{bits} 32/8 b16 32768"] = lambda d, b=bits: words(d, 16, 32, 8, 32768, 128, b, half)
    made["ragged 32/8 b16 32768"] = lambda d: unequal(d, 16, 32, 8, 32768, 128, half)
    made["ragged 32/8 b1 32768"] = lambda d: unequal(d, 1, 32, 8, 32768, 128, half)
    made["gqa 32/8 b16 8192 of 32768"] = lambda d: heads(d, 16, 32, 8, 8192, 128, half, capacity=32768)
    made["mla 16 512+64 b16 32768"] = lambda d: latents(d, 16, 16, 32768, 512, 64, half)
    made["mla 64 512+64 b16 32768"] = lambda d: latents(d, 16, 64, 32768, 512, 64, half)
    for bits in (8, 4, 2):
        made[f"int{bits} 32/8 b1 131072"] = lambda d, b=bits: words(d, 1, 32, 8, 131072, 128, b, half)
    for B in (1, 16, 64):
        made[f"append 32/8 b{B}"] = lambda d, B=B: append(d, B, 32, 8, 128, half)
        made[f"merge 32/8 b{B}"] = lambda d, B=B: merging(d, B, 32, 8, 128, half)
        made[f"pack int4 b{B}"] = lambda d, B=B: quantising(d, B, 8, 128, 4, half)
    return made


@functools.cache
def _fast(function: Callable[..., object], mode: str | None) -> Callable[..., object]:
    return torch.compile(function, dynamic=False, mode=mode)


def compiled(function: Callable[..., object], *arguments: Any, mode: str | None = None) -> Call:
    """One compilation serves all buffers: tensors are arguments, not what a closure holds."""
    return lambda: _fast(function, mode)(*arguments)


def repeated_static(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, groups: int, scale: float) -> Tensor:
    """What compiled transformers does with a static cache."""
    wide = [t.repeat_interleave(groups, 1) for t in (k, v)]
    return F.scaled_dot_product_attention(q, *wide, attn_mask=mask, scale=scale)


def naive_heads(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    scores = torch.einsum("bkgh,bksh->bkgs", q.unflatten(1, (k.shape[1], -1)), k) * scale
    return torch.einsum("bkgs,bksh->bkgh", scores.softmax(-1), v)


def naive_latents(q: Tensor, cache: Tensor, scale: float, rank: int) -> Tensor:
    scores = torch.matmul(q, cache[:, 0].transpose(1, 2)) * scale
    return torch.matmul(scores.softmax(-1), cache[:, 0, :, :rank])


def expanded_latents(q: Tensor, cache: Tensor, k_up: Tensor, v_up: Tensor, scale: float) -> Tensor:
    """K and V of every head from the latents, as transformers makes them at each step."""
    rank = k_up.shape[-1]
    latent, rope = cache[:, 0, :, :rank], cache[..., rank:].expand(-1, q.shape[1], -1, -1)
    k = torch.cat((torch.einsum("bsr,nhr->bnsh", latent, k_up), rope), -1)
    return F.scaled_dot_product_attention(q, k, torch.einsum("bsr,nhr->bnsh", latent, v_up), scale=scale)


def append_separately(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, rows: Tensor, slots: Tensor, k_cache: Tensor,
    v_cache: Tensor,
) -> Tensor:  # fmt: skip
    turned = []
    for x in (q, k):
        a, b = x.chunk(2, -1)
        turned.append(torch.cat((a * cos[:, None] - b * sin[:, None], b * cos[:, None] + a * sin[:, None]), -1))
    k_cache[rows, :, slots.long()] = turned[1].to(k.dtype)
    v_cache[rows, :, slots.long()] = v
    return turned[0].to(q.dtype)


def flex(q: Tensor, k: Tensor, v: Tensor, scale: float, gqa: bool) -> object:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention(q, k, v, scale=scale, enable_gqa=gqa)


def xformers_splitk(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Call:
    def call() -> Tensor:
        from xformers.ops import fmha

        B, N, H = q.shape
        K = k.shape[1]
        query = q.view(B, 1, K, N // K, H)
        key, value = (t.transpose(1, 2)[:, :, :, None].expand(-1, -1, -1, N // K, -1) for t in (k, v))
        return fmha.memory_efficient_attention_forward(query, key, value, scale=scale, op=fmha.triton_splitk.FwOp)

    return call


def flashinfer_decode(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Call:
    planned: list[Any] = []

    def call() -> Tensor:
        import flashinfer

        B, N, H = q.shape
        K, S = k.shape[1:3]
        if B == 1:
            return flashinfer.single_decode_with_kv_cache(q[0], k[0], v[0], kv_layout="HND", sm_scale=scale)
        if not planned:
            page = 64
            workspace = torch.empty(128 * 2**20, dtype=torch.uint8, device=q.device)
            wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
            count = S // page
            first = torch.arange(0, B * count + 1, count, dtype=torch.int32, device=q.device)
            last = torch.full((B,), page, dtype=torch.int32, device=q.device)
            every = torch.arange(B * count, dtype=torch.int32, device=q.device)
            wrapper.plan(first, every, last, N, K, H, page, q_data_type=q.dtype, kv_data_type=q.dtype, sm_scale=scale)
            paged = tuple(
                t[:, :, : count * page].unflatten(2, (count, page)).transpose(1, 2).flatten(0, 1).contiguous()
                for t in (k, v)
            )
            planned.extend((wrapper, paged))
        return planned[0].run(q, planned[1])

    return call


def graph_ms(calls: list[Call], on_gpu: bool) -> tuple[float, float]:
    """Milliseconds of one call: by replay of one graph over all buffers, and eager."""
    for call in calls:
        for _ in range(3):
            call()
    if not on_gpu:
        start = time.perf_counter()
        for call in calls:
            call()
        each = (time.perf_counter() - start) / len(calls) * 1e3
        return each, each
    eager = events_ms(lambda: [call() for call in calls]) / len(calls)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return events_ms(graph.replay) / len(calls), eager


def events_ms(call: Call, rounds: int = 15) -> float:
    """Median milliseconds between CUDA events around `call`."""
    call()
    taken = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end))
    return statistics.median(taken)


def ceiling(dev: torch.device) -> dict[str, float]:
    """GB/s of a sum over 4 GiB, and of a copy of 2 GiB (read plus written)."""
    if dev.type != "cuda":
        return {"read_gb_per_s": float("nan"), "copy_gb_per_s": float("nan")}
    data = torch.ones(2**30, device=dev)
    other = torch.empty(2**29, device=dev)
    read = data.numel() * 4 / events_ms(lambda: data.sum()) / 1e6
    copy = 2 * other.numel() * 4 / events_ms(lambda: other.copy_(data[: 2**29])) / 1e6
    return {"read_gb_per_s": read, "copy_gb_per_s": copy}


def measure(name: str, make: Callable[[torch.device], Problem], dev: torch.device, top: float) -> dict[str, Any]:
    torch.manual_seed(SEED)
    on_gpu = dev.type == "cuda"
    first = make(dev)
    row: dict[str, Any] = {"row": name, "live_bytes": first.live_bytes}
    if first.output and first.reference:
        want = first.reference().double()
        row["relative_error"] = float((first.output().double() - want).norm() / want.norm())
        del want
    copies = max(2, -(-COLD // first.live_bytes)) if on_gpu else 2
    sets = [first, *(make(dev) for _ in range(min(copies, 64) - 1))]
    row["sets"] = len(sets)
    row["ms"], row["eager_ms"] = graph_ms([p.ours for p in sets], on_gpu)
    row["gb_per_s"] = first.live_bytes / row["ms"] / 1e6
    row["of_read_speed"] = row["gb_per_s"] / top
    row["peers"] = {}
    for peer in first.peers:
        try:
            ms, eager = graph_ms([p.peers[peer] for p in sets], on_gpu)
            row["peers"][peer] = {"ms": ms, "eager_ms": eager, "ratio": ms / row["ms"]}
        except Exception as error:
            row["peers"][peer] = {
                "error": f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"
            }
            if on_gpu:
                torch.cuda.synchronize()
    return row


def checks(dtypes: tuple[str, ...]) -> dict[str, str | None]:
    """The small cases of tests/kernel_cases.py on this GPU; the error of each, None where it agrees."""
    code = "import kernel_cases; print(*kernel_cases.CASES)"
    path = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
    names = subprocess.run(
        [sys.executable, "-c", code], env=path, capture_output=True, text=True, check=True
    ).stdout.split()
    wanted = [f"{name}-{dtype}" for name in names for dtype in dtypes]
    run = subprocess.run(
        [sys.executable, ROOT / "tests" / "kernel_cases.py", *wanted], capture_output=True, text=True, env=path
    )
    found = {line["case"]: line["error"] for line in map(json.loads, run.stdout.splitlines())}
    return {name: found.get(name, f"did not run: {run.stderr[-300:]}") for name in wanted}


def digest() -> str:
    """Of the kernels' code and tables: rows of another digest are measured again."""
    files = sorted([*(ROOT / "kernels").glob("*.py"), *(ROOT / "kernels" / "configs").glob("*.json")])
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def show(data: dict[str, Any]) -> None:
    table = Table(title=f"{data.get('gpu')}, {data['ceiling']['read_gb_per_s']:.0f} GB/s read")
    for column in ("row", "us", "eager us", "GB/s", "of read", "error", "peers: their time over ours"):
        table.add_column(column)
    for row in data["rows"]:
        peers = "  ".join(
            f"{peer} {found['ratio']:.2f}" if "ratio" in found else f"[dim]{peer} -[/dim]"
            for peer, found in row["peers"].items()
        )
        error = f"{row['relative_error']:.1e}" if "relative_error" in row else ""
        table.add_row(
            row["row"], f"{1e3 * row['ms']:.1f}", f"{1e3 * row['eager_ms']:.1f}", f"{row['gb_per_s']:.0f}",
            f"{row['of_read_speed']:.0%}", error, peers,
        )  # fmt: skip
    Console(width=200).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=540, help="begin no row after that")
    parser.add_argument("--only", action="append", metavar="NAME", help="rows whose name begins so; may come again")
    parser.add_argument("--checks", action="store_true", help="compare with float64 in three dtypes, and time nothing")
    parser.add_argument("--again", action="store_true", help="measure rows again that are done")
    parser.add_argument("--rehearse", action="store_true", help="tiny tensors on a CPU; writes nothing")
    options = parser.parse_args()
    started, dev = time.time(), torch.device("cpu" if options.rehearse else "cuda")
    if not options.rehearse and not torch.cuda.is_available():
        sys.exit(
            "There is no GPU here, so nothing was measured. On a CPU: benchmarks/cpu_kernels.py times the operators, "
            "benchmarks/tune_kernels.py --table compiles the kernels, --rehearse walks through this script."
        )
    name = "rehearsal" if options.rehearse else f"gpu_kernels_{device_of(torch.empty(1, device=dev)).arch}"
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    data: dict[str, Any] = json.loads(path.read_text()) if path.exists() and not options.again else {}
    if data.get("digest") != digest():
        data = {**environment(SEED), "digest": digest(), "rows": []}
    data["gpu"] = "CPU" if options.rehearse else torch.cuda.get_device_name()
    data.setdefault("ceiling", ceiling(dev))
    if "checks" not in data and not options.rehearse:
        data["checks"] = checks(("bfloat16", "float16", "float32"))
        failed = {case: error for case, error in data["checks"].items() if error}
        Console().print(f"{len(data['checks']) - len(failed)} cases agree with float64, {len(failed)} do not", *failed)
        write(name, data)
    done, left = {row["row"] for row in data["rows"]}, 0
    wanted = tuple(options.only or [""]) if not options.rehearse else ("",)
    for row_name, make in problems(options.rehearse).items():
        if row_name in done or options.checks or not row_name.startswith(wanted):
            continue
        if time.time() - started > options.seconds:
            left += 1
            continue
        try:
            data["rows"].append(measure(row_name, make, dev, data["ceiling"]["read_gb_per_s"]))
        except torch.cuda.OutOfMemoryError:
            Console().print(f"{row_name}: does not fit into this GPU's memory")
        if not options.rehearse:
            write(name, data)
            torch.cuda.empty_cache()
        torch.compiler.reset()
    show(data)
    Console().print(f"{left} rows are left: run again." if left else "Nothing is left.")


if __name__ == "__main__":
    main()
