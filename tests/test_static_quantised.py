"""The static form of quantised caches: it gives what the dynamic one gives, holds what is planned, and compiles."""

import pytest
import torch
from families import tiny_model
from transformers import DynamicCache
from transformers.generation import CompileConfig
from transformers.generation import utils as generation

import surgery
from surgery.measure.memory import tensor_bytes
from surgery.runtime import static_quantised_cache
from surgery.runtime.calling import cache_argument
from surgery.runtime.codecs import CODECS
from surgery.runtime.packed_forms import stored

LENGTH = 76
IDS = torch.randint(3, 128, (2, LENGTH), generator=torch.Generator().manual_seed(0))
TEXT = torch.randint(3, 128, (12, 40), generator=torch.Generator().manual_seed(1))
SMALL = {"rewriter": "quantise", "group": 8, "recent": 6, "sinks": 3}
UNEVEN = {"rewriter": "gqa", "groups": [[0, 1, 2], [3]], "init": "mean"}
CASES = {
    "plain": ("llama", []),
    "uneven groups": ("llama", [UNEVEN]),
    "shared": ("llama", [{"rewriter": "share", "layout": {1: 0}, "init": "replace"}]),
    "values shared": ("llama", [{"rewriter": "share", "layout": "svformer", "init": "replace"}]),
    "latent": ("llama", [{"rewriter": "mla", "rank": 24, "rope_dims": 8}]),
    "latent, rotated at read": ("llama", [{"rewriter": "lowrank", "rank": 32}]),
    "alibi": ("bloom", []),
    "sinks": ("gpt_oss", []),
    "soft cap": ("gemma2", []),
}


def converted(codec="kivi", case="plain", **options):
    family, before = CASES[case]
    parent = tiny_model(family, **({"num_key_value_heads": 4} if before else {})).eval()
    step = SMALL | {"codec": codec} | options
    return surgery.convert(parent, {"steps": [*before, step]}, calibration=TEXT).eval()


def padded(length=LENGTH):
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, :9] = 0
    return mask, (mask.cumsum(1) - 1).clamp_min(0)


@torch.no_grad()
def through(model, cache, ends, step=None, width=None):
    """Logits of stretches of IDS up to each of `ends`, of two sequences, the first behind padding.

    Args:
        step: takes stretches of one token, where not the model.
        width: of the masks; None: as many columns as have come.
    """
    (mask, positions), start, parts = padded(), 0, []
    for end in ends:
        until = mask[:, :end] if width is None else torch.where(torch.arange(width) < end, mask[:, :width], 0)
        at = {"attention_mask": until, "position_ids": positions[:, start:end], cache_argument(model): cache}
        run = step if step is not None and end - start == 1 else model
        parts.append(run(IDS[:, start:end], use_cache=True, **at).logits)
        start = end
    return torch.cat(parts, 1)[mask[:, : ends[-1]].bool()]


def through_one_graph(model, cache, ends):
    """`through` a static cache with compiled steps, and the graph that all of them are."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    step = torch.compile(model.forward, backend=backend, fullgraph=True)
    got = through(model, cache, ends, step, width=LENGTH)
    torch.compiler.reset()
    (graph,) = graphs
    return got, graph


def assert_same(got, want):
    """To rounding, which puts a few codes on the other side of an edge."""
    error = (got - want).abs().amax(-1) / want.abs().max()
    assert error.median() < 1e-6 and error.max() < 1e-3, error
    assert (got.argmax(-1) == want.argmax(-1)).all()


PAIRS = [(name, "plain", "surgery") for name in CODECS]
PAIRS += [("kivi", case, "surgery") for case in CASES if case != "plain"]
PAIRS += [("metric", case, "surgery") for case in ("uneven groups", "latent", "latent, rotated at read")]
PAIRS += [("metric", "plain", "eager"), ("kivi", "shared", "eager")]


@pytest.mark.parametrize(("codec", "case", "implementation"), PAIRS)
def test_a_static_cache_gives_what_a_dynamic_one_gives_and_holds_what_is_planned(codec, case, implementation):
    """A prompt, a chunk, single tokens, another chunk that fills groups, and single tokens up to the last place."""
    model = converted(codec, case)
    model.set_attn_implementation(implementation)
    ends = [20, 23, *range(24, 50), 70, *range(71, LENGTH + 1)]
    cache = model.static_cache(LENGTH)
    assert_same(through(model, cache, ends), through(model, DynamicCache(config=model.config), ends))
    assert tensor_bytes(cache) == 2 * sum(plan.static_bytes(LENGTH) for plan in model.plans)
    with pytest.raises(RuntimeError, match=f"the static cache is for {LENGTH} tokens, and more came"):
        model(IDS[:, :1], **{cache_argument(model): cache})


COMPILED = [("metric", "plain"), ("kivi", "shared"), ("int4", "latent")]
MORE = [
    ("turbo", "uneven groups"),
    ("int8", "plain"),
    ("fp8", "plain"),
    ("kivi", "latent, rotated at read"),
    ("int4", "alibi"),
]


@pytest.mark.parametrize(
    ("codec", "case"), [*COMPILED, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in MORE)]
)
def test_64_compiled_steps_of_padded_sequences_are_one_graph(codec, case):
    model, ends = converted(codec, case), range(12, LENGTH + 1)
    model.set_attn_implementation("surgery")
    got, _ = through_one_graph(model, model.static_cache(LENGTH), ends)
    assert_same(got, through(model, DynamicCache(config=model.config), ends))


def greedy(model, ids=IDS[:, :20], **kwargs):
    mask = padded(ids.shape[1])[0]
    more = {"max_new_tokens": 30, "min_new_tokens": 30, "do_sample": False, "pad_token_id": 0} | kwargs
    return model.generate(ids, attention_mask=mask, **more)


def test_generate_compiles_its_steps_by_itself():
    model = converted("int8")
    config = CompileConfig(backend="eager", fullgraph=True, mode=None, dynamic=False)
    config._compile_all_devices = True
    torch.compiler.reset()
    want, beams = greedy(model), greedy(model, num_beams=3)
    counted = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for _ in range(2):
        assert torch.equal(greedy(model, cache_implementation="static", compile_config=config), want)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == counted + 1
    assert torch.equal(greedy(model, num_beams=3, cache_implementation="static", compile_config=config), beams)
    torch.compiler.reset()


@torch.no_grad()
@pytest.mark.parametrize(("held", "taken"), [(3, 1), (7, 4)])
def test_a_static_cache_of_few_tokens_takes_all_of_them_back(held, taken):
    """None is packed yet, and some are those that are never packed."""
    model = tiny_model("llama").eval()
    cache = surgery.cache(model, "int4", max_cache_len=128, recent=8, group=8)
    model(IDS[:1, :held], past_key_values=cache)
    cache.crop(-taken)
    found = model(IDS[:1, held - taken : held + 2], past_key_values=cache).logits
    want = model(IDS[:1, : held + 2], use_cache=False).logits[:, held - taken :]
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_static_cache_begins_anew_takes_tokens_back_and_picks_sequences():
    model, ends = converted("kivi"), [20, *range(21, 61)]
    cache = model.static_cache(LENGTH)
    first = through(model, cache, ends)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(through(model, cache, ends), first)
    given, (mask, positions) = {cache_argument(model): cache}, padded()
    last = {"attention_mask": mask[:, :61], "position_ids": positions[:, 60:61]}
    want = model(IDS[:, 60:61], **last, **given).logits
    model(IDS[:, 3:6], attention_mask=mask[:, :64], position_ids=positions[:, 61:64], **given)
    cache.crop(-4)
    torch.testing.assert_close(model(IDS[:, 60:61], **last, **given).logits, want)
    with pytest.raises(ValueError, match="layer 0: 40 tokens are to be taken back, and only the newest"):
        cache.crop(-40)
    cache.crop(-1)
    cache.batch_select_indices(torch.tensor([1, 0, 1]))
    swapped = {name: t[[1, 0, 1]] for name, t in last.items()}
    torch.testing.assert_close(model(IDS[[1, 0, 1], 60:61], **swapped, **given).logits, want[[1, 0, 1]])


@pytest.mark.parametrize("length", [2, 5, 15, 16, 17])
@torch.no_grad()
def test_what_is_too_short_to_be_packed_is_kept_as_it_is(length):
    model = converted("kivi")
    cache, want = model.static_cache(length), model(IDS[:, :length]).logits
    given = {cache_argument(model): cache}
    got = [model(IDS[:, :1], **given).logits, *(model(IDS[:, t : t + 1], **given).logits for t in range(1, length))]
    torch.testing.assert_close(torch.cat(got, 1), want, rtol=1e-4, atol=1e-4)
    assert tensor_bytes(cache) == 2 * sum(plan.static_bytes(length) for plan in model.plans)


@torch.no_grad()
def test_numbers_that_are_not_finite_are_named_in_compiled_steps_as_well():
    model = converted("int4")
    model.model.layers[1].self_attn.v_proj.weight[0, 0] = torch.inf
    with pytest.raises(ValueError, match="layer 1: its values hold numbers that are not finite"):
        through(model, model.static_cache(LENGTH), [40])
    torch.compiler.reset()
    step = torch.compile(model.forward, backend="eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="layer 1: its values hold numbers that are not finite"):
        through(model, model.static_cache(LENGTH), range(12, 40), step, width=LENGTH)
    torch.compiler.reset()


@torch.no_grad()
def test_two_models_of_different_bits_compile_in_one_process():
    torch.compiler.reset()
    for bits in (3, 2):  # the compiler takes numbers for variable that differ where it has been before
        model = converted(k_bits=bits, v_bits=bits)
        step = torch.compile(model.forward, backend="eager", fullgraph=True)
        through(model, model.static_cache(LENGTH), range(12, 15), step, width=LENGTH)
    torch.compiler.reset()


def test_scales_are_rounded_as_float16_is():
    x = torch.randn(10000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-10, 5, 10000)
    assert torch.equal(stored(x), x.clamp(-65504.0, 65504.0).half())


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["int8", "int4", "kivi", "turbo", "fp8"])
def test_compilers_round_codes_against_the_scales_that_are_stored(codec):
    """With casts left out by inductor, one code of a hundred would be another."""
    form = CODECS[codec].values(CODECS[codec].default, 8, None)
    x = torch.randn(8, 2, 64, 16, generator=torch.Generator().manual_seed(0))
    got, want = torch.compile(form.encode, fullgraph=True)(x), form.encode(x)
    assert sum(int((g.float() != w.float()).sum()) for g, w in zip(got, want, strict=True)) <= 1


WIDE = {"rewriter": "quantise", "codec": "kivi", "group": 16, "recent": 6, "sinks": 3}


@pytest.mark.parametrize("bits", [4, *(pytest.param(b, marks=pytest.mark.slow) for b in (2, 8))])
def test_one_operator_reads_what_is_packed_in_words(bits, monkeypatch):
    """The operator has a form for CPUs too: here it is taken, as on a GPU."""
    monkeypatch.setattr(static_quantised_cache, "held_as_words", lambda device: True)
    parent = tiny_model("llama", head_dim=64).eval()
    model = surgery.convert(parent, {"steps": [WIDE | {"k_bits": bits, "group": 32 if bits == 8 else 16}]}).eval()
    model.set_attn_implementation("surgery")
    cache, ends = model.static_cache(LENGTH), range(12, LENGTH + 1)
    got, graph = through_one_graph(model, cache, ends)
    assert "surgery.decode_quant.default" in {str(node.target) for node in graph.graph.nodes}
    assert tensor_bytes(cache) == 2 * sum(plan.static_bytes(LENGTH) for plan in model.plans)
    assert cache.layers[0].streams[0].parts[0].dtype == torch.int16
    assert_same(got, through(model, DynamicCache(config=model.config), ends))


@pytest.mark.parametrize("family", ["llama", pytest.param("gpt_neox", marks=pytest.mark.slow)])
def test_stock_models_take_a_static_cache_and_compile(family):
    model, options = tiny_model(family).eval(), {"group": 8, "recent": 6, "sinks": 2}
    config = CompileConfig(backend="eager", fullgraph=True, mode=None, dynamic=False)
    config._compile_all_devices = True
    torch.compiler.reset()
    want = greedy(model, **{cache_argument(model): surgery.cache(model, "int8", **options)})
    counted = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for _ in range(2):
        cache = surgery.cache(model, "int8", max_cache_len=52, **options)
        got = greedy(model, **{cache_argument(model): cache}, compile_config=config)
        assert torch.equal(got, want)
        assert cache.layers[0].state["begin"].tolist() == [9, 0]
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == counted + 1
    torch.compiler.reset()


def test_the_mask_of_a_window_speaks_for_no_other_layer(monkeypatch):
    # transformers puts masks by type of layer into a dict whose order is that of a set.
    model, options = tiny_model("gemma2").eval(), {"group": 8, "recent": 6, "sinks": 2, "layers": "1"}
    make, found = generation.create_masks_for_generate, []
    for first in ("full_attention", "sliding_attention"):

        def ordered(*args, first=first, **kwargs):
            return dict(sorted(make(*args, **kwargs).items(), key=lambda item: item[0] != first))

        monkeypatch.setattr(generation, "create_masks_for_generate", ordered)
        cache = {cache_argument(model): surgery.cache(model, "kivi", max_cache_len=LENGTH, **options)}
        said = IDS[:, :0]
        for start in (0, 20):
            ids = torch.cat((said, IDS[:, start : start + 20]), 1)
            more = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
            out = model.generate(ids, attention_mask=torch.ones_like(ids), output_logits=True, **more, **cache)
            said = out.sequences
        found.append(torch.stack(out.logits))
    assert torch.equal(*found)
