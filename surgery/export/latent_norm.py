"""The RMSNorm that DeepSeek-V3 has on its latents, under a latent that was fitted without one: gains, and channels to
spare that make the norm nearly constant."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..calibration.text import Windows
from ..calibration.visit import noted
from ..runtime.layout import AttentionSite

RMS = 2.0**6
"""Of latents under a calibrated norm: epsilons of 1e-5 and 1e-6 then differ by less than float32 rounds."""
HELD = 2 * 2**30
"""Bytes of inputs that are held at once."""
FEW = 16
"""Tokens of text below which all of them are fitted and compared on."""
STRENGTHS = (0.25, 0.5, 1.0, 2.0)
"""Tried for `_steering`: what the lengths of latents are filled up to, in parts of the largest that a latent has."""


@dataclass(frozen=True)
class CalibratedNorm:
    """A calibrated norm of one layer's latent."""

    gain_R: Tensor
    rows_ED: Tensor
    """Of further channels, which nothing reads but the norm."""
    size: float
    """A power of two that the latents may be multiplied by: the norm undoes it, and what an engine takes for its
    epsilon then does not count."""
    spread: float
    """Of the norm over the last quarter of the text, which the rows are not fitted to: standard deviation by mean."""


def read_by_layers(model: PreTrainedModel, sites: Sequence[AttentionSite], windows: Windows) -> Iterator[Tensor]:
    """What each layer makes its latents of, [tokens, D], float32 on the CPU.

    The model runs once for as many layers as `HELD` bytes hold.
    """
    each = int(windows.mask_BT.sum()) * max(site.hidden_size for site in sites) * model.dtype.itemsize
    count = max(1, HELD // each)
    for start in range(0, len(sites), count):
        found = _read(model, sites[start : start + count], windows)
        while found:
            yield torch.cat(found.pop(0)).float()


@torch.no_grad()
def _read(model: PreTrainedModel, sites: Sequence[AttentionSite], windows: Windows) -> list[list[Tensor]]:
    """By layer: what its `kv_down` reads of each batch, padding left out."""
    kept: list[list[Tensor]] = [[] for _ in sites]
    with ExitStack() as stack:
        modules = (model.get_submodule(f"{site.module}.kv_down") for site in sites)
        seen = [stack.enter_context(noted(module, output=False)) for module in modules]
        for ids, mask in windows.batches():
            model.base_model(input_ids=ids.to(model.device), use_cache=False)
            for of_layer, found in zip(kept, seen, strict=True):
                of_layer.append(found.pop()[mask.to(model.device)].cpu())
    return kept


def largest_latent(x_TD: Tensor, down_RD: Tensor, bias_R: Tensor | None) -> float:
    """The greatest length of a latent that is made of `x_TD`."""
    return max(1e-3, float(torch.nn.functional.linear(x_TD, down_RD, bias_R).norm(dim=-1).max()))


def fit_norm(x_TD: Tensor, down_RD: Tensor, weight_D: Tensor, rank: int) -> CalibratedNorm:
    """The gains with which the normed latents come nearest to the latents: E[c n] / E[n²], n = c / rms(c).

    Args:
        x_TD: what the layer makes its latents of.
        weight_D: of the norm that made `x_TD`.
        rank: of the export; channels beyond R steer the norm.
    """
    x, down = x_TD.double(), down_RD.double()
    c = x @ down.mT
    square, rows = c.square().sum(-1), x.new_zeros(0, x.shape[-1])
    cut = 3 * len(x) // 4
    fitted, held = (slice(cut), slice(cut, None)) if len(x) >= FEW else (slice(None), slice(None))
    spread = _spread(square[held])
    for made in _steering(x[fitted], down, weight_D.double(), rank - len(down)):
        if (found := _spread((square + (x @ made.mT).square().sum(-1))[held])) < spread:
            rows, spread = made, found
    rms = ((square + (x @ rows.mT).square().sum(-1)) / rank).sqrt()[:, None]
    n = c / rms.clamp_min(1e-30)
    gain = (c * n).mean(0) / n.square().mean(0).clamp_min(1e-30)
    size = 2.0 ** round(math.log2(RMS / max(float(rms.median()), 1e-30)))
    return CalibratedNorm(gain.float(), rows.float(), size, spread)


def _spread(square: Tensor) -> float:
    length = square.sqrt()
    return float(length.std(correction=0) / length.mean().clamp_min(1e-30))


def _steering(x_TD: Tensor, down_RD: Tensor, weight_D: Tensor, channels: int) -> Iterator[Tensor]:
    """Rows [channels, D] that make the length of a latent nearly constant, at some strengths.

    The layer reads x = w z with |z|² = D for every token, by its own norm. With rows P where [down; P]ᵀ[down; P] is
    λ diag(w)⁻², the latent's length would be the same for all; `channels` of them reach that on as many principal
    directions of z, which are all of it in a small model and most of it in others.
    """
    channels = min(channels, len(weight_D))
    if channels < 1:
        return
    inverse = torch.where(weight_D.abs() > 1e-6 * weight_D.abs().max(), 1 / weight_D, 0.0)
    z = x_TD * inverse
    basis = torch.linalg.eigh(z.mT @ z)[1][:, -channels:]
    latent = torch.linalg.svd(down_RD * weight_D, full_matrices=False)
    inside = (latent.Vh @ basis) * latent.S[:, None]
    for strength in STRENGTHS:
        missing = strength * latent.S[0] ** 2 * torch.eye(channels, dtype=x_TD.dtype) - inside.mT @ inside
        size, turn = torch.linalg.eigh(missing)
        yield (size.clamp_min(0).sqrt()[:, None] * (basis @ turn).mT) * inverse
