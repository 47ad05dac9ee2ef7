"""One decoding step over a latent cache on the CPU: absorbed beside expanding, time and memory in one run.

    python benchmarks/latent_decode.py

One attention layer of a 1B shape (32 query heads of 64, 8 KV heads) with random weights under an MLA plan of 512 + 64
numbers, a dynamic cache of 2048 tokens, one new token. `absorbed` is what the runtime does; `expanded` makes K and V of
every cached token first and calls sdpa, as the stock MLA classes of transformers do. Steps of both alternate; the ratio
is of medians. `largest_allocation` is the largest tensor that a step allocates, from the profiler's records.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from common import environment, write
from rich.console import Console
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import surgery
from surgery.anatomy import examine
from surgery.runtime.calling import cache_argument
from surgery.runtime.canonical import canonical_weights
from surgery.runtime.functions import as_bits
from surgery.runtime.latent import SurgeryLatentAttention
from surgery.runtime.layout import Latent
from surgery.runtime.modeling import from_parent

SEED, CONTEXT, STEPS = 0, 2048, 60
RANK, ROPE = 512, 64


def model() -> Any:
    """One layer under a latent plan, weights random."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=64, hidden_size=2048, intermediate_size=256, num_hidden_layers=1, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=4096,
    )  # fmt: skip
    parent = LlamaForCausalLM(config).eval()
    plan = surgery.plan(parent, {"steps": [{"rewriter": "mla", "rank": RANK, "rope_dims": ROPE}]})
    site, latent = examine(parent).sites[0], plan.after[0].project
    assert isinstance(latent, Latent)
    made = {name: torch.randn(shape) * shape[-1] ** -0.5 for name, shape in latent.shapes(site).items()}
    made["rope_freq_bits"] = as_bits([10000.0 ** (-2 * i / ROPE) for i in range(ROPE // 2)])
    state = parent.state_dict()
    kept = {n: t for n, t in canonical_weights(site, state.__getitem__).items() if n.split("_")[0] not in ("k", "v")}
    return from_parent(parent, [site], plan.after, {"method": "benchmark"}, {0: {**kept, **made}})


@torch.no_grad()
def step(attention: SurgeryLatentAttention, cache: DynamicCache, x: Tensor, absorbed: bool) -> Tensor:
    """One token; the cache is cut back afterwards."""
    attention._absorbs = (lambda _: True) if absorbed else (lambda _: False)  # type: ignore[method-assign]
    out = attention(x, past_key_values=cache, attention_mask=None, position_embeddings=None)[0]
    cache.crop(-1)
    return out


def largest(call: Any) -> int:
    """Bytes of the largest single allocation of `call`."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    sizes = [e.extra_fields.alloc_size for e in _memory_events(seen.profiler.kineto_results.experimental_event_tree())]
    return max(sizes, default=0)


def _memory_events(roots: list[Any]) -> list[Any]:
    found, waiting = [], list(roots)
    while waiting:
        event = waiting.pop()
        waiting.extend(event.children)
        if str(event.tag).endswith("Allocation"):
            found.append(event)
    return found


def measure() -> dict[str, Any]:
    """Times of both forms, their ratio, and what they allocate."""
    child = model()
    attention = child.model.layers[0].self_attn
    cache = DynamicCache(config=child.config)
    with torch.no_grad():
        child(torch.randint(64, (1, CONTEXT)), **{cache_argument(child): cache})
    x = torch.randn(1, 1, 2048)
    outs = [step(attention, cache, x, absorbed) for absorbed in (True, False)]
    difference = float((outs[0] - outs[1]).abs().max() / outs[1].abs().max())
    assert difference < 1e-4, difference
    times: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(STEPS):
        for absorbed, seen in times.items():
            begun = time.perf_counter()
            step(attention, cache, x, absorbed)
            seen.append(time.perf_counter() - begun)
    absorbed_ms, expanded_ms = (1e3 * statistics.median(times[form]) for form in (True, False))
    latent = attention.latent
    return {
        "context": CONTEXT, "rank": RANK, "rope_dims": ROPE, "query_heads": 32, "kv_heads": 8, "head_dim": 64,
        "absorbed_ms": absorbed_ms, "expanded_ms": expanded_ms, "expanded_over_absorbed": expanded_ms / absorbed_ms,
        "cache_bytes": 4 * CONTEXT * latent.dims,
        "expanded_bytes": 4 * CONTEXT * latent.kv_heads * (latent.head_dim + latent.value_dim),
        "absorbed_largest_allocation": largest(lambda: step(attention, cache, x, True)),
        "expanded_largest_allocation": largest(lambda: step(attention, cache, x, False)),
        "relative_difference": difference,
    }  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    data = {**environment(SEED), **measure()}
    write("latent_decode", data)
    for name in ("absorbed_ms", "expanded_ms", "expanded_over_absorbed", "cache_bytes", "expanded_bytes",
                 "absorbed_largest_allocation", "expanded_largest_allocation"):  # fmt: skip
        Console().print(f"{name}: {data[name]:,.4g}")


if __name__ == "__main__":
    main()
