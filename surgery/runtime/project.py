"""Project axis: how K and V are made from the layer's input, and what of them one token adds to the cache."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, Literal, Protocol

from .site import AttentionSite


class Project(Protocol):
    """A value of the axis. `PROJECTS` names its class by `kind`, `modeling.ATTENTIONS` the module that runs it."""

    @property
    def kind(self) -> str:
        """Name of the form."""

    @property
    def kv_heads(self) -> int:
        """KV heads that query heads read, whether cached as they are or made at read."""

    @property
    def head_dim(self) -> int:
        """Width of a key."""

    @property
    def value_dim(self) -> int:
        """Width of a value."""

    @property
    def dims(self) -> int:
        """Numbers per cached token, positions not counted."""

    def label(self) -> str:
        """A few words for tables."""

    def supports(self, site: AttentionSite) -> str | None:
        """Why this attention cannot be given the value; None where it can."""

    def entry(self, itemsize: int) -> tuple[int, int, int]:
        """Heads, width of keys and width of values of one token in a cache of numbers of `itemsize` bytes."""

    def shapes(self, site: AttentionSite, owns_cache: bool = True) -> dict[str, tuple[int, ...]]:
        """Shape by name of the weights that make K and V; biases and gains are not among them."""

    def parameters(self, site: AttentionSite, absent: tuple[str, ...]) -> int:
        """Parameters that make K and V, biases included; none of modules in `absent` (see `LayerPlan.absent`)."""


@dataclass(frozen=True, kw_only=True)
class Heads:
    """K and V heads of full width. `groups[a]` lists the query heads that read KV head `a`."""

    kv_heads: int
    head_dim: int
    value_dim: int
    groups: tuple[tuple[int, ...], ...]
    kind: Literal["heads"] = "heads"

    @classmethod
    def of(cls, site: AttentionSite, kv_heads: int | None = None, sizes: tuple[int, ...] | None = None) -> Heads:
        """Consecutive groups of query heads: those of the parent, or `kv_heads` of them as even as can be.

        Args:
            sizes: query heads of each group, where they are not to be even.
        """
        kv_heads = site.kv_heads if kv_heads is None else kv_heads
        if sizes is None:
            sizes = tuple(site.heads // kv_heads + (i < site.heads % kv_heads) for i in range(kv_heads))
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        groups = tuple(tuple(range(start, start + size)) for start, size in zip(starts, sizes, strict=True))
        return cls(kv_heads=kv_heads, head_dim=site.head_dim, value_dim=site.value_dim, groups=groups)

    @property
    def dims(self) -> int:
        """Numbers per cached token."""
        return self.kv_heads * (self.head_dim + self.value_dim)

    @property
    def is_uniform(self) -> bool:
        """True where every group has the same size and holds consecutive query heads: what `repeat_kv` undoes."""
        size = len(self.groups[0])
        return all(g == tuple(range(i * size, (i + 1) * size)) for i, g in enumerate(self.groups))

    def label(self) -> str:
        """Number of KV heads, and the sizes of their groups where these differ."""
        sizes = sorted({len(group) for group in self.groups})
        uneven = "" if len(sizes) == 1 else f" ({'/'.join(map(str, sizes))} q each)"
        return f"{self.kv_heads}{uneven}"

    def supports(self, site: AttentionSite) -> str | None:
        """Every attention caches heads."""
        return None

    def entry(self, itemsize: int) -> tuple[int, int, int]:
        """KV heads, and the widths of a key and a value."""
        return self.kv_heads, self.head_dim, self.value_dim

    def shapes(self, site: AttentionSite, owns_cache: bool = True) -> dict[str, tuple[int, ...]]:
        """Of `k_proj` and `v_proj`."""
        D = site.hidden_size
        return {
            "k_proj.weight": (self.kv_heads * self.head_dim, D),
            "v_proj.weight": (self.kv_heads * self.value_dim, D),
        }

    def parameters(self, site: AttentionSite, absent: tuple[str, ...]) -> int:
        """Of the projections that are not in `absent`."""
        return sum(
            self.kv_heads * width * (site.hidden_size + (projection.bias is not None))
            for name, projection, width in (("k_proj", site.k, self.head_dim), ("v_proj", site.v, self.value_dim))
            if name not in absent
        )


@dataclass(frozen=True, kw_only=True)
class Latent:
    """One latent per token from which K and V of every head are made, and a rotated part beside it.

    Where `rotate_on_read` is False (MLA, arXiv:2405.04434) the cache holds the latent c, which never turns, and the
    rotated key part k_r that all heads share; decoding maps queries into the latent space and expands nothing. Where
    it is True (Palu, arXiv:2407.21118, and EigenAttention) the cache holds c alone: K is made from it at read and then
    rotated as the parent rotates it, at the position that is cached beside c. Query head h reads KV head
    h // (N / kv_heads), as in the parent.
    """

    rank: int
    """R: cached numbers that never turn."""
    rope_dims: int
    """Cached numbers that are rotated before they are stored; even."""
    kv_heads: int
    """Of the parent, as `head_dim` and `value_dim`: the shapes of the maps from the latent to K and V."""
    head_dim: int
    value_dim: int
    rotate_on_read: bool = False
    k_rank: int | None = None
    """Set where K and V have latents of their own: K reads the first `k_rank` numbers of c, V the others."""
    means: bool = False
    """The latents carry K and V without their means: K's is added at read (`k_mean`), V's is in the bias of o."""
    keeps_positions: bool = False
    """Whether positions of tokens take bytes beside c: where K is rotated at read. They are cached there in any case;
    plans written before that was so do not count them."""
    kind: Literal["latent"] = "latent"

    @classmethod
    def of(cls, site: AttentionSite, rank: int, rope_dims: int, *, rotate_on_read: bool = False, **more: Any) -> Latent:
        """A latent of so many numbers for the heads of one attention."""
        return cls(
            rank=rank, rope_dims=rope_dims, kv_heads=site.kv_heads, head_dim=site.head_dim, value_dim=site.value_dim,
            rotate_on_read=rotate_on_read, keeps_positions=rotate_on_read and site.rotary is not None, **more,
        )  # fmt: skip

    @property
    def dims(self) -> int:
        """Numbers per cached token."""
        return self.rank + self.rope_dims

    @property
    def key_rank(self) -> int:
        """Numbers of c that K reads."""
        return self.rank if self.k_rank is None else self.k_rank

    @property
    def value_rank(self) -> int:
        """Numbers of c that V reads: its last ones."""
        return self.rank if self.k_rank is None else self.rank - self.k_rank

    def label(self) -> str:
        """Its numbers, and how they are divided."""
        if self.k_rank:
            return f"latent {self.k_rank} K, {self.value_rank} V"
        return f"latent {self.rank}" + (f" + {self.rope_dims}" if self.rope_dims else "")

    def supports(self, site: AttentionSite) -> str | None:
        """Why no latent of this form can stand for K and V of the attention; None where it can."""
        return latent_refusal(site, self.rotate_on_read)

    def entry(self, itemsize: int) -> tuple[int, int, int]:
        """One head of keys, and the position in the place of values."""
        return 1, self.dims, position_numbers(itemsize) if self.keeps_positions else 0

    def shapes(self, site: AttentionSite, owns_cache: bool = True) -> dict[str, tuple[int, ...]]:
        """Of the maps to the latent and from it (`kv_down` may have a bias beside them)."""
        K, H, V = self.kv_heads, self.head_dim, self.value_dim
        shapes: dict[str, tuple[int, ...]] = {"v_up": (K, V, self.value_rank)}
        if owns_cache:
            shapes["kv_down.weight"] = (self.dims, site.hidden_size)
        if self.key_rank:
            shapes["k_up"] = (K, H, self.key_rank)
        if self.means and self.rotate_on_read:
            shapes["k_mean"] = (K, H)
        if self.rope_dims:
            shapes |= {"q_rope": (K, self.rope_dims, H), "rope_freq_bits": (self.rope_dims // 2,)}
        return shapes

    def parameters(self, site: AttentionSite, absent: tuple[str, ...]) -> int:
        """Of the maps, of the bias of `kv_down` where a projection has one, and of a bias of o that means bring."""
        shapes = self.shapes(site, "kv_down" not in absent)
        maps = sum(prod(shape) for name, shape in shapes.items() if not name.endswith("_bits"))
        has_bias = any(projection.bias is not None for projection in (site.q, site.k, site.v))
        bias = self.dims if has_bias and "kv_down" not in absent else 0
        return maps + bias + (site.hidden_size if self.means and site.o.bias is None else 0)


PROJECTS: dict[str, type] = {"heads": Heads, "latent": Latent}
"""`kind` -> class of the value."""


def position_numbers(itemsize: int) -> int:
    """Numbers of so many bytes each that hold the position of a token to the last bit, up to 2^24."""
    return 1 if itemsize >= 4 else 3


def latent_refusal(site: AttentionSite, rotate_on_read: bool = False, fixed_rotary: bool = True) -> str | None:
    """Why no latent can stand for K and V of this attention; None where one can.

    Args:
        site: an `AttentionSite`, or anything with its norms and its rotary embedding.
        rotate_on_read: K is made from the latent at read, and can be normed then.
        fixed_rotary: whether frequencies that vary with the length are refused; the runtime cannot follow them.
    """
    linear = "a latent that both read needs K and V linear in the layer's input"
    clip = getattr(site, "clip_qkv", None)
    if site.k_norm is not None and (site.k_norm.after_rotary or not rotate_on_read):
        return f"the keys are normed per head ({site.k_norm.kind}); {linear}. Use lowrank, which norms at read, or gqa."
    if site.v_norm is not None:
        return f"the values are normed ({site.v_norm.kind}); {linear}. Use gqa."
    if clip is not None:
        return f"keys and values are clamped to {clip:g}; {linear}. Use gqa."
    if site.q_norm is not None and site.q_norm.after_rotary:
        return "the queries are normed after their rotation, which a latent cannot follow. Use gqa."
    if fixed_rotary and site.rotary is not None and site.rotary.length_dependent:
        return "the rotary frequencies vary with the length, and cached latents cannot follow. Use gqa."
    if site.rotary is not None and site.rotary.axes is not None:
        return "tokens of an image have several positions each, and cached latents are turned by one. Use gqa."
    if site.gated_output:
        return "the head outputs are gated before o. Use gqa."
    return None
