"""A cache reaches converted attention whatever a release calls it, and a model that would ignore it raises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from closeness import assert_close
from families import tiny_model
from methods import converted, parent
from test_runtime import GREEDY, tokens
from torch import nn
from transformers.cache_utils import Cache
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from surgery.anatomy import examine
from surgery.errors import UnsupportedModel
from surgery.runtime.attention import SurgeryAttention
from surgery.runtime.calling import cache_argument, cache_of


def without_cache(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {name: value for name, value in kwargs.items() if not isinstance(value, Cache)}


def renamed_cache(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {"kv_store" if isinstance(value, Cache) else name: value for name, value in kwargs.items()}


def hook_attentions(model: nn.Module, change: Any) -> None:
    for module in model.modules():
        if isinstance(module, SurgeryAttention):
            module.register_forward_pre_hook(lambda _, args, kwargs: change(args, kwargs), with_kwargs=True)


@torch.no_grad()
def test_cache_under_an_unknown_name_is_used() -> None:
    model = converted("identity", "llama")
    want = model.generate(tokens(), **GREEDY)
    hook_attentions(model, renamed_cache)
    assert torch.equal(model.generate(tokens(), **GREEDY), want)


@torch.no_grad()
def test_attention_without_the_cache_raises_and_names_arguments_and_version() -> None:
    model = converted("identity", "llama")
    hook_attentions(model, without_cache)
    with pytest.raises(RuntimeError, match=f"layer 0.*received none.*{transformers.__version__}.*position_embeddings"):
        model.generate(tokens(), **GREEDY)
    model(tokens(), use_cache=False)  # nothing was asked for


def test_training_with_activation_checkpointing_takes_the_cache_away_in_peace() -> None:
    model = converted("identity", "llama").train()
    model.gradient_checkpointing_enable()
    model(tokens(), use_cache=True, labels=tokens()).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_anatomy_refuses_a_release_that_hides_the_cache_from_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = tiny_model("llama")
    stock = LlamaDecoderLayer.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return stock(self, *args, **without_cache(args, kwargs)[1])

    examine(ours)
    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
    with pytest.raises(UnsupportedModel, match=rf"layers\.0\.self_attn.*{transformers.__version__}.*attention_mask"):
        examine(ours)


@torch.no_grad()
def test_names_of_the_cache_are_those_of_the_installed_release() -> None:
    model = parent("llama")
    newer = tuple(int(n) for n in transformers.__version__.split(".")[:2]) >= (5, 24)
    assert cache_argument(model) == ("cache" if newer else "past_key_values")
    first = model(tokens()[:, :5], use_cache=True)
    step = model(tokens()[:, 5:6], use_cache=True, **{cache_argument(model): cache_of(first)})
    assert isinstance(cache_of(first), Cache) and cache_of(step) is cache_of(first)
    assert cache_of(model(tokens(), use_cache=True, return_dict=False)) is not None
    assert cache_of(model(tokens(), use_cache=False)) is None
    assert_close(step.logits[:, 0], model(tokens()[:, :6], use_cache=False).logits[:, -1])
