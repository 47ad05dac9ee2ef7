#!/usr/bin/env bash
# openvino-genai 2026.4.1.0, openvino 2026.4.1 (CPU): a GGUF whose rotary positions are scaled, beside llama.cpp as of xllamacpp
# 2026.10.11549.
#
# Guess: `LLMPipeline("model.gguf")` computes what llama.cpp computes from the same file, or refuses what it does not know: the
#   tensor `rope_freqs.weight`, in which every Llama 3.1 and 3.2 has its stretched wavelengths, and `rope.scaling.type` with its
#   factor, for models made longer by linear interpolation or YaRN.
# Behaviour: its reader takes the base of the positions and nothing else. The tensor is not looked for, the fields are not read:
#   four files that differ in them alone get one and the same answer, that of unscaled positions. No error, no warning. Without
#   scaling both agree, so that a look at one model does not show it.
# Seen, a Llama of random weights in float32, 100 tokens, the next one with its log-probability. llama.cpp: 28 (-0.99) unscaled,
#   29 (-1.67) with the tensor, 29 (-1.60) linear, 29 (-1.49) YaRN. OpenVINO: 28 (-0.99) for all four.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q openvino-genai==2026.4.1.0 openvino==2026.4.1 xllamacpp==2026.10.11549 gguf==0.19.0
"$dir/venv/bin/python" - "$dir" <<'PY'
import sys

import gguf
import numpy as np
import openvino
import openvino_genai as genai
import xllamacpp

HIDDEN, HEADS, HEAD, LAYERS = 64, 2, 64, 2


def write(path, scaling=None, freqs=None):
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
    if scaling:
        kind, factor = scaling
        writer.add_rope_scaling_type(kind)
        writer.add_rope_scaling_factor(factor)
        writer.add_rope_scaling_orig_ctx_len(int(512 / factor))
    if freqs is not None:
        writer.add_tensor("rope_freqs.weight", freqs)

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


def from_openvino(path):
    pipe = genai.LLMPipeline(path, "CPU", INFERENCE_PRECISION_HINT="f32", KV_CACHE_PRECISION="f32")
    found = pipe.generate(openvino.Tensor(ids[None]), max_new_tokens=1, ignore_eos=True, do_sample=False, logprobs=1)
    return found.tokens[0][0], round(found.scores[0], 2)


def from_llama(path):
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx = 512
    params.n_parallel = 1
    params.verbosity = 1
    request = {"prompt": ids.tolist(), "max_tokens": 1, "temperature": 0, "logprobs": 1}
    found = xllamacpp.Server(params).handle_completions(request)["choices"][0]["logprobs"]["content"][0]
    return found["id"], round(found["logprob"], 2)


# In the manner of Llama 3.1: short wavelengths stay, long ones are stretched by 8, and there is a passage between them.
turns = 512 / (2 * np.pi * 10000.0 ** (np.arange(HEAD // 2) * 2 / HEAD))
llama3 = (1 / np.clip(1 / 8 + (turns - 4) / 12 * 7 / 8, 1 / 8, 1)).astype(np.float32)
ids = np.random.default_rng(13).integers(0, 128, 100)
files = {
    "unscaled": {},
    "rope_freqs.weight": {"freqs": llama3},
    "linear, factor 4": {"scaling": (gguf.RopeScalingType.LINEAR, 4.0)},
    "YaRN, factor 4": {"scaling": (gguf.RopeScalingType.YARN, 4.0)},
}
there, here = {}, {}
for name, options in files.items():
    path = f"{sys.argv[1]}/{len(here)}.gguf"
    write(path, **options)
    there[name], here[name] = from_llama(path), from_openvino(path)
    print(f"{name}: llama.cpp {there[name]}, OpenVINO {here[name]}")
(token, score), *others = there.values()
same = token == here["unscaled"][0] and abs(score - here["unscaled"][1]) < 0.02
sys.exit(not (same and len(set(here.values())) == 1 and all(abs(s - score) > 0.1 or t != token for t, s in others)))
PY
echo "as described: positions are not scaled"
