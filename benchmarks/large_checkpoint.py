"""Convert a Llama-2-7B-shaped random checkpoint from disk to disk: minutes and peak memory.

    python benchmarks/large_checkpoint.py --layers 8 --folder /tmp/large --set grouping=neighbour

The checkpoint is made shard by shard. With 8 of 32 layers it takes 4 GB on disk (twice, for the result).
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from common import environment, peak_gigabytes, write
from transformers import LlamaConfig

import surgery
from surgery.checkpoints.writing import write_shards
from surgery.planning.parent_class import meta_model
from surgery.recipe import Recipe


def tensors(config: LlamaConfig) -> Iterator[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for name, tensor in meta_model(config).state_dict().items():
        yield name, torch.empty(tensor.shape, dtype=torch.bfloat16).normal_(std=0.02, generator=generator)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--recipe", default="gqa-4x")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override of the recipe")
    arguments = parser.parse_args()
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=arguments.layers, num_attention_heads=32,
        vocab_size=32000, dtype="bfloat16", architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    recipe = Recipe.load(arguments.recipe, arguments.set)
    parent, child = arguments.folder / "parent", arguments.folder / "child"
    parent.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(parent)
    write_shards(parent, tensors(config))
    made = peak_gigabytes()
    begun, busy = time.monotonic(), time.process_time()
    plan = surgery.convert_checkpoint(parent, recipe, child, overwrite=True)
    result = {
        "shape": f"Llama-2-7B, {arguments.layers} of 32 layers, bfloat16",
        "recipe": recipe.to_dict(),
        "seconds": round(time.monotonic() - begun, 1),
        "processor_seconds": round(time.process_time() - busy, 1),
        "load_average": os.getloadavg()[1],
        "peak_gigabytes": peak_gigabytes(),
        "peak_gigabytes_before_conversion": made,
        "bytes_per_token": [plan.parent_bytes_per_token, plan.bytes_per_token],
    }
    write("large_checkpoint", {**environment(0), **result})
    shutil.rmtree(parent)
    shutil.rmtree(child)


if __name__ == "__main__":
    main()
