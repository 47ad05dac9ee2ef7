"""Every option of every method changes the result, or the recipe that names it is refused, beside each value of those
options that decide between forms. A new option is taken up by itself; `VALUES` has what its type does not tell.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import typing
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import pytest
import torch
from families import tiny_model
from layerwise import random_windows

import surgery
from surgery.anatomy import Anatomy, examine
from surgery.calibration.text import Windows
from surgery.calibration.visit import Visit
from surgery.calibration.working_copy import WorkingCopy
from surgery.convert import carry_out_steps
from surgery.rewriters import REWRITERS, options_of
from surgery.runtime.budgets import BUDGETS
from surgery.runtime.codecs import CODECS
from surgery.runtime.merging import MERGES
from surgery.runtime.rankers import RANKERS
from surgery.runtime.reading import READERS
from surgery.runtime.scorers import SCORERS

Step = dict[str, Any]

BASES: dict[str, list[Step]] = {
    "dmc": [{}],
    "dms": [{"window": 16}, {"window": 16, "gate": "head", "ratio": 2}],
    "evict": [
        {"scorer": "streaming"},
        *({"scorer": name, "window": 16} for name in SCORERS),
        *({"scorer": name} | ({"separators": [7, 9]} if name == "sepllm" else {}) for name in RANKERS),
        *({"scorer": "snapkv", "budget": name} for name in BUDGETS),
        *({"scorer": "h2o", "merge": name} for name in MERGES),
        *({"scorer": "streaming", "read": name} for name in READERS),
        *({"scorer": "streaming", "positions": name} for name in ("cache", "capped")),
    ],
    "gqa": [
        *({"kv_heads": 2, "init": init} for init in ("rank1", "aligned", "mean", "asym", "qcqa")),
        {"kv_heads": 2, "init": "key_norm", "layers": "2"},
        {"kv_heads": 2, "init": "asym", "equal_groups": False},
        {"groups": [[0, 3], [1, 2]], "init": "key_norm"},
    ],
    "identity": [{}],
    "lowrank": [
        {"keep": 0.5, "k_share": 0.4} | more
        for more in ({}, {"layout": "grouped", "group": 2}, {"layout": "head"}, {"layout": "freq"}, {"init": "plain"})
    ] + [{"rank": 30}],
    "mla": [{"rank": 16, "rope_dims": 8} | more for more in ({}, {"init": "svd"})] + [{"keep": 0.4}],
    "quantise": [
        *({"codec": codec} for codec in CODECS),
        {"codec": "metric", "bits": "sensitivity", "bits_per_number": 6.0},
        {"think": 0.5},
    ],
    "share": [
        {"layout": {2: 1}} | more for more in ({}, {"init": "latent"}, {"init": "mean"}, {"init": "replace"})
    ] + [{"layout": "svformer"}, {"layout": "mlkv", "kv_layers": 2}],
}  # fmt: skip
"""What the options of a method are tried beside: each value that decides which others are read."""
VALUES: dict[str, list[Any]] = {
    "layers": ["1", "0,1"], "window": [12, 20], "groups": [[[0, 2], [1, 3]], [[0, 1], [2, 3]]], "kv_heads": [1],
    "keep": [0.3], "rank": [18],
    "rope_dims": [6], "k_share": [0.3], "mean_split": [True, False], "rotation": ["none", "real"],
    "selector": ["low", "high"], "layout": [{1: 0}, "head"], "kv_layers": [1, 2], "gain_fit": [True, False],
    "beta": [0.3],
    "codec": [*CODECS], "k_bits": [2, 3, 5], "v_bits": [2, 3, 5], "bits_per_number": [7.0], "think": [0.25],
    "scorer": ["tova", "h2o"], "budget": ["pyramid", "ada"], "merge": ["lookm", "d2o"], "positions": ["text", "cache"],
    "slots": [150], "distance": [40], "whole": [{0: [1]}], "part": [0.2], "separators": [[3]],
    "read": ["quest", "sparq"],
    "read_ratio": [2.0], "recent": [70], "observe": [16], "pool": [3], "page": [32], "group": [1, 16],
}  # fmt: skip
"""By option, some values; for those whose type says none."""
SHARED_OUT = {"ranks", "windows"}
"""What these do shows in text on which layers differ: `test_latent_steps.py`, `test_gates.py`."""
NEVER_ALONE = {"identity": {"layers"}, "quantise": {"bits"}}
"""Options that are refused beside every base: `bits` asks for another option beside it."""
FITS = {"refit_queries", "refit_output", "gain_fit", "refine"}
"""Tried beside the first base alone: they are fitted after the form is made, alike in all."""


def values_of(hint: Any, option: dataclasses.Field[Any]) -> Sequence[Any]:
    """Values of an option, its default among them or not."""
    if option.name in VALUES:
        return VALUES[option.name]
    if hint is bool:
        return [True, False]
    if hint in (int, float):
        return [option.default + 2]
    assert typing.get_origin(hint) is Literal, f"give VALUES some of {option.name}"
    return typing.get_args(hint)


@functools.cache
def parent() -> tuple[Any, Anatomy, Windows]:
    shape = {"hidden_size": 32, "intermediate_size": 16, "num_attention_heads": 4, "num_key_value_heads": 4}
    model = tiny_model("llama", **shape, head_dim=8, num_hidden_layers=3, max_position_embeddings=4096)
    with torch.no_grad():
        model.model.layers[2].self_attn.k_proj.weight[:8] *= 4  # `key_norm` gives a long key more queries
    return model, examine(model), random_windows(4, 8, cut=False)


def made(step: Step, with_text: bool = True) -> Any:
    """What a step makes of the parent, or the sentence by which it is refused."""
    model, anatomy, windows = parent()
    try:
        plan = surgery.plan(anatomy, {"steps": [step]})
    except surgery.SurgeryError as error:
        return str(error)
    if step["rewriter"] not in ("gqa", "mla", "lowrank", "share"):
        return plan.after, plan.needs_calibration  # text and runtime do as the plan says
    copy = WorkingCopy(model, anatomy)
    carry_out_steps(copy, plan, windows if with_text or plan.needs_calibration else None, seed=0)
    return [(copy.settle(layer), copy.canonical(layer.layer)) for layer in plan.after]


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, str) or isinstance(b, str) or isinstance(a, tuple):
        return bool(a == b)
    return all(
        p == q and x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)
        for (p, x), (q, y) in zip(a, b, strict=True)
    )


def ignored(method: str, reached: set[str]) -> Iterator[str]:
    """Recipes in which an option neither changes anything nor is refused; `reached` gets those that change it."""
    kind = options_of(method)
    hints = typing.get_type_hints(kind)
    for place, base in enumerate(BASES[method]):
        base = ({"layers": "1"} if method in ("gqa", "lowrank", "mla") else {}) | base
        start = made({"rewriter": method, **base}, not place)
        assert not isinstance(start, str), (base, start)
        for option in dataclasses.fields(kind):
            if option.name in {"rewriter", *SHARED_OUT} or (place and option.name in FITS):
                continue
            default = base.get(option.name, option.default)
            others = [value for value in values_of(hints[option.name], option) if value != default]
            assert others, f"give VALUES another value of {option.name}"
            accepted = 0
            for value in others:
                result = made({"rewriter": method, **base, option.name: value}, not place)
                accepted += not isinstance(result, str)
                if not isinstance(result, str) and not equal(result, start):
                    reached.add(option.name)
                    break
                named = option.name in base or not isinstance(result, str) or option.name in result
                assert named, (base, option.name, result)
            else:
                if accepted:
                    yield f"{base} {option.name}: {others}"


@pytest.mark.parametrize("method", REWRITERS)
def test_options_change_the_result_or_are_refused(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    count = itertools.count()

    def falling(*_: Any, **__: Any) -> float:
        """What conversion keeps where it helps is kept: what is measured later is better."""
        return 1e6 - float(next(count)) ** 1.5

    monkeypatch.setattr(Visit, "error", falling)
    monkeypatch.setattr(WorkingCopy, "divergence", falling)
    reached: set[str] = set()
    assert not (found := list(ignored(method, reached))), "\n".join(found)
    options = {option.name for option in dataclasses.fields(options_of(method))} - {"rewriter", *SHARED_OUT}
    assert options - reached == NEVER_ALONE.get(method, set())


@pytest.mark.parametrize("given", [{"evict": "h2o", "scorer": "snapkv"}, {"codec": "int4", "rewriter": "identity"}])
def test_a_cache_is_not_told_its_method_twice(given: Step) -> None:
    with pytest.raises(surgery.PlanError, match="the arguments `codec` and `evict` say that"):
        surgery.cache(parent()[0], **given)
