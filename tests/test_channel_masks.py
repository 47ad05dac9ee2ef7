"""`think` of quantised caches: packed keys without the channels that queries look at least."""

from dataclasses import replace

import pytest
import torch
from families import tiny_model
from test_quantised import IDS, SMALL, TEXT, decoded, greedy, relative_error
from test_static_quantised import LENGTH, assert_same, through, through_one_graph
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

import surgery
from surgery.measure.memory import tensor_bytes
from surgery.rewriters.stored.channels import channel_mask
from surgery.runtime.calibrated_forms import columns_of_mask
from surgery.runtime.calling import cache_argument

SHARE = {"rewriter": "share", "layout": {1: 0}, "init": "replace"}
UNEVEN = {"rewriter": "gqa", "groups": [[0, 1, 2], [3]], "init": "mean"}


def converted(codec="fp16", family="llama", before=(), **options):
    parent = tiny_model(family, **({"num_key_value_heads": 4} if before else {})).eval()
    step = SMALL | {"codec": codec, "think": 0.5} | options
    return surgery.convert(parent, {"steps": [*before, step]}, calibration=TEXT).eval()


def masks(model):
    """By layer, [K, H]."""
    found = [attention.codec.get_buffer("k_mask_bits") for attention in model.base_model.surgery_attentions]
    return [mask.bool() for mask in found]


class Without(DynamicLayer):
    """Keys in full, and to whoever reads them those that would be packed without channels."""

    def __init__(self, mask_KH):
        super().__init__()
        self.mask_KH = mask_KH

    def update(self, key_states, value_states, *args, **kwargs):
        key, value = super().update(key_states, value_states, *args, **kwargs)
        packed = max(0, key.shape[2] - key_states.shape[2] - 2 - 6) // 8 * 8
        left = torch.arange(key.shape[2])[:, None].lt(2 + packed) & torch.arange(key.shape[2])[:, None].ge(2)
        return key.masked_fill(left & ~self.mask_KH[:, None], 0.0), value


@pytest.mark.parametrize("family", ["qwen3", "gptj"])
def test_packed_tokens_are_scored_without_the_channels_and_all_others_with_all(family):
    """Beside the parent with the same channels struck out of its own cache."""
    model, parent = converted(family=family), tiny_model(family).eval()
    ids = IDS[:, :44]
    got, _ = decoded(model, ids, 9)
    cache = DynamicCache(config=parent.config)
    cache.layers = [Without(mask) for mask in masks(model)]
    given = {cache_argument(parent): cache}
    with torch.no_grad():
        parts = [parent(ids[:, :9], **given).logits]
        parts += [parent(ids[:, t : t + 1], **given).logits for t in range(9, ids.shape[1])]
        plain = parent(ids).logits
    want = torch.cat(parts, 1)
    assert relative_error(want, plain) > 0.005
    assert relative_error(got, want) < 0.03 * relative_error(want, plain)


@pytest.mark.parametrize(
    ("pairs", "kept"),
    [(([0, 1], [2, 3]), [[1, 3, 4, 6], [0, 2, 5, 6]]), (([], []), [[4, 5, 6, 7], [0, 4, 5, 6]])],
    ids=["turning", "still"],
)
def test_channels_stay_where_queries_and_keys_are_largest_and_pairs_stay_together(pairs, kept):
    """Channels 1 and 3 turn together: what one has of queries meets what the other has of keys."""
    q = torch.tensor([[1, 9, 1, 0.1, 4, 2, 3, 1.5], [1, 1, 0.5, 1, 2, 1, 1, 1]])
    k = torch.tensor([[1, 0.1, 1, 9, 1, 1, 1, 1], [8.0, 1, 1, 1, 1, 3, 7, 1]])
    assert [mask.nonzero()[:, 0].tolist() for mask in channel_mask(q, k, pairs, 4)] == kept


def test_masks_are_those_of_the_queries_that_read_the_head():
    """A channel that only one of the heads asks for stays, and those that none does leave."""
    parent = tiny_model("llama").eval()
    attention, H = parent.model.layers[0].self_attn, parent.config.head_dim
    asked = [0, 3, 5, 6]
    with torch.no_grad():
        rows = torch.zeros(attention.q_proj.weight.shape[0] // H, H, dtype=torch.bool)
        rows[:, [*asked[:2], *(j + H // 2 for j in asked[:2])]] = True
        rows[-1, [*asked[2:], *(j + H // 2 for j in asked[2:])]] = True
        attention.q_proj.weight.mul_(torch.where(rows.flatten()[:, None], 1.0, 1e-3))
    model = surgery.convert(parent, {"steps": [SMALL | {"codec": "int8", "think": 0.5}]}, calibration=TEXT)
    last = masks(model)[0][-1].nonzero()[:, 0].tolist()
    assert last == sorted([*asked, *(j + H // 2 for j in asked)])


CASES = [("int4", (UNEVEN,)), ("kivi", (SHARE,)), ("gear", ())]


@pytest.mark.parametrize(("codec", "before"), CASES, ids=["uneven groups", "shared", "alone"])
def test_static_and_dynamic_caches_hold_what_is_planned_and_say_the_same(codec, before):
    model = converted(codec, before=before)
    dynamic, static = DynamicCache(config=model.config), model.static_cache(LENGTH)
    ends = [20, 23, *range(24, 38), 70, *range(71, LENGTH + 1)]
    assert_same(through(model, static, ends), through(model, dynamic, ends))
    assert tensor_bytes(static) == 2 * sum(plan.static_bytes(LENGTH) for plan in model.plans)
    _, cache = decoded(model, IDS, 57)
    assert tensor_bytes(cache) == 2 * sum(plan.bytes_at(IDS.shape[1]) for plan in model.plans)
    plan = model.plans[0]
    assert plan.bytes_at(60) < replace(plan, store=replace(plan.store, k_channels=None)).bytes_at(60)


@pytest.mark.slow
def test_compiled_steps_are_one_graph():
    model = converted("int4", before=(UNEVEN,))
    ends = [20, *range(21, 40)]
    got, _ = through_one_graph(model, model.static_cache(LENGTH), ends)
    assert_same(got, through(model, DynamicCache(config=model.config), ends))


def test_masks_travel_and_damaged_ones_are_refused(tmp_path):
    model = converted("int4", bits="sensitivity", bits_per_number=7.0)
    assert model.plans[0].store.k_channels == 8
    surgery.save(model, tmp_path / "child")
    loaded = surgery.load(tmp_path / "child").eval()
    assert torch.equal(greedy(loaded, IDS[:, :30]), greedy(model, IDS[:, :30]))
    mask = masks(loaded)[0]
    torch.testing.assert_close(columns_of_mask(mask, 8).sum(-1), mask.float())
    loaded.base_model.surgery_attentions[0].codec.get_buffer("k_mask_bits").fill_(1)
    with pytest.raises(ValueError, match="8 were planned. The checkpoint is damaged"):
        decoded(loaded, IDS, 20)


def test_what_cannot_be_masked_is_refused_with_the_way_out():
    parent = tiny_model("llama").eval()
    step = {"rewriter": "quantise", "think": 0.5}
    mla = {"rewriter": "mla", "rank": 24, "rope_dims": 8}
    pages = {"rewriter": "evict", "scorer": "snapkv", "ratio": 2, "recent": 12, "observe": 8}
    for steps, message in [
        ([step | {"think": 1.5}], "think: 1.5 is a part of the channels"),
        ([step | {"codec": "metric"}], "metric learns from the text how to hold all .* one of int8, fp8, fp16"),
        ([step | {"think": 0.05}], "layer 0: think: 0.05 of 16 channels leaves 16, for 2 of them leave at a time"),
        ([mla, step], "layer 0: .*think leaves channels of keys out, and the layer caches a latent"),
        ([pages, step], "each a whole key, and think leaves channels out. Leave think out"),
    ]:
        with pytest.raises(surgery.SurgeryError, match=message):
            surgery.plan(parent, {"steps": steps})
    with pytest.raises(surgery.PlanError, match="think reads calibration text"):
        surgery.cache(parent, "int4", think=0.5)
    plan = surgery.plan(parent, {"steps": [step | {"codec": "int8"}]})
    assert "think leaves 8 of 16 channels out of each packed key" in " ".join(str(plan).split())
    assert (
        "Not llama.cpp" in plan.engines
        and "Not vLLM" in surgery.plan(parent, {"steps": [step | {"codec": "fp8"}]}).engines
    )
