"""A working copy in which layers make K and V from the input of an earlier layer: what reading its cache amounts to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..anatomy import Anatomy
from ..attention.forward import causal_heads, project
from ..attention.weights import AttentionWeights, read_attention
from ..rewriters.latent.low_rank import expanded_weights
from ..rewriters.latent.steps import canonical_latent, latent_of
from ..rewriters.latent.weights import LatentWeights
from ..runtime.canonical import canonical_weights
from ..runtime.layout import LayerPlan, Project
from .exchanging_copy import ExchangingCopy
from .statistics import Activations, layer_activations
from .text import Windows
from .working_copy import HELD_NUMBERS


class SharedCopy(ExchangingCopy):
    """`owners` says which layer reads whose cache, `value_owners` which reads V alone.

    A reader's K and V are projected from its owner's input, by the owner's own rows, or from the owner's latent where
    `latents` has one for the layer.
    """

    def __init__(self, parent: PreTrainedModel, anatomy: Anatomy) -> None:
        super().__init__(parent, anatomy)
        self.owners: dict[int, int] = {}
        self.value_owners: dict[int, int] = {}
        self.latents: dict[int, LatentWeights] = {}

    @property
    def converted(self) -> list[int]:
        return sorted({*super().converted, *self.owners, *self.latents, *self.value_owners})

    def project(self, layer: int) -> Project:
        if layer in self.latents:
            return latent_of(self.latents[layer], self.sites[layer])
        return super().project(layer)

    def parent(self, layer: int) -> AttentionWeights:
        """The parent's weights of one layer."""
        return read_attention(self.sites[layer], lambda name: self.teacher.get_parameter(name).detach())

    def settle(self, plan: LayerPlan) -> LayerPlan:
        # Also of layers that are as they were: a search may have left them alone.
        layer = plan.layer
        return replace(
            plan,
            project=self.project(layer),
            owner=self.owners.get(layer, layer),
            value_owner=self.value_owners.get(layer),
        )

    def canonical(self, layer: int) -> dict[str, Tensor]:
        if layer in self.latents:
            site = self.sites[layer]
            found = canonical_latent(self.latents[layer], site, canonical_weights(site, self.tensor))
        else:
            found = super().canonical(layer)
        absent = self.settle(LayerPlan(layer=layer, project=self.project(layer), owner=layer)).absent
        return {name: tensor for name, tensor in found.items() if name.split(".")[0] not in absent}

    def activations(self, layer: int, windows: Windows) -> Iterable[Activations]:
        """`layer_activations`, to go through several times; `inputs` are those of the batch at each step.

        One pass over the model where the text is small enough to keep, else one for each time.
        """
        site = self.sites[layer]
        wanted = {layer, *self.settle(LayerPlan(layer=layer, project=self.project(layer), owner=layer)).lenders}
        if (3 + len(wanted)) * windows.ids_BT.numel() * site.hidden_size > HELD_NUMBERS:
            return _Again(lambda: layer_activations(self, site, windows))
        kept = [(a, {i: self.inputs[i] for i in wanted}) for a in layer_activations(self, site, windows)]

        def read() -> Iterator[Activations]:
            for a, inputs in kept:
                self.inputs |= inputs
                yield a

        return _Again(read)

    def computes(self, layer: int) -> bool:
        return any(layer in table for table in (self.owners, self.value_owners, self.latents))

    def keys_values(self, layer: int) -> tuple[Tensor, Tensor]:
        """K [B, K, T, H] and V that `layer` read in the last forward pass, as its scores and means see them."""
        return self._keys_values(layer, self.tensor)

    def head_outputs(self, layer: int, get_tensor: Callable[[str], Tensor]) -> Tensor:
        own = self._collapsed(layer, read_attention(self.sites[layer], get_tensor))
        k, v = self._keys_values(layer, get_tensor)
        kv_of = own.kv_of()
        return causal_heads(own, project(own, self.inputs[layer])[0], k[:, kv_of], v[:, kv_of]).transpose(1, 2)

    def _keys_values(self, layer: int, get_tensor: Callable[[str], Tensor]) -> tuple[Tensor, Tensor]:
        def made(weights: AttentionWeights, lender: int) -> tuple[Tensor, Tensor]:
            _, k, v = project(weights, self.inputs[lender], torch.tensor([0]))  # the queries are not wanted
            return k, v

        def own(lender: int) -> AttentionWeights:
            return self._collapsed(lender, read_attention(self.sites[lender], get_tensor))

        owner = self.owners.get(layer, layer)
        if layer in self.latents:
            weights = read_attention(self.sites[layer], get_tensor)
            return made(expanded_weights(weights, self.latents[layer]), owner)
        k, v = made(own(owner), owner)
        if layer in self.value_owners:
            _, v = made(own(self.value_owners[layer]), self.value_owners[layer])
        return k, v


@dataclass(frozen=True)
class _Again:
    """An iterable from a function that makes an iterator: a new one for each loop."""

    make: Callable[[], Iterator[Activations]]

    def __iter__(self) -> Iterator[Activations]:
        return self.make()
