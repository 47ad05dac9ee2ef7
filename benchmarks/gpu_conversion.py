"""A calibrated conversion and one step of uptraining on a GPU, beside the same conversion on the CPU.

    python benchmarks/gpu_conversion.py               # writes results/gpu_conversion.json
    python benchmarks/gpu_conversion.py --rehearse    # on a CPU twice; writes nothing

`bundled` rows convert the bundled model on both devices: `difference` is the largest relative difference (Frobenius) of
a converted tensor, `kl` the mean KL of the two results' logits on text that no step saw. `wide` rows convert two layers
of a Llama-3-8B shape with random weights on the GPU alone, for its time and memory. `step` is one step of uptraining,
KL to the frozen parent, on one batch: forward, backward, and the optimiser.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import torch
import torch.nn.functional as F
from common import environment, write
from transformers import LlamaForCausalLM, PreTrainedModel

import surgery
from surgery.bundled import SMALL
from surgery.calibration.text import load_tokenizer
from surgery.demo import topic_windows
from surgery.measure.decode_bench import build
from surgery.measure.decode_layouts import SHAPES

SEED = 0
RECIPES = ("gqa-2x", "mla-4x")


def converted(model: PreTrainedModel, recipe: str, text: Any) -> tuple[PreTrainedModel, float]:
    """A calibrated conversion, and its seconds."""
    begun = time.perf_counter()
    made = surgery.convert(model, recipe, calibration=text, seed=SEED)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return made.eval(), time.perf_counter() - begun


@torch.no_grad()
def bundled(device: str, recipe: str) -> dict[str, Any]:
    """The bundled model on the CPU and on `device`."""
    results, seconds = {}, {}
    text, held_out = topic_windows(load_tokenizer(SMALL), 4096, 24, 4)
    for place in ("cpu", device):
        parent = surgery.load(SMALL, dtype=torch.float32).to(place)
        results[place, recipe], seconds[place] = converted(parent, recipe, text)
    one, other = results["cpu", recipe].cpu(), results[device, recipe].cpu()
    tensors = dict(other.named_parameters())
    difference = max(float((p - tensors[n]).norm() / p.norm().clamp_min(1e-30)) for n, p in one.named_parameters())
    p, q = (F.log_softmax(m(held_out.ids_BT).logits.double(), -1) for m in (one, other))
    return {
        "row": f"bundled, {recipe}", "seconds": seconds[device], "seconds_on_cpu": seconds["cpu"],
        "difference": difference, "kl": float((p.exp() * (p - q)).sum(-1).mean()),
    }  # fmt: skip


def wide(device: str, recipe: str, layers: int, shape: str, tokens: tuple[int, int]) -> dict[str, Any]:
    """Layers of a large model with random weights."""
    torch.manual_seed(SEED)
    config = SHAPES[shape].config(torch.bfloat16)
    config.num_hidden_layers, config.vocab_size = layers, 1024
    parent = build(lambda: LlamaForCausalLM(config), torch.bfloat16, torch.device(device))
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    text = torch.randint(config.vocab_size, tokens, generator=torch.Generator().manual_seed(SEED))
    _, seconds = converted(parent, recipe, text)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    return {"row": f"{layers} layers of {shape}, {recipe}", "seconds": seconds, "peak_bytes": peak}


def step(device: str) -> dict[str, Any]:
    """Forward, backward and optimiser over one batch, three times; the last counts."""
    parent = surgery.load(SMALL, dtype=torch.float32).to(device).eval()
    model = surgery.convert(parent, "mqa", seed=SEED).to(device).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = torch.randint(model.config.vocab_size, (8, 256), generator=torch.Generator().manual_seed(SEED)).to(device)
    seconds, losses = 0.0, []
    for _ in range(3):
        begun = time.perf_counter()
        with torch.no_grad():
            wanted = parent(ids).logits.log_softmax(-1)
        loss = F.kl_div(model(ids).logits.log_softmax(-1), wanted, log_target=True, reduction="batchmean") / 256
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
        seconds = time.perf_counter() - begun
    return {"row": "step, bundled, mqa", "seconds": seconds, "tokens": ids.numel(), "losses": losses}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="on a CPU; writes nothing")
    options = parser.parse_args()
    if not options.rehearse and not torch.cuda.is_available():
        sys.exit("There is no GPU here, so nothing was measured; --rehearse runs small shapes on a CPU.")
    device = "cpu" if options.rehearse else "cuda"
    size = (2, "small", (24, 256)) if options.rehearse else (2, "llama-3-8b", (128, 512))
    rows: list[dict[str, Any]] = []
    tasks = [lambda: step(device)]
    tasks += [lambda r=r: bundled(device, r) for r in (RECIPES[:1] if options.rehearse else RECIPES)]
    tasks += [lambda r=r: wide(device, r, *size) for r in (RECIPES[:1] if options.rehearse else RECIPES)]
    for task in tasks:
        rows.append(task())
        print(json.dumps(rows[-1]), flush=True)  # noqa: T201
        if not options.rehearse:
            write("gpu_conversion", {**environment(SEED), "gpu": torch.cuda.get_device_name(), "rows": rows})


if __name__ == "__main__":
    main()
