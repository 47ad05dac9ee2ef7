#!/usr/bin/env bash
# llama.cpp as of xllamacpp 2026.10.11549 (CPU): `--swa-full`, the full cache for layers with sliding windows, and prompts that are
# put aside and come back.
#
# Guess: "use full-size SWA cache" keeps all keys and values of such layers, so that a request can go back to any place of a prompt.
#   The server puts a prompt aside in memory when another one takes its slot (`--cache-ram`, on unless 0), and saves it to a file
#   where `/slots` is asked to. When it comes back it is full, or it is marked as cut and the missing part is computed again.
# Behaviour: What is put aside has, of the window layers, only the tokens within one window of the last token. With `--swa-full` the
#   server does not look how far back the window layers reach, and takes for full what comes back. A request that leaves the old
#   text within its last window (an answer is asked for again, a message is edited, a chat template takes the reasoning out) is
#   answered with up to a whole window of keys and values missing in those layers. No error, no warning. Without `--swa-full` the
#   server looks, and computes the prompt again.
# Seen: a Gemma 3 of 4 layers with random weights, window 32. A prompt of 100 tokens is asked, then another one, then the first 70,
#   76, 82, 88 and 94 tokens of the first one with three new ones behind. Of 16 greedy tokens agree with an answer without a cache:
#   with `--swa-full` 5, 3, 0, 2 and 10, from memory and from a file alike; where the first prompt stayed in its slot 16 each.
#   Without `--swa-full` 16 each.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q xllamacpp==2026.10.11549 gguf==0.19.0
"$dir/venv/bin/python" - "$dir" <<'PY'
import json
import sys
import urllib.request

import gguf
import numpy as np
import xllamacpp

FOLDER, HIDDEN, HEADS, HEAD, LAYERS, WINDOW = sys.argv[1], 64, 2, 64, 4, 32
PATH = FOLDER + "/tiny.gguf"


def write():
    """A Gemma 3 with random weights, whose tokens are the 256 bytes; every second layer has a window."""
    rng = np.random.default_rng(1)
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    names = {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in shown)}
    writer = gguf.GGUFWriter(PATH, "gemma3")
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(1)
    writer.add_key_length(HEAD)
    writer.add_value_length(HEAD)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_sliding_window(WINDOW)
    writer.add_sliding_window_pattern(2)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([names[b] for b in range(256)] + ["<s>", "</s>", "QZ"])
    writer.add_token_types([1] * 256 + [3, 3, 1])
    writer.add_token_merges(["Q Z"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    writer.add_add_bos_token(False)

    def weights(name, *shape, scale=0.3):
        writer.add_tensor(name + ".weight", (rng.standard_normal(shape) * scale).astype(np.float16))

    def norm(name, size=HIDDEN):
        writer.add_tensor(name + ".weight", np.ones(size, np.float32))

    weights("token_embd", 259, HIDDEN)
    weights("output", 259, HIDDEN)
    norm("output_norm")
    for i in range(LAYERS):
        norm(f"blk.{i}.attn_norm")
        weights(f"blk.{i}.attn_q", HEADS * HEAD, HIDDEN)
        weights(f"blk.{i}.attn_k", HEAD, HIDDEN)
        weights(f"blk.{i}.attn_v", HEAD, HIDDEN)
        weights(f"blk.{i}.attn_output", HIDDEN, HEADS * HEAD)
        norm(f"blk.{i}.attn_q_norm", HEAD)
        norm(f"blk.{i}.attn_k_norm", HEAD)
        norm(f"blk.{i}.post_attention_norm")
        norm(f"blk.{i}.ffn_norm")
        weights(f"blk.{i}.ffn_gate", HIDDEN, HIDDEN)
        weights(f"blk.{i}.ffn_up", HIDDEN, HIDDEN)
        weights(f"blk.{i}.ffn_down", HIDDEN, HIDDEN)
        norm(f"blk.{i}.post_ffw_norm")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def serve(full, ram=8192):
    params = xllamacpp.CommonParams()
    params.model.path = PATH
    params.n_ctx = 512
    params.n_parallel = 1
    params.swa_full = full
    params.cache_ram_mib = ram
    params.slot_save_path = FOLDER + "/"
    params.verbosity = 1
    return xllamacpp.Server(params)


def ask(server, ids, count, **options):
    request = {"prompt": [int(i) for i in ids], "max_tokens": count, "temperature": 0, "logprobs": 1, "ignore_eos": True}
    request["logit_bias"] = [[i, False] for i in range(128, 259)]
    answer = server.handle_completions(request | options)
    return [token["id"] for token in answer["choices"][0]["logprobs"]["content"]], answer["timings"]["cache_n"]


def slot(server, action):
    body = json.dumps({"filename": "slot.bin"}).encode()
    request = urllib.request.Request(f"{server.listening_address}/slots/0?action={action}", body)
    request.add_header("Content-Type", "application/json")
    urllib.request.urlopen(request).read()


def stays(server, full):
    """The prompt is still in the slot."""
    ask(server, first, 1)
    return server


def store(server, full):
    """Another prompt takes the slot; the first one goes to the store in memory."""
    ask(server, first, 1)
    ask(server, second, 1)
    return server


def file(server, full):
    """The slot is saved to a file, and restored in another server."""
    ask(server, first, 1)
    slot(server, "save")
    other = serve(full)
    slot(other, "restore")
    return other


write()
first, second, rest = np.random.default_rng(6).integers(0, 128, (3, 100))
cold = serve(False, 0)
good = True
for full in (True, False):
    for way in (stays, store, file):
        seen = []
        for cut in (70, 76, 82, 88, 94):
            ids = np.concatenate([first[:cut], rest[:3]])
            answer, cached = ask(way(serve(full), full), ids, 16)
            seen.append((sum(a == b for a, b in zip(answer, ask(cold, ids, 16, cache_prompt=False)[0])), cached))
        print(f"swa_full={full}, {way.__name__}: tokens of 16 that agree, and tokens from the cache: {seen}")
        agree = [count for count, _ in seen]
        good &= max(agree[:3]) < 8 if full and way is not stays else min(agree) >= 14
sys.exit(not good)
PY
echo "as described: the full cache comes back as a window, and is taken for full"
