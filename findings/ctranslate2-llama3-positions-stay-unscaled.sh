#!/usr/bin/env bash
# ctranslate2 4.8.5, with transformers 5.24.0 and torch 2.13.0 (CPU): a Llama 3.1 or 3.2, whose positions are stretched
# (`rope_type: llama3`).
#
# Guess: the converter computes what transformers computes from the same folder, or refuses it. It says which scalings it has:
#   "linear, su, llama3, longrope", and raises for `yarn` and `dynamic`. The engine has the formula of Llama 3.1 since 2024.
# Behaviour: of the five numbers of that scaling the converter writes the base, `low_freq_factor` and `high_freq_factor`. The
#   factor is written for `linear` alone, and `original_max_position_embeddings` for Phi-3 alone; the engine takes 1 and 0 for
#   them. Every wavelength is then divided by 1: the model says what the same weights say without any scaling. Short texts hardly
#   show it, as the slow wavelengths alone are stretched, and there is no error and no warning. `linear` is right. With the two
#   numbers put into the converter's result by hand the engine agrees with transformers.
# Seen, a Llama with random weights and the fields of Llama 3.2 (base 500000, factor 32, 8192 original positions), 200 tokens,
#   heads of 64: converted logits are off by 9.6 (the largest is 23.5), and by 0.0003 from those of the model without scaling; of
#   30 greedy tokens the first 3 are the same. With both numbers by hand: 0.0003 and 30. `linear`: 0.0004.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 ctranslate2==4.8.5
OMP_NUM_THREADS=1 TRANSFORMERS_VERBOSITY=error "$dir/venv/bin/python" -W error::UserWarning - "$dir" <<'PY'
import sys

import ctranslate2
import numpy as np
import torch
from ctranslate2.converters import transformers as converters
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

FOLDER, VOCAB = sys.argv[1], 64
PLAIN = {"rope_type": "default", "rope_theta": 500000.0}
LINEAR = {"rope_type": "linear", "rope_theta": 500000.0, "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
NAMES = ["<pad>", "<s>", "</s>", "<unk>"] + [f"w{i}" for i in range(4, VOCAB)]


def make(rope):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=256, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3, max_position_embeddings=512, rope_parameters=rope, pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


def convert(model, name):
    model.save_pretrained(f"{FOLDER}/{name}")
    words = Tokenizer(models.WordLevel({text: i for i, text in enumerate(NAMES)}, unk_token="<unk>"))
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(f"{FOLDER}/{name}")
    converters.TransformersConverter(f"{FOLDER}/{name}").convert(f"{FOLDER}/{name}-ct2")
    return ctranslate2.Generator(f"{FOLDER}/{name}-ct2", compute_type="float32", intra_threads=1)


ids = torch.randint(4, VOCAB, (1, 200), generator=torch.Generator().manual_seed(1))
ids[0, 0] = 1


def off(generator, model):
    tokens = [[NAMES[i] for i in ids[0].tolist()]]
    got = torch.tensor(np.array(generator.forward_batch(tokens, return_log_probs=False)))[0, :, :VOCAB]
    with torch.no_grad():
        return (got - model(ids).logits[0]).abs().max().item()


def same(generator, model):
    """How many of 30 greedy tokens agree, from the first one on."""
    asked = dict(max_length=30, min_length=30, sampling_topk=1, include_prompt_in_result=False)
    got = generator.generate_batch([[NAMES[i] for i in ids[0].tolist()]], **asked)[0].sequences_ids[0]
    want = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, min_new_tokens=30, do_sample=False)
    return int((torch.tensor(got) == want[0, ids.shape[1] :]).long().cumprod(0).sum())


model, plain, linear = make(LLAMA3), make(PLAIN), make(LINEAR)
with torch.no_grad():
    print(f"largest logit: {model(ids).logits.abs().max():.1f}")
converted = convert(model, "llama3")
found = [off(converted, model), off(converted, plain), same(converted, model)]
print("llama3, converted: off by {:.2g}; from the model without scaling by {:.2g}; first greedy tokens alike: {}".format(*found))
control = off(convert(linear, "linear"), linear)
print(f"linear, converted: off by {control:.2g}")

loader = converters._MODEL_LOADERS["LlamaConfig"]
original = type(loader).get_model_spec


def with_both(self, model):
    spec = original(self, model)
    for layer in spec.decoder.layer:
        fields = vars(layer.self_attention)  # set as attributes they are refused: this kind of scaling has no such fields
        fields["rotary_scaling_factor"] = np.float32(LLAMA3["factor"])
        fields["original_max_position_embeddings"] = np.int32(LLAMA3["original_max_position_embeddings"])
    return spec


type(loader).get_model_spec = with_both
mended = convert(model, "mended")
right = [off(mended, model), same(mended, model)]
print("llama3 with factor and original length put in by hand: off by {:.2g}; first greedy tokens alike: {}".format(*right))
sys.exit(not (found[0] > 1 and found[1] < 0.01 and found[2] < 30 and control < 0.01 and right[0] < 0.01 and right[1] == 30))
PY
echo "as described: the converted model reads its positions unscaled"
