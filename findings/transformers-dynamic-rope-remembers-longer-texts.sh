#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0 (CPU): rotary embeddings with `rope_type: dynamic` (NTK by length), one text after another.
#
# Guess: the base of the frequencies follows the length of the text that is read, so that logits are a function of the text: whatever
#   the model read before, and in another order, a text has the same logits. A cache that is handed over is all that a call leaves
#   behind.
# Behaviour: the rotary module keeps the frequencies of the longest text so far, and takes its own back only for a text that is
#   shorter than `original_max_position_embeddings`. A text between the two is read with the frequencies of a longer one that came
#   before it, in another call, without any cache. Losses and answers to long texts depend on the order in which they come, on who
#   used the server before, and on whether a short text came between. No error, no warning.
# Seen, 64 original positions, a text of 96 tokens: read again after one of 200 its logits are off by 9.9 (the largest is 9.1), and
#   equal those that it has beside the text of 200 in one batch; after a text of 20 tokens they are right again. Losses of texts of
#   80, 120, 160 and 200 tokens, shortest first: 6.317 6.959 6.659 6.519; longest first: 6.403 7.085 6.556 6.519. `yarn`: no
#   difference.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0
OMP_NUM_THREADS=1 "$dir/venv/bin/python" -W error::UserWarning - <<'PY'
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def make(kind):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64,
        initializer_range=0.3, rope_parameters={"rope_type": kind, "factor": 2.0, "rope_theta": 10000.0},
    )
    return LlamaForCausalLM(config).eval()


def tokens(length, seed):
    return torch.randint(0, 64, (1, length), generator=torch.Generator().manual_seed(seed))


def apart(one, other):
    return (one - other).abs().max().item()


def losses(model, texts):
    return {text.shape[1]: round(model(text, labels=text, use_cache=False).loss.item(), 3) for text in texts}


text, longer, short = tokens(96, 0), tokens(200, 1), tokens(20, 2)
texts = [tokens(length, length) for length in (80, 120, 160, 200)]
found = {}
with torch.no_grad():
    for kind in ("dynamic", "yarn"):
        model = make(kind)
        alone = model(text, use_cache=False).logits
        again = model(text, use_cache=False).logits
        model(longer, use_cache=False)
        after = model(text, use_cache=False).logits
        model(short, use_cache=False)
        reset = model(text, use_cache=False).logits
        padded = torch.cat([torch.nn.functional.pad(text, (0, 104)), longer])
        mask = torch.ones_like(padded)
        mask[0, 96:] = 0
        beside = make(kind)(padded, attention_mask=mask, use_cache=False).logits[:1, :96]
        up, down = losses(make(kind), texts), losses(make(kind), texts[::-1])
        found[kind] = apart(alone, again), apart(alone, after), apart(alone, reset), apart(after, beside), up, down
        print(
            f"{kind}: logits (largest {alone.abs().max():.2f}) read again {apart(alone, again):.2g}, after a longer text "
            f"{apart(alone, after):.2g}, after a short one {apart(alone, reset):.2g}; after the longer one against beside it "
            f"{apart(after, beside):.2g}; losses by length, shortest first {up}, longest first {down}"
        )
again, after, reset, beside, up, down = found["dynamic"]
dynamic = again == 0 and after > 1 and reset == 0 and beside < 1e-3 and up[200] == down[200] and up[80] != down[80]
again, after, reset, _, up, down = found["yarn"]
sys.exit(not (dynamic and again == after == reset == 0 and up == down))
PY
echo "as described: a text is read with the frequencies of a longer one that came before it"
