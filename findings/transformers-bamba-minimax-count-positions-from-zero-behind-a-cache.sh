#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0 (CPU): one more token for a model with a cache, without `position_ids`.
#
# Guess: where no positions are given they go on behind the cache, as in Llama and as `use_cache` is described: the logits of the
#   next token are those of the whole text in one pass.
# Behaviour: Bamba counts from 0 in each call, whatever the cache holds. MiniMax asks the cache for its length, which is that of the
#   first layer, and a layer of linear attention says 0. The next token then stands at position 0, beside keys that are rotated
#   to the places before it. No error, no warning; `generate` names positions itself and is right, so that loops of one's own
#   (scores token by token, servers, speculative steps) are wrong alone. With position_ids by hand all is well, and so is
#   MiniMax whose first layer has full attention.
# Seen, 20 tokens cached, relative distance of the next logits from one pass: Llama 1e-6; Bamba 0.32 and MiniMax 0.76, both
#   exactly what position 0 given by hand gives; with position 20 given by hand 1e-6.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0
OMP_NUM_THREADS=1 "$dir/venv/bin/python" -W ignore - <<'PY'
import sys

import torch
from transformers import (
    BambaConfig, BambaForCausalLM, LlamaConfig, LlamaForCausalLM, MiniMaxConfig, MiniMaxForCausalLM,
)

shape = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 256, "initializer_range": 0.2,
}
minimax = {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 16, "block_size": 16}
configs = {
    "Llama": (LlamaForCausalLM, LlamaConfig(**shape)),
    "Bamba": (BambaForCausalLM, BambaConfig(
        **shape, attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head=16, mamba_n_groups=1, mamba_d_state=16, mamba_chunk_size=8,
    )),
    "MiniMax": (MiniMaxForCausalLM, MiniMaxConfig(**shape, **minimax, layer_types=["linear_attention", "full_attention"])),
    "MiniMax, full first": (MiniMaxForCausalLM, MiniMaxConfig(**shape, **minimax, layer_types=["full_attention"] * 2)),
}
ids = torch.randint(1, 64, (1, 21), generator=torch.Generator().manual_seed(0))
fits = True
for name, (kind, config) in configs.items():
    torch.manual_seed(0)
    model = kind(config).eval()

    @torch.no_grad()
    def after(**positions):
        cached = model(ids[:, :20], use_cache=True).past_key_values
        return model(ids[:, 20:], past_key_values=cached, use_cache=True, **positions).logits[:, -1]

    with torch.no_grad():
        whole = model(ids, use_cache=False).logits[:, -1]
    plain, zero, right = after(), after(position_ids=torch.tensor([[0]])), after(position_ids=torch.tensor([[20]]))
    off = {at: float((x - whole).norm() / whole.norm()) for at, x in (("none", plain), ("0", zero), ("20", right))}
    print(f"{name}: positions given -> distance from one pass: {off}")
    restarts = name in ("Bamba", "MiniMax")
    fits &= off["20"] < 1e-4 and torch.equal(plain, zero) == restarts and (off["none"] > 0.1) == restarts
sys.exit(not fits)
PY
echo "as described: Bamba and MiniMax place the next token at position 0 unless positions are given"
