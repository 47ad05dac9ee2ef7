#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0 (CPU): hooks on the base model of an OPT language model.
#
# Guess: `model.base_model`, the `OPTModel` inside an `OPTForCausalLM`, runs whenever the language model runs: a forward hook
#   on it sees the hidden states, and a pre-hook (accelerate, probes, presses on the cache) can change what goes in. So it is
#   with Llama, GPT-2, GPT-NeoX and others.
# Behaviour: `OPTForCausalLM.forward` calls `self.model.decoder` and passes the base model by. Its hooks never run in forward or
#   generate; they do where it is called itself. A forward put in the place of `OPTModel.forward` is as idle.
# Seen: hook calls in one forward pass and four steps of generate: OPT 0, Llama 5, GPT-2 5, GPT-NeoX 5; called itself, OPT 1.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0
"$dir/venv/bin/python" -W ignore - <<'PY'
import sys
import torch
from transformers import AutoConfig, AutoModelForCausalLM

small = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "max_position_embeddings": 64}
wide = {"ffn_dim": 32, "word_embed_proj_dim": 32, "intermediate_size": 32}
seen = {}
for kind in ("opt", "llama", "gpt2", "gpt_neox"):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **small, **wide)).eval()
    calls = []
    model.base_model.register_forward_hook(lambda *_: calls.append(1))
    ids = torch.arange(3, 8)[None]
    with torch.no_grad():
        model(input_ids=ids)
        model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=1)
        through = len(calls)
        model.base_model(input_ids=ids)
    seen[kind] = through, len(calls) - through
    base = type(model.base_model).__name__
    print(f"{type(model).__name__}: {through} hook calls through it, {len(calls) - through} where {base} is called")
sys.exit(seen != {"opt": (0, 1), "llama": (5, 1), "gpt2": (5, 1), "gpt_neox": (5, 1)})
PY
echo "as described: hooks on OPT's base model do not run"
