"""Invariants of converted models. Rows are in `methods.py`; the parent's own abilities decide what is skipped."""

from __future__ import annotations

import ast
import contextlib
import copy
import functools
import inspect
import pickle
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import transformers
import warm
from closeness import assert_close, relative_error
from families import FAMILIES, tiny_model
from methods import METHODS, PAIRS, REFUSED, REPRESENTATIVE, converted, parent, sites
from torch.utils.hooks import RemovableHandle
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache

from surgery.errors import SurgeryError
from surgery.runtime.attention import SurgeryAttention
from surgery.runtime.calling import cache_argument
from surgery.runtime.functions import eager_attention_forward
from surgery.runtime.layout import LayerPlan
from surgery.runtime.modeling import from_parent, load_converted, surgery_class

ORDER = list(METHODS)
OFTEN = [(m, f) for m, f in PAIRS if (i := METHODS[m].families.index(f)) == 0 or (ORDER.index(m) + i) % 2 == 0]
"""Each method on its first family and on every second of the others; `-m slow` runs the rest."""
matrix = pytest.mark.parametrize(
    ("method", "family"), [pytest.param(*pair, marks=() if pair in OFTEN else pytest.mark.slow) for pair in PAIRS]
)
# Compiling takes seconds each: every family once, every method once; the rest with -m slow.
compiled_matrix = pytest.mark.parametrize(
    ("method", "family"),
    [
        pytest.param(m, f, marks=() if m == "identity" or f == METHODS[m].families[0] else pytest.mark.slow)
        for m, f in PAIRS
    ],
)
ROOT = Path(__file__).parent.parent
GREEDY = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12}


def tokens(batch: int = 2, length: int = 14, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(seed))


def left_padded() -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = tokens(), torch.ones(2, 14, dtype=torch.long)
    ids[0, :5], mask[0, :5] = 0, 0
    return ids, mask


def parent_or_skip(family: str, **arguments: object) -> None:
    """Skip where the parent itself cannot generate so, or contradicts its own greedy search."""
    model, ids = parent(family), tokens()
    try:
        got = model.generate(ids, **GREEDY, **arguments)
    except Exception as error:
        skip_for_the_parent(family, ["falcon_alibi"], f"it cannot: {type(error).__name__}: {str(error)[:80]}")
    if arguments.get("num_beams") is None and not torch.equal(got, model.generate(ids, **GREEDY)):
        skip_for_the_parent(family, ["gpt_neo"], "it differs from its own greedy search")


def skip_for_the_parent(family: str, known: Sequence[str], reason: str) -> None:
    """Skip what the parent does not do either; with the pinned transformers, only where that is known."""
    pinned = f"transformers=={transformers.__version__}" in (ROOT / "constraints.txt").read_text().splitlines()
    assert family in known or not pinned, f"the parent, {family}: {reason}"
    pytest.skip(f"the parent: {reason}")


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_unequal_groups_decode_as_they_prefill(family: str) -> None:
    def both(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
        ids, cache = tokens(), DynamicCache(config=model.config)
        steps = [ids[:, :10], *ids[:, 10:].split(1, dim=1)]
        logits = [model(step, past_key_values=cache, use_cache=True).logits for step in steps]
        return torch.cat(logits, dim=1), model(ids, use_cache=False).logits

    if relative_error(*both(parent(family))) > 1e-3:
        skip_for_the_parent(family, ["bamba"], "it decodes otherwise than it prefills")
    assert_close(*both(converted("unequal_groups", family)))


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_pickled_and_copied_models_give_the_same_logits(method: str) -> None:
    model = converted(method, METHODS[method].families[0])
    want = model(tokens()).logits
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert type(other) is type(model)
        assert other.config == model.config
        assert torch.equal(other(tokens()).logits, want)


@torch.no_grad()
def test_a_fresh_process_unpickles_models_and_configs(tmp_path: Path) -> None:
    models = [converted(method, "llama") for method in ("unequal_groups", "shared_mla", "dms")]
    torch.save([(model, model(tokens()).logits) for model in models], tmp_path / "models.pt")
    (tmp_path / "config.pickle").write_bytes(pickle.dumps(models[0].config))
    code = (
        "import pickle, sys, torch\n"
        "ids = torch.randint(3, 128, (2, 14), generator=torch.Generator().manual_seed(0))\n"
        "config = pickle.load(open(sys.argv[2], 'rb'))\n"
        "with torch.no_grad():\n"
        "    for model, want in torch.load(sys.argv[1], weights_only=False):\n"
        "        assert torch.equal(model(ids).logits, want)\n"
        "        assert type(config) is type(model.config)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "models.pt"), str(tmp_path / "config.pickle")]
    warm.run(command, check=True)


@torch.no_grad()
def test_hooks_that_come_later_take_no_place_of_an_unpickled_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = converted("shared", "llama"), []
    kept, first = pickle.dumps(model), min(model.model._forward_pre_hooks)
    monkeypatch.setattr(RemovableHandle, "next_id", first)  # as in a process that has made no model yet
    marks = dict(torch.nn.modules.module._global_forward_hooks_with_kwargs)
    converted("identity", "llama")
    assert torch.nn.modules.module._global_forward_hooks_with_kwargs == marks
    RemovableHandle.next_id = first
    loaded = pickle.loads(kept)
    for _ in range(40):
        loaded.model.register_forward_pre_hook(lambda *_: calls.append(1))
        loaded.model.register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
    assert len(calls) == 80


@matrix
@torch.no_grad()
def test_token_by_token_equals_prefill(method: str, family: str) -> None:
    model, ids = converted(method, family), tokens()
    cache = DynamicCache(config=model.config)
    steps = [model(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits for i in range(ids.shape[1])]
    assert_close(torch.cat(steps, dim=1), model(ids, use_cache=False).logits)


@matrix
@torch.no_grad()
def test_prefill_in_two_chunks_equals_one(method: str, family: str) -> None:
    model, ids = converted(method, family), tokens()
    cache = DynamicCache(config=model.config)
    chunks = [model(part, past_key_values=cache, use_cache=True).logits for part in (ids[:, :9], ids[:, 9:])]
    assert_close(torch.cat(chunks, dim=1), model(ids, use_cache=False).logits)


@matrix
def test_dynamic_static_and_no_cache_generate_the_same(method: str, family: str) -> None:
    model, ids = converted(method, family), tokens()
    dynamic = model.generate(ids, **GREEDY)
    assert torch.equal(dynamic, model.generate(ids, **GREEDY, use_cache=False))
    parent_or_skip(family, cache_implementation="static")
    assert torch.equal(dynamic, model.generate(ids, **GREEDY, cache_implementation="static"))


@matrix
def test_left_padding_changes_nothing(method: str, family: str) -> None:
    model = converted(method, family)
    ids, mask = left_padded()
    batched = model.generate(ids, attention_mask=mask, **GREEDY)
    assert torch.equal(batched[:1, 5:], model.generate(ids[:1, 5:], **GREEDY))
    assert torch.equal(batched[1:], model.generate(ids[1:], **GREEDY))


@matrix
@torch.no_grad()
def test_logits_of_a_padded_row_are_those_of_the_row_alone(method: str, family: str) -> None:
    """Left and right, in a whole pass and through dynamic and static caches in chunks and single tokens."""
    model, ids = converted(method, family), tokens()
    named = {"position_ids"} & set(inspect.signature(model.forward).parameters)
    alone = [model(ids[:1, 5:], use_cache=False).logits[0], model(ids[1:, :11], use_cache=False).logits[0]]
    mask = torch.ones_like(ids)
    mask[0, :5], mask[1, 11:] = 0, 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)

    def chunks(cache: Cache | None, ends: list[int]) -> torch.Tensor:
        outputs, begin = [], 0
        for end in ends:
            more = {name: positions[:, begin:end] for name in named}
            more |= {"use_cache": False} if cache is None else {"use_cache": True, cache_argument(model): cache}
            outputs.append(model(ids[:, begin:end], attention_mask=mask[:, :end], **more).logits)
            begin = end
        return torch.cat(outputs, dim=1)

    found = [chunks(None, [14]), chunks(DynamicCache(config=model.config), [9, 10, 14])]
    if family not in ("bloom", "gpt_neo"):  # no static caches there
        found.append(chunks(StaticCache(config=model.config, max_cache_len=16), [9, 10, 14]))
    for logits in found:
        assert_close(logits[0, 5:], alone[0])
        assert_close(logits[1, :11], alone[1])


@matrix
@torch.no_grad()
def test_packed_documents_are_what_they_are_alone(method: str, family: str) -> None:
    def both(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
        ids = tokens(batch=1)
        positions = torch.cat((torch.arange(5), torch.arange(9)))[None]
        packed = model(ids, position_ids=positions, use_cache=False).logits
        return packed, torch.cat([model(part, use_cache=False).logits for part in ids.split([5, 9], dim=1)], dim=1)

    if "position_ids" not in inspect.signature(parent(family).forward).parameters:
        pytest.skip("the parent takes no positions")
    if relative_error(*both(parent(family))) > 1e-3:
        skip_for_the_parent(family, ["gpt_oss"], "it does not keep documents apart")
    assert_close(*both(converted(method, family)))


@matrix
@torch.no_grad()
def test_an_explicit_causal_mask_is_as_none(method: str, family: str) -> None:
    model, ids = converted(method, family), tokens()
    if any(site.window for site in sites(family)):
        pytest.skip("one mask for all layers cannot say the window of some")
    causal = torch.ones(2, 1, 14, 14, dtype=torch.bool).tril()
    low = torch.finfo(torch.float32).min
    try:
        parent(family)(ids, attention_mask=torch.where(causal, 0.0, low), use_cache=False)
    except Exception as error:
        skip_for_the_parent(family, ["bloom"], f"it cannot: {type(error).__name__}: {str(error)[:80]}")
    want = model(ids, use_cache=False).logits
    for mask in (causal, torch.where(causal, 0.0, low)):
        assert_close(model(ids, attention_mask=mask, use_cache=False).logits, want)
        cache, parts = DynamicCache(config=model.config), []
        for begin, end in ((0, 9), (9, 10), (10, 14)):
            more = {"attention_mask": mask[:, :, begin:end, :end], cache_argument(model): cache}
            parts.append(model(ids[:, begin:end], use_cache=True, **more).logits)
        assert_close(torch.cat(parts, dim=1), want)


@matrix
def test_assisted_decoding_equals_greedy_or_is_refused_where_decisions_are_final(method: str, family: str) -> None:
    model, ids = converted(method, family), tokens(batch=1).repeat(1, 2)
    final = METHODS[method].retain is not None
    with pytest.raises(ValueError, match="cannot be undone") if final else contextlib.nullcontext():
        assert torch.equal(model.generate(ids, **GREEDY, prompt_lookup_num_tokens=3), model.generate(ids, **GREEDY))


@matrix
def test_beam_search_is_the_same_with_and_without_cache(method: str, family: str) -> None:
    parent_or_skip(family, num_beams=3)
    model, ids = converted(method, family), tokens()
    beams = model.generate(ids, **GREEDY, num_beams=3)
    assert torch.equal(beams, model.generate(ids, **GREEDY, num_beams=3, use_cache=False))


@matrix
@torch.no_grad()
def test_planned_bytes_are_what_the_cache_holds(method: str, family: str) -> None:
    if METHODS[method].retain is not None:
        pytest.skip("bytes follow what the gates decide: test_paged_cache.py counts them")
    model, length = converted(method, family), 6
    cache = DynamicCache(config=model.config)
    model(tokens(batch=1, length=length), past_key_values=cache, use_cache=True)
    held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    plans = [LayerPlan.from_dict(layer["plan"]) for layer in model.config.surgery["layers"]]
    assert held == sum(plan.bytes_at(length) for plan in plans)


@compiled_matrix
@torch.no_grad()
def test_compiled_decode_equals_eager_without_recompiling(method: str, family: str) -> None:
    if not parent(family)._can_compile_fullgraph:
        pytest.skip("the parent does not compile")
    try:
        allowed = parent_compilations(family)
    except Exception as error:
        skip_for_the_parent(family, [], f"it does not compile: {type(error).__name__}: {str(error)[:80]}")
    model, ids = converted(method, family), tokens(length=16)
    got, compilations = compiled_decode(model, ids)
    assert_close(got, model(ids).logits)
    # A static sliding layer counts tokens in a Python int: transformers itself recompiles once for that.
    assert compilations <= allowed


@pytest.mark.parametrize(("method", "family"), REFUSED)
def test_families_without_the_form_are_refused(method: str, family: str) -> None:
    reason = "keys are normed per head" if family in ("qwen3", "olmo2") else r"1[26] of 16 key channels do not turn"
    with pytest.raises(SurgeryError, match=reason):
        converted(method, family)


@functools.cache
def parent_compilations(family: str) -> int:
    return compiled_decode(parent(family), tokens(length=16))[1]


def compiled_decode(model: PreTrainedModel, ids: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Logits of an eager prefill and compiled single steps with a static cache, and the number of compilations."""
    graphs = 0

    def backend(graph: torch.fx.GraphModule, inputs: object) -> object:
        nonlocal graphs
        graphs += 1
        return graph.forward

    torch.compiler.reset()
    step = torch.compile(model.forward, backend=backend, fullgraph=True)
    cache = StaticCache(config=model.config, max_cache_len=24)
    outputs = [model(ids[:, :9], past_key_values=cache, use_cache=True).logits]
    for i in range(9, ids.shape[1]):
        position = torch.full((2, 1), i)
        outputs.append(step(ids[:, i : i + 1], past_key_values=cache, position_ids=position, use_cache=True).logits)
    torch.compiler.reset()
    return torch.cat(outputs, dim=1), graphs


@matrix
def test_every_new_parameter_has_a_gradient_also_under_checkpointing(method: str, family: str) -> None:
    model, ids = converted(method, family), tokens()
    model.train()
    ours = {
        f"{name}.{key}": parameter
        for name, module in model.named_modules()
        if isinstance(module, SurgeryAttention)
        for key, parameter in module.named_parameters()
    }
    torch.manual_seed(0)  # dropout
    model(ids, labels=ids, use_cache=False).loss.backward()
    plain = {name: parameter.grad for name, parameter in ours.items()}
    assert len(ours) >= 2 * len(sites(family))  # readers have those of queries and outputs
    # A key bias moves every score of a query alike: its gradient is zero, but it is there.
    assert all(grad is not None and grad.isfinite().all() for grad in plain.values())
    model.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(0)
    model(ids, labels=ids, use_cache=False).loss.backward()
    for name, parameter in ours.items():
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad, plain[name], rtol=1e-4, atol=1e-6)


def test_reentrant_checkpointing_of_shared_caches_is_refused() -> None:
    model = converted("shared", "llama")
    with pytest.raises(ValueError, match="loses their gradients"):
        model.gradient_checkpointing_enable({"use_reentrant": True})


def test_gradients_of_two_forward_passes_stay_apart_under_checkpointing() -> None:
    model = converted("shared", "llama").train()
    ids = tokens(), tokens(seed=1)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        first, second = (model(x, labels=x, use_cache=False).loss for x in ids)
        (first + second).backward()
        gradients.append(model.model.layers[0].self_attn.k_proj.weight.grad.clone())
    torch.testing.assert_close(gradients[1], gradients[0])


@torch.no_grad()
def test_a_base_model_inside_a_causal_one_runs_alone() -> None:
    model = converted("shared", "llama")
    states = model.model(tokens(), use_cache=False).last_hidden_state
    assert torch.equal(model.lm_head(states), model(tokens()).logits)


def test_readers_have_no_parameters_for_keys_and_values() -> None:
    alone, shared = converted("identity", "llama"), converted("shared", "llama")
    kv = 2 * sum(p.numel() for p in alone.model.layers[1].self_attn.k_proj.parameters())
    assert sum(p.numel() for p in shared.parameters()) == sum(p.numel() for p in alone.parameters()) - kv


RELOAD = """
import sys, torch
from pathlib import Path
from surgery.runtime.modeling import load_converted
for folder in sorted(Path(sys.argv[1]).iterdir()):
    model = load_converted(str(folder)).eval()
    torch.save(model(torch.load(sys.argv[2])).logits.detach(), folder / "logits.pt")
    model.save_pretrained(folder / "again")
    assert (folder / "again" / "config.json").read_text() == (folder / "config.json").read_text(), folder
"""


def test_saved_models_give_the_same_logits_in_a_fresh_process(tmp_path: Path) -> None:
    ids, models = tokens(), {}
    torch.save(ids, tmp_path / "ids.pt")
    for method, family in PAIRS:
        models[f"{method}-{family}"] = model = converted(method, family)
        model.save_pretrained(tmp_path / "models" / f"{method}-{family}")
    code = [sys.executable, "-c", RELOAD, str(tmp_path / "models"), str(tmp_path / "ids.pt")]
    run = warm.run(code)
    assert run.returncode == 0, run.stderr[-2000:]
    for name, model in models.items():
        folder = tmp_path / "models" / name
        with torch.no_grad():
            want = model(ids).logits
            again = load_converted(str(folder / "again"))(ids).logits
        # Mixtures of experts add up in an order that depends on memory alignment.
        assert_close(torch.load(folder / "logits.pt"), want, 1e-6)
        assert_close(again, want, 1e-6)


def test_reloading_in_bfloat16_keeps_frequencies_and_slopes_exact(tmp_path: Path) -> None:
    for method, family in (("identity", "gptj"), ("identity", "bloom"), ("mla", "llama"), ("lowrank", "gptj")):
        model = converted(method, family)
        folder = tmp_path / f"{method}-{family}"
        model.save_pretrained(folder)
        loaded = load_converted(str(folder), dtype=torch.bfloat16).to(torch.bfloat16)
        for ours, theirs in zip(model.modules(), loaded.modules(), strict=True):
            for name, table in ours.named_buffers(recurse=False):
                if isinstance(ours, SurgeryAttention):
                    assert torch.equal(table, theirs.get_buffer(name))


@pytest.mark.parametrize("method", ["identity", "mla", "lowrank", "shared", "dms_borrowed", "dmc"])
@torch.no_grad()
def test_a_model_loaded_in_half_precision_says_what_it_says_in_full(method: str, tmp_path: Path) -> None:
    model, ids = converted(method, "llama"), tokens(length=6)
    model.save_pretrained(tmp_path)
    loaded = load_converted(str(tmp_path), dtype=torch.float16)
    for name, tensor in model.state_dict().items():
        wanted = tensor.half() if tensor.is_floating_point() else tensor
        assert torch.equal(loaded.state_dict()[name], wanted), name
    logits = model(ids).logits
    torch.testing.assert_close(loaded(ids).logits.float(), logits, rtol=0, atol=0.02 * float(logits.abs().max()))


def test_differently_converted_models_coexist() -> None:
    ids = tokens()
    models = {method: converted(method, "llama") for method in METHODS}
    with torch.no_grad():
        alone = {method: model(ids).logits for method, model in models.items()}
        for _ in range(2):
            for method, model in models.items():
                assert torch.equal(model(ids).logits, alone[method])
    assert_close(alone["identity"], parent("llama")(ids).logits)
    assert not torch.allclose(alone["identity"], alone["unequal_groups"])


@pytest.mark.parametrize("family", REPRESENTATIVE)
def test_the_parent_is_untouched(family: str) -> None:
    model = tiny_model(family).train()
    tensors = {name: tensor.clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    state = [
        (name, type(module), module.training, len(module._forward_hooks)) for name, module in model.named_modules()
    ]
    config = copy.deepcopy(model.config.to_dict())
    child = METHODS["unequal_groups"].convert(model, sites(family))
    assert child.training
    assert model.config.to_dict() == config
    after = [
        (name, type(module), module.training, len(module._forward_hooks)) for name, module in model.named_modules()
    ]
    assert after == state
    found = dict([*model.named_parameters(), *model.named_buffers()])
    assert tensors.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in tensors.items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_class_names_and_registration_follow_the_parent() -> None:
    cls = surgery_class(type(parent("llama")))
    assert cls.__name__ == "SurgeryLlamaForCausalLM"
    assert cls.config_class.model_type == "surgery_llama"
    assert surgery_class(type(parent("llama"))) is cls


def test_classes_of_ones_own_leave_auto_classes_alone() -> None:
    """As those of transformers: a config makes the class that it is registered for, whoever derives from that."""
    stock = type(parent("phi"))
    own = surgery_class(type("Own", (stock,), {}))
    assert own.__name__ == "SurgeryOwn" and issubclass(own, stock)
    made = transformers.AutoModelForCausalLM._model_mapping[own.config_class]
    assert made is surgery_class(stock) is not own


def test_tied_embeddings_stay_tied() -> None:
    model = converted("per_layer_heads", "gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight


def test_plans_that_the_runtime_cannot_run_are_refused() -> None:
    model, found = parent("llama"), sites("llama")
    plans = [METHODS["identity"].plan(site, model) for site in found]
    for wrong, message in (
        ({"owner": 1}, "not there yet"),
        ({"window": 4}, "keeps 4 tokens"),
        ({"layer": 5}, "layer 5"),
    ):
        data = {**plans[0].to_dict(), **wrong}
        with pytest.raises(ValueError, match=message):
            from_parent(model, found, [LayerPlan.from_dict(data), *plans[1:]])
    fewer = METHODS["unequal_groups"].plan(found[0], model)
    bare = LayerPlan.from_dict({**fewer.to_dict(), "project": {**fewer.to_dict()["project"], "groups": ((0,), (1,))}})
    with pytest.raises(ValueError, match="once"):
        from_parent(model, found, [bare, *plans[1:]])


def test_eager_attention_agrees_with_sdpa() -> None:
    model: PreTrainedModel = converted("unequal_groups", "llama")
    padded, mask = left_padded()
    with torch.no_grad():
        want = model(padded, attention_mask=mask).logits[mask.bool()]
        model.set_attn_implementation("eager")
        assert_close(model(padded, attention_mask=mask).logits[mask.bool()], want)
    assert callable(eager_attention_forward)


def test_a_base_model_loads_from_the_checkpoint_of_a_causal_one(tmp_path: Path) -> None:
    model, ids = converted("unequal_groups", "llama"), tokens()
    model.save_pretrained(tmp_path)
    base = surgery_class(type(parent("llama").model)).from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(base(ids).last_hidden_state, model.model(ids).last_hidden_state)


@pytest.mark.parametrize(("method", "family"), [("identity", "llama"), ("identity", "gpt2"), ("mla", "llama")])
def test_a_model_without_a_checkpoint_starts_with_the_weights_that_its_config_asks_for(
    method: str, family: str
) -> None:
    config = copy.deepcopy(converted(method, family).config)
    model = surgery_class(type(parent(family)))(config)
    found = [m for a in model.modules() if isinstance(a, SurgeryAttention) for m in a.modules()]
    linears = [m for m in found if isinstance(m, torch.nn.Linear)]
    assert len(linears) >= 6
    for linear in linears:
        assert linear.weight.std().item() == pytest.approx(config.initializer_range, rel=0.15)
        assert linear.bias is None or not linear.bias.any()


def test_a_converted_model_can_be_copied_but_not_converted_again() -> None:
    model, ids = converted("unequal_groups", "qwen3"), tokens()
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model)(ids).logits, model(ids).logits)
    with pytest.raises(ValueError, match="converted already"):
        from_parent(model, sites("qwen3"), [METHODS["identity"].plan(site, parent("qwen3")) for site in sites("qwen3")])


def test_loading_what_is_not_converted_says_so(tmp_path: Path) -> None:
    parent("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no 'surgery' section"):
        load_converted(str(tmp_path))


def test_the_runtime_imports_nothing_but_torch_transformers_and_itself() -> None:
    folder = Path(sys.modules[SurgeryAttention.__module__].__file__ or "").parent
    allowed = {"torch", "transformers", "huggingface_hub", *sys.stdlib_module_names}
    for file in folder.glob("*.py"):
        tree = ast.parse(file.read_text())
        if file.name == "ops.py":  # asks for the kernels, and does without
            tree.body = [node for node in tree.body if not isinstance(node, ast.Try)]
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 1 or (node.level == 0 and str(node.module).split(".")[0] in allowed), file
                assert node.level == 0 or "." not in str(node.module), file
            elif isinstance(node, ast.Import):
                assert all(alias.name.split(".")[0] in allowed for alias in node.names), file
