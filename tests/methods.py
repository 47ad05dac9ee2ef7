"""The matrix: one row per variant buys every invariant of `test_runtime.py` on every representative family."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from families import tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from surgery.anatomy import examine
from surgery.attention.latent import LatentWeights, canonical_latent, latent_of
from surgery.attention.weights import AttentionWeights, read_attention
from surgery.rewriters.latent.low_rank import lowrank
from surgery.rewriters.latent.moments import LatentMoments
from surgery.rewriters.latent.rotary_split import mla, mla_freq
from surgery.rewriters.tokens.gates import new_gate
from surgery.runtime.canonical import canonical_weights
from surgery.runtime.layout import AttentionSite, Dense, Heads, LayerPlan, Project, Retain
from surgery.runtime.modeling import from_parent
from surgery.runtime.retain import RETAINS

Groups = tuple[tuple[int, ...], ...]
Weights = dict[str, Tensor]

REPRESENTATIVE = ["llama", "qwen3", "gpt_neox", "gpt2", "gemma2", "gpt_oss", "bloom", "olmo2"]
"""Plain, q/k norm, fused partial rotary, Conv1D, soft cap and window, sinks, ALiBi, norm over all heads together."""


@dataclass(frozen=True)
class Method:
    """One variant: what a layer caches, its weights there, and the families that have that form."""

    plan_and_weights: Callable[[AttentionSite, PreTrainedModel], tuple[Project, Weights]]
    families: Sequence[str] = tuple(REPRESENTATIVE)
    shares: Literal["", "owner", "value_owner"] = ""
    """Layer 0 owns the cache of all, or its V alone."""
    retain: Retain | None = None

    def plan(self, site: AttentionSite, model: PreTrainedModel) -> LayerPlan:
        return self._layer(site, self.plan_and_weights(site, model)[0])

    def _layer(self, site: AttentionSite, project: Project) -> LayerPlan:
        lent = {self.shares: 0} if self.shares and site.layer else {}
        return LayerPlan(
            **{
                "layer": site.layer,
                "project": project,
                "owner": site.layer,
                "window": site.window,
                "store": Dense(dtype="float32"),
            }
            | {"retain": self.retain}
            | lent
        )

    def convert(self, model: PreTrainedModel, sites: Sequence[AttentionSite]) -> PreTrainedModel:
        made = [self.plan_and_weights(site, model) for site in sites]
        plans = [self._layer(site, project) for site, (project, _) in zip(sites, made, strict=True)]
        weights = {site.layer: tensors for site, (_, tensors) in zip(sites, made, strict=True)}
        return from_parent(model, sites, plans, {"method": "test"}, weights)


def heads(
    groups_of: Callable[[AttentionSite], Groups], weights_of: Callable[[AttentionSite, Weights, Groups], Weights]
) -> Method:
    """A variant of the `Heads` axis: which query heads share a KV head, and the weights of the kept heads."""

    def made(site: AttentionSite, model: PreTrainedModel) -> tuple[Project, Weights]:
        groups = groups_of(site)
        project = Heads(kv_heads=len(groups), head_dim=site.head_dim, value_dim=site.value_dim, groups=groups)
        return project, weights_of(site, canonical_weights(site, model.state_dict().__getitem__), groups)

    return Method(made)


def latent(make: Callable[[AttentionWeights, LatentMoments], LatentWeights], families: Sequence[str]) -> Method:
    """A variant of the `Latent` axis, from the weights alone."""

    def made(site: AttentionSite, model: PreTrainedModel) -> tuple[Project, Weights]:
        tensors = model.state_dict()
        w = read_attention(site, tensors.__getitem__)
        cut = make(w, LatentMoments.of_weights(w))
        return latent_of(cut, site), canonical_latent(cut, site, canonical_weights(site, tensors.__getitem__))

    return Method(made, families)


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


def shared(method: Method, families: Sequence[str], what: Literal["owner", "value_owner"] = "owner") -> Method:
    """`method` with all layers but the first as readers: no parameters that make K and V, or V."""
    result = Method(method.plan_and_weights, families, shares=what, retain=method.retain)

    def made(site: AttentionSite, model: PreTrainedModel) -> tuple[Project, Weights]:
        project, weights = method.plan_and_weights(site, model)
        absent = result._layer(site, project).absent
        return project, {name: tensor for name, tensor in weights.items() if not name.startswith(absent)}

    return replace(result, plan_and_weights=made)


def merged(base: Method, families: Sequence[str], kind: str, **options: Any) -> Method:
    """`base` with gates that decide one way and the other, about as often."""
    retain = RETAINS[kind](**{"ratio": 2.0, "sinks": 2} | options)

    def made(site: AttentionSite, model: PreTrainedModel) -> tuple[Project, Weights]:
        project, weights = base.plan_and_weights(site, model)
        random = torch.Generator().manual_seed(site.layer)
        gate = new_gate(retain, site.hidden_size, project.entry(4)[0])
        for name in [name for name in gate if name in ("weight", "bias", "mix_weight")]:
            gate[name] = 0.1 * torch.randn(gate[name].shape, generator=random)
        gate = {name: t + 0.2 if name == "bias" else t for name, t in gate.items()}
        return project, weights | {f"gate.{name}": tensor for name, tensor in gate.items()}

    return Method(made, families, retain=retain)


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


def some_turning(w: AttentionWeights) -> int:
    """A quarter of K's rotated numbers, even."""
    return w.kv_heads * w.frequencies // 4 * 2


LINEAR = ["llama", "gpt_neox", "gpt2", "gemma2", "gpt_oss", "bloom"]
"""Families whose K and V are linear in the layer's input: without norms between."""
METHODS = {
    "identity": heads(own_groups, lambda site, weights, groups: weights),
    "per_layer_heads": heads(fewer_in_odd_layers, select_heads),
    "unequal_groups": heads(unequal, select_heads),
    "mla": latent(lambda w, m: mla(w, m, 20, some_turning(w)), LINEAR),
    "lowrank": latent(lambda w, m: lowrank(w, m, 10, 13), [*LINEAR, "qwen3", "olmo2"]),
    "freq": latent(lambda w, m: mla_freq(w, m, 11, some_turning(w)), ["llama", "gemma2", "gpt_oss"]),
}
REFUSED = [(name, f) for name, method in METHODS.items() for f in REPRESENTATIVE if f not in method.families]
ALIKE = ["llama", "mistral", "qwen3", "gpt_neox", "gpt2", "olmo2"]
"""Families whose layers are alike, and hand keyword arguments to their attentions."""
METHODS |= {
    "shared": shared(METHODS["identity"], ALIKE),
    "shared_values": shared(METHODS["identity"], ALIKE, "value_owner"),
    "shared_unequal_groups": shared(METHODS["unequal_groups"], ["llama"]),
    "shared_mla": shared(METHODS["mla"], ["llama", "gpt_neox"]),
    "shared_lowrank": shared(METHODS["lowrank"], ["llama", "mistral"]),
}
GATED = ["llama", "qwen3", "gpt_neox", "gpt2", "olmo2"]
"""Families without windows or ALiBi: q/k norms, fused partial rotary, Conv1D, norm over all heads together."""
METHODS |= {
    "dms": merged(METHODS["identity"], GATED, "dms", window=3),
    "dms_unequal_groups": merged(METHODS["unequal_groups"], ["llama"], "dms", window=3),
    "dms_borrowed": merged(METHODS["identity"], ["llama"], "dms", window=3, gate="borrowed"),
    "dms_head": merged(METHODS["identity"], ["llama"], "dms", window=3, gate="head"),
    "dmc": merged(METHODS["identity"], GATED, "dmc", window=3),
    "dmc_unlimited": merged(METHODS["per_layer_heads"], ["llama", "gpt_neox"], "dmc", window=None),
    "dms_mla": merged(METHODS["mla"], ["llama", "gpt_neox", "gpt2"], "dms", window=3),
    "dms_lowrank": merged(METHODS["lowrank"], ["llama", "qwen3"], "dms", window=3),
    "dmc_mla": merged(METHODS["mla"], ["llama"], "dmc", window=3),
}
METHODS |= {
    "shared_dms": shared(METHODS["dms"], ["llama"]),
    "shared_dmc": shared(METHODS["dmc"], ["llama", "gpt_neox"]),
    "shared_dms_mla": shared(METHODS["dms_mla"], ["llama"]),
    "shared_dms_lowrank": shared(METHODS["dms_lowrank"], ["llama"]),
}
PAIRS = [(name, family) for name, method in METHODS.items() for family in method.families]


@functools.cache
def parent(family: str) -> PreTrainedModel:
    return tiny_model(family)


@functools.cache
def sites(family: str) -> tuple[AttentionSite, ...]:
    return tuple(replace(site) for site in examine(parent(family)).sites)


def converted(method: str, family: str) -> PreTrainedModel:
    """A fresh conversion; tests may train or compile it."""
    return METHODS[method].convert(parent(family), sites(family))
