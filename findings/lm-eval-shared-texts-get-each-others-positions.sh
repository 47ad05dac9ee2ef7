#!/usr/bin/env bash
# lm-eval 0.4.13 with transformers 5.24.0, torch 2.13.0 (CPU): log-likelihoods of requests that are one text, parted at different
# places.
#
# Guess: `loglikelihood` gives of each pair (context, continuation) what the model says of it. `logits_cache` (on by default)
#   computes requests that agree in all tokens but the last one together, and changes speed alone: a pair has one value, alone or
#   among others.
# Behaviour: such requests share one pass, and the logits of the longest continuation among them. For the others the
#   log-probabilities are taken from the first places of that stretch in the place of the last ones: their tokens are scored where
#   other tokens stand. The second number of the answer, whether the continuation is the greedy one, looks at the last places and
#   stays right. So a continuation is called greedy and has the log-likelihood of an unlikely one. No error, no warning. It meets
#   Winogrande, where two questions can be one text with the gap in different places, and whoever scores one text from several
#   places on. `logits_cache=False` is right. (Until 2025 the same case ended in an error; its repair reached the greedy flag alone.)
# Seen, a Llama of random weights, one text of 12 words of which it chose the last 8 itself, and the last 8, 5, 3 and 1 of them
#   scored. Alone, and with logits_cache=False: -8.91 -5.52 -3.05 -0.95; in one call: -8.91 -26.70 -16.42 -8.70. All are called
#   greedy.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 lm-eval==0.4.13 accelerate==1.15.0
OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 "$dir/venv/bin/python" -W error::UserWarning - <<'PY'
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
    initializer_range=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)
model = LlamaForCausalLM(config).eval()
prompt = torch.tensor([[5, 23, 42, 11]])
ids = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, min_new_tokens=8, do_sample=False)[0]
with torch.no_grad():
    log_probs = model(ids[None]).logits[0].log_softmax(-1)
LENGTHS = (8, 5, 3, 1)
want = [sum(log_probs[i - 1, ids[i]].item() for i in range(12 - n, 12)) for n in LENGTHS]
text = [NAMES[i] for i in ids.tolist()]
pairs = [(" ".join(text[:-n]), " " + " ".join(text[-n:])) for n in LENGTHS]


def score(pairs, **options):
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, **options)
    asked = [Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=i) for i, pair in enumerate(pairs)]
    return lm.loglikelihood(asked, disable_tqdm=True)


alone, together, plain = [score([pair])[0] for pair in pairs], score(pairs), score(pairs, logits_cache=False)
for name, found in (("alone", alone), ("in one call", together), ("in one call, logits_cache=False", plain)):
    print(f"{name}:", *(f"{value:.2f}" for value, _ in found), "; greedy:", *(greedy for _, greedy in found))
print("by hand:", *(f"{value:.2f}" for value in want))


def off(found):
    return max(abs(value - right) for (value, _), right in zip(found, want))


sys.exit(not (off(alone) < 1e-3 and off(plain) < 1e-3 and off(together) > 1 and all(greedy for _, greedy in together)))
PY
echo "as described: what a pair is said to have depends on the pairs beside it"
