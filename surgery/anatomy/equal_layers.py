"""Decoder layers that compute the same: one of each kind is captured, which is what makes deep models quick to read.

Nothing is concluded from class names or config fields. The whole model runs once on tensors without memory, and every
operator of every layer is written down with its arguments. Two layers are alike where these records are equal, tensor
by tensor: own parameters by their name inside the layer, own buffers by their values, results by number, and whatever
comes from outside (masks, rotary tables) as that very object. Anything unforeseen makes layers differ.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


@dataclasses.dataclass
class _Record:
    """What one layer did."""

    names: dict[int, str]
    lines: list[Any] = dataclasses.field(default_factory=list)
    results: dict[int, Any] = dataclasses.field(default_factory=dict)
    calls: int = 0
    rebuild: Callable[[Tensor], Any] | None = None
    """Makes what the layer returns out of its hidden states."""


class _Tape(TorchDispatchMode):
    """Writes the operators that run inside a layer into its record; `describe` replaces arguments that only number."""

    def __init__(self, describe: Callable[[Any, tuple[Any, ...]], tuple[Any, ...]]) -> None:
        super().__init__()
        self.describe = describe
        self.current: _Record | None = None
        self.seen: list[Any] = []  # keeps every tensor alive: ids stay unique

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        record = self.current
        if record is not None:
            leaves, spec = pytree.tree_flatten((self.describe(func, args), kwargs or {}))
            record.lines.append((str(func), str(spec), tuple(self.place(x) for x in leaves)))
            for x in pytree.tree_leaves(out):
                self.seen.append(x)
                # An operator that writes in place returns what it was given, which keeps its place.
                if isinstance(x, Tensor) and id(x) not in record.results:
                    record.results[id(x)] = ("result", len(record.results))
        return out

    def place(self, x: Any) -> Any:
        """What stands for an argument in a record."""
        if not isinstance(x, Tensor):
            return (type(x).__name__, str(x))
        self.seen.append(x)
        assert self.current is not None
        own = self.current.names.get(id(x))
        return ("own", own) if own is not None else self.current.results.get(id(x), ("outside", id(x)))


def find_alike(
    twin: nn.Module,
    run: Callable[[], Any],
    values: Mapping[str, Tensor],
    notes: Mapping[str, Any],
    describe: Callable[[Any, tuple[Any, ...]], tuple[Any, ...]],
) -> dict[str, tuple[str, Callable[[Tensor], Any]]]:
    """Layers that repeat an earlier one.

    Args:
        twin: the model, on a device without memory.
        run: calls its forward.
        values: real values of buffers by name.
        notes: what else is known of modules, by name; it must agree too.
        describe: replaces arguments of an operator that only number its call.

    Returns:
        By name of a repeating layer: the name of the first of its kind, and what makes the layer's answer out of its
        hidden states. Empty where there is one layer, or they are not called once each in the ordinary way.
    """
    layers: dict[str, nn.Module] = {}
    for name, module in twin.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > 1 and not name.startswith(tuple(layers)):
            layers |= {f"{name}.{i}": layer for i, layer in enumerate(module)}
    if not layers:
        return {}
    records = {name: _Record(_tensors(layer)) for name, layer in layers.items()}
    tape = _Tape(describe)
    with _watch(layers, records, tape), torch.no_grad(), tape:
        try:
            run()
        except Exception:  # whatever a stranger's modelling code may raise: the capture will say it
            return {}
    first: dict[Any, str] = {}
    alike = {}
    for name, record in records.items():
        if record.calls != 1 or record.rebuild is None:
            continue
        key = (_form(layers[name]), _known(name, values), _known(name, notes), str(record.lines))
        if key in first:
            alike[name] = (first[key], record.rebuild)
        else:
            first[key] = name
    return alike


@contextmanager
def _watch(layers: Mapping[str, nn.Module], records: Mapping[str, _Record], tape: _Tape) -> Iterator[None]:
    def enter(record: _Record) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            record.calls += 1
            tape.current = record
            leaves, spec = pytree.tree_flatten((args, kwargs))
            hidden = next((x for x in leaves if isinstance(x, Tensor)), None)
            record.results[id(hidden)] = ("hidden", 0)
            record.lines.append((str(spec), tuple(tape.place(x) for x in leaves)))

        return hook

    def leave(record: _Record) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            leaves, spec = pytree.tree_flatten(output)
            record.lines.append((str(spec), tuple(tape.place(x) for x in leaves)))
            tape.current = None
            hidden = next(x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor))
            tensors = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]
            if tensors == [0] and leaves[0].shape == hidden.shape and leaves[0].dtype == hidden.dtype:
                rest = leaves[1:]
                record.rebuild = lambda x: pytree.tree_unflatten([x, *rest], spec)

        return hook

    handles = []
    for name, layer in layers.items():
        handles.append(layer.register_forward_pre_hook(enter(records[name]), with_kwargs=True))
        handles.append(layer.register_forward_hook(leave(records[name]), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensors(layer: nn.Module) -> dict[int, str]:
    named = (*layer.named_parameters(remove_duplicate=False), *layer.named_buffers(remove_duplicate=False))
    return {id(x): name for name, x in named}


def _form(layer: nn.Module) -> str:
    """Classes of all modules, and names and shapes of all tensors, inside a layer."""
    modules = [(name, f"{type(m).__module__}.{type(m).__qualname__}") for name, m in layer.named_modules()]
    named = (*layer.named_parameters(remove_duplicate=False), *layer.named_buffers(remove_duplicate=False))
    return str((modules, [(name, tuple(x.shape), str(x.dtype)) for name, x in named]))


def _known(layer: str, table: Mapping[str, Any]) -> str:
    """The part of `table` that lies inside a layer."""
    inside = layer + "."
    return str([(n.removeprefix(inside), digest(x)) for n, x in table.items() if n.startswith(inside)])


def digest(x: Any) -> Any:
    """What is equal for tensors of equal shape, dtype and bytes; anything else as it is."""
    if not isinstance(x, Tensor):
        return x
    data = x.detach().cpu().contiguous()
    return tuple(data.shape), str(data.dtype), hash(data.reshape(-1).view(torch.uint8).numpy().tobytes())
