"""The working copy: any mix of forms on its layers, whatever the device, and nothing of the caller's touched."""

from __future__ import annotations

import copy as copies
import random
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary
from transformers import LlamaConfig, LlamaForCausalLM

import surgery
from surgery.anatomy import examine
from surgery.assembly import in_own_class
from surgery.calibration.text import Windows
from surgery.calibration.working_copy import WorkingCopy
from surgery.plan import Plan, plan
from surgery.rewriters import rewriter_for
from surgery.rewriters.tokens.windows import window_costs
from surgery.runtime.gated import SurgeryGatedAttention

GQA = {"rewriter": "gqa", "kv_heads": 2, "gain_fit": False}
MLA = {"rewriter": "mla", "keep": 0.5}
LOWRANK = {"rewriter": "lowrank", "keep": 0.5}
SHARE = {"rewriter": "share", "gain_fit": False}
DMS = {"rewriter": "dms", "window": 8, "ratio": 2}
DMC = {"rewriter": "dmc", "ratio": 2}

MIXES: dict[str, tuple[list[dict[str, Any]], list[str]]] = {
    "heads, latents": ([GQA | {"layers": "0-1"}, MLA | {"layers": "2-3"}], ["heads 2", "heads 2", "latent", "latent"]),
    "latents, heads": (
        [LOWRANK | {"layers": "0-1"}, GQA | {"layers": "2-3"}],
        ["latent", "latent", "heads 2", "heads 2"],
    ),
    "heads, shared latents": (
        [GQA | {"layers": "0-1"}, SHARE | {"layers": "2-3", "layout": {3: 2}, "init": "latent", "keep": 0.5}],
        ["heads 2", "heads 2", "latent", "latent of 2"],
    ),
    "latents, shared heads": (
        [MLA | {"layers": "0-1"}, SHARE | {"layers": "2-3", "layout": {3: 2}}],
        ["latent", "latent", "heads 4", "heads 4 of 2"],
    ),
    "shared heads, latents after them": (
        [MLA | {"layers": "2-3"}, SHARE | {"layers": "0-1", "layout": {1: 0}}],
        ["heads 4", "heads 4 of 0", "latent", "latent"],
    ),
    "pooled heads that are shared, latents": (
        [GQA | {"layers": "0-2"}, MLA | {"layers": "3"}, SHARE | {"layers": "1-2", "layout": {2: 1}, "init": "mean"}],
        ["heads 2", "heads 2", "heads 2 of 1", "latent"],
    ),
    "shared values, latents": (
        [MLA | {"layers": "2-3", "gain_fit": True}, SHARE | {"layers": "0-1", "layout": "svformer"}],
        ["heads 4", "heads 4, V of 0", "latent", "latent"],
    ),
    "heads and latents, gates on heads": (
        [GQA | {"layers": "0-1"}, MLA | {"layers": "3"}, DMS | {"layers": "0"}, DMC | {"layers": "2"}],
        ["heads 2 dms", "heads 2", "heads 4 dmc", "latent"],
    ),
}


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        initializer_range=0.2,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config).eval()


def ids(windows: int = 16, length: int = 20) -> Tensor:
    return torch.randint(3, 96, (windows, length), generator=torch.Generator().manual_seed(1))


def text(windows: int = 16) -> Windows:
    found = ids(windows)
    return Windows(found, torch.ones_like(found, dtype=torch.bool), f"random {windows}")


def run(
    work: WorkingCopy, model: LlamaForCausalLM, steps: list[dict[str, Any]], windows: Windows | None, mode: Any = None
) -> Plan:
    """Carry out the steps (inside `mode`); the settled plan."""
    planned = plan(model, {"steps": steps})
    for step in planned.recipe.steps:
        with mode or nullcontext():
            rewriter_for(step).convert(work, [after for _, after in planned.changed(step)], windows)
    return planned.settled(map(work.settle, planned.after))


def said(layer: Any) -> str:
    form = "latent" if layer.project.kind == "latent" else f"heads {layer.project.kv_heads}"
    form += f" of {layer.owner}" if layer.owner != layer.layer else ""
    form += f", V of {layer.value_owner}" if layer.value_owner is not None else ""
    return form + (f" {layer.retain.kind}" if layer.retain else "")


@pytest.mark.parametrize("name", MIXES)
def test_mixed_forms_give_the_result_that_was_calibrated(name: str) -> None:
    steps, wanted = MIXES[name]
    model = tiny()
    work = WorkingCopy(model, examine(model))
    settled = run(work, model, steps, text())
    assert [said(layer) for layer in settled.after] == wanted
    child = in_own_class(model, settled, work, {})
    with torch.no_grad():
        found, want = work.model(ids(2)).logits, child(ids(2)).logits
        assert (found - model(ids(2)).logits).abs().max() > 1e-3
    torch.testing.assert_close(found, want, atol=1e-4, rtol=1e-4)


def test_heads_alone_put_no_hook_on_the_copy() -> None:
    model = tiny()
    work = WorkingCopy(model, examine(model))
    run(work, model, [GQA], text())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in work.model.modules())


def test_a_form_can_be_given_back() -> None:
    model = tiny()
    work = WorkingCopy(model, examine(model))
    want = work.model(ids(2)).logits
    before = work.form(3)
    work.read_from(3, 1)
    assert work.owners == {3: 1}
    assert not torch.equal(work.model(ids(2)).logits, want)
    work.take_form(3, before)
    assert torch.equal(work.model(ids(2)).logits, want)


def test_activations_bring_the_inputs_that_they_were_computed_with() -> None:
    model = tiny()
    work = WorkingCopy(model, examine(model))
    work.read_from(3, 1)
    visits = work.visits(text(), [3])
    visit = next(visits)
    first = [a.inputs[1].clone() for a in visit.activations()]
    assert len(first) == 2
    # Neither a pass over the model, nor a second iterator, nor a comparison changes what a batch holds.
    for a, b, want in zip(visit.activations(), visit.activations(sources=[3]), first, strict=True):
        work.model(ids(3))
        visit.error()
        for found in (a, b):
            assert torch.equal(found.inputs[1], want)
            assert torch.equal(found.inputs[3], found.x_student_BTD)


def test_measuring_windows_leaves_gates_as_they_were_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    work = WorkingCopy(model, examine(model))
    planned = plan(model, {"steps": [{"rewriter": "evict", "window": 6, "sinks": 2}]})
    seen: list[Any] = []

    def fail(built: Any, _: Windows) -> float:
        seen.append(built)
        raise KeyboardInterrupt

    monkeypatch.setattr(work, "divergence_of", fail)
    with pytest.raises(KeyboardInterrupt):
        window_costs(work, planned.after, text(), lambda _: None)(1, 6)
    gates = [m for m in seen[0].modules() if isinstance(m, SurgeryGatedAttention)]
    assert [gate.retain.window for gate in gates] == [20] * 4


@pytest.mark.parametrize("step", [GQA | {"init": "random"}, MLA, SHARE, DMS | {"windows": "sensitivity"}])
def test_conversion_neither_uses_nor_changes_the_callers_random_state(step: dict[str, Any]) -> None:
    model, found = tiny(), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        before = torch.get_rng_state(), random.getstate(), repr(np.random.get_state())
        found.append(surgery.convert(model, {"steps": [step]}, calibration=ids()).state_dict())
        assert torch.equal(torch.get_rng_state(), before[0])
        assert (random.getstate(), repr(np.random.get_state())) == before[1:]
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


ELSEWHERE = torch.device("xpu", 0)
"""Stands for an accelerator that is not here."""
FREE = {"copy_", "__setitem__", "__get__", "shape", "size", "dim", "type", "backward", "numel", "is_floating_point"}


class TwoDevices(TorchFunctionMode):
    """Tensors of a model are said to be on another device; an operation on tensors of two devices is an error."""

    def __init__(self, *models: torch.nn.Module) -> None:
        super().__init__()
        self.there = WeakIdKeyDictionary()
        for model in models:
            for tensor in (*model.parameters(), *model.buffers()):
                self.there[tensor] = True

    def __enter__(self) -> TwoDevices:
        """Inside, a parameter is where its tensor is, too: no mode sees how one is made."""
        make = Tensor._make_subclass

        def made(kind: type, data: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            found = make(kind, data, *args, **kwargs)
            if data in self.there:
                self.there[found] = True
            return found

        Tensor._make_subclass = staticmethod(made)
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        del Tensor._make_subclass  # what it inherits is there again

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        # What deepcopy has copied before goes along with it.
        tensors = [t for t in _leaves(args[:1] if name == "__deepcopy__" else (args, kwargs)) if isinstance(t, Tensor)]
        there = [t for t in tensors if t in self.there]
        if func == Tensor.device.__get__:
            return ELSEWHERE if there else torch.device("cpu")
        target: bool | None = None
        if name in ("to", "cpu", "type_as"):
            devices = [torch.device(a) for a in _leaves((args[1:], kwargs)) if isinstance(a, (torch.device, str))]
            others = [t for t in _leaves((args[1:], kwargs)) if isinstance(t, Tensor)]
            target = (
                False if name == "cpu" else devices[0] == ELSEWHERE if devices
                else others[0] in self.there if others else bool(there)
            )  # fmt: skip
            if others:  # the same without the tensor that is only asked for its device and dtype
                func, args = Tensor.to, (args[0], others[0].dtype)
            args = tuple(a for a in args if not isinstance(a, torch.device))
            kwargs.pop("device", None)
        elif kwargs.get("device") is not None:
            target = torch.device(kwargs["device"]) == ELSEWHERE
            kwargs["device"] = "cpu" if target else kwargs["device"]
        elif there and name not in FREE:
            mixed = [
                t
                for t in tensors
                if t not in self.there and t.dim() and not (name == "__getitem__" and t is not args[0])
            ]
            if mixed:
                raise RuntimeError(f"{name}: tensors are on two devices")
        if func is Tensor.to and len(args) == 1 and not kwargs:
            found = args[0].view_as(args[0])
        else:
            found = func(*args, **kwargs)
        on = bool(there) if target is None else target
        same = target is not None and any(found is t for t in tensors)
        if same and (found in self.there) != on:
            found = found.view_as(found)
        if on:
            for t in _leaves(found):
                if isinstance(t, Tensor):
                    self.there[t] = True
        return found


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for part in value.values() for leaf in _leaves(part)]
    if isinstance(value, (list, tuple)):
        return [leaf for part in value for leaf in _leaves(part)]
    return [value]


@pytest.mark.parametrize(
    "step",
    [
        GQA | {"gain_fit": True},
        pytest.param(GQA | {"gain_fit": "global"}, marks=pytest.mark.slow),
        MLA | {"gain_fit": "global"},
        pytest.param(LOWRANK | {"gain_fit": True}, marks=pytest.mark.slow),
        LOWRANK | {"ranks": "sensitivity"},
        pytest.param(SHARE, marks=pytest.mark.slow),
        SHARE | {"layout": "kvsharer", "kv_layers": 3, "init": "replace"},
        SHARE | {"init": "latent", "keep": 0.5},
        DMS | {"gate": "score:key_norm", "window": 4, "ratio": 1.2},
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_model_on_another_device_is_converted_to_the_same_numbers(step: dict[str, Any]) -> None:
    model = tiny()
    work, here = (WorkingCopy(copies.deepcopy(model), examine(model)) for _ in range(2))
    want = run(here, model, [step], text())
    mode = TwoDevices(work.teacher, work.model)
    found = run(work, model, [step], text(), mode)
    with mode:
        assert next(work.model.parameters()).device == ELSEWHERE
    assert found.after == want.after
    for layer in work.sites:
        for name, tensor in here.canonical(layer).items():
            assert torch.equal(work.canonical(layer)[name], tensor), name
