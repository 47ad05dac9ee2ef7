"""`attn_implementation="surgery"`: one new token reads the live part of a cache once; more tokens go through sdpa.

Decoding goes through the operators of `surgery.kernels`, Triton on a GPU and packed sdpa on a CPU. Where that package
is absent, as it may be beside an exported model, the name is not registered and transformers refuses it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

try:
    from surgery.kernels import quant_format as quant_format
    from surgery.kernels.decode_gqa import decode_gqa
    from surgery.kernels.decode_latent import decode_latent
    from surgery.kernels.decode_quant import decode_quant
    from surgery.kernels.decode_ragged import decode_ragged
    from surgery.kernels.launching import device_of
    from surgery.kernels.merge_append import merge_append_
    from surgery.kernels.ragged_schedule import programs_for, ragged_schedule

    AVAILABLE = True
except ImportError:
    AVAILABLE = False

NAME = "surgery"


def surgery_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [B, N, T, H], key and value [B, K, S, .]; returns [B, T, N, V]. For any model of transformers.

    Raises:
        ValueError: soft caps and sinks run with attn_implementation "eager".
    """
    if softcap is not None or s_aux is not None:
        raise ValueError(f"soft caps and sinks run with attn_implementation 'eager', not {NAME!r}")
    if not decodes(query, attention_mask, dropout):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    lengths, visible = live(attention_mask, len(query))
    out, _ = decode_gqa(query[:, :, 0], key, value, lengths, scale, visible)
    return out[:, None], None


def latent_attention_forward(
    query: Tensor, cached: Tensor, attention_mask: Tensor | None, scaling: float, rank: int
) -> Tensor:
    """query [B, N, 1, W] in the space of the cached entries [B, 1, S, W]; the mean of their latents [B, 1, N, R]."""
    lengths, visible = live(attention_mask, len(query))
    out, _ = decode_latent(query[:, :, 0], cached, lengths, scaling, rank, visible)
    return out[:, None]


def ragged_attention_forward(
    query_BNH: Tensor, keys: Tensor, values: Tensor, tables_BKM: Tensor, lengths_BK: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """[B, N, V] of one new token against slots in pages [P, page, .], of which each KV head has its own number, and the
    log-sum-exp of its scores [B, N]."""
    rows = lengths_BK.numel()
    if query_BNH.is_cuda:
        programs = programs_for(device_of(query_BNH))
        plan = ragged_schedule(lengths_BK[None], programs, keys.shape[1])[0]
    else:
        plan = lengths_BK.new_empty(rows + 3)  # only a GPU shares the work out
    found: tuple[Tensor, Tensor] = decode_ragged(query_BNH, keys, values, tables_BKM, lengths_BK, plan, scaling)
    return found


def packed_attention_forward(
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    packed: Tensor,
    bits: int,
    group: int,
    query_BNH: Tensor,
    visible_BP: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """The mean of packed values [B, N, V] and the log-sum-exp of the scores [B, N] of one new token.

    Args:
        keys: words, scale and low of all groups that there is room for, as `values`.
        packed: tokens of them that are there, of all sequences alike.
        visible_BP: which of those that there is room for are to be seen.
    """
    B, K = keys[0].shape[:2]
    planes = query_BNH.shape[-1] // keys[0].shape[-1]
    none = (query_BNH.new_empty(B, K, group, words.shape[-1] * planes) for words in (keys[0], values[0]))
    lengths = packed.int().expand(B).contiguous()
    found: tuple[Tensor, Tensor] = decode_quant(query_BNH, *keys, *values, *none, lengths, bits, scaling, visible_BP)
    return found


def merge_append_forward(
    key_BKH: Tensor,
    value_BKV: Tensor,
    merges_BK: Tensor,
    weight_BK: Tensor,
    angles: tuple[Tensor, Tensor, bool, int],
    tables_BKM: Tensor,
    keys: Tensor,
    values: Tensor,
    state: dict[str, Tensor],
) -> None:
    """Merge one token into the newest slot of each KV head or append it; all of `state` moves on.

    `angles`: cos and sin [B or 1, 1, F], whether pairs are interleaved, the first channel that turns.
    """
    cos, sin, interleaved, start = angles
    cos, sin = (t[:, 0].contiguous().expand(len(key_BKH), -1) for t in (cos, sin))
    no_queries = key_BKH[:, :0]
    merge_append_(
        no_queries, key_BKH, value_BKV, merges_BK, weight_BK.contiguous(), cos, sin, tables_BKM, keys, values,
        state["sums_k"], state["sums_v"], state["z"], state["lengths"], interleaved, start,
    )  # fmt: skip


def decodes(query: Tensor, mask: Tensor | None, dropout: float = 0.0) -> bool:
    """Whether the operators can serve: one token, no gradient, and a mask that says yes or no to all heads alike."""
    plain = mask is None or (mask.dtype == torch.bool and mask.shape[1] == 1)
    return query.shape[2] == 1 and plain and not dropout and not query.requires_grad


def live(mask: Tensor | None, batch: int) -> tuple[Tensor | None, Tensor | None]:
    """Live length [B], behind which nothing is visible, and what is visible before it [B, S], of [B or 1, 1, 1, S]."""
    if mask is None:
        return None, None
    visible = mask[:, 0, 0].expand(batch, -1)
    places = torch.arange(1, visible.shape[1] + 1, device=mask.device, dtype=torch.int32)
    return (visible * places).amax(-1), visible


if AVAILABLE:
    AttentionInterface.register(NAME, surgery_attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
