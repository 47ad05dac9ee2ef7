#!/usr/bin/env bash
# lighteval 0.13.0 with transformers 5.24.0, torch 2.13.0 (CPU): `max_new_tokens` among the generation parameters of a model
# (`GenerationParameters(max_new_tokens=...)`, on the command line `generation_parameters={max_new_tokens:...}`).
#
# Guess: "maximum number of new tokens to generate", as the class says: answers are at most so long, or as long as the task asks for
#   if that is less, and prompts stay as they are.
# Behaviour: with the transformers backend the number becomes the length that prompts are cut to, from the left, so that examples,
#   instructions and the beginning of the question leave; the answer is as long as the task says, whatever the number is. A value
#   that is larger than all prompts hides it, for then nothing happens at all. There is no warning: the one about truncation compares
#   what is left with the context of the model. `truncated_tokens_count` says nothing either: it is characters less tokens, and far
#   from 0 where nothing was cut.
# Seen, a Llama with random weights, a prompt of 40 tokens, a task of 12 new tokens, greedy: with 8 the model is given the last 8 tokens
#   of the prompt and writes the 12 tokens that follow those; with 16 the last 16. With 64, and with no number at all, all 40, and the
#   answer of `generate`, 12 tokens; 115 are said to be truncated.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 lighteval==0.13.0
OMP_NUM_THREADS=1 TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1 \
    "$dir/venv/bin/python" - "$dir" 2> "$dir/log" <<'PY' || { cat "$dir/log"; exit 1; }
import sys

import torch
from lighteval.models.model_input import GenerationParameters
from lighteval.models.transformers.transformers_model import TransformersModel, TransformersModelConfig
from lighteval.tasks.requests import Doc
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

FOLDER, VOCAB, ASKED = sys.argv[1], 64, 12
words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCAB)}
tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(f"{FOLDER}/model")
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=256, initializer_range=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)
plain = LlamaForCausalLM(config).eval()
plain.save_pretrained(f"{FOLDER}/model")
PROMPT = torch.randint(3, VOCAB, (40,), generator=torch.Generator().manual_seed(1)).tolist()


def generated(ids):
    return plain.generate(torch.tensor([ids]), max_new_tokens=ASKED, do_sample=False)[0, len(ids):].tolist()


def answered(limit):
    given = {} if limit is None else {"max_new_tokens": limit}
    model = TransformersModel(
        TransformersModelConfig(
            model_name=f"{FOLDER}/model", batch_size=1, device="cpu", cache_dir=f"{FOLDER}/cache-{limit}",
            generation_parameters=GenerationParameters(temperature=0, **given),
        )
    )
    text = " ".join(f"w{i}" for i in PROMPT)
    doc = Doc(query=text, choices=[""], gold_index=0, task_name="a|0", generation_size=ASKED, stop_sequences=[], id="0")
    return model.greedy_until([doc])[0]


for limit in (8, 16, 64, None):
    found = answered(limit)
    prompt, answer = ([int(t) for t in ids] for ids in (found.input_tokens, found.output_tokens[0]))
    left = 40 if limit is None else min(limit, 40)
    print(
        f"max_new_tokens {limit}: the model read {len(prompt)} tokens and wrote {len(answer)}; as after the last {left} tokens: "
        f"{answer == generated(PROMPT[-left:])}; as after the prompt: {answer == generated(PROMPT)}; said to be truncated: "
        f"{found.truncated_tokens_count}"
    )
    assert prompt == PROMPT[-left:] and answer == generated(PROMPT[-left:]) and len(answer) == ASKED
    assert (answer == generated(PROMPT)) == (left == 40) and found.truncated_tokens_count > 100
PY
