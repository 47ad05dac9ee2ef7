"""Slots that leave by their rank, held as packed codes: the same slots as without codes, each encoded once."""

from __future__ import annotations

import pytest
import torch
from closeness import assert_close
from families import tiny_model

import surgery
from surgery import PlanError
from surgery.measure.memory import tensor_bytes
from surgery.runtime.coded_pages import CodedRankedLayer
from surgery.runtime.coded_rows import Rows, has_rows, rows_of
from surgery.runtime.layout import Codec

SINKS, RECENT = 2, 6
STREAMING = {"rewriter": "evict", "scorer": "streaming", "ratio": 2, "recent": 12, "sinks": 4}
SNAPKV = {"rewriter": "evict", "scorer": "snapkv", "ratio": 2, "recent": 12, "observe": 8, "budget": "ada"}
H2O = {"rewriter": "evict", "scorer": "h2o", "ratio": 2, "recent": 12}


def packed(codec="int4", **options):
    return {"rewriter": "quantise", "codec": codec, "sinks": SINKS, "recent": RECENT, **options}


@pytest.fixture(scope="module")
def parent():
    return tiny_model("llama", num_hidden_layers=2, hidden_size=64, num_attention_heads=4, num_key_value_heads=2)


def child_of(parent, *steps):
    text = tokens(32, batch=8) if steps[0]["rewriter"] in ("mla", "lowrank") else None
    return surgery.convert(parent, {"steps": list(steps)}, calibration=text).eval()


def tokens(length=70, batch=2):
    return torch.randint(8, 128, (batch, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def decoded(model, ids, prompt, cache=None, mask=None):
    """Logits of the last prompt token and of all after it, and the cache."""
    mask = torch.ones_like(ids) if mask is None else mask
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    found, start = [], 0
    for end in (prompt, *range(prompt + 1, ids.shape[1] + 1)):
        out = model(
            ids[:, start:end], attention_mask=mask[:, :end], position_ids=positions[:, start:end],
            past_key_values=cache, use_cache=True,
        )  # fmt: skip
        cache, start = out.past_key_values, end
        found.append(out.logits[:, -1])
    return torch.stack(found, 1), cache


@pytest.mark.parametrize("codec", ["int8", "fp8", "fp16", "int4", "turbo"])
@pytest.mark.parametrize("step", [STREAMING, SNAPKV, H2O], ids=["streaming", "snapkv", "h2o"])
def test_the_first_layer_holds_the_slots_of_the_parents_keys_each_encoded_once(parent, step, codec):
    # Keys and values of the first layer are those of the plain child, whatever later layers make of codes.
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    plain, coded = child_of(parent, step), child_of(parent, step, packed(codec))
    one_by_one = 40 if step is not H2O else 69  # which slots h2o keeps would depend on codes while it decodes
    _, want = decoded(plain, ids, one_by_one, mask=mask)
    _, got = decoded(coded, ids, one_by_one, mask=mask)
    layer, slots, wanted = got.layers[0], got.layers[0].slots(), want.layers[0].slots()
    assert isinstance(layer, CodedRankedLayer) and layer.lengths.tolist() == want.layers[0].lengths.tolist()
    assert layer.lengths.unique().numel() > 1 or step is not SNAPKV
    places, lengths = torch.arange(len(slots)), layer.lengths[..., None]
    full = (places < SINKS) | (places >= lengths - RECENT)
    keys, values = rows_of(layer.store, (wanted.key_BKSH.shape[-1], wanted.value_BKSV.shape[-1]), layer.dtype)
    for rows, x, found in ((keys, wanted.key_BKSH, slots.key_BKSH), (values, wanted.value_BKSV, slots.value_BKSV)):
        expected = torch.where(full[..., None], x, rows.decode(rows.encode(x)))
        there = (places < lengths)[..., None]
        assert_close(found * there, expected * there)
        assert not torch.equal(expected * there, x * there)


def test_what_is_held_and_what_is_read_back_are_planned(parent):
    # Pages are full at these lengths; tables too.
    for step, codec in ((STREAMING, "int4"), (H2O, "int8"), (STREAMING, "turbo")):
        model = child_of(parent, step, packed(codec))
        _, cache = decoded(model, tokens(84), 84)
        planned = surgery.plan(parent, {"steps": [step, packed(codec)]})
        assert tensor_bytes(cache) == 2 * planned.cache_bytes(84)
        plain = surgery.plan(parent, {"steps": [step]})
        assert planned.cache_bytes(2000) < 0.45 * plain.cache_bytes(2000)


def test_codes_hardly_change_what_is_answered(parent):
    ids = tokens()
    for step in (STREAMING, SNAPKV):
        want, _ = decoded(child_of(parent, step), ids, 40)
        errors = []
        for options in ({"codec": "int4", "k_bits": 4}, {"codec": "int4", "k_bits": 6}, {"codec": "int4", "k_bits": 8}):
            got, _ = decoded(child_of(parent, step, packed(**options)), ids, 40)
            errors.append(float((got - want).square().mean()))
        assert errors[0] > 4 * errors[1] > 16 * errors[2]


def test_a_chunk_sees_full_tokens_and_what_is_kept_of_those_before(parent):
    # Two chunks: the second one sees the first through codes, as decoding does.
    model, ids = child_of(parent, STREAMING, packed()), tokens()
    whole, cache = decoded(model, ids, 60)
    again, _ = decoded(model, ids, 60)
    assert torch.equal(whole, again) and cache.get_seq_length() == 70
    child_of(parent, STREAMING)
    with torch.no_grad():
        out = model(ids[:, :40], use_cache=True)
        second = model(ids[:, 40:60], past_key_values=out.past_key_values, use_cache=True).logits
        parents = parent(ids[:, :60]).logits[:, 40:]
    assert (second - parents).abs().max() > 1e-3  # tokens have left, others are coded
    assert not torch.equal(second[:, -1], whole[:, 0])


def test_rows_of_beams_and_of_padding_are_those_of_their_sequences(parent):
    model, ids = child_of(parent, SNAPKV, packed()), tokens(48, batch=1)
    greedy = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    want = model.generate(ids, **greedy, num_beams=3)
    padded = torch.cat((torch.zeros(1, 5, dtype=torch.long), ids), 1)
    mask = torch.ones_like(padded)
    mask[:, :5] = 0
    assert torch.equal(model.generate(padded, attention_mask=mask, **greedy, num_beams=3)[:, 5:], want)
    alone = [model.generate(row[None], **greedy) for row in tokens(48)]
    assert torch.equal(torch.cat(alone), model.generate(tokens(48), **greedy))


def test_a_static_cache_gives_what_a_dynamic_one_gives_in_one_graph(parent):
    few = packed(
        k_bits=2
    )  # of many bits some would be rounded otherwise, for compiled scores differ in their last digit
    model, ids, graphs = child_of(parent, SNAPKV, few), tokens(), []
    want, _ = decoded(model, ids, 40)
    cache = model.static_cache(80)
    got, _ = decoded(model, ids, 40, cache)
    assert_close(got, want)
    planned = surgery.plan(parent, {"steps": [SNAPKV, few]})
    assert tensor_bytes(cache) == 2 * sum(layer.static_bytes(80) for layer in planned.after)

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    step, cache = torch.compile(model.forward, backend=backend, fullgraph=True), model.static_cache(80)
    with torch.no_grad():
        found = [model(ids[:, :40], past_key_values=cache, use_cache=True).logits[:, -1]]
        for i in range(40, 70):
            position = torch.full((2, 1), i)
            out = step(ids[:, i : i + 1], past_key_values=cache, position_ids=position, use_cache=True)
            found.append(out.logits[:, -1])
    torch.compiler.reset()
    assert len(graphs) == 1
    assert_close(torch.stack(found, 1), want)


@pytest.mark.parametrize(
    "project", [{"rewriter": "mla", "rank": 24, "rope_dims": 8}, {"rewriter": "lowrank", "rank": 32, "k_share": 0.5}]
)
def test_latents_that_leave_are_held_as_codes(parent, project):
    step = STREAMING
    plain, coded = child_of(parent, project, step), child_of(parent, project, step, packed("int8"))
    want, _ = decoded(plain, tokens(), 40)
    got, cache = decoded(coded, tokens(), 40)
    assert isinstance(cache.layers[0], CodedRankedLayer)
    assert 1e-6 < float((got - want).abs().max() / want.abs().max()) < 0.2
    planned = surgery.plan(parent, {"steps": [project, step, packed("int8")]})
    _, cache = decoded(coded, tokens(84), 84)
    assert tensor_bytes(cache) == 2 * planned.cache_bytes(84)


def test_a_saved_child_packs_as_before(parent, tmp_path):
    model = child_of(parent, STREAMING, packed())
    model.save_pretrained(tmp_path)
    again = surgery.load(tmp_path).eval()
    want, got = (decoded(m, tokens(), 40)[0] for m in (model, again))
    assert torch.equal(want, got)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([STREAMING, packed("kivi")], "packs several tokens together.*Use the codec int8"),
        ([STREAMING | {"merge": "mean"}, packed()], "merge: mean changes slots when slots leave"),
        ([STREAMING | {"positions": "cache"}, packed()], "positions: cache turns keys when slots leave"),
        ([STREAMING | {"read": "quest"}, packed()], "read: quest asks for slots as numbers"),
        ([{"rewriter": "dms", "ratio": 2, "window": 4}, packed()], "plain numbers, not int4 4 bits. Evict by a rank"),
    ],
)
def test_what_pages_of_codes_cannot_hold_is_refused(parent, steps, message):
    with pytest.raises(PlanError, match=message):
        surgery.plan(parent, {"steps": steps})


@pytest.mark.parametrize("width", [8, 24, 64])
@pytest.mark.parametrize(("codec", "bits"), [("int8", 8), ("fp8", 8), ("int4", 2), ("int4", 3), ("turbo", 3)])
def test_rows_are_the_bytes_that_codecs_count(codec, bits, width):
    store = Codec(codec=codec, k_bits=bits, v_bits=bits)
    assert has_rows(store)
    x = torch.randn(2, 3, 5, width, generator=torch.Generator().manual_seed(0))
    form = store.forms()[0]
    rows = Rows(form, width, torch.float32)
    coded = rows.encode(x)
    assert coded.dtype == torch.uint8 and coded.shape[-1] == form.bytes_of(1, 1, width)
    assert_close(rows.decode(coded), form.decode(form.encode(x), width))
    plain = Rows(None, width, torch.bfloat16)
    assert torch.equal(plain.decode(plain.encode(x.bfloat16())), x.bfloat16())
    assert not has_rows(Codec(codec="kivi", k_bits=2, v_bits=2))


@torch.no_grad()
def test_a_stock_model_gets_a_cache_that_evicts_and_packs(parent):
    ids = tokens()
    options = {"ratio": 2, "recent": 12, "observe": 8, "budget": "ada"}
    cache = surgery.cache(parent, codec="int4", evict="snapkv", k_bits=6, **options)
    got, held = decoded(parent, ids, 40, cache)
    evict = {"rewriter": "evict", "scorer": "snapkv", **options}
    child = child_of(parent, evict, {"rewriter": "quantise", "codec": "int4", "k_bits": 6})
    want, other = decoded(child, ids, 40)
    assert_close(got, want)
    assert tensor_bytes(held) == tensor_bytes(other)
    with pytest.raises(PlanError, match="packs several tokens together"):
        surgery.cache(parent, codec="kivi", evict="snapkv", ratio=2)


@torch.no_grad()
def test_numbers_that_are_not_finite_are_refused_with_the_layer(parent):
    model = child_of(parent, STREAMING, packed())
    model.model.surgery_attentions[1].v_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="layer 1: its values hold numbers that are not finite, which int4"):
        model(tokens(), use_cache=True)
