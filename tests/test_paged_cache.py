"""The cache of gated attention: whole sequences, chunks and single tokens give the same, and bytes really fall."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from closeness import assert_close
from gated_models import GREEDY, contents, merge, merged_model, model_of, run, tokens
from methods import parent
from transformers import Cache, DynamicCache, StaticCache

import surgery.runtime.paged_attention
import surgery.runtime.pooling_cache
from surgery.errors import RecipeError
from surgery.measure.decode_layouts import of_model
from surgery.measure.evaluate import evaluate
from surgery.measure.memory import cache_size, tensor_bytes
from surgery.runtime.layout import AHEAD, LayerPlan
from surgery.runtime.paged_cache import PagedLayer
from surgery.runtime.retained import table_width

FORMS = [("dms", 1), ("dms", 12), ("dms", 256), ("dmc", 1), ("dmc", 12), ("dmc", 256), ("dmc", None)]
every_form = pytest.mark.parametrize(("method", "window"), FORMS)


def assert_same_contents(one: Cache, other: Cache) -> None:
    for a, b in zip(contents(one), contents(other), strict=True):
        for x, y in zip(a, b, strict=True):
            assert x.shape == y.shape
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@every_form
def test_whole_sequence_prefill_chunks_and_single_tokens_are_the_same(method: str, window: int | None) -> None:
    # Window 256 has to be left as well: most of the sequence is then prefilled.
    length = 290 if window == 256 else 40
    model, ids = model_of(method, window), tokens(length=length)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
    prefilled, cache = run(model, ids, [length])
    assert_close(prefilled, whole)
    for ends in ([9, 10, 25, length], [length - 30, *range(length - 29, length + 1)]):
        logits, other = run(model, ids, ends)
        assert_close(logits, whole)
        assert_same_contents(cache, other)
    assert int(cache.layers[0].lengths.sum()) < 4 * length


@pytest.mark.parametrize("method", ["dms", "dmc"])
def test_a_long_prompt_is_read_in_blocks_and_loses_nothing(method: str) -> None:
    model, ids = model_of(method, 12), tokens(batch=1, length=600)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
    logits, cache = run(model, ids, [600])
    assert_close(logits, whole, 2e-5)
    assert_same_contents(cache, run(model, ids, [300, 600])[1])


@every_form
def test_gates_that_keep_all_change_nothing_and_gates_that_drop_all_keep_what_they_must(
    method: str, window: int | None
) -> None:
    ids = tokens()
    logits, cache = run(model_of(method, window, drops=0.0), ids, [20, 21, 40])
    with torch.no_grad():
        assert_close(logits, parent("llama")(ids, use_cache=False).logits)
    assert all(bool((layer.lengths == 40).all()) for layer in cache.layers)
    model = model_of(method, window, drops=1.0)
    logits, cache = run(model, ids, [20, 21, 40])
    with torch.no_grad():
        assert_close(logits, model(ids, use_cache=False).logits)
    # dms: the window and 4 sinks. dmc: 4 sinks, and one slot behind them for all the rest.
    kept = 5 if method == "dmc" else min(40, 4 + (window or 0))
    assert all(bool((layer.lengths == kept).all()) for layer in cache.layers)


@every_form
def test_rows_of_a_padded_batch_are_what_they_are_alone(method: str, window: int | None) -> None:
    model, ids, mask = model_of(method, window), tokens(length=30), torch.ones(2, 30, dtype=torch.long)
    ids[0, :7], mask[0, :7] = 0, 0
    # A second turn, in which the other row is the shorter one, and its padding lies between its own tokens.
    mask[1, 20:24], mask[1, 28] = 0, 0
    cache, outputs = DynamicCache(config=model.config), []
    with torch.no_grad():
        for begin, end in ((0, 20), (20, 28), (28, 29), (29, 30)):
            position = (mask.cumsum(-1) - 1).clamp_min(0)[:, begin:end]
            step = {"attention_mask": mask[:, :end], "position_ids": position, "past_key_values": cache}
            outputs.append(model(ids[:, begin:end], use_cache=True, **step).logits)
    logits = torch.cat(outputs, dim=1)
    held = contents(cache)
    for row in range(2):
        real = mask[row].bool()
        alone, lonely = run(model, ids[row, real][None], [int(real.sum())])
        assert_close(logits[row, real], alone[0], 2e-5)
        for layer, other in zip(held, contents(lonely), strict=True):
            for k in range(2):
                torch.testing.assert_close(layer[2 * row + k], other[k], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("groups", ["own", "fewer", "unequal"])
@pytest.mark.parametrize(("method", "window"), [("dms", 6), ("dmc", 3), ("dmc", None)])
def test_generate_is_the_same_with_every_cache(method: str, window: int | None, groups: str) -> None:
    model, ids = model_of(method, window, groups=groups), tokens(length=14)
    want = model.generate(ids, **GREEDY, use_cache=False)
    assert torch.equal(model.generate(ids, **GREEDY), want)
    assert torch.equal(model.generate(ids, **GREEDY, past_key_values=model.static_cache(26, ratio=1.0)), want)
    with torch.no_grad():
        logits = model(want, use_cache=False).logits
    assert torch.equal(logits[:, 13:-1].argmax(-1), want[:, 14:])
    beams = model.generate(ids, **GREEDY, num_beams=3)
    assert torch.equal(beams, model.generate(ids, **GREEDY, num_beams=3, use_cache=False))
    mask = torch.ones_like(ids)
    ids[0, :5], mask[0, :5] = 0, 0
    batched = model.generate(ids, attention_mask=mask, **GREEDY)
    assert torch.equal(batched[:1, 5:], model.generate(ids[:1, 5:], **GREEDY))
    assert torch.equal(batched[1:], model.generate(ids[1:], **GREEDY))


@pytest.mark.parametrize("family", ["qwen3", "gpt_neox", "gpt2", "olmo2", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("method", ["dms", "dmc"])
def test_other_families_decode_as_they_prefill(method: str, family: str) -> None:
    model, ids = model_of(method, 6, family=family), tokens(length=24)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
    logits, cache = run(model, ids, [10, *range(11, 20), 24])
    assert_close(logits, whole, 2e-5)
    paged = [layer for layer in cache.layers if isinstance(layer, PagedLayer)]
    assert paged and all(int(layer.lengths.max()) < 24 for layer in paged)


@pytest.mark.parametrize(("method", "window"), [("dms", 6), ("dmc", 3), ("dmc", None)])
def test_readers_follow_the_slots_of_their_owner(method: str, window: int | None) -> None:
    model, ids = model_of(method, window, shared=True), tokens()
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
    logits, cache = run(model, ids, [20, *range(21, 30), 40])
    assert_close(logits, whole)
    assert tensor_bytes(cache) == tensor_bytes_of_layer(cache, 0)
    assert torch.equal(model.generate(ids, **GREEDY), model.generate(ids, **GREEDY, use_cache=False))


def tensor_bytes_of_layer(cache: Cache, layer: int) -> int:
    return sum(t.numel() * t.element_size() for t in cache.layers[layer].tensors())


def test_decoding_without_the_kernels_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = tokens()
    for method, window in (("dms", 6), ("dmc", 3), ("dmc", None)):
        model = model_of(method, window)
        with_kernels, cache = run(model, ids, [20, *range(21, 41)])
        with monkeypatch.context() as patch:
            patch.setattr(surgery.runtime.paged_attention, "AVAILABLE", False)
            without, other = run(model, ids, [20, *range(21, 41)])
        assert_close(without, with_kernels)
        assert_same_contents(cache, other)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_the_operator_that_merges_is_the_same(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = model_of("dmc", None, family=family), tokens()
    logits, cache = run(model, ids, [20, *range(21, 41)])
    monkeypatch.setattr(surgery.runtime.pooling_cache, "_has_operator", lambda device: True)
    by_operator, other = run(model, ids, [20, *range(21, 41)])
    assert_close(by_operator, logits)
    assert_same_contents(cache, other)


def bytes_of_slots(plan: LayerPlan, slots: list[int]) -> int:
    """Of a dynamic cache just filled with one sequence, whose KV heads hold so many slots."""
    assert plan.retain is not None
    pages = [-(-(count + AHEAD) // plan.retain.page) for count in slots]
    return plan.bytes_of_pages(sum(pages), table_width(max(pages)))


@every_form
def test_bytes_are_what_the_slots_predict_and_fall_with_the_ratio(method: str, window: int | None) -> None:
    ids, measured = tokens(batch=1, length=512), []
    for drops in (0.0, 0.5, 0.8):
        model = model_of(method, window, drops=drops)
        _, cache = run(model, ids, [512])
        slots = [layer.lengths[0].tolist() for layer in cache.layers]
        measured.append(tensor_bytes(cache))
        assert measured[-1] == sum(bytes_of_slots(p, s) for p, s in zip(model.plans, slots, strict=True))
        size = cache_size(model, ids)
        kept = sum(map(sum, slots)) / sum(map(len, slots))
        assert size.bytes == measured[-1] and size.achieved_ratio == pytest.approx(512 / kept)
    assert measured[0] > measured[1] > measured[2]


@pytest.mark.parametrize(("method", "window"), [("dms", 64), ("dmc", None)])
def test_pages_are_full_to_6_percent_at_2k_tokens_and_the_plan_says_their_bytes(
    method: str, window: int | None
) -> None:
    model, ids = model_of(method, window, drops=0.75), tokens(batch=1, length=2048)
    # Prefill and 40 single tokens: growth is slack as well.
    _, cache = run(model, ids, [2008, *range(2009, 2049)])
    assert len(cache.layers) == 2
    for layer, form in zip(cache.layers, model.plans, strict=True):
        slots = int(layer.lengths.sum())
        pool = layer.pool.keys.numel() + layer.pool.values.numel()
        assert pool <= 1.06 * slots * form.project.dims / form.project.kv_heads
        retain = merge(method, window, ratio=2048 * 2 / slots)
        predicted = replace(form, retain=retain).bytes_at(2048)
        assert tensor_bytes_of_layer(cache, form.layer) == pytest.approx(predicted, rel=0.02)


@torch.no_grad()
def test_rows_grow_in_whole_stretches_and_forget_pages_that_are_gone() -> None:
    model, ids = model_of("dms", 12, drops=0.0), tokens(batch=2, length=920)
    mask = torch.ones_like(ids)
    ids[1, :60], mask[1, :60] = 0, 0
    positions, cache = (mask.cumsum(-1) - 1).clamp_min(0), DynamicCache(config=model.config)
    # The second sequence takes a new page after 8 single tokens, and with it a spare one.
    for begin, end in ((0, 900), *((t, t + 1) for t in range(900, 910))):
        step = {"attention_mask": mask[:, :end], "position_ids": positions[:, begin:end], "past_key_values": cache}
        logits = model(ids[:, begin:end], use_cache=True, **step).logits
    assert_close(logits[:1, -1], model(ids[:1, :910], use_cache=False).logits[:, -1])
    for layer in cache.layers:
        for table, count in zip(layer.tables.flatten(0, 1), layer.lengths.flatten().tolist(), strict=True):
            pages = table[: -(-count // layer.retain.page)]
            assert torch.equal(pages, pages[0] + torch.arange(len(pages), dtype=torch.int32))
    cache.reorder_cache(torch.tensor([1, 0]))  # the spare pages are given back
    step = {"attention_mask": mask.flip(0)[:, :912], "position_ids": positions.flip(0)[:, 910:912]}
    logits = model(ids.flip(0)[:, 910:912], past_key_values=cache, use_cache=True, **step).logits
    assert_close(logits[1:, -1], model(ids[:1, :912], use_cache=False).logits[:, -1])
    assert_close(logits[:1, -1], model(ids[1:, 60:912], use_cache=False).logits[:, -1])


@pytest.mark.parametrize(("method", "window"), [("dms", 6), ("dmc", 3), ("dmc", None)])
def test_a_conversation_goes_on_from_its_cache_and_from_a_copy_of_it(method: str, window: int | None) -> None:
    model, ids, cache = model_of(method, window), tokens(length=20), DynamicCache()
    first = model.generate(ids, **GREEDY, past_key_values=cache, prefill_chunk_size=8)
    assert torch.equal(first, model.generate(ids, **GREEDY))
    second, kept = torch.cat((first, tokens(length=5, seed=1)), dim=1), copy.deepcopy(cache)
    # A mask, lest the padding token that was generated be taken for padding.
    arguments = {**GREEDY, "attention_mask": torch.ones_like(second)}
    want = model.generate(second, **arguments)
    assert torch.equal(model.generate(second, **arguments, past_key_values=cache), want)
    assert torch.equal(model.generate(second, **arguments, past_key_values=kept), want)


def test_training_reads_no_cache() -> None:
    model, ids = merged_model(merge("dms", 12)).train(), tokens()
    assert model(ids).past_key_values.get_seq_length() == 0
    _, cache = run(model.eval(), ids, [40])
    with pytest.raises(ValueError, match=r"relaxed in training.*model\.eval\(\)"):
        run(model.train(), ids, [1], cache)


@pytest.mark.parametrize("method", ["dms", "dmc"])
def test_going_on_from_a_cache_that_training_left_empty_is_refused(method: str) -> None:
    model, ids = merged_model(merge(method, 12)).train(), tokens()
    with pytest.raises(ValueError, match=r"was in training when tokens came.*model\.eval\(\)"):
        model.generate(ids, **GREEDY)
    cache = model(ids).past_key_values
    with pytest.raises(ValueError, match="keeps none of them"):
        run(model.eval(), ids, [1], cache)
    cache.reset()
    assert_close(run(model, ids, [40], cache)[0], run(model, ids, [40])[0])


def test_what_cannot_be_undone_is_refused() -> None:
    model, ids = model_of("dmc", None), tokens(batch=1)
    _, cache = run(model, ids, [40])
    assert not any(layer.is_croppable or layer.is_compileable for layer in cache.layers)
    assert model.static_cache(64).is_compileable
    with pytest.raises(ValueError, match="cannot be taken back"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="without an assistant"):
        model.generate(ids, **GREEDY, prompt_lookup_num_tokens=3)
    used = DynamicCache(config=model.config)
    with torch.no_grad():
        parent("llama")(ids, past_key_values=used, use_cache=True)
    with pytest.raises(ValueError, match="needs an empty dynamic or static cache"):
        run(model, ids, [40], used)


@pytest.mark.parametrize(("method", "window"), [("dms", 6), ("dmc", 3), ("dmc", None)])
@pytest.mark.parametrize("static", [False, True])
def test_sequences_can_be_chosen_and_repeated(method: str, window: int | None, static: bool) -> None:
    model, ids = model_of(method, window), tokens(batch=3)
    cache = StaticCache(config=model.config, max_cache_len=40) if static else DynamicCache(config=model.config)
    run(model, ids, [20], cache)
    order = torch.tensor([2, 0, 2])
    cache.reorder_cache(order)
    ids = ids[order]
    logits, _ = run(model, ids[:, 20:], [1, 2, 3], cache)
    want, _ = run(model, ids, [20, 23])
    assert_close(logits, want[:, 20:])
    cache.batch_select_indices(torch.tensor([True, False, True]))
    cache.batch_repeat_interleave(2)
    ids = ids[[0, 0, 2, 2]]
    logits, _ = run(model, ids[:, 23:], [3, 4], cache)
    want, _ = run(model, ids, [20, 27])
    assert_close(logits, want[:, 23:])
    cache.reset()
    assert cache.get_seq_length() == 0


def test_evaluation_scores_through_the_cache() -> None:
    model = model_of("dms", 12)
    report = evaluate(model, text=tokens(batch=4, length=64), length=64)
    assert abs(report.model.cache_gap or 1.0) < 1e-4
    assert report.model.cache.bytes < cache_size(model_of("dms", 12, drops=0.0), tokens(1, 64)).bytes
    assert (report.model.cache.achieved_ratio or 0) > 1.3


def test_a_benchmark_that_has_no_such_cache_refuses(tmp_path: Path) -> None:
    model_of("dms", 12).save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match=r"averages or drops tokens \(dms\).*eval --speed"):
        of_model(str(tmp_path), "float32")
