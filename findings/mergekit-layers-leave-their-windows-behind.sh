#!/usr/bin/env bash
# mergekit 0.1.5 with transformers 5.24.0, torch 2.13.0 (CPU): layers of a Gemma 2 put in another order (`merge_method: passthrough`
# with `slices`, what pruned and stacked models are made with).
#
# Guess: a layer that is taken keeps what it is. Gemma 2 attends within a window in every other layer, which `layer_types` of
#   config.json says layer by layer; mergekit knows the architecture by name and writes the new number of layers into the config, so
#   the list follows the layers as their weights do.
# Behaviour: the list is left as it was. Where as many layers are taken as there were (one left out and another one twice, or an order
#   changed), layers with a window attend to everything and the others within the window, with no error and no warning; texts that
#   are shorter than the window hide it. Where the number differs the merge ends well, and its folder cannot be loaded: the config
#   holds a list of another length.
# Seen, a Gemma 2 with random weights, six layers, a window of 8, a text of 48 tokens: layers 0 1 2 2 3 4, three of which lie where the
#   other kind was: logits are off by 2.07 (the largest is 4.25), and by 0 in the first 8 tokens; layers 0 2 3 4 5 1: 3.34 of 4.07.
#   All layers in their order: 0. Eight layers: ValueError when the folder is loaded.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 mergekit==0.1.5
OMP_NUM_THREADS=1 TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1 "$dir/venv/bin/python" - "$dir" <<'PY'
import sys

import torch
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

FOLDER, WINDOW, LAYERS = sys.argv[1], 8, 6
torch.manual_seed(0)
config = Gemma2Config(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2,
    head_dim=8, sliding_window=WINDOW, max_position_embeddings=256, query_pre_attn_scalar=8, initializer_range=0.2,
)
parent = Gemma2ForCausalLM(config).eval()
parent.save_pretrained(f"{FOLDER}/parent")
TEXT = torch.randint(3, 64, (1, 48), generator=torch.Generator().manual_seed(1))


def merged(name, ranges):
    slices = [{"sources": [{"model": f"{FOLDER}/parent", "layer_range": list(r)}]} for r in ranges]
    asked = MergeConfiguration.model_validate({"merge_method": "passthrough", "dtype": "float32", "slices": slices})
    run_merge(asked, f"{FOLDER}/{name}", MergeOptions(copy_tokenizer=False, quiet=True))
    return AutoModelForCausalLM.from_pretrained(f"{FOLDER}/{name}").eval()


def by_hand(order):
    """The same layers, each with its kind."""
    kinds = [config.layer_types[i] for i in order]
    model = Gemma2ForCausalLM(Gemma2Config(**config.to_dict() | {"num_hidden_layers": len(order), "layer_types": kinds})).eval()
    weights = parent.state_dict()
    taken = {name: w for name, w in weights.items() if ".layers." not in name}
    for place, layer in enumerate(order):
        start = f"model.layers.{layer}."
        taken |= {f"model.layers.{place}." + n.removeprefix(start): w for n, w in weights.items() if n.startswith(start)}
    model.load_state_dict(taken)
    return model


@torch.inference_mode()
def off(name, ranges):
    order = [layer for begin, end in ranges for layer in range(begin, end)]
    got, wanted = merged(name, ranges)(TEXT).logits, by_hand(order)(TEXT).logits
    found = [float((got - wanted)[:, :n].abs().max()) for n in (len(TEXT[0]), WINDOW)]
    print(f"layers {order}: off by {found[0]:.2f} (the largest is {wanted.abs().max():.2f}), {found[1]:.2g} within a window")
    return found


assert off("as-they-are", [(0, 6)]) == [0, 0]
for name, ranges in {"one-twice": [(0, 3), (2, 5)], "another-order": [(0, 1), (2, 6), (1, 2)]}.items():
    whole, within = off(name, ranges)
    assert whole > 1 and within < 1e-4
try:
    merged("more", [(0, 4), (2, 6)])
except Exception as error:
    print(f"eight layers: {type(error).__name__}: {' '.join(str(error).split())}")
    assert "layer_types" in str(error)
else:
    raise AssertionError("eight layers are loaded")
PY
