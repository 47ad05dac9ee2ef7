#!/usr/bin/env bash
# transformers 5.23.0: `generate` of encoder-decoder models, continued from the cache that an earlier call returned.
#
# Guess: as with decoder-only models, `generate(..., past_key_values=cache)` with all tokens so far leaves out those that
#   the cache holds, and the continuation is what one long call writes.
# Behaviour: only decoder-only inputs are cut to what the cache has not read. `decoder_input_ids` goes in whole, behind
#   the cache: every token stands there twice, at positions that go on counting, and the text goes on otherwise, without
#   a warning. Given only the newest token, which no cache holds yet, `generate` puts the start token before it, behind
#   the cache as well.
# Seen: after 9 tokens BART, T5 and M2M-100 read 9 once more (2 where only the newest is given), their caches hold 28 (21)
#   entries for a text of 20 that are read, and BART writes other tokens than in one call, both ways. Llama reads 1.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0
OMP_NUM_THREADS=1 "$dir/venv/bin/python" - <<'PY'
import sys

import torch
import transformers
from transformers import (
    BartConfig, BartForConditionalGeneration, LlamaConfig, LlamaForCausalLM, M2M100Config,
    M2M100ForConditionalGeneration, T5Config, T5ForConditionalGeneration,
)

transformers.logging.set_verbosity_error()
TOKENS = dict(vocab_size=64, pad_token_id=0, eos_token_id=2, decoder_start_token_id=1)
BART = dict(
    d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=128, init_std=0.4, bos_token_id=1, **TOKENS,
)
T5 = dict(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, initializer_factor=4.0, **TOKENS)
MODELS = {
    "bart": lambda: BartForConditionalGeneration(BartConfig(forced_eos_token_id=None, **BART)),
    "t5": lambda: T5ForConditionalGeneration(T5Config(**T5)),
    "m2m": lambda: M2M100ForConditionalGeneration(M2M100Config(**BART)),
}
FIRST, MORE = 8, 12
ASK = dict(do_sample=False, return_dict_in_generate=True)


def reads(embeddings):
    """Tokens of each pass from now on."""
    seen = []
    embeddings.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    return seen


print("transformers", transformers.__version__)
held = True
for name, make in MODELS.items():
    torch.manual_seed(3)
    model = make().eval()
    model.generation_config.eos_token_id = model.generation_config.forced_eos_token_id = None
    ids = torch.randint(3, 64, (1, 20), generator=torch.Generator().manual_seed(1))
    want = model.generate(ids, max_new_tokens=FIRST + MORE, **ASK).sequences[0, -MORE:].tolist()
    seen, equal = reads(model.get_decoder().embed_tokens), []
    for newest in (False, True):
        first = model.generate(ids, max_new_tokens=FIRST, **ASK)
        tokens = first.sequences[:, -1:] if newest else first.sequences
        seen.clear()
        second = model.generate(
            inputs=ids, decoder_input_ids=tokens, past_key_values=first.past_key_values, max_new_tokens=MORE, **ASK
        )
        new, length = second.sequences[0, -MORE:].tolist(), second.past_key_values.get_seq_length()
        equal.append(new == want)
        print(f"  {name:4} {'newest token' if newest else 'all tokens':12}: reads {seen[0]}, cache of {length}: {new}")
        held &= (seen[0], length) == ((2, 21) if newest else (9, 28))
    print(f"  {name:4} one call    : {want}")
    held &= name != "bart" or equal == [False, False]

torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0,
    bos_token_id=1, eos_token_id=None,
)).eval()
first = model.generate(torch.ones(1, 1, dtype=torch.long), max_new_tokens=FIRST, **ASK)
seen = reads(model.get_input_embeddings())
model.generate(first.sequences, past_key_values=first.past_key_values, max_new_tokens=MORE, **ASK)
print(f"  llama all tokens  : reads {seen[0]}")
sys.exit(not (held and seen[0] == 1))
PY
