"""Reading less than there is: which slots a step of one token reads, while all of them stay in memory.

What is read is chosen for each KV head, by all query heads that read it. Prompts and chunks read everything.
"""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .paged_cache import PagedLayer


class Few(NamedTuple):
    """Some slots, and what stands for the others."""

    key_BKSH: Tensor
    value_BKSV: Tensor
    there_BKS: Tensor
    part_BN: Tensor
    """Weight of the mean over these slots."""
    rest_BKV: Tensor
    """What has the rest of the weight."""


class Query(NamedTuple):
    """Of one token."""

    q_BNH: Tensor
    """Rotated, float32."""
    head_of_N: Tensor
    """KV head of each query head."""
    slots_BK: Tensor
    """Slots to be read of each KV head."""
    scale: float


class Reader(Protocol):
    """One rule."""

    describes: str
    """What is read, and the source, for people."""
    plain: bool = False
    """Whether it foretells weights of slots, and knows nothing of soft caps and sinks."""

    def state(self, key_BKTH: Tensor, value_BKTV: Tensor) -> dict[str, Tensor]:
        """Entries of the layer's `state` that `note` writes, of no slots."""
        raise NotImplementedError

    def bytes_beside(self, table: int, heads: int, width: int, itemsize: int) -> int:
        """Bytes of these, for one sequence.

        Args:
            table: pages that a head has room for.
            width: numbers of a key, and of a value.
        """
        raise NotImplementedError

    def note(self, layer: PagedLayer, came_B: Tensor | None = None) -> None:
        """Bring them up to date with the slots that are there.

        Args:
            came_B: the sequences to which one token came since; None: all slots may have changed.
        """
        raise NotImplementedError

    def choose(self, layer: PagedLayer, query: Query) -> tuple[Tensor, Tensor] | Few:
        """Tables [B, K, M] and lengths [B, K] of the pages that are read, or single slots."""
        raise NotImplementedError


class Quest(Reader):
    """The pages whose keys may get the largest scores, as far as the least and largest number of each channel tell.

    The first page and the newest one are always read. The authors choose pages for each query head; where heads share
    keys, the largest of their bounds counts here, so that a page is read once for all of them.
    """

    describes = "steps read the pages that may get the largest scores (Quest, arXiv:2406.10774)"

    def state(self, key_BKTH: Tensor, value_BKTV: Tensor) -> dict[str, Tensor]:
        B, K, _, H = key_BKTH.shape
        return {name: key_BKTH.new_zeros(B, K, 0, H) for name in ("least", "largest")}

    def bytes_beside(self, table: int, heads: int, width: int, itemsize: int) -> int:
        return 2 * heads * table * width * itemsize

    def note(self, layer: PagedLayer, came_B: Tensor | None = None) -> None:
        pages, page = layer.tables.long(), layer.retain.page
        if came_B is not None:
            at = ((layer.lengths - 1).clamp_min(0) // page).long()[..., None]
            pages = pages.gather(2, at)
        else:
            at = torch.arange(pages.shape[2], device=pages.device).expand_as(pages)
        keys = layer.pool.keys[pages]  # [B, K, m, page, H]
        slot = at[..., None] * page + torch.arange(page, device=pages.device)
        nowhere, most = (slot >= layer.lengths[..., None, None])[..., None], torch.finfo(keys.dtype).max
        width = layer.tables.shape[2]
        for name, found in (
            ("least", keys.masked_fill(nowhere, most).amin(3)),
            ("largest", keys.masked_fill(nowhere, -most).amax(3)),
        ):
            known = layer.state[name][:, :, :width]
            known = torch.nn.functional.pad(known, (0, 0, 0, width - known.shape[2]))
            layer.state[name] = known.scatter(2, at[..., None].expand_as(found), found)

    def choose(self, layer: PagedLayer, query: Query) -> tuple[Tensor, Tensor]:
        page, lengths, tables = layer.retain.page, layer.lengths, layer.tables
        held = (lengths + page - 1) // page
        wanted = torch.minimum(((query.slots_BK + page - 1) // page).clamp_min(2), held)
        most = max(1, int(wanted.max()))
        if most >= tables.shape[2]:
            return tables, lengths
        q, least, largest = query.q_BNH, layer.state["least"].float(), layer.state["largest"].float()
        bound_BNM = _by_head(q.clamp_min(0), largest, query) + _by_head(q.clamp_max(0), least, query)
        bound = _most(bound_BNM, query.head_of_N, tables.shape[1])
        place = torch.arange(tables.shape[2], device=q.device)
        bound = bound.masked_fill((place == 0) | (place == (held - 1)[..., None]), torch.inf)
        bound = bound.masked_fill(place >= held[..., None], -torch.inf)
        order = torch.argsort(bound, dim=-1, descending=True, stable=True)[..., :most]
        # In the order of the text, so that the newest page, which may not be full, is the last of those that count.
        beyond = torch.arange(most, device=q.device) >= wanted[..., None]
        chosen = order.masked_fill(beyond, tables.shape[2]).sort(-1).values.clamp_max(tables.shape[2] - 1)
        in_last = lengths - (held - 1) * page
        return tables.gather(2, chosen), ((wanted - 1) * page + in_last).clamp_min(0).to(lengths.dtype)


class Sparq(Reader):
    """The slots with the largest scores by the largest channels of the query alone, a quarter of them; what the others
    would get goes to the mean of all values.

    Where heads share keys, channels are those with the largest sum over them, and so are slots, as published. The
    authors hold keys twice, channel by channel as well, so that a GPU reads whole lines.
    """

    describes = "steps read some channels of keys, and slots with the largest scores by those (SparQ, arXiv:2312.04985)"
    plain = True
    channels = 0.25

    def state(self, key_BKTH: Tensor, value_BKTV: Tensor) -> dict[str, Tensor]:
        B, K, _, V = value_BKTV.shape
        return {"value_sum": value_BKTV.new_zeros(B, K, V, dtype=torch.float32)}

    def bytes_beside(self, table: int, heads: int, width: int, itemsize: int) -> int:
        return 4 * heads * width

    def note(self, layer: PagedLayer, came_B: Tensor | None = None) -> None:
        sums, page = layer.state["value_sum"], layer.retain.page
        if came_B is None:
            _, value, there = layer.side_by_side()
            sums.copy_(value.float().masked_fill(~there[..., None], 0.0).sum(2))
            return
        place = (layer.lengths - 1).clamp_min(0).long()
        number = layer.tables.gather(2, (place // page)[..., None])[..., 0].long()
        sums += layer.pool.values[number, place % page].float().masked_fill(~came_B[:, None, None], 0.0)

    def choose(self, layer: PagedLayer, query: Query) -> Few:
        page, (K, M) = layer.retain.page, layer.tables.shape[1:]
        q, heads = query.q_BNH, query.head_of_N
        B, H = len(q), q.shape[2]
        count = max(1, ceil(self.channels * H))
        size_BKH = torch.zeros(B, K, H, device=q.device).index_add_(1, heads, q.abs())
        channels = size_BKH.topk(count, dim=-1).indices
        pages, slot = layer.tables.long(), torch.arange(page, device=q.device)
        some = layer.pool.keys[pages[..., None, None], slot[:, None], channels[:, :, None, None]].flatten(2, 3).float()
        picked = q.gather(2, channels.index_select(1, heads))
        scale = query.scale * (q.abs().sum(-1) / picked.abs().sum(-1).clamp_min(1e-30)).sqrt()
        there = torch.arange(M * page, device=q.device) < layer.lengths[..., None]
        logits = _by_head(picked, some, query) * scale[..., None]
        weights = logits.masked_fill(~there.index_select(1, heads), torch.finfo(torch.float32).min).softmax(-1)
        mean = torch.zeros(B, K, M * page, device=q.device).index_add_(1, heads, weights)
        newest = torch.arange(M * page, device=q.device) >= (layer.lengths - (layer.retain.window or 0))[..., None]
        first = torch.arange(M * page, device=q.device) < layer.retain.sinks
        score = mean.masked_fill((newest | first) & there, torch.inf).masked_fill(~there, -1.0)
        wanted = torch.minimum(query.slots_BK, layer.lengths)
        best = score.topk(min(M * page, max(1, int(wanted.max()))), dim=-1).indices
        taken = torch.arange(best.shape[2], device=q.device) < wanted[..., None]
        number, at = pages.gather(2, best // page), best % page
        part = (weights.gather(2, best.index_select(1, heads)) * taken.index_select(1, heads)).sum(-1)
        rest = layer.state["value_sum"] / layer.lengths.clamp_min(1)[..., None]
        return Few(layer.pool.keys[number, at], layer.pool.values[number, at], taken, part, rest)


def _by_head(q_BNR: Tensor, x_BKSR: Tensor, query: Query) -> Tensor:
    """[B, N, S]: products of each query head with the rows of its KV head."""
    K, N = x_BKSR.shape[1], q_BNR.shape[1]
    if N % K == 0 and bool((query.head_of_N == torch.arange(N, device=q_BNR.device) * K // N).all()):
        return (q_BNR.unflatten(1, (K, -1)) @ x_BKSR.mT).flatten(1, 2)
    return (q_BNR[:, :, None] @ x_BKSR.index_select(1, query.head_of_N).mT)[:, :, 0]


def _most(x_BNM: Tensor, head_of_N: Tensor, heads: int) -> Tensor:
    """[B, K, M]: the largest over the query heads of each KV head."""
    found = x_BNM.new_full((len(x_BNM), heads, x_BNM.shape[2]), -torch.inf)
    return found.scatter_reduce(1, head_of_N[None, :, None].expand_as(x_BNM), x_BNM, "amax")


READERS: dict[str, Reader] = {"quest": Quest(), "sparq": Sparq()}
"""Name in recipes and plans -> rule."""
