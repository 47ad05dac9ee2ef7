"""The forms that a layer of the working copy can have: heads of its own, a latent, or K and V read from another layer.

A form says how head outputs follow from what projections read, what the layer's plan is, and under which names and in
which layout the runtime expects its tensors. It is a value: it holds no model and no activations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..attention.forward import causal_heads, project
from ..attention.latent import LatentWeights, canonical_latent, expanded_weights, latent_of, latent_outputs
from ..attention.weights import AttentionWeights
from ..errors import PlanError
from ..runtime.layout import AttentionSite, Heads, LayerPlan, Project

Groups = tuple[tuple[int, ...], ...]
WeightsOf = Callable[[int], AttentionWeights]
"""A layer's weights as they stand in the copy, without repetitions of KV heads."""
Inputs = Mapping[int, Tensor]
"""By layer: what its q, k and v are projected from, [B, T, D]."""


@dataclass(frozen=True, kw_only=True)
class HeadsForm:
    """K and V heads of the layer's own, computed by the parent's own attention."""

    groups: Groups | None = None
    """Query heads of each KV head that the layer's parameters really hold; None: those of the parent."""

    @property
    def is_computed(self) -> bool:
        """Whether the copy computes the head outputs in place of the parent's attention."""
        return False

    @property
    def latent_of_cache(self) -> LatentWeights | None:
        """The latent that the layer caches, or reads from its owner; None where that is K and V."""
        return None

    def sources(self, layer: int) -> tuple[int, ...]:
        """Layers whose inputs K, V and the queries of `layer` are made from."""
        return (layer,)

    def head_outputs(self, layer: int, weights_of: WeightsOf, inputs: Inputs) -> Tensor | None:
        """What `o` reads, [B, T, N, Hv]; None where the parent's own attention computes it."""
        return None

    def keys_values(self, layer: int, weights_of: WeightsOf, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """K [B, K, T, H] and V that the layer reads, as its scores and means see them."""
        return _made(weights_of(layer), inputs[layer])

    def project(self, site: AttentionSite) -> Project:
        """The project axis of the layer."""
        heads = Heads.of(site)
        return heads if self.groups is None else replace(heads, kv_heads=len(self.groups), groups=self.groups)

    def owner_of(self, layer: int) -> int:
        """Share axis: the layer whose cache `layer` reads."""
        return layer

    def value_owner_of(self, layer: int) -> int | None:
        """Share axis of V alone; None where V comes with K."""
        return None

    def settle(self, site: AttentionSite, plan: LayerPlan) -> LayerPlan:
        """`plan` with the project and share axes of this form."""
        layer = site.layer
        owner, value_owner = self.owner_of(layer), self.value_owner_of(layer)
        return replace(plan, project=self.project(site), owner=owner, value_owner=value_owner)

    def canonical(self, site: AttentionSite, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The layer under the names and in the layout of the runtime's attention.

        Args:
            tensors: the copy's parameters as `canonical_weights` gives them, with as many KV heads as the parent has.
        """
        return tensors if self.groups is None else _without_repeated(site, self.groups, tensors)


@dataclass(frozen=True, kw_only=True)
class LatentForm(HeadsForm):
    """K and V made from a latent of the layer's own input; the parameters of its own K and V are unused."""

    latent: LatentWeights

    @property
    def is_computed(self) -> bool:
        return True

    @property
    def latent_of_cache(self) -> LatentWeights | None:
        return self.latent

    def head_outputs(self, layer: int, weights_of: WeightsOf, inputs: Inputs) -> Tensor | None:
        return latent_outputs(weights_of(layer), self.latent, inputs[layer])

    def keys_values(self, layer: int, weights_of: WeightsOf, inputs: Inputs) -> tuple[Tensor, Tensor]:
        raise PlanError(f"layer {layer}: caches a latent, which has no keys and values in the parent's form.")

    def project(self, site: AttentionSite) -> Project:
        return latent_of(self.latent, site)

    def canonical(self, site: AttentionSite, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return canonical_latent(self.latent, site, tensors)


@dataclass(frozen=True, kw_only=True)
class ReaderForm(HeadsForm):
    """K and V, or V alone, made from the input of an owner, which is what reading its cache amounts to.

    They are projected by the owner's own rows, or by maps from the owner's latent where `latent` is given. The owner of
    a latent with readers is in this form too, with itself as owner: all of them compute alike.
    """

    owner: int
    values_only: bool = False
    latent: LatentWeights | None = None

    @property
    def is_computed(self) -> bool:
        return True

    @property
    def latent_of_cache(self) -> LatentWeights | None:
        return self.latent

    def sources(self, layer: int) -> tuple[int, ...]:
        return (layer,) if self.owner == layer else (layer, self.owner)

    def head_outputs(self, layer: int, weights_of: WeightsOf, inputs: Inputs) -> Tensor | None:
        own = weights_of(layer)
        k, v = self.keys_values(layer, weights_of, inputs)
        kv_of = own.kv_of()
        return causal_heads(own, project(own, inputs[layer])[0], k[:, kv_of], v[:, kv_of]).transpose(1, 2)

    def keys_values(self, layer: int, weights_of: WeightsOf, inputs: Inputs) -> tuple[Tensor, Tensor]:
        if self.latent is not None:
            return _made(expanded_weights(weights_of(layer), self.latent), inputs[self.owner])
        k, v = _made(weights_of(self.owner), inputs[self.owner])
        return (_made(weights_of(layer), inputs[layer])[0], v) if self.values_only else (k, v)

    def project(self, site: AttentionSite) -> Project:
        return super().project(site) if self.latent is None else latent_of(self.latent, site)

    def owner_of(self, layer: int) -> int:
        return layer if self.values_only else self.owner

    def value_owner_of(self, layer: int) -> int | None:
        return self.owner if self.values_only else None

    def canonical(self, site: AttentionSite, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        latent = self.latent
        found = super().canonical(site, tensors) if latent is None else canonical_latent(latent, site, tensors)
        plan = LayerPlan(layer=site.layer, project=self.project(site), owner=site.layer)
        absent = self.settle(site, plan).absent
        return {name: tensor for name, tensor in found.items() if name.split(".")[0] not in absent}


def _made(weights: AttentionWeights, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
    _, k, v = project(weights, x_BTD, torch.tensor([0]))  # the queries are not wanted
    return k, v


def _without_repeated(site: AttentionSite, groups: Groups, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """One copy of each KV head."""
    slots = [group[0] // site.group_size for group in groups]
    found = dict(tensors)
    for name, tensor in tensors.items():
        per_head = name.startswith(("k_proj", "v_proj")) or (
            name.startswith("k_norm") and tensor.numel() == site.kv_heads * site.head_dim and site.kv_heads > 1
        )
        if per_head:
            kept = tensor.reshape(site.kv_heads, tensor.numel() // site.kv_heads)[slots]
            found[name] = kept.reshape(-1, *tensor.shape[1:])
    return found
