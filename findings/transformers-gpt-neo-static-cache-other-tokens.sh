#!/usr/bin/env bash
# transformers 5.24.0: GPT-Neo with cache_implementation="static".
#
# Guess: a static cache is the same cache in tensors of fixed size; greedy tokens are those of a dynamic one, or the
#   model refuses static caches (`_can_compile_fullgraph` and friends exist to say so).
# Behaviour: the attention of local layers cuts its window out of a table by the length of the KEYS. With a static cache
#   that is the size of the cache, not the number of tokens, so the window lies at the end of the empty part and local
#   layers see other tokens than with a dynamic cache. `generate` takes the option and returns other tokens; no error,
#   no warning. It concerns every static cache that is longer than the window.
# Seen: window 8, cache of 26 tokens: dynamic cache and no cache agree to the token, the static cache differs from the
#   second new token on. Window 64: all three agree.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0
OMP_NUM_THREADS=1 "$dir/venv/bin/python" - <<'PY'
import sys
import torch, transformers
from transformers import GPTNeoConfig, GPTNeoForCausalLM


def generate(window, **kind):
    torch.manual_seed(0)
    config = GPTNeoConfig(
        vocab_size=128, hidden_size=64, num_layers=2, num_heads=4, window_size=window, intermediate_size=96,
        attention_types=[[["global", "local"], 1]], max_position_embeddings=256, initializer_range=0.2,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )
    model = GPTNeoForCausalLM(config).eval()
    ids = torch.randint(3, 128, (2, 14), generator=torch.Generator().manual_seed(0))
    ask = dict(attention_mask=torch.ones_like(ids), max_new_tokens=12, min_new_tokens=12, do_sample=False)
    return model.generate(ids, **ask, **kind)[:, 14:].tolist()


print("transformers", transformers.__version__)
differs = {}
for window in (8, 64):
    found = {name: generate(window, **kind) for name, kind in {
        "dynamic": {}, "no cache": {"use_cache": False}, "static": {"cache_implementation": "static"}}.items()}
    for name, tokens in found.items():
        print(f"  window {window:2}, {name:8}: {tokens}")
    assert found["dynamic"] == found["no cache"]
    differs[window] = found["static"] != found["dynamic"]
print("static differs:", differs)
sys.exit(differs != {8: True, 64: False})
PY
