#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0 (CPU): LED's decoder, one token at a time, with a static cache and with a padded prefix.
#
# Guess: a static cache is the same cache in tensors of fixed size (`generate` takes `cache_implementation="static"`, and BART, which
#   LED's decoder comes from, gives the same numbers with it), and columns that `decoder_attention_mask` sets to 0 are not looked
#   at, whether tokens come at once or one by one.
# Behaviour: the decoder makes a mask only where more than one token comes at once. A single token looks at all that the cache has:
#   of a static cache at the empty places too, whose zeros take a share of the softmax, from the first new token on; of any cache
#   at the padding of its prefix, although the mask that is given says 0 there. No error, no warning. With a mask made for single
#   tokens as well (one condition of the decoder taken out) both differences are gone.
# Seen, random weights, four texts: with static caches for 12 and 100 new tokens LED's first logits are off by up to 4.4 and 4.2 (the
#   largest is 4.3), and no text keeps its first greedy token; BART keeps all of 10, off by 6e-6. Two paddings of other tokens
#   before one prefix, hidden by the mask: LED's logits of the prefix are the same, those of the next token differ by 1.3; BART's
#   are the same for both.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0
OMP_NUM_THREADS=1 TRANSFORMERS_VERBOSITY=error "$dir/venv/bin/python" -W error::UserWarning - <<'PY'
import sys

import torch
from transformers import BartConfig, BartForConditionalGeneration, LEDConfig, LEDForConditionalGeneration

NEW, ROOM = 10, (12, 100)
shape = {
    "vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "init_std": 0.3, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "forced_eos_token_id": None,
}
led = {"max_encoder_position_embeddings": 128, "max_decoder_position_embeddings": 128, "attention_window": [8, 8]}


def make(kind, config):
    torch.manual_seed(0)
    model = kind(config).eval()
    model.generation_config.eos_token_id = None
    return model


models = {
    "LED": make(LEDForConditionalGeneration, LEDConfig(**shape, **led)),
    "BART": make(BartForConditionalGeneration, BartConfig(**shape, max_position_embeddings=128)),
}
texts = torch.randint(3, 64, (4, 24), generator=torch.Generator().manual_seed(1))
prefix = torch.randint(3, 64, (1, 7), generator=torch.Generator().manual_seed(2))
found = {}


def write(model, new, **given):
    return model.generate(
        texts, max_new_tokens=new, do_sample=False, output_logits=True, return_dict_in_generate=True, **given
    )


@torch.no_grad()
def read(model, pad):
    """Logits of a prefix behind four columns of padding, read at once, and of one more token."""
    ids = torch.cat([torch.full((1, 4), pad), prefix], 1)
    mask = (torch.arange(11) >= 4).long()[None]
    first = model(texts[:1], decoder_input_ids=ids[:, :10], decoder_attention_mask=mask[:, :10], use_cache=True)
    step = model(
        encoder_outputs=(first.encoder_last_hidden_state,), decoder_input_ids=ids[:, 10:], decoder_attention_mask=mask,
        cache=first.cache,
    )
    return first.logits[:, 4:], step.logits


for name, model in models.items():
    off, part = [], []
    for room in ROOM:
        plain = write(model, room)
        static = write(model, room, cache_implementation="static", disable_compile=True)
        # Up to the first token that differs both have read the same.
        same = [next((i for i in range(NEW) if a[i] != b[i]), NEW) for a, b in zip(plain.sequences[:, 1:], static.sequences[:, 1:])]
        off.append(max((a[i] - b[i]).abs().max().item() for i in range(4) for a, b in zip(plain.logits[: same[i] + 1], static.logits)))
        part.append(same)
    (once, step), (other_once, other_step) = read(model, 5), read(model, 6)
    apart = (once - other_once).abs().max().item(), (step - other_step).abs().max().item()
    found[name] = off, part, apart
    print(
        f"{name}: static caches of {ROOM} new tokens: logits off by {[float(f'{x:.2g}') for x in off]} (largest"
        f" {plain.logits[0].abs().max():.1f}), tokens that agree, of {NEW}: {part}; other padding: read at once off by"
        f" {apart[0]:.1g}, the next token by {apart[1]:.2g}"
    )
off, part, apart = found["LED"]
sound, all_agree, even = found["BART"]
right = max(*sound, *even) < 1e-4 and all(n == NEW for row in all_agree for n in row) and apart[0] < 1e-4
sys.exit(not (right and min(off) > 0.05 and any(n < NEW for row in part for n in row) and apart[1] > 0.05))
PY
echo "as described: a single token of LED's decoder sees empty places and padding"
