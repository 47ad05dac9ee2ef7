"""Every shipped recipe through what users call: what is planned is made, allocated, stored and loaded again."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from families import tiny_model
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

import surgery
from surgery.measure.memory import cache_size
from surgery.recipe import Recipe, shipped_recipes
from surgery.runtime.layout import LayerPlan

pytestmark = [pytest.mark.public, pytest.mark.filterwarnings("ignore:.*calibration tokens to fit")]

TEXT = torch.randint(3, 128, (8, 32), generator=torch.Generator().manual_seed(0))
PROMPT = TEXT[:2, :24]
GREEDY = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}

REPRESENTATIVE = ["identity", "gqa-2x", "mla-4x", "lowrank-2x", "cla2", "window-1k", "dms-4x"]
"""Each axis, and each way to make it."""
FAMILIES = ["qwen3", "gemma2", "gpt_neox", "gpt2", "gpt_oss"]
"""Key norms, soft cap and windows, fused partial rotary, Conv1D and learned positions, sinks."""
WINDOWED = ["gemma2", "gpt_oss"]
TEXT_DECIDES = ["lowrank-3x", "mla-8x", "window-1k", "duo-2x"]
"""How many numbers or tokens a layer keeps. Of others the text decides no more than what these stand for."""
REFUSED = {
    ("mla-4x", "qwen3"): "mla, but the keys are normed per head",
    **{("cla2", family): "layer 1 cannot read the cache of layer 0: a window of all" for family in WINDOWED},
    **{(n, f): "sees the newest 8 tokens only.*Layers that can: 1" for n in ("window-1k", "dms-4x") for f in WINDOWED},
}
LEFT = [
    *(("identity", family) for family in FAMILIES),  # test_public_door.py
    *((name, "gpt_neox") for name in ("gqa-2x", "lowrank-2x", "cla2", "window-1k")),
    *((name, "gpt2") for name in ("mla-4x", "window-1k")),
]
"""Pairs for `-m slow`: each pair takes two seconds, and each recipe and family is among the others."""
PAIRS = [
    *((name, "llama") for name in shipped_recipes()),
    *(
        pytest.param(name, family, marks=pytest.mark.slow if (name, family) in LEFT else ())
        for name in REPRESENTATIVE
        for family in FAMILIES
        if (name, family) not in REFUSED
    ),
]
RETURNED = ["identity", "gqa-2x", "mla-8x", "lowrank-3x", "cla2", "cla2-latent", "window-1k", "dmc-4x"]
"""Recipes whose returned plans stand for those of the others, which `-m slow` converts from folders too."""
CODED = ("kv-int8", "kv-int4", "kv-3bit", "kv-2bit", "gqa-2x-int4", "mla-4x-int4", "cla2-int4")
TOKENS = {"window-1k": 1500, "dmc-4x": 5, **dict.fromkeys(CODED, 150)}
"""Beyond the window; as many as gates never average, whose bytes are known before they are trained; some groups."""


@functools.cache
def parent(family: str) -> PreTrainedModel:
    """Positions for every window; llama has layers and KV heads enough for every recipe."""
    more = {"num_hidden_layers": 4, "num_key_value_heads": 4} if family == "llama" else {}
    return tiny_model(family, max_position_embeddings=4096, **more)


@functools.cache
def anatomy(family: str) -> surgery.Anatomy:
    return surgery.examine(parent(family))


def quick(name: str) -> Recipe:
    """The recipe without the fit of gains, which takes most of the time and moves no shape."""
    steps = Recipe.load(name).steps
    changes = [f"steps.{i}.gain_fit=false" for i, step in enumerate(steps) if hasattr(step, "gain_fit")]
    if name == "mlkv-4":  # its four layers with caches are all that the models here have
        changes.append("steps.1.layout=mlkv(layers=2)")
    return Recipe.load(name, changes)


def plan_and_text(name: str, family: str) -> tuple[surgery.Plan, torch.Tensor | None]:
    plan = surgery.plan(anatomy(family), quick(name))
    text = TEXT.repeat(1, 3) if name == "duo-2x" else TEXT  # longer than what streaming heads keep
    return plan, text if plan.wants_calibration else None


@functools.cache
def converted(name: str, family: str) -> PreTrainedModel:
    return surgery.convert(parent(family), quick(name), calibration=plan_and_text(name, family)[1])


def layers_of(config: PreTrainedConfig) -> list[LayerPlan]:
    """What a config says of each layer; of a result in the parent's own class, in its provenance."""
    stored = config.surgery
    layers = [layer["plan"] for layer in stored["layers"]] if "layers" in stored else stored["plan"]["layers"]
    return [LayerPlan.from_dict(layer) for layer in layers]


@pytest.mark.parametrize(("name", "family"), PAIRS)
@torch.no_grad()
def test_what_is_planned_is_made_allocated_and_loaded_again(name: str, family: str, tmp_path: Path) -> None:
    plan, text = plan_and_text(name, family)
    child = converted(name, family)
    assert (type(child) is type(parent(family))) == plan.native
    surgery.save(child, tmp_path / "child")
    # The default of some releases ignores soft caps: loaded, a parent is another model there, too.
    loaded = surgery.load(tmp_path / "child", attn_implementation=child.config._attn_implementation)
    assert torch.equal(loaded(PROMPT).logits, child(PROMPT).logits)
    said = loaded.generate(PROMPT, **GREEDY)
    assert said.shape == (2, 24 + 8)
    assert torch.equal(said, loaded.generate(PROMPT, **GREEDY, use_cache=False))

    layers, tokens = layers_of(loaded.config), TOKENS.get(name, 24)
    assert layers == layers_of(child.config)
    if text is None:
        assert layers == list(plan.after)
    if name not in TEXT_DECIDES:
        assert [layer.bytes_at(tokens) for layer in layers] == [layer.bytes_at(tokens) for layer in plan.after]
    size = cache_size(loaded, TEXT.flatten().repeat(8)[None, :tokens])
    assert size.bytes == sum(layer.bytes_at(tokens) for layer in layers)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in RETURNED else pytest.mark.slow) for name in shipped_recipes()]
)
def test_the_plan_that_is_returned_is_the_one_that_is_stored(name: str, tmp_path: Path) -> None:
    first, text = plan_and_text(name, "llama")
    parent("llama").save_pretrained(tmp_path / "parent")
    plan = surgery.convert_checkpoint(tmp_path / "parent", quick(name), tmp_path / "child", calibration=text)
    config = AutoConfig.from_pretrained(tmp_path / "child")
    assert list(plan.after) == layers_of(config) == layers_of(converted(name, "llama").config)
    assert plan.parameters == sum(p.numel() for p in converted(name, "llama").parameters())
    assert text is not None or plan.after == first.after


@pytest.mark.parametrize(("name", "family"), REFUSED)
def test_what_a_family_has_no_form_for_is_refused_while_planning(name: str, family: str) -> None:
    with pytest.raises(surgery.PlanError, match=REFUSED[name, family]):
        surgery.plan(anatomy(family), quick(name))
