#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0 (CPU): a `DynamicCache` with sliding layers, rebuilt from what iterating it gives.
#
# Guess: `DynamicCache(list(cache))` is the cache again: each item holds keys, values and the size of the window, so that this
#   form was made for sliding layers too. `DynamicCache(list(cache), config=model.config)`, and a map over the tensors of a cache
#   (`torch.utils._pytree.tree_map`, as torch.export needs it), are as good. What cannot be rebuilt is refused.
# Behaviour: a sliding layer keeps its newest window - 1 tokens and a count of all it has seen, and the count is not among the
#   parts. The rebuilt cache takes the tokens it holds for all there were: `get_seq_length()` says so, and the next token gets
#   the position that follows, near the start of the text, beside keys that are rotated to the end of it. No error, no warning.
#   While the text is shorter than the window, and with layers of full attention alone, all is well.
# Seen, window 8, 30 tokens cached: the rebuilt caches have length 7 (all three forms), logits of the next token are off by 4.4;
#   `copy.deepcopy` has 30 and no difference. With positions given by hand the rebuilt ones are right again. After 6 tokens,
#   and with full attention, no difference.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0
OMP_NUM_THREADS=1 "$dir/venv/bin/python" -W error::UserWarning - <<'PY'
import copy
import sys

import torch
from torch.utils._pytree import tree_map
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM
from transformers.integrations.executorch import register_dynamic_cache_export_support

register_dynamic_cache_export_support()
forms = {
    "DynamicCache(list(cache))": lambda cache, config: DynamicCache(list(cache)),
    "with config": lambda cache, config: DynamicCache(list(cache), config=config),
    "tree_map": lambda cache, config: tree_map(torch.clone, cache),
    "deepcopy": lambda cache, config: copy.deepcopy(cache),
}


@torch.no_grad()
def rebuilt(windows, tokens):
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        max_position_embeddings=256, initializer_range=0.2, use_sliding_window=windows, sliding_window=8, max_window_layers=0,
    )
    model = Qwen2ForCausalLM(config).eval()
    ids = torch.randint(0, 64, (1, tokens + 1))
    want = model(ids).logits[:, -1]
    found = {}
    for name, form in forms.items():
        cache = DynamicCache(config=config)
        model(ids[:, :tokens], past_key_values=cache)
        again = form(cache, config)
        length = int(again.get_seq_length())
        by_hand = form(cache, config)
        plain = model(ids[:, tokens:], past_key_values=again).logits[:, -1]
        placed = model(ids[:, tokens:], past_key_values=by_hand, position_ids=torch.tensor([[tokens]])).logits[:, -1]
        found[name] = length, (plain - want).abs().max().item(), (placed - want).abs().max().item()
        print(f"windows {windows}, {tokens} tokens, {name}: length {length}, off by {found[name][1]:.4f}, "
              f"with positions by hand {found[name][2]:.4f}")
    return found


changed = False
for name, (length, plain, placed) in rebuilt(True, 30).items():
    whole = name == "deepcopy"
    changed |= length != (30 if whole else 7) or (plain < 1e-3) != whole or placed > 1e-3
for windows, tokens in ((True, 6), (False, 30)):
    changed |= any(length != tokens or plain > 1e-3 for length, plain, _ in rebuilt(windows, tokens).values())
sys.exit(changed)
PY
echo "as described: a cache rebuilt from its parts takes its window for the whole text"
