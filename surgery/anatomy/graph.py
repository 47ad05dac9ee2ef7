"""Capture a decoder as a graph without weights, and run pieces of that graph on real numbers."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import logging
import operator
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PretrainedConfig,
    PreTrainedModel,
)

from ..checkpoints.classes import model_class, plain_config
from ..errors import UnsupportedModel
from .equal_layers import find_alike
from .positions import max_positions

_TOKENS, _MANY_TOKENS = 32, 512

PROBE = "surgery_anatomy"
"""Name under which the recording attention is registered with transformers."""


@torch.library.custom_op("surgery_anatomy::attention", mutates_args=())
def _attention_op(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None, tag: int
) -> Tensor:  # pragma: no cover - the op stands in a graph and is never run
    raise NotImplementedError


@_attention_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None, tag: int) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[-1])


@torch.library.custom_op("surgery_anatomy::mask", mutates_args=())
def _mask_op(like: Tensor, tag: int, batch: int, queries: int, keys: int) -> Tensor:  # pragma: no cover
    raise NotImplementedError


@_mask_op.register_fake
def _(like: Tensor, tag: int, batch: int, queries: int, keys: int) -> Tensor:
    return like.new_empty(batch, 1, queries, keys, dtype=torch.bool)


@torch.library.custom_op("surgery_anatomy::stub", mutates_args=())
def _stub_op(x: Tensor) -> Tensor:  # pragma: no cover
    raise NotImplementedError


@_stub_op.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


ATTENTION = torch.ops.surgery_anatomy.attention.default
MASK = torch.ops.surgery_anatomy.mask.default
STUB = torch.ops.surgery_anatomy.stub.default


@dataclasses.dataclass
class Call:
    """Arguments of one recorded attention call that are not tensors, and names of tensors that we do not know."""

    module: nn.Module
    scale: float
    softcap: float | None
    window: int | None
    causal: bool
    unknown: tuple[str, ...]


@dataclasses.dataclass
class _Recording:
    calls: list[Call] = dataclasses.field(default_factory=list)
    masks: list[Callable[..., Any]] = dataclasses.field(default_factory=list)


_recording: ContextVar[_Recording] = ContextVar("surgery_anatomy_recording")


def _record_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    record = _recording.get()
    # Integer tensors (position ids, cumulative lengths) do not enter the scores; a floating one would.
    unknown = tuple(n for n, x in others.items() if isinstance(x, Tensor) and x.is_floating_point())
    if is_causal is None:
        is_causal = bool(getattr(module, "is_causal", True))
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    record.calls.append(Call(module, scale, softcap, sliding_window, is_causal, unknown))
    out = torch.ops.surgery_anatomy.attention(query, key, value, attention_mask, s_aux, len(record.calls) - 1)
    return out, None


def _record_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    device: Any = "cpu",
    **others: Any,
) -> Tensor:
    record = _recording.get()
    assert mask_function is not None
    record.masks.append(mask_function)
    like = torch.empty(0, device=device) if attention_mask is None else attention_mask
    return torch.ops.surgery_anatomy.mask(like, len(record.masks) - 1, batch_size, int(q_length), int(kv_length))


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
        recording: _Recording,
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
        """A function of the values of `bound` (tensors, in order; then a dict by node) that gives `targets`."""
        nodes = self.between(targets, bound)
        written = {root for _, root in self._writes}

        def own(node: fx.Node, x: Tensor) -> Tensor:
            return x.clone() if node in written else x

        def run(*given: Tensor, more: Mapping[fx.Node, Tensor] | None = None) -> list[Tensor]:
            env: dict[fx.Node, Any] = {n: own(n, x) for n, x in zip(bound, given, strict=True)}
            env.update({n: own(n, x) for n, x in (more or {}).items()})
            with torch.no_grad():
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


def make_twin(source: PreTrainedModel | PretrainedConfig, implementation: str) -> PreTrainedModel:
    """A copy of the architecture on the meta device, in float32, with the named attention implementation."""
    config = plain_config(source.config if isinstance(source, PreTrainedModel) else source)
    for part in (config, config.get_text_config()):
        part.use_cache = False
    arguments = {"attn_implementation": implementation, "dtype": torch.float32}
    kind = type(source) if isinstance(source, PreTrainedModel) else model_class(config)
    with torch.device("meta"):
        return kind._from_config(config, **arguments).eval()


def buffer_values(twin: PreTrainedModel, model: PreTrainedModel | None) -> dict[str, Tensor]:
    """Real values of the buffers: the user's own where there are any, else what the model's own init computes."""
    values = {n: b.detach().cpu() for n, b in model.named_buffers() if not b.is_meta} if model is not None else {}
    for prefix, module in twin.named_modules():
        own = dict(module.named_buffers(recurse=False))
        names = {name: f"{prefix}.{name}" if prefix else name for name in own}
        if not own or all(full in values for full in names.values()):
            continue
        for name, buffer in own.items():
            fill = float("nan") if buffer.is_floating_point() else 0
            module._buffers[name] = torch.full(buffer.shape, fill, dtype=buffer.dtype, device="cpu")
        with torch.no_grad():
            twin._init_weights(module)
        for name, buffer in own.items():
            filled = module._buffers[name]
            if isinstance(filled, Tensor) and not filled.isnan().any():
                values.setdefault(names[name], filled.detach().clone())
            module._buffers[name] = buffer
    return values


def hold_frequencies_still(twin: PreTrainedModel) -> dict[str, Any]:
    """Keep rotary modules whose frequencies depend on the length at their first ones: a graph cannot hold the branch.

    Returns:
        What each rotary module's `rope_type` was, by module name.
    """
    kinds = {}
    for name, module in twin.named_modules():
        kind = getattr(module, "rope_type", None)
        if kind is None:
            continue
        kinds[name] = kind
        if isinstance(kind, dict):
            cast(Any, module).rope_type = {n: "default" if length_dependent(k) else k for n, k in kind.items()}
        elif length_dependent(kind):
            cast(Any, module).rope_type = "default"
    return kinds


def length_dependent(rope_type: Any) -> bool:
    """Whether rotary modules of this type change their frequencies in long sequences."""
    return isinstance(rope_type, str) and ("dynamic" in rope_type or rope_type == "longrope")


def make_fake(twin: nn.Module, mode: FakeTensorMode) -> None:
    """Turn a meta model into one of CPU tensors without memory, so that constants of the trace keep their values."""
    made: dict[int, Tensor] = {}

    def fake(x: Tensor) -> Tensor:
        if id(x) not in made:
            with mode:
                empty = torch.empty(x.shape, dtype=x.dtype, device="cpu")
            made[id(x)] = nn.Parameter(empty, requires_grad=False) if isinstance(x, nn.Parameter) else empty
        return made[id(x)]

    originals = []  # keeps them alive: ids stay unique
    for module in twin.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, vars(module))
        for table in tables:
            for name, x in list(table.items()):
                if isinstance(x, Tensor):
                    originals.append(x)
                    table[name] = fake(x)


def capture(source: PreTrainedModel | PretrainedConfig) -> Graph:
    """Export the decoder's forward without a cache, on tensors that have shapes and no memory.

    Raises:
        UnsupportedModel: the model cannot be built or traced; the message carries the cause.
    """
    AttentionInterface.register(PROBE, cast(Any, _record_attention))
    AttentionMaskInterface.register(PROBE, cast(Any, _record_mask))
    first: Exception | None = None
    # sdpa goes before eager, because it is what users run: Falcon's eager form adds ALiBi twice.
    for implementation in (PROBE, "sdpa", "eager"):
        try:
            graph = _capture(source, implementation, _TOKENS)
        except UnsupportedModel:
            raise
        except Exception as error:  # whatever a stranger's modelling code may raise
            first = first or error
            continue
        if not any(is_call(n, "attention", "scaled_dot_product_attention", "softmax", "_softmax") for n in graph.nodes):
            return graph
        wanted = {PROBE: ("attention",), "sdpa": ("scaled_dot_product_attention",)}.get(implementation)
        if wanted is not None and not any(is_call(n, *wanted) for n in graph.nodes):
            continue
        if implementation != PROBE:
            # A window in a model's own code shows in its mask only, and only where there are tokens beyond it.
            with contextlib.suppress(Exception):  # some accept fewer tokens; the window is then read within those
                graph.wide = _capture(source, implementation, _MANY_TOKENS)
        else:
            graph.sees_ahead = _sees_ahead(source)
        return graph
    config = source.config if isinstance(source, PreTrainedModel) else source
    raise UnsupportedModel(
        f"{type(source).__name__} ({config.model_type}): cannot capture its graph with torch.export: "
        f"{type(first).__name__}: {_first_line(first)}"
    ) from first


def _first_line(error: BaseException | None) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no message"


def _capture(source: PreTrainedModel | PretrainedConfig, implementation: str, most: int) -> Graph:
    twin = make_twin(source, implementation)
    values = buffer_values(twin, source if isinstance(source, PreTrainedModel) else None)
    rope_types = hold_frequencies_still(twin)
    limit = max_positions(twin.config)
    tokens = min(most, limit) if limit is not None and limit > 1 else most
    accepted = inspect.signature(twin.forward).parameters
    alike = _find_alike(twin, accepted, tokens, values, rope_types) if implementation == PROBE else {}
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    make_fake(twin, mode)
    with mode:
        ones = torch.ones(1, tokens, dtype=torch.long)
        inputs: dict[str, Any] = {"input_ids": torch.zeros(1, tokens, dtype=torch.long)}
        if "position_ids" in accepted:
            inputs["position_ids"] = torch.arange(tokens)[None]
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    if "attention_mask" in accepted:
        inputs["attention_mask"] = ones
    stubs: set[type] = set()
    while True:
        recording = _Recording()
        token = _recording.set(recording)
        try:
            with torch.no_grad(), _quiet(), _buffer_hooks_kept(), mode, _left_out(twin, alike):
                program = torch.export.export(twin, (), inputs, strict=False)
            graph = Graph(program, twin, values, recording, tokens, rope_types)
            graph.alike = {name: first for name, (first, _) in alike.items()}
            return graph
        except Exception as error:
            kind = _stubbable(error, twin, {id(c.module) for c in recording.calls}, stubs)
            if kind is None or len(stubs) >= 4:
                raise
            stubs.add(kind)
            for module in twin.modules():
                if type(module) is kind:
                    cast(Any, module).forward = _stub
        finally:
            _recording.reset(token)


_Alike = Mapping[str, tuple[str, Callable[[Tensor], Any]]]


def _find_alike(
    twin: PreTrainedModel,
    accepted: Mapping[str, Any],
    tokens: int,
    values: Mapping[str, Tensor],
    rope_types: Mapping[str, Any],
) -> _Alike:
    """Layers of a model on the meta device that compute what an earlier one does."""
    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    inputs = {"input_ids": ids, "attention_mask": ids, "position_ids": ids, "use_cache": False}
    inputs = {name: x for name, x in inputs.items() if name in accepted}
    recording = _Recording()

    def describe(operator: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if operator is not ATTENTION:
            return args
        call = recording.calls[args[-1]]
        return (*args[:-1], str(dataclasses.astuple(dataclasses.replace(call, module=cast(Any, None)))))

    token = _recording.set(recording)
    try:
        with _quiet():
            return find_alike(twin, lambda: twin(**inputs), values, rope_types, describe)
    finally:
        _recording.reset(token)


def _sees_ahead(source: PreTrainedModel | PretrainedConfig) -> bool:
    """Whether masks depend on the types of tokens: then tokens of one kind may see each other, later ones too."""
    kind = type(source) if isinstance(source, PreTrainedModel) else model_class(source)
    names = [name for name in inspect.signature(kind.forward).parameters if name.endswith("token_type_ids")]
    if not names:
        return False
    twin = make_twin(source, PROBE)
    ids = torch.ones(1, 4, dtype=torch.long, device="meta")
    recording = _Recording()
    token = _recording.set(recording)
    try:
        with _quiet(), torch.no_grad():
            twin(input_ids=ids, attention_mask=ids, **dict.fromkeys(names, ids))
    except Exception:  # a stranger's code that reads values, of which there are none: masks come before that
        pass
    finally:
        _recording.reset(token)
    here, last = torch.tensor(0), torch.tensor(3)
    for function in recording.masks:
        try:
            seen = function(here, here, here, last)
        except Exception:  # numbers without values are asked for
            return True
        if not isinstance(seen, Tensor) or seen.is_meta or bool(seen):
            return True
    return False


class _Answer(nn.Module):
    """Stands for a layer while the model is captured: answers in its form, and has its attributes but no parameters."""

    def __init__(self, layer: nn.Module, rebuild: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.__dict__["_layer"], self.__dict__["_rebuild"] = layer, rebuild

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_layer"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["_rebuild"](_stub(*args, **kwargs))


@contextmanager
def _left_out(twin: nn.Module, alike: _Alike) -> Iterator[None]:
    """Replace layers that compute what an earlier one does: tracing 80 equal layers takes most of the time."""
    layers = {name: twin.get_submodule(name) for name in alike}
    try:
        for name, layer in layers.items():
            twin.set_submodule(name, _Answer(layer, alike[name][1]))
        yield
    finally:
        for name, layer in layers.items():
            twin.set_submodule(name, layer)


def _stub(*args: Any, **kwargs: Any) -> Tensor:
    x = next(a for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
    return cast(Tensor, torch.ops.surgery_anatomy.stub(x))


def _stubbable(error: BaseException, twin: nn.Module, attentions: set[int], done: set[type]) -> type | None:
    """The class of the innermost module that cannot be traced, where leaving it out leaves the attentions whole.

    Mixtures of experts may branch on data, which no graph can hold and no attention needs. The stub stays visible in
    the graph, so that a walk which does need the module refuses.
    """
    inside: list[nn.Module] = []
    known = {id(m) for m in twin.modules()}
    cause: BaseException | None = error
    while cause is not None and not inside:
        trace = cause.__traceback__
        while trace is not None:
            owner = trace.tb_frame.f_locals.get("self")
            if isinstance(owner, nn.Module) and id(owner) in known:
                inside.append(owner)
            trace = trace.tb_next
        cause = cause.__cause__ or cause.__context__
    for module in reversed(inside):
        if type(module) in done or not type(module).__module__.startswith(("transformers", "transformers_modules")):
            continue
        holds_attention = any(id(m) in attentions for m in module.modules())
        return None if holds_attention or not attentions else type(module)
    return None


@contextmanager
def _buffer_hooks_kept() -> Iterator[None]:
    """Take away what an export that fails leaves behind in torch 2.11: a hook on the buffers of all modules there are.

    Later compilation of any module that assigns a buffer would end in an error about it.
    """
    hooks = nn.modules.module._global_buffer_registration_hooks
    before = set(hooks)
    try:
        yield
    finally:
        for key in set(hooks) - before:
            del hooks[key]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch.export's own reports of a failed trace off the user's screen: our error carries the cause."""
    loggers = [logging.getLogger(n) for n in ("torch.fx", "torch._export", "torch._dynamo", "torch.export", "torch")]
    before = [(logger, logger.level) for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in before:
            logger.setLevel(level)


def subpaths(name: str) -> types.SimpleNamespace:
    """Split `model.layers.3.self_attn` into container, index and rest at the first number."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return types.SimpleNamespace(container=".".join(parts[:i]), index=int(part), rest=".".join(parts[i + 1 :]))
    return types.SimpleNamespace(container="", index=None, rest=name)
