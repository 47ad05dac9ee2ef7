"""Prefill and decoding through the ragged cache of dms and dmc on a CPU, beside the uncompressed parent in one run.

    python benchmarks/retain_decode.py

A Llama of four layers with random weights (8 query heads of 64, width 512), a prompt of 4096 random tokens, 64 tokens
decoded greedily one by one; float32, one thread. Gates are random as well: their biases are set, layer after layer, so
that heads keep a slot for a quarter of this prompt's tokens on average, some more and some less. Every repeat times all
models in turn; numbers are medians, ratios are to the parent. `prefill_peak_bytes` and `step_peak_bytes` are the most
that was allocated at once beyond what there was before, by the profiler's records; `cache_bytes` is every tensor that
the cache keeps.
"""

from __future__ import annotations

from typing import Any

import torch
from common import environment, write
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import surgery
from surgery.measure.gates import gated
from surgery.measure.memory import tensor_bytes
from surgery.measure.speed import Speed, measure_speed
from surgery.runtime.calling import cache_argument, cache_of
from surgery.runtime.gates import SurgeryGate

SEED, PROMPT, NEW, REPEATS, RATIO = 0, 4096, 64, 3, 4.0
SHAPES = ((8, 1), (8, 4), (2, 4))
"""KV heads and batch."""
STEPS: dict[str, dict[str, Any]] = {
    "dms window 256": {"rewriter": "dms", "ratio": RATIO, "window": 256},
    "dmc window 12": {"rewriter": "dmc", "ratio": RATIO, "window": 12},
    "dmc": {"rewriter": "dmc", "ratio": RATIO, "window": None},
}


def parent(kv_heads: int) -> PreTrainedModel:
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=kv_heads, max_position_embeddings=8192,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def child(model: PreTrainedModel, step: dict[str, Any], ids_BT: Tensor) -> PreTrainedModel:
    """`model` with random gates that reach the ratio on `ids_BT`."""
    converted = surgery.convert(model, {"steps": [step]}).eval()
    generator = torch.Generator().manual_seed(SEED)

    def settle(gate: nn.Module, inputs: tuple[Any, ...]) -> None:
        assert isinstance(gate, SurgeryGate)
        gate.weight.copy_(torch.randn(gate.weight.shape, generator=generator) / gate.retain.gain)
        gate.bias.copy_(torch.randn(gate.bias.shape, generator=generator) / gate.retain.gain)
        logits, _ = gate.forward(*inputs)  # called, it would call this hook again
        free = logits[..., gate.retain.protected :].flatten()
        rate = gate.retain.drop_rate(ids_BT.shape[1], RATIO)
        gate.bias -= free.kthvalue(int((1 - rate) * len(free))).values / gate.retain.gain

    handles = [module.gate.register_forward_pre_hook(settle) for module in gated(converted).values()]
    converted(ids_BT, use_cache=True, logits_to_keep=1)
    for handle in handles:
        handle.remove()
    return converted


def peak(call: Any) -> int:
    """Most bytes that were allocated at once by `call`, beyond what there was before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    waiting, events = list(seen.profiler.kineto_results.experimental_event_tree()), []
    while waiting:
        event = waiting.pop()
        waiting.extend(event.children)
        if str(event.tag).endswith("Allocation"):
            events.append((event.start_time_ns, event.extra_fields.alloc_size))
    held = most = 0
    for _, size in sorted(events, key=lambda e: e[0]):
        held += size
        most = max(most, held)
    return most


@torch.inference_mode()
def memory(model: PreTrainedModel, ids_BT: Tensor) -> dict[str, Any]:
    kept: list[Any] = []
    prefill = peak(lambda: kept.append(cache_of(model(ids_BT, use_cache=True, logits_to_keep=1))))
    cache = kept[0]
    found: dict[str, Any] = {"cache_bytes": tensor_bytes(cache), "prefill_peak_bytes": prefill}
    found["step_peak_bytes"] = peak(lambda: model(ids_BT[:, :1], use_cache=True, **{cache_argument(model): cache}))
    if hasattr(cache.layers[0], "lengths"):
        slots = torch.stack([layer.lengths.float() for layer in cache.layers])
        found["achieved_ratio"] = cache.get_seq_length() / float(slots.mean())
        found["slots_per_head"] = {"least": int(slots.min()), "most": int(slots.max())}
    return found


def row(name: str, speed: Speed, base: Speed, kv_heads: int, more: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": name, "kv_heads": kv_heads, "batch": speed.batch, "prompt": speed.prompt, "new": speed.new,
        "prefill_tokens_per_s": speed.prefill.median, "decode_tokens_per_s": speed.decode.median,
        "decode_low": speed.decode.low, "decode_high": speed.decode.high,
        "prefill_time_ratio": base.prefill.median / speed.prefill.median,
        "decode_speed_ratio": speed.decode.median / base.decode.median, **more,
    }  # fmt: skip


def measure() -> list[dict[str, Any]]:
    rows = []
    for kv_heads, batch in SHAPES:
        model = parent(kv_heads)
        ids = torch.randint(1024, (1, PROMPT), generator=torch.Generator().manual_seed(SEED))
        names, models = ["parent"], [model]
        for name, step in STEPS.items():
            names.append(name)
            models.append(child(model, step, ids))
        held = [memory(m, ids.expand(batch, -1)) for m in models]
        speeds = measure_speed(models, batch=batch, prompt=PROMPT, new=NEW, repeats=REPEATS)
        rows += [row(n, s, speeds[0], kv_heads, h) for n, s, h in zip(names, speeds, held, strict=True)]
    return rows


def main() -> None:
    torch.set_num_threads(1)
    rows = measure()
    write("retain_decode", {**environment(SEED), "threads": 1, "ratio": RATIO, "repeats": REPEATS, "rows": rows})
    table = Table("model", "KV heads", "batch", "ratio", "cache MB", "prefill time", "decode tok/s", "x parent")
    for r in rows:
        table.add_row(
            r["model"], str(r["kv_heads"]), str(r["batch"]), f"{r.get('achieved_ratio', 1):.2f}",
            f"{r['cache_bytes'] / 1e6:.1f}", f"{r['prefill_time_ratio']:.2f}x", f"{r['decode_tokens_per_s']:.1f}",
            f"{r['decode_speed_ratio']:.2f}x",
        )  # fmt: skip
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
