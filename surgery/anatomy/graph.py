"""A decoder as a graph: what its inputs are, and how to run pieces of it on real numbers."""

from __future__ import annotations

import dataclasses
import operator
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from transformers import PreTrainedModel

from ..errors import UnsupportedModel
from .recording import ATTENTION, MASK, STUB, Recording


@dataclasses.dataclass
class Source:
    """Where a graph input comes from."""

    kind: str
    """parameter, buffer, constant or input."""
    name: str


class Graph:
    """An exported decoder: nodes in order, what its inputs are, and the values that are known without weights."""

    def __init__(
        self,
        program: torch.export.ExportedProgram,
        twin: PreTrainedModel,
        values: Mapping[str, Tensor],
        recording: Recording,
        tokens: int,
        rope_types: Mapping[str, Any],
    ) -> None:
        self.positions: fx.Node | None = None
        """The input that holds the positions, where the model takes one."""
        self.axes: fx.Node | None = None
        """Where it becomes several positions for each token (time, height and width of an image): all of them."""
        self.sees_ahead = False
        """Whether what a token is (text, image) may let it see later ones."""
        self.wide: Graph | None = None
        """The same model on more tokens, where its masks have to be read from numbers."""
        self.alike: dict[str, str] = {}
        """Layers that the graph leaves out, and the equal one that it holds in their place."""
        self.twin = twin
        self.rope_types = rope_types
        self.tokens = tokens
        self.calls = recording.calls
        self.masks = recording.masks
        self.nodes = list(program.graph_module.graph.nodes)
        self.order = {node: i for i, node in enumerate(self.nodes)}
        self.sources: dict[fx.Node, Source] = {}
        self.values: dict[fx.Node, Tensor] = {}
        signature = program.graph_signature
        for node in self.nodes:
            if node.op != "placeholder":
                continue
            if name := signature.inputs_to_parameters.get(node.name):
                self.sources[node] = Source("parameter", name)
            elif name := signature.inputs_to_buffers.get(node.name):
                self.sources[node] = Source("buffer", name)
                if name in values:
                    self.values[node] = values[name]
            elif name := signature.inputs_to_lifted_tensor_constants.get(node.name):
                self.sources[node] = Source("constant", name)
                constant = program.constants.get(name)
                if isinstance(constant, Tensor) and not isinstance(constant, FakeTensor):
                    self.values[node] = constant.detach().cpu()
            else:
                self.sources[node] = Source("input", node.name)
                if node.name == "attention_mask":
                    self.values[node] = torch.ones(shape(node), dtype=torch.long)
                elif node.name == "position_ids":
                    self.positions = node
                    self.values[node] = torch.arange(tokens)[None]
        self.axes = self._axes()
        # In-place operations change what earlier nodes hold: for each, the node that owns the memory.
        self._writes = [(n, self._root(n.args[0])) for n in self.nodes if _writes_in_place(n)]

    def _axes(self) -> fx.Node | None:
        """The last integers [axes, 1, T] that are made of the positions: behind them lies the rotation."""
        reached = {self.positions}
        found = None
        for node in self.nodes:
            value = node.meta.get("val")
            if not reached & set(node.all_input_nodes) or not isinstance(value, Tensor) or value.is_floating_point():
                continue
            reached.add(node)
            if value.ndim == 3 and value.shape[0] > 1 and tuple(value.shape[1:]) == (1, self.tokens):
                found = node
        return found

    def _root(self, node: Any) -> fx.Node:
        while node.op == "call_function" and (_is_view(node) or _writes_in_place(node)):
            node = node.args[0]
        return node

    def between(self, targets: Iterable[fx.Node], bound: Iterable[fx.Node]) -> list[fx.Node]:
        """Every node that `targets` need when the values of `bound` are given, in order of execution."""
        known, needed = set(bound), set(targets)
        last = max(self.order[t] for t in needed)

        def close(pending: list[fx.Node]) -> None:
            while pending:
                node = pending.pop()
                if node not in known:
                    fresh = [a for a in node.all_input_nodes if a not in needed]
                    needed.update(fresh)
                    pending.extend(fresh)

        close(list(needed))
        while True:
            late = [
                w
                for w, root in self._writes
                if w not in needed
                and self.order[w] < last
                and (root in needed or w.args[0] in needed)
                # what happened to the memory before a bound value was taken is part of that value
                and not any(self.order[w] < self.order[b] for b in known if self._root(b) is root)
            ]
            if not late:
                break
            needed.update(late)
            close(late)
        return sorted(needed, key=self.order.__getitem__)

    def runner(self, targets: Sequence[fx.Node], bound: Sequence[fx.Node]) -> Callable[..., list[Tensor]]:
        """A function of the values of `bound` (tensors, in order; then a dict by parameter) that gives `targets`."""
        nodes = self.between(targets, bound)
        written = {root for _, root in self._writes}
        moving, still = set(bound), []
        for node in nodes:
            unknown = node.op == "placeholder" and node not in self.values
            if unknown or self._root(node) in written or moving.intersection(node.all_input_nodes):
                moving.add(node)
            elif node not in moving:
                still.append(node)
        values: dict[fx.Node, Any] = {}  # of what depends on nothing that is given: rotary tables, masks

        def own(node: fx.Node, x: Tensor) -> Tensor:
            return x.clone() if node in written else x

        def run(*given: Tensor, more: Mapping[fx.Node, Tensor] | None = None) -> list[Tensor]:
            env: dict[fx.Node, Any] = {n: own(n, x) for n, x in zip(bound, given, strict=True)}
            env.update({n: own(n, x) for n, x in (more or {}).items()})
            with torch.no_grad():
                for node in still if not values else ():
                    values[node] = self._execute(node, values)
                env = {**values, **env}
                for node in nodes:
                    if node not in env:
                        env[node] = self._execute(node, env)
            return [env[t].clone() for t in targets]

        return run

    def _execute(self, node: fx.Node, env: Mapping[fx.Node, Any]) -> Any:
        if node.op == "placeholder":
            if node in self.values:
                return self.values[node].clone()
            source = self.sources[node]
            raise UnsupportedModel(
                f"{source.kind} {source.name!r}: its value is needed to read an attention but cannot be known "
                "without the weights."
            )
        if node.op != "call_function":
            raise UnsupportedModel(f"graph node {node.name!r}: cannot run a {node.op} node.")
        if node.target is MASK:
            _, tag, batch, queries, keys = cast(Any, node.args)
            return self.mask_values(tag, queries, keys).expand(batch, 1, queries, keys)
        if node.target in (ATTENTION, STUB):
            raise UnsupportedModel(f"graph node {node.name!r}: an attention reads what another module makes.")
        if "assert" in str(node.target):
            return None
        args, kwargs = cast(Any, fx.node.map_arg((node.args, dict(node.kwargs)), env.__getitem__))
        try:
            if str(node.target) == "aten.view.default" and not args[0].is_contiguous():
                args = (args[0].contiguous(), args[1])  # strides of chosen numbers may differ from the traced ones
            return cast(Callable[..., Any], node.target)(*args, **kwargs)
        except (RuntimeError, IndexError, TypeError, NotImplementedError) as error:
            raise UnsupportedModel(
                f"graph node {node.name!r} of module {module_name(node)!r}: cannot be run by itself ({error})."
            ) from error

    def mask_values(self, tag: int, queries: int, keys: int) -> Tensor:
        """Boolean [queries, keys] of a recorded mask function: True where the key is visible."""
        return self.visible(tag, torch.arange(queries)[:, None], torch.arange(keys)[None, :])

    def visible(self, tag: int, query: Tensor, key: Tensor) -> Tensor:
        """Whether a query position sees a key position, by the mask function that the model built."""
        zero = torch.zeros((), dtype=torch.long)
        try:
            seen = torch.as_tensor(self.masks[tag](zero, zero, query, key))
            if isinstance(seen, FakeTensor):
                raise TypeError("it depends on the tokens")
            return seen.expand(torch.broadcast_shapes(query.shape, key.shape)).clone()
        except Exception as error:  # a stranger's code, which may hold on to tensors of the trace
            raise UnsupportedModel(f"attention mask {tag}: cannot evaluate its mask function ({error}).") from error


def shape(node: fx.Node) -> tuple[int, ...]:
    """Shape of a node's tensor value."""
    return tuple(int(n) for n in node.meta["val"].shape)


def module_name(node: fx.Node) -> str:
    """Qualified name of the innermost module that a node was traced in."""
    stack = node.meta.get("nn_module_stack") or {}
    return str(list(stack.values())[-1][0]) if stack else ""


def is_call(node: Any, *names: str) -> bool:
    """Whether a node calls one of these aten operators, in whichever overload."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return False
    packet = getattr(node.target, "overloadpacket", None)
    return packet is not None and packet.__name__ in names


def _schema(node: fx.Node) -> Any:
    return getattr(node.target, "_schema", None) if node.op == "call_function" else None


def _writes_in_place(node: fx.Node) -> bool:
    schema = _schema(node)
    first = schema.arguments[0].alias_info if schema is not None and schema.arguments else None
    return first is not None and first.is_write


def _is_view(node: fx.Node) -> bool:
    if node.target is operator.getitem:
        return True
    schema = _schema(node)
    return schema is not None and any(r.alias_info is not None for r in schema.returns)


def subpaths(name: str) -> types.SimpleNamespace:
    """Split `model.layers.3.self_attn` into container, index and rest at the first number."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return types.SimpleNamespace(container=".".join(parts[:i]), index=int(part), rest=".".join(parts[i + 1 :]))
    return types.SimpleNamespace(container="", index=None, rest=name)
