#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0 (CPU): `generate_batch` (continuous batching) with `min_new_tokens` or `min_length`.
#
# Guess: options of a GenerationConfig mean what they mean for `generate`, and what continuous batching cannot do is
#   named in a warning, as it is for `repetition_penalty` ("isn't supported by CB. Dropping it.").
# Behaviour: no answer waits for its minimum. The end-of-sequence token is not suppressed, requests stop at the first one, and
#   no warning names it. `min_length` is left out in the same way.
# Seen: with min_new_tokens=8 of 12 tokens `generate` answers with 12 and 12, `generate_batch` with 4 and 1; no warning on either.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 psutil==7.1.3
"$dir/venv/bin/python" -W ignore - <<'PY'
import logging

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig

said = []


class Listener(logging.Handler):
    def emit(self, record):
        said.append(record.getMessage())


logging.getLogger("ContinuousBatchingLogger").addHandler(Listener())
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=256,
)
model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
prompts = [[5, 6, 7, 8], [9, 10, 11]]


def alone(**options):
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        found = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=12, pad_token_id=0, **options)
        answers.append(found[0, len(prompt) :].tolist())
    return answers


def together(**options):
    config = GenerationConfig(do_sample=False, max_new_tokens=12, pad_token_id=0, **options)
    found = model.generate_batch(inputs=prompts, generation_config=config, progress_bar=False)
    order = sorted(found, key=lambda name: int(name.split("_")[-1]))
    return [found[name].generated_tokens for name in order]


free = alone()
ends = [free[0][3], free[1][0]]
assert together(eos_token_id=ends) == alone(eos_token_id=ends)  # all ends are known
for option in ("min_new_tokens", "min_length"):
    least = {option: 8 + (0 if option == "min_new_tokens" else max(map(len, prompts)))}
    said.clear()
    want, got = alone(eos_token_id=ends, **least), together(eos_token_id=ends, **least)
    print(option, "generate:", [len(a) for a in want], "generate_batch:", [len(a) for a in got], "said:", said)
    assert [len(a) for a in want] == [12, 12]
    assert [len(a) for a in got] == [4, 1]
    assert not any("min" in message.lower() or "Processor" in message for message in said)
PY
