"""The static cache of gated attention: sized by the plan, one pool for all layers, steps that compile."""

from __future__ import annotations

import copy

import pytest
import torch
from closeness import assert_close
from gated_models import GREEDY, model_of, run, tokens
from methods import parent
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation import CompileConfig

import surgery.runtime.pooling_cache
from surgery import convert, plan
from surgery.measure.memory import tensor_bytes
from surgery.runtime.calling import cache_argument
from surgery.runtime.paged_cache import PagedLayer

three_forms = pytest.mark.parametrize(("method", "window"), [("dms", 6), ("dmc", 3), ("dmc", None)])


def test_a_static_cache_holds_what_the_plan_says_from_the_start() -> None:
    for method, window in (("dms", 12), ("dmc", 12), ("dmc", None)):
        model = model_of(method, window)
        cache = model.static_cache(64)
        run(model, tokens(length=4), [4], cache)
        assert tensor_bytes(cache) == 2 * sum(plan.static_bytes(64) for plan in model.plans)
        pools = [layer.pool.keys.data_ptr() for layer in cache.layers]
        assert len(set(pools)) == 1
        run(model, tokens(length=36), [18, *range(19, 37)], cache)
        assert tensor_bytes(cache) == 2 * sum(plan.static_bytes(64) for plan in model.plans)


def test_a_cache_that_begins_anew_forgets_padding() -> None:
    model, ids, mask = model_of("dms", 6), tokens(length=12), torch.ones(2, 12, dtype=torch.long)
    mask[0, :4] = 0
    cache = model.static_cache(24)
    with torch.no_grad():
        model(ids, attention_mask=mask, use_cache=True, **{cache_argument(model): cache})
    cache.reset()
    assert torch.equal(run(model, ids, [12], cache)[0], run(model, ids, [12], model.static_cache(24))[0])


def test_a_full_pool_says_how_to_size_it() -> None:
    model = model_of("dms", 12, drops=0.0)
    with pytest.raises(RuntimeError, match=r"static_cache\(max_cache_len, ratio=.*1\.00x fewer") as caught:
        run(model, tokens(length=200), [150, *range(151, 201)], model.static_cache(200, ratio=4.0))
    assert "dynamic" in str(caught.value)
    run(model, tokens(length=200), [150, *range(151, 201)], model.static_cache(200, ratio=1.0))
    with pytest.raises(RuntimeError, match=r"for 20 tokens, and more came.*make 21\."):
        run(model, tokens(), [20, 21], model.static_cache(20, ratio=1.0))


def test_the_plan_says_what_a_static_cache_takes() -> None:
    planned = plan(parent("llama"), {"steps": [{"rewriter": "dms", "ratio": 2, "window": 12, "layers": "1"}]})
    model = convert(parent("llama"), planned.recipe)
    cache = model.static_cache(64)
    run(model, tokens(batch=1, length=4), [4], cache)
    # The length of a stock layer is a scalar, which counts tokens and is none.
    assert tensor_bytes(cache) == planned.static_cache_bytes(64)
    assert "after, static" in str(planned)


def padded(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Mask, with five tokens of padding before the first sequence, and positions."""
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    return mask, (mask.cumsum(-1) - 1).clamp_min(0)


@torch.no_grad()
def operators_of_64_steps(model: PreTrainedModel) -> set[str]:
    """Names of the operators in the one graph that all of them are; their logits are checked."""
    ids, graphs = tokens(length=72), []
    mask, positions = padded(ids)

    def backend(graph: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    step = torch.compile(model.forward, backend=backend, fullgraph=True)
    cache = model.static_cache(72, ratio=1.0)
    first = {"attention_mask": mask[:, :8], "position_ids": positions[:, :8]}
    outputs = [model(ids[:, :8], past_key_values=cache, use_cache=True, **first).logits]
    owners = [layer for layer in cache.layers if isinstance(layer, PagedLayer)]
    places = [tensor.data_ptr() for layer in owners for tensor in layer.tensors()]
    for i in range(8, 72):
        until = torch.where(torch.arange(72) <= i, mask, 0)  # as generate does: of one length
        now = {"attention_mask": until, "position_ids": positions[:, i : i + 1]}
        outputs.append(step(ids[:, i : i + 1], past_key_values=cache, use_cache=True, **now).logits)
    torch.compiler.reset()
    want = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    assert_close(torch.cat(outputs, 1)[mask.bool()], want[mask.bool()])
    assert len(graphs) == 1
    assert places == [tensor.data_ptr() for layer in owners for tensor in layer.tensors()]
    return {str(node.target) for node in graphs[0].graph.nodes if "surgery" in str(node.target)}


@three_forms
@pytest.mark.parametrize("arguments", [{}, {"shared": True}, {"groups": "unequal"}])
def test_64_compiled_steps_are_one_graph(method: str, window: int | None, arguments: dict[str, object]) -> None:
    assert operators_of_64_steps(model_of(method, window, **arguments)) == {"surgery.decode_ragged.default"}


def test_64_compiled_steps_through_the_operator_that_merges_are_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surgery.runtime.pooling_cache, "_has_operator", lambda device: True)
    assert "surgery.merge_append_.default" in operators_of_64_steps(model_of("dmc", None))


@pytest.mark.parametrize(
    ("latent", "method", "window"), [("mla", "dms", 6), ("mla", "dmc", None), ("lowrank", "dms", 6)]
)
def test_64_compiled_steps_over_latents_are_one_graph(latent: str, method: str, window: int | None) -> None:
    operators = operators_of_64_steps(model_of(method, window, latent=latent))
    # Latents that are rotated at read are expanded from their slots.
    assert ("surgery.decode_ragged.default" in operators) == (latent == "mla")


def compiled(model: PreTrainedModel, ids: Tensor, **arguments: object) -> Tensor:
    config = CompileConfig(backend="eager", fullgraph=True, mode=None, dynamic=False)
    config._compile_all_devices = True
    return model.generate(ids, **GREEDY, compile_config=config, **arguments)


@three_forms
def test_generate_compiles_its_steps(method: str, window: int | None) -> None:
    model, ids = model_of(method, window), tokens(length=20)
    mask = padded(ids)[0]
    torch.compiler.reset()
    want = model.generate(ids, **GREEDY, attention_mask=mask)
    counted = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for _ in range(2):
        assert torch.equal(compiled(model, ids, attention_mask=mask, cache_implementation="static"), want)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == counted + 1
    beams = compiled(model, ids, attention_mask=mask, past_key_values=model.static_cache(40, ratio=1.0), num_beams=3)
    torch.compiler.reset()
    assert torch.equal(beams, model.generate(ids, **GREEDY, attention_mask=mask, num_beams=3))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@three_forms
def test_graphs_of_a_gpu_give_what_a_dynamic_cache_gives(method: str, window: int | None) -> None:
    model, ids = copy.deepcopy(model_of(method, window)).cuda(), tokens(length=20).cuda()
    mask = padded(ids)[0]
    want = model.generate(ids, **GREEDY, attention_mask=mask)
    for _ in range(2):  # transformers compiles by itself here: the second run replays
        assert torch.equal(model.generate(ids, **GREEDY, attention_mask=mask, cache_implementation="static"), want)


@torch.no_grad()
def test_a_pool_that_fills_in_a_compiled_step_says_so_and_can_be_reset() -> None:
    model, ids = model_of("dms", 12, drops=0.0), tokens(length=200)
    cache = model.static_cache(200, ratio=4.0)
    torch.compiler.reset()
    step = torch.compile(model.forward, backend="eager", fullgraph=True)
    model(ids[:, :40], past_key_values=cache, use_cache=True)
    with pytest.raises(RuntimeError, match=r"the static cache is full.*static_cache\(max_cache_len, ratio="):
        for i in range(40, 200):
            position = torch.full((2, 1), i)
            step(ids[:, i : i + 1], past_key_values=cache, position_ids=position, use_cache=True)
    torch.compiler.reset()
    tables = cache.layers[0].tables
    cache.reset()
    assert cache.get_seq_length() == 0
    logits, _ = run(model, ids[:, :40], [30, *range(31, 41)], cache)
    assert_close(logits, model(ids[:, :40], use_cache=False).logits)
    assert cache.layers[0].tables is tables
    taken = torch.cat([layer.tables[layer.tables > 0] for layer in cache.layers])
    assert len(taken) == len(taken.unique())
