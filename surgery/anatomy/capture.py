"""Capture a decoder as a graph, without weights."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import config as fx_config
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel

from ..checkpoints.classes import model_class
from ..errors import UnsupportedModel
from .equal_layers import find_alike
from .graph import Graph, is_call
from .positions import max_positions
from .recording import ATTENTION, PROBE, RECORDING, Recording, record_attention, record_mask
from .twin import buffer_values, hold_frequencies_still, make_fake, make_twin

_TOKENS, _MANY_TOKENS = 32, 512


def capture(source: PreTrainedModel | PretrainedConfig) -> Graph:
    """Export the decoder's forward without a cache, on tensors that have shapes and no memory.

    Raises:
        UnsupportedModel: the model cannot be built or traced; the message carries the cause.
    """
    AttentionInterface.register(PROBE, cast(Any, record_attention))
    AttentionMaskInterface.register(PROBE, cast(Any, record_mask))
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
        f"{type(first).__name__}: {_first_line(first)}. Only language models that torch.export can trace are read."
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
        recording = Recording()
        token = RECORDING.set(recording)
        try:
            with torch.no_grad(), _quiet(), _buffer_hooks_kept(), mode, _left_out(twin, alike), _plainly(twin):
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
            RECORDING.reset(token)


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
    recording = Recording()

    def describe(operator: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if operator is not ATTENTION:
            return args
        call = recording.calls[args[-1]]
        return (*args[:-1], str(dataclasses.astuple(dataclasses.replace(call, module=cast(Any, None)))))

    token = RECORDING.set(recording)
    try:
        with _quiet():
            return find_alike(twin, lambda: twin(**inputs), values, rope_types, describe)
    finally:
        RECORDING.reset(token)


def _sees_ahead(source: PreTrainedModel | PretrainedConfig) -> bool:
    """Whether masks depend on the types of tokens: then tokens of one kind may see each other, later ones too."""
    kind = type(source) if isinstance(source, PreTrainedModel) else model_class(source)
    names = [name for name in inspect.signature(kind.forward).parameters if name.endswith("token_type_ids")]
    if not names:
        return False
    twin = make_twin(source, PROBE)
    ids = torch.ones(1, 4, dtype=torch.long, device="meta")
    recording = Recording()
    token = RECORDING.set(recording)
    try:
        with _quiet(), torch.no_grad():
            twin(input_ids=ids, attention_mask=ids, **dict.fromkeys(names, ids))
    except Exception:  # a stranger's code that reads values, of which there are none: masks come before that
        pass
    finally:
        RECORDING.reset(token)
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


class _SilentGrad(TorchFunctionMode):
    """Keeps changes of the gradient mode out of a trace in which there are no gradients."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._C._set_grad_enabled:
            with torch._C.DisableTorchFunction():
                return func(*args)
        return func(*args, **(kwargs or {}))


@contextmanager
def _plainly(twin: nn.Module) -> Iterator[None]:
    """Spare torch.export what nothing here reads: Python's stack at each node, and pieces for each gradient mode.

    Together they took a quarter of an export.
    """
    traces = "do_not_emit_stack_traces"
    before = getattr(fx_config, traces, None)
    forward = twin.forward

    @functools.wraps(forward)
    def silent(*args: Any, **kwargs: Any) -> Any:
        with _SilentGrad():  # above the mode by which torch.export writes those changes down
            return forward(*args, **kwargs)

    try:
        cast(Any, twin).forward = silent
        if before is not None:
            setattr(fx_config, traces, True)
        yield
    finally:
        del twin.forward
        if before is not None:
            setattr(fx_config, traces, before)


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
        # A try that fails also has its graph printed, hundreds of lines, to standard error.
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in before:
            logger.setLevel(level)
