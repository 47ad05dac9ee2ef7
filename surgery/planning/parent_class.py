"""Which config of the parent's own class has fewer KV heads, if any: then stock libraries load the result."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from ..anatomy import Anatomy
from ..anatomy.twin import hold_frequencies_still
from ..checkpoints.classes import model_class, plain_config
from ..runtime.attention import SHARED_STATES
from ..runtime.layout import AttentionSite, Heads, LayerPlan
from .targets import unknown_to_parent


def native_config(
    config: Any, sites: tuple[AttentionSite, ...], kv_heads: int, kind: type[PreTrainedModel]
) -> Any | None:
    """A copy of `config` whose model has `kv_heads` KV heads in every attention; None where `kind` has no such form.

    No table of families: every integer setting whose name speaks of KV heads and whose value is the parent's count is
    tried, and the parameter shapes of the model that it builds decide.
    """
    old = sites[0].kv_heads
    if any(site.kv_heads != old for site in sites):
        return None
    config = without_unbuilt_layers(plain_config(config), kind)
    names = _kv_settings(config.get_text_config(), old)
    shapes = _shapes(meta_model(config, kind)) if names else {}
    inside = tuple(site.module + "." for site in sites)
    beside = {name: shape for name, shape in shapes.items() if not name.startswith(inside)}
    for name in names:
        candidate = copy.deepcopy(config)
        candidate.architectures = [kind.__name__]
        text = candidate.get_text_config()
        setattr(text, name, kv_heads)
        if "head_dim" in dir(text) and "head_dim" not in _by_layer(text) and text.head_dim is None:
            text.head_dim = sites[0].head_dim  # engines that derive it from other fields must not have to guess
        try:
            twin = meta_model(candidate, kind)
        except (ValueError, TypeError, RuntimeError, AttributeError, KeyError):
            continue
        # The setting may be that of other attentions as well: those that read images (Mllama).
        found = _shapes(twin)
        if _has_shapes(twin, sites, kv_heads) and all(found.get(other) == shape for other, shape in beside.items()):
            return candidate
    return None


def without_unbuilt_layers(config: Any, kind: type[PreTrainedModel]) -> Any:
    """A copy of `config` that speaks of no layers but those that its model builds; see `unbuilt_layers`."""
    config = copy.deepcopy(config)
    for part, name, _ in _unbuilt(config, kind):
        setattr(part, name, 0)
    return config


def unbuilt_layers(config: Any, kind: type[PreTrainedModel]) -> dict[str, int]:
    """Settings that promise layers which lie in files at most, and how many: those that predict further tokens (MTP).

    The model's class does not load them, so that no result has them.
    """
    return {name: count for _, name, count in _unbuilt(config, kind)}


def _unbuilt(config: Any, kind: type[PreTrainedModel]) -> list[tuple[Any, str, int]]:
    text = config.get_text_config(decoder=True)
    found = []
    for part in (config,) if text is config else (config, text):
        for name, value in part.to_dict().items():
            counts = ("mtp" in name or "nextn" in name) and ("num" in name or name.startswith("n_"))
            if counts and isinstance(value, int) and not isinstance(value, bool) and value > 0:
                found.append((part, name, value))
    if not found:
        return []
    without = copy.deepcopy(config)
    for part, name, _ in found:
        setattr(without if part is config else without.get_text_config(decoder=True), name, 0)
    shapes = [{n: p.shape for n, p in meta_model(c, kind).named_parameters()} for c in (config, without)]
    return found if shapes[0] == shapes[1] else []


def meta_model(config: Any, kind: type[PreTrainedModel] | None = None) -> PreTrainedModel:
    """The model of `config` without memory for its weights; the attention that it names need not be installed.

    Args:
        kind: its class, where that is known.
    """
    with torch.device("meta"):
        return (kind or model_class(config))._from_config(copy.deepcopy(config), attn_implementation="eager")


def stated_heads(layers: Sequence[LayerPlan]) -> int | None:
    """The number of KV heads with which a config says all of `layers`; None where it takes more than that number."""
    counts = set()
    for layer in layers:
        if unknown_to_parent(layer) is not None or not isinstance(layer.project, Heads) or not layer.project.is_uniform:
            return None
        counts.add(layer.project.kv_heads)
    return counts.pop() if len(counts) == 1 else None


def why_not_handed_down(anatomy: Anatomy) -> str | None:
    """Why an unknown keyword argument of the model does not reach its first attention; None where it does.

    The model runs without weights, up to that attention.
    """
    model = meta_model(anatomy.config, anatomy.kind)
    hold_frequencies_still(model)  # else those that vary with the length read positions, which have no values here
    found: list[bool] = []

    class Reached(Exception):
        pass

    def look(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(SHARED_STATES in kwargs)
        raise Reached

    model.get_submodule(anatomy.sites[0].module).register_forward_pre_hook(look, with_kwargs=True)
    ids = torch.zeros(1, 2, dtype=torch.long, device="meta")
    mask = torch.zeros(1, 1, 2, 2, device="meta")  # a finished mask: making one would read values, and there are none
    try:
        with torch.no_grad():
            model.base_model(input_ids=ids, attention_mask=mask, use_cache=False, **{SHARED_STATES: {}})
    except Reached:
        pass
    except TypeError:
        return f"{anatomy.architecture} takes no keyword arguments that it does not know"
    except (ValueError, RuntimeError) as error:
        return f"{anatomy.architecture} cannot be run without weights as far as its first attention ({error})"
    return None if found == [True] else f"{anatomy.architecture} hands its attentions no keyword arguments"


def _kv_settings(config: Any, value: int) -> list[str]:
    names = [name for name in config.to_dict() if "kv" in name or "key_value" in name]
    names = [name for name in names if "head" in name and name not in _by_layer(config)]
    return [name for name in names if getattr(config, name, None) == value]


def _by_layer(config: Any) -> Collection[str]:
    """Settings that differ between layers, so that the config refuses to be asked for one value."""
    return getattr(config, "per_layer_attributes", None) or ()


def _shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _has_shapes(twin: PreTrainedModel, sites: tuple[AttentionSite, ...], kv_heads: int) -> bool:
    """Whether each k and v parameter of `twin` lost exactly the rows of the dropped heads, and q and o none."""
    shapes = _shapes(twin)
    for site in sites:
        rows: dict[str, int] = {}
        for projection, dim, count in (
            (site.q, site.head_dim, site.heads),
            (site.k, site.head_dim, kv_heads),
            (site.v, site.value_dim, kv_heads),
        ):
            if projection.weight not in shapes:
                return False
            rows[projection.weight] = rows.get(projection.weight, 0) + dim * count
        for projection in (site.q, site.k, site.v):
            shape = shapes[projection.weight]
            # An output gate may ride on the parameter of q (Qwen3-Next): then it has more rows than q, k and v.
            if shape[1 if projection.transposed else 0] != rows[projection.weight] and not site.gated_output:
                return False
        if site.heads * site.value_dim not in shapes.get(site.o.weight, ()):
            return False
    return True
