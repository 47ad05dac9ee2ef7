#!/usr/bin/env bash
# lm-eval 0.4.13 with transformers 5.24.0, torch 2.13.0 (CPU): log-likelihoods of a model in bfloat16, which is what
# `dtype="auto"`, the default, makes of most checkpoints.
#
# Guess: the model computes in 16 bits, and its logits have their rounding; what is counted of them (log-softmax, the sum over the
#   tokens) is counted in float32, as torch's own sums of 16-bit numbers are inside. So the log-likelihood of a text follows small
#   changes of the model, and two answers of different log-likelihood do not tie.
# Behaviour: log-softmax runs in bfloat16 and the sum is rounded to bfloat16, which has 8 bits: a value near -90 comes in steps of
#   0.5, one near -1600 in steps of 8, one near -6000 in steps of 32. Choices of several tokens (HellaSwag, PIQA, ARC) tie, and a
#   tie goes to the one that is listed first; a perplexity per document stays put, or jumps, where two checkpoints differ by less
#   than a step. No warning. `softmax_dtype=float32` takes both steps in float32; its description speaks of numerical stability of
#   the softmax.
# Seen, a Llama of random weights in bfloat16, 100 questions, each with four answers of 20 words that differ in 3: two or more tie
#   for the best in 15 of them, with `softmax_dtype=float32` in none, and 7 get another answer. The first one's: -89.5 -91.0 -92.0
#   -90.0, where float32 has -89.42 -90.92 -92.24 -90.01. Values rounded in every layer move the log-likelihood of 8 texts of 400
#   words by 1.37 -0.15 -2.21 -1.36 -1.50 1.88 2.28 0.19; as it is by default: 0 0 -8 0 0 0 0 0.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 lm-eval==0.4.13 accelerate==1.15.0
OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 "$dir/venv/bin/python" -W error::UserWarning - <<'PY'
import copy
import random
import sys

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

NAMES = ["<pad>", "<s>", "</s>", "<unk>"] + [f"w{i}" for i in range(4, 64)]
words = Tokenizer(models.WordLevel({text: i for i, text in enumerate(NAMES)}, unk_token="<unk>"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **special)
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    initializer_range=0.1, pad_token_id=0, bos_token_id=1, eos_token_id=2, max_position_embeddings=1024,
)
model = LlamaForCausalLM(config).eval().bfloat16()
changed = copy.deepcopy(model)  # a little of the values of every layer is lost
with torch.no_grad():
    for layer in changed.model.layers:
        weight = layer.self_attn.v_proj.weight
        weight.copy_((weight / 0.02).round() * 0.02)
rng = random.Random(0)


def text(length):
    return " ".join(rng.choice(NAMES[4:]) for _ in range(length))


def question():
    """A beginning, and four continuations that differ in 3 of their 20 words."""
    begin, middle, end = text(10), text(8), text(9)
    return begin, [f" {middle} {text(3)} {end}" for _ in range(4)]


QUESTIONS = [question() for _ in range(100)]
TEXTS = [text(400) for _ in range(8)]


def lm(model, **options):
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8, **options)


def instances(kind, arguments):
    return [Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]


def choices(model, **options):
    pairs = [(question, choice) for question, answers in QUESTIONS for choice in answers]
    found = lm(model, **options).loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)
    return torch.tensor([value for value, _ in found]).view(-1, 4)


def texts(model, **options):
    return lm(model, **options).loglikelihood_rolling(instances("loglikelihood_rolling", [(t,) for t in TEXTS]), disable_tqdm=True)


rough, fine = choices(model), choices(model, softmax_dtype="float32")
ties = (rough == rough.max(-1, keepdim=True).values).sum(-1) > 1
moved = rough.argmax(-1) != fine.argmax(-1)
print(f"choices of 20 tokens, 100 questions: tie for the best {ties.sum()}, with softmax_dtype=float32", end=" ")
print(f"{((fine == fine.max(-1, keepdim=True).values).sum(-1) > 1).sum()}; other answer than with it: {moved.sum()}")
print("first question:", rough[0].tolist(), "with softmax_dtype=float32:", [round(x, 2) for x in fine[0].tolist()])
plain, precise = (
    [round(b - a, 2) for a, b in zip(texts(model, **options), texts(changed, **options))]
    for options in ({}, {"softmax_dtype": "float32"})
)
print("texts of 400 tokens, log-likelihood of the changed model less that of the first:", *plain)
print("with softmax_dtype=float32:", *precise)
stepped = all(x % 8 == 0 for x in plain)
sys.exit(not (ties.sum() >= 5 and moved.sum() >= 2 and stepped and any(x % 8 for x in precise)))
PY
echo "as described: sums are rounded to 8 bits"
