"""Recipes: what is read, and how errors name the place."""

import pytest

from surgery import Recipe, RecipeError
from surgery.recipe import GqaStep, parse_layers, shipped_recipes


def test_every_shipped_recipe_loads_and_survives_a_round_trip():
    assert {"gqa-2x", "gqa-4x", "mqa", "identity"} <= set(shipped_recipes())
    for name, description in shipped_recipes().items():
        recipe = Recipe.load(name)
        assert recipe.name == name
        assert description
        assert Recipe.load(recipe.to_dict()) == recipe


def test_yaml_file_and_dict_give_the_same_recipe(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("steps:\n- {rewriter: gqa, kv_heads: 4, layers: 0-3}\n")
    assert (
        Recipe.load(file).steps == Recipe.load({"steps": [{"rewriter": "gqa", "kv_heads": 4, "layers": "0-3"}]}).steps
    )


@pytest.mark.parametrize(("word", "value"), [("true", True), ("global", "global"), ("false", False)])
def test_gains_are_fitted_by_layers_or_globally_or_not_at_all(word, value):
    for name in ("gqa-2x", "cla2", "mla-2x"):
        found = Recipe.load(name, [f"gain_fit={word}"]).steps[0].gain_fit
        assert (type(found), found) == (type(value), value)


def test_overrides_reach_steps_and_uptrain():
    recipe = Recipe.load("gqa-2x", ["kv_heads=2", "steps.0.init=aligned", "uptrain.tokens=1e6"])
    step = recipe.steps[0]
    assert isinstance(step, GqaStep)
    assert (step.kv_heads, step.init) == (2, "aligned")
    assert recipe.uptrain is not None
    assert recipe.uptrain.tokens == 1_000_000


def test_null_takes_out_what_another_option_leaves_unread():
    with pytest.raises(RecipeError, match="window: the score snapkv does not read it"):
        Recipe.load("streaming-1k", ["scorer=snapkv"])
    assert Recipe.load("streaming-1k", ["scorer=snapkv", "window=null"]).steps[0].scorer == "snapkv"
    assert Recipe.load({"steps": [{"rewriter": "dmc", "window": None}]}).steps[0].window is None  # a value there


def test_scores_as_gates_of_dms_load_as_what_they_are_called_today(caplog):
    old = {"steps": [{"rewriter": "dms", "gate": "score:key_norm", "window": 16, "ratio": 8, "layers": "1"}]}
    new = {"steps": [{"rewriter": "evict", "scorer": "key_norm", "window": 16, "ratio": 8, "layers": "1"}]}
    assert Recipe.load(old) == Recipe.load(new)
    assert "is spelled `rewriter: evict` with `scorer: key_norm` now" in caplog.text
    caplog.clear()
    windows = [{"steps": [{"rewriter": "dms", "gate": "score:window", "window": 16} | r]} for r in ({}, {"ratio": 8})]
    assert Recipe.load(windows[0]) == Recipe.load(windows[1])
    assert "Its ratio is left out: the score window does not read it" in caplog.text
    caplog.clear()
    trained = Recipe.load({"steps": [{"rewriter": "dms", "gate": "borrowed"}]})
    assert trained.steps[0].rewriter == "dms" and not caplog.text


def test_layers_are_spans():
    assert parse_layers("0-3,8") == {0, 1, 2, 3, 8}


def test_fraction_of_heads_must_be_whole():
    assert Recipe.load("gqa-4x").steps[0].kv_heads_of(8) == 2
    assert Recipe.load("gqa-4x").steps[0].kv_heads_of(6) is None


def test_what_a_checkpoint_was_made_by_may_name_options_that_nothing_read():
    written = {"steps": [{"rewriter": "lowrank", "keep": 0.5, "group": 2}], "uptrain": {"tokens": 9, "decay": 0.1}}
    with pytest.raises(RecipeError, match="group: only layout: grouped reads it. Set that, or leave it out."):
        Recipe.load(written)
    assert Recipe.recorded(written).to_dict()["steps"] == [{"rewriter": "lowrank", "keep": 0.5}]


def gqa(**options):
    return {"steps": [{"rewriter": "gqa", "kv_heads": 2, **options}]}


@pytest.mark.parametrize(
    ("source", "overrides", "words"),
    [
        ({"stps": []}, [], ["unknown key 'stps'", "Did you mean 'steps'"]),
        ({}, [], ["needs `steps`"]),
        ({"steps": [{"kv_heads": 2}]}, [], ["steps[0]", "needs `rewriter`"]),
        ({"steps": [{"rewriter": "gqaa"}]}, [], ["Did you mean 'gqa'", "identity"]),
        (gqa(kvheads=3), [], ["steps[0]", "unknown key 'kvheads'", "Did you mean 'kv_heads'"]),
        (gqa(init="ranq1"), [], ["init", "Did you mean 'rank1'", "aligned"]),
        (gqa(kv_heads=True), [], ["kv_heads", "bool"]),
        (gqa(renorm=False), [], ["renorm: only init: aligned reads it"]),
        (gqa(equal_groups=False), [], ["equal_groups: asym, qcqa, key_norm alone", "not rank1"]),
        (gqa(init="asym", equal_groups=False, grouping="search"), [], ["grouping", "asym makes the groups itself"]),
        ({"steps": [{"rewriter": "gqa", "groups": [[0], [1]], "grouping": "neighbour"}]}, [], ["groups says which"]),
        (gqa(kv_heads=2.5), [], ["kv_heads", "float"]),
        (gqa(kv_heads=0), [], ["kv_heads", ">= 1"]),
        (gqa(kv_heads="3/2"), [], ["kv_heads", "between 0 and 1"]),
        (gqa(gain_fit="perhaps"), [], ["gain_fit", "needs bool | 'global'."]),
        (gqa(layers="3-1"), [], ["layers", "0-3,8"]),
        (gqa(layers="all"), [], ["layers", "'all'"]),
        ({"steps": [{"rewriter": "gqa"}]}, [], ["needs `kv_heads`"]),
        ({"steps": [{"rewriter": "gqa", "groups": [[0], [2]]}]}, [], ["groups", "exactly"]),
        ({"steps": [{"rewriter": "identity"}], "uptrain": {"tokens": -1}}, [], ["uptrain.tokens", "positive"]),
        ({"steps": [{"rewriter": "identity"}], "uptrain": {"token": 1}}, [], ["uptrain", "Did you mean 'tokens'"]),
        ("mla-2x", ["uptrain.schedule=cosine", "uptrain.decay=0.1"], ["decay: only schedule: wsd reads it"]),
        ("mla-2x", ["uptrain.lora_rank=8"], ["uptrain.lora_rank: only train: lora reads it"]),
        ("mla-2x", ["uptrain.gate_ramp=0.5"], ["uptrain.gate_ramp: no step of the recipe has gates that are trained"]),
        ("snapkv-4x", ["uptrain.tokens=9", "uptrain.gate_budget=5"], ["gate_budget: no step of the recipe has gates"]),
        ("dms-4x", ["steps.0.gate=borrowed", "uptrain.gate_rate=2"], ["gate_rate: its gates are channels of q and k"]),
        ("dms-4x", ["uptrain.gate_budget=0", "uptrain.gate_budget_per=head"], ["budget has no weight"]),
        ("mla-2x", ["uptrain.layer_local=1", "uptrain.ce=0.5"], ["uptrain.ce: it is of the second stage"]),
        ("gqa-3x", [], ["no recipe of that name", "gqa-4x"]),
        ("missing.yaml", [], ["missing.yaml", "no such recipe file"]),
        ("gqa-2x", ["kv_heads"], ["--set kv_heads", "key=value"]),
        ("gqa-2x", ["kv_head=2"], ["Did you mean 'kv_heads'"]),
        ("gqa-2x", ["steps.4.kv_heads=2"], ["no such place", "1 steps"]),
    ],
)
def test_bad_recipes_name_the_place_and_the_way_out(source, overrides, words):
    with pytest.raises(RecipeError) as caught:
        Recipe.load(source, overrides)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("text", ["steps: [", "- a\n- b\n"])
def test_bad_yaml_names_the_file(tmp_path, text):
    file = tmp_path / "broken.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError, match="broken.yaml"):
        Recipe.load(file)
