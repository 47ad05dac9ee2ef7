#!/usr/bin/env bash
# optimum-quanto 0.2.7 with transformers 5.24.0, torch 2.13.0 (CPU): a model with quantized activations, saved and loaded again.
#
# Guess: `requantize(model, state_dict, quantization_map)` gives the model that was saved. It does so to the bit where weights alone
#   are quantized, and the state has the scales that were calibrated for inputs and outputs.
# Behaviour: `Calibration`, with its default `streamline=True`, switches the rounding of a layer's output off where the next
#   operation could not use 8 bits anyway (additions, rotary embeddings, softmax). It does so by removing a hook from the module,
#   and neither the state nor the quantization map tells. The loaded model rounds the output of every layer, as if it had been
#   calibrated with `streamline=False`. What was measured before saving is not what is loaded. No error, no warning, no missing
#   keys.
# Seen: a Llama of random weights (largest logit 7.4), weights of 8 bits. After loading logits are off by up to 1.1 with activations
#   in qint8 and 2.8 in qfloat8; the root mean square of the error against the unquantized model goes from 0.18 to 0.22 and from
#   0.36 to 0.50. The loaded model is exactly the one that `streamline=False` gives, and that one comes back as it was.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 optimum-quanto==0.2.7
OMP_NUM_THREADS=1 "$dir/venv/bin/python" -W error::UserWarning - "$dir/model.safetensors" <<'PY'
import sys

import torch
from optimum.quanto import Calibration, freeze, qfloat8_e4m3fn, qint8, quantization_map, quantize, requantize
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM


def make():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=96, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def apart(one, other):
    return (one - other).abs().max().item()


ids = torch.randint(0, 64, (4, 60), generator=torch.Generator().manual_seed(3))
good = True
with torch.no_grad():
    plain = make()(ids).logits
    for activations in (None, qint8, qfloat8_e4m3fn):
        loaded = {}
        for streamline in (True, False):
            model = make()
            quantize(model, weights=qint8, activations=activations)
            if activations is not None:
                with Calibration(streamline=streamline):
                    model(ids)
            freeze(model)
            saved = model(ids).logits
            save_file(model.state_dict(), sys.argv[1])
            other = make()
            requantize(other, load_file(sys.argv[1]), quantization_map(model))
            loaded[streamline] = other(ids).logits
            errors = [(logits - plain).pow(2).mean().sqrt().item() for logits in (saved, loaded[streamline])]
            off = apart(saved, loaded[streamline])
            print(
                f"activations {activations and activations.name}, streamline={streamline}: loaded off by {off:.2g} (largest "
                f"{plain.abs().max():.1f}); error of the saved {errors[0]:.2f}, of the loaded {errors[1]:.2f}"
            )
            good &= off > 0.3 if streamline and activations is not None else off == 0
        good &= apart(loaded[True], loaded[False]) == 0
sys.exit(not good)
PY
echo "as described: the model that is loaded rounds more than the one that was saved"
