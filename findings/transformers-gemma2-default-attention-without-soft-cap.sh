#!/usr/bin/env bash
# transformers 5.16.0, torch 2.11.0 (CPU): Gemma-2 with the attention that is chosen by default.
#
# Guess: `from_config` and `from_pretrained` without `attn_implementation` give the model's own function. Gemma-2 caps its
#   attention scores (`attn_logit_softcapping`), which SDPA cannot do, so that another implementation is chosen, or this
#   one warns.
# Behaviour: `sdpa` is chosen, and the cap is left out without a word: logits are those of another model. With
#   `attn_implementation="eager"` the same checkpoint gives the right ones. (5.23 chooses eager by itself.)
# Seen: a model with a cap of 1.0 says sdpa; its logits are 4.87 away from those of eager attention, and equal to those of
#   the same weights with the cap taken out of the config.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q torch==2.11.0 transformers==5.16.0
"$dir/venv/bin/python" - "$dir/model" <<'PY'
import sys
import torch
from transformers import AutoModelForCausalLM, Gemma2Config

torch.manual_seed(0)
config = Gemma2Config(
    vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=16, max_position_embeddings=64, attn_logit_softcapping=1.0, initializer_range=1.0,
)
AutoModelForCausalLM.from_config(config).save_pretrained(sys.argv[1])
ids = torch.arange(16)[None]
logits = {}
for name, options in {
    "default": {},
    "eager": {"attn_implementation": "eager"},
    "eager, no cap": {"attn_implementation": "eager", "attn_logit_softcapping": None},
}.items():
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], **options).eval()
    with torch.no_grad():
        logits[name] = model(ids).logits
    print(f"{name}: runs {model.config._attn_implementation}, cap {model.config.attn_logit_softcapping}")
away = {name: float((x - logits["default"]).abs().max()) for name, x in logits.items()}
print("largest difference of logits to those of the default:", {k: round(v, 4) for k, v in away.items()})
sys.exit(not (away["eager"] > 1 and away["eager, no cap"] < 1e-3))
PY
echo "as described: the default attention of Gemma-2 leaves the cap of its scores out"
