#!/usr/bin/env bash
# ctranslate2 4.8.5, with transformers 5.24.0 and torch 2.13.0 (CPU): a Mistral with a sliding window, prompts longer than the
# window.
#
# Guess: the converter takes `sliding_window` over, the engine keeps the newest keys and values of that number, and each token sees
#   itself and the window before it, in the prompt as in the answer. Reading a prompt in pieces saves memory and changes nothing.
# Behaviour: a prompt longer than the window is read in pieces as long as the window. A token sees its piece up to itself and all
#   of the piece before: the first of a piece one window and itself, the last nearly two. What it sees depends on where the pieces
#   happen to begin. Tokens of the answer see one window, as they should, beside keys and values that were made otherwise; so one
#   text has two answers, as prompt or as prompt and answer. No error, no warning. Gemma 3, whose layers have windows of their own,
#   is right.
# Seen, random weights, window 8, 12 greedy tokens: after prompts of 4 and 8 tokens all are as in transformers; after 11, 16, 20,
#   25, 30, 47 and 80 the first 2 0 0 0 0 0 1. Transformers' model with a mask of such pieces in the place of its windows: 12 each
#   time.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 ctranslate2==4.8.5
OMP_NUM_THREADS=1 TRANSFORMERS_VERBOSITY=error "$dir/venv/bin/python" -W error::UserWarning - "$dir" <<'PY'
import sys

import ctranslate2
import torch
from ctranslate2.converters import TransformersConverter
from tokenizers import Tokenizer, models
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

FOLDER, VOCAB, WINDOW, NEW = sys.argv[1], 64, 8, 12
NAMES = ["<pad>", "<s>", "</s>", "<unk>"] + [f"w{i}" for i in range(4, VOCAB)]


def make(window):
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3, max_position_embeddings=256, sliding_window=window, pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
    )
    return MistralForCausalLM(config).eval()


model, unmasked = make(WINDOW), make(None)
model.save_pretrained(FOLDER + "/model")
words = Tokenizer(models.WordLevel({text: i for i, text in enumerate(NAMES)}, unk_token="<unk>"))
special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(FOLDER + "/model")
TransformersConverter(FOLDER + "/model").convert(FOLDER + "/converted")
generator = ctranslate2.Generator(FOLDER + "/converted", compute_type="float32", intra_threads=1)
ids = torch.randint(4, VOCAB, (101,), generator=torch.Generator().manual_seed(1))
ids[0] = 1


def converted(length):
    asked = dict(max_length=NEW, min_length=NEW, sampling_topk=1, include_prompt_in_result=False)
    return generator.generate_batch([[NAMES[i] for i in ids[:length].tolist()]], **asked)[0].sequences_ids[0]


def windows(length):
    prompt = ids[None, :length]
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False
    )
    return out[0, length:].tolist()


def pieces(length):
    """Greedy, all but the last token of the prompt in pieces: a token sees its piece up to itself, and the piece before."""
    text = ids[:length].tolist()
    for _ in range(NEW):
        query, key = torch.arange(len(text))[:, None], torch.arange(len(text))
        first = torch.where(query < length - 1, (query // WINDOW - 1) * WINDOW, query - WINDOW + 1)
        mask = torch.zeros(len(text), len(text)).masked_fill((key > query) | (key < first), torch.finfo(torch.float32).min)
        with torch.no_grad():
            scores = unmasked(torch.tensor([text]), attention_mask=mask[None, None]).logits[0, -1]
        scores[2] = -torch.inf  # the end of the text, which the others leave out as well
        text.append(int(scores.argmax()))
    return text[length:]


def alike(one, other):
    return int((torch.tensor(one) == torch.tensor(other)).long().cumprod(0).sum())


LENGTHS = (4, 8, 11, 16, 20, 25, 30, 47, 80)
found = {length: converted(length) for length in LENGTHS}
right = [alike(found[length], windows(length)) for length in LENGTHS]
guessed = [alike(found[length], pieces(length)) for length in LENGTHS]
print("tokens of the prompt:", *LENGTHS)
print("of 12 greedy tokens alike from the first on, with windows of 8:", *right)
print("with pieces of 8:", *guessed)
sys.exit(not (right[:2] == [NEW] * 2 and max(right[3:]) < NEW and guessed[3:] == [NEW] * 6))
PY
echo "as described: tokens of the prompt see more than a window"
