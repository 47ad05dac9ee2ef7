"""Decoding one token over a long quantised cache on a CPU, beside our dense cache and transformers' QuantizedCache.

    python benchmarks/store_speed.py                       # 8192 tokens, the layer shape of SmolLM2-135M
    python benchmarks/store_speed.py --context 2048 --layers 2

Random weights; the caches are filled with random keys and values, not by a prefill. All variants take a step in turn,
so that load on the machine meets them alike; times are medians in milliseconds over `--steps` rounds, `ratio` to the
dense cache. Compiled steps go through inductor. `prefill`, of dynamic caches, is a prompt of `--prompt` tokens into an
empty cache. Rows of QuantizedCache need optimum-quanto and hqq. `bytes_of_bf16` is what the cache holds over what a
bfloat16 cache of as many tokens would.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import environment, write
from rich.console import Console
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel, StaticCache

import surgery
from surgery.measure.memory import tensor_bytes
from surgery.runtime.caches import install_layers
from surgery.runtime.calling import cache_argument

SEED = 0
STEPS: dict[str, dict[str, Any]] = {
    "int8": {"codec": "int8"},
    "int4": {"codec": "int4"},
    "kivi, 2 bits": {"codec": "kivi", "k_bits": 2},
    "metric, 3 bits": {"codec": "metric", "k_bits": 3},
}


def shape(layers: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3, vocab_size=1024,
        num_hidden_layers=layers, max_position_embeddings=16384,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def filled(cache: Any, layers: int, tokens: int) -> Any:
    """The cache with `tokens` random keys and values in each layer."""
    random = torch.Generator().manual_seed(SEED)
    for layer in range(layers):
        key, value = (torch.randn(1, 3, tokens, 64, generator=random) for _ in range(2))
        cache.update(key, value, layer)
    return cache


def own(model: PreTrainedModel) -> DynamicCache:
    """An empty cache of a converted model, with its layers."""
    cache = DynamicCache(config=model.config)
    install_layers(cache, model.plans)
    for layer, attention in zip(cache.layers, model.model.surgery_attentions, strict=True):
        layer.tables = dict(attention.codec.named_buffers())
    return cache


def quantized(model: PreTrainedModel, backend: str) -> Any:
    from transformers import QuantizedCache

    axis = 1 if backend == "hqq" else 0
    return QuantizedCache(backend, model.config, nbits=4, axis_key=axis, axis_value=axis, residual_length=128)


def static(model: PreTrainedModel, room: int) -> Any:
    if hasattr(model, "static_cache"):
        return model.static_cache(room)
    return StaticCache(config=model.config, max_cache_len=room)


def variants(parent: LlamaForCausalLM, context: int) -> dict[str, tuple[PreTrainedModel, Callable[[], Any]]]:
    dense = surgery.convert(parent, "identity").eval()
    found: dict[str, tuple[PreTrainedModel, Callable[[], Any]]] = {
        "dense": (dense, lambda: DynamicCache(config=dense.config))
    }
    text = torch.randint(0, 1024, (8, 256), generator=torch.Generator().manual_seed(SEED))
    for name, options in STEPS.items():
        steps = {"steps": [{"rewriter": "quantise", **options}]}
        model = surgery.convert(parent, steps, calibration=text if options["codec"] == "metric" else None).eval()
        found[name] = model, (lambda model=model: own(model))
    found["int4, stock model"] = parent, lambda: surgery.cache(parent, "int4")
    int4, room = found["int4"][0], context + 64
    for name, model in (("dense", dense), ("int4", int4)):
        for more in ("static", "static, compiled"):
            found[f"{name}, {more}"] = model, functools.partial(static, model, room)
    for backend, module in (("quanto", "optimum.quanto"), ("hqq", "hqq")):
        if importlib.util.find_spec(module.partition(".")[0]) is not None:
            found[f"transformers {backend}, 4 bits"] = parent, (lambda backend=backend: quantized(parent, backend))
    return found


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--rows", nargs="*", default=[""], help="names of rows begin so")
    parser.add_argument("--name", default="store_speed", help="of the file of results")
    arguments = parser.parse_args()
    torch.manual_seed(SEED)
    with torch.inference_mode(False), torch.no_grad():
        made = variants(shape(arguments.layers), arguments.context)
        made = {name: row for name, row in made.items() if name.startswith(("dense", *arguments.rows))}
    caches = {name: filled(cache(), arguments.layers, arguments.context) for name, (_, cache) in made.items()}
    # QuantizedCache has held the prompt since the first call, as one call does it.
    steps = {n: torch.compile(m.forward, fullgraph=True) if "compiled" in n else m for n, (m, _) in made.items()}
    token = torch.zeros(1, 1, dtype=torch.long)
    prompt = torch.randint(0, 1024, (1, arguments.prompt))
    times: dict[str, list[float]] = {name: [] for name in made}
    prefills: dict[str, list[float]] = {name: [] for name in made}
    for turn in range(arguments.steps + 2):
        for name, (model, new_cache) in made.items():
            began = time.perf_counter()
            at = torch.full((1, 1), arguments.context + turn)
            steps[name](token, position_ids=at, use_cache=True, **{cache_argument(model): caches[name]})
            if turn >= 2:
                times[name].append(time.perf_counter() - began)
            if turn in (2, 6, 10) and "static" not in name:
                cache = new_cache()
                began = time.perf_counter()
                model(prompt, use_cache=True, logits_to_keep=1, **{cache_argument(model): cache})
                prefills[name].append(time.perf_counter() - began)
    half = arguments.layers * arguments.context * 2 * 3 * 64 * 2
    rows, dense_prefill = {}, 1e3 * statistics.median(prefills["dense"])
    for name in made:
        decode, prefill = (1e3 * statistics.median(t[name] or [math.nan]) for t in (times, prefills))
        held = None if name.startswith("transformers") else tensor_bytes(caches[name]) / half
        rows[name] = {
            "decode_ms": round(decode, 2),
            "ratio": round(decode / (1e3 * statistics.median(times["dense"])), 3),
            "prefill_ms": None if math.isnan(prefill) else round(prefill, 1),
            "prefill_ratio": None if math.isnan(prefill) else round(prefill / dense_prefill, 3),
            "bytes_of_bf16": held and round(held, 3),
        }
        Console().print(name, rows[name])
    write(arguments.name, {"environment": environment(SEED), "arguments": vars(arguments), "rows": rows})


if __name__ == "__main__":
    main()
