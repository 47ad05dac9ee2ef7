"""Tiny random vision-language models: two text layers, one vision layer, and a text with one image for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf

IMAGE = 100
"""The token that an image's features take the place of."""
_TEXT: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip
_QWEN_VISION: dict[str, Any] = {
    "depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64, "patch_size": 4,
    "spatial_merge_size": 2, "temporal_patch_size": 2,
}  # fmt: skip
_QWEN_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": 101,
    "vision_start_token_id": 102,
    "vision_end_token_id": 103,
}
_MROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}


@dataclass(frozen=True)
class Vlm:
    """One family: its class, its config, how many tokens one image takes, and what comes with the text."""

    kind: str
    config: Callable[[], Any]
    image_tokens: int
    image: dict[str, Any]


def _pixels(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def _clip(size: int) -> dict[str, Any]:
    return {**_VISION, "image_size": size, "model_type": "clip_vision_model", "projection_dim": 32}


# fmt: off
VLMS: dict[str, Vlm] = {
    "gemma3": Vlm("Gemma3ForConditionalGeneration", lambda: hf.Gemma3Config(
        text_config={**_TEXT, "head_dim": 32, "sliding_window": 8, "query_pre_attn_scalar": 24,
                     "layer_types": ["sliding_attention", "full_attention"]},
        vision_config=_VISION, mm_tokens_per_image=4, image_token_index=IMAGE, boi_token_index=101, eoi_token_index=102,
    ), 4, {"pixel_values": _pixels(1, 3, 16, 16)}),
    "llava": Vlm("LlavaForConditionalGeneration", lambda: hf.LlavaConfig(
        text_config={**_TEXT, "model_type": "llama"}, vision_config=_clip(8), image_token_index=IMAGE,
        image_seq_length=4, vision_feature_layer=-1,
    ), 4, {"pixel_values": _pixels(1, 3, 8, 8)}),
    "mistral3": Vlm("Mistral3ForConditionalGeneration", lambda: hf.Mistral3Config(
        text_config={**_TEXT, "model_type": "mistral", "head_dim": 16, "sliding_window": None},
        vision_config={**_VISION, "model_type": "pixtral", "head_dim": 16}, image_token_index=IMAGE,
        spatial_merge_size=2, vision_feature_layer=-1,
    ), 4, {"pixel_values": _pixels(1, 3, 16, 16), "image_sizes": torch.tensor([[16, 16]])}),
    "qwen2_5_vl": Vlm("Qwen2_5_VLForConditionalGeneration", lambda: hf.Qwen2_5_VLConfig(
        text_config={**_TEXT, "rope_parameters": _MROPE},
        vision_config={**_QWEN_VISION, "window_size": 16, "fullatt_block_indexes": [0]}, **_QWEN_TOKENS,
    ), 6, {"pixel_values": _pixels(24, 96), "image_grid_thw": torch.tensor([[1, 4, 6]])}),
    "qwen3_vl": Vlm("Qwen3VLForConditionalGeneration", lambda: hf.Qwen3VLConfig(
        text_config={**_TEXT, "head_dim": 16, "rope_parameters": {**_MROPE, "mrope_interleaved": True}},
        vision_config={**_QWEN_VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}, **_QWEN_TOKENS,
    ), 6, {"pixel_values": _pixels(24, 96), "image_grid_thw": torch.tensor([[1, 4, 6]])}),
    "smolvlm": Vlm("SmolVLMForConditionalGeneration", lambda: hf.SmolVLMConfig(
        text_config={**_TEXT, "model_type": "llama"}, vision_config=_VISION, image_token_id=IMAGE, scale_factor=2,
        pad_token_id=0,
    ), 4, {"pixel_values": _pixels(1, 1, 3, 16, 16)}),
}
# fmt: on


def tiny_vlm(name: str) -> hf.PreTrainedModel:
    """A float32 model in eval mode; parameters that start as zeros or ones, which would hide the image, are random."""
    torch.manual_seed(0)
    model = getattr(hf, VLMS[name].kind)._from_config(VLMS[name].config(), dtype=torch.float32)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1 or not parameter.any():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=random))
    return model.eval()


def with_image(name: str) -> dict[str, Any]:
    """Arguments of a forward pass: a text with one image in it."""
    vlm = VLMS[name]
    ids = torch.tensor([[5, 6, 7, 102, *[IMAGE] * vlm.image_tokens, 103, 8, 9, 10, 11, 12]])
    kinds = (ids == IMAGE).long()
    types = {"gemma3": {"token_type_ids": kinds}}.get(name, {})
    if name.startswith("qwen"):
        types = {"mm_token_type_ids": kinds.int()}
    return {"input_ids": ids, **vlm.image, **types}
