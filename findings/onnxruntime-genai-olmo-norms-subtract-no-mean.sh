#!/usr/bin/env bash
# onnxruntime-genai 0.18.0, onnxruntime 1.32.0, transformers 5.24.0 (CPU): a tiny OLMo through the model builder, float32.
#
# Guess: OLMo is among the models that the builder knows by name, in a class of its own, so that its ONNX model gives the numbers
#   that transformers gives, as Llama's does.
# Behaviour: OLMo's norms subtract the mean of a token and have no weights. They are written as RMS norms with weights of one
#   (`SimplifiedLayerNormalization`), which subtract nothing, with an epsilon of 1e-6 where OLMo has 1e-5. `clip_qkv`, which OLMo-7B
#   sets, is left out as well. No error, no warning, neither from the builder nor from the engine.
# Seen, random weights, 40 tokens at once and 20 one by one: Llama's logits are off by at most 2e-5 (the largest is 6), and all likeliest
#   tokens are the same. Those of OLMo without `clip_qkv` are off by up to 6.1 (the largest is 5.4), and 3 of 21 likeliest tokens are
#   the same; with `clip_qkv` 0.5 off by up to 8.3, and none is.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 onnxruntime==1.32.0 onnxruntime-genai==0.18.0 onnx==1.23.2 onnx-ir==1.1.0
export OMP_NUM_THREADS=1 TRANSFORMERS_VERBOSITY=error
"$dir/venv/bin/python" - "$dir" <<'PY'
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime_genai as og
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, OlmoConfig, OlmoForCausalLM, PreTrainedTokenizerFast

WORDS, PROMPT, TOKENS = 200, 40, 60
shape = {
    "vocab_size": WORDS, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 2, "bos_token_id": 1, "eos_token_id": 2,
    "initializer_range": 0.2,
}
vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, WORDS)}
raw = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
raw.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
)
ids = torch.randint(3, WORDS, (1, TOKENS), generator=torch.Generator().manual_seed(3))


def last(generator):
    return torch.tensor(np.array(generator.get_logits()))[0, -1]


def compared(name, model):
    folder = f"{sys.argv[1]}/{name}"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    subprocess.run(
        [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", folder, "-o", f"{folder}/onnx", "-p", "fp32",
         "-e", "cpu", "-c", f"{folder}/cache"],
        check=True, capture_output=True,
    )
    with torch.no_grad():
        want = model(ids).logits[0, PROMPT - 1 :]
    built = og.Model(f"{folder}/onnx")
    options = og.GeneratorParams(built)
    options.set_search_options(max_length=100, do_sample=False)
    generator = og.Generator(built, options)
    generator.append_tokens(ids[:, :PROMPT].numpy().astype(np.int32))
    found = [last(generator)]
    for token in ids[:, PROMPT:].split(1, 1):
        generator.append_tokens(token.numpy().astype(np.int32))
        found.append(last(generator))
    got = torch.stack(found)
    norms = {n.op_type for n in onnx.load(f"{folder}/onnx/model.onnx").graph.node if "Norm" in n.op_type}
    off, same = (got - want).abs().max().item(), int((got.argmax(-1) == want.argmax(-1)).sum())
    print(f"{name}: off by {off:.2g} (largest {want.abs().max():.2g}), {same} of {len(want)} likeliest tokens; {sorted(norms)}")
    return off, same == len(want), all("Simplified" in norm for norm in norms)


def made(kind, config):
    torch.manual_seed(0)
    return kind(config).float().eval()


llama = compared("llama", made(LlamaForCausalLM, LlamaConfig(**shape)))
plain = compared("olmo", made(OlmoForCausalLM, OlmoConfig(**shape)))
clipped = compared("olmo with clip_qkv", made(OlmoForCausalLM, OlmoConfig(**shape, clip_qkv=0.5)))
as_said = llama[0] < 1e-3 and llama[1] and all(off > 0.5 and not same and simple for off, same, simple in (plain, clipped))
sys.exit(not as_said)
PY
echo "as described: norms that subtract the mean are written as norms that do not"
