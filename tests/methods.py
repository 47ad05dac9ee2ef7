"""The matrix: one row per variant buys every invariant of `test_runtime.py` on every representative family."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from families import tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from surgery.anatomy import examine
from surgery.runtime.attention import canonical_weights
from surgery.runtime.layout import AttentionSite, Heads, LayerPlan
from surgery.runtime.modeling import from_parent

Groups = tuple[tuple[int, ...], ...]
Weights = dict[str, Tensor]

REPRESENTATIVE = ["llama", "qwen3", "gpt_neox", "gpt2", "gemma2", "gpt_oss", "bloom", "olmo2"]
"""Plain, q/k norm, fused partial rotary, Conv1D, soft cap and window, sinks, ALiBi, norm over all heads together."""


@dataclass(frozen=True)
class Method:
    """One variant: which query heads share a KV head in each layer, and the weights of the kept heads."""

    groups: Callable[[AttentionSite], Groups]
    weights: Callable[[AttentionSite, Weights, Groups], Weights]

    def plan(self, site: AttentionSite) -> LayerPlan:
        groups = self.groups(site)
        heads = Heads(kv_heads=len(groups), head_dim=site.head_dim, value_dim=site.value_dim, groups=groups)
        return LayerPlan(layer=site.layer, project=heads, owner=site.layer, window=site.window, dtype="float32")

    def convert(self, model: PreTrainedModel, sites: Sequence[AttentionSite]) -> PreTrainedModel:
        tensors = model.state_dict()
        plans = [self.plan(site) for site in sites]
        weights = {
            site.layer: self.weights(site, canonical_weights(site, tensors.__getitem__), plan.project.groups)
            for site, plan in zip(sites, plans, strict=True)
        }
        return from_parent(model, sites, plans, {"method": "test"}, weights)


def select_heads(site: AttentionSite, weights: Weights, groups: Groups) -> Weights:
    """Each group reads the KV head that its last query head read in the parent."""
    kept = [group[-1] // site.group_size for group in groups]
    selected = dict(weights)
    for name, tensor in weights.items():
        per_head = name.startswith(("k_proj", "v_proj")) or (
            name.startswith(("k_norm", "v_norm")) and tensor.numel() == site.kv_heads * site.head_dim
        )
        if per_head and tensor.shape[0] == site.kv_heads:
            selected[name] = tensor[kept]
        elif per_head:
            selected[name] = tensor.unflatten(0, (site.kv_heads, -1))[kept].flatten(0, 1)
    return selected


def own_groups(site: AttentionSite) -> Groups:
    return tuple(tuple(range(k * site.group_size, (k + 1) * site.group_size)) for k in range(site.kv_heads))


def fewer_in_odd_layers(site: AttentionSite) -> Groups:
    """Uniform groups whose number differs between layers."""
    kv_heads = max(site.kv_heads // 2, 1) if site.layer % 2 else site.kv_heads
    size = site.heads // kv_heads
    return tuple(tuple(range(k * size, (k + 1) * size)) for k in range(kv_heads))


def unequal(site: AttentionSite) -> Groups:
    """Groups of different size, out of order."""
    return (tuple(h for h in range(site.heads) if h != 1), (1,))


METHODS = {
    "identity": Method(own_groups, lambda site, weights, groups: weights),
    "per_layer_heads": Method(fewer_in_odd_layers, select_heads),
    "unequal_groups": Method(unequal, select_heads),
}


@functools.cache
def parent(family: str) -> PreTrainedModel:
    return tiny_model(family)


@functools.cache
def sites(family: str) -> tuple[AttentionSite, ...]:
    return tuple(replace(site) for site in examine(parent(family)).sites)


def converted(method: str, family: str) -> PreTrainedModel:
    """A fresh conversion; tests may train or compile it."""
    return METHODS[method].convert(parent(family), sites(family))
