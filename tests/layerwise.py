"""What tests of calibration share: random text, a working copy, and damage done to one of its layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from surgery.anatomy import examine
from surgery.attention.forward import attend
from surgery.attention.latent import LatentWeights, latent_outputs
from surgery.attention.weights import AttentionWeights
from surgery.calibration.text import Windows
from surgery.calibration.visit import Activations
from surgery.calibration.working_copy import WorkingCopy


def random_windows(windows: int = 10, length: int = 20, cut: bool = True) -> Windows:
    """Random text; with `cut`, one window is shorter than the others."""
    ids = torch.randint(3, 96, (windows, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids, dtype=torch.bool)
    if cut:
        mask[1, length - 6 :] = False
    return Windows(ids, mask, f"random {windows} {length} {cut}")


def copy_of(model: PreTrainedModel) -> WorkingCopy:
    return WorkingCopy(model, examine(model))


def damage(copy: WorkingCopy, layer: int) -> None:
    """Halve queries and outputs, and let values change places where there are several."""
    w = copy.read(layer)
    copy.write(layer, replace(w, q_NHD=w.q_NHD / 2, o_DNV=w.o_DNV / 2, v_KVD=w.v_KVD.flip(0)))


class LoneVisit:
    """What fits ask of a visit, for an attention that stands in no model, and of its working copy.

    Args:
        batches: what the attention reads, in parent and student alike, and the mask of real tokens.
        latent: what makes K and V; None: the weights themselves.
        site: of the attention, as far as it is asked for.
    """

    layer = 0

    def __init__(
        self,
        parent: AttentionWeights,
        batches: Sequence[tuple[Tensor, Tensor]],
        latent: LatentWeights | None = None,
        site: Any = None,
    ) -> None:
        self.latent, self.weights, self.copy = latent, parent, self
        self.site = site or SimpleNamespace(
            clip_qkv=None, gated_output=False, q_norm=None, softcap=None, v_norm=None, layer=0
        )
        self.tokens = sum(int(mask.sum()) for _, mask in batches)
        self._batches = [
            Activations(x, x, torch.einsum("btnv,dnv->btd", attend(parent, x).out_BTNV, parent.o_DNV), mask, {0: x})
            for x, mask in batches
        ]
        self.asked = 0
        """How often something was read of the text."""

    def activations(self, tokens: int | None = None, sources: Iterable[int] = ()) -> Iterator[Activations]:
        """All batches."""
        self.asked += 1
        yield from self._batches

    def inputs(self, tokens: int | None = None) -> Iterator[Tensor]:
        """What real tokens give to the projections."""
        for a in self.activations():
            yield a.x_student_BTD[a.mask_BT]

    def error(self, batches: int | None = None) -> float:
        """Of the attention's output."""
        self.asked += 1
        total = 0.0
        for a in self._batches:
            found = torch.einsum("btnv,dnv->btd", self.head_outputs(0, a.inputs), self.weights.o_DNV)
            total += float((found - a.wanted_BTD)[a.mask_BT].square().sum())
        return total

    def read(self, layer: int) -> AttentionWeights:
        """The weights that were written last."""
        return self.weights

    def write(self, layer: int, weights: AttentionWeights) -> None:
        """Exchange the weights."""
        self.weights = weights

    def head_outputs(self, layer: int, inputs: Any, weights: AttentionWeights | None = None) -> Tensor:
        """[B, T, N, V]"""
        own = self.weights if weights is None else weights
        return attend(own, inputs[0]).out_BTNV if self.latent is None else latent_outputs(own, self.latent, inputs[0])
