#!/usr/bin/env bash
# transformers 5.24.0 (and 5.2.0, for comparison), torch 2.13.0 (CPU): `generate` of Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3.5 with
# the inputs that it took up to 5.2, which are tokens, pixels and grids.
#
# Guess: the tokens of an image are known by their id, which the config has, and the grid has their rows and columns. Code that
#   hands over `input_ids`, `pixel_values` and `image_grid_thw` by name gets the answer that it always got, or an error that names
#   what is missing. The model itself has such an error: "Multimodal data was passed (via `image_grid_thw` or `video_grid_thw`) but
#   `mm_token_type_ids` is missing".
# Behaviour: `generate` computes positions before it calls the model. Without `mm_token_type_ids` it counts all tokens in a row, as
#   in a text, and the model, which is given positions, raises nothing. The image is read as one long line of patches, and the text
#   behind it stands further away from the text before. No error, no warning. Processors return the new input since 5.3, but code
#   that picks the others by name, or builds its inputs by hand, does not pass it on. A direct call of Qwen2.5-VL raises nothing
#   either.
# Seen: random weights, an image of 8 x 8 tokens in a question of 78, 12 greedy tokens, for Qwen2-VL, Qwen2.5-VL, Qwen3-VL and
#   Qwen3.5. Without the types 1, 0, 0 and 1 tokens as with them, logits off by 7.6, 3.8, 2.9 and 1.7, and exactly what positions 0,
#   1, 2 and so on give. 5.2.0 without the types says what 5.24.0 says with them (the first three models, all 12 tokens). A direct
#   call without them raises an error, except for Qwen2.5-VL.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
cat > "$dir/images.py" <<'PY'
import json
import sys

import torch
import transformers
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

answers = sys.argv[1]
if transformers.__version__ == "5.2.0":
    before = {}
    for kind in MODELS:
        if kind is not Qwen3_5Config:  # 5.2.0 wants linear layers of it
            before[kind.__name__] = say(make(kind), question, **image).sequences[0, -NEW:].tolist()
    json.dump(before, open(answers, "w"))
    sys.exit()
before = json.load(open(answers))
good = True
for kind in MODELS:
    model = make(kind)
    bare, full = say(model, question, **image), say(model, question, **image, **types)
    same, off = agreement(bare, full)
    line = torch.arange(question.shape[1])[None, None].expand(4, -1, -1)
    row = agreement(bare, say(model, question, **image, **types, position_ids=line))
    old = before.get(kind.__name__)
    like = "-" if old is None else sum(a == b for a, b in zip(old, full.sequences[0, -NEW:].tolist()))
    try:
        model(input_ids=question, **image)
        direct = "no error"
    except ValueError as error:
        direct = str(error)[:27] + "..."
    print(
        f"{kind.__name__}: without the types {same} of {NEW} tokens as with them, logits off by {off:.2g}; without them as with "
        f"positions in a row {row[0]}, off by {row[1]:.2g}; 5.2.0 without them as with them {like}; the model itself: {direct}"
    )
    good &= off > 0.5 and same < NEW and row[0] == NEW and row[1] < 1e-3 and like in ("-", NEW)
    good &= direct != "no error" or kind is Qwen2_5_VLConfig
sys.exit(not good)
PY
for version in 5.2.0 5.24.0; do
    "$dir/venv/bin/pip" install -q torch==2.13.0 "transformers==$version"
    OMP_NUM_THREADS=1 TRANSFORMERS_VERBOSITY=error "$dir/venv/bin/python" -W error::UserWarning "$dir/images.py" "$dir/answers.json"
done
echo "as described: generate takes the patches of an image for a row of text"
