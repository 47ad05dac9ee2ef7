#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0 (CPU): two chats by turns, each with a cache of its own, with Qwen2-VL, Qwen2.5-VL, Qwen3-VL and
# Qwen3.5.
#
# Guess: a chat goes on from the cache that its last call returned and all of its tokens so far. What was asked in between, with
#   another cache, does not matter: the answer is the one that the whole text gets without a cache. So it is with language models.
# Behaviour: an image takes fewer positions than it has tokens. The difference is kept in the model (`rope_deltas`) and not in the
#   cache. Every call that begins a text overwrites it, and every call with a cache adds it to its positions, whichever text the
#   cache is of. After a question about an image, a chat that has no image at all goes on at positions that are too small, among
#   those of its own tokens; after a text, a chat about an image goes on at positions that are too large. No error, no warning.
# Seen: random weights, an image of 8 x 8 tokens, 12 greedy tokens of a second turn, for Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3.5.
#   A chat without images, after a question about an image: 1, 0, 0 and 1 tokens as without a cache, logits off by 4.1, 8.8, 6.6 and
#   8.6. A chat about an image, after a text: 0, 0, 0 and 1 tokens, logits off by 6.5, 8.9, 4.2 and 1.4. After nothing else, and
#   after a question of its own kind: all 12, logits off by at most 5e-6.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0
OMP_NUM_THREADS=1 TRANSFORMERS_VERBOSITY=error "$dir/venv/bin/python" -W error::UserWarning - <<'PY'
import sys

import torch
from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig, Qwen2VLConfig, Qwen3_5Config, Qwen3VLConfig

IMAGE, NEW = 150, 12
TEXT = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 32, "vocab_size": 200, "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 199, "pad_token_id": 0,
    "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0},
}
VISION = {
    "depth": 1, "hidden_size": 32, "num_heads": 2, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3,
    "intermediate_size": 64, "out_hidden_size": 64,
}
PLACED = VISION | {"num_position_embeddings": 64}
ROTATED = TEXT["rope_parameters"] | {"mrope_interleaved": True, "partial_rotary_factor": 1.0}
MODELS = {
    Qwen2VLConfig: (TEXT, VISION | {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}),
    Qwen2_5_VLConfig: (TEXT, VISION | {"fullatt_block_indexes": [0], "window_size": 56}),
    Qwen3VLConfig: (TEXT | {"rope_parameters": ROTATED}, PLACED | {"deepstack_visual_indexes": [0]}),
    Qwen3_5Config: (TEXT | {"rope_parameters": ROTATED, "layer_types": ["full_attention"] * 2}, PLACED),
}


def make(kind):
    torch.manual_seed(0)
    text, vision = MODELS[kind]
    config = kind(
        text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=151, vision_start_token_id=152,
        vision_end_token_id=153,
    )
    model = AutoModelForImageTextToText.from_config(config).eval()
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.25)
    model.generation_config.eos_token_id = None
    return model


def say(model, ids, count=NEW, **inputs):
    """The call's output, with new tokens that are none of the markers of images."""
    return model.generate(
        ids, max_new_tokens=count, do_sample=False, suppress_tokens=[150, 151, 152, 153], return_dict_in_generate=True,
        output_logits=True, **inputs,
    )


def agreement(one, other):
    """New tokens that agree, and how far the logits of the first one are apart."""
    same = (one.sequences == other.sequences)[0, -NEW:].sum().item()
    return same, (one.logits[0] - other.logits[0]).abs().max().item()


torch.manual_seed(1)
words = torch.randint(0, 140, (1, 40))
marks = torch.tensor([[152, *[IMAGE] * 64, 153]])
question = torch.cat([words[:, :5], marks, words[:, 5:12]], 1)
image = {"pixel_values": torch.randn(256, 3 * 2 * 14 * 14), "image_grid_thw": torch.tensor([[1, 16, 16]])}
types = {"mm_token_type_ids": (question == IMAGE).long()}


def second_turn(model, first, inputs, between):
    """The second turn of a chat, asked with its cache after something else, against the same without a cache."""
    turn = say(model, first, 6, **inputs)
    between()
    ids = torch.cat([turn.sequences, words[:, :3]], 1)
    fresh = dict(inputs)
    if fresh:
        fresh["mm_token_type_ids"] = (ids == IMAGE).long()
    answer = say(model, ids, cache=turn.cache)
    return agreement(answer, say(model, ids, **fresh))


good = True
for kind in MODELS:
    model = make(kind)
    others = {
        "nothing": lambda: None,
        "a text": lambda: say(model, words[:, :20], 2),
        "an image": lambda: say(model, question, 2, **image, **types),
    }
    for name, first, inputs, wrong in (("text", words, {}, "an image"), ("image", question, image | types, "a text")):
        found = {between: second_turn(model, first, inputs, other) for between, other in others.items()}
        print(f"{kind.__name__}, chat about {name}:", *(
            f"after {between} {same} of {NEW} tokens as without a cache, logits off by {off:.2g};" for between, (same, off) in found.items()
        ))
        good &= found.pop(wrong)[1] > 0.5 and all(same == NEW and off < 1e-3 for same, off in found.values())
sys.exit(not good)
PY
echo "as described: chats go on at the positions of others"
