"""A working copy whose attentions are computed in latent form: for calibration, searches and measurements.

This is not the runtime: it has no cache, it runs whole sequences, and the parent's own attention is computed too and
thrown away. What it buys is that every family runs, at any layer, without a module or a class being replaced: a hook
on the projection of q notes its input, one before `o` exchanges what `o` reads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..anatomy import Anatomy
from ..calibrate import module_of
from ..errors import UnsupportedModel
from ..runtime.layout import AttentionSite
from ..text import Windows
from ..working_copy import WorkingCopy
from .attention_weights import AttentionWeights, read_attention, write_attention
from .latent import LatentWeights, check_latent, latent_outputs


class LatentCopy(WorkingCopy):
    """`latents` has the layers in latent form; K and V of the copy's own weights are the parent's and unused there."""

    def __init__(self, parent: PreTrainedModel, anatomy: Anatomy) -> None:
        super().__init__(parent, anatomy)
        self.latents: dict[int, LatentWeights] = {}
        self._inputs: dict[int, Tensor] = {}
        self._targets: dict[str, list[Tensor]] = {}
        for site in self.sites.values():
            self.model.get_submodule(module_of(site.q)).register_forward_hook(self._note(site.layer))
            self.model.get_submodule(module_of(site.o)).register_forward_pre_hook(self._exchange(site))

    def parent(self, layer: int) -> AttentionWeights:
        """The parent's weights of one layer.

        Raises:
            UnsupportedModel: no latent can stand for this attention.
        """
        site = self.sites[layer]
        if site.gated_output:
            raise UnsupportedModel(f"layer {layer}: the head outputs are gated before o; this copy computes no gates.")
        found = read_attention(site, lambda name: self.teacher.get_parameter(name).detach())
        check_latent(found, site, rotate_on_read=True)
        return found

    def write_latent(self, layer: int, latent: LatentWeights, weights: AttentionWeights | None = None) -> None:
        """Run the layer in latent form, with q and o of `weights` if given."""
        self.latents[layer] = latent.to(torch.float32)
        if weights is not None:
            with torch.no_grad():
                for name, value in write_attention(weights, self.sites[layer], self.tensor).items():
                    self.model.get_parameter(name).copy_(value)

    @torch.no_grad()
    def divergence(self, windows: Windows) -> float:
        """KL(parent || copy) in nats per token; the parent's answers to these windows are kept for the next call."""
        known = self._targets.setdefault(windows.digest, [])
        total = 0.0
        for i, (ids, mask) in enumerate(windows.batches()):
            if i == len(known):
                known.append(self.teacher(input_ids=ids, use_cache=False).logits[mask].log_softmax(-1))
            found = self.model(input_ids=ids, use_cache=False).logits[mask].log_softmax(-1)
            total += float(F.kl_div(found, known[i], reduction="sum", log_target=True))
        return total / windows.tokens

    def _note(self, layer: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if layer in self.latents:
                self._inputs[layer] = args[0]

        return hook

    def _exchange(self, site: AttentionSite) -> Callable[..., Any]:
        columns = (torch.tensor(site.o.head_rows)[:, None] + torch.arange(site.value_dim)).flatten()

        def attribute(name: str) -> Tensor:
            # Not get_parameter: torch.func puts tensors there that are no parameters.
            module, _, leaf = name.rpartition(".")
            found: Tensor = getattr(self.model.get_submodule(module), leaf)
            return found

        def hook(_: nn.Module, args: tuple[Any, ...]) -> Any:
            latent = self.latents.get(site.layer)
            if latent is None:
                return None
            x = self._inputs.pop(site.layer)
            out = latent_outputs(read_attention(site, attribute), latent, x).flatten(2)
            made = torch.zeros_like(out).index_copy(-1, columns, out)
            return (made.reshape(args[0].shape), *args[1:])

        return hook
