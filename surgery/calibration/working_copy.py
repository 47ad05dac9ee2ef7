"""A copy of the parent in which layers are converted one after another, each calibrated on the converted prefix."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..anatomy import Anatomy
from ..attention.weights import AttentionWeights, parameter_names, read_attention, write_changed
from ..errors import PlanError
from ..runtime.canonical import canonical_weights
from ..runtime.layout import Heads, LayerPlan, Project
from .outputs import answers, distance
from .text import Windows

HELD_NUMBERS = 2**27
"""Activations, and answers of the parent, that are kept in memory (512 MB each) rather than computed anew."""


class WorkingCopy:
    """The parent in float32, its attentions replaced in place; the parent itself is only read.

    A converted layer keeps the parent's form: each new KV head is repeated in the places of the heads that it
    replaces. That is the same function, so every family can be run with any of its layers converted.

    `teacher` is the parent in float32 for statistics and losses; `model` is the copy that changes.
    """

    def __init__(self, parent: PreTrainedModel, anatomy: Anatomy) -> None:
        self.sites = {site.layer: site for site in anatomy.sites}
        self.teacher = parent if _is_float32(parent) else copy.deepcopy(parent).float()
        self.model = copy.deepcopy(self.teacher).eval()
        _untie(self.model, [name for site in anatomy.sites for name in parameter_names(site)])
        self.gates: dict[int, dict[str, Tensor]] = {}
        """Tensors of the gates that layers got, by name."""
        self.window_of: dict[int, int] = {}
        """Newest tokens that gates may not drop, where the text has decided that by layer."""
        self._groups: dict[int, tuple[tuple[int, ...], ...]] = {}
        self._wanted: dict[str, list[Tensor]] = {}

    def read(self, layer: int) -> AttentionWeights:
        """The layer's weights as they are now, with as many KV heads as it really has."""
        return self._collapsed(layer, read_attention(self.sites[layer], self.tensor))

    def write(self, layer: int, weights: AttentionWeights) -> None:
        """Replace the layer's weights."""
        self._put(layer, expand(weights, self.sites[layer].kv_heads, layer))
        self._groups[layer] = weights.groups

    def _put(self, layer: int, weights: AttentionWeights) -> None:
        """Replace the layer's parameters by weights that have the parent's heads."""
        site = self.sites[layer]
        changed = write_changed(weights, site, site, self.teacher.get_parameter)
        with torch.no_grad():
            for name, value in changed.items():
                self.model.get_parameter(name).copy_(value)

    def _collapsed(self, layer: int, weights: AttentionWeights) -> AttentionWeights:
        """Weights as they stand in the copy, without the repetitions of KV heads."""
        return collapse(weights, self._groups[layer]) if layer in self._groups else weights

    def tensor(self, name: str) -> Tensor:
        """One parameter of the copy."""
        return self.model.get_parameter(name).detach()

    def canonical(self, layer: int) -> dict[str, Tensor]:
        """The layer under the names and in the layout of `SurgeryHeadsAttention`."""
        site = self.sites[layer]
        tensors = canonical_weights(site, self.tensor)
        tensors |= {f"gate.{name}": tensor for name, tensor in self.gates.get(layer, {}).items()}
        if layer in self._groups:
            slots = [group[0] // site.group_size for group in self._groups[layer]]
            for name, tensor in tensors.items():
                per_head = name.startswith(("k_proj", "v_proj")) or (
                    name.startswith("k_norm") and tensor.numel() == site.kv_heads * site.head_dim and site.kv_heads > 1
                )
                if per_head:
                    width = tensor.numel() // site.kv_heads
                    kept = tensor.reshape(site.kv_heads, width)[slots]
                    tensors[name] = kept.reshape(-1, *tensor.shape[1:])
        return tensors

    def project(self, layer: int) -> Project:
        """The project axis that the layer has now."""
        weights = self.read(layer)
        return Heads(
            kv_heads=weights.kv_heads, head_dim=weights.head_dim, value_dim=weights.value_dim, groups=weights.groups
        )

    def settle(self, plan: LayerPlan) -> LayerPlan:
        """`plan` with what the text has decided for its layer."""
        if plan.layer in self.window_of:
            assert plan.retain is not None
            plan = replace(plan, retain=replace(plan.retain, window=self.window_of[plan.layer]))
        return replace(plan, project=self.project(plan.layer)) if plan.layer in self.converted else plan

    def divergence(self, windows: Windows) -> float:
        """KL(parent || copy) in nats per token, or what `outputs.distance` takes in its place.

        The parent's answers to these windows are kept for the next call.
        """
        return self.divergence_of(self.model, windows)

    @torch.no_grad()
    def divergence_of(self, model: PreTrainedModel, windows: Windows) -> float:
        """`divergence` of another model."""
        total = 0.0
        for (ids, mask), wanted in zip(windows.batches(), self.wanted(windows), strict=True):
            total += float(distance(model, answers(model, ids, mask), wanted))
        return total / windows.tokens

    @torch.no_grad()
    def wanted(self, windows: Windows) -> Iterator[Tensor]:
        """The parent's answers at real tokens, batch by batch; kept where they are few enough."""
        known = self._wanted.setdefault(windows.digest, [])
        for i, (ids, mask) in enumerate(windows.batches()):
            if i < len(known):
                yield known[i]
                continue
            found = answers(self.teacher, ids, mask)
            if i == len(known) and found.shape[-1] * windows.tokens <= HELD_NUMBERS:
                known.append(found)
            yield found

    def restore(self, state: dict[str, Tensor]) -> None:
        """Put back parameters by name."""
        with torch.no_grad():
            for name, tensor in state.items():
                self.model.get_parameter(name).copy_(tensor)

    @property
    def converted(self) -> list[int]:
        """Layers written so far."""
        return sorted({*self._groups, *self.gates})


def _untie(model: PreTrainedModel, names: list[str]) -> None:
    """Give each of these parameters a tensor of its own: layers that share one are rewritten apart."""
    seen: set[int] = set()
    for name in names:
        parameter = model.get_parameter(name)
        if id(parameter) in seen:
            owner, _, attribute = name.rpartition(".")
            parameter = torch.nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
            setattr(model.get_submodule(owner), attribute, parameter)
        seen.add(id(parameter))


def _is_float32(model: PreTrainedModel) -> bool:
    return all(p.dtype == torch.float32 for p in model.parameters())


def expand(weights: AttentionWeights, kv_heads: int, layer: int) -> AttentionWeights:
    """Repeat KV heads until `kv_heads` equal groups of consecutive queries read them: the same function.

    Raises:
        PlanError: a group of queries would have to be split between two slots.
    """
    size = weights.heads // kv_heads
    kv_of = weights.kv_of()
    sources = kv_of[::size]
    if any(kv_of[h] != sources[h // size] for h in range(weights.heads)):
        sizes = [len(group) for group in weights.groups]
        raise PlanError(
            f"layer {layer}: groups of {sizes} query heads do not fall on the parent's {kv_heads} groups of {size}. "
            "Use an init whose groups are made of whole KV heads."
        )
    groups = tuple(tuple(range(a * size, (a + 1) * size)) for a in range(kv_heads))
    return _select(weights, sources, groups)


def collapse(weights: AttentionWeights, groups: tuple[tuple[int, ...], ...]) -> AttentionWeights:
    """Undo `expand`: keep one copy of each KV head."""
    kv_of = weights.kv_of()
    return _select(weights, [kv_of[group[0]] for group in groups], groups)


def _select(weights: AttentionWeights, sources: list[int], groups: tuple[tuple[int, ...], ...]) -> AttentionWeights:
    """KV heads `sources`, in that order, read by `groups`."""

    def take(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[sources]

    return replace(
        weights,
        k_KHD=weights.k_KHD[sources],
        v_KVD=weights.v_KVD[sources],
        k_bias_KH=take(weights.k_bias_KH),
        v_bias_KV=take(weights.v_bias_KV),
        k_norm_KH=take(weights.k_norm_KH),
        k_norm_bias_KH=take(weights.k_norm_bias_KH),
        groups=groups,
    )
