#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0 (CPU): `generate(stop_strings=...)`, of which the documentation says that they end generation
#   "if the model outputs them".
#
# Guess: the text that the model writes is compared with the stop strings, so that an answer ends where one of them is in it.
# Behaviour: the prompt and the answer are compared as one text. An answer ends as soon as its beginning and the end of the prompt
#   make up a stop string together, although it does not hold that string: a prompt that ends with a line break, an answer that
#   begins with one and the stop string "\n\n" leave an answer of one line break. No warning.
# Seen, random weights, letters as tokens: four prompts of a line each, each with a stop string of the prompt's last letter and the
#   answer's first. All four answers end after one of 12 letters, and none of those holds the stop string, nor does the answer that
#   is written without it. A stop string of another letter and the answer's first stops nothing.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0
OMP_NUM_THREADS=1 TRANSFORMERS_VERBOSITY=error "$dir/venv/bin/python" -W error::UserWarning - <<'PY'
import sys

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LETTERS = "\n .:ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
NEW = 12
PROMPTS = ("Name the capital:\n", "Count:\n", "A list of words:\n", "Say it:\n")
ids = {letter: i for i, letter in enumerate(LETTERS)}
raw = Tokenizer(models.WordLevel(ids, unk_token=" "))
raw.pre_tokenizer, raw.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw)
torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=len(LETTERS), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, initializer_range=0.5,
    )
).eval()
model.generation_config.eos_token_id = None


def answer(prompt, **given):
    tokens = torch.tensor([[ids[letter] for letter in prompt]])
    out = model.generate(tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=NEW, **given)
    return tokenizer.decode(out[0, len(prompt) :])


early = inside = other = 0
for prompt in PROMPTS:
    free = answer(prompt)
    stop = prompt[-1] + free[0]
    stopped = answer(prompt, stop_strings=[stop], tokenizer=tokenizer)
    foreign = answer(prompt, stop_strings=["#" + free[0]], tokenizer=tokenizer)  # in neither the prompt nor the answer
    print(f"{prompt!r}: {free!r}; with the stop string {stop!r}: {stopped!r}; with {'#' + free[0]!r}: {foreign!r}")
    early += len(stopped) == 1
    inside += stop in free or stop in stopped
    other += foreign == free
sys.exit(not (early == other == len(PROMPTS) and inside == 0))
PY
echo "as described: an answer ends with a stop string that begins in the prompt"
