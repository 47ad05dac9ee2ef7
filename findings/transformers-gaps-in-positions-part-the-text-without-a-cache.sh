#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0 (CPU): `position_ids` with gaps, as skipped positions (PoSE), compressed prompts and tokens that
# keep their places when others were left out have them.
#
# Guess: positions say where tokens stand: with rotary embeddings two tokens on both sides of a gap are further apart, and attention
#   is causal as ever. `use_cache=False`, or a mask of ones, changes memory and nothing else.
# Behaviour: without a cache and without a mask every step of positions that is not +1 is taken for the start of another sequence
#   (packed training texts), also where positions go on rising: no token sees one from before a gap. With a cache, as by default,
#   or with a mask of ones, all are seen. So a loss with `use_cache=False`, or under gradient checkpointing, which takes the cache
#   away, is that of texts cut in pieces. Nothing says so.
# Seen, positions 0 1 2 10 11 12 20 21: with a cache, and with a mask of ones, logits are those of a causal mask in four dimensions;
#   with neither they are off by 4.0 to 11.7 from the first gap on, and equal those of the three pieces alone. In training they are
#   right, and off by as much with gradient checkpointing.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0
OMP_NUM_THREADS=1 "$dir/venv/bin/python" -W error::UserWarning - <<'PY'
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64,
    initializer_range=0.3,
)
model = LlamaForCausalLM(config).eval()
ids = torch.randint(3, 64, (1, 8), generator=torch.Generator().manual_seed(1))
places = torch.tensor([[0, 1, 2, 10, 11, 12, 20, 21]])
pieces = (slice(0, 3), slice(3, 6), slice(6, 8))


def logits(columns=slice(None), **options):
    return model(input_ids=ids[:, columns], position_ids=places[:, columns], **options).logits.detach()


causal = torch.ones(1, 1, 8, 8).tril().log()
want = logits(attention_mask=causal, use_cache=False)
found = {
    "cache": logits(),
    "no cache, mask of ones": logits(attention_mask=torch.ones_like(ids), use_cache=False),
    "no cache": logits(use_cache=False),
    "pieces alone": torch.cat([logits(piece) for piece in pieces], dim=1),
}
model.train()
found["training"] = logits()
model.activation_checkpointing_enable()
found["training, checkpointing"] = logits()
off = {name: [round(x, 1) for x in (one - want).abs().amax(-1)[0].tolist()] for name, one in found.items()}
for name, by_token in off.items():
    print(f"{name}: off by, token by token, {by_token}")
whole = all(max(off[name]) == 0 for name in ("cache", "no cache, mask of ones", "training"))
cut = all(max(off[name][:3]) == 0 and min(off[name][3:]) > 1 for name in ("no cache", "training, checkpointing"))
alone = torch.allclose(found["no cache"], found["pieces alone"], atol=1e-4)
sys.exit(not (whole and cut and alone))
PY
echo "as described: without a cache a gap in the positions parts the text"
