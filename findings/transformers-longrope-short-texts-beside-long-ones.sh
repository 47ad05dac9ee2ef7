#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0 (CPU): Phi-3 with `rope_type: longrope` (as Phi-3.5-mini and Phi-4-mini), short and long prompts
# in one batch.
#
# Guess: `short_factor` is for texts up to `original_max_position_embeddings` and `long_factor` for longer ones. In a batch each
#   sequence goes by its own length, which mask and position ids tell: a short prompt is answered as it is alone.
# Behaviour: one comparison is made for the whole batch, with the largest position in it. A single long prompt, or answer, turns all
#   others to the long factors. Answers to short prompts then depend on who else is in the batch, with padding on either side and
#   with the right mask. No error, no warning.
# Seen, 64 original positions, a prompt of 20 tokens, 16 greedy tokens: beside one of 30 as alone; beside one of 100 others, and
#   these are the ones that a model has whose short factors are its long ones. Logits of the prompt are off by 8.3 (the largest is
#   9.1). The prompt of 100 tokens has the same answer in both.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0
OMP_NUM_THREADS=1 "$dir/venv/bin/python" -W error::UserWarning - <<'PY'
import sys

import torch
from transformers import Phi3Config, Phi3ForCausalLM

LONG = [1.0 + i / 2 for i in range(16)]


def make(short_factor):
    torch.manual_seed(0)
    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0, "short_factor": short_factor, "long_factor": LONG,
        "original_max_position_embeddings": 64,
    }
    config = Phi3Config(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        max_position_embeddings=256, original_max_position_embeddings=64, initializer_range=0.3, rope_parameters=rope,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )
    return Phi3ForCausalLM(config).eval()


def tokens(length, seed):
    return torch.randint(3, 64, (1, length), generator=torch.Generator().manual_seed(seed))


def batch(texts, left):
    """Ids and mask, padded."""
    width = max(text.shape[1] for text in texts)
    gaps = [width - text.shape[1] for text in texts]
    sides = [(gap, 0) if left else (0, gap) for gap in gaps]
    pad = torch.nn.functional.pad
    return (
        torch.cat([pad(text, side) for text, side in zip(texts, sides)]),
        torch.cat([pad(torch.ones_like(text), side) for text, side in zip(texts, sides)]),
    )


def answers(model, *texts):
    ids, mask = batch(texts, left=True)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=16, min_new_tokens=16, do_sample=False)
    return [row[ids.shape[1] :].tolist() for row in out]


def logits(model, *texts):
    ids, mask = batch(texts, left=False)
    return model(ids, attention_mask=mask).logits[0, : texts[0].shape[1]]


model, all_long = make([1.0] * 16), make(LONG)
short, middle, long = tokens(20, 0), tokens(30, 1), tokens(100, 2)
with torch.no_grad():
    (alone,), (wrong,), (far,) = answers(model, short), answers(all_long, short), answers(model, long)
    beside_middle, beside_long = answers(model, short, middle), answers(model, short, long)
    want = logits(model, short)
    calm = (logits(model, short, middle) - want).abs().max().item()
    off = (logits(model, short, long) - want).abs().max().item()
same = [a == b for a, b in ((beside_middle[0], alone), (beside_long[0], alone), (beside_long[0], wrong), (beside_long[1], far))]
print(f"the short prompt is answered as alone: beside 30 tokens {same[0]}, beside 100 tokens {same[1]}")
print(f"beside 100 tokens as by long factors alone: {same[2]}; the long prompt as alone: {same[3]}")
print(f"logits of the short prompt off: beside 30 {calm:.2g}, beside 100 {off:.2g}, largest {want.abs().max():.2f}")
sys.exit(not (same == [True, False, True, True] and calm < 1e-3 and off > 1))
PY
echo "as described: one long text turns short ones in its batch to the long factors"
