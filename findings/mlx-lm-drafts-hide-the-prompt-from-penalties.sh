#!/usr/bin/env bash
# mlx-lm 0.32.2, mlx 0.32.4 (CPU): a repetition penalty with a draft model (`--draft-model`).
#
# Guess: drafts change the speed and not the answer. The penalty is on the last `repetition_context_size` tokens (20 unless said
#   otherwise) of prompt and answer, with drafts as without: a logits processor is given all tokens so far.
# Behaviour: with drafts a logits processor is given the last token of the prompt and the answer, and the rest of the prompt never.
#   Words of the prompt can be repeated as if there were no penalty, and every other processor that looks back at the prompt misses
#   it too. No error, no warning. As soon as the answer is longer than the number of tokens that the penalty looks at, it is right
#   again.
# Seen: a Llama of random weights, 30 greedy tokens after prompts of 4, 8, 12, 20 and 40 with a penalty of 1.3. Counted until they
#   part from those without drafts: 30, 30, 30, 8 and 1; with the penalty on 100 tokens 29, 30, 17, 8 and 1; without a penalty 30
#   each. The first text that a processor is given after a prompt of 20 has 20 tokens without drafts, and 1 with them.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q mlx==0.32.4 mlx-cpu==0.32.4 mlx-lm==0.32.2
"$dir/venv/bin/python" - <<'PY'
import sys

import mlx.core as mx
from mlx.utils import tree_map
from mlx_lm.generate import generate_step, speculative_generate_step
from mlx_lm.models import llama
from mlx_lm.sample_utils import make_logits_processors

NEW = 30
SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64}


def make(seed):
    model = llama.Model(llama.ModelArgs(model_type="llama", num_hidden_layers=2, rms_norm_eps=1e-5, **SIZES))
    mx.random.seed(seed)
    model.update(tree_map(lambda x: mx.random.normal(x.shape) * 0.15 if x.ndim > 1 else x, model.parameters()))
    return model


def answers(prompt, processors):
    """Greedy tokens without drafts and with them."""
    options = {"max_tokens": NEW, "logits_processors": processors}
    alone = [int(token) for token, _ in generate_step(prompt, model, **options)]
    return alone, [int(token) for token, *_ in speculative_generate_step(prompt, model, draft, **options)]


def agree(prompt, **penalty):
    alone, drafted = answers(prompt, make_logits_processors(**penalty))
    return next((i for i in range(NEW) if alone[i] != drafted[i]), NEW)


model, draft = make(0), make(9)
mx.random.seed(5)
prompts = [mx.random.randint(1, 64, (length,)) for length in (4, 8, 12, 20, 40)]
found = {
    "no penalty": [agree(prompt) for prompt in prompts],
    "penalty 1.3": [agree(prompt, repetition_penalty=1.3) for prompt in prompts],
    "penalty 1.3 on 100 tokens": [agree(prompt, repetition_penalty=1.3, repetition_context_size=100) for prompt in prompts],
}
for name, counts in found.items():
    print(f"{name}: tokens of {NEW} as without drafts {counts}")
lengths = []


def look(tokens, logits):
    lengths.append(tokens.size)
    return logits


list(generate_step(prompts[3], model, max_tokens=1, logits_processors=[look]))
alone = lengths[0]
lengths.clear()
list(speculative_generate_step(prompts[3], model, model, max_tokens=1, logits_processors=[look]))
print(f"first text that a processor is given: {alone} tokens without drafts, {lengths[0]} with")
right, *wrong = found.values()
sys.exit(not (min(right) == NEW and all(min(counts) < 15 for counts in wrong) and (alone, lengths[0]) == (20, 1)))
PY
echo "as described: with drafts penalties do not see the prompt"
