"""Tiny random models of every family: two layers (more where layer kinds alternate), hidden 64, vocabulary 128."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import nn

_COMMON: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 256, "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_GQA: dict[str, Any] = {**_COMMON, "num_key_value_heads": 2}


def _make(name: str, base: dict[str, Any] = _GQA, **changes: Any) -> Callable[..., Any]:
    return lambda **more: getattr(hf, name)(**{**base, **changes, **more})


def _only(name: str, **fields: Any) -> Callable[..., Any]:
    """For configs with field names of their own."""
    base = {"vocab_size": 128, "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return lambda **more: getattr(hf, name)(**{**base, **fields, **more})


_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
_LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64, "rope_theta": 10000.0,
}  # fmt: skip
_LONGROPE = {
    "rope_type": "longrope", "short_factor": [1.0 + 0.1 * i for i in range(8)], "rope_theta": 10000.0,
    "long_factor": [2.0 + 0.3 * i for i in range(8)], "original_max_position_embeddings": 64, "factor": 4.0,
}  # fmt: skip
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

# fmt: off
FAMILIES: dict[str, Callable[..., Any]] = {
    "llama": _make("LlamaConfig"),
    "llama_yarn": _make("LlamaConfig", rope_parameters=_YARN),
    "llama_llama3": _make("LlamaConfig", rope_parameters=_LLAMA3),
    "llama_dynamic": _make(
        "LlamaConfig", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    ),
    "llama_bias_wide": _make("LlamaConfig", attention_bias=True, head_dim=32),
    "mistral": _make("MistralConfig", sliding_window=8),
    "qwen2": _make("Qwen2Config"),
    "qwen3": _make("Qwen3Config", head_dim=32),
    "phi3": _make("Phi3Config"),
    "phi3_longrope": _make("Phi3Config", rope_parameters=_LONGROPE, original_max_position_embeddings=64),
    "phi": _make("PhiConfig", partial_rotary_factor=0.5),
    "phi_qk_norm": _make("PhiConfig", partial_rotary_factor=0.5, qk_layernorm=True),
    "gpt_neox": _make("GPTNeoXConfig", _COMMON, rotary_pct=0.25),
    "gpt2": _only("GPT2Config", n_embd=64, n_layer=2, n_head=4, n_positions=256),
    "gpt2_inverse": _only(
        "GPT2Config", n_embd=64, n_layer=2, n_head=4, n_positions=256, scale_attn_by_inverse_layer_idx=True
    ),
    "opt": _only(
        "OPTConfig", hidden_size=64, num_hidden_layers=2, num_attention_heads=4, ffn_dim=96, init_std=0.2,
        max_position_embeddings=256, word_embed_proj_dim=64,
    ),
    "gemma": _make("GemmaConfig", head_dim=32, num_key_value_heads=1),
    "gemma2": _make("Gemma2Config", head_dim=32, sliding_window=8, query_pre_attn_scalar=24),
    "gemma3": _make("Gemma3TextConfig", head_dim=32, sliding_window=8, num_hidden_layers=3,
                    layer_types=["sliding_attention", "sliding_attention", "full_attention"],
                    query_pre_attn_scalar=24),
    "olmo": _make("OlmoConfig", clip_qkv=1.0),
    "olmo2": _make("Olmo2Config"),
    "olmo3": _make("Olmo3Config", sliding_window=8, num_hidden_layers=4),
    "starcoder2": _make("Starcoder2Config", sliding_window=8),
    "stablelm": _make("StableLmConfig"),
    "stablelm_qk_norm": _make("StableLmConfig", use_qkv_bias=True, qk_layernorm=True),
    "falcon": _make("FalconConfig", new_decoder_architecture=True, num_kv_heads=2),
    "falcon_mqa": _make("FalconConfig", multi_query=True, new_decoder_architecture=False, bias=True),
    "falcon_alibi": _make("FalconConfig", alibi=True, multi_query=False, new_decoder_architecture=False),
    "bloom": _only("BloomConfig", hidden_size=64, n_layer=2, n_head=4),
    "bloom_odd": _only("BloomConfig", hidden_size=96, n_layer=2, n_head=6),
    "mpt": _only("MptConfig", d_model=64, n_heads=4, n_layers=2, max_seq_len=256, expansion_ratio=2),
    "gptj": _only("GPTJConfig", n_embd=64, n_layer=2, n_head=4, rotary_dim=8, n_positions=256),
    "codegen": _only("CodeGenConfig", n_embd=64, n_layer=2, n_head=4, rotary_dim=8, n_positions=256, n_ctx=256),
    "gpt_neo": _only("GPTNeoConfig", hidden_size=64, num_layers=2, num_heads=4, window_size=8,
                     attention_types=[[["global", "local"], 1]], max_position_embeddings=256, intermediate_size=96),
    "gpt_bigcode": _only("GPTBigCodeConfig", n_embd=64, n_layer=2, n_head=4, n_positions=256, n_inner=96),
    "cohere": _make("CohereConfig", logit_scale=0.5),
    "cohere_qk_norm": _make("CohereConfig", use_qk_norm=True),
    "cohere2": _make("Cohere2Config", sliding_window=8, num_hidden_layers=4),
    "granite": _make("GraniteConfig", attention_multiplier=0.1, residual_multiplier=0.5),
    "smollm3": _make("SmolLM3Config", num_hidden_layers=4),
    "gpt_oss": _make("GptOssConfig", head_dim=16, num_local_experts=4, sliding_window=8,
                     layer_types=["sliding_attention", "full_attention"]),
    "mixtral": _make("MixtralConfig", num_local_experts=4),
    "qwen3_moe": _make("Qwen3MoeConfig", head_dim=16, **_MOE),
    "nemotron": _make("NemotronConfig", partial_rotary_factor=0.5),
    "glm4": _make("Glm4Config", head_dim=16, partial_rotary_factor=0.5),
    "exaone4": _make("Exaone4Config", sliding_window=8, num_hidden_layers=4, sliding_window_pattern=4),
    "persimmon": _make("PersimmonConfig", _COMMON, partial_rotary_factor=0.5),
    "hunyuan": _make("HunYuanDenseV1Config", head_dim=16),
    "bamba": _make("BambaConfig", num_hidden_layers=3, attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head=16,
                   mamba_d_state=16, mamba_n_groups=1, mamba_chunk_size=8),
    "jamba": _make("JambaConfig", num_hidden_layers=3, attn_layer_offset=1, attn_layer_period=2, num_experts=2,
                   expert_layer_period=2, expert_layer_offset=1, mamba_d_state=8, mamba_dt_rank=4,
                   use_mamba_kernels=False),
    "dbrx": _only(
        "DbrxConfig", d_model=64, n_heads=4, n_layers=2, max_seq_len=256,
        attn_config={"clip_qkv": 2.0, "kv_n_heads": 2, "rope_theta": 10000.0},
        ffn_config={"ffn_hidden_size": 32, "moe_num_experts": 2, "moe_top_k": 1},
    ),
}
# fmt: on


def tiny_model(name: str, seed: int = 0, **changes: Any) -> hf.PreTrainedModel:
    """A model of that family, with `changes` of its config, as `random_model` makes it."""
    return random_model(FAMILIES[name](**changes), seed)


def tiny_config(kind: str, **changes: Any) -> hf.PreTrainedConfig:
    """The fields of most families, for a class of configs that is none of them."""
    return _make(kind, **changes)()


def random_model(config: hf.PreTrainedConfig, seed: int = 0) -> hf.PreTrainedModel:
    """A float32 CPU model in eval mode; every one-dimensional parameter (gains, biases, sinks) is made random."""
    torch.manual_seed(seed)
    # sdpa has no soft cap; some versions of transformers choose it all the same and leave the cap out in silence.
    attention = {"attn_implementation": "eager"} if getattr(config, "attn_logit_softcapping", None) else {}
    model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32, **attention)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1 or min(parameter.shape) <= 4:
                parameter.add_(0.4 * torch.randn(parameter.shape, generator=generator))
        for module in model.modules():
            # OLMo-2 and others: a gain near 1 for all heads hides a wrong head order; spread it.
            if isinstance(module, nn.LayerNorm) and module.bias is not None:
                module.bias.mul_(0.5)
    return model.eval()
