#!/usr/bin/env bash
# mlx-lm 0.32.2, mlx 0.32.4 (CPU): `trim_prompt_cache` (drafts that are rejected, prompts that share a beginning) with Llama 4.
#
# Guess: layers that attend within chunks of the text keep a chunk and no more, so that a cache goes back no further than its
#   chunk: `can_trim_prompt_cache` says no, as it does of a rotating cache that has turned over, or fewer tokens are trimmed.
# Behaviour: `ChunkedKVCache` says that it can, always, and trims what it is asked. Tokens of the chunk before have left it at its
#   other end, and nothing brings them back: what follows is answered without them. No error, no warning.
# Seen, chunks of 16 tokens, after 40: 5 tokens back (within the chunk) all is right; 10 tokens back the logits of the rest are off
#   by 4.2 of at most 4.5. A Llama 3 is right in both cases.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q mlx==0.32.4 mlx-cpu==0.32.4 mlx-lm==0.32.2
"$dir/venv/bin/python" - <<'PY'
import sys

import mlx.core as mx
from mlx.utils import tree_map
from mlx_lm.models import llama, llama4
from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache

FED, END = 40, 60
sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": 64}
chunked = {
    "model_type": "llama4_text", "attention_bias": False, "attention_chunk_size": 16, "head_dim": 16,
    "interleave_moe_layer_step": 2, "intermediate_size": 64, "intermediate_size_mlp": 64, "max_position_embeddings": 512,
    "num_experts_per_tok": 1, "num_hidden_layers": 4, "num_local_experts": 2, "rope_scaling": None, "rope_theta": 1e4,
    "use_qk_norm": False,
}
models = {
    "llama": llama.Model(llama.ModelArgs(model_type="llama", num_hidden_layers=2, intermediate_size=64, **sizes)),
    "llama4": llama4.Model(llama4.ModelArgs.from_dict({"model_type": "llama4", "text_config": {**chunked, **sizes}})),
}
mx.random.seed(0)
ids = mx.random.randint(1, 64, (1, END))


def feed(model, cache, begin):
    """Logits of the tokens from `begin` on, given one by one."""
    return mx.concatenate([model(ids[:, i : i + 1], cache=cache) for i in range(begin, END)], 1)


off = {}
for name, model in models.items():
    model.update(tree_map(lambda x: mx.random.normal(x.shape) * 0.15 if x.ndim > 1 else x, model.parameters()))
    whole = feed(model, make_prompt_cache(model), 0)
    for back in (5, 10):
        cache = make_prompt_cache(model)
        for i in range(FED):
            model(ids[:, i : i + 1], cache=cache)
        can, trimmed = can_trim_prompt_cache(cache), trim_prompt_cache(cache, back)
        rest = feed(model, cache, FED - trimmed)
        off[name, back] = float(mx.abs(rest - whole[:, FED - trimmed :]).max())
        print(f"{name}: can be trimmed: {can}, by {trimmed} of {back}; logits of the rest off by {off[name, back]:.2g}")
sys.exit(not (off.pop(("llama4", 10)) > 0.5 and max(off.values()) < 1e-3))
PY
echo "as described: the cache goes back to a chunk that it no longer has"
