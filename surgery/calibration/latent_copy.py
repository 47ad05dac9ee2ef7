"""A working copy whose attentions are computed in latent form: for calibration, searches and measurements."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..anatomy import Anatomy
from ..attention.weights import AttentionWeights, read_attention
from ..rewriters.latent.weights import LatentWeights, check_latent, latent_outputs
from .exchanging_copy import ExchangingCopy
from .outputs import answers, distance
from .streams import Streams, streams_of
from .text import Windows
from .working_copy import HELD_NUMBERS


class LatentCopy(ExchangingCopy):
    """`latents` has the layers in latent form; K and V of the copy's own weights are the parent's and unused there."""

    def __init__(self, parent: PreTrainedModel, anatomy: Anatomy) -> None:
        super().__init__(parent, anatomy)
        self.latents: dict[int, LatentWeights] = {}
        self.choice: int | None = None
        """Index of the candidate that the last layer chose: where the search of the next one starts."""
        self._streams: dict[str, Streams | None] = {}

    def computes(self, layer: int) -> bool:
        return layer in self.latents

    def head_outputs(self, layer: int, get_tensor: Callable[[str], Tensor]) -> Tensor:
        return latent_outputs(read_attention(self.sites[layer], get_tensor), self.latents[layer], self.inputs[layer])

    def parent(self, layer: int) -> AttentionWeights:
        """The parent's weights of one layer.

        Raises:
            UnsupportedModel: no latent can stand for this attention.
        """
        site = self.sites[layer]
        found = read_attention(site, lambda name: self.teacher.get_parameter(name).detach())
        check_latent(found, site, rotate_on_read=True)
        return found

    def write_latent(self, layer: int, latent: LatentWeights, weights: AttentionWeights | None = None) -> None:
        """Run the layer in latent form, with q and o of `weights` if given."""
        self._streams = {d: s for d, s in self._streams.items() if s is None or s.layer <= layer}
        self.latents[layer] = latent.to(torch.float32)
        if weights is not None:
            self._put(layer, weights)

    def restore(self, state: dict[str, Tensor]) -> None:
        self.forget_streams()
        super().restore(state)

    def forget_streams(self) -> None:
        """To be called where weights of the copy were changed other than by `write_latent`."""
        self._streams.clear()

    def streams(self, windows: Windows, layer: int) -> Streams | None:
        """Both models' residual streams on `windows`, brought to before `layer`; None where they cannot be kept."""
        known = self._streams.get(windows.digest)
        if windows.digest not in self._streams or (known is not None and known.layer > layer):
            known = self._streams[windows.digest] = streams_of(self, windows, HELD_NUMBERS)
        if known is not None:
            known.move(layer)
        return known

    @torch.no_grad()
    def divergence(self, windows: Windows, layer: int | None = None, batches: int | None = None) -> float:
        """As `WorkingCopy.divergence`.

        Args:
            layer: the only layer that changes between calls: the layers before it are then not run again.
            batches: only so many batches of windows.
        """
        streams = None if layer is None else self.streams(windows, layer)
        found = (answers(self.model, *batch) for batch in windows.batches()) if streams is None else streams.answers()
        total, tokens = 0.0, 0
        for target, answer in itertools.islice(zip(self.wanted(windows), found, strict=True), batches):
            total += float(distance(self.model, answer, target))
            tokens += len(answer)
        return total / tokens
