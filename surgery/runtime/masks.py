"""Read the mask of a gated attention: which tokens are padding, and where the others stand.

Tokens are averaged or leave by what came before them in their sequence. So a mask must describe sequences: causality,
padding anywhere, and, without a cache, documents side by side. All else is refused: decisions would not follow it, and
a cache cannot give back what it let go.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

HIDDEN = -1e4
"""Additive masks hide what they add this to, or less: its weight is 0 in every float type."""
Claim = tuple[Tensor, str]
"""What must hold, a bool without dimensions, and what is the matter where it does not."""


@dataclass(frozen=True, kw_only=True)
class WholeMask:
    """Of sequences that came at once, without a cache."""

    visible_B1TT: Tensor
    """bool, True is visible."""
    real_BT: Tensor
    """False at padding."""
    order_BT: Tensor
    """Tokens before each one in its sequence; at padding that of the newest token before it, -1 where there is none."""
    has_holes: Tensor
    """bool without dimensions: padding stands between the tokens of a sequence."""
    claims: Sequence[Claim]


def read_whole(where: str, mask: Tensor, true_hides: bool, batch: int, tokens: int) -> WholeMask:
    """Read a mask [B or 1, 1, T, T], bool or additive.

    Args:
        where: the layer, for messages.
        true_hides: what True of a boolean mask means.

    Raises:
        ValueError: its shape or its type is another.
    """
    seen_B1TT, claims = _visible(where, mask, true_hides, batch, tokens, tokens)
    seen, places = seen_B1TT[:, 0], torch.arange(tokens, device=mask.device)
    real = seen.diagonal(dim1=-2, dim2=-1)  # a token sees itself, and padding does not
    start = torch.where(seen.any(-1), seen.int().argmax(-1), tokens)  # the first one that it sees
    newest = torch.where(real, places, -1).cummax(-1).values
    before = torch.nn.functional.pad(newest[:, :-1], (1, 0), value=-1)
    goes_on = (before >= 0) & (start == start.gather(-1, before.clamp_min(0)))
    of_sequence = real[:, None] & (places >= start[..., None]) & (places <= places[:, None])
    follows = (of_sequence == seen).all(-1) & (goes_on | (start == places))
    order = seen.sum(-1) - 1
    return WholeMask(
        visible_B1TT=seen_B1TT,
        real_BT=real,
        order_BT=order,
        has_holes=(real & (order != places - start)).any(),
        claims=[*claims, ((follows | ~real).all(), "it is not causality with padding and documents side by side")],
    )


def read_chunk(
    where: str, mask: Tensor, true_hides: bool, tokens: int, past: int | Tensor, counted_B: Tensor
) -> tuple[Tensor, Sequence[Claim]]:
    """Which of the new tokens are not padding [B, T], by a mask [B or 1, 1, T, S], bool or additive.

    Args:
        past: places that the cache has seen before, padding included.
        counted_B: tokens in the cache, padding left out.

    Raises:
        ValueError: as `read_whole`.
    """
    least = past + tokens if isinstance(past, int) else tokens
    seen_B1TS, claims = _visible(where, mask, true_hides, len(counted_B), tokens, least)
    seen, places = seen_B1TS[:, 0], torch.arange(tokens, device=mask.device)
    # What goes beyond a static cache has no places in its mask, and is refused where it is written.
    too_long = torch.as_tensor(past + tokens > seen.shape[-1], device=mask.device)
    new = seen.index_select(-1, (past + places).clamp_max(seen.shape[-1] - 1))
    real = new.diagonal(dim1=-2, dim2=-1)
    causal = (new == (real[:, None] & (places <= places[:, None]))).all(-1)
    all_there = seen.sum(-1) == counted_B[:, None] + real.cumsum(-1)
    return real, [
        *claims,
        ((causal | ~real | too_long).all(), "among the new tokens it is not causality with padding"),
        ((all_there | ~real | too_long).all(), "it hides cached tokens, or shows what was padding when it came"),
    ]


def settle(where: str, claims: Sequence[Claim], question: Tensor) -> bool:
    """Refuse a mask that breaks a claim, and answer a question (a bool without dimensions); asks the device once.

    In compiled steps the device asserts the claims, and the answer is True.

    Raises:
        ValueError: says which mask would do.
    """
    if torch.compiler.is_compiling():
        for holds, matter in claims:
            torch._assert_async(holds, f"{where}: the attention mask cannot be followed: {matter}")
        return True
    answers: list[bool] = torch.stack([*(holds for holds, _ in claims), question]).tolist()
    for held, (_, matter) in zip(answers, claims, strict=False):
        if not held:
            raise ValueError(
                f"{where}: its tokens are averaged or leave, and the attention mask that came cannot be followed: "
                f"{matter}. Give a mask [batch, tokens] that is 0 at padding, the same in all calls with one cache, "
                "or none. "
                "Models converted without dms, dmc and evict take any mask."
            )
    return answers[-1]


def real_of_new(mask: Tensor, past: int | Tensor, tokens: int, batch: int) -> Tensor | None:
    """[B, T] of new tokens, False at padding; None where none is, as far as is known without asking the device.

    A token that does not see itself is padding.

    Args:
        mask: [B, S] of which 0 is padding, or of four dimensions, bool (True is visible) or additive.
        past: tokens that the cache has seen before, padding included; a tensor where they are counted on the device.
    """
    at = past + torch.arange(tokens, device=mask.device)
    if isinstance(past, Tensor):
        at = at.clamp_max(mask.shape[-1] - 1)  # what goes beyond is refused where it is written
    elif mask.shape[-1] < past + tokens:
        raise ValueError(f"an attention mask of shape {tuple(mask.shape)} came with {past} + {tokens} tokens")
    if mask.ndim == 4:
        seen = mask if mask.dtype == torch.bool else mask > HIDDEN
        real = seen[:, 0, -tokens:].index_select(-1, at).diagonal(dim1=-2, dim2=-1)
    else:
        real = mask.index_select(-1, at) != 0
    if isinstance(past, int) and bool(real.all()):
        return None
    return real.expand(batch, -1)


def _visible(
    where: str, mask: Tensor, true_hides: bool, batch: int, tokens: int, least: int
) -> tuple[Tensor, list[Claim]]:
    """[B, 1, T, S] bool, True is visible."""
    shape = tuple(mask.shape)
    if len(shape) != 4 or shape[0] not in (1, batch) or shape[1:3] != (1, tokens) or shape[3] < least:
        raise ValueError(
            f"{where}: an attention mask of shape {shape} came with {batch} x {tokens} new tokens; where tokens merge "
            f"or leave it must be [batch, tokens] or [batch, 1, {tokens}, {least}]"
        )
    if mask.dtype == torch.bool:
        return (~mask if true_hides else mask).expand(batch, -1, -1, -1), []
    if not mask.is_floating_point():
        raise ValueError(f"{where}: an attention mask of {mask.dtype} came; of four dimensions it is bool or additive")
    seen = mask == 0
    plain = (seen | (mask <= HIDDEN)).all()
    return seen.expand(batch, -1, -1, -1), [(plain, "it adds numbers to the scores, rather than hiding tokens")]
