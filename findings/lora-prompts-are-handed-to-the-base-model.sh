#!/usr/bin/env bash
# openvino-genai 2026.4.1.0 with openvino 2026.4.1, and llama.cpp as of xllamacpp 2026.10.11549 (CPU): a LoRA adapter that is
# switched on and off from request to request, as both offer (`adapters=` of `generate`, `"lora"` of the server's requests).
#
# Guess: keys and values of a prompt depend on the adapter, so that prompts kept for later are kept for the adapter that they were
#   computed with, as vLLM does. A request without the adapter gets what the base model says, whatever was asked before.
# Behaviour: both know a prompt by its tokens alone. OpenVINO's `LLMPipeline`, which keeps prompts unless told otherwise, goes on
#   from whatever adapter met the prompt first. llama.cpp's server empties the slot that it works in when adapters change, but not
#   the store in memory to which slots are put aside (`--cache-ram`, on unless 0): what comes back from there is of the adapter of
#   that time. The request succeeds, and nothing is logged of it.
# Seen, a Llama of random weights, an adapter on keys and values, a prompt asked with it (of llama.cpp another one in between),
#   then without. Log-probability of the greedy answer without the adapter: OpenVINO (8 tokens) -11.6, after the adapter -13.2;
#   llama.cpp (1 token) -2.63, after the adapter -1.78. With ATTENTION_BACKEND="SDPA", without the store (cache_ram_mib 0): -11.6,
#   -2.63.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q openvino-genai==2026.4.1.0 openvino==2026.4.1 xllamacpp==2026.10.11549 gguf==0.19.0 \
    safetensors==0.8.0
"$dir/venv/bin/python" - "$dir" <<'PY'
import re
import sys

import gguf
import numpy as np
import openvino
import openvino_genai as genai
import xllamacpp
from safetensors.numpy import save_file

HIDDEN, HEADS, HEAD, LAYERS = 64, 2, 64, 2


def write(path):
    """A Llama with random weights, whose tokens are the 256 bytes."""
    rng = np.random.default_rng(0)
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    names = {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in shown)}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(1)
    writer.add_key_length(HEAD)
    writer.add_value_length(HEAD)
    writer.add_rope_dimension_count(HEAD)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([names[b] for b in range(256)] + ["<s>", "</s>", "QZ"])
    writer.add_token_types([1] * 256 + [3, 3, 1])
    writer.add_token_merges(["Q Z"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)

    def weights(name, *shape, scale=0.3):
        writer.add_tensor(name + ".weight", (rng.standard_normal(shape) * scale).astype(np.float16))

    def norm(name):
        writer.add_tensor(name + ".weight", np.ones(HIDDEN, np.float32))

    weights("token_embd", 259, HIDDEN, scale=1)
    weights("output", 259, HIDDEN)
    norm("output_norm")
    for i in range(LAYERS):
        norm(f"blk.{i}.attn_norm")
        weights(f"blk.{i}.attn_q", HEADS * HEAD, HIDDEN, scale=0.1)
        weights(f"blk.{i}.attn_k", HEAD, HIDDEN, scale=0.1)
        weights(f"blk.{i}.attn_v", HEAD, HIDDEN)
        weights(f"blk.{i}.attn_output", HIDDEN, HEADS * HEAD)
        norm(f"blk.{i}.ffn_norm")
        weights(f"blk.{i}.ffn_gate", HIDDEN, HIDDEN)
        weights(f"blk.{i}.ffn_up", HIDDEN, HIDDEN)
        weights(f"blk.{i}.ffn_down", HIDDEN, HIDDEN)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_adapter(folder):
    """One adapter on keys and values, as a GGUF and under the names of PEFT."""
    rng = np.random.default_rng(3)
    writer = gguf.GGUFWriter(folder + "/adapter.gguf", "llama")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 4.0)
    named = {}
    for i in range(LAYERS):
        for name in "kv":
            for part, shape in (("A", (4, HIDDEN)), ("B", (HEAD, 4))):
                matrix = (rng.standard_normal(shape) * 0.5).astype(np.float32)
                writer.add_tensor(f"blk.{i}.attn_{name}.weight.lora_{part.lower()}", matrix)
                named[f"base_model.model.model.layers.{i}.self_attn.{name}_proj.lora_{part}.weight"] = matrix
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save_file(named, folder + "/adapter.safetensors")


def rename(folder):
    """OpenVINO finds the layers of an adapter by the names that exports of optimum-intel have; a GGUF's layers have none."""
    genai.LLMPipeline(folder + "/tiny.gguf", "CPU", enable_save_ov_model=True)
    model = openvino.Core().read_model(folder + "/openvino_model.xml")
    for multiply in (op for op in model.get_ops() if op.get_type_name() == "MatMul"):
        weight = multiply.input_value(1).get_node()
        while weight.get_input_size():
            weight = weight.input_value(0).get_node()
        if found := re.match(r"model\.layers\[(\d+)\]\.(.+)\.weight", weight.get_friendly_name()):
            multiply.set_friendly_name(f"__module.model.layers.{found[1]}.{found[2]}/aten::linear/MatMul")
    return model


folder = sys.argv[1]
write(folder + "/tiny.gguf")
write_adapter(folder)
model = rename(folder)
openvino.save_model(model, folder + "/named.xml", compress_to_fp16=False)
ids, other = np.random.default_rng(1).integers(0, 128, (2, 100))


class OpenVINO:
    def __init__(self, **options):
        self.adapter = genai.Adapter(folder + "/adapter.safetensors")
        xml, weights = open(folder + "/named.xml").read(), openvino.Tensor(np.fromfile(folder + "/named.bin", np.uint8))
        tokenizer = genai.Tokenizer(folder)
        self.pipe = genai.LLMPipeline(
            xml, weights, tokenizer, "CPU", adapters=genai.AdapterConfig(self.adapter), INFERENCE_PRECISION_HINT="f32", **options
        )

    def __call__(self, ids, adapted):
        adapters = genai.AdapterConfig(self.adapter) if adapted else genai.AdapterConfig()
        asked = dict(max_new_tokens=8, ignore_eos=True, do_sample=False, logprobs=1, adapters=adapters)
        return round(self.pipe.generate(openvino.Tensor(ids[None]), **asked).scores[0], 1)


class Llama:
    def __init__(self, **options):
        params = xllamacpp.CommonParams()
        params.model.path = folder + "/tiny.gguf"
        params.n_ctx = 512
        params.n_parallel = 1
        params.verbosity = 1
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(folder + "/adapter.gguf", 1.0)]
        for name, value in options.items():
            setattr(params, name, value)
        self.server = xllamacpp.Server(params)

    def __call__(self, ids, adapted):
        request = {"prompt": ids.tolist(), "max_tokens": 1, "temperature": 0, "logprobs": 1}
        request["lora"] = [{"id": 0, "scale": float(adapted)}]
        request["logit_bias"] = [[i, False] for i in range(128, 259)]
        return round(self.server.handle_completions(request)["choices"][0]["logprobs"]["content"][0]["logprob"], 2)


ways = {
    "OpenVINO": (OpenVINO, {}),
    "OpenVINO, ATTENTION_BACKEND=SDPA": (OpenVINO, {"ATTENTION_BACKEND": "SDPA"}),
    "llama.cpp": (Llama, {}),
    "llama.cpp, cache_ram_mib=0": (Llama, {"cache_ram_mib": 0}),
}
off = {}
for name, (kind, options) in ways.items():
    with_adapter, base = (kind(**options)(ids, adapted) for adapted in (True, False))
    engine = kind(**options)
    assert engine(ids, True) == with_adapter
    if kind is Llama:
        engine(other, False)
    after = engine(ids, False)
    off[name] = abs(after - base)
    print(f"{name}: log-probability of the answer with the adapter {with_adapter}, without {base}; without, after with: {after}")
off = list(off.values())
sys.exit(not (off[0] > 0.3 and off[2] > 0.3 and off[1] < 0.1 and off[3] < 0.1))
PY
echo "as described: the base model answers from keys and values of the adapter"
