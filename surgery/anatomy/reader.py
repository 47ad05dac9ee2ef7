"""The main path: graph -> attentions -> paths -> readings -> descriptions, each proved before it is returned."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Any

import torch
from torch import fx
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from ..checkpoints.adapters import base_folder
from ..checkpoints.classes import plain_config
from ..checkpoints.files import read_json
from ..checkpoints.parents import changed, check_modules, plain_form
from ..checkpoints.places import local_folder
from ..errors import CheckpointError, UnsupportedModel
from ..runtime.layout import AttentionSite, Projection
from ..torch_state import plain_torch
from .cache_step import prove_cache_step
from .capture import capture
from .equal_layers import digest
from .graph import Graph, shape, subpaths
from .known import read_once
from .model import Anatomy, OtherLayer
from .output_gate import read_gate
from .positions import max_positions
from .probe import read_out
from .probe_path import read_path
from .probe_rotary import read_axes
from .probe_scores import read_scores
from .proof import prove, prove_scores
from .replaceable import irreplaceable
from .twin import make_twin
from .walk import Found, OutPath, Path, Paths, find_attentions, gate_path, origin, path_from, path_to

_SCOPE = "This library rewrites decoders with softmax attention."


@plain_torch()
def examine(source: PreTrainedModel | PretrainedConfig | str | FilePath) -> Anatomy:
    """Read where a decoder's attention layers have their weights, and how they work, from its graph.

    No weight is loaded, and a model that is passed is left as it is. Each description is proved: queries, keys,
    values, scores and outputs computed from it alone equal the graph's, on random weights, to 1e-5; and each attention
    is seen to get the model's cache, and its layer of it to hold both of two tokens that were given one by one.

    Args:
        source: a model (compiled, or under wrappers of torch, too), a config, or the path of a config.json, of a
            directory that has one, or of a GGUF.

    Raises:
        UnsupportedModel: the decoder has no softmax attention, or one that cannot be described, or was changed
            (quantised, adapted); the message names the module and what was found there.

    Examples:
        >>> import surgery
        >>> from transformers import Qwen3Config
        >>> anatomy = surgery.examine(Qwen3Config(num_hidden_layers=2))
        >>> anatomy.architecture, anatomy.sites[0].rotary is not None, anatomy.sites[0].q_norm is not None
        ('Qwen3ForCausalLM', True, True)
    """
    target: PreTrainedModel | PretrainedConfig
    if isinstance(source, str | FilePath):
        folder = base_folder(local_folder(source, weights=False), weights=False)
        file = folder / "config.json"
        if file.is_file() and "layers" in (read_json(file).get("surgery") or {}):
            raise UnsupportedModel(
                f"{folder}: was converted by surgery already. Convert its parent, with all steps in one recipe; load "
                "the converted model by surgery.load."
            )
        target = load_config(folder)
    else:
        target = source if isinstance(source, PretrainedConfig) else plain_form(source)
    config = target.config if isinstance(target, PreTrainedModel) else target
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel(f"{config.model_type}: it is an encoder-decoder; only decoders can be read.")
    twin = _twin(target)
    if twin is not None and isinstance(target, PreTrainedModel):
        _check_twin(twin, target)
    anatomy = read_once(twin, target, lambda: _read(target, config))
    dtype = target.dtype if isinstance(target, PreTrainedModel) else getattr(config, "dtype", None) or torch.float32
    return dataclasses.replace(
        anatomy, dtype=str(dtype).removeprefix("torch."), config=config, irreplaceable=dict(anatomy.irreplaceable)
    )


def _read(target: PreTrainedModel | PretrainedConfig, config: PretrainedConfig) -> Anatomy:
    """Read and prove the description of a model, whose weights may have any dtype."""
    graph = capture(target)
    found = find_attentions(graph)
    if not found:
        raise UnsupportedModel(
            f"{type(graph.twin).__name__} ({config.model_type}): its graph has no softmax attention over q k^T, so "
            f"there is no KV cache to reduce. {_SCOPE}"
        )
    sites = _read_sites(graph, found)
    prove_cache_step(target, sites)
    num_layers, others = _other_layers(graph, sites)
    return Anatomy(
        architecture=type(graph.twin).__name__,
        model_type=config.model_type,
        num_layers=num_layers,
        sites=sites,
        other_layers=others,
        parameters=sum(p.numel() for p in graph.twin.parameters()),
        dtype="",
        max_positions=max_positions(config),
        vocab_size=int(config.get_text_config().vocab_size),
        config=config,
        kind=type(graph.twin),
        irreplaceable=irreplaceable(graph, sites, target),
    )


def load_config(path: str | FilePath) -> PretrainedConfig:
    """The config in a folder, or a config.json itself, without its section on quantisation: weights are read plain.

    Raises:
        CheckpointError: there is none.
        UnsupportedModel: transformers cannot read it.
    """
    path = FilePath(path)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(f"{path}: has no config.json. Give a model folder, or that file.")
    fields = read_json(file)
    quantised = fields.get("quantization_config") or {}
    if quantised.get("quantization_mode") == "online":
        raise UnsupportedModel(
            f"{file}: its weights are quantised ({quantised.get('quant_method')}) whenever the model runs, which a "
            "converted model would not do. Pass a checkpoint whose weights are not quantised."
        )
    try:
        config = AutoConfig.from_pretrained(file, trust_remote_code=False)
    except (ValueError, KeyError, OSError, json.JSONDecodeError) as error:
        if "auto_map" in fields:
            raise UnsupportedModel(
                f"{file}: its model type {fields.get('model_type')} is code beside the weights, which is not run from "
                "here. Load the model with transformers and trust_remote_code=True, and pass it to surgery.convert."
            ) from error
        raise UnsupportedModel(f"{file}: transformers cannot read this config: {error}") from error
    return plain_config(config)


def _twin(source: PreTrainedModel | PretrainedConfig) -> PreTrainedModel | None:
    """The model without weights; None where it cannot be built: the capture says why."""
    try:
        return make_twin(source, "eager")
    except Exception:  # whatever a stranger's modelling code may raise
        return None


def _check_twin(twin: PreTrainedModel, model: PreTrainedModel) -> None:
    # Every name, tied or not: files may hold apart what the config ties, and users tie what it does not.
    ours, theirs = ({n: tuple(p.shape) for n, p in m.named_parameters(remove_duplicate=False)} for m in (twin, model))
    if ours != theirs:
        name = min(n for n in {*ours, *theirs} if ours.get(n) != theirs.get(n))
        raise UnsupportedModel(
            f"parameter {name}: shape {theirs.get(name)} in the model, {ours.get(name)} by its config. {changed(model)}"
        )
    check_modules(twin, model)


def _read_sites(graph: Graph, found: list[Found]) -> tuple[AttentionSite, ...]:
    """Describe every attention; those with the same piece of graph share one reading and one proof."""
    known: dict[Any, tuple[AttentionSite, list[fx.Node]]] = {}
    sites: list[AttentionSite] = []
    for number, f in enumerate(found):
        paths = Paths(path_to(graph, f, "q"), path_to(graph, f, "k"), path_to(graph, f, "v"), path_from(graph, f))
        gate = gate_path(graph, f, paths.o)
        if gate is not None and origin(gate.linear.x) is origin(paths.q.linear.x):
            paths = dataclasses.replace(paths, gate=gate)
        key, parameters = _fingerprint(graph, f, paths)
        if key not in known:
            known[key] = (_read_site(graph, f, paths), parameters)
        site, originals = known[key]
        names = {graph.sources[a].name: graph.sources[b].name for a, b in zip(originals, parameters, strict=True)}
        layer = _layer_of(graph, f.module, number)
        sites.append(dataclasses.replace(_rename(site, names), layer=layer, module=f.module))
    sites += _left_out(graph, sites)
    layers = [s.layer for s in sites]
    if len(set(layers)) != len(layers):
        twice = next(s for s in sites if layers.count(s.layer) > 1)
        raise UnsupportedModel(f"module {twice.module}: layer {twice.layer} has more than one attention.")
    return tuple(sorted(sites, key=lambda s: s.layer))


def _fingerprint(graph: Graph, found: Found, paths: Paths) -> tuple[Any, list[fx.Node]]:
    """A key that is equal for attentions of equal structure, and the parameters in the order of the graph."""
    ends = [found.q, found.k, found.v, paths.o.linear.out]
    extra = [n for n in (found.mask, found.sinks, found.scores) if n is not None]
    starts = [paths.q.linear.x, paths.k.linear.x, paths.v.linear.x]
    # A gate that is read from its projection on is a part of the attention, any other comes from outside.
    starts += [n for n in paths.o.others if paths.gate is None or n is not paths.gate.target]
    number: dict[fx.Node, int] = {}
    lines: list[Any] = []
    parameters: list[fx.Node] = []
    for i, node in enumerate(dict.fromkeys(origin(s) for s in starts)):
        number[node] = -1 - i
    for node in graph.between([*ends, *extra], [*number]):
        if node in number:
            continue
        number[node] = len(number)
        source = graph.sources.get(node)
        if source is not None and source.kind == "parameter":
            parameters.append(node)
            lines.append(("parameter", shape(node), subpaths(source.name).rest))
        elif source is not None:
            value = graph.values.get(node)
            lines.append((source.kind, source.name if value is None else digest(value)))
        else:
            arguments: Any = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: ("node", number[n]))
            if node is found.out and found.call is not None:
                arguments = [number.get(n, 0) for n in node.all_input_nodes]
            lines.append((str(node.target), str(arguments)))
    call = found.call and dataclasses.astuple(dataclasses.replace(found.call, module=None))  # type: ignore[arg-type]
    roles = tuple(number[n] for n in (*ends, *extra))
    return (str(lines), str(call), roles), parameters


def _rename(site: AttentionSite, names: Mapping[str, str]) -> AttentionSite:
    def new(x: Any) -> Any:
        if isinstance(x, str):
            return names.get(x, x)
        return tuple(new(n) for n in x) if isinstance(x, tuple) else x

    def inside(part: Any) -> Any:
        return part and dataclasses.replace(part, weight=new(part.weight), bias=new(part.bias))

    parts = {f: inside(getattr(site, f)) for f in ("q", "k", "v", "o", "gate", "q_norm", "k_norm", "v_norm")}
    return dataclasses.replace(site, sinks=new(site.sinks), **parts)


def _left_out(graph: Graph, sites: list[AttentionSite]) -> list[AttentionSite]:
    """The attentions of layers that another one stands for in the graph, with their own names."""
    result: list[AttentionSite] = []
    for name, first in graph.alike.items():
        own = {first + n.removeprefix(name): n for n, _ in graph.twin.named_parameters() if n.startswith(name + ".")}
        for site in sites:
            if site.module.startswith(first + "."):
                module = name + site.module.removeprefix(first)
                layer = _layer_of(graph, module, len(sites) + len(result))
                result.append(dataclasses.replace(_rename(site, own), layer=layer, module=module))
    return result


def _layer_of(graph: Graph, module: str, number: int) -> int:
    index = getattr(graph.twin.get_submodule(module), "layer_idx", None)
    if isinstance(index, int):
        return index
    index = subpaths(module).index
    return number if index is None else index


def _other_layers(graph: Graph, sites: tuple[AttentionSite, ...]) -> tuple[int, tuple[OtherLayer, ...]]:
    places = [subpaths(s.module) for s in sites]
    containers = {p.container for p in places}
    if len(containers) != 1 or any(p.index is None for p in places):
        return len(sites), ()
    (container,) = containers
    layers = list(graph.twin.get_submodule(container).children())
    taken = {p.index for p in places}
    return len(layers), tuple(
        OtherLayer(layer=i, module=f"{container}.{i}", kind=type(layer).__name__)
        for i, layer in enumerate(layers)
        if i not in taken
    )


def _read_site(graph: Graph, found: Found, paths: Paths) -> AttentionSite:
    """Describe one attention and prove the description."""
    where = f"module {found.module}"
    generator = torch.Generator().manual_seed(0)
    origins = {origin(p.linear.x) for p in (paths.q, paths.k, paths.v)}
    if len(origins) != 1:
        raise UnsupportedModel(
            f"{where}: queries, keys and values are projected from different inputs "
            f"({', '.join(sorted(n.name for n in origins))}); latent (MLA) or shared attention is not understood."
        )
    q, k, v = (read_path(graph, found, getattr(paths, role), role, generator) for role in "qkv")
    if q.rotary != k.rotary:
        raise UnsupportedModel(f"{where}: queries and keys are rotated differently.")
    if q.dim != k.dim or q.order != k.order or v.order != tuple(range(v.dim)):
        raise UnsupportedModel(f"{where}: queries, keys and values order their channels differently.")
    if q.repeats != 1 or len(k.first_rows) != len(v.first_rows) or len(q.first_rows) % len(k.first_rows):
        raise UnsupportedModel(
            f"{where}: {len(q.first_rows)} query, {len(k.first_rows)} key and {len(v.first_rows)} value heads; "
            "key and value heads must be as many, and divide the query heads."
        )
    if len({q.clip, k.clip, v.clip}) != 1:
        raise UnsupportedModel(f"{where}: only some of queries, keys and values are clamped.")
    if v.factor != 1.0:
        raise UnsupportedModel(f"{where}: its values are multiplied by {v.factor:g}; surgery cannot compute that.")
    wide_graph, wide_found = graph, found
    if graph.wide is not None:
        wide_graph = graph.wide
        wide_found = next(f for f in find_attentions(wide_graph) if f.module == found.module)
    scores = read_scores(wide_graph, wide_found, len(q.first_rows), generator)
    columns = read_out(graph, found, paths.o, generator)
    gate = None
    if paths.gate is not None:
        # Numbers of its own: what is drawn for the rest stays as it is without a gate.
        gate = read_gate(graph, found, paths.o, paths.gate, columns, v.dim, torch.Generator().manual_seed(0))
    site = AttentionSite(
        layer=0, module=found.module, hidden_size=paths.q.linear.inputs,
        heads=len(q.first_rows), kv_heads=len(k.first_rows), head_dim=q.dim, value_dim=v.dim,
        q=_projection(graph, paths.q, q.first_rows), k=_projection(graph, paths.k, k.first_rows),
        v=_projection(graph, paths.v, v.first_rows),
        o=_projection(graph, paths.o, columns),
        q_norm=q.norm, k_norm=k.norm, v_norm=v.norm, rotary=q.rotary,
        scale=scores.scale * q.factor * k.factor, softcap=scores.softcap, window=scores.window,
        window_in_mask=scores.window_in_mask, sinks=scores.sinks, alibi_slopes=scores.alibi_slopes, clip_qkv=q.clip,
        gated_output=bool(paths.o.gates), gate=gate, sees_ahead=graph.sees_ahead,
    )  # fmt: skip
    if site.rotary is not None and graph.axes is not None:
        axes = [read_axes(graph, found, path, r) for path, r in ((paths.q, q), (paths.k, k))]
        if axes[0] != axes[1]:
            raise UnsupportedModel(f"{where}: queries and keys are rotated by different axes of their positions.")
        site = dataclasses.replace(site, rotary=dataclasses.replace(site.rotary, axes=axes[0]))
    prove_scores(wide_graph, wide_found, site, (q, k, v), generator)
    return prove(graph, found, paths, site, (q, k, v), generator)


def _projection(graph: Graph, path: Path | OutPath, rows: tuple[int, ...]) -> Projection:
    linear = path.linear
    bias = graph.sources[linear.bias].name if linear.bias is not None else None
    return Projection(weight=graph.sources[linear.weight].name, bias=bias, head_rows=rows, transposed=linear.transposed)
