"""Converted and native models decode through the operators: same logits, one graph, no copy of a cache."""

from __future__ import annotations

import copy
import re
import subprocess
import sys

import pytest
import torch
from closeness import assert_close
from families import tiny_model
from methods import converted
from test_runtime import GREEDY, left_padded, tokens
from torch import Tensor, nn
from torch._inductor import compile_fx
from torch._inductor.utils import run_and_get_code
from transformers import DynamicCache, PreTrainedModel, StaticCache

from surgery.kernels.decode_gqa import decode_gqa
from surgery.kernels.decode_latent import decode_latent
from surgery.kernels.rope_append import rope_append_
from surgery.runtime import ops

PAIRS = [
    ("per_layer_heads", "llama"), ("unequal_groups", "llama"), ("mla", "llama"), ("lowrank", "llama"),
    ("identity", "qwen3"), ("identity", "mistral"), ("mla", "mistral"), ("identity", "bloom"), ("mla", "gemma2"),
    ("identity", "gpt_oss"),
]  # fmt: skip
matrix = pytest.mark.parametrize(("method", "family"), PAIRS)


def switched(method: str, family: str) -> PreTrainedModel:
    model = converted(method, family)
    model.set_attn_implementation("surgery")
    return model


def operators_called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the functions of `runtime.ops` that decode, as they are called."""
    called: list[str] = []
    monkeypatch.setattr(ops, "live", lambda *a, live=ops.live: called.append("live") or live(*a))  # type: ignore[func-returns-value]
    return called


@matrix
@pytest.mark.parametrize("cache", [DynamicCache, StaticCache])
@torch.no_grad()
def test_decoding_gives_the_logits_of_sdpa(
    method: str, family: str, cache: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = switched(method, family), tokens()
    called = operators_called(monkeypatch)
    kept = cache(config=model.config, **({"max_cache_len": 24} if cache is StaticCache else {}))
    steps = [model(part, past_key_values=kept, use_cache=True).logits for part in (ids[:, :9], *ids[:, 9:].split(1, 1))]
    assert_close(torch.cat(steps, 1), converted(method, family)(ids, use_cache=False).logits)
    # Soft caps and sinks run in eager attention, ALiBi through float masks; keys turned at read are expanded first.
    assert bool(called) is (family not in ("bloom", "gemma2", "gpt_oss") and method != "lowrank")


@matrix
def test_left_padding_changes_nothing_through_the_operators(method: str, family: str) -> None:
    model = switched(method, family)
    ids, mask = left_padded()
    for arguments in ({}, {"cache_implementation": "static"}):
        batched = model.generate(ids, attention_mask=mask, **GREEDY, **arguments)
        assert torch.equal(batched[:1, 5:], model.generate(ids[:1, 5:], **GREEDY))
        assert torch.equal(batched[1:], model.generate(ids[1:], **GREEDY))


@torch.no_grad()
def test_a_mask_with_a_hole_hides_what_is_in_it() -> None:
    model, ids, mask = tiny_model("llama"), tokens(), torch.ones(2, 14, dtype=torch.long)
    mask[:, 4:7] = 0
    outputs = []
    for name in ("sdpa", "surgery"):
        model.set_attn_implementation(name)
        cache = DynamicCache(config=model.config)
        model(ids[:, :13], attention_mask=mask[:, :13], past_key_values=cache, use_cache=True)
        outputs.append(model(ids[:, 13:], attention_mask=mask, past_key_values=cache, use_cache=True).logits)
    assert_close(outputs[1], outputs[0])


def test_a_native_model_of_transformers_decodes_through_the_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny_model("llama"), tokens()
    want = model.generate(ids, **GREEDY)
    model.set_attn_implementation("surgery")
    called = operators_called(monkeypatch)
    assert torch.equal(model.generate(ids, **GREEDY), want)
    assert called


def test_training_goes_through_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operators have no gradient: a single token, which they decode otherwise, is left to sdpa."""
    model, ids = switched("mla", "llama"), tokens(length=1)
    called = operators_called(monkeypatch)
    model(ids, use_cache=False).logits.sum().backward()
    assert not called
    made = {name: p.grad for name, p in model.named_parameters() if "kv_down" in name}
    assert sorted(made) == [f"model.layers.{i}.self_attn.kv_down.weight" for i in range(2)]
    assert all(grad is not None and bool(grad.any()) for grad in made.values())
    with torch.no_grad():
        model(ids, use_cache=False)
    assert called


@pytest.mark.parametrize(("method", "family"), [("per_layer_heads", "llama"), ("mla", "llama")])
@torch.no_grad()
def test_64_compiled_steps_are_one_graph(method: str, family: str) -> None:
    model, ids, graphs = switched(method, family), tokens(length=72), []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    step = torch.compile(model.forward, backend=backend, fullgraph=True)
    cache = StaticCache(config=model.config, max_cache_len=80)
    outputs = [model(ids[:, :8], past_key_values=cache, use_cache=True).logits]
    for i in range(8, 72):
        position = torch.full((2, 1), i)
        outputs.append(step(ids[:, i : i + 1], past_key_values=cache, position_ids=position, use_cache=True).logits)
    torch.compiler.reset()
    assert_close(torch.cat(outputs, 1), model(ids).logits)
    assert len(graphs) == 1
    called = {node.target for node in graphs[0].graph.nodes if "surgery" in str(node.target)}
    assert called == {decode_latent if method == "mla" else decode_gqa}


class TwoLayers(nn.Module):
    """A decode step over own static caches: heads in one layer, latents in the other."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.register_buffer("k", torch.zeros(2, 2, capacity, 16))
        self.register_buffer("v", torch.zeros(2, 2, capacity, 16))
        self.register_buffer("latent", torch.zeros(2, 1, capacity, 48))
        self.register_buffer("places", torch.zeros(2, dtype=torch.int32))

    def forward(self, q: Tensor, kv: Tensor, entry: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        turned = rope_append_(q, kv, kv, cos, sin, self.places, self.k, self.v)
        heads, _ = decode_gqa(turned, self.k, self.v, self.places + 1, 0.25)
        wide = torch.cat((heads, q, heads), -1)
        turned = rope_append_(wide, entry, None, cos, sin, self.places, self.latent, None, False, 32)
        mean, _ = decode_latent(turned, self.latent, self.places + 1, 0.25, 32)
        self.places += 1
        return mean


@torch.no_grad()
def test_compilation_copies_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    capacity, seen, code = 1000, [], ""
    eager = TwoLayers(capacity)
    model = copy.deepcopy(eager)

    def passes(graph: torch.fx.GraphModule, *args: object, run=compile_fx._recursive_post_grad_passes, **kw) -> None:  # type: ignore[no-untyped-def]
        run(graph, *args, **kw)
        seen.append(list(graph.graph.nodes))

    monkeypatch.setattr(compile_fx, "_recursive_post_grad_passes", passes)
    generator = torch.Generator().manual_seed(0)
    torch.compiler.reset()
    with torch._inductor.config.patch(fx_graph_cache=False), torch._dynamo.config.patch(error_on_recompile=True):
        step = torch.compile(model.forward, fullgraph=True)
        for _ in range(3):
            inputs = [torch.randn(2, *s, generator=generator) for s in ((4, 16), (2, 16), (1, 48), (8,), (8,))]
            output, (more,) = run_and_get_code(step, *inputs) if not seen else (step(*inputs), ("",))
            code = code or more
            assert_close(output, eager(*inputs))
    torch.compiler.reset()
    assert torch.equal(model.latent, eager.latent) and int(model.places[0]) == 3
    assert len(seen) == 1 and "rope_append_" in code
    assert sum(node.target is rope_append_ for node in seen[0]) == 2
    made = [n for n in seen[0] if n.op != "placeholder" and capacity in getattr(n.meta.get("val"), "shape", ())]
    # What is left of each mutation is a copy of the cache onto itself, which inductor drops.
    assert all(n.target is torch.ops.aten.copy_.default and n.args[0] is n.args[1] for n in made), made
    assert not [line for line in code.splitlines() if str(capacity) in line and re.search(r"empty|clone|copy_", line)]


def test_without_the_kernels_the_name_is_not_registered() -> None:
    code = """
import sys
sys.modules["surgery.kernels.decode_gqa"] = None
from surgery.runtime import ops
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
assert not ops.AVAILABLE
assert ops.NAME not in ALL_ATTENTION_FUNCTIONS.valid_keys()
assert ops.NAME not in ALL_MASK_ATTENTION_FUNCTIONS.valid_keys()
"""
    subprocess.run([sys.executable, "-c", code], check=True)
