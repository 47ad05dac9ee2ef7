#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0 (CPU): a deep copy of a model that has generated with compiled steps.
#
# Guess: `copy.deepcopy(model)` is a model of its own. What is done to its weights shows in what it generates, whether
#   steps are compiled or not; at worst it is compiled anew, or the copy is refused.
# Behaviour: `generate` keeps the compiled call as an attribute of the model. The copy takes it along, bound to the
#   original: with a static cache and compiled steps (on a GPU the default of such a cache) the first token of a text
#   comes from the copy and all others from the original's weights. A copy that is trained further, pruned or
#   zeroed says what the original says. `get_compiled_call` of the copy is the original's, too.
# Seen: of the copy, whose weights were drawn anew, the compiled call has the original's logits (difference 0), its own
#   forward differs from them by more than 0.1; of 12 tokens that it generates with compiled steps 11 differ from
#   those of its plain steps.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0
"$dir/venv/bin/python" - <<'PY'
import copy
import sys
import torch
from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=64,
)
model = LlamaForCausalLM(config).eval()
prompt = torch.arange(8)[None]
settings = CompileConfig(backend="eager", mode=None)  # traced, but no kernels: the same on any machine
settings._compile_all_devices = True  # on a GPU this is not needed


def text(of, compiled):
    more = {"cache_implementation": "static", "compile_config": settings} if compiled else {}
    return of.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None, **more)[0, 8:]


print("the model, compiled as plain:", torch.equal(text(model, True), text(model, False)))
other = copy.deepcopy(model)
with torch.no_grad():
    for parameter in other.parameters():
        parameter.normal_()
    own, called = other(prompt).logits, other.get_compiled_call(settings)(prompt).logits
    original = model(prompt).logits
alike, apart = float((called - original).abs().max()), float((own - original).abs().max())
differ = int((text(other, True) != text(other, False)).sum())
print(f"the copy: compiled call {alike:.1e} from the original, forward {apart:.2f} from it")
print(f"the copy: {differ} of 12 tokens differ between compiled and plain steps")
sys.exit(not (alike < 1e-5 and apart > 0.1 and differ > 5))
PY
echo "as described: the copy's compiled steps are those of the original"
