#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0 (CPU): the length of a static cache, noted before a step.
#
# Guess: `cache.get_seq_length()` gives the number of tokens that are in the cache when it is called: an int, as a
#   `DynamicCache` gives it, or a tensor of its own. A length that was noted before a step says where that step began.
# Behaviour: a `StaticCache` hands out the very tensor that it counts with, and adds to it in place. The noted length moves
#   on with every later step: a difference "tokens now less tokens before" is always 0, and a slice from the noted length
#   starts behind the new token.
# Seen: 8 tokens are cached and the length is noted as 8; after one more token the noted one reads 9, with a dynamic cache 8.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0
"$dir/venv/bin/python" - <<'PY'
import sys
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    max_position_embeddings=64,
)
model = LlamaForCausalLM(config).eval()
seen = {}
for cache in (DynamicCache(config=config), StaticCache(config=config, max_cache_len=32)):
    with torch.no_grad():
        model(input_ids=torch.arange(8)[None], past_key_values=cache, use_cache=True)
        noted = cache.get_seq_length()
        before = int(noted)
        model(input_ids=torch.tensor([[3]]), past_key_values=cache, use_cache=True)
    seen[type(cache).__name__] = before, int(noted), int(cache.get_seq_length())
    print(f"{type(cache).__name__}: noted as {before}, reads {int(noted)} after one more token ({type(noted).__name__})")
sys.exit(seen != {"DynamicCache": (8, 8, 9), "StaticCache": (8, 9, 9)})
PY
echo "as described: a length taken from a static cache is its live counter"
