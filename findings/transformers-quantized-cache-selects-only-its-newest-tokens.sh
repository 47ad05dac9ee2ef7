#!/usr/bin/env bash
# transformers 5.24.0 with optimum-quanto 0.2.7, torch 2.13.0 (CPU): batch operations on a quantized cache.
#
# Guess: a `QuantizedCache` stands in for a `DynamicCache`. `reorder_cache`, `batch_select_indices` and `crop` act on all
#   tokens, whether these are packed already or still wait in full; what cannot be done is refused.
# Behaviour: `reorder_cache` does. `batch_select_indices` picks sequences in the part that waits in full (the newest tokens, at
#   most `residual_length`) and leaves the packed prompt as it was: each sequence goes on behind the prompt of another one.
#   `crop` takes tokens from the same part, and the cache goes on counting them, so that the next token gets a wrong
#   position. Neither raises or warns; only what finds that part empty or of another size fails.
# Seen: with two sequences swapped, logits differ from those of a cache filled in that order by up to 6.0 (the largest is 6.2);
#   `reorder_cache`: rounding. Two of 34 tokens cropped: length 34, logits off by up to 5.7. A `DynamicCache`: rounding, and 32.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 optimum-quanto==0.2.7
"$dir/venv/bin/python" -W ignore - <<'PY'
import sys
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, QuantizedCache

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=256, initializer_range=0.3,
)
model = LlamaForCausalLM(config).eval()
text = torch.randint(0, 64, (2, 40))
swap = torch.tensor([1, 0])


def filled(kind, text, *spans):
    cache = DynamicCache(config=config) if kind == "dynamic" else QuantizedCache("quanto", config, nbits=4, q_group_size=32)
    for start, end in spans:
        model(text[:, start:end], past_key_values=cache)
    return cache


def after(cache, text):
    return model(text[:, 32:33], past_key_values=cache).logits[:, -1]


prompt = ((0, 30), (30, 31), (31, 32))
found = {}
with torch.no_grad():
    for kind in ("dynamic", "quantized"):
        want = after(filled(kind, text, *prompt), text)
        off = {}
        for operation in ("reorder_cache", "batch_select_indices"):
            cache = filled(kind, text, *prompt)
            getattr(cache, operation)(swap)
            off[operation] = (after(cache, text[swap]) - want[swap]).abs().max().item()
        cache = filled(kind, text, *prompt, (35, 36), (36, 37))
        cache.crop(-2)
        length = int(cache.get_seq_length())
        off["crop"] = (after(cache, text) - want).abs().max().item()
        found[kind] = off, length
        print(f"{kind}: largest difference {off}, length after crop {length}, largest logit {want.abs().max():.2f}")
(exact, length), (off, kept) = found["dynamic"], found["quantized"]
right = max(*exact.values(), off["reorder_cache"]) < 1e-4 and length == 32
sys.exit(not (right and off["batch_select_indices"] > 1 and off["crop"] > 0.1 and kept == 34))
PY
echo "as described: a quantized cache selects and crops its newest tokens alone"
