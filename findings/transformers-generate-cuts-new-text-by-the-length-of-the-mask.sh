#!/usr/bin/env bash
# transformers 5.23.0: `generate(ids, past_key_values=cache)`, continuing a text that the cache holds.
#
# Guess: two ways work or end in an error: all tokens so far (those that the cache holds are left out), or, as in a call of
#   the model itself, only the new tokens. A wrapper around `model.forward` that hands everything on changes nothing.
# Behaviour: what is left out is decided by the length of the attention mask alone. Only the new tokens without a mask: a
#   mask of their length is made up, they pass for the whole text, and as many of them as the cache holds are dropped
#   unread. All tokens so far, where the signature of `forward` does not name `attention_mask` (a logger or timer with
#   *args and **kwargs, put there without functools.wraps): no mask is made, and every token is read once more behind the
#   cache. Both go on with other text, no error, no warning.
# Seen: 10 tokens in the cache. 14 new ones alone: 4 are read; with a mask of 24, 14. All 24 at once: 14 are read, with a
#   wrapped forward 24, with functools.wraps 14. Where 14 are read, the tokens are those of a call without a cache; where
#   4 or 24 are, they are not.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0
OMP_NUM_THREADS=1 "$dir/venv/bin/python" - <<'PY'
import functools
import sys

import torch
import transformers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    initializer_range=0.4, pad_token_id=0, bos_token_id=1, eos_token_id=None,
)).eval()
old, new = torch.randint(3, 64, (1, 24)).split((10, 14), dim=1)
whole = torch.cat((old, new), dim=1)
seen, forward = [], model.forward
model.get_input_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
ASK = dict(max_new_tokens=8, do_sample=False)
want = model.generate(whole, **ASK)[0, -8:].tolist()


def wrapped(*args, **kwargs):
    return forward(*args, **kwargs)


def ask(name, ids, put=None, **more):
    with torch.no_grad():
        cache = model(old, use_cache=True, past_key_values=DynamicCache(config=model.config)).past_key_values
    model.forward = put or forward
    seen.clear()
    tokens = model.generate(ids, past_key_values=cache, **ASK, **more)[0, -8:].tolist()
    model.forward = forward
    print(f"  {name:34}: reads {seen[0]:2}, {'the' if tokens == want else 'OTHER'} tokens: {tokens}")
    return seen[0], tokens == want


print("transformers", transformers.__version__)
print(f"  without a cache: {want}")
found = [
    ask("new tokens alone", new),
    ask("new tokens, mask of all", new, attention_mask=torch.ones_like(whole)),
    ask("all tokens", whole),
    ask("all tokens, wrapped forward", whole, wrapped),
    ask("all tokens, wrapped by functools", whole, functools.wraps(forward)(wrapped)),
]
sys.exit(found != [(4, False), (14, True), (14, True), (24, False), (14, True)])
PY
