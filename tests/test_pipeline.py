"""Layers that are run alone, in two streams, give what whole models give, and the parent keeps every bit."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import families
import pytest
import torch
import vision_models
from layerwise import copy_of, damage, random_windows
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

import surgery
from surgery.anatomy import examine
from surgery.calibration.journal import way_of
from surgery.calibration.layers import DecoderLayers
from surgery.calibration.outputs import answers
from surgery.calibration.pipeline import Pipeline
from surgery.calibration.statistics import module_of
from surgery.calibration.streams import Stream
from surgery.calibration.working_copy import WorkingCopy
from surgery.errors import UnsupportedModel
from surgery.rewriters.common.refit import fit_output
from surgery.rewriters.latent.moments import LatentMoments
from surgery.rewriters.latent.rotary_split import mla

COMPUTED = ["llama", "gemma2", "qwen3", "olmo2", "granite", "falcon", "gptj", "mpt", "bamba"]
"""Families whose layers are also run as latents and readers."""
NORMED_AFTER = ["gemma2", "olmo2"]
"""Families with a norm between the attention and the residual stream."""
NORMED_KEYS = ["qwen3", "olmo2"]
"""Families whose keys are normed, for which there is no latent."""


def latent(copy: WorkingCopy, layer: int) -> None:
    """Run the layer as a latent that is smaller than its heads."""
    w = copy.parent(layer)
    numbers = w.kv_heads * w.head_dim
    rope = 4 if w.frequencies else 0
    copy.write_latent(layer, mla(w, LatentMoments.of_weights(w), numbers - rope, rope), w)


def reader(copy: WorkingCopy, layer: int) -> None:
    """Read the cache of the layer before, or its values alone."""
    owner = max(other for other in copy.sites if other < layer)
    copy.read_from(layer, owner)


@torch.no_grad()
def check_streams(copy: WorkingCopy, pipeline: Pipeline) -> None:
    """Both streams, brought through all layers, against the whole models."""
    for batch, (ids, mask) in enumerate(pipeline.batches):
        for stream, model in ((pipeline.parent, copy.teacher), (pipeline.student, copy.model)):
            found, want = pipeline.layers.answers(stream[batch], ids, mask), answers(model, ids, mask)
            torch.testing.assert_close(found, want, atol=2e-4, rtol=2e-4)


def go_through(copy: WorkingCopy, do: dict[int, Any], lenders: Any = ()) -> Pipeline:
    """One way through all layers, with what is done to some of them."""
    windows = random_windows()
    pipeline = Pipeline(copy, windows)
    with way_of(copy, 0, windows, None, None) as way:
        for visit in pipeline.visits(do, lenders, way):
            do[visit.layer](copy, visit.layer)
    check_streams(copy, pipeline)
    return pipeline


@pytest.mark.parametrize(
    "step",
    [
        {"rewriter": "gqa", "kv_heads": 1, "refine": 2},
        {"rewriter": "mla", "keep": 0.5},
        {"rewriter": "share", "layout": "cla2", "init": "latent", "keep": 0.5},
        {"rewriter": "evict", "scorer": "streaming", "budget": "duo", "ratio": 2, "recent": 3},
    ],
)
def test_no_layer_stays_in_memory_until_cycles_are_looked_for(
    step: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[Any] = []
    build = DecoderLayers._filled

    def noted(self: DecoderLayers, *arguments: Any) -> nn.Module:
        made = build(self, *arguments)
        built.append(weakref.ref(made))
        return made

    monkeypatch.setattr(DecoderLayers, "_filled", noted)
    parent = families.tiny_model("llama")
    text = torch.randint(3, 100, (28, 20), generator=torch.Generator().manual_seed(0))
    surgery.examine(parent)
    gc.collect()
    gc.disable()
    try:
        surgery.convert(parent, {"steps": [step]}, calibration=text)
        assert len(built) >= 4
        assert not any(layer() is not None for layer in built)
    finally:
        gc.enable()


@pytest.mark.parametrize("name", families.FAMILIES)
def test_streams_of_every_family_are_those_of_the_whole_models(name: str) -> None:
    copy = copy_of(families.tiny_model(name))
    pipeline = go_through(copy, dict.fromkeys(copy.sites, damage))
    assert pipeline.divergence() > 1e-4
    assert pipeline.divergence() == pytest.approx(copy.divergence(pipeline.windows.split()[1]), rel=1e-3)


@pytest.mark.parametrize("name", vision_models.VLMS)
def test_streams_of_nested_text_models_are_those_of_the_whole_models(name: str) -> None:
    copy = copy_of(vision_models.tiny_vlm(name))
    go_through(copy, dict.fromkeys(copy.sites, damage))


@pytest.mark.parametrize("name", COMPUTED)
def test_streams_of_latents_and_readers_are_those_of_the_whole_models(name: str) -> None:
    more = {"num_hidden_layers": 4, "attn_layer_indices": [1, 3]} if name == "bamba" else {}
    copy = copy_of(families.tiny_model(name, **more))
    first, last = copy.sites
    go_through(copy, {first: damage if name in NORMED_KEYS else latent, last: reader}, lenders=[first])
    assert copy.owners == {last: first}
    # A second way through, over the reader of an earlier step.
    go_through(copy, {first: damage}, lenders=[first])
    for _ in copy.visits(random_windows(), [first]):  # here it is found by the form itself
        damage(copy, first)
    assert copy.held_out == pytest.approx(copy.divergence(random_windows().split()[1]), rel=1e-3)


@contextmanager
def inputs_seen(model: nn.Module, name: str) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """What a part of a model reads and gives, inside."""
    seen: list[tuple[Tensor, Tensor]] = []
    handle = model.get_submodule(name).register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    try:
        yield seen
    finally:
        handle.remove()


@torch.no_grad()
def seen_by_whole(model: PreTrainedModel, name: str, ids: Tensor) -> tuple[Tensor, Tensor]:
    """What a part of a whole model reads and gives, [B, T, D]."""
    with inputs_seen(model, name) as seen:
        model(input_ids=ids, use_cache=False)
    read, given = seen[-1]
    return read.reshape(*ids.shape, -1).clone(), given.reshape(*ids.shape, -1).clone()


@torch.no_grad()
def entering(model: PreTrainedModel, copy: WorkingCopy, layer: int, ids: Tensor) -> Tensor:
    """The hidden states that the layer reads in the whole model."""
    found: list[Tensor] = []

    def note(_: nn.Module, args: Any, kwargs: Any) -> None:
        found.append((args[0] if args else kwargs["hidden_states"]).clone())

    module = model.get_submodule(f"{copy.layers.name}.{copy.layers.place[layer]}")
    handle = module.register_forward_pre_hook(note, with_kwargs=True)
    model(input_ids=ids, use_cache=False)
    handle.remove()
    return found[0]


@pytest.mark.parametrize("name", [*COMPUTED, "gpt2", "phi3", "phi", "cohere", "gpt_oss", "opt"])
def test_activations_are_what_hooks_on_the_whole_models_see(name: str) -> None:
    copy = copy_of(
        families.tiny_model(name, **({"num_hidden_layers": 4, "attn_layer_indices": [1, 3]} if name == "bamba" else {}))
    )
    first, last = min(copy.sites), max(copy.sites)
    site = copy.sites[last]
    factor = 0.5 if name == "granite" else 1.0
    for visit in copy.visits(random_windows(), {first, last}):
        if visit.layer == first:
            damage(copy, first)
            continue
        batches = list(visit.activations())
        assert len(batches) == 2
        for a, (ids, mask) in zip(batches, visit.windows.split()[0].batches(8), strict=True):
            assert torch.equal(a.mask_BT, mask)
            x, _ = seen_by_whole(copy.teacher, module_of(site.q), ids)
            x_s, _ = seen_by_whole(copy.model, module_of(site.q), ids)
            _, y = seen_by_whole(copy.teacher, module_of(site.o), ids)
            if site.o.bias is not None:
                y = y - copy.teacher.get_parameter(site.o.bias).detach()
            gap = entering(copy.teacher, copy, last, ids) - entering(copy.model, copy, last, ids)
            assert float(gap.norm()) > 1e-2 * float(y.norm())
            wanted = y if name in NORMED_AFTER else y + gap / factor
            torch.testing.assert_close(a.x_parent_BTD, x, atol=2e-4, rtol=2e-4)
            torch.testing.assert_close(a.x_student_BTD, x_s, atol=2e-4, rtol=2e-4)
            torch.testing.assert_close(a.wanted_BTD, wanted, atol=5e-4, rtol=5e-4)
            assert (a.lost_BTD is None) == (name in NORMED_AFTER)
            own = a.wanted_BTD if a.lost_BTD is None else a.wanted_BTD - a.lost_BTD
            torch.testing.assert_close(own, y, atol=5e-4, rtol=5e-4)


def test_a_readers_activations_hold_what_its_owner_reads() -> None:
    copy = copy_of(families.tiny_model("llama", num_hidden_layers=4))
    for visit in copy.visits(random_windows(), {0, 3}, lenders=[1]):
        if visit.layer == 0:
            damage(copy, 0)
            continue
        for a, (ids, _) in zip(visit.activations(sources=[1, 3]), visit.windows.split()[0].batches(8), strict=True):
            assert a.inputs.keys() == {1, 3}
            for layer, x in a.inputs.items():
                want = seen_by_whole(copy.model, module_of(copy.sites[layer].q), ids)[0]
                torch.testing.assert_close(x, want, atol=1e-4, rtol=1e-4)


def test_what_later_layers_read_in_the_parent_is_found_ahead() -> None:
    copy = copy_of(families.tiny_model("llama", num_hidden_layers=4))
    for visit in copy.visits(random_windows(), {1}):
        found = {layer: [x[i] for i in range(2)] for layer, x in visit.ahead([2, 3])}
        damage(copy, 1)
    assert found.keys() == {2, 3}
    for layer, batches in found.items():
        for x, (ids, _) in zip(batches, random_windows().split()[0].batches(8), strict=True):
            want = seen_by_whole(copy.teacher, module_of(copy.sites[layer].q), ids)[0]
            torch.testing.assert_close(x, want, atol=1e-4, rtol=1e-4)


def test_an_error_is_that_of_the_hidden_states_after_the_layer() -> None:
    copy = copy_of(families.tiny_model("llama", num_hidden_layers=3))
    for visit in copy.visits(random_windows(), {0, 1}):
        damage(copy, visit.layer)
        found = visit.error()
    total = tokens = 0.0
    for ids, mask in random_windows().split()[1].batches(8):
        a, b = (entering(model, copy, 2, ids)[mask] for model in (copy.model, copy.teacher))
        total += float(((a - b).square().sum(-1) / b.square().sum(-1)).sum())
        tokens += int(mask.sum())
    assert found == pytest.approx(total / tokens, rel=1e-4)


# ------------------------------------------------------------------------------------------------- the parent


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_the_parent_keeps_every_bit(name: str, dtype: torch.dtype) -> None:
    model = families.tiny_model(name).to(dtype)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    before = {name: (t, t.data_ptr(), t.detach().clone()) for name, t in tensors.items()}
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    copy = copy_of(model)
    go_through(copy, dict.fromkeys(copy.sites, damage))
    for visit in copy.visits(random_windows(), copy.sites, lenders=copy.sites):
        reader(copy, visit.layer) if visit.layer else latent(copy, 0)
        copy.write(visit.layer, fit_output(visit, copy.read(visit.layer)))
    after = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert after.keys() == before.keys()
    for name, (tensor, place, value) in before.items():
        assert after[name] is tensor
        assert tensor.data_ptr() == place
        assert tensor.dtype == value.dtype
        assert torch.equal(tensor, value), name
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    assert not any("forward" in vars(m) for m in model.modules())


# ------------------------------------------------------------------------------------------------- refusals


def llama(**more: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2, **more,
    )  # fmt: skip


class HalvedBetween(LlamaModel):
    """Halves hidden states between two layers."""

    def forward(self, input_ids: Tensor, **_: Any) -> BaseModelOutputWithPast:
        h = self.embed_tokens(input_ids)
        angles = self.rotary_emb(h, torch.arange(h.shape[1])[None])
        for index, layer in enumerate(self.layers):
            h = layer(h / 2 if index == 2 else h, attention_mask=None, position_embeddings=angles)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(h))


class OneTwice(LlamaModel):
    """Calls its first layer twice."""

    def forward(self, input_ids: Tensor, **_: Any) -> BaseModelOutputWithPast:
        h = self.embed_tokens(input_ids)
        angles = self.rotary_emb(h, torch.arange(h.shape[1])[None])
        for layer in (self.layers[0], *self.layers):
            h = layer(h, attention_mask=None, position_embeddings=angles)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(h))


@pytest.mark.parametrize(("kind", "layer"), [(HalvedBetween, 2), (OneTwice, 0)])
def test_layers_that_cannot_be_run_alone_are_refused_with_the_layers_name(kind: type[LlamaModel], layer: int) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama()).eval()
    anatomy = examine(model)
    model.model.__class__ = kind
    model(input_ids=torch.tensor([[3, 4, 5]]))
    with pytest.raises(UnsupportedModel, match=f"layer {layer}: "):
        next(WorkingCopy(model, anatomy).visits(random_windows(), [0]))


def test_streams_in_bfloat16_take_half_the_memory_and_change_little(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: set[torch.dtype] = set()
    inner = Stream.__setitem__

    def noted(self: Stream, batch: int, value: Tensor) -> None:
        inner(self, batch, value)
        kept.add(self._held[batch].dtype)

    monkeypatch.setattr(Stream, "__setitem__", noted)
    model, recipe = families.tiny_model("llama"), {"steps": [{"rewriter": "gqa", "kv_heads": 1}]}
    ids = random_windows().ids_BT
    wide = surgery.convert(model, recipe, calibration=ids)
    assert kept == {torch.float32}
    kept.clear()
    narrow = surgery.convert(model, recipe, calibration=ids, streams="bfloat16")
    assert kept == {torch.bfloat16}
    for name, tensor in wide.state_dict().items():
        assert 0 <= float((narrow.state_dict()[name] - tensor).norm()) <= 0.05 * float(tensor.norm()), name
    assert any(not narrow.state_dict()[name].equal(tensor) for name, tensor in wide.state_dict().items())
    with pytest.raises(surgery.PlanError, match="streams: 'float16' must be one of float32, bfloat16"):
        surgery.convert(model, recipe, calibration=ids, streams="float16")


@pytest.mark.parametrize("case", ["plain", "tied", "not exact", "reads its dtype"])
@torch.no_grad()
def test_tables_are_held_in_half_precision_where_that_changes_nothing(case, monkeypatch):
    monkeypatch.setattr("surgery.calibration.tables.TABLE_NUMBERS", 1024)
    monkeypatch.setattr("surgery.calibration.tables.WIDENED", 512)
    parent = families.tiny_model("llama", tie_word_embeddings=case == "tied").eval()
    if case != "not exact":
        parent = parent.bfloat16().float()
    copy, windows = copy_of(parent), random_windows()
    ids, mask = windows.ids_BT[:2], windows.mask_BT[:2]
    if case == "reads its dtype":
        real = LlamaModel.forward

        def forward(self: LlamaModel, input_ids: Tensor | None = None, **more: Any) -> Any:
            more["inputs_embeds"] = self.embed_tokens(input_ids).to(self.embed_tokens.weight.dtype)
            return real(self, **more)

        monkeypatch.setattr(LlamaModel, "forward", forward)
    wanted = answers(parent, ids, mask)
    shell = copy.layers.shell
    narrow = {m.weight.dtype for m in (shell.get_input_embeddings(), shell.get_output_embeddings())}
    assert narrow == {torch.float32 if case in ("not exact", "reads its dtype") else torch.bfloat16}
    h, calls = copy.layers.entering(ids)
    for index in range(len(copy.layers)):
        h = copy.layers.run(copy.layers.build(index), h, calls[index])
    torch.testing.assert_close(copy.layers.answers(h, ids, mask), wanted, rtol=1e-5, atol=1e-5)
    assert parent.lm_head.weight.dtype == torch.float32
