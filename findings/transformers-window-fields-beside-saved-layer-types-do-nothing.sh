#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0 (CPU): sliding windows switched on or off beside the folder of a Qwen2.
#
# Guess: keyword arguments of `AutoConfig.from_pretrained` that are fields of the config override what is loaded. So
#   `use_sliding_window=True, sliding_window=4, max_window_layers=0` gives a model without windows windows of 4 tokens, and
#   `use_sliding_window=False` gives one with windows none, as the constructor does with the same arguments.
# Behaviour: the fields are taken, shown and saved again, and nothing happens. What they mean was worked out when the model was
#   saved, and stands as `layer_types` in config.json, which wins without a warning. A model "without" windows attends in
#   windows, one "with" windows sees everything; only the size of windows that are there can be changed.
# Seen: tokens that the last of 32 gives weight to, by layer. Switched on: constructor [4, 4], from the folder [32, 32].
#   Switched off: constructor [32, 32], from the folder [4, 4]. max_window_layers=1: [32, 4] and [4, 4].
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0
"$dir/venv/bin/python" -W ignore - "$dir" <<'PY'
import sys
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config

small = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64,
}
off, on = {"use_sliding_window": False}, {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}


def tokens_seen(config):
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        weights = model(input_ids=torch.arange(32)[None], output_attentions=True).attentions
    return [int((layer[0, 0, -1] > 0).sum()) for layer in weights]


seen = {}
for name, saved, change in (("on", {}, on), ("off", on, off), ("half", on, {"max_window_layers": 1})):
    folder = f"{sys.argv[1]}/{name}"
    AutoModelForCausalLM.from_config(Qwen2Config(**small, **saved)).save_pretrained(folder)
    config = AutoConfig.from_pretrained(folder, **change)
    assert all(getattr(config, field) == value for field, value in change.items())
    seen[name] = tokens_seen(Qwen2Config(**small, **{**saved, **change})), tokens_seen(config)
    print(f"{change}: constructor {seen[name][0]}, from the folder {seen[name][1]} ({config.layer_types})")
sys.exit(seen != {"on": ([4, 4], [32, 32]), "off": ([32, 32], [4, 4]), "half": ([32, 4], [4, 4])})
PY
echo "as described: saved layer types win over the fields that make them"
