"""`bits: sensitivity` of quantised caches: bits by layer, for keys and for values, from calibration text."""

import itertools

import pytest
import torch
from families import tiny_model
from test_quantised import IDS, SMALL, TEXT, decoded, relative_error

import surgery
from surgery.anatomy import examine
from surgery.attention.weights import halves
from surgery.calibration.working_copy import WorkingCopy
from surgery.rewriters.common.allocation import choose
from surgery.rewriters.stored.sensitivity import CodedForm

SHARED = SMALL | {"bits": "sensitivity"}


def test_the_least_cost_within_a_budget_is_chosen():
    random = torch.Generator().manual_seed(0)
    steps = torch.rand(5, 3, generator=random)
    lines = {part: [(n, float(row[n:].sum())) for n in range(4)] for part, row in enumerate(steps.sort(1, True).values)}
    for budget in range(16):
        chosen = choose(lines, budget)
        assert sum(chosen.values()) == budget
        cost = sum(dict(lines[part])[size] for part, size in chosen.items())
        every = itertools.product(*lines.values())
        best = min(sum(c for _, c in way) for way in every if sum(n for n, _ in way) <= budget)
        assert cost == pytest.approx(best)


@pytest.mark.parametrize(("codec", "family"), [("kivi", "llama"), ("int4", "gpt_neox"), ("metric", "llama")])
@torch.no_grad()
def test_what_costs_are_measured_on_is_what_decoding_through_the_cache_gives(codec, family):
    parent = tiny_model(family).eval()
    model = surgery.convert(parent, {"steps": [SMALL | {"codec": codec}]}, calibration=TEXT).eval()
    copy = WorkingCopy(parent, examine(parent))
    tables = {
        at: {n: t for n, t in a.codec.named_buffers()} for at, a in enumerate(model.base_model.surgery_attentions)
    }
    for layer, site in copy.sites.items():
        keys, values = model.plans[layer].store.forms(tables[layer] or None)
        order = tuple(halves(site.rotary, site.head_dim))
        form = CodedForm(keys=keys, values=values, store=model.plans[layer].store, order=order)
        copy.take_form(layer, form)
    want, _ = decoded(model, IDS, 9)
    plain = parent(IDS).logits
    got = copy.model(IDS).logits
    assert relative_error(got, want) < 0.05 * relative_error(want, plain)


def converted(parent, **options):
    return surgery.convert(parent, {"steps": [SHARED | options]}, calibration=TEXT).eval()


def mean_bits(model):
    packed = [(plan.entry(), plan.store) for plan in model.plans]
    total = sum(f.bytes_of(8, e[0], w) for e, s in packed for f, w in zip(s.forms(), e[1:], strict=True))
    return 8 * total / sum(8 * e[0] * (e[1] + e[2]) for e, _ in packed)


@pytest.mark.parametrize(("codec", "budget"), [("kivi", 8.0), ("metric", 3.0)])
def test_bits_go_to_the_layers_that_need_them(codec, budget, tmp_path):
    parent = tiny_model("llama").eval()
    with torch.no_grad():
        parent.model.layers[1].self_attn.o_proj.weight *= 0.02
    model = converted(parent, codec=codec, bits_per_number=budget)
    first, second = (plan.store for plan in model.plans)
    assert first.k_bits > second.k_bits and first.v_bits > second.v_bits
    assert budget - 0.6 < mean_bits(model) <= budget
    surgery.save(model, tmp_path / "child")
    loaded = surgery.load(tmp_path / "child").eval()
    assert [plan.store for plan in loaded.plans] == [first, second]
    with torch.no_grad():
        assert torch.equal(decoded(loaded, IDS, 30)[0], decoded(model, IDS, 30)[0])


def test_what_cannot_be_shared_out_is_refused_before_work():
    parent = tiny_model("llama").eval()
    for options, message in [
        ({"codec": "int8", "bits_per_number": 8}, "int8 has one number of bits"),
        ({"codec": "kivi"}, "bits: sensitivity asks for bits_per_number"),
        ({"codec": "kivi", "bits_per_number": 4, "k_bits": 3}, "k_bits: bits: sensitivity chooses it"),
        ({"codec": "kivi", "bits": "equal", "bits_per_number": 4}, "is for bits: sensitivity"),
    ]:
        with pytest.raises(surgery.RecipeError, match=message):
            surgery.plan(parent, {"steps": [SHARED | options]})
    step = SHARED | {"codec": "kivi", "bits_per_number": 4}
    with pytest.raises(surgery.PlanError, match="layer 0: .*bits_per_number: 4 is less than kivi takes with 2 bits"):
        surgery.plan(parent, {"steps": [step]})
    with pytest.raises(surgery.PlanError, match="quantise asks for calibration text"):
        surgery.convert(parent, {"steps": [step | {"bits_per_number": 8}]})
    for before, message in [
        ({"rewriter": "share", "init": "replace"}, "Beside share, write a quantise step"),
        ({"rewriter": "mla", "rank": 24, "rope_dims": 8}, "the layer caches a latent. Give k_bits"),
    ]:
        with pytest.raises(surgery.SurgeryError, match=message):
            surgery.plan(parent, {"steps": [before, step | {"bits_per_number": 8}]})


@pytest.mark.parametrize("codec", ["int4", "metric"])
@pytest.mark.parametrize(("tokens", "said"), [(20, True), (30, False)])
def test_bits_stay_equal_where_text_is_too_short_for_codes_to_be_read(codec, tokens, said, caplog):
    """The first 2 and the newest 10 tokens are not packed, and the first 8 between them only when 20 have come."""
    options = SHARED | {"codec": codec, "bits_per_number": 7.0, "recent": 10}
    model = surgery.convert(tiny_model("llama"), {"steps": [options]}, calibration=TEXT[:, :tokens])
    bits = {b for plan in model.plans for b in (plan.store.k_bits, plan.store.v_bits)}
    assert (len(bits) == 1) == ("get equal bits" in caplog.text) == said
    assert mean_bits(model) > 4.5
