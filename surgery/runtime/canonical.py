"""Names and layout of weights that every parent's attention is brought to, and the parents' parameters behind them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .layout import AttentionSite, LayerPlan, Projection


def canonical_weights(site: AttentionSite, get_tensor: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """The weights of one attention under the names and in the layout of `SurgeryHeadsAttention`, as fresh tensors.

    Head h of `q_proj`, `k_proj`, `v_proj` has rows [h*H, (h+1)*H), and columns of `o_proj` likewise, whether the
    parent keeps them apart, fused or transposed. `get_tensor` maps a name in the parent's state dict to its tensor.
    """
    weights: dict[str, Tensor] = {}
    for name, projection, width in (
        ("q", site.q, site.head_dim), ("k", site.k, site.head_dim), ("v", site.v, site.value_dim),
    ):  # fmt: skip
        weight = get_tensor(projection.weight)
        rows = _head_index(projection, width, weight.device)
        weights[f"{name}_proj.weight"] = (weight.t() if projection.transposed else weight).index_select(0, rows)
        if projection.bias is not None:
            weights[f"{name}_proj.bias"] = get_tensor(projection.bias).index_select(0, rows)
    if site.gate is not None:
        weight = get_tensor(site.gate.weight)
        rows = _head_index(site.gate, site.gate.width, weight.device)
        weights["out_gate.weight"] = (weight.t() if site.gate.transposed else weight).index_select(0, rows)
        if site.gate.bias is not None:
            weights["out_gate.bias"] = get_tensor(site.gate.bias).index_select(0, rows)
    weight = get_tensor(site.o.weight)
    columns = _head_index(site.o, site.value_dim, weight.device)
    weights["o_proj.weight"] = (weight.t() if site.o.transposed else weight).index_select(1, columns)
    if site.o.bias is not None:
        weights["o_proj.bias"] = get_tensor(site.o.bias).clone()
    for name, norm in (("q_norm", site.q_norm), ("k_norm", site.k_norm), ("v_norm", site.v_norm)):
        if norm is not None and norm.weight is not None:
            weights[f"{name}.weight"] = _gain(norm.weight, get_tensor)
        if norm is not None and norm.bias is not None:
            weights[f"{name}.bias"] = _gain(norm.bias, get_tensor)
    if site.sinks is not None:
        weights["sinks"] = get_tensor(site.sinks).clone()
    return {name: tensor.detach().contiguous() for name, tensor in weights.items()}


def kept_weights(site: AttentionSite, plan: LayerPlan, get_tensor: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """The canonical weights of an attention whose numbers stay: the parent's, but for what a reader has no use for."""
    canonical = canonical_weights(site, get_tensor)
    return {name: tensor for name, tensor in canonical.items() if name.split(".")[0] not in plan.absent}


def origin_of(site: AttentionSite, name: str) -> str | None:
    """The parent's parameter that a canonical one is made from; None where it stands for none of them.

    Args:
        name: as `canonical_weights` has it, or as forms of the cache name parameters of their own.
    """
    if name.startswith(("gate.", "codec.")):
        return None
    if name == "sinks":
        return site.sinks
    projections = {"q": site.q, "k": site.k, "v": site.v, "o": site.o}
    norms = {"q_norm": site.q_norm, "k_norm": site.k_norm, "v_norm": site.v_norm}
    module, _, kind = name.partition(".")
    if module in norms:
        norm = norms[module]
        names = None if norm is None else norm.weight if kind == "weight" else norm.bias
        return names if names is None or isinstance(names, str) else names[0]
    # Names begin with what they make: `k_up`, `v_up`, `kv_down`, `q_rope`.
    projection = site.gate if module == "out_gate" and site.gate else projections.get(module[0], site.q)
    return (projection.bias if kind == "bias" else None) or projection.weight


def _gain(names: str | tuple[str, ...], get_tensor: Callable[[str], Tensor]) -> Tensor:
    """One parameter per head (StableLM) becomes one row per head."""
    return get_tensor(names).clone() if isinstance(names, str) else torch.stack([get_tensor(n) for n in names])


def _head_index(projection: Projection, width: int, device: torch.device) -> Tensor:
    starts = torch.tensor(projection.head_rows, device=device)
    return (starts[:, None] + torch.arange(width, device=device)).flatten()
