"""Writes the checkpoints beside this file: one for each method, as the version that wrote them saves it.

    python tests/saved/write.py FOLDER     # an empty folder, or one that does not exist

They are there so that later versions go on loading them (`tests/test_saved.py`), and are not made again: a checkpoint
written by a later version says nothing of those that users have. A method that is new gets a folder of its own name.

Each parent is a random Llama of 4 layers, 24 channels and 4 query heads of 8, in float32. Its config is `parent-2.json`
or `parent-4.json`, by its number of KV heads. Gates of adapters are filled with random numbers, so that they drop or
merge about every second token; as converted they do nothing. What is written:

- `NAME/`: what `surgery.save` writes, with `recipe.yaml` as it is spelled there and `surgery.json`.
- `NAME.safetensors`: `ids` [1, 24], the `logits` of one pass over them, and `tokens`: those and 16 more, greedily.
- `NAME-hub.tar.gz`: the export with code (`surgery export --to hub`) of some. An archive, for that code is no part of
  the project's own and stays as it was.
"""

from __future__ import annotations

import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import surgery

PLAIN = {"refit_queries": False, "refit_output": False, "gain_fit": False}
SHARE = {"rewriter": "share", "layout": "cla2"}
DMS = {"rewriter": "dms", "ratio": 2, "window": 6, "sinks": 2}
METHODS: dict[str, tuple[int, list[dict[str, Any]]]] = {
    "identity": (2, [{"rewriter": "identity"}]),
    "gqa-uneven": (4, [{"rewriter": "gqa", "groups": [[0, 3], [1], [2]]}]),
    "mla": (2, [{"rewriter": "mla", "rank": 12, "rope_dims": 4}]),
    "lowrank": (2, [{"rewriter": "lowrank", "keep": 0.5, "k_share": 0.5}]),
    "lowrank-freq": (2, [{"rewriter": "lowrank", "keep": 0.5, "k_share": 0.5, "layout": "freq"}]),
    "share-cla2": (2, [SHARE]),
    "share-latent": (2, [SHARE | {"init": "latent"}]),
    "svformer": (2, [SHARE | {"layout": "svformer", "init": "least_squares"}]),
    "dms": (2, [DMS]),
    "dms-window": (2, [DMS | {"gate": "score:window"}]),
    "dms-windows": (2, [DMS | {"layers": "0-1"}, DMS | {"layers": "2-3", "window": 3, "ratio": 4}]),
    "dmc": (2, [{"rewriter": "dmc", "ratio": 2, "sinks": 2, "window": 3}]),
    "gqa-dms": (4, [{"rewriter": "gqa", "kv_heads": "1/2"}, DMS]),
    "share-dms": (2, [SHARE, DMS]),
}
"""KV heads of the parent, and steps."""
EXPORTED = ("mla", "dms")


def parent_config(kv_heads: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=64, hidden_size=24, intermediate_size=4, num_hidden_layers=4, num_attention_heads=4, head_dim=8,
        num_key_value_heads=kv_heads, max_position_embeddings=256, initializer_range=0.3, tie_word_embeddings=True,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, dtype="float32",
    )  # fmt: skip


def parent(kv_heads: int) -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(parent_config(kv_heads)).eval()


def converted(name: str) -> PreTrainedModel:
    """The model of a method, its gates as if they were trained."""
    kv_heads, steps = METHODS[name]
    random = torch.Generator().manual_seed(1)
    text = torch.randint(3, 64, (32, 24), generator=random)
    model = surgery.convert(parent(kv_heads), {"name": name, "steps": steps}, calibration=text, seed=0).eval()
    with torch.no_grad():
        for parameter, tensor in model.named_parameters():
            if ".gate." in parameter:
                bias = parameter.endswith("bias")
                tensor.copy_(0.1 * torch.randn(tensor.shape, generator=random) + (0.2 if bias else 0.0))
    return model


@torch.no_grad()
def answers(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 64, (1, 24), generator=torch.Generator().manual_seed(2))
    greedy = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False}
    tokens = model.generate(ids, attention_mask=torch.ones_like(ids), **greedy)
    return {"ids": ids, "logits": model(ids).logits.contiguous(), "tokens": tokens.contiguous()}


def write(out: Path) -> None:
    """Write everything to `out`, of which nothing is there yet."""
    made = [out / name for method in METHODS for name in (method, f"{method}.safetensors", f"{method}-hub.tar.gz")]
    made += [out / f"parent-{kv_heads}.json" for kv_heads in (2, 4)]
    there = [path for path in made if path.exists()]
    if there:
        sys.exit(f"{there[0]} is there, and stored checkpoints are not written again. Give another folder.")
    out.mkdir(parents=True, exist_ok=True)
    for kv_heads in (2, 4):
        parent_config(kv_heads).to_json_file(out / f"parent-{kv_heads}.json")
    for name in METHODS:
        model = converted(name)
        surgery.save(model, out / name)
        save_file(answers(model), out / f"{name}.safetensors")
        if name in EXPORTED:
            with tempfile.TemporaryDirectory() as folder, tarfile.open(out / f"{name}-hub.tar.gz", "w:gz") as archive:
                surgery.export(out / name, Path(folder) / f"{name}-hub", to="hub")
                archive.add(Path(folder) / f"{name}-hub", f"{name}-hub")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("Usage: python tests/saved/write.py FOLDER")
    write(Path(sys.argv[1]))
