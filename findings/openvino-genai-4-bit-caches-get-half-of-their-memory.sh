#!/usr/bin/env bash
# openvino-genai 2026.4.1.0, openvino 2026.4.1 (CPU, Linux): `cache_size` of `SchedulerConfig` with caches of 4 bits.
#
# Guess: `cache_size` is "total size of cache in GB". With `KV_CACHE_PRECISION` u8 and then u4 as many gigabytes hold about twice as
#   many tokens each time, a little less for scales; `kv_cache_size_in_bytes` of the metrics says what the cache takes.
# Behaviour: the size of a block is the number of its elements times the bytes of one, and an element of 4 bits counts as a whole
#   byte. A cache in u4 is given half of the memory that was asked for; as its groups have more scales, it holds fewer tokens than
#   one in u8. The metrics report twice what is there. No error, no warning.
# Seen, a Llama of random weights with one KV head of 64: cache_size=1 holds 65536 blocks of 32 tokens in f16, 110376 in u8 and
#   95325 in u4. 163840 blocks: reported (and taken from the address space, of which 29 are the step's own), in MB: f16 2684 (2713),
#   u8 1594 (1622), u4 1845 (951).
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q openvino-genai==2026.4.1.0 openvino==2026.4.1 gguf==0.19.0
"$dir/venv/bin/python" - "$dir" <<'PY'
import pathlib
import resource
import sys

import gguf
import numpy as np
import openvino
import openvino_genai as genai

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


folder = pathlib.Path(sys.argv[1]) / "model"
folder.mkdir()
write(folder / "tiny.gguf")
genai.LLMPipeline(str(folder / "tiny.gguf"), "CPU", enable_save_ov_model=True)  # writes the model for OpenVINO beside it
prompt = openvino.Tensor(np.random.default_rng(1).integers(0, 128, (1, 480)))  # 15 blocks of 32 tokens


def address_space():
    return int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def measure(precision, **size):
    """Blocks, bytes as reported, and bytes that the first steps took."""
    scheduler = genai.SchedulerConfig()
    scheduler.max_num_batched_tokens = 512
    for name, value in size.items():
        setattr(scheduler, name, value)
    properties = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": precision}
    pipe = genai.ContinuousBatchingPipeline(str(folder), scheduler, "CPU", properties)
    request = pipe.add_request(0, prompt, genai.GenerationConfig(max_new_tokens=2, ignore_eos=True))
    before = address_space()
    pipe.step()
    taken, metrics = address_space() - before, pipe.get_metrics()
    while pipe.has_non_finished_requests():
        pipe.step()
    del request  # until here, for a request that nobody holds is dropped
    return round(15 / (metrics.max_cache_usage / 100)), metrics.kv_cache_size_in_bytes, taken


blocks, ratio = {}, {}
for precision in ("f16", "u8", "u4"):
    blocks[precision] = measure(precision, cache_size=1)[0]
    _, reported, taken = measure(precision, num_kv_blocks=163840)
    ratio[precision] = reported / taken
    print(f"{precision}: cache_size=1 holds {blocks[precision]} blocks; "
          f"163840 blocks: reported {reported / 1e6:.0f} MB, taken {taken / 1e6:.0f} MB")
right = abs(ratio["f16"] - 1) < 0.05 and abs(ratio["u8"] - 1) < 0.05
sys.exit(not (right and abs(ratio["u4"] - 2) < 0.1 and blocks["f16"] < blocks["u4"] < blocks["u8"]))
PY
echo "as described: a cache of 4 bits gets half of the memory and holds fewer tokens than one of 8"
