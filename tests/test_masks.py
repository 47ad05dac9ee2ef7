"""Masks and positions: padding, packed documents, masks of four dimensions, positions that restart or jump."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from closeness import assert_close
from gated_models import merge, merged_model, model_of
from methods import METHODS, latent, merged, parent, sites
from methods import converted as convert
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache

import surgery.runtime.gated
from surgery.attention.latent import LatentWeights
from surgery.attention.weights import AttentionWeights
from surgery.rewriters.latent.low_rank import lowrank
from surgery.rewriters.latent.moments import LatentMoments
from surgery.rewriters.latent.rotary_split import mla
from surgery.runtime.calling import CallingConvention, cache_argument
from surgery.runtime.latent import numbers_as_positions, positions_as_numbers
from surgery.runtime.layout import AttentionSite, Latent, LayerPlan
from surgery.runtime.modeling import load_converted

T = 14
CHUNKS = ((0, 6), (6, 9), (9, 10), (10, 14))


def tokens(length: int = T) -> Tensor:
    return torch.randint(3, 128, (2, length), generator=torch.Generator().manual_seed(0))


def mask_of(*hidden: tuple[int, int, int], length: int = T) -> Tensor:
    """Ones, but 0 at places begin to end of a row."""
    mask = torch.ones(2, length, dtype=torch.long)
    for row, begin, end in hidden:
        mask[row, begin:end] = 0
    return mask


def positions_of(mask: Tensor) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp_min(0)


def causal(mask: Tensor, begin: int = 0, end: int | None = None, length: int | None = None) -> Tensor:
    """bool [B, 1, T, S], True is visible, of the queries from `begin` to `end`."""
    end = mask.shape[1] if end is None else end
    seen = torch.zeros(len(mask), length or end, dtype=torch.bool)
    seen[:, :end] = mask[:, :end].bool()
    return (torch.arange(len(seen[0])) <= torch.arange(begin, end)[:, None]) & seen[:, None, None]


def additive(seen: Tensor, low: float = torch.finfo(torch.float32).min) -> Tensor:
    return torch.where(seen, 0.0, low)


@torch.no_grad()
def whole(model: PreTrainedModel, ids: Tensor, **more: Tensor) -> Tensor:
    return model(ids, use_cache=False, **more).logits


@torch.no_grad()
def in_chunks(
    model: PreTrainedModel, ids: Tensor, mask: Tensor | None, positions: Tensor, cache: Cache | None = None
) -> Tensor:
    cache, outputs = cache if cache is not None else DynamicCache(config=model.config), []
    for begin, end in CHUNKS:
        step = {cache_argument(model): cache, "position_ids": positions[:, begin:end]}
        if mask is not None:
            step["attention_mask"] = mask[:, :end]
        outputs.append(model(ids[:, begin:end], use_cache=True, **step).logits)
    return torch.cat(outputs, dim=1)


@functools.cache
def exact(method: str, family: str) -> PreTrainedModel:
    """A conversion that computes what its parent computes."""
    if method == "identity":
        return convert("identity", family).eval()

    def made(w: AttentionWeights, m: LatentMoments) -> LatentWeights:
        inputs = w.q_NHD.shape[2] + int(w.has_bias)
        k, v = (min(w.kv_heads * dim, inputs) for dim in (w.head_dim, w.value_dim))
        if method == "lowrank":
            return lowrank(w, m, k, v)
        return mla(w, m, min(w.kv_heads * (w.head_dim + w.value_dim), inputs), 2 * w.kv_heads * w.frequencies)

    return latent(made, [family]).convert(parent(family), sites(family)).eval()


PADDINGS = {
    "left": mask_of((0, 0, 5)),
    "right": mask_of((0, 9, T)),
    "between": mask_of((0, 4, 7), (1, 10, 12)),
    "a whole row": mask_of((0, 0, T)),
}
JUMPS = {
    "restart": torch.cat((torch.arange(5), torch.arange(9))),
    "start late": torch.arange(T) + 7,
    "jump": torch.tensor([0, 1, 2, 3, 8, 9, 10, 20, 21, 22, 30, 31, 32, 33]),
}
EXACT = [
    *(("identity", family) for family in ("llama", "mistral", "gemma3", "gpt2", "bloom", "falcon_alibi", "mpt")),
    *(("lowrank", family) for family in ("llama", "mistral", "qwen3", "gpt_neox", "gpt_oss", "bloom")),
    *(("mla", family) for family in ("llama", "mistral", "gpt_neox", "bloom")),
]
exact_forms = pytest.mark.parametrize(("method", "family"), EXACT)


def takes_positions(family: str) -> bool:
    return family not in ("bloom", "mpt")


def positioned(family: str, positions: Tensor) -> dict[str, Tensor]:
    return {"position_ids": positions} if takes_positions(family) else {}


@exact_forms
def test_padding_anywhere_gives_what_the_parent_gives(method: str, family: str) -> None:
    model, ids = exact(method, family), tokens()
    for name, mask in PADDINGS.items():
        if name == "a whole row" and family == "mpt":
            continue
        more = positioned(family, positions_of(mask))
        got, want = (whole(m, ids, attention_mask=mask, **more)[mask.bool()] for m in (model, parent(family)))
        assert_close(got, want, 1e-4)


@exact_forms
def test_padding_anywhere_gives_what_the_parent_gives_through_a_cache(method: str, family: str) -> None:
    if not takes_positions(family):
        pytest.skip("the parent takes no positions")
    model, ids = exact(method, family), tokens()
    for mask in PADDINGS.values():
        want = in_chunks(parent(family), ids, mask, positions_of(mask))[mask.bool()]
        assert_close(in_chunks(model, ids, mask, positions_of(mask))[mask.bool()], want, 1e-4)
        if family in ("llama", "mistral", "qwen3"):
            static = in_chunks(model, ids, mask, positions_of(mask), StaticCache(config=model.config, max_cache_len=16))
            assert_close(static[mask.bool()], want, 1e-4)


@exact_forms
@pytest.mark.parametrize("jump", JUMPS)
def test_positions_that_restart_or_jump_give_what_the_parent_gives(method: str, family: str, jump: str) -> None:
    if not takes_positions(family):
        pytest.skip("the parent takes no positions")
    model, ids, positions = exact(method, family), tokens(), JUMPS[jump].expand(2, -1)
    assert_close(whole(model, ids, position_ids=positions), whole(parent(family), ids, position_ids=positions), 1e-4)
    want = in_chunks(parent(family), ids, None, positions)
    assert_close(in_chunks(model, ids, None, positions), want, 1e-4)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(("method", "family"), [("identity", "mistral"), ("lowrank", "qwen3"), ("mla", "mistral")])
def test_a_mask_of_four_dimensions_counts_as_it_is(method: str, family: str, implementation: str) -> None:
    """Sliding parents do not add their window to it either."""
    model, ids = exact(method, family), tokens()
    random = torch.rand(2, 1, T, T, generator=torch.Generator().manual_seed(1))
    seen = causal(torch.ones_like(ids)) & ((random > 0.3) | torch.eye(T, dtype=torch.bool))
    prefix = causal(torch.ones_like(ids)).clone()
    prefix[..., :5, :5] = True
    found = {}
    for m in (parent(family), model):
        before = m.config._attn_implementation
        m.set_attn_implementation(implementation)
        masks = [
            additive(seen),
            additive(prefix),
            additive(causal(torch.ones_like(ids)), -1e9),
            random + additive(seen),
        ]
        if implementation == "sdpa":  # eager parents add booleans to the scores
            masks.append(seen)
        found[m] = [whole(m, ids, attention_mask=mask) for mask in masks]
        m.set_attn_implementation(before)
    for got, want in zip(found[model], found[parent(family)], strict=True):
        assert_close(got, want, 1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_three_ends_of_one_prefix_under_one_mask_are_as_three_sequences(family: str) -> None:
    """With the cache that a model makes by default: positions repeat in it."""
    model, ids = exact("lowrank", family), tokens()[:1, :6]
    tree = torch.ones(6, 6, dtype=torch.bool).tril()
    tree[4, 3] = tree[5, 3] = tree[5, 4] = False
    positions = torch.tensor([[0, 1, 2, 3, 3, 3]])
    together = model(ids, attention_mask=additive(tree[None, None]), position_ids=positions, use_cache=True).logits[0]
    alone = torch.stack([whole(model, ids[:, [0, 1, 2, end]])[0, -1] for end in (3, 4, 5)])
    assert_close(together[-3:], alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cached_positions_are_exact(dtype: torch.dtype) -> None:
    positions = torch.cat((torch.arange(5000), torch.tensor([65535, 65536, 131_072, 1_048_577, 2**24 - 1, -1])))[None]
    numbers = positions_as_numbers(positions, dtype)
    assert numbers.dtype == dtype
    assert torch.equal(numbers_as_positions(numbers), positions.float())


@torch.no_grad()
def test_positions_beyond_256_survive_a_cache_in_bfloat16() -> None:
    model, ids = convert("lowrank", "llama").to(torch.bfloat16).eval(), tokens()
    positions = (torch.arange(T) * 3 + 100_001).expand(2, -1)
    cached = model(ids, position_ids=positions, use_cache=True).logits
    assert torch.equal(cached, whole(model, ids, position_ids=positions, attention_mask=torch.ones_like(ids)))


def test_records_written_before_masks_were_followed_still_load() -> None:
    site, plan = sites("mistral")[0], exact("lowrank", "llama").plans[0]
    assert site.window_in_mask
    data = site.to_dict()
    del data["window_in_mask"]
    assert AttentionSite.from_dict(data) == replace(site, window_in_mask=False)
    assert isinstance(plan.project, Latent) and plan.project.keeps_positions
    data = plan.to_dict()
    del data["project"]["keeps_positions"]
    older = LayerPlan.from_dict(data)
    assert older.bytes_per_token == plan.bytes_per_token - 4
    call = CallingConvention(arguments=("hidden_states",)).to_dict()
    del call["alibi_skips_padding"]
    assert not CallingConvention.from_dict(call).alibi_skips_padding


# Tokens that merge or leave

LONG = 26
three_forms = pytest.mark.parametrize(("method", "window"), [("dms", 6), ("dmc", 3), ("dmc", None)])
BETWEEN = mask_of((0, 0, 3), (0, 9, 13), (1, 15, 17), (1, 25, 26), length=LONG)


def alone(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    return torch.cat([whole(model, ids[row, mask[row].bool()][None])[0] for row in range(2)])


@three_forms
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_padding_between_tokens_does_not_count(method: str, window: int | None, implementation: str) -> None:
    model, ids = model_of(method, window), tokens(LONG)
    before = model.config._attn_implementation
    model.set_attn_implementation(implementation)
    want, positions = alone(model, ids, BETWEEN), positions_of(BETWEEN)
    for mask in (BETWEEN, BETWEEN.bool(), additive(causal(BETWEEN)), additive(causal(BETWEEN), -1e9), causal(BETWEEN)):
        got = whole(model, ids, attention_mask=mask, position_ids=positions)[BETWEEN.bool()]
        assert_close(got, want, 2e-5)
    model.set_attn_implementation(before)


@three_forms
@pytest.mark.parametrize("shared", [False, True])
def test_training_does_not_count_padding(
    method: str, window: int | None, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(surgery.runtime.gated, "logistic_noise", torch.zeros_like)
    model, ids = merged_model(merge(method, window), shared=shared).train(), tokens(LONG)
    got = whole(model, ids, attention_mask=BETWEEN, position_ids=positions_of(BETWEEN))[BETWEEN.bool()]
    assert_close(got, alone(model, ids, BETWEEN), 2e-5)


@three_forms
@torch.no_grad()
def test_padding_itself_sees_the_tokens_before_it_whatever_stands_on_the_left(method: str, window: int | None) -> None:
    model, ids, length = model_of(method, window), tokens(LONG), 20
    mask = mask_of((0, 12, length), (1, 18, length), length=length)
    want = model(ids[:, :length], attention_mask=mask, position_ids=positions_of(mask), use_cache=True).logits
    moved = torch.cat((torch.zeros(2, 6, dtype=torch.long), ids[:, :length]), 1)
    mask = torch.cat((torch.zeros(2, 6, dtype=torch.long), mask), 1)
    for use_cache in (True, False):
        got = model(moved, attention_mask=mask, position_ids=positions_of(mask), use_cache=use_cache).logits
        assert_close(got[:, 6:], want, 2e-5)


@torch.no_grad()
def steps(model: PreTrainedModel, first: Tensor | None, then: Tensor | None, static: bool = False) -> Tensor:
    """Logits of the last six of 14 tokens under `then`, after eight under `first`."""
    ids = tokens()
    cache = model.static_cache(T, ratio=1.0) if static else DynamicCache(config=model.config)
    for mask, begin, end in ((first, 0, 8), (then, 8, T)):
        more = {} if mask is None else {"attention_mask": mask}
        logits = model(ids[:, begin:end], use_cache=True, **{cache_argument(model): cache}, **more).logits
    return logits


def hidden_from_all(*places: int) -> Tensor:
    mask = torch.ones(2, T, dtype=torch.long)
    mask[:, list(places)] = 0
    return mask


def with_hole(begin: int, query: int, key: int) -> Tensor:
    seen = causal(torch.ones(2, T), begin).clone()
    seen[:, :, query - begin, key] = ~seen[:, :, query - begin, key]
    return seen


LEFT = mask_of((0, 0, 3))
REFUSED = {
    "hides a cached token later": (None, hidden_from_all(3), "hides cached tokens"),
    "shows padding later": (LEFT[:, :8], torch.ones(2, T, dtype=torch.long), "shows what was padding"),
    "comes no more": (LEFT[:, :8], None, "shows what was padding"),
    "hides a cached token from one query": (None, with_hole(8, 10, 2), "hides cached tokens"),
    "hides a new token from one query": (None, with_hole(8, 12, 9), "not causality"),
    "shows a token of the future": (None, with_hole(8, 9, 12), "not causality"),
    "adds numbers": (None, additive(causal(torch.ones(2, T), 8)) + 0.5, "adds numbers"),
    "is of integers": (None, causal(torch.ones(2, T), 8).long(), "bool or additive"),
    "differs by head": (None, causal(torch.ones(2, T), 8).expand(-1, 4, -1, -1), "shape"),
    "is too short": (None, causal(torch.ones(2, T), 8)[..., :10], "shape"),
}


@pytest.mark.parametrize("method", ["dms", "dmc"])
@pytest.mark.parametrize("what", REFUSED)
def test_a_mask_that_a_cache_cannot_honour_is_refused(method: str, what: str) -> None:
    first, then, sentence = REFUSED[what]
    with pytest.raises(ValueError, match=sentence):
        steps(model_of(method, 6), first, then)


@torch.no_grad()
@pytest.mark.parametrize("method", ["dms", "dmc"])
def test_one_token_without_a_mask_is_refused_once_there_was_padding(method: str) -> None:
    """Here the attention is handed none at all."""
    model, ids, cache = model_of(method, 6), tokens(), DynamicCache()
    named = {cache_argument(model): cache, "use_cache": True}
    model(ids[:, :8], attention_mask=LEFT[:, :8], **named)
    with pytest.raises(ValueError, match="no attention mask came"):
        model(ids[:, 8:9], **named)


@pytest.mark.parametrize("method", ["dms", "dmc"])
def test_masks_that_say_the_same_give_the_same(method: str) -> None:
    model, late = model_of(method, 6), torch.ones(2, T)
    want = steps(model, None, None)
    for mask in (late.long(), causal(late, 8), additive(causal(late, 8)), additive(causal(late, 8), -1e9)):
        assert_close(steps(model, None, mask), want)
    assert_close(steps(model, None, causal(late, 8, length=T), static=True), want)
    with pytest.raises(ValueError, match="hides cached tokens"):
        steps(model, None, hidden_from_all(3), static=True)


@pytest.mark.parametrize("training", [False, True])
def test_a_whole_sequence_under_an_arbitrary_mask_is_refused(training: bool) -> None:
    model, ids = merged_model(merge("dms", 6)).train(training), tokens()
    prefix = causal(torch.ones(2, T)).clone()
    prefix[..., :5, :5] = True
    window = causal(torch.ones(2, T)) & (torch.arange(T)[:, None] - torch.arange(T) < 5)
    for mask in (prefix, window, with_hole(0, 10, 4)):
        with pytest.raises(ValueError, match="documents side by side"):
            whole(model, ids, attention_mask=mask)
    with pytest.raises(ValueError, match="is_causal=False"):
        whole(model, ids, is_causal=False)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["identity", "unequal_groups", "mla", "lowrank", "shared_lowrank", "dms", "dmc"])
def test_implementations_agree_on_padded_batches_when_switched_after_loading(method: str, tmp_path: Path) -> None:
    convert(method, "llama").save_pretrained(tmp_path)
    model, ids, mask = load_converted(str(tmp_path)).eval(), tokens(), mask_of((0, 0, 5), (1, 9, 12))
    want, real = whole(model, ids, attention_mask=mask, position_ids=positions_of(mask)), mask.bool()
    for implementation in ("eager", "surgery", "sdpa"):
        model.set_attn_implementation(implementation)
        assert_close(whole(model, ids, attention_mask=mask, position_ids=positions_of(mask))[real], want[real])
        assert_close(in_chunks(model, ids, mask, positions_of(mask))[real], want[real])


def test_a_window_that_drops_all_behind_it_counts_tokens_alone() -> None:
    window = merged(METHODS["identity"], ["llama"], "evict", window=4, scorer="window", sinks=2)
    model, ids = window.convert(parent("llama"), sites("llama")).eval(), tokens(LONG)
    got = whole(model, ids, attention_mask=BETWEEN, position_ids=positions_of(BETWEEN))[BETWEEN.bool()]
    assert_close(got, alone(model, ids, BETWEEN), 2e-5)
    mask = mask_of((0, 0, 5), (1, 9, 11))
    cached = in_chunks(model, tokens(), mask, positions_of(mask))[mask.bool()]
    assert_close(cached, alone(model, tokens(), mask), 2e-5)


@pytest.mark.slow  # flex attention compiles for half a minute per form, and not on every machine
@pytest.mark.parametrize("method", ["identity", "unequal_groups", "mla", "lowrank"])
def test_flex_attention_agrees_on_padded_batches(method: str) -> None:
    model, ids, mask = convert(method, "llama").eval(), tokens(), mask_of((0, 0, 5))
    want = whole(model, ids, attention_mask=mask)[mask.bool()]
    try:
        parent("llama").set_attn_implementation("flex_attention")
        whole(parent("llama"), ids, attention_mask=mask)
    except Exception as error:
        pytest.skip(f"the parent cannot: {type(error).__name__}")
    finally:
        parent("llama").set_attn_implementation("sdpa")
    model.set_attn_implementation("flex_attention")
    assert_close(whole(model, ids, attention_mask=mask)[mask.bool()], want)
