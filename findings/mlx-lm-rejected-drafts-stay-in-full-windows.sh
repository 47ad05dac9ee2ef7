#!/usr/bin/env bash
# mlx-lm 0.32.2, mlx 0.32.4 (CPU): a draft model (`speculative_generate_step`, `--draft-model`) beside a model with sliding windows,
# Gemma 3.
#
# Guess: drafts change the speed and not the answer, so that greedy tokens are those of `generate_step`. A cache that cannot go back
#   is refused: "Speculative decoding requires a trimmable prompt cache".
# Behaviour: the question is asked once, of the cache before the prompt. An empty rotating cache can be trimmed; once the text is as
#   long as its window it cannot. From there on `trim_prompt_cache` trims no layer at all, not even those with full attention, and
#   returns 0, which nobody looks at. Every rejected draft stays in the cache as if it were part of the text, and positions go on
#   behind it. No error, no warning. Where the prompt is longer than the window this is so from the first token.
# Seen: random weights, 30 greedy tokens after prompts of 4, 8, 12, 20 and 40, counted until they part from those without drafts. A
#   Gemma 3 with windows of 16: 11, 7, 3, 1 and 1, whether a Gemma 3 or a Llama drafts. With windows of 512, and a Llama: 30 each.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q mlx==0.32.4 mlx-cpu==0.32.4 mlx-lm==0.32.2
"$dir/venv/bin/python" - <<'PY'
import sys

import mlx.core as mx
from mlx.utils import tree_map
from mlx_lm.generate import generate_step, speculative_generate_step
from mlx_lm.models import gemma3_text, llama

NEW = 30
SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64}


def fill(model, seed):
    mx.random.seed(seed)
    model.update(tree_map(lambda x: mx.random.normal(x.shape) * 0.15 if x.ndim > 1 else x, model.parameters()))
    return model


def gemma(window, seed):
    windows = {"sliding_window": window, "sliding_window_pattern": 2, "head_dim": 16, "num_hidden_layers": 4}
    return fill(gemma3_text.Model(gemma3_text.ModelArgs(model_type="gemma3_text", **SIZES, **windows)), seed)


def plain(seed):
    return fill(llama.Model(llama.ModelArgs(model_type="llama", num_hidden_layers=2, rms_norm_eps=1e-5, **SIZES)), seed)


def agree(model, draft, prompt):
    """Tokens until the answer with drafts parts from the one without."""
    alone = [int(token) for token, _ in generate_step(prompt, model, max_tokens=NEW)]
    drafted = [int(token) for token, *_ in speculative_generate_step(prompt, model, draft, max_tokens=NEW)]
    return next((i for i in range(NEW) if alone[i] != drafted[i]), NEW)


models = {
    "Gemma 3, windows of 16": (gemma(16, 0), gemma(16, 9)),
    "Gemma 3, windows of 16, a Llama drafts": (gemma(16, 0), plain(9)),
    "Gemma 3, windows of 512": (gemma(512, 0), gemma(512, 9)),
    "Llama": (plain(0), plain(9)),
}
mx.random.seed(5)
prompts = [mx.random.randint(1, 64, (length,)) for length in (4, 8, 12, 20, 40)]
good = True
for name, (model, draft) in models.items():
    found = [agree(model, draft, prompt) for prompt in prompts]
    print(f"{name}: tokens of {NEW} as without drafts {found}")
    good &= max(found) < 20 and found[-1] < 4 if "16" in name else min(found) == NEW
sys.exit(not good)
PY
echo "as described: rejected drafts stay in the cache once a window is full"
