"""Every way to generate that transformers has: right with converted caches, or refused before it starts."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_close
from families import FAMILIES, tiny_model
from methods import METHODS, converted, parent, sites
from test_runtime import GREEDY, tokens
from torch import Tensor
from transformers import Cache, DynamicCache, GenerationConfig, PreTrainedModel
from transformers.cache_utils import QuantizedLayer

from surgery.runtime.attention import Inputs
from surgery.runtime.calling import cache_argument, cache_of
from surgery.runtime.modeling import load_converted, surgery_class

FORMS = ["identity", "per_layer_heads", "unequal_groups", "mla", "lowrank", "shared", "shared_values", "dms", "dmc"]
MERGED = ["dms", "dmc", "dmc_unlimited", "shared_dms"]
ONE = tokens(batch=1).repeat(1, 2)


def step(model: PreTrainedModel, ids: Tensor, cache: Any, **more: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(ids, use_cache=True, **{cache_argument(model): cache}, **more).logits
    return logits


def uncached(model: PreTrainedModel, ids: Tensor, **more: Any) -> Tensor:
    found: Tensor = model.generate(ids, **GREEDY, use_cache=False, **more)
    return found


def attentions(model: PreTrainedModel, *args: Any, **more: Any) -> Any:
    with torch.no_grad():
        return model(*args, output_attentions=True, **more).attentions


@pytest.mark.parametrize("form", FORMS)
def test_sampling_embeddings_turns_and_early_exits_are_those_without_a_cache(form: str) -> None:
    model, ids = converted(form, "llama"), tokens()
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        options = {**GREEDY, "do_sample": True, "num_return_sequences": 3, "use_cache": use_cache}
        drawn.append(model.generate(ids, **options))
    assert torch.equal(*drawn)
    embeddings = model.get_input_embeddings()(ids)
    assert torch.equal(model.generate(inputs_embeds=embeddings, **GREEDY), uncached(model, ids)[:, 14:])
    turn, cache = ids, DynamicCache(config=model.config)
    for seed in (1, 2, 3):
        mask = {"attention_mask": torch.ones_like(turn)}
        said = model.generate(turn, **GREEDY, **mask, **{cache_argument(model): cache})
        assert torch.equal(said, uncached(model, turn, **mask))
        turn = torch.cat((said, tokens(length=5, seed=seed)), dim=1)
    if METHODS[form].retain is None:
        assert torch.equal(model.generate(ONE, **GREEDY, assistant_early_exit=1), uncached(model, ONE))


@pytest.mark.parametrize("form", FORMS)
def test_continuations_can_be_tried_side_by_side_and_one_kept(form: str) -> None:
    # What contrastive search does to a cache.
    model, ids, cache = converted(form, "llama"), tokens(), DynamicCache(config=converted(form, "llama").config)
    logits = step(model, ids, cache)
    for chosen in ([0, 5], [1, 3], [2, 4]):
        top = logits[:, -1].topk(3).indices
        cache.batch_repeat_interleave(3)
        tried = step(model, top.reshape(-1, 1), cache)
        cache.batch_select_indices(torch.tensor(chosen))
        logits = tried[chosen]
        ids = torch.cat((ids, top.reshape(-1)[chosen][:, None]), dim=1)
        with torch.no_grad():
            assert_close(logits[:, -1], model(ids, use_cache=False).logits[:, -1])


@pytest.mark.parametrize("form", ["identity", "per_layer_heads", "mla", "shared", "dms"])
def test_continuous_batching_is_refused_before_it_starts(form: str, tmp_path: Path) -> None:
    model, prompts = converted(form, "llama"), [[5, 6, 7], [8, 9]]
    config = GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=-1)
    with pytest.raises(ValueError, match="continuous batching keeps.*converted layer writes"):
        model.generate_batch(prompts, generation_config=config)
    with pytest.raises(ValueError, match="continuous batching"):
        model.init_continuous_batching(generation_config=config)
    with (
        pytest.raises(ValueError, match="continuous batching"),
        model.continuous_batching_context_manager(generation_config=config),
    ):
        pass
    with pytest.raises(ValueError, match="continuous batching"):
        model.generate(tokens(), cache_implementation="paged", max_new_tokens=3)
    for implementation in ("paged|eager", "paged|sdpa"):
        with pytest.raises(ValueError, match="continuous batching"):
            model.set_attn_implementation(implementation)
    assert model.config._attn_implementation == "sdpa"
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="continuous batching"):
        load_converted(str(tmp_path), attn_implementation="paged|eager")


def test_what_is_no_cache_of_transformers_is_refused_by_name() -> None:
    class PagedAttentionCache:
        """Stands for the one of transformers, which takes a whole engine to make."""

    model = converted("identity", "llama")
    with pytest.raises(ValueError, match="PagedAttentionCache came as the cache.*continuous batching"):
        step(model, tokens(), PagedAttentionCache())
    states = torch.zeros(2, 2, 3, 16)
    with pytest.raises(ValueError, match="a tuple came as the cache.*Give a DynamicCache"):
        step(model, tokens(), ((states, states), (states, states)))


@pytest.mark.parametrize("form", MERGED)
def test_a_draft_that_drops_or_merges_is_refused_before_anything_is_computed(form: str) -> None:
    model, draft, calls = parent("llama"), converted(form, "llama"), []
    handles = [m.register_forward_hook(lambda *_: calls.append(1)) for m in (model.model, draft.model)]
    try:
        with pytest.raises(ValueError, match="a draft must take tokens back.*another assistant_model"):
            model.generate(ONE, **GREEDY, assistant_model=draft)
        for assisted in ({"assistant_model": model}, {"prompt_lookup_num_tokens": 3}, {"assistant_early_exit": 1}):
            with pytest.raises(ValueError, match="cannot be undone when candidates are rejected"):
                draft.generate(ONE, **GREEDY, **assisted)
    finally:
        for handle in handles:
            handle.remove()
    assert not calls


@pytest.mark.parametrize("form", ["per_layer_heads", "mla", "lowrank", "shared"])
def test_other_forms_draft_for_their_parent_and_are_assisted_by_it(form: str) -> None:
    model = converted(form, "llama")
    assert torch.equal(parent("llama").generate(ONE, **GREEDY, assistant_model=model), uncached(parent("llama"), ONE))
    assert torch.equal(model.generate(ONE, **GREEDY, assistant_model=parent("llama")), uncached(model, ONE))


def prefix(seed: int = 0) -> DynamicCache:
    """Keys and values of five virtual tokens, as prefix tuning fills a cache by the config of a model."""
    config, random = parent("llama").config, torch.Generator().manual_seed(seed)
    shape = 2, config.num_key_value_heads, 5, config.hidden_size // config.num_attention_heads
    layers = [[torch.randn(shape, generator=random) for _ in "kv"] for _ in range(config.num_hidden_layers)]
    return DynamicCache([tuple(layer) for layer in layers])


def test_a_prefix_acts_on_native_heads_as_on_the_parent() -> None:
    mask = torch.ones(2, 19, dtype=torch.long)
    logits = [
        step(model, tokens(), prefix(), attention_mask=mask)
        for model in (parent("llama"), converted("identity", "llama"))
    ]
    assert_close(logits[1], logits[0])
    assert not torch.allclose(logits[0], step(parent("llama"), tokens(), DynamicCache()))


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("per_layer_heads", r"layer 1: .* holds 2 heads of 16 \+ 16 .* keeps 1 of 16 \+ 16 .* prefix tuning"),
        ("mla", r"layer 0: .* holds 2 heads of 16 \+ 16 .* keeps 1 of 28 \+ 0 "),
        ("lowrank", r"layer 0: .* holds 2 heads of 16 \+ 16 .* keeps 1 of 23 \+ 1 "),
        ("shared", r"layer 1: .* keeps nothing there, for it reads the cache of layer 0"),
        ("shared_values", r"layer 1: .* keeps 2 of 16 \+ 0 "),
        ("dms", r"layer 0: .* needs an empty dynamic or static cache.*prefix tuning"),
        ("shared_dmc", r"layer 0: .* needs an empty dynamic or static cache"),
    ],
)
def test_a_prefix_that_a_layer_cannot_hold_is_refused_before_any_layer_runs(form: str, message: str) -> None:
    model, calls = converted(form, "llama"), []
    model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match=message):
        step(model, tokens(), prefix(), attention_mask=torch.ones(2, 19, dtype=torch.long))
    with pytest.raises(ValueError, match=message):
        model.generate(tokens(), **GREEDY, **{cache_argument(model): prefix()})
    assert not calls


@functools.cache
def peft_hands_prompts_on() -> bool:
    """Whether prompt tuning of the stock model says the same with and without a cache: peft 0.21 looks for it under the
    name that transformers had before 5.24, puts its prompts before every token there, and leaves prefixes out."""
    return torch.equal(*(prompted(tiny_model("llama"), use_cache=use_cache)[1] for use_cache in (True, False)))


def prompted(model: PreTrainedModel, **arguments: Any) -> tuple[Any, Tensor]:
    """A model with tuned prompts, and what it says."""
    import peft

    torch.manual_seed(0)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    tuned, ids = peft.get_peft_model(model, config).eval(), tokens()
    return tuned, tuned.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **GREEDY, **arguments)


@pytest.mark.parametrize("form", FORMS)
def test_prompt_tuning_works_with_every_form(form: str) -> None:
    pytest.importorskip("peft")
    model, said = prompted(converted(form, "llama"))
    ids = tokens()
    mask = torch.ones_like(ids)
    if peft_hands_prompts_on():
        assert torch.equal(said, model.generate(input_ids=ids, attention_mask=mask, **GREEDY, use_cache=False))
    assert not torch.equal(said, model.get_base_model().generate(ids, attention_mask=mask, **GREEDY))
    model.train()(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
    virtual = [p for p in model.parameters() if p.requires_grad]
    assert len(virtual) == 1 and bool((virtual[0].grad.abs().sum(-1) > 0).all())


def test_prefix_tuning_of_peft_is_refused_by_the_layer_that_cannot_take_it() -> None:
    peft = pytest.importorskip("peft")
    if not peft_hands_prompts_on():
        pytest.skip("peft hands no prefix to the stock model either")
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    model = peft.get_peft_model(converted("per_layer_heads", "llama"), config).eval()
    with pytest.raises(ValueError, match=r"layer 1: .* prefix tuning"):
        model.generate(input_ids=tokens(), attention_mask=torch.ones_like(tokens()), **GREEDY)


class Lossless(QuantizedLayer):
    """A backend that says what it is given, and as others does not take nothing."""

    def _quantize(self, tensor: Tensor, axis: int) -> Tensor:
        assert tensor.numel(), "nothing to quantize"
        return tensor

    def _dequantize(self, q_tensor: Tensor) -> Tensor:
        return q_tensor


def quantized() -> Cache:
    return Cache(layers=[Lossless(residual_length=4) for _ in range(2)])


@pytest.mark.parametrize("form", ["identity", "per_layer_heads", "unequal_groups", "shared", "shared_unequal_groups"])
def test_heads_go_through_a_quantized_cache(form: str) -> None:
    model, ids = converted(form, "llama"), tokens()
    want = uncached(model, ids)
    assert torch.equal(model.generate(ids, **GREEDY, **{cache_argument(model): quantized()}), want)
    try:
        parent("llama").generate(ids, **GREEDY, num_beams=3, **{cache_argument(model): quantized()})
    except IndexError:
        pytest.skip("this transformers cannot reorder a quantized cache, for the parent either")
    beams = model.generate(ids, **GREEDY, num_beams=3, **{cache_argument(model): quantized()})
    assert torch.equal(beams, uncached(model, ids, num_beams=3))


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("mla", "layer 0: .* one latent per token"),
        ("lowrank", "layer 0: .* one latent per token"),
        ("shared_mla", "layer 0: .* one latent per token"),
        ("shared_values", "layer 1: .* keys alone, for it reads the values of layer 0"),
        ("dms", r"layer 0: .* are averaged or leave \(dms\)"),
    ],
)
def test_a_quantized_cache_is_refused_where_backends_would_be_given_nothing(form: str, message: str) -> None:
    model = converted(form, "llama")
    with pytest.raises(ValueError, match=f"{message}.*Use cache_implementation 'dynamic'"):
        model.generate(tokens(), **GREEDY, cache_implementation="quantized")
    with pytest.raises(ValueError, match=message):
        step(model, tokens(), quantized())


def test_offloading_is_refused_where_there_is_nothing_to_offload_from() -> None:
    model = converted("shared", "llama")
    for implementation in ("offloaded", "offloaded_static"):
        with pytest.raises(ValueError, match=f"{implementation}.*from an accelerator to the CPU"):
            model.generate(tokens(), **GREEDY, cache_implementation=implementation)
    cache = DynamicCache()
    cache.offloading = True
    with pytest.raises(ValueError, match="offloaded from an accelerator.*on the CPU"):
        step(model, tokens(), cache)


def test_a_reader_lets_an_offloading_cache_fetch_the_layer_behind_it() -> None:
    model, cache, updates = converted("shared", "llama"), DynamicCache(), []
    step(model, tokens(), cache)
    reader = model.model.layers[1].self_attn
    key = value = torch.zeros(2, 2, 15, 16)
    hidden = torch.zeros(2, 1, 64)
    cache.update = lambda *args: updates.append(args[2])  # the real one waits for a GPU
    for cache.offloading in (False, True):
        reader._borrow(Inputs(hidden, None, None, None, cache, {0: (key, value)}, {}))
    assert updates == [1]
    assert cache.layers[1].keys.numel() == 0


@pytest.mark.parametrize("form", MERGED)
@torch.no_grad()
def test_a_cache_of_slots_cannot_be_taken_apart_but_copied(form: str) -> None:
    model = converted(form, "llama")
    cache = DynamicCache(config=model.config)
    step(model, tokens(), cache)
    for taken in (list, tuple, DynamicCache):
        with pytest.raises(ValueError, match=r"cannot be taken apart into tensors.*copy\.deepcopy"):
            taken(iter(cache))
    for kept in (cache, model.static_cache(40)):
        if kept is not cache:
            step(model, tokens(), kept)
        copied = copy.deepcopy(kept)
        for seed in (1, 2):
            new = tokens(length=2, seed=seed)
            want, got = step(model, new, kept), step(model, new, copied)
            assert torch.equal(got, want)


@torch.no_grad()
def test_other_caches_can_be_rebuilt_from_their_tensors() -> None:
    for form in ("per_layer_heads", "mla", "lowrank", "shared", "shared_values"):
        model = converted(form, "llama")
        cache = DynamicCache(config=model.config)
        step(model, tokens(), cache)
        rebuilt, new = DynamicCache(list(cache)), tokens(length=2, seed=1)
        assert torch.equal(step(model, new, rebuilt), step(model, new, cache)), form


def test_the_length_of_a_static_cache_stays_what_it_was_when_asked() -> None:
    model = converted("dms", "llama")
    cache = model.static_cache(24)
    step(model, tokens(length=8), cache)
    before = cache.get_seq_length()
    step(model, tokens(length=1), cache)
    assert (int(before), int(cache.get_seq_length())) == (8, 9)


BIDIRECTIONAL = ("falcon", "falcon_mqa", "falcon_alibi")
"""Parents that lose causality when they are asked for attentions: they add a boolean mask to the scores."""


@pytest.mark.parametrize("family", FAMILIES)
def test_attentions_are_those_of_the_parent(family: str) -> None:
    model, child, ids = parent(family), converted("identity", family), tokens()
    before = model.config._attn_implementation
    try:
        for implementation in ("eager", "sdpa"):
            if implementation == "sdpa" and not model._supports_sdpa:
                continue
            for each in (model, child):
                each.set_attn_implementation(implementation)
            if model.config._attn_implementation != implementation:
                continue
            want, got = attentions(model, ids), attentions(child, ids)
            assert len(got) == len(want)
            for ours, theirs in zip(got, want, strict=True):
                if family in BIDIRECTIONAL:
                    assert ours.shape == theirs.shape and not bool(ours.triu(1).any())
                    torch.testing.assert_close(ours.sum(-1), torch.ones(2, 4, 14))
                else:
                    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    finally:
        model.set_attn_implementation(before)


@pytest.mark.parametrize("form", [*FORMS, "shared_mla"])
@torch.no_grad()
def test_attentions_of_a_step_are_the_last_row_of_those_of_the_whole(form: str) -> None:
    model, ids = converted(form, "llama"), tokens()
    model.set_attn_implementation("eager")
    whole = attentions(model, ids, use_cache=False)
    assert len(whole) == 2
    for weights in whole:
        assert weights.shape == (2, 4, 14, 14) and not bool(weights.triu(1).any())
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 14))
    cache = DynamicCache(config=model.config)
    step(model, ids[:, :13], cache)
    if METHODS[form].retain is not None:
        for given in ({cache_argument(model): cache}, {}):
            with pytest.raises(ValueError, match="layer 0: output_attentions: .*slots.*use_cache=False"):
                attentions(model, ids[:, 13:], **given)
    else:
        last = attentions(model, ids[:, 13:], **{cache_argument(model): cache})
        for weights, of_whole in zip(last, whole, strict=True):
            torch.testing.assert_close(weights, of_whole[:, :, 13:], rtol=1e-4, atol=1e-5)


def test_attentions_keep_gradients_and_come_once_for_each_layer() -> None:
    model, ids = converted("mla", "llama"), tokens()
    model.set_attn_implementation("eager")
    for _ in range(2):
        found = model(ids, output_attentions=True, use_cache=False)
        assert len(found.attentions) == 2
    for weights in found.attentions:
        weights.retain_grad()
    found.logits.sum().backward()
    assert all(weights.grad is not None and bool(weights.grad.any()) for weights in found.attentions)
    assert len(attentions(copy.deepcopy(model), ids)) == 2
    assert model(ids).attentions is None


def test_attentions_of_a_generation_are_those_of_the_parent() -> None:
    options = {**GREEDY, "output_attentions": True, "return_dict_in_generate": True}
    found = []
    for model in (copy.deepcopy(parent("llama")), converted("identity", "llama")):
        model.set_attn_implementation("eager")
        plain = model.generate(tokens(), **options).attentions
        lookup = model.generate(ONE, **options, prompt_lookup_num_tokens=3).attentions
        found.append([weights for steps in (plain, lookup) for layers in steps for weights in layers])
    assert len(found[0]) > 2 * GREEDY["max_new_tokens"]  # two layers in each step
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_layers_run_by_a_decoder_inside_the_base_model_share_caches() -> None:
    # OPTForCausalLM calls `model.decoder`, past the base model.
    model, ids = METHODS["shared"].convert(parent("opt"), sites("opt")), tokens()
    assert torch.equal(model.generate(ids, **GREEDY), uncached(model, ids))
    foreign = cache_of(parent("opt")(ids, use_cache=True))
    with pytest.raises(ValueError, match="layer 1: .* it reads the cache of layer 0"):
        step(model, ids[:, :1], foreign)


@pytest.mark.parametrize(
    ("form", "family"),
    [("identity", "gpt_neox"), ("mla", "llama"), ("shared", "qwen3"), ("dms", "llama"), ("identity", "qwen3_moe")],
)
def test_plans_for_parallelism_name_what_is_there_and_not_the_attention(form: str, family: str) -> None:
    model, stock = converted(form, family), parent(family)
    there = {".".join("*" if part.isdigit() else part for part in name.split(".")) for name, _ in model.named_modules()}
    there |= {".".join("*" if p.isdigit() else p for p in name.split(".")) for name, _ in model.named_parameters()}
    base = model.base_model_prefix
    for plan, around in ((model.tp_plan, ""), (model.config.base_model_tp_plan, f"{base}.")):
        inside = [rule for rule in plan if "attn" in rule or "attention" in rule]
        assert plan and not inside
        stale = {around + rule for rule in plan} - there
        assert all(rule.startswith(f"{base}.layers.*.mlp.") and family == "qwen3_moe" for rule in stale)
    assert set(stock.tp_plan) - set(model.tp_plan) == {r for r in stock.tp_plan if "attn" in r or "attention" in r}
    assert model.supports_pp_plan == (form != "shared")
    assert bool(model.pp_plan) == bool(model.config.base_model_pp_plan) == (form != "shared")
    assert stock.config.base_model_tp_plan == type(stock.config).base_model_tp_plan != model.config.base_model_tp_plan


@pytest.fixture
def unasked(monkeypatch: pytest.MonkeyPatch) -> Callable[[type], None]:
    """Makes a class as it is in a process that has asked it for no implementation yet."""

    def forget(cls: type) -> None:
        for base in cls.__mro__:
            for name in ("_can_set_experts_implementation_cached_value", "_can_set_attn_implementation_cached_value"):
                if name in vars(base):
                    monkeypatch.delattr(base, name)

    return forget


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "llama"])
def test_experts_run_as_the_parents_whoever_is_asked_first(family: str, unasked: Callable[[type], None]) -> None:
    stock = type(parent(family))
    unasked(surgery_class(stock))
    alone = surgery_class(stock)._can_set_experts_implementation()
    assert alone is stock._can_set_experts_implementation() is (family != "llama")


def test_the_implementation_can_be_set_where_the_parent_has_only_one(unasked: Callable[[type], None]) -> None:
    unasked(surgery_class(type(parent("falcon"))))
    parent("falcon").set_attn_implementation("eager")  # warns, and remembers that it cannot
    model, ids = converted("identity", "falcon"), tokens()
    want = model.generate(ids, **GREEDY)
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"
    assert torch.equal(model.generate(ids, **GREEDY), want)
