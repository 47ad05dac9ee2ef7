#!/usr/bin/env bash
# transformers 5.24.0: Falcon with `output_attentions=True` and the default attention (sdpa).
#
# Guess: `output_attentions=True` adds the attention weights to the output and changes nothing else; the logits stay,
#   up to rounding.
# Behaviour: with sdpa the mask is built as booleans, True where a token may look. When attentions are asked for,
#   Falcon's attention leaves sdpa and does the sum itself, as `softmax(scores + mask)`, which is the arithmetic for a
#   mask of zeros and large negative numbers. A boolean mask adds 1 or 0, so nothing is hidden and every token sees
#   those after it. With `attn_implementation="eager"` the mask holds numbers, and all is well.
# Seen: sdpa: logits move by more than 1, and changing the last token changes the logits of the tokens before it; the
#   returned weights above the diagonal are not zero. eager: logits are the same to the bit. No error, no warning.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0
OMP_NUM_THREADS=1 "$dir/venv/bin/python" - <<'PY'
import logging, sys, warnings
import torch, transformers
from transformers import FalconConfig, FalconForCausalLM

heard = []
logging.getLogger("transformers").addHandler(type("Ear", (logging.Handler,), {"emit": lambda _, r: heard.append(r.getMessage())})())
warnings.showwarning = lambda message, *rest: heard.append(str(message))

print("transformers", transformers.__version__)
ids = torch.tensor([[5, 9, 30, 17, 44]])
other = torch.tensor([[5, 9, 30, 17, 7]])
found = {}
for kind in ("sdpa", "eager"):
    torch.manual_seed(0)
    config = FalconConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.3,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, attn_implementation=kind,
    )
    model = FalconForCausalLM(config).eval()
    heard.clear()
    with torch.no_grad():
        plain = model(ids).logits
        asked = model(ids, output_attentions=True)
        asked_other = model(other, output_attentions=True)
    moved = (plain - asked.logits).abs().max().item()
    leak = (asked.logits[:, :-1] - asked_other.logits[:, :-1]).abs().max().item()
    ahead = asked.attentions[0].triu(1).abs().max().item()
    print(f"  {kind:5}: logits move by {moved:.3f}, the last token moves earlier logits by {leak:.3f}, "
          f"largest weight on a later token {ahead:.3f}, warnings: {heard}")
    found[kind] = (moved > 0.1, leak > 0.1, ahead > 0.1, bool(heard))
sys.exit(found != {"sdpa": (True, True, True, False), "eager": (False, False, False, False)})
PY
echo "as described: asking for attentions makes Falcon look ahead"
