"""Attention modules that are replaced: every part is accounted for, gates included, or the plan says why not."""

import pytest
import torch
import transformers as hf
from families import random_model
from torch import nn

import surgery
from surgery import PlanError
from surgery.runtime.layout import AttentionSite

SMALL = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "initializer_range": 0.3,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
IDS = torch.randint(3, 120, (2, 20), generator=torch.Generator().manual_seed(0))
IDENTITY = "identity"
WINDOW = {"steps": [{"rewriter": "evict", "window": 64}]}


def laguna(gating):
    return hf.LagunaConfig(
        **SMALL, **MOE, shared_expert_intermediate_size=16, gating=gating, num_attention_heads_per_layer=[4, 4],
        layer_types=["full_attention"] * 2, mlp_layer_types=["dense"] * 2,
    )  # fmt: skip


GATED = {
    # rows of q's own parameter, one for each channel
    "qwen3_next": lambda: hf.Qwen3NextConfig(
        **SMALL, **MOE, shared_expert_intermediate_size=16, layer_types=["full_attention"] * 2, linear_num_key_heads=2,
        linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8,
    ),
    # a projection of its own
    "afmoe": lambda: hf.AfmoeConfig(
        **SMALL, **MOE, num_dense_layers=2, layer_types=["full_attention"] * 2, num_shared_experts=1,
    ),
    # softplus, one number for a whole head
    "laguna": lambda: laguna("per-head"),
    "laguna_channels": lambda: laguna("per-element"),
}  # fmt: skip


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("kind", GATED)
def test_gated_outputs_are_read_and_run_as_the_parent_runs_them(tmp_path, kind):
    parent = random_model(GATED[kind]())
    sites = surgery.examine(parent).sites
    assert all(site.gate is not None and AttentionSite.from_dict(site.to_dict()) == site for site in sites)
    surgery.save(surgery.convert(parent, IDENTITY), tmp_path / "child")
    child = surgery.load(tmp_path / "child")
    assert (logits(child) - logits(parent)).abs().max() <= 1e-5 * logits(parent).abs().max()
    asked = {"max_new_tokens": 6, "do_sample": False}
    assert child.generate(IDS[:1], **asked).equal(parent.generate(IDS[:1], **asked))


def test_gates_stay_where_tokens_leave():
    """A window as long as the text drops nothing."""
    parent = random_model(GATED["afmoe"]())
    child = surgery.convert(parent, WINDOW)
    asked = {"max_new_tokens": 6, "do_sample": False}
    assert child.generate(IDS[:1], **asked).equal(parent.generate(IDS[:1], **asked))
    assert (logits(child) - logits(parent)).abs().max() <= 1e-5 * logits(parent).abs().max()


def japanese():
    return random_model(
        hf.GPTNeoXJapaneseConfig(
            vocab_size=128, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64,
            intermediate_multiple_size=2,
        )
    )  # fmt: skip


def bert():
    return random_model(
        hf.BertConfig(
            vocab_size=128, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
            max_position_embeddings=64, is_decoder=True,
        )
    )  # fmt: skip


def zamba2():
    return random_model(
        hf.Zamba2Config(
            vocab_size=128, hidden_size=32, num_hidden_layers=2, hybrid_layer_ids=[1], num_attention_heads=4,
            intermediate_size=48, mamba_d_state=8, n_mamba_heads=4, mamba_ngroups=1, chunk_size=8, num_mem_blocks=1,
            max_position_embeddings=64, use_shared_attention_adapter=False, layers_block_type=["mamba", "hybrid"],
        )
    )  # fmt: skip


class Reading(hf.models.llama.modeling_llama.LlamaDecoderLayer):
    """Runs a part of its attention itself."""

    def forward(self, hidden_states, **kwargs):
        hidden_states = super().forward(hidden_states, **kwargs)
        return hidden_states + 0.1 * self.self_attn.v_proj(hidden_states).repeat(1, 1, 2)


class Asking(hf.models.llama.modeling_llama.LlamaDecoderLayer):
    """Asks its attention for a number that only the parent's class has."""

    def forward(self, hidden_states, **kwargs):
        return super().forward(hidden_states, **kwargs) * self.self_attn.factor


class AskedAttention(hf.models.llama.modeling_llama.LlamaAttention):
    factor = 0.5


class Gating(hf.models.llama.modeling_llama.LlamaAttention):
    """Gates with a function that is none of the known ones."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.gate = nn.Linear(32, 32)
        self.o_proj.register_forward_pre_hook(lambda _, inputs: (inputs[0] * self.last,))

    def forward(self, hidden_states, *args, **kwargs):
        self.last = self.gate(hidden_states).sin() + 1
        return super().forward(hidden_states, *args, **kwargs)


def changed(monkeypatch, **classes):
    for name, kind in classes.items():
        monkeypatch.setattr(hf.models.llama.modeling_llama, name, kind)
    return random_model(hf.LlamaConfig(**SMALL))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda patch: japanese(), r"layer 1: .*dense_bias has no place in the attention"),
        (lambda patch: bert(), r"does not apply bert.encoder.layer.0.attention.output.dense.bias itself"),
        (lambda patch: zamba2(), r"its caller says which it writes"),
        (lambda patch: changed(patch, LlamaDecoderLayer=Reading), r"v_proj.*, a part of it, is used by model.layers.0"),
        (
            lambda patch: changed(patch, LlamaDecoderLayer=Asking, LlamaAttention=AskedAttention),
            r"its attribute 'factor' is read from outside",
        ),
        (lambda patch: changed(patch, LlamaAttention=Gating), r"gated in a way that no description holds"),
    ],
    ids=["parameter", "projection", "cache layer", "child", "attribute", "gate"],
)
def test_attention_that_cannot_be_taken_out_is_refused_in_the_plan(monkeypatch, make, reason):
    parent = make(monkeypatch)
    with pytest.raises(PlanError, match=reason):
        surgery.plan(parent, IDENTITY)


def test_attention_that_stays_in_its_place_may_be_used_by_others(monkeypatch):
    """Fewer heads in the parent's own class replace no module."""
    parent = changed(monkeypatch, LlamaDecoderLayer=Asking, LlamaAttention=AskedAttention)
    child = surgery.convert(parent, {"steps": [{"rewriter": "gqa", "kv_heads": "1/1"}]})
    assert type(child) is type(parent) and logits(child).equal(logits(parent))
