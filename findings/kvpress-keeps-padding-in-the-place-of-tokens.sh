#!/usr/bin/env bash
# kvpress 0.5.5, transformers 5.2.0, torch 2.13.0 (CPU): a press around `generate` of a batch that is padded on the left.
#
# Guess: the attention mask is given, so that padding is not scored, and a sequence answers in a batch as it does alone; or a
#   mask with zeros is refused.
# Behaviour: scores are taken of all columns of the cache, padding among them, and the mask is not looked at. Entries of padding
#   stay and tokens of the text leave for them; what the mask says of columns afterwards is said of others. No warning. The
#   longest sequence of the batch, which has no padding, is as it is alone.
# Seen: 60 tokens behind 20 of padding, half of the cache kept (40 entries): of these are padding, by KV head, 0 and 20
#   (KnormPress), 18 and 0 (SnapKVPress), 20 and 11 (ExpectedAttentionPress). The answers of the three differ from those alone.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q torch==2.13.0 transformers==5.2.0 kvpress==0.5.5
"$dir/venv/bin/python" -W ignore - <<'PY'
import contextlib

import torch
from kvpress import ExpectedAttentionPress, KnormPress, SnapKVPress
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=512,
)
model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
LONG, SHORT = 80, 60
PADS = LONG - SHORT
long, short = (torch.randint(1, 64, (1, length)) for length in (LONG, SHORT))
both = torch.cat((long, torch.nn.functional.pad(short, (PADS, 0))))
mask = torch.ones_like(both)
mask[1, :PADS] = 0


def answers(ids, mask, press):
    with torch.no_grad(), press(model) if press else contextlib.nullcontext():
        found = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=10, pad_token_id=0)
    return found[:, ids.shape[1] :].tolist()


def keys(press):
    cache = DynamicCache()
    with torch.no_grad(), press(model) if press else contextlib.nullcontext():
        model(both, attention_mask=mask, past_key_values=cache)
    return cache.layers[0].keys[1]


presses = {"none": None, "knorm": KnormPress(0.5), "snapkv": SnapKVPress(0.5, window_size=16), "expected": ExpectedAttentionPress(0.5)}
whole = keys(None)
for name, press in presses.items():
    alone = [answers(ids, torch.ones_like(ids), press)[0] for ids in (long, short)]
    same = [a == b for a, b in zip(alone, answers(both, mask, press), strict=True)]
    kept = keys(press)
    places = (kept[:, :, None] - whole[:, None]).abs().sum(-1).argmin(-1)  # [heads, kept]
    pads = (places < PADS).sum(-1).tolist()
    print(name, "same as alone:", same, "padding among", kept.shape[1], "entries, by head:", pads)
    assert same == [True, press is None]
    assert press is None or (kept.shape[1] == LONG // 2 and max(pads) >= PADS // 2)
PY
