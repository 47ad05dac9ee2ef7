"""Every decoder type that the installed transformers can build tiny: exact as `identity`, or refused in the plan."""

import pytest
import torch
import transformers
from families import random_model
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import surgery
from surgery import PlanError, UnsupportedModel

SIZES = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "initializer_range": 0.2,
    "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "d_model": 64, "n_layers": 2, "n_heads": 4,
    "num_layers": 2, "num_heads": 4, "ffn_dim": 96, "word_embed_proj_dim": 64, "rotary_dim": 16, "ffn_hidden_size": 96,
    "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 96, "d_ff": 96, "d_kv": 16,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "moe_intermediate_size": 32, "moe_topk": 2, "shared_expert_intermediate_size": 32,
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "first_k_dense_replace": 1, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 8,
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
"""Small values of fields that configs call so."""
MOST = 20_000_000
"""Parameters: a type whose default sizes go by names that are not listed above is left out."""

TYPES = sorted(kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if kind in CONFIG_MAPPING)


def tiny(kind):
    """A random model of a type; skips where it cannot be built small."""
    cls = CONFIG_MAPPING[kind]
    try:
        known = cls().to_dict()
        config = cls(**{name: value for name, value in SIZES.items() if name in known})
        if getattr(config, "is_encoder_decoder", False):
            pytest.skip(f"{kind}: has an encoder")
        if hasattr(config, "is_decoder"):
            config.is_decoder = True
        with torch.device("meta"):
            made = transformers.AutoModelForCausalLM.from_config(config)
        if sum(p.numel() for p in made.parameters()) > MOST:
            pytest.skip(f"{kind}: is not small with these sizes")
        return random_model(config)
    except pytest.skip.Exception:
        raise
    except Exception as error:
        pytest.skip(f"{kind}: cannot be built with these sizes ({type(error).__name__})")


@torch.inference_mode()
def greedy(model, ids, tokens=16):
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, use_cache=True,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return out[:, ids.shape[1] :].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("kind", TYPES)
def test_identity_is_exact_or_refused_in_the_plan(kind):
    parent = tiny(kind)
    ids = torch.randint(8, 128, (2, 12), generator=torch.Generator().manual_seed(0))
    try:
        with torch.inference_mode():
            wanted = parent(input_ids=ids, use_cache=False).logits
        said = greedy(parent, ids)
    except Exception as error:
        pytest.skip(f"{kind}: the parent itself does not run so ({type(error).__name__})")
    try:
        surgery.plan(parent, "identity")
    except (PlanError, UnsupportedModel):
        return
    child = surgery.convert(parent, "identity").eval()
    with torch.inference_mode():
        found = child(input_ids=ids, use_cache=False).logits
    assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max().clamp_min(1)
    assert greedy(child, ids) == said


REFUSED = {
    "openai-gpt": "its forward takes no cache",
    "roc_bert": "its cache is a EncoderDecoderCache",
    "internlm3": "registers a class for one config, and its own is made for LlamaConfig",
}


@pytest.mark.parametrize("kind", sorted(REFUSED.keys() & set(TYPES)))
def test_what_cannot_be_converted_is_refused_in_the_plan(kind):
    with pytest.raises((PlanError, UnsupportedModel), match=REFUSED[kind]):
        surgery.plan(tiny(kind), "identity")
