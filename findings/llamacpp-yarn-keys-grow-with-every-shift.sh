#!/usr/bin/env bash
# llama.cpp as of xllamacpp 2026.10.11549 (CPU): positions that are moved in the cache (`--cache-reuse`, `--context-shift`), for a
# model with YaRN.
#
# Guess: keys that move to another place are turned by the difference of the two positions, and nothing else happens to them. In a
#   model of one layer keys and values depend on a token and its place alone, so that the answer from a moved cache is exactly the
#   answer to the text that is left. This holds with YaRN as without, or the options are switched off with a line in the log, as
#   they are for models whose positions cannot be moved.
# Behaviour: the turn is made by the operator that also turns new keys, and with YaRN this operator multiplies by the attention
#   factor, 1 + 0.1 ln(factor). Keys in the cache have that factor already and get it again at each move. All keys of the cache get
#   it, those that stay in their places too. The tokens that always stay (the system prompt, the first `n_keep` tokens) get keys
#   that grow without end, until nothing else is attended to. No error, no warning. With `rope.scaling.attn_factor` set to the
#   inverse, so that the product is 1, answers are right.
# Seen: a Llama of one layer with random weights. A chat keeps its first 40 tokens and loses its oldest message at each turn, and
#   130 of 160 tokens come from the cache. Of 8 greedy tokens agree with an answer without a cache, in 12 turns: 8 in each without
#   scaling and with linear scaling; 8 0 2 1 0 0 0 1 0 0 0 0 with YaRN of factor 4; 8 in each with YaRN and the inverse attn_factor.
#   Context shift with 40 tokens kept: of the 107 tokens between two shifts at most 2 are not the best ones after the text that is
#   left without scaling; with YaRN it is 34, 52, 65 and 88.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q xllamacpp==2026.10.11549 gguf==0.19.0
"$dir/venv/bin/python" - "$dir/tiny.gguf" <<'PY'
import math
import sys

import gguf
import numpy as np
import xllamacpp

PATH, HIDDEN, HEADS, HEAD = sys.argv[1], 64, 2, 64


def write(kind, factor, attention):
    """A Llama of one layer with random weights, whose tokens are the 256 bytes."""
    rng = np.random.default_rng(0)
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    names = {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in shown)}
    writer = gguf.GGUFWriter(PATH, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(1)
    writer.add_key_length(HEAD)
    writer.add_value_length(HEAD)
    writer.add_rope_dimension_count(HEAD)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    if kind:
        writer.add_rope_scaling_type(kind)
        writer.add_rope_scaling_factor(factor)
        writer.add_rope_scaling_orig_ctx_len(64)
        writer.add_rope_scaling_attn_factors(attention)
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

    def norm(name):
        writer.add_tensor(name + ".weight", np.ones(HIDDEN, np.float32))

    weights("token_embd", 259, HIDDEN, scale=1)
    weights("output", 259, HIDDEN)
    norm("output_norm")
    norm("blk.0.attn_norm")
    weights("blk.0.attn_q", HEADS * HEAD, HIDDEN, scale=0.2)
    weights("blk.0.attn_k", HEAD, HIDDEN, scale=0.2)
    weights("blk.0.attn_v", HEAD, HIDDEN)
    weights("blk.0.attn_output", HIDDEN, HEADS * HEAD)
    norm("blk.0.ffn_norm")
    weights("blk.0.ffn_gate", HIDDEN, HIDDEN)
    weights("blk.0.ffn_up", HIDDEN, HIDDEN)
    weights("blk.0.ffn_down", HIDDEN, HIDDEN)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def serve(context, **options):
    params = xllamacpp.CommonParams()
    params.model.path = PATH
    params.n_ctx = context
    params.n_parallel = 1
    params.cache_ram_mib = 0
    params.verbosity = 1
    for name, value in options.items():
        setattr(params, name, value)
    return xllamacpp.Server(params)


def ask(server, ids, count, **options):
    request = {"prompt": [int(i) for i in ids], "max_tokens": count, "temperature": 0, "logprobs": 1, "ignore_eos": True}
    request["logit_bias"] = [[i, False] for i in range(128, 259)]
    answer = server.handle_completions(request | options)["choices"][0]["logprobs"]["content"]
    return [token["id"] for token in answer]


def chat():
    """Tokens of each turn's answer that agree with one computed without a cache; the oldest message leaves at each turn."""
    rng = np.random.default_rng(3)
    server, cold = serve(512, n_cache_reuse=8), serve(512)
    system, messages = rng.integers(0, 128, 40), [rng.integers(0, 128, 30) for _ in range(4)]
    agree = []
    for _ in range(12):
        ids = np.concatenate([system, *messages])
        agree.append(sum(a == b for a, b in zip(ask(server, ids, 8), ask(cold, ids, 8, cache_prompt=False))))
        messages = messages[1:] + [rng.integers(0, 128, 30)]
    return agree


def shift():
    """Tokens, per stretch between two shifts, that are others than the best one after the text that is left."""
    text = list(np.random.default_rng(3).integers(0, 128, 230))
    server, cold, other = serve(256, ctx_shift=True), serve(512), [[]]
    for token in ask(server, text, 460, n_keep=40):
        if len(text) == 256:
            text = text[:40] + text[40 + (255 - 40) // 2 :]
            other.append([])
        other[-1].append(ask(cold, text, 1, cache_prompt=False) != [token])
        text.append(token)
    return [(sum(stretch), len(stretch)) for stretch in other]


types = gguf.RopeScalingType
ways = {
    "no scaling": (None, 1.0, 1.0),
    "linear, factor 4": (types.LINEAR, 4.0, 1.0),
    "yarn, factor 4": (types.YARN, 4.0, 1.0),
    "yarn, factor 4, inverse attn_factor": (types.YARN, 4.0, 1 / (1 + 0.1 * math.log(4))),
}
good = True
for name, way in ways.items():
    write(*way)
    agree, other = chat(), shift()
    print(f"{name}: tokens of 8 as without the cache, by turn: {agree}; context shift, other tokens: {other}")
    if name == "yarn, factor 4":
        good &= agree[0] == 8 and max(agree[4:]) <= 2 and other[0][0] == 0 and other[-1][0] > other[-1][1] / 2
    else:
        good &= min(agree) >= 6 and all(count <= 3 for count, _ in other)
sys.exit(not good)
PY
echo "as described: keys grow whenever the cache is moved"
