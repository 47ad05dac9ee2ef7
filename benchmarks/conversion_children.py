"""What `conversion_cost.py` runs in processes of their own, beside the command line itself.

Each sub-command prints one JSON value as its last line. The library is the one that PYTHONPATH names, so that two
builds answer the same questions. Checkpoints are made here too: what a process has held once would count as memory of
the processes that it starts.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

import surgery
from surgery.calibration.text import Windows, load_tokenizer, read_windows

BATCH = 8
"""Windows of one forward pass through all layers."""


def windows_of(model: Path, config: Any, text: Path, samples: int, length: int) -> Windows:
    """The windows that a conversion or an evaluation of this model cuts from the text."""
    return read_windows(config, text, load_tokenizer(model), length=length, samples=samples)


@torch.inference_mode()
def forward(model: Path, text: Path, samples: int, length: int) -> dict[str, Any]:
    """Processor time of one forward pass in float32 with all logits, after a short one that warms up."""
    parent = surgery.load(model).float().eval()
    windows = windows_of(model, parent.config, text, samples, length)
    parent(windows.ids_BT[:1], use_cache=False)
    begun = time.process_time()
    for ids, mask in windows.batches(BATCH):
        parent(ids, attention_mask=mask, use_cache=False)
    return {"pass_seconds": time.process_time() - begun, "tokens": windows.tokens, "text": windows.digest}


@torch.inference_mode()
def layerwise(model: Path, text: Path, samples: int, length: int) -> dict[str, Any]:
    """The same for a model that is never in memory as a whole: one layer after another, windows one by one.

    Reading and widening the weights is not counted.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model)
    layers = config.num_hidden_layers
    windows = windows_of(model, config, text, samples, length)
    config.num_hidden_layers = 1
    files = json.loads((model / "model.safetensors.index.json").read_text())["weight_map"]

    def tensors(prefix: str) -> dict[str, torch.Tensor]:
        found = {}
        for name, file in files.items():
            if name.startswith(prefix):
                with safe_open(model / file, "pt") as shard:
                    found[name.removeprefix(prefix)] = shard.get_tensor(name).float()
        return found

    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    body, seconds = skeleton.model, 0.0
    rotary = type(body.rotary_emb)(config)
    table = tensors("model.embed_tokens.")["weight"]
    streams = [torch.nn.functional.embedding(ids[None], table) for ids in windows.ids_BT]
    del table
    angles = rotary(streams[0], torch.arange(windows.ids_BT.shape[1])[None])

    def run(module: torch.nn.Module, prefix: str, **arguments: Any) -> None:
        nonlocal seconds
        module.load_state_dict(tensors(prefix), assign=True)
        begun = time.process_time()
        for i, x in enumerate(streams):
            y = module(x, **arguments)
            if module is not skeleton.lm_head:
                streams[i] = y
        seconds += time.process_time() - begun
        module.to("meta")

    for layer in range(layers):
        run(body.layers[0], f"model.layers.{layer}.", position_embeddings=angles, attention_mask=None)
    run(body.norm, "model.norm.")
    run(skeleton.lm_head, "lm_head.")
    return {"pass_seconds": seconds, "tokens": windows.tokens, "text": windows.digest}


def quality(model: Path, text: Path, samples: int, length: int, baseline: Path) -> dict[str, Any]:
    """Loss of a child and its parent on held-out text, and the KL between them, in nats per token."""
    parent, child = surgery.load(baseline).float(), surgery.load(model).float()
    windows = windows_of(baseline, parent.config, text, samples, length)
    report = surgery.evaluate(child, baseline=parent, text=windows, path="prefill")
    assert report.baseline is not None
    return {
        "kl": report.kl,
        "nats_per_token": report.model.nats_per_token,
        "parent_nats_per_token": report.baseline.nats_per_token,
        "kv_bytes_per_token": report.model.kv_bytes_per_token,
        "parent_kv_bytes_per_token": report.baseline.kv_bytes_per_token,
        "tokens": report.tokens,
        "text": report.text_digest,
    }


def repeat_layers(model: Path, folder: Path, first: int, layers: int) -> None:
    """A checkpoint of `layers` layers: the first ones of `model`, again and again."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, "pt") as stored:
            for name in stored.keys():  # noqa: SIM118
                start, middle, rest = name.partition(".layers.")
                if not middle:
                    tensors[name] = stored.get_tensor(name)
                    continue
                number, _, rest = rest.partition(".")
                for copy in range(int(number), layers, first) if int(number) < first else ():
                    tensors[f"{start}{middle}{copy}.{rest}"] = stored.get_tensor(name).clone()
    for file in model.iterdir():
        if file.suffix not in (".safetensors", ".md") and file.is_file() and "index" not in file.name:
            shutil.copyfile(file, folder / file.name)
    config = json.loads((model / "config.json").read_text())
    config["num_hidden_layers"] = layers
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def write_seven_b(folder: Path, tokenizer: Path, width: int, layers: int) -> None:
    """A Mistral-7B shape (its full width is 4096), one shard for each layer, as transformers initialises it.

    `tokenizer` is a folder of one with at most as many tokens.
    """
    from transformers import MistralConfig

    folder.mkdir(parents=True, exist_ok=True)
    config = MistralConfig(
        hidden_size=width, intermediate_size=width * 7 // 2, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, head_dim=width // 32, vocab_size=32000, max_position_embeddings=32768,
        sliding_window=None, rope_parameters={"rope_type": "default", "rope_theta": 1e6}, dtype="bfloat16",
        tie_word_embeddings=False, architectures=["MistralForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    for file in tokenizer.iterdir():
        shutil.copyfile(file, folder / file.name)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16).normal_(std=config.initializer_range, generator=generator)

    def shards() -> Iterator[dict[str, torch.Tensor]]:
        kv, inner = width // 4, width * 7 // 2
        yield {"model.embed_tokens.weight": normal(config.vocab_size, width)}
        for layer in range(layers):
            shapes = {"self_attn.q_proj": (width, width), "self_attn.k_proj": (kv, width),
                      "self_attn.v_proj": (kv, width), "self_attn.o_proj": (width, width),
                      "mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width),
                      "mlp.down_proj": (width, inner)}  # fmt: skip
            tensors = {f"{name}.weight": normal(*shape) for name, shape in shapes.items()}
            for name in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"{name}.weight"] = torch.ones(width, dtype=torch.bfloat16)
            yield {f"model.layers.{layer}.{name}": tensor for name, tensor in tensors.items()}
        yield {"model.norm.weight": torch.ones(width, dtype=torch.bfloat16),
               "lm_head.weight": normal(config.vocab_size, width)}  # fmt: skip

    names: dict[str, str] = {}
    size = 0
    for number, shard in enumerate(shards(), 1):
        name = f"model-{number:05}-of-{layers + 2:05}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        names |= dict.fromkeys(shard, name)
        size += sum(tensor.numel() * tensor.element_size() for tensor in shard.values())
    index = {"metadata": {"total_size": size}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    for what in ("forward", "layerwise", "quality"):
        asked = commands.add_parser(what)
        asked.add_argument("model", type=Path)
        asked.add_argument("text", type=Path)
        asked.add_argument("samples", type=int)
        asked.add_argument("length", type=int)
        if what == "quality":
            asked.add_argument("baseline", type=Path)
    layers = commands.add_parser("repeat_layers")
    layers.add_argument("model", type=Path)
    layers.add_argument("folder", type=Path)
    layers.add_argument("first", type=int)
    layers.add_argument("layers", type=int)
    shape = commands.add_parser("write_seven_b")
    shape.add_argument("folder", type=Path)
    shape.add_argument("tokenizer", type=Path)
    shape.add_argument("width", type=int)
    shape.add_argument("layers", type=int)
    given = vars(parser.parse_args())
    does: dict[str, Callable[..., Any]] = {
        "forward": forward, "layerwise": layerwise, "quality": quality,
        "repeat_layers": repeat_layers, "write_seven_b": write_seven_b,
    }  # fmt: skip
    print(json.dumps(does[given.pop("what")](**given)))  # noqa: T201


if __name__ == "__main__":
    main()
