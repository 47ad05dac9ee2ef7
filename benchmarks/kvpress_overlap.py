"""Which tokens stay of one prompt: `evict` by rank beside NVIDIA's kvpress, the share of its tokens that stay in both.

    python benchmarks/kvpress_overlap.py CHECKPOINT --kvpress /path/to/another/environment/bin/python

kvpress 0.5.5 runs with transformers below 5.3, this library from 5.16 on: the script runs itself again in the
environment that has kvpress. Both prefill one prompt of wikitext-2 in float32 and keep a quarter of it. Kept
tokens are found by their keys. Options are those of kvpress: 64 observed queries, pools of 5, sinks where it has some.
It forces no newest token to stay, and here one is the least: knorm and expected may differ in that token. Equal tokens
have keys of equal norm in the first layer, and which of them stays is a matter of rounding.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

RATIO, TOKENS, SEED = 4, 512, 0
OURS: dict[str, dict[str, Any]] = {
    "snapkv": {"scorer": "snapkv", "recent": 64, "observe": 64, "sinks": 0},
    "ada snapkv": {"scorer": "snapkv", "budget": "ada", "recent": 64, "observe": 64, "sinks": 0},
    "critical": {"scorer": "critical", "recent": 64, "observe": 64, "sinks": 0},
    "knorm": {"scorer": "knorm", "recent": 1, "sinks": 0},
    "streaming": {"scorer": "streaming", "recent": 1, "sinks": 4},
    "tova": {"scorer": "tova", "recent": 1, "sinks": 0},
    "expected": {"scorer": "expected", "recent": 1, "sinks": 4},
}
"""Row -> options of the step."""


def places(key_KSH: Tensor, whole_KTH: Tensor) -> list[list[int]]:
    """For each head, which tokens the kept keys are those of."""
    nearest = torch.cdist(key_KSH, whole_KTH).argmin(-1)
    return [sorted(set(row)) for row in nearest.tolist()]


@torch.inference_mode()
def of_kvpress(model: Any, ids: Tensor) -> dict[str, list[list[list[int]]]]:
    """Tokens that stay by row, layer and head; in the environment of kvpress."""
    import kvpress

    ratio = 1 - 1 / RATIO
    presses = {
        "snapkv": kvpress.SnapKVPress(compression_ratio=ratio),
        "ada snapkv": kvpress.AdaKVPress(kvpress.SnapKVPress(compression_ratio=ratio)),
        "critical": kvpress.CriticalKVPress(kvpress.SnapKVPress(compression_ratio=ratio)),
        "knorm": kvpress.KnormPress(compression_ratio=ratio),
        "streaming": kvpress.StreamingLLMPress(compression_ratio=ratio),
        "tova": kvpress.TOVAPress(compression_ratio=ratio),
        "expected": kvpress.ExpectedAttentionPress(compression_ratio=ratio),
    }
    whole = DynamicCache()
    model(ids, past_key_values=whole)
    found = {}
    for name, press in presses.items():
        cache = DynamicCache()
        with press(model):
            model.model(ids, past_key_values=cache)
        rows = []
        for number, layer in enumerate(cache.layers):
            module = model.model.layers[number].self_attn
            masked = getattr(module, "masked_key_indices", None) if name.startswith("ada") else None
            if masked is None:
                rows.append(places(layer.keys[0], whole.layers[number].keys[0]))
                continue
            left = torch.ones(layer.keys.shape[1:3], dtype=torch.bool)
            left[masked[1], masked[2]] = False
            rows.append([row.nonzero()[:, 0].tolist() for row in left])
        found[name] = rows
    return found


@torch.inference_mode()
def of_surgery(model: Any, ids: Tensor) -> dict[str, list[list[list[int]]]]:
    """The same here."""
    import surgery

    def kept(step: dict[str, Any]) -> Any:
        child = surgery.convert(model, {"steps": [{"rewriter": "evict", "ratio": RATIO, **step}]}).eval()
        return child(ids, use_cache=True).past_key_values.layers

    whole = kept({"scorer": "streaming", "ratio": 1})
    found = {}
    for name, step in OURS.items():
        rows = []
        for layer, all_of_it in zip(kept(step), whole, strict=True):
            key, length = layer.slots().key_BKSH[0], layer.lengths[0].tolist()
            every = all_of_it.slots().key_BKSH[0]
            rows.append([places(k[None, :n], e[None])[0] for k, n, e in zip(key, length, every, strict=True)])
        found[name] = rows
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--kvpress", type=Path, required=True, help="a Python that has kvpress")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(arguments.checkpoint, dtype=torch.float32).eval()
    if arguments.inside:
        found = of_kvpress(model, torch.load(arguments.inside / "ids.pt"))
        (arguments.inside / "kept.json").write_text(json.dumps(found))
        return

    from common import environment, reference, write

    text = reference("text", "wikitext2-test.txt").read_text()[2000:8000]
    ids = torch.tensor(AutoTokenizer.from_pretrained(arguments.checkpoint)(text).input_ids)[None, :TOKENS]
    with tempfile.TemporaryDirectory() as name:
        torch.save(ids, Path(name) / "ids.pt")
        subprocess.run([arguments.kvpress, *sys.argv, "--inside", name], check=True)
        theirs = json.loads((Path(name) / "kept.json").read_text())
    rows = {}
    for name, ours in of_surgery(model, ids).items():
        by_layer = [
            [len(set(mine) & set(other)) / max(1, len(other)) for mine, other in zip(*layers, strict=True)]
            for layers in zip(ours, theirs[name], strict=True)
        ]
        shares = [share for layer in by_layer for share in layer]
        slots = [sum(len(head) for layer in kept for head in layer) for kept in (ours, theirs[name])]
        rows[name] = {"overlap": sum(shares) / len(shares), "least": min(shares), "slots": slots}
        rows[name]["least_behind_the_first_layer"] = min(share for layer in by_layer[1:] for share in layer)
        print(name, rows[name], flush=True)  # noqa: T201
    write(
        "kvpress_overlap",
        {"environment": environment(SEED), "kvpress": "0.5.5", "tokens": TOKENS, "ratio": RATIO, "rows": rows},
    )


if __name__ == "__main__":
    main()
