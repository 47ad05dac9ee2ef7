#!/usr/bin/env bash
# transformers 5.24.0 with peft 0.21.2: a DoRA adapter that lies in a folder, loaded by transformers itself.
#
# Guess: `AutoModelForCausalLM.from_pretrained(folder)` finds adapter_config.json, loads the base and the adapter, and
#   computes what peft computes from the same folder; that is what it does for LoRA.
# Behaviour: the low-rank matrices arrive and the magnitude vectors of DoRA do not: they keep what they were initialised
#   with. The model answers as another adapter would. There is no error; the log has a report of keys, as for every
#   load that fills something in.
# Seen: LoRA: no difference to peft. DoRA: logits differ by more than 1.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 peft==0.21.2
OMP_NUM_THREADS=1 "$dir/venv/bin/python" - "$dir" <<'PY'
import sys
import torch, transformers, peft
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

base = sys.argv[1] + "/base"
torch.manual_seed(0)
LlamaForCausalLM(LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.3,
)).save_pretrained(base)
ids = torch.tensor([[5, 9, 30, 17, 44]])
print("transformers", transformers.__version__, "peft", peft.__version__)
found = {}
for kind in ("LoRA", "DoRA"):
    folder = f"{sys.argv[1]}/{kind}"
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM", use_dora=kind == "DoRA",
    )
    model = peft.get_peft_model(LlamaForCausalLM.from_pretrained(base), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(3)  # as if trained
        model.save_pretrained(folder)
        want = model(ids).logits
        by_peft = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), folder).eval()(ids).logits
        by_transformers = AutoModelForCausalLM.from_pretrained(folder).eval()(ids).logits
    found[kind] = [(logits - want).abs().max().item() for logits in (by_peft, by_transformers)]
    print(f"  {kind}: difference to the saved model, loaded by peft {found[kind][0]:.2g}, by transformers {found[kind][1]:.2g}")
(lora, lora_auto), (dora, dora_auto) = found["LoRA"], found["DoRA"]
sys.exit(not (max(lora, lora_auto, dora) < 1e-4 and dora_auto > 1))
PY
echo "as described: transformers loads a DoRA adapter without its magnitudes"
