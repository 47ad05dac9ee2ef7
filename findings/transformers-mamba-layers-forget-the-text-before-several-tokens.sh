#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0 (CPU): Mamba, Jamba and Falcon-Mamba given more than one token beside a cache.
#
# Guess: a cache holds the state of the text so far, and what is given with it continues the text, be it one token or ten: a second
#   turn, a prompt in pieces (`prefill_chunk_size`), a shared beginning. So it is with attention, and with Mamba-2 (Falcon-H1). What
#   a state cannot do is refused, as assisted decoding is for these models.
# Behaviour: the convolution takes up its state, of three tokens; the recurrent one, the memory of a Mamba layer, is used only where
#   a single token comes. For several the scan starts from zero, and its last state replaces the one in the cache, so that all
#   that was before is gone for every later token too. `generate` answers a prompt in chunks as another one. No error, no warning.
# Seen, 24 tokens given in halves of 12, logits off against all at once: Mamba 3.6 (the largest is 9.0), Falcon-Mamba 1.5, Jamba
#   2.4; Falcon-H1 and Llama: rounding; one by one: rounding for all five. The states that Mamba and Falcon-Mamba keep differ by
#   0.43 and 0.15. `generate` with chunks of 6: Jamba 16 of 24 tokens as without, Falcon-H1 and Llama 24; caches without any
#   attention it refuses.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0
OMP_NUM_THREADS=1 "$dir/venv/bin/python" -W ignore - <<'PY'
import sys

import torch
from transformers import AutoConfig, AutoModelForCausalLM, logging

logging.set_verbosity_error()
torch.set_grad_enabled(False)
LENGTH, FIRST = 24, 12
small = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
    "initializer_range": 0.3,
}
attention = {"intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
own = {
    "mamba": {"state_size": 8},
    "falcon_mamba": {"state_size": 8},
    "jamba": attention | {
        "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1, "mamba_d_state": 8, "mamba_dt_rank": 4,
    },
    "falcon_h1": attention | {
        "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_ssm": 64, "mamba_d_state": 8, "mamba_n_groups": 1, "head_dim": 16,
    },
    "llama": attention,
}


def states(cache):
    """Copies of all recurrent states of `cache`."""
    return [layer.recurrent_states[0].clone() for layer in cache.layers if hasattr(layer, "recurrent_states")]


def in_parts(model, ids, sizes):
    """Logits of `ids`, given in parts of `sizes` to one cache, and the cache."""
    cache, logits = None, []
    for part in ids.split(sizes, dim=1):
        out = model(part, use_cache=True, **({"cache": cache} if cache is not None else {}))
        cache = out["cache"] if "cache" in out else out["past_key_values"]
        logits.append(out.logits)
    return torch.cat(logits, dim=1), cache


changed = False
for kind, more in own.items():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **small, **more)).eval()
    ids = torch.randint(2, 64, (1, LENGTH))
    want, whole = in_parts(model, ids, [LENGTH])
    off, after = {}, {}
    for name, sizes in (("one by one", [1] * LENGTH), ("in halves", [FIRST, LENGTH - FIRST])):
        logits, cache = in_parts(model, ids, sizes)
        off[name] = (logits - want).abs().max().item()
        after[name] = max([(a - b).abs().max().item() for a, b in zip(states(cache), states(whole))], default=0.0)
    print(f"{kind}: logits off by {off['one by one']:.6f} one by one and {off['in halves']:.6f} in halves (largest "
          f"{want.abs().max():.1f}), states by {after['one by one']:.6f} and {after['in halves']:.6f}", flush=True)
    forgets = kind in ("mamba", "falcon_mamba", "jamba")
    changed |= off["one by one"] > 1e-3 or (off["in halves"] > 1e-2) != forgets
    if "mamba" not in kind:  # `generate` refuses chunks for caches without attention
        ask = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
        plain, chunked = model.generate(ids, **ask), model.generate(ids, prefill_chunk_size=6, **ask)
        same = int((plain == chunked)[0, LENGTH:].sum())
        print(f"  generate with prefill_chunk_size=6: {same} of 24 tokens as without")
        changed |= (same < 24) != forgets
sys.exit(changed)
PY
echo "as described: several tokens beside a cache begin the state of Mamba layers anew"
