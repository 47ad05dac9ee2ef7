#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0 (CPU): the limits of the time step of Mamba-2 layers (`time_step_limit`, `time_step_min`).
#
# Guess: a limit of the step is part of the model: a token's step is held within it, whether the token comes with the prompt or is
#   decoded after it. Decoding token by token then gives the logits of one pass, as it does for attention.
# Behaviour: the scan of several tokens holds the step within the limits; the update by a single token does not know them. Every
#   decoded token is computed with a step of any size, and its state is kept for those after it. Mamba-2, Falcon-H1 and Granite
#   (hybrid) do so where their config has a limit, which is a field of the published configs (wide open by default). Zamba2 and
#   Nemotron-H make one on their own: a least step of `time_step_min`, 0.001, which by its description is for the initial weights
#   alone, so that they differ with all defaults. No error, no warning, and `generate` is as wrong as loops of one's own.
# Seen, 24 tokens one by one, largest difference of logits from one pass (largest logit about 6): Mamba-2 6.3, Falcon-H1 8.8,
#   Granite 7.2 with a limit of (0.5, 0.8), and 1e-5 to 2e-4 without; with defaults Zamba2 0.12 and Nemotron-H 0.0097, the latter
#   5e-6 with `time_step_min` 1e-9. In two halves of 12 tokens all of them are right.
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
LIMIT = {"time_step_limit": (0.5, 0.8)}
small = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
    "initializer_range": 0.3,
}
attention = {"intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
own = {
    "mamba2": {"num_heads": 4, "head_dim": 16, "state_size": 16, "n_groups": 1},
    "falcon_h1": attention
    | {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_ssm": 64, "mamba_d_state": 16, "mamba_n_groups": 1},
    "granitemoehybrid": attention
    | {
        "layer_types": ["mamba", "attention"] * 2, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16,
        "mamba_n_groups": 1, "shared_intermediate_size": 64, "num_local_experts": 0,
    },
    "zamba2": attention
    | {
        "mamba_d_state": 16, "n_mamba_heads": 4, "mamba_ngroups": 1, "layers_block_type": ["mamba", "hybrid"] * 2,
        "num_mem_blocks": 1,
    },
    "nemotron_h": attention
    | {
        "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 1, "chunk_size": 8,
        "layers_block_type": ["mamba", "attention", "mamba", "mlp"],
    },
}


def distance(kind, size, **settings):
    """Largest difference of the logits of 24 tokens given in parts of `size` from those of one pass."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(small | own[kind] | settings))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    ids = torch.randint(3, 64, (1, 24), generator=torch.Generator().manual_seed(1))
    name = "cache_params" if kind == "mamba2" else "past_key_values"
    cache, logits = None, []
    for part in ids.split(size, dim=1):
        out = model(part, use_cache=True, **({name: cache} if cache is not None else {}))
        cache = out[name]
        logits.append(out.logits)
    return float((torch.cat(logits, dim=1) - model(ids).logits).abs().max())


as_said = True
for kind in ("mamba2", "falcon_h1", "granitemoehybrid"):
    limited, free, halves = distance(kind, 1, **LIMIT), distance(kind, 1), distance(kind, 12, **LIMIT)
    print(f"{kind}: limit and one by one {limited:.2g}, no limit {free:.2g}, limit and halves {halves:.2g}")
    as_said &= limited > 0.1 and free < 1e-3 and halves < 1e-3
for kind in ("zamba2", "nemotron_h"):
    one, halves = distance(kind, 1), distance(kind, 12)
    print(f"{kind}: defaults and one by one {one:.2g}, halves {halves:.2g}")
    as_said &= one > 1e-3 and halves < 1e-4
small_minimum = distance("nemotron_h", 1, time_step_min=1e-9)
print(f"nemotron_h: time_step_min of 1e-9, one by one {small_minimum:.2g}")
as_said &= small_minimum < 1e-4
sys.exit(0 if as_said else "the behaviour has changed")
PY
