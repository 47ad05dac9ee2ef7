"""Walk an exported graph: find the attentions, the linears that feed them and the linear that reads them."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import fx

from ..errors import UnsupportedModel
from .graph import Graph, is_call, module_name, shape
from .recording import ATTENTION, STUB, Call


@dataclasses.dataclass(frozen=True)
class Found:
    """One softmax attention in the graph."""

    module: str
    q: fx.Node
    k: fx.Node
    v: fx.Node
    out: fx.Node
    tokens_first: bool
    """Whether `out` is [B, T, N, H] rather than [B, N, T, H]."""
    k_transposed: bool = False
    call: Call | None = None
    """What the attention interface was told; None where the model computes its own attention."""
    mask: fx.Node | None = None
    sinks: fx.Node | None = None
    scores: fx.Node | None = None
    """Input of the softmax, where the graph shows it."""


@dataclasses.dataclass(frozen=True)
class Linear:
    """A multiplication with a parameter, and the bias added to it."""

    out: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    transposed: bool
    """True where the parameter is stored [in, out]."""

    @property
    def inputs(self) -> int:
        return shape(self.weight)[0 if self.transposed else 1]

    @property
    def outputs(self) -> int:
        return shape(self.weight)[1 if self.transposed else 0]


@dataclasses.dataclass(frozen=True)
class Path:
    """From one linear's output to the queries, keys or values."""

    linear: Linear
    target: fx.Node
    nodes: tuple[fx.Node, ...]
    parameters: tuple[fx.Node, ...]
    buffers: tuple[fx.Node, ...]


@dataclasses.dataclass(frozen=True)
class OutPath:
    """From an attention's output to the linear that reads it."""

    linear: Linear
    nodes: tuple[fx.Node, ...]
    gates: tuple[fx.Node, ...]
    """What multiplies the head outputs on the way."""
    others: tuple[fx.Node, ...]
    """`gates`, and tensors that lend their shape only."""


@dataclasses.dataclass(frozen=True)
class Paths:
    """The paths through the graph that belong to one attention."""

    q: Path
    k: Path
    v: Path
    o: OutPath
    gate: Path | None = None


def find_attentions(graph: Graph) -> list[Found]:
    """Every softmax attention, in order of execution.

    Raises:
        UnsupportedModel: there is none, or a module holds several.
    """
    found = [f for node in graph.nodes if (f := _match(graph, node)) is not None]
    seen: set[str] = set()
    for f in found:
        if f.module in seen:
            raise UnsupportedModel(
                f"module {f.module}: computes more than one softmax attention; layers with one can be rewritten."
            )
        seen.add(f.module)
    return found


def _match(graph: Graph, node: fx.Node) -> Found | None:
    if node.target is ATTENTION:
        q, k, v, mask, sinks, tag = node.args
        call = graph.calls[tag]  # type: ignore[index]
        return Found(module_name(node), q, k, v, node, True, call=call, mask=mask, sinks=sinks)  # type: ignore[arg-type]
    if is_call(node, "scaled_dot_product_attention"):
        args: dict[str, Any] = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), node.args,
                                        strict=False))  # fmt: skip
        args |= node.kwargs
        q = args["query"]
        scale = args.get("scale") or shape(q)[-1] ** -0.5
        call = Call(graph.twin, scale, None, None, bool(args.get("is_causal", False)), ())
        return Found(module_name(node), q, args["key"], args["value"], node, False, call=call,
                     mask=args.get("attn_mask"))  # fmt: skip
    if is_call(node, "softmax", "_softmax"):
        return _match_softmax(graph, node)
    return None


def _match_softmax(graph: Graph, softmax: fx.Node) -> Found | None:
    """softmax(f(q k^T)) v, written out by the model."""
    products = _nearest(softmax, forward=False)
    readers = _nearest(softmax, forward=True)
    if len(products) != 1 or len(readers) != 1:
        return None
    product, reader = products[0], readers[0]
    q, k = product.args[-2:]
    left, v = reader.args[-2:]
    flows = {softmax}
    for node in graph.between([left], [softmax]):  # type: ignore[list-item]
        if flows & set(node.all_input_nodes):
            flows.add(node)
    if not all(isinstance(n, fx.Node) for n in (q, k, v)) or left not in flows:
        return None
    if shape(q)[-2] != graph.tokens or shape(k)[-1] != graph.tokens or shape(v)[-2] != graph.tokens:  # type: ignore[arg-type]
        return None
    return Found(module_name(product), q, k, v, reader, False, k_transposed=True,  # type: ignore[arg-type]
                 scores=softmax.args[0])  # type: ignore[arg-type]  # fmt: skip


def _nearest(start: fx.Node, forward: bool) -> list[fx.Node]:
    """Products of two activations that are reached from `start` without crossing another product."""
    pending, seen, found = [start], {start}, []
    while pending:
        node = pending.pop()
        if node is not start:
            if is_call(node, "matmul", "bmm", "baddbmm"):
                found.append(node)
                continue
            if is_call(node, "linear", "addmm", "mm", "embedding", "layer_norm", "softmax", "topk"):
                continue
        for n in node.users if forward else node.all_input_nodes:
            if n not in seen:
                seen.add(n)
                pending.append(n)
    return found


def _parameter(graph: Graph, node: Any) -> tuple[fx.Node, bool] | None:
    """The parameter behind casts and transposes, and whether it is transposed on the way."""
    flipped = False
    while isinstance(node, fx.Node) and node.op == "call_function":
        if is_call(node, "t", "numpy_T", "transpose", "permute", "mT"):
            flipped = not flipped
        elif not is_call(node, "to", "alias", "detach", "_to_copy", "contiguous", "view", "reshape") or (
            len(shape(node)) != len(shape(node.args[0]))  # type: ignore[arg-type]
        ):
            return None
        node = node.args[0]
    if isinstance(node, fx.Node) and node in graph.sources and graph.sources[node].kind == "parameter":
        return node, flipped
    return None


def as_linear(graph: Graph, node: fx.Node) -> Linear | None:
    """Read a node as x W^T + b with a parameter W of two dimensions, in whichever spelling."""
    bias = None
    if is_call(node, "linear"):
        x, weight = node.args[:2]
        bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
        stored_in_out = False
    elif is_call(node, "addmm"):
        bias, x, weight = node.args[:3]
        stored_in_out = True
    elif is_call(node, "mm", "matmul"):
        x, weight = node.args[:2]
        stored_in_out = True
    elif is_call(node, "add", "add_"):
        return _biased(graph, node)
    else:
        return None
    w = _parameter(graph, weight)
    if w is None or len(shape(w[0])) != 2 or not isinstance(x, fx.Node):
        return None
    b = _parameter(graph, bias) if bias is not None else None
    if bias is not None and b is None:
        return None
    return Linear(node, x, w[0], b[0] if b else None, stored_in_out != w[1])


def _biased(graph: Graph, node: fx.Node) -> Linear | None:
    """A product followed by its bias (Falcon)."""
    for product, other in (node.args[:2], node.args[1::-1]):
        b = _parameter(graph, other)
        if isinstance(product, fx.Node) and b is not None and is_call(product, "mm", "matmul"):
            linear = as_linear(graph, product)
            if linear is not None and shape(b[0]) == (linear.outputs,) and len(product.users) == 1:
                return dataclasses.replace(linear, out=node, bias=b[0])
    return None


def path_to(graph: Graph, found: Found, role: str) -> Path:
    """Walk back from q, k or v to the one linear that makes it.

    Raises:
        UnsupportedModel: the walk meets several linears, or reaches the model's input past them.
    """
    return _path(graph, found, getattr(found, role), _ROLES[role])


def gate_path(graph: Graph, found: Found, out: OutPath) -> Path | None:
    """From the one linear that makes the gate of the head outputs to that gate; None where there is no such linear."""
    if len(out.gates) != 1:
        return None
    try:
        return _path(graph, found, out.gates[0], "output gate")
    except UnsupportedModel:
        return None


def _path(graph: Graph, found: Found, target: fx.Node, what: str) -> Path:
    pending, seen = [target], {target}
    linears: dict[fx.Node, Linear] = {}
    parameters: list[fx.Node] = []
    buffers: list[fx.Node] = []
    while pending:
        node = pending.pop()
        if (linear := as_linear(graph, node)) is not None:
            linears[node] = linear
            continue
        if node.op == "placeholder":
            source = graph.sources[node]
            if source.kind == "parameter":
                parameters.append(node)
            elif source.kind == "input" and node not in graph.values:
                raise UnsupportedModel(
                    f"module {found.module}: its {what} do not come from a linear projection alone; "
                    f"the walk back reached {source.name!r}."
                )
            else:
                buffers.append(node)
            continue
        if node.target in (ATTENTION, STUB):
            raise UnsupportedModel(
                f"module {found.module}: its {what} depend on node {node.name!r} of {module_name(node)!r}, "
                "which is not a projection of this layer's input."
            )
        for n in node.all_input_nodes:
            if n not in seen:
                seen.add(n)
                pending.append(n)
    if len(linears) != 1:
        names = sorted(graph.sources[x.weight].name for x in linears.values())
        found_to = (
            "come from no linear projection" if not names else f"are put together from several ({', '.join(names)})"
        )
        hint = " Latent attention (MLA) is compressed already." if len(names) > 1 else ""
        raise UnsupportedModel(f"module {found.module}: its {what} {found_to}; one is needed.{hint}")
    (linear,) = linears.values()
    nodes = graph.between([target], [linear.out])
    parameters.sort(key=graph.order.__getitem__)
    return Path(linear, target, tuple(nodes), tuple(parameters), tuple(buffers))


_ROLES = {"q": "queries", "k": "keys", "v": "values"}


def origin(node: fx.Node) -> fx.Node:
    """The node behind views and casts: where two linears read the same tensor, their origins are one."""
    while is_call(node, "view", "reshape", "to", "_to_copy", "alias", "contiguous", "clone", "flatten", "squeeze",
                  "unsqueeze", "detach", "dropout"):  # fmt: skip
        node = node.args[0]  # type: ignore[assignment]
    return node


def path_from(graph: Graph, found: Found) -> OutPath:
    """Walk on from the attention's output to the linear that reads it.

    Raises:
        UnsupportedModel: no linear reads it, several do, or something other than a gate joins on the way.
    """
    reached = {found.out}
    linears: list[Linear] = []
    for node in graph.nodes[graph.order[found.out] + 1 :]:
        if not reached & set(node.all_input_nodes):
            continue
        linear = as_linear(graph, node)
        if linear is not None and linear.x in reached:
            if not any(linear.weight is x.weight for x in linears):
                linears.append(linear)
        else:
            reached.add(node)
        if node.op == "output" or len(linears) > 1:
            break
        # After the projection come the residual stream and the next layers; nothing there is reached without it.
        if linears and all(graph.order[u] <= graph.order[node] for n in reached for u in n.users):
            break
    if len(linears) != 1:
        names = [graph.sources[x.weight].name for x in linears]
        what = f"is read by {', '.join(names)}" if names else "is read by no linear projection"
        raise UnsupportedModel(f"module {found.module}: its output {what}; one output projection is needed.")
    linear = linears[0]
    # FalconLinear and its like: the bias is added by the next node.
    for user in linear.out.users:
        if linear.bias is None and (biased := as_linear(graph, user)) is not None and biased.weight is linear.weight:
            linear = biased
    nodes = graph.between([linear.x], [found.out])
    gates: list[fx.Node] = []
    others: list[fx.Node] = []
    for node in nodes:
        if node not in reached or node is found.out:
            continue
        for other in node.all_input_nodes:
            if other in reached or not _depends_on_input(graph, other):
                continue
            others.append(other)
            if is_call(node, "view_as", "reshape_as", "expand_as", "type_as"):
                continue
            if not is_call(node, "mul", "mul_"):
                raise UnsupportedModel(
                    f"module {found.module}: node {node.name!r} joins something to the attention's output before "
                    "the output projection; only a multiplying gate is understood."
                )
            gates.append(other)
    nodes = graph.between([linear.x], [found.out, *others])
    for node in nodes:
        if (source := graph.sources.get(node)) is not None and source.kind == "parameter":
            raise UnsupportedModel(
                f"module {found.module}: {source.name} acts between the attention and the output projection; "
                "heads must reach it unchanged."
            )
    return OutPath(linear, tuple(nodes), tuple(gates), tuple(others))


def _depends_on_input(graph: Graph, node: fx.Node) -> bool:
    pending, seen = [node], {node}
    while pending:
        n = pending.pop()
        if as_linear(graph, n) is not None or is_call(n, "embedding") or n.target in (STUB, ATTENTION):
            return True
        for a in n.all_input_nodes:
            if a not in seen:
                seen.add(a)
                pending.append(a)
    return False
