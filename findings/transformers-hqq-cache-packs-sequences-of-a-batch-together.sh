#!/usr/bin/env bash
# transformers 5.24.0 with hqq 0.2.8.post1, torch 2.13.0 (CPU): a quantized cache with the backend `hqq` and its other defaults, in a
# batch.
#
# Guess: keys and values are rounded in groups of 64 numbers that belong together, of one token or of one channel ("per-channel", as
#   the docstring says). Which numbers share a group does not depend on other sequences, so that an answer in a batch is that of the
#   same text alone, as with the backend `quanto` and with every cache that is not quantized.
# Behaviour: with `axis_key=0` and `axis_value=0`, the defaults, hqq cuts the tensor of [batch, heads, tokens, channels] in 64 equal
#   parts and takes one number of each for a group. A group then spans all sequences of the batch, all heads, and tokens far apart,
#   and they share a scale. What one sequence says changes what another is answered. No error, no warning. The guide recommends 1 for
#   both with this backend, and does not say that; with 1 groups lie within a token.
# Seen, 4 bits, a text alone and beside two others: the next logits differ by 2.5 (the largest is 8.9), beside two pairs of others by
#   3.4; with axis 1 by rounding. `generate(cache_implementation="quantized")`: 3 of 24 tokens as alone; with axis 1 24.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 hqq==0.2.8.post1
OMP_NUM_THREADS=1 "$dir/venv/bin/python" -W error::UserWarning - <<'PY'
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM, QuantizedCache

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64, hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=256,
    initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)
model = LlamaForCausalLM(config).eval()
text, others, more = torch.randint(3, 64, (5, 40)).split((1, 2, 2))


def next_logits(ids, axes):
    """Of the first sequence, behind a cache of all tokens but the last."""
    cache = QuantizedCache("hqq", config, **axes)
    model(ids[:, :-1], cache=cache)
    return model(ids[:, -1:], cache=cache).logits[0, -1]


def answer(ids, axes):
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, min_new_tokens=24, do_sample=False,
        cache_implementation="quantized", cache_config={"backend": "hqq", **axes},
    )
    return out[0, ids.shape[1] :]


found = {}
with torch.no_grad():
    for name, axes in (("default axes", {}), ("axes 1", {"axis_key": 1, "axis_value": 1})):
        alone, beside, elsewhere = (next_logits(torch.cat([text, *near]), axes) for near in ((), (others,), (more,)))
        agree = (answer(text, axes) == answer(torch.cat([text, others]), axes)).sum().item()
        off, moved = (alone - beside).abs().max().item(), (beside - elsewhere).abs().max().item()
        found[name] = off, moved, agree
        print(
            f"{name}: next logits off beside two others {off:.2g}, between two pairs of others {moved:.2g}, "
            f"largest {alone.abs().max():.2f}; {agree} of 24 tokens as alone"
        )
bad, good = found["default axes"], found["axes 1"]
sys.exit(not (min(bad[:2]) > 0.2 and bad[2] < 24 and max(good[:2]) < 1e-3 and good[2] == 24))
PY
echo "as described: with its default axes an hqq cache rounds the sequences of a batch in common groups"
