"""The planner: budgets, settings, costs, the choice for each layer, and the race."""

import copy
import itertools
import json
import re
from dataclasses import replace

import pytest
import torch
import yaml
from families import tiny_model
from tokenizing import word_tokenizer

import surgery
from surgery import PlanError, RecipeError
from surgery.bundled import SMALL
from surgery.calibration.text import Windows, load_tokenizer
from surgery.composing.allocation import allocate
from surgery.composing.budget import budget_of
from surgery.composing.choosing import Chooser
from surgery.composing.compose import parts_of, worth_racing
from surgery.composing.costs import Costs, key_of, to_measure
from surgery.composing.donors import Donors
from surgery.composing.measuring import measure_costs
from surgery.composing.race import race
from surgery.composing.recalling import DEPTHS, QUESTIONS, Exam, exam_for
from surgery.composing.screening import Screen
from surgery.composing.sensitivity import Bench, measure_by
from surgery.composing.settings import Setting, settings_for
from surgery.measure.memory import cache_bytes
from surgery.measure.recall import Asked
from surgery.report.plots import composition_front
from surgery.runtime.calling import cache_argument, cache_of

LENGTH = 128


@pytest.fixture(scope="module")
def parent():
    return tiny_model("llama", num_hidden_layers=3)


@pytest.fixture(scope="module")
def anatomy(parent):
    return surgery.examine(parent)


@pytest.fixture(scope="module")
def by_label(anatomy):
    return {s.label: s for s in settings_for(anatomy, LENGTH)}


def text(windows=28, seed=0):
    return torch.randint(8, 128, (windows, LENGTH), generator=torch.Generator().manual_seed(seed))


def as_windows(ids):
    return Windows(ids, torch.ones_like(ids, dtype=torch.bool), "test")


# ------------------------------------------------------------------------------------------------ allocation


@pytest.mark.parametrize("seed", range(4))
def test_the_choice_is_the_best_of_all_that_fit(seed):
    g = torch.Generator().manual_seed(seed)
    costs = torch.rand(4, 3, generator=g).square().tolist()
    sizes = torch.randint(1000, 9000, (4, 3), generator=g).tolist()
    budget = 16_000

    def total(numbers, places):
        return sum(of_layer[place] for of_layer, place in zip(numbers, places, strict=True))

    fitting = [p for p in itertools.product(range(3), repeat=4) if total(sizes, p) <= budget]
    found = allocate(costs, sizes, budget)
    assert total(sizes, found) <= budget
    assert total(costs, found) == pytest.approx(min(total(costs, p) for p in fitting))


def test_nothing_is_chosen_where_nothing_fits():
    assert allocate([[0.0], [0.0]], [[600], [600]], 1000) is None


# ------------------------------------------------------------------------------------------------ budgets


def test_three_ways_to_say_a_budget(anatomy):
    plain = surgery.plan(anatomy, "identity")
    tokens, whole = 128, plain.cache_bytes(128)
    assert budget_of(plain, ratio=4, context=tokens).bytes == whole // 4
    assert budget_of(plain, per_token="0.25KiB/token", context=tokens).bytes == 256 * tokens
    weights = plain.parameters * 4
    assert budget_of(plain, memory=weights + whole, batch=2, context=tokens).bytes == whole // 2
    assert budget_of(plain, ratio=2, context="1k").context == 1024


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({}, PlanError, "give one of"),
        ({"ratio": 2, "memory": "1GiB"}, PlanError, "ratio and memory"),
        ({"ratio": 0}, PlanError, "above 0"),
        ({"ratio": 1}, PlanError, "nothing is to be done"),
        ({"per_token": "much"}, RecipeError, "no size"),
        ({"memory": "1KiB"}, PlanError, "do not hold the weights"),
        ({"ratio": 2, "context": "long"}, RecipeError, "number of tokens"),
    ],
)
def test_budgets_that_cannot_be(anatomy, given, error, message):
    with pytest.raises(error, match=message):
        budget_of(surgery.plan(anatomy, "identity"), **given)


# ------------------------------------------------------------------------------------------------ settings and costs


def test_settings_are_what_methods_offer_and_plans_accept(parent):
    anatomy = surgery.examine(parent)
    labels = [s.label for s in settings_for(anatomy, LENGTH)]
    assert labels[0] == "as it is"
    wanted = {"gqa kv heads 1", "gqa kv heads 1 + metric 2 bits", "mla keep 0.5 + metric 2 bits", "window 32"}
    assert wanted <= set(labels)
    only = settings_for(anatomy, LENGTH, axes=("store",))
    assert {axis for s in only for axis in s.axes} == {"store"}
    for setting in only:
        plan = surgery.plan(anatomy, setting.recipe())
        assert sum(setting.bytes_of) == plan.cache_bytes(LENGTH)


def test_costs_between_measured_bits_lie_on_a_line_in_the_logarithm(by_label):
    low, mid, high = (by_label[f"metric {b} bits"] for b in ("2", "3", "4"))
    costs = Costs({key_of(low.steps): {0: 1e-2}, key_of(high.steps): {0: 1e-4}})
    assert costs.of(mid, 0) == pytest.approx(1e-3)
    assert costs.of(by_label["as it is"], 0) == 0
    assert not costs.knows(by_label["int8"])


def test_keys_may_have_more_bits_than_values(parent, by_label):
    low, mid, high = (by_label[f"metric {bits} bits"] for bits in ("2.5/1.5", "3.5/2.5", "4.5/3.5"))
    costs = Costs({key_of(low.steps): {0: 1e-2}, key_of(high.steps): {0: 1e-4}})
    assert costs.of(mid, 0) == pytest.approx(1e-3)
    assert not costs.knows(by_label["metric 3 bits"])  # as many for values as for keys: another line
    measured = [s.label for s in to_measure(list(by_label.values())) if "/" in s.label]
    assert measured == ["metric 2.5/1.5 bits", "metric 4.5/3.5 bits", "metric 8/7 bits"]
    child = surgery.convert(parent, mid.recipe(), calibration=as_windows(text(2)))
    assert cache_bytes(child, text(1)) == sum(mid.bytes_of)


def test_a_format_of_latents_costs_what_it_adds_to_a_latent_of_that_method(by_label):
    names = ["mla keep 0.5", "mla keep 0.25", "int8", "mla keep 0.5 + int8"]
    measured = dict(zip(names, (0.1, 0.2, 0.001, 0.15), strict=True))
    costs = Costs({key_of(by_label[name].steps): {0: cost} for name, cost in measured.items()})
    assert costs.of(by_label["mla keep 0.25 + int8"], 0) == pytest.approx(0.25)
    wanted = [s.label for s in to_measure(list(by_label.values()))]
    assert wanted.index("mla keep 0.125") < wanted.index("mla keep 0.5") < wanted.index("mla keep 0.5 + int8")
    assert "mla keep 0.25 + int8" not in wanted


@pytest.mark.parametrize("label", ["int8", "metric 2 bits", "window 32", "gqa kv heads 1", "lowrank keep 0.5"])
def test_a_layer_alone_is_fitted_and_measured_as_a_conversion_of_that_layer(parent, anatomy, by_label, label):
    setting = by_label[label]
    fit, judged = as_windows(text(8)), as_windows(text(2, seed=1))
    bench = Bench(parent, anatomy, judged)
    assert bench.skips
    alone = Donors(parent, anatomy, fit, seed=0).of(setting)
    for layer in (0, 1):
        child = surgery.convert(parent, setting.recipe(str(layer)), calibration=fit, seed=0).eval()
        wanted = chunked_kl(parent, child, judged.ids_BT)
        assert bench.kl({layer: alone[layer]}) == pytest.approx(wanted, rel=1e-3, abs=1e-7)
    bench.skips = False
    assert bench.kl({1: alone[1]}) == pytest.approx(wanted, rel=1e-3, abs=1e-7)


def test_an_error_is_that_of_the_layer_after_a_conversion_of_it(parent, anatomy, by_label):
    setting = by_label["lowrank keep 0.5"]
    fit, judged = as_windows(text(8)), as_windows(text(2, seed=1))
    bench = Bench(parent, anatomy, judged)
    alone = Donors(parent, anatomy, fit, seed=0).of(setting)
    for layer in (0, 1):
        child = surgery.convert(parent, setting.recipe(str(layer)), calibration=fit, seed=0).eval()
        was, now = (_given_by(model, layer, judged.ids_BT) for model in (parent, child))
        wanted = (now - was)[:, bench.prefill :].square().mean()
        assert bench.error(layer, alone[layer]) == pytest.approx(float(wanted), rel=1e-3)
    assert bench.error(1, bench.own[1]) == 0
    bench.skips = False
    assert bench.error(1, alone[1]) is None


@pytest.mark.parametrize("first", ["", "lowrank keep 0.5 + "])
def test_text_is_looked_at_once_for_all_bits_of_a_codec(parent, anatomy, by_label, first, monkeypatch):
    fit = as_windows(text(8))
    three, two = (by_label[f"{first}metric {bits} bits"] for bits in (3, 2))
    wanted = [parameters_of(Donors(parent, anatomy, fit, 0).of(setting)) for setting in (three, two)]
    assert any(not torch.equal(a, wanted[1][name]) for name, a in wanted[0].items())
    makes = Donors(parent, anatomy, fit, 0)
    if first:
        makes.of(by_label["lowrank keep 0.5"])
    found = [parameters_of(makes.of(three))]
    with monkeypatch.context() as patched:
        patched.setattr("surgery.rewriters.quantise.fits_of", None)
        found.append(parameters_of(makes.of(two)))
    makes.of(by_label["mla keep 0.5"])
    found.append(parameters_of(makes.of(two)))
    for a, b in zip(found, [*wanted, wanted[1]], strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def parameters_of(attentions):
    return {f"{i} {name}": tensor.clone() for i, a in attentions.items() for name, tensor in a.state_dict().items()}


@torch.inference_mode()
def _given_by(model, layer, ids):
    given = []
    handle = model.model.layers[layer].register_forward_hook(lambda _, args, out: given.append(out))
    model(ids)
    handle.remove()
    return given[0][0] if isinstance(given[0], tuple) else given[0]


def test_one_setting_of_a_method_is_measured_by_kl_and_the_others_by_their_errors(parent, anatomy, by_label):
    fit, judged = as_windows(text(8)), as_windows(text(2, seed=1))
    bench, asked = Bench(parent, anatomy, judged), []
    real = bench.kl
    bench.kl = lambda attentions: asked.append(1) or real(attentions)
    donors = Donors(parent, anatomy, fit, 0)
    settings = [by_label[name] for name in ("as it is", "mla keep 0.5", "mla keep 0.25", "mla keep 0.5 + int8")]
    costs = measure_costs(settings, measure_by(bench, donors.of), (0, 1, 2), None, "here")
    assert len(asked) == 3  # layers
    for setting in settings[1:]:
        for layer, module in donors.of(setting).items():
            assert 0.3 < costs.of(setting, layer) / real({layer: module}) < 3
    smallest = by_label["mla keep 0.25"]
    assert costs.of(smallest, 1) == real({1: donors.of(smallest)[1]})
    broken = donors.of(settings[1])
    with torch.no_grad():
        broken[1].o_proj.weight.fill_(float("nan"))
    assert measure_by(bench, lambda *_: broken)(settings[1], (0, 1, 2), ())[1][0] == float("inf")


@pytest.mark.parametrize("label", ["lowrank keep 0.5 + int8", "lowrank keep 0.5 + metric 2 bits"])
def test_a_format_on_top_needs_no_second_fit(parent, anatomy, by_label, label, monkeypatch):
    fit, judged = as_windows(text(8)), as_windows(text(2, seed=1))
    both = by_label[label]
    makes = Donors(parent, anatomy, fit, 0)
    makes.of(by_label["lowrank keep 0.5"])
    with monkeypatch.context() as patched:
        patched.setattr("surgery.rewriters.latent.method.fit_layer", None)
        made = makes.of(both)
    child = surgery.convert(parent, both.recipe("1"), calibration=fit, seed=0).eval()
    found = Bench(parent, anatomy, judged).kl({1: made[1]})
    assert found == pytest.approx(chunked_kl(parent, child, judged.ids_BT), rel=1e-3)


@pytest.mark.parametrize("family", ["jamba", "llama"])
def test_a_parent_answers_behind_its_cache_as_in_one_pass(family):
    """Layers of Mamba begin anew where several tokens come at once behind a cache."""
    whole = tiny_model(family).eval()
    judged = as_windows(torch.randint(3, 100, (2, 32), generator=torch.Generator().manual_seed(3)))
    bench = Bench(whole, surgery.examine(whole), judged)
    with torch.no_grad():
        wanted = whole(judged.ids_BT, use_cache=False).logits[:, bench.prefill :].log_softmax(-1)
    torch.testing.assert_close(bench.wanted, wanted, rtol=1e-3, atol=1e-3)
    assert bench.at_once == (family == "llama")
    assert bench.kl(bench.own) < 1e-6


@torch.inference_mode()
def chunked_kl(parent, child, ids):
    first = ids.shape[1] - ids.shape[1] // 4
    answers = []
    for model in (parent, child):
        cache = cache_of(model(input_ids=ids[:, :first], use_cache=True))
        out = model(input_ids=ids[:, first:], use_cache=True, **{cache_argument(model): cache})
        answers.append(out.logits.log_softmax(-1))
    p, q = answers
    return float((p.exp() * (p - q)).sum(-1).mean())


# ------------------------------------------------------------------------------------------------ screening


DEPTH = 12


def made_up(bytes_of):
    """Settings of methods by name, each with the bytes of one layer: `mla 0.25` is what mla keeps."""
    found = [Setting(steps=(), bytes_of=(1000,) * DEPTH, axes=())]
    for (name, keep), size in bytes_of.items():
        step = {"rewriter": name, "keep": keep}
        found.append(Setting(steps=(step,), bytes_of=(size,) * DEPTH, axes=("project",)))
    return found


def screened(settings, nats, budget, seen):
    """Costs of made-up settings, measured as `nats` says; `seen` collects what was measured."""

    def measure(setting, layers, asked):
        seen.append((setting.label, tuple(layers)))
        return {layer: (nats[setting.label] * (1 + layer / 50), None) for layer in layers}

    layers = tuple(range(DEPTH))
    screen = Screen(settings=settings, layers=layers, budget=budget)
    return measure_costs(settings, measure, layers, None, "here", screen)


@pytest.mark.parametrize("has_screen", [False, True])
@pytest.mark.parametrize("without", [(), (0,), (3,)])
def test_the_kl_of_a_second_method_is_measured_in_six_layers(without, has_screen):
    """Errors cost five times as much in the last layer as in the first, and twice as much of `mla`."""
    settings = made_up({("lowrank", 0.2): 200, ("lowrank", 0.5): 500, ("mla", 0.2): 250, ("mla", 0.5): 500})
    errors = {"lowrank keep 0.2": 4e-2, "lowrank keep 0.5": 1e-2, "mla keep 0.2": 3e-2, "mla keep 0.5": 2e-2}
    layers, wanted = tuple(range(DEPTH)), []
    screen = Screen(settings=settings, layers=layers, budget=DEPTH * 400) if has_screen else None

    def kl(label, layer):
        return (2 if "mla" in label else 1) * 5 ** (layer / (DEPTH - 1)) * errors[label]

    def measure(setting, layers, asked):
        wanted.append(list(asked))
        label, found = setting.label, {}
        for i in layers:
            known = label != "mla keep 0.2" or i not in without
            found[i] = (None if known and i not in asked else kl(label, i), errors[label] if known else None)
        return found

    costs = measure_costs(settings, measure, layers, None, "here", screen)
    looked_at = [[2, 6, 10], []] if has_screen else []
    assert wanted == [list(layers), [], *looked_at, [1, 3, 5, 7, 9, 11], list(without)]
    for setting in settings[1:]:
        assert [costs.of(setting, i) for i in layers] == pytest.approx([kl(setting.label, i) for i in layers])


def test_layers_that_a_method_leaves_alone_do_not_say_what_its_errors_cost():
    """Every other layer has a window, which codes leave as it is: all six are of the others."""
    depth = 24
    settings = [Setting(steps=(), bytes_of=(1000,) * depth, axes=())]
    for codec in ("int8", "int4"):
        step = {"rewriter": "quantise", "codec": codec}
        settings.append(Setting(steps=(step,), bytes_of=(1000, 500) * (depth // 2), axes=("store",)))
    asked = []

    def measure(setting, layers, wanted):
        asked.append(list(wanted))
        error = 1e-3 * (setting.label == "int8") + 2e-3 * (setting.label == "int4")
        times = 1 + (setting.label == "int4")
        return {i: (times * (i % 2) * error if i in wanted else None, (i % 2) * error) for i in layers}

    costs = measure_costs(settings, measure, tuple(range(depth)), None, "here")
    assert asked[1][:6] == [3, 7, 11, 15, 19, 23]
    assert [costs.of(settings[2], i) for i in range(depth)] == pytest.approx([0, 4e-3] * (depth // 2))


def test_a_method_that_cannot_help_is_measured_in_three_layers():
    settings = made_up({("lowrank", 0.5): 500, ("lowrank", 0.2): 200, ("mla", 0.5): 500, ("mla", 0.25): 250})
    nats = {"lowrank keep 0.5": 1e-3, "lowrank keep 0.2": 2e-3, "mla keep 0.5": 9e-3, "mla keep 0.25": 2e-2}
    seen = []
    costs = screened(settings, nats, 3600, seen)
    assert costs.left_out == {"mla": (2, 6, 10)}
    assert [layers for label, layers in seen if label.startswith("mla")] == [(2, 6, 10)] * 2
    assert not costs.knows(settings[-1]) and costs.knows(settings[1])
    # Not where it could be of use even if it cost a quarter, nor where the others do not reach the budget.
    for changed, budget in (({"mla keep 0.5": 3e-3}, 3600), ({}, 2300)):
        costs = screened(settings, nats | changed, budget, seen := [])
        assert not costs.left_out and costs.knows(settings[-1])


@pytest.mark.parametrize("seed", range(6))
def test_what_is_left_out_would_not_have_made_the_choice_better(seed):
    g = torch.Generator().manual_seed(seed)
    sizes = {(name, keep): int(1000 * keep) for name in ("lowrank", "mla") for keep in (0.6, 0.4, 0.2)}
    settings = made_up(sizes)
    level = {"lowrank": 1.0, "mla": 10 ** float(2 * torch.rand(1, generator=g))}
    nats = {s.label: level[s.steps[0]["rewriter"]] * (1 - s.bytes_of[0] / 1000) ** 2 for s in settings[1:]}
    layers = tuple(range(DEPTH))
    every = Costs({key_of(s.steps): {i: nats[s.label] * (1 + i / 50) for i in layers} for s in settings[1:]})
    for budget in (4000, 6000, 9000):
        costs = screened(settings, nats, budget, [])
        known = [s for s in settings if costs.knows(s)]
        kept, best = (Chooser(some, every, layers).best(budget) for some in (known, settings))
        assert kept.cost <= best.cost * 1.001
        assert len(known) < len(settings) or level["mla"] < 20


# ------------------------------------------------------------------------------------------------ from end to end


@pytest.fixture(scope="module")
def found(parent, tmp_path_factory):
    kept = tmp_path_factory.mktemp("composing") / "kept.json"
    made = surgery.compose(parent, ratio=4, calibration=text(), context=LENGTH, samples=8, kept=kept)
    return made, kept


def test_what_was_raced_is_drawn_at_the_bytes_of_the_budgets_context(found):
    data = found[0].to_dict()
    for runner in data["race"]["runners"]:
        runner["bytes"] *= 3  # as of shorter windows
    stars = [line for line in composition_front(data).axes[0].lines if line.get_marker() == "*"]
    assert [star.get_xdata()[0] for star in stars] == [
        data["choice"]["bytes_per_token"], *(single["bytes_per_token"] for single in data["singles"].values())
    ]  # fmt: skip


def test_a_composition_fits_converts_and_says_how_it_raced(parent, found):
    made, _ = found
    whole = surgery.plan(parent, "identity").cache_bytes(LENGTH)
    assert made.choice.bytes == made.plan.cache_bytes(LENGTH) <= made.budget.bytes == whole // 4
    own, *others = made.race.runners
    assert own.bytes == made.choice.bytes
    assert "Recall is not compared: there is no tokenizer" in str(made) and own.recall is None
    assert others and all(other.bytes <= made.budget.bytes for other in others)
    # What layers cost alone adds up, nearly.
    assert own.judged == pytest.approx(made.choice.cost, rel=1.0)
    written = yaml.safe_load(made.to_yaml())
    assert surgery.plan(parent, written).cache_bytes(LENGTH) == made.choice.bytes
    assert made.is_recommended == made.race.is_won
    assert made.verdict in made.to_yaml()
    assert json.loads(json.dumps(made.to_dict()))["choice"]["bytes_per_token"] * LENGTH == made.choice.bytes


def test_what_is_predicted_to_cost_far_more_is_not_raced(found):
    made = found[0]
    good, fair, bad = (replace(made.choice, cost=cost) for cost in (0.01, 0.039, 0.041))
    assert worth_racing([bad, good, fair]) == [good, fair] and worth_racing([]) == []
    single = next(iter(made.singles.values()))
    assert "Not raced" not in str(made)
    alone = replace(made, race=replace(made.race, runners=made.race.runners[:1], lead=None))
    assert f"Not raced: {single.settings[-1].label}, predicted to cost {single.cost:.3g} nats" in str(alone)


def test_a_composition_costs_no_more_than_a_single_setting_is_predicted_to(found):
    made, _ = found
    assert all(made.choice.cost <= single.cost + 1e-12 for single in made.singles.values())
    assert [c.cost for c in made.front] == sorted((c.cost for c in made.front), reverse=True)


def test_what_was_measured_is_not_measured_again(parent, found, monkeypatch):
    made, kept = found

    def fail(*_):
        raise AssertionError("measured again")

    monkeypatch.setattr(Donors, "of", fail)
    again = surgery.compose(parent, ratio=4, calibration=text(), context=LENGTH, samples=8, kept=kept, with_race=False)
    assert again.choice == made.choice
    assert again.race is None and not again.is_recommended
    trained = copy.deepcopy(parent)
    trained.model.layers[2].mlp.down_proj.weight.data[5] += 1
    for other in ({"calibration": text(seed=3)}, {"samples": 4}, {"model_or_path": trained}):
        with pytest.raises(AssertionError, match="measured again"):
            surgery.compose(
                **{"model_or_path": parent, "calibration": text(), "samples": 8, **other},
                ratio=4, context=LENGTH, kept=kept, with_race=False,
            )  # fmt: skip


def test_no_text_is_used_twice():
    windows = as_windows(torch.arange(30 * 8).view(30, 8))
    fit, judged, raced = parts_of(windows, 8)
    used = torch.cat([fit.ids_BT, judged.ids_BT, raced.ids_BT])[:, 0].tolist()
    assert (len(fit), len(judged), len(raced)) == (8, 2, 6)
    assert len(set(used)) == len(used) == 16


# ------------------------------------------------------------------------------------------------ recall in the race


@pytest.fixture(scope="module")
def exam(parent):
    """Questions whose right answer is what the parent says."""
    contexts = text(6, seed=5)
    with torch.inference_mode():
        answers = parent(contexts).logits[:, -1].argmax(-1)
    asked = [Asked([*ids, int(answer)], 4, 1) for ids, answer in zip(contexts.tolist(), answers, strict=True)]
    return Exam(tasks=("passkey",), length=LENGTH, asked=asked, parent=1.0)


def raced(parent, anatomy, exam, own, other, monkeypatch):
    monkeypatch.setattr("surgery.composing.race.exam_for", lambda *_: exam)
    bench = Bench(parent, anatomy, as_windows(text(2, seed=1)))
    recipes = {name: surgery.Recipe.load({"steps": [step]}) for name, step in (("own", own), ("other", other))}
    return race(
        parent, recipes, as_windows(text(4)), as_windows(text(3, seed=2)), bench=bench, dtype=torch.float32,
        tokenizer=None, seed=0,
    )  # fmt: skip


LOSSLESS, FORGETFUL = {"rewriter": "identity"}, {"rewriter": "evict", "scorer": "window", "window": 16}


def test_answers_are_counted_through_the_cache_of_each_runner(parent, anatomy, exam, monkeypatch):
    done = raced(parent, anatomy, exam, FORGETFUL, LOSSLESS, monkeypatch)
    own, other = done.runners
    assert other.recall == 1 and own.recall < 1
    child = surgery.convert(parent, {"steps": [FORGETFUL]}).eval()
    asked = torch.tensor([a.ids for a in exam.asked])
    with torch.inference_mode():
        said = child(input_ids=asked[:, :-1], use_cache=True).logits[:, -1].argmax(-1)
    assert own.recall == pytest.approx(float((said == asked[:, -1]).double().mean()))
    assert done.recall.lead.value == pytest.approx(own.recall - other.recall)


def test_a_composition_that_recalls_less_is_not_recommended(parent, anatomy, exam, found, monkeypatch):
    done = raced(parent, anatomy, exam, FORGETFUL, LOSSLESS, monkeypatch)
    better = replace(done, lead=replace(done.lead, value=1.0, low=0.5, high=2.0))
    lost = replace(better, recall=replace(done.recall, lead=replace(done.recall.lead, value=-0.5, low=-0.8, high=-0.1)))
    made = replace(found[0], race=lost)
    assert not made.is_recommended and "but it recalls less" in made.verdict
    even = replace(lost, recall=replace(lost.recall, lead=replace(lost.recall.lead, high=0.0)))
    made = replace(found[0], race=even)
    assert made.is_recommended and made.verdict.startswith("Recommended") and "against 100%" in made.verdict
    assert "parent answers 100%" in str(made) and made.to_dict()["race"]["recall"]["questions"] == 6


def test_what_the_parent_may_guess_is_not_asked(monkeypatch):
    parent, tokenizer = surgery.load(SMALL), load_tokenizer(SMALL)
    reason = exam_for(parent, tokenizer, 136, 0)
    assert re.search("[01] of 8 associative and 0 of 8 passkey questions of 128 tokens, which may be chance", reason)
    for right, tasks in ((2, ("passkey",)), (4, ("associative", "passkey"))):
        answers = torch.arange(2 * 4) < right
        monkeypatch.setattr("surgery.composing.recalling.answer_each", lambda *_, a=answers: (a.double(), None))
        made = exam_for(parent, tokenizer, 136, 0)
        assert made.tasks == tasks and made.parent == right / 8
        assert len(made.asked) == len(tasks) * len(DEPTHS) * QUESTIONS
    assert "does not cover plain English" in exam_for(parent, word_tokenizer(), 136, 0)
    assert exam_for(parent, None, 136, 0) == "there is no tokenizer to ask in"
    assert "no question fits" in exam_for(parent, tokenizer, 16, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 400}, "below what any composition reaches.*by `"),
        ({"ratio": 4, "axes": ("colour",)}, "no axis colour"),
        ({"ratio": 4, "keep_layers": (7,)}, "no layer 7"),
        ({"ratio": 4, "engine": "none"}, "no engine 'none'"),
        ({"ratio": 4, "calibration": None}, "needs calibration text"),
        ({"ratio": 4, "calibration": text(4)}, "Give more text"),
        ({"ratio": 4, "native_only": True, "axes": ("store",)}, "no form of the cache is left"),
    ],
)
def test_refused_before_anything_is_measured(parent, options, message, monkeypatch):
    monkeypatch.setattr(Donors, "of", None)
    with pytest.raises(PlanError, match=message):
        surgery.compose(parent, **{"calibration": text(), "context": LENGTH, **options})


def test_layers_that_a_setting_leaves_alone_are_not_named_in_its_step():
    parent = tiny_model("gemma2", num_hidden_layers=4, sliding_window=16)
    made = surgery.compose(
        parent, ratio=1.3, calibration=text(), context=LENGTH, samples=8, axes=("store",), with_race=False
    )
    sliding = [layer.layer for layer in made.plan.before if layer.window is not None]
    assert sliding and made.choice.bytes == made.plan.cache_bytes(LENGTH) <= made.budget.bytes
    assert all(made.plan.after[layer] == made.plan.before[layer] for layer in sliding)


def test_a_composition_that_breaks_a_constraint_is_refused(parent):
    with pytest.raises(PlanError, match="does not satisfy the constraints"):
        surgery.compose(
            parent, ratio=1.2, calibration=text(), context=LENGTH, samples=8, native_only=True, keep_layers=(0,),
            with_race=False,
        )  # fmt: skip


def test_what_is_no_number_is_never_free(parent, anatomy, by_label):
    fit = as_windows(text(8))
    broken = Donors(parent, anatomy, fit, 0).of(by_label["lowrank keep 0.5"])[1]
    with torch.no_grad():
        broken.o_proj.weight.fill_(float("nan"))
    bench = Bench(parent, anatomy, as_windows(text(2, seed=1)))
    assert bench.kl({1: broken}) == float("inf")
    assert bench.kl({}) == 0
    low, mid, high = (by_label[f"metric {b} bits"] for b in ("2", "3", "4"))
    costs = Costs({key_of(low.steps): {0: float("inf")}, key_of(high.steps): {0: 1e-4}})
    assert costs.of(mid, 0) == float("inf")


def test_native_only_gives_a_model_of_the_parents_class(parent):
    made = surgery.compose(
        parent, ratio=2, calibration=text(), context=LENGTH, samples=8, native_only=True, with_race=False
    )
    assert made.plan.native and made.recipe.steps[0].rewriter == "gqa"


def test_the_command_writes_a_recipe_that_convert_takes(call, tmp_path):
    folder, source = tmp_path / "model", tmp_path / "text.jsonl"
    tiny_model("llama").save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    lines = [" ".join(f"w{i}" for i in row) for row in text(40).tolist()]
    source.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    out = tmp_path / "composed.yaml"
    options = ("--calibration", source, "--context", "128", "--samples", "8", "--axes", "store", "-o", out)
    code, shown, logged = call("plan", folder, "--ratio", "1.7", *options, "--plot", tmp_path / "front.png")
    assert code == 0, logged
    assert "race" in shown and "written to" in shown and "setting 1 of" in logged
    assert (tmp_path / "front.png").stat().st_size > 10_000
    assert sorted(p.name for p in tmp_path.iterdir()) == ["composed.yaml", "front.png", "model", "text.jsonl"]
    code, shown, logged = call("convert", folder, "-r", out, "--calibration", source, "-o", tmp_path / "child")
    assert code == 0, logged
    code, _, logged = call("plan", folder, "--ratio", "4")
    assert code == 2 and "--calibration" in logged
    code, _, logged = call("plan", folder, "-r", "gqa-2x", "--ratio", "4")
    assert code == 2 and "not both" in logged
