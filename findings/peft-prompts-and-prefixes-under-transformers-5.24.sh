#!/usr/bin/env bash
# peft 0.21.2 (the newest) with transformers 5.24.0, and with 5.23.0 for comparison: prompt and prefix tuning in generate.
#
# Guess: pip installs the two together without complaint, and transformers keeps the old name of the cache alive, so
#   tuned prompts and prefixes work as under 5.23, or an error says which versions fit.
# Behaviour: peft looks for the cache under `past_key_values` in the arguments of each step, where transformers 5.24
#   puts `cache`. Prompt tuning then takes every step for the first one and puts its virtual tokens before each new
#   token: `generate` says something else with a cache than without. Prefix tuning writes its prefix to an argument that
#   nobody reads: with a cache the tuned model says exactly what the untuned one says. No error.
# Seen: prompt tuning agrees with itself without a cache under 5.23.0 and not under 5.24.0; the prefix has an effect
#   under 5.23.0 and none under 5.24.0.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cat >"$dir/tune.py" <<'PY'
import sys
import torch, transformers, peft
from transformers import LlamaConfig, LlamaForCausalLM

IDS = torch.randint(3, 128, (2, 14), generator=torch.Generator().manual_seed(0))
ASK = dict(attention_mask=torch.ones_like(IDS), max_new_tokens=12, min_new_tokens=12, do_sample=False)


def stock():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


def tuned(config):
    torch.manual_seed(1)
    model = peft.get_peft_model(stock(), config).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.mul_(3)  # as if trained: far from zero
    return model


prompts = tuned(peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
agrees = torch.equal(prompts.generate(input_ids=IDS, **ASK), prompts.generate(input_ids=IDS, **ASK, use_cache=False))
prefix = tuned(peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
acts = not torch.equal(prefix.generate(input_ids=IDS, **ASK), stock().generate(IDS, **ASK))
print(f"transformers {transformers.__version__}, peft {peft.__version__}")
print("  prompt tuning says the same with and without a cache:", agrees)
print("  prefix tuning changes what the model says:", acts)
old = transformers.__version__ == "5.23.0"
sys.exit(not ((agrees, acts) == ((True, True) if old else (False, False))))
PY
for version in 5.23.0 5.24.0; do
    python3 -m venv "$dir/$version"
    "$dir/$version/bin/pip" install -q torch==2.13.0 "transformers==$version" peft==0.21.2
    OMP_NUM_THREADS=1 "$dir/$version/bin/python" "$dir/tune.py"
done
echo "as described: under 5.24.0 prompts are put before every token and prefixes are lost, in silence"
