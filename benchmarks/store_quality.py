"""Quantised caches by their bits: KL and total variation from the parent on positions decoded through the cache.

    python benchmarks/store_quality.py --smollm2 /path/to/checkpoint     # see smollm2.py
    python benchmarks/store_quality.py --models small                     # the bundled model alone
    python benchmarks/store_quality.py --rows quanto hqq ...              # rows whose names begin so, beside those held

Each window is scored through the cache: a prompt of as many tokens as stay in full, then chunks of one group of tokens.
A chunk is packed after it was read, so that each of its tokens sees what it would see alone, the newest 32 to 63 tokens
and the first 4 in full. `bits` count all that is packed: codes, scales, offsets. Rows of transformers' QuantizedCache
keep 64 newest tokens in full and no first ones; their scales count 16 bits. They need optimum-quanto and hqq.

Text: the first tokens of wikitext-2 test. `metric` was calibrated on 8 windows from its end, `metric, other text` on
War and Peace. The bundled model reads tinystories, of other stories than those it is calibrated on.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from common import ROOT, environment, reference, write
from rich.console import Console
from torch import Tensor
from transformers import AutoTokenizer, DynamicCache, PreTrainedModel

import surgery
from surgery.bundled import SMALL
from surgery.calibration.text import load_tokenizer
from surgery.runtime.calling import cache_argument
from surgery.runtime.layout import Codec

SINKS, RECENT, GROUP = 4, 32, 32
SEED = 0
CALIBRATION_WINDOWS = 8
CODECS: dict[str, dict[str, Any]] = {
    "int8": {"codec": "int8"},
    "fp8": {"codec": "fp8"},
    **{f"int4 (Hadamard), {b} bits": {"codec": "int4", "k_bits": b} for b in (4, 3, 2)},
    **{f"kivi, {b} bits": {"codec": "kivi", "k_bits": b} for b in (4, 3, 2)},
    **{f"fp16, think {part}": {"codec": "fp16", "think": part} for part in (0.4, 0.5)},
    **{f"int4 (Hadamard), 4 bits, think {part}": {"codec": "int4", "think": part} for part in (0.4, 0.5)},
    "kivi, 4 bits, think 0.4": {"codec": "kivi", "k_bits": 4, "think": 0.4},
    **{f"gear, {b} bits": {"codec": "gear", "k_bits": b} for b in (4, 3, 2)},
    "kivi, 4 bits all counted, by sensitivity": {"codec": "kivi", "bits": "sensitivity", "bits_per_number": 4},
    **{f"turbo, {b} bits": {"codec": "turbo", "k_bits": b} for b in (4, 3, 2)},
    **{f"kvquant, {b} bits": {"codec": "kvquant", "k_bits": b} for b in (4, 3, 2)},
    "oscar, 2 bits": {"codec": "oscar"},
    **{f"metric, {b:g} bits": {"codec": "metric", "k_bits": b} for b in (5, 4, 3, 2.25, 2)},
    **{f"metric, {b:g} bits, other text": {"codec": "metric", "k_bits": b} for b in (4, 3, 2.25)},
}
PAIRS = {
    name + second: [step, *more]
    for name, step in (
        ("gqa-2x", {"rewriter": "gqa", "kv_heads": "1/2"}),
        ("mla-4x", {"rewriter": "mla", "keep": 0.25}),
    )
    for second, more in (
        ("", []),
        (" and int4", [{"codec": "int4"}]),
        (" and metric, 4 bits", [{"codec": "metric", "k_bits": 4}]),
    )
}
"""Steps before the codec, and the same with it: what the pair costs beside its parts."""
BACKENDS = {f"transformers {name}, {bits} bits": (name, bits) for name in ("quanto", "hqq") for bits in (4, 2)}


def texts(model: str, folder: Path, windows: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Windows to evaluate on, and to calibrate on from the same text and from another."""
    if model == "small":
        tokenizer = load_tokenizer(folder)
        lines = reference("text", "tinystories-917.jsonl").read_text().splitlines()
        ids = _ids(tokenizer, "\n\n".join(json.loads(line)["text"] for line in lines))
        other = _ids(tokenizer, reference("text", "war-and-peace.txt").read_text()[:400_000])
    else:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = _ids(tokenizer, reference("text", "wikitext2-test.txt").read_text())
        other = _ids(tokenizer, reference("text", "war-and-peace.txt").read_text()[:400_000])
    many = CALIBRATION_WINDOWS * length
    return ids[: windows * length].view(-1, length), ids[-many:].view(-1, length), other[-many:].view(-1, length)


def _ids(tokenizer: Any, text: str) -> Tensor:
    return torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)


@torch.inference_mode()
def through_cache(model: PreTrainedModel, ids_1T: Tensor, cache: Any) -> Iterator[tuple[int, Tensor]]:
    """(position, log-probabilities [t, vocabulary]) of all positions behind the prompt, chunk by chunk."""
    start = SINKS + RECENT
    for begin, end in [(0, start), *((t, t + GROUP) for t in range(start, ids_1T.shape[1], GROUP))]:
        logits = model(ids_1T[:, begin:end], use_cache=True, **{cache_argument(model): cache}).logits[0]
        if begin:
            yield begin, logits.float().log_softmax(-1)


def score(
    model: PreTrainedModel, windows: Tensor, wanted: list[Tensor], new_cache: Callable[[PreTrainedModel], Any]
) -> dict[str, float]:
    """Means over all positions that see packed tokens."""
    kl, variation, same, tokens = 0.0, 0.0, 0, 0
    for ids, want in zip(windows, wanted, strict=True):
        for begin, logp in through_cache(model, ids[None], new_cache(model)):
            if begin < SINKS + RECENT + GROUP:
                continue  # nothing is packed yet
            base = want[begin : begin + len(logp)]
            p = base.exp()
            kl += float((p * (base - logp)).sum())
            variation += float((p - logp.exp()).abs().sum()) / 2
            same += int((logp.argmax(-1) == base.argmax(-1)).sum())
            tokens += len(logp)
    return {"kl": kl / tokens, "variation": variation / tokens, "same_top": same / tokens, "tokens": tokens}


def packed_bits(model: PreTrainedModel) -> float:
    """Bits of one packed number, by the plan."""
    bits = numbers = 0
    for plan in model.plans if hasattr(model, "plans") else ():
        heads, *widths = plan.entry()
        forms = plan.store.forms() if isinstance(plan.store, Codec) else ()
        for form, width in zip(forms, widths, strict=False):
            if form is not None:
                bits += 8 * form.bytes_of(GROUP, heads, width)
                numbers += GROUP * heads * width
    return bits / numbers if numbers else 32.0


def rows(
    parent: PreTrainedModel, windows: Tensor, same: Tensor, other: Tensor, wants: Callable[[str], bool]
) -> Iterator[tuple[str, dict[str, Any]]]:
    with torch.inference_mode():
        wanted = [parent(ids[None], use_cache=False).logits[0].float().log_softmax(-1) for ids in windows]
    fixed = {"rewriter": "quantise", "sinks": SINKS, "recent": RECENT, "group": GROUP}
    for name, options in CODECS.items():
        if not wants(name):
            continue
        began = time.perf_counter()
        text = other if "other" in name else same
        model = surgery.convert(parent, {"steps": [fixed | options]}, calibration=text, seed=SEED).eval()
        seconds = time.perf_counter() - began
        found = score(model, windows, wanted, lambda m: DynamicCache(config=m.config))
        yield name, {"bits": round(packed_bits(model), 4), "conversion_seconds": round(seconds, 1), **found}
    for name, steps in PAIRS.items():
        if not wants(name):
            continue
        made = [step if "rewriter" in step else fixed | step for step in steps]
        try:
            model = surgery.convert(parent, {"steps": made}, calibration=same, seed=SEED).eval()
        except surgery.PlanError as error:
            Console().print(f"{name}: {error}")
            continue
        found = score(model, windows, wanted, lambda m: DynamicCache(config=m.config))
        yield name, {"bits": round(packed_bits(model), 4), **found}
    for name, (backend, bits) in BACKENDS.items():
        if not wants(name) or importlib.util.find_spec({"quanto": "optimum", "hqq": "hqq"}[backend]) is None:
            continue
        new_cache = functools.partial(_quantized, backend=backend, bits=bits)
        yield name, {"bits": bits + 0.5, **score(parent, windows, wanted, new_cache)}


def _quantized(model: PreTrainedModel, backend: str, bits: int) -> Any:
    from transformers import QuantizedCache

    axis = 1 if backend == "hqq" else 0
    return QuantizedCache(
        backend, model.config, nbits=bits, axis_key=axis, axis_value=axis, q_group_size=64, residual_length=2 * GROUP
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["small", "smollm2"])
    parser.add_argument("--smollm2", type=Path, help="the checkpoint that smollm2.py writes")
    parser.add_argument("--rows", nargs="*", default=[""], help="names of rows begin so, or hold this behind a space")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=484)
    arguments = parser.parse_args()
    torch.manual_seed(SEED)
    place = ROOT / "benchmarks" / "results" / "store_quality.json"
    data = json.loads(place.read_text()) if place.exists() else {"models": {}}
    for name in arguments.models:
        folder = Path(SMALL) if name == "small" else arguments.smollm2
        if folder is None:
            parser.error("--smollm2 names the checkpoint that benchmarks/smollm2.py writes")
        windows, same, other = texts(name, folder, arguments.windows, arguments.length)
        parent = surgery.load(folder).float().eval()
        held = data["models"].setdefault(name, {"rows": {}})
        held |= {"windows": arguments.windows, "length": arguments.length}
        data["environment"] = environment(SEED)

        def wants(row: str) -> bool:
            return any(row.startswith(part) or f" {part}" in row for part in arguments.rows)

        for row, found in rows(parent, windows, same, other, wants):
            held["rows"][row] = found
            write("store_quality", data)
            line = f"{found['bits']:.2f} bits  KL {found['kl']:.6f}  TV {found['variation']:.4f}"
            Console().print(f"{name}  {row:32} {line}")


if __name__ == "__main__":
    main()
