"""Text continued by compiled steps is the same text, and steps are compiled where that takes less time."""

from __future__ import annotations

import copy
import logging
from functools import partial
from itertools import chain, count
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import tiny_model
from tokenizing import said, word_tokenizer
from transformers import CompileConfig

import surgery
from surgery import compiled_steps

PROMPT, TOKENS = said(*range(8, 30)), 16
says = partial(surgery.generate, prompt=PROMPT, tokens=TOKENS, tokenizer=word_tokenizer())


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    parent = tiny_model("llama").eval()
    recipes = {
        "gqa": "gqa-2x",
        "int4": "kv-int4",
        "evict": {"steps": [{"rewriter": "evict", "scorer": "snapkv", "ratio": 2}]},
    }
    return {"parent": parent} | {name: surgery.convert(parent, recipe) for name, recipe in recipes.items()}


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch, models: dict[str, Any]) -> list[bool]:
    """Whether each call of `model.generate` was to compile; nothing is compiled in earnest."""
    monkeypatch.setattr(compiled_steps, "CompileConfig", partial(CompileConfig, backend="eager", mode=None))
    found: list[bool] = []
    for model in models.values():

        def generate(_generate: Any = model.generate, **options: Any) -> Any:
            found.append("compile_config" in options)
            return _generate(**options)

        monkeypatch.setattr(model, "generate", generate)
    torch.compiler.reset()
    return found


@pytest.mark.parametrize(("name", "temperature"), [("parent", 0.0), ("gqa", 0.8), ("int4", 0.0), ("evict", 0.0)])
def test_the_text_is_that_of_plain_steps(
    models: dict[str, Any], runs: list[bool], name: str, temperature: float
) -> None:
    plain = says(models[name], temperature=temperature, compiled=False)
    assert says(models[name], temperature=temperature, compiled=True) == plain
    assert runs == [False, True] and len(plain) > len(PROMPT)


def test_copies_and_hooks_of_a_model_that_was_compiled_count(models: dict[str, Any], runs: list[bool]) -> None:
    """A copy has the compiled call of its original, and hooks are not seen by what was compiled before, unless told."""
    first = says(models["parent"], compiled=True)
    copied = copy.deepcopy(models["parent"])
    del copied.generate  # that of the other one, which is noted
    copied.generation_config.return_dict_in_generate = True
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(1 + 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    other = says(copied, compiled=False)
    assert says(copied, compiled=True) == other != first and other.startswith(PROMPT)
    handle = copied.model.layers[0].register_forward_hook(lambda _, inputs, output: output / 2)
    halved = says(copied, compiled=False)
    assert says(copied, compiled=True) == halved != other
    handle.remove()
    assert says(copied, compiled=True) == other


def test_a_short_text_is_not_worth_it(models: dict[str, Any], runs: list[bool]) -> None:
    assert says(models["gqa"]).startswith(PROMPT)
    assert runs == [False]


@pytest.mark.parametrize("speed", ["faster", "slower", "fails"])
def test_a_long_one_is_where_compiled_steps_are_faster(
    models: dict[str, Any],
    runs: list[bool],
    speed: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    plain = says(models["gqa"], compiled=False)
    monkeypatch.setattr(compiled_steps, "SECONDS_PER_LAYER", 0.0)
    monkeypatch.setattr(compiled_steps, "SAVED", 1e6)
    clock = chain(range(4), count(4, 0.1 if speed == "faster" else 2))  # the start, the first token, two plain steps
    monkeypatch.setattr(compiled_steps, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    if speed == "fails":
        monkeypatch.setattr(compiled_steps, "CompileConfig", partial(CompileConfig, backend="no such backend"))
    with caplog.at_level(logging.INFO, "surgery"):
        assert says(models["gqa"]) == plain
    assert runs == [False, False, True] + ([] if speed == "faster" else [False])
    said = {"faster": "a compiled step takes 100 ms", "slower": "are no faster", "fails": "cannot be compiled"}
    assert f"a step takes 1000 ms, and {TOKENS} are to come" in caplog.text and said[speed] in caplog.text
