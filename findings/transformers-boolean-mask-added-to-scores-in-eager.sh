#!/usr/bin/env bash
# transformers 5.24.0: a boolean attention mask of four dimensions, True where a query may look.
#
# Guess: sdpa takes it, so eager attention, which is there to give the same numbers (and attention weights), takes it
#   too, or says that it wants an additive one.
# Behaviour: the mask is handed to the attention function as it came. `scaled_dot_product_attention` reads True as "may
#   look"; eager attention adds the mask to the scores, where True becomes 1 and False 0. Every token then sees the
#   whole text, those after it included, with a small bonus for those it was allowed to see. No error, no warning, and
#   all numbers are finite. Whoever switches a model to eager to read its attention reads that of another computation.
# Seen: causal boolean mask: sdpa equals the model without a mask to the bit, eager differs by 6.6 in logits, and the
#   first token gives 0.96 of its attention to the fifth. The same mask in additive form agrees in both.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0
OMP_NUM_THREADS=1 "$dir/venv/bin/python" - <<'PY'
import sys
import torch, transformers
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=64, initializer_range=0.3,
)
model = LlamaForCausalLM(config).eval()
ids = torch.randint(3, 64, (1, 8), generator=torch.Generator().manual_seed(0))
boolean = torch.ones(8, 8, dtype=torch.bool).tril()[None, None]
additive = torch.where(boolean, 0.0, torch.finfo(torch.float32).min)
print("transformers", transformers.__version__)
largest = {}
for name in ("sdpa", "eager"):
    model.set_attn_implementation(name)
    with torch.no_grad():
        plain = model(ids).logits
        for kind, mask in (("boolean", boolean), ("additive", additive)):
            largest[name, kind] = float((model(ids, attention_mask=mask).logits - plain).abs().max())
            print(f"  {name:5} {kind:8}: largest difference to no mask {largest[name, kind]:.3f}")
with torch.no_grad():
    seen = model(ids, attention_mask=boolean, output_attentions=True).attentions[0][0, 0, 0]
print("  eager, boolean: what the first token attends to:", [round(float(p), 2) for p in seen])
as_seen = largest["sdpa", "boolean"] < 1e-4 and largest["eager", "additive"] < 1e-4 and largest["eager", "boolean"] > 1
sys.exit(not (as_seen and float(seen[4]) > 0.9))
PY
