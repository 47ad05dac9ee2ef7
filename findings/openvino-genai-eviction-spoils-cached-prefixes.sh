#!/usr/bin/env bash
# openvino-genai 2026.4.1.0, openvino 2026.4.1 (CPU): cache eviction and prefix caching in one `SchedulerConfig`.
#
# Guess: `use_cache_eviction` lets blocks of a sequence leave while it generates; `enable_prefix_caching` keeps blocks of prompts
#   for later requests that begin alike. Both are listed as options of one pipeline, and the limitations that the documentation of
#   eviction lists do not name the other. So a prompt that comes again gets the answer that it got, sooner; or the pair is
#   refused.
# Behaviour: a prompt that comes again is answered as another text, and so is a conversation that goes on. When blocks have left a
#   sequence, its cache is shorter than its text; a block that fills up afterwards is filed under the beginning of the text that
#   is as long as the cache. So keys and values of generated tokens lie in the store in the place of tokens of the prompt. No
#   error, no warning; only when a pipeline is closed, a line may say that blocks were leaked.
# Seen, a Llama of random weights in float32, 96 tokens kept of 200, 40 new ones: two prompts asked again part from their first
#   answers after 1 and 0 tokens, and the conversation that goes on parts from a new pipeline's after 0. With either option alone
#   all are the same to the end.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q openvino-genai==2026.4.1.0 openvino==2026.4.1 gguf==0.19.0
"$dir/venv/bin/python" - "$dir" <<'PY'
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


path = sys.argv[1] + "/tiny.gguf"
write(path)
draw = np.random.default_rng(1)
prompt, other, turn = (draw.integers(0, 128, (1, length)) for length in (200, 200, 20))
EVICTION = genai.CacheEvictionConfig(32, 32, 96, genai.AggregationMode.NORM_SUM)


def pipeline(evicts, prefixes):
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = 1
    scheduler.enable_prefix_caching = prefixes
    scheduler.use_cache_eviction = evicts
    if evicts:
        scheduler.cache_eviction_config = EVICTION
    return genai.LLMPipeline(path, "CPU", scheduler_config=scheduler, INFERENCE_PRECISION_HINT="f32", KV_CACHE_PRECISION="f32")


def answer(pipe, ids):
    return pipe.generate(openvino.Tensor(ids), max_new_tokens=40, ignore_eos=True, do_sample=False).tokens[0]


def parted(one, two):
    return next((f"after {i} tokens" for i, (a, b) in enumerate(zip(one, two, strict=True)) if a != b), "never")


seen = {}
for evicts, prefixes in ((False, True), (True, False), (True, True)):
    pipe = pipeline(evicts, prefixes)
    first = answer(pipe, prompt)
    between = answer(pipe, other)
    longer = np.concatenate((prompt, [first], turn), 1)
    alone = answer(pipeline(evicts, False), longer)
    seen[evicts, prefixes] = [
        parted(first, answer(pipe, prompt)), parted(between, answer(pipe, other)), parted(alone, answer(pipe, longer))
    ]
    print(f"eviction {evicts}, prefix caching {prefixes}: asked again, answers part {seen[evicts, prefixes][:2]}; "
          f"the conversation goes on, against a new pipeline: {seen[evicts, prefixes][2]}")
    del pipe
both = seen.pop((True, True))
sys.exit(not ("never" not in both and {tuple(found) for found in seen.values()} == {("never",) * 3}))
PY
echo "as described: a prompt that comes again is answered as another one"
