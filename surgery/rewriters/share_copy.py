"""A working copy in which layers make K and V from the input of an earlier layer: what reading its cache amounts to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..anatomy import Anatomy
from ..calibrate import Activations, layer_activations, module_of
from ..runtime.attention import canonical_weights
from ..runtime.layout import AttentionSite, LayerPlan, Project
from ..text import Windows
from ..working_copy import WorkingCopy
from .attention_weights import AttentionWeights, read_attention
from .latent import LatentWeights
from .latent_lowrank import expanded_weights
from .latent_steps import canonical_latent, latent_of
from .reference import causal_heads, project

MAKES_CACHE = ("k_proj", "v_proj", "k_norm", "v_norm", "kv_down")
"""Parameters that a reader does not have."""


class SharedCopy(WorkingCopy):
    """`owners` says which layer reads whose cache.

    A reader's K and V are projected from its owner's input, by the owner's own rows, or from the owner's latent where
    `latents` has one for the layer. This is not the runtime: whole sequences, no cache, the parent's own attention is
    computed too and thrown away.
    """

    def __init__(self, parent: PreTrainedModel, anatomy: Anatomy) -> None:
        super().__init__(parent, anatomy)
        self.owners: dict[int, int] = {}
        self.latents: dict[int, LatentWeights] = {}
        self.inputs: dict[int, Tensor] = {}
        """What q, k and v of each layer were projected from in the last forward pass, [B, T, D]."""
        for site in self.sites.values():
            self.model.get_submodule(module_of(site.q)).register_forward_hook(self._note(site.layer))
            self.model.get_submodule(module_of(site.o)).register_forward_pre_hook(self._exchange(site))

    @property
    def converted(self) -> list[int]:
        return sorted({*super().converted, *self.owners, *self.latents})

    def project(self, layer: int) -> Project:
        if layer in self.latents:
            return latent_of(self.latents[layer], self.sites[layer])
        return super().project(layer)

    def parent(self, layer: int) -> AttentionWeights:
        """The parent's weights of one layer."""
        return read_attention(self.sites[layer], lambda name: self.teacher.get_parameter(name).detach())

    def settle(self, plan: LayerPlan) -> LayerPlan:
        # Also of layers that are as they were: a search may have left them alone.
        return replace(plan, project=self.project(plan.layer), owner=self.owners.get(plan.layer, plan.layer))

    def canonical(self, layer: int) -> dict[str, Tensor]:
        if layer in self.latents:
            site = self.sites[layer]
            found = canonical_latent(self.latents[layer], site, canonical_weights(site, self.tensor))
        else:
            found = super().canonical(layer)
        if layer not in self.owners:
            return found
        return {name: tensor for name, tensor in found.items() if name.split(".")[0] not in MAKES_CACHE}

    def activations(self, layer: int, owner: int, windows: Windows) -> Iterator[tuple[Activations, Tensor]]:
        """`layer_activations`, with the input of the owner's projections in the converted model beside each batch."""
        for a in layer_activations(self, self.sites[layer], windows):
            yield a, self.inputs[owner]

    def outputs(
        self, layer: int, x_BTD: Tensor, x_owner_BTD: Tensor, weights: AttentionWeights | None = None
    ) -> Tensor:
        """Head outputs [B, T, N, V] of `layer` with the queries of `weights` (by default its own)."""
        own = weights or self.read(layer)
        k, v = self.keys_values(layer, x_owner_BTD)
        kv_of = own.kv_of()
        return causal_heads(own, project(own, x_BTD)[0], k[:, kv_of], v[:, kv_of]).transpose(1, 2)

    def keys_values(self, layer: int, x_owner_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """K [B, K, T, H] and V that `layer` reads, as its scores and means see them."""
        return _keys_values(self._source(layer, self.tensor), x_owner_BTD)

    def _source(self, layer: int, get_tensor: Callable[[str], Tensor]) -> AttentionWeights:
        """Weights whose K and V, of the owner's input, are those that `layer` reads."""
        owner = self.owners.get(layer, layer)
        if layer in self.latents:
            return expanded_weights(read_attention(self.sites[layer], get_tensor), self.latents[layer])
        return self._collapsed(owner, read_attention(self.sites[owner], get_tensor))

    def _note(self, layer: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            self.inputs[layer] = args[0].reshape(-1, *args[0].shape[-2:])

        return hook

    def _exchange(self, site: AttentionSite) -> Callable[..., Any]:
        columns = (torch.tensor(site.o.head_rows)[:, None] + torch.arange(site.value_dim)).flatten()

        def attribute(name: str) -> Tensor:
            # Not get_parameter: torch.func puts tensors there that are no parameters.
            module, _, leaf = name.rpartition(".")
            found: Tensor = getattr(self.model.get_submodule(module), leaf)
            return found

        def hook(_: nn.Module, args: tuple[Any, ...]) -> Any:
            layer = site.layer
            if layer not in self.owners and layer not in self.latents:
                return None
            own = self._collapsed(layer, read_attention(site, attribute))
            k, v = _keys_values(self._source(layer, attribute), self.inputs[self.owners.get(layer, layer)])
            kv_of = own.kv_of()
            out = causal_heads(own, project(own, self.inputs[layer])[0], k[:, kv_of], v[:, kv_of])
            out = out.transpose(1, 2).flatten(2)
            made = torch.zeros_like(out).index_copy(-1, columns, out)
            return (made.reshape(args[0].shape), *args[1:])

        return hook


def _keys_values(weights: AttentionWeights, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
    _, k, v = project(weights, x_BTD, torch.tensor([0]))  # the queries are not wanted
    return k, v
