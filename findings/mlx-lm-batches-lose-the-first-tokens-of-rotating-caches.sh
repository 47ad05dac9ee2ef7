#!/usr/bin/env bash
# mlx-lm 0.32.2, mlx 0.32.4 (CPU): a cache of limited size, `max_kv_size`, in `generate_step` and in `batch_generate`.
#
# Guess: both make the same caches, `RotatingKVCache(max_size=max_kv_size, keep=4)`, whose first four tokens (attention sinks)
#   never leave. So a prompt gets the same greedy answer from both, and what batches cannot do is refused.
# Behaviour: a batch, of one prompt too, is merged into a `BatchRotatingKVCache`, which has no `keep`. Once the cache is full the
#   first tokens leave as others do: the answer is that of `keep=0`, a plain sliding window, which sinks are kept to avoid. So it
#   goes with caches that are handed over in `prompt_caches`. No error, no warning.
# Seen, four prompts of 6 tokens, max_kv_size=16, 30 new tokens: without the limit both agree on all; with it they part after 13,
#   11, 12 and 13 tokens, and the batch says to the end what `generate_step` says with `keep=0`.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q mlx==0.32.4 mlx-cpu==0.32.4 mlx-lm==0.32.2
"$dir/venv/bin/python" -W error::UserWarning - <<'PY'
import sys
from types import SimpleNamespace

import mlx.core as mx
from mlx.utils import tree_map
from mlx_lm.generate import batch_generate, generate_step
from mlx_lm.models.cache import RotatingKVCache
from mlx_lm.models.qwen2 import Model, ModelArgs

SIZE, NEW = 16, 30
mx.random.seed(0)
model = Model(ModelArgs(
    model_type="qwen2", hidden_size=64, num_hidden_layers=2, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2,
    rms_norm_eps=1e-5, vocab_size=64,
))
model.update(tree_map(lambda x: mx.random.normal(x.shape) * 0.3 if x.ndim > 1 else x, model.parameters()))
tokenizer = SimpleNamespace(eos_token_ids=[], decode=lambda ids: "")  # never ends; texts are not looked at


def alone(prompt, **options):
    return [int(token) for token, _ in generate_step(mx.array(prompt), model, max_tokens=NEW, **options)]


def batched(prompt, **options):
    return batch_generate(model, tokenizer, [prompt], max_tokens=NEW, return_token_ids=True, **options).token_ids[0]


def caches(keep):
    return [RotatingKVCache(max_size=SIZE, keep=keep) for _ in model.layers]


def agree(a, b):
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), NEW)


seen = []
for _ in range(4):
    prompt = mx.random.randint(1, 64, (6,)).tolist()
    limited = alone(prompt, max_kv_size=SIZE)
    batch = batched(prompt, max_kv_size=SIZE)
    seen.append({
        "no limit": agree(alone(prompt), batched(prompt)),
        "keep=4 named": agree(limited, alone(prompt, prompt_cache=caches(4))),
        "batch": agree(limited, batch),
        "batch with keep=4 handed over": agree(limited, batched(prompt, prompt_caches=[caches(4)])),
        "batch and keep=0": agree(batch, alone(prompt, prompt_cache=caches(0))),
    })
    print(f"of {NEW} tokens the same:", seen[-1])
whole = all(s["no limit"] == s["keep=4 named"] == s["batch and keep=0"] == NEW for s in seen)
parted = all(SIZE - 6 <= s["batch"] == s["batch with keep=4 handed over"] < NEW for s in seen)
sys.exit(not (whole and parted))
PY
echo "as described: batches let the first tokens go that rotating caches keep"
