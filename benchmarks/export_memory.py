"""Export a converted Llama-2-7B-shaped checkpoint for the Hub: minutes and peak memory, parity check included.

    python benchmarks/export_memory.py --folder /tmp/large --threads 1

Half of the 32 layers keep 8 KV heads, the others read their neighbour's cache. The weights are one random block over
and over. Takes 12 GB of disk, twice without --link.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from common import environment, peak_gigabytes, write
from transformers import LlamaConfig, LlamaForCausalLM

import surgery
from surgery.anatomy import examine
from surgery.checkpoints.writing import write_shards
from surgery.runtime.calling import record_calls
from surgery.runtime.configuration import converted_config
from surgery.runtime.layout import Heads, LayerPlan
from surgery.runtime.modeling import surgery_class

SHAPE = {"num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096}
KV_HEADS = 8


def converted(layers: int) -> LlamaConfig:
    """The config of the conversion, made without its weights."""
    shape = {**SHAPE, "num_hidden_layers": layers, "dtype": "bfloat16"}
    parent = LlamaConfig(hidden_size=4096, intermediate_size=11008, **shape)
    narrow = LlamaForCausalLM(LlamaConfig(hidden_size=64, intermediate_size=64, **shape)).eval()
    calls = record_calls(narrow, examine(narrow.config).sites)  # the width changes nothing in how layers are called
    groups = tuple(tuple(range(4 * k, 4 * k + 4)) for k in range(KV_HEADS))
    entries = []
    for site, call in zip(examine(parent).sites, calls, strict=True):
        heads = Heads(kv_heads=KV_HEADS, head_dim=site.head_dim, value_dim=site.value_dim, groups=groups)
        plan = LayerPlan(layer=site.layer, project=heads, owner=site.layer // 2 * 2)
        rows = {"q_proj": 4096, "k_proj": KV_HEADS * 128, "v_proj": KV_HEADS * 128, "o_proj": 4096}
        shapes = {f"{name}.weight": [count, 4096] for name, count in rows.items() if name not in plan.absent}
        entry = {"site": replace(site, kv_heads=32), "plan": plan, "call": call}
        entries.append({**{name: part.to_dict() for name, part in entry.items()}, "shapes": shapes})
    origin = {"parent": {"model_type": "llama", "architecture": "LlamaForCausalLM"}, "layers": entries}
    return converted_config(parent, {**origin, "provenance": {"seed": 0}})


def tensors(config: LlamaConfig) -> Iterator[tuple[str, torch.Tensor]]:
    block = torch.empty(1 << 20, dtype=torch.bfloat16).normal_(std=0.02, generator=torch.Generator().manual_seed(0))
    with torch.device("meta"):
        model = surgery_class(LlamaForCausalLM)(config)
    for name, tensor in model.state_dict().items():
        if name.endswith("norm.weight"):
            yield name, torch.ones(tensor.shape, dtype=torch.bfloat16)
        else:
            yield name, block.repeat(-(-tensor.numel() // len(block)))[: tensor.numel()].reshape(tensor.shape)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--link", action="store_true", help="hard links in the place of copies")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)  # of the process that loads the export
    child, out = arguments.folder / "child", arguments.folder / "export"
    child.mkdir(parents=True, exist_ok=True)
    config = converted(arguments.layers)
    config.architectures = ["SurgeryLlamaForCausalLM"]
    config.save_pretrained(child)
    write_shards(child, tensors(config))
    made = peak_gigabytes()
    begun = time.monotonic()
    report = surgery.export(child, out, to="hub", link=arguments.link, overwrite=True)
    result = {
        "shape": f"Llama-2-7B, {arguments.layers} of 32 layers, bfloat16, {KV_HEADS} KV heads in every second layer",
        "weight_gigabytes": round(report.facts["weight_bytes"] / 1e9, 2),
        "link": arguments.link,
        "seconds": round(time.monotonic() - begun, 1),
        "load_average": os.getloadavg()[1],
        # Pages of mapped files count too. A forked process begins with the peak of its parent: an upper bound.
        "peak_gigabytes": peak_gigabytes(),
        "peak_gigabytes_of_the_process_that_loads_it": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6,
        "peak_gigabytes_before_export": made,
        "parity": report.parity.to_dict(),
    }
    write("export_memory", {**environment(0), **result})
    shutil.rmtree(child)
    shutil.rmtree(out)


if __name__ == "__main__":
    main()
