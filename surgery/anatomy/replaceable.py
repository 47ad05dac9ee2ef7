"""Whether an attention module can be taken out as a whole, so that one of another class stands in its place."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn
from transformers import PretrainedConfig, PreTrainedModel

from ..runtime.attention import SurgeryAttention
from ..runtime.layout import AttentionSite
from .graph import Graph, module_name
from .twin import make_twin

_ALIKE = {"config", "layer_idx", "is_causal", "head_dim", "scaling", "sliding_window", "num_key_value_groups"}
"""What a `SurgeryAttention` has of its own under the names that transformers uses."""


def irreplaceable(
    graph: Graph, sites: Sequence[AttentionSite], source: PreTrainedModel | PretrainedConfig
) -> dict[int, str]:
    """Layers whose attention no module of ours can replace, and why.

    Every parameter of the module must be one that its description names, and nobody outside may use a part of it. The
    module itself, left in its place and given fewer heads, asks for none of that.
    """
    config = source.config if isinstance(source, PreTrainedModel) else source
    own = type(graph.twin).config_class
    if own is not None and not isinstance(config, own):
        shared = f"transformers registers a class for one config, and its own is made for {own.__name__}"
        return dict.fromkeys((site.layer for site in sites), shared)
    read = _attributes_read(source, sites)
    return {site.layer: reason for site in sites if (reason := _reason(graph, site, read.get(site.module)))}


def _reason(graph: Graph, site: AttentionSite, attribute: str | None) -> str | None:
    inside = site.module + "."
    own = {name for name, _ in graph.twin.named_parameters(remove_duplicate=False) if name.startswith(inside)}
    if site.gated_output and site.gate is None:
        return "its head outputs are gated in a way that no description holds"
    if site.layer < 0:
        return "it has no layer of the cache of its own: its caller says which it writes"
    if elsewhere := sorted(site.parameters - own):
        return f"it does not apply {elsewhere[0]} itself"
    if unknown := sorted(own - site.parameters):
        return f"its parameter {unknown[0]} has no place in the attention that would replace it"
    if site.alibi_slopes is not None and site.window is not None:
        return "it has ALiBi and a window, and the positions in a sliding cache are not known"
    # Layers that compute what an earlier one does are not in the graph.
    first = next((f for name, f in graph.alike.items() if inside.startswith(name + ".")), None)
    name = next((n for n in graph.alike if inside.startswith(n + ".")), "")
    module = site.module if first is None else first + site.module.removeprefix(name)
    if part := _used_outside(graph, module):
        return f"{part[0]}, a part of it, is used by {part[1]}"
    return None if attribute is None else f"its attribute {attribute!r} is read from outside of it"


def _used_outside(graph: Graph, module: str) -> tuple[str, str] | None:
    """A tensor or child of `module` that runs or is read while `module` does not, and the module where that happens."""
    for node in graph.nodes:
        source = graph.sources.get(node)
        if source is not None and source.kind in ("parameter", "buffer") and source.name.startswith(module + "."):
            for user in node.users:
                if user.op == "call_function" and module not in _stack(user):
                    return source.name, module_name(user) or "the model"
        inner = next((path for path in _stack(node) if path.startswith(module + ".")), None)
        if inner is not None and module not in _stack(node):
            return inner, module.rpartition(".")[0]
    return None


def _stack(node: fx.Node) -> list[str]:
    """Qualified names of the modules that a node was traced in."""
    return [str(path) for path, _ in (node.meta.get("nn_module_stack") or {}).values()]


def _attributes_read(source: PreTrainedModel | PretrainedConfig, sites: Sequence[AttentionSite]) -> dict[str, str]:
    """By module: an attribute that others read while it does not run, and that one of ours would not have."""
    twin = make_twin(source, "eager")
    found: dict[str, str] = {}
    running: set[int] = set()
    known = {*dir(SurgeryAttention), *vars(nn.Module()), *_ALIKE}
    names = {id(twin.get_submodule(site.module)): site.module for site in sites}

    def watch(kind: type[nn.Module]) -> type[nn.Module]:
        def look(self: Any, name: str) -> Any:
            reader = sys._getframe(1)
            # torch itself asks modules for their hooks and tables all the time.
            if id(self) not in running and name not in known and not reader.f_code.co_filename.startswith(_TORCH):
                found.setdefault(names[id(self)], name)
            return kind.__getattribute__(self, name)

        return type(kind.__name__, (kind,), {"__getattribute__": look, "__module__": kind.__module__})

    kinds: dict[type[nn.Module], type[nn.Module]] = {}
    for site in sites:
        module: Any = twin.get_submodule(site.module)
        module.register_forward_pre_hook(lambda m, _: running.add(id(m)))
        module.register_forward_hook(lambda m, *_: running.discard(id(m)))
        kind = type(module)
        module.__class__ = kinds.setdefault(kind, kinds.get(kind) or watch(kind))
    # Without values, a stranger's code may raise whatever it likes: what was read until then counts. One token asks for
    # no mask, and with a cache nobody looks for packed sequences: both would be made of values.
    with contextlib.suppress(Exception), torch.no_grad():
        twin(input_ids=torch.zeros(1, 1, dtype=torch.long, device="meta"), use_cache=True)
    return found


_TORCH = torch.__path__[0]
