"""What a converted layer needs to know of itself: where its weights are, and how its cache looks.

Pure frozen data, JSON round-trippable. It lives in the runtime because exported checkpoints carry it in
`config.surgery` and rebuild their attention from it; anatomy writes `AttentionSite`s, plan writes `LayerPlan`s.

Shape suffixes of the whole project: `B` batch, `T` new tokens, `S` cached tokens, `N` query heads, `K` KV heads,
`G = N/K`, `H` head dim, `R` latent rank, `D` model dim, `L` layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Projection:
    """Which rows of which parameter make the heads of q, k or v; for `o`, which input columns read them.

    `head_rows[h]` is the first output row of head `h` (for `o`: the first input column); the head's rows follow
    contiguously. A fused parameter is described by three projections with the same `weight`.
    """

    weight: str
    """Name in the model's state dict, for example `model.layers.0.self_attn.q_proj.weight`."""
    head_rows: tuple[int, ...]
    bias: str | None = None
    transposed: bool = False
    """True where the parameter is stored [in, out] (GPT-2's Conv1D) instead of [out, in]."""


@dataclass(frozen=True, kw_only=True)
class HeadNorm:
    """A norm between the projection and the score (q/k norm; a few models also norm v)."""

    kind: Literal["rms", "layer"]
    span: Literal["head", "all"]
    """`head`: statistics over one head's dims. `all`: over the concatenated heads (OLMo-2)."""
    eps: float
    weight: str | tuple[str, ...] | None = None
    """Gain: [H] shared by all heads, one row per head ([N, H] or [N*H]), or one parameter per head (StableLM)."""
    bias: str | tuple[str, ...] | None = None
    weight_offset: float = 0.0
    """The effective gain is `weight_offset + weight` (Gemma: 1)."""
    after_rotary: bool = False
    """True where the norm comes after the rotation (Hunyuan)."""


@dataclass(frozen=True, kw_only=True)
class Rotary:
    """Rotary position embedding of one layer: channels [start, start + dims) of each head turn with the position."""

    dims: int
    inv_freq: tuple[float, ...]
    """Angle per position of each pair, radians; dims / 2 entries."""
    interleaved: bool = False
    """Pairs are (2j, 2j+1); otherwise (j, j + dims/2)."""
    start: int = 0
    scaling: float = 1.0
    """Factor on cos and sin (the attention factor of YaRN and longrope)."""
    length_dependent: bool = False
    """True where the frequencies change with the sequence length (dynamic NTK, longrope)."""
    axes: tuple[int, ...] | None = None
    """Where a token has several positions (time, height and width of an image): which of them turns each pair."""


@dataclass(frozen=True, kw_only=True)
class OutputGate(Projection):
    """What multiplies the head outputs before `o`: a function of a projection of the layer's input.

    `head_rows[h]` is the first row for query head `h`; the head has `width` rows: one for each channel of its output,
    or a single one for them all.
    """

    width: int
    function: Literal["sigmoid", "softplus", "silu", "tanh"]


@dataclass(frozen=True, kw_only=True)
class AttentionSite:
    """One softmax attention of a decoder, as the graph shows it."""

    layer: int
    """Index of the KV-cache layer that it writes."""
    module: str
    """Qualified name of the attention module, for example `model.layers.0.self_attn`."""
    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    q: Projection
    k: Projection
    v: Projection
    o: Projection
    q_norm: HeadNorm | None = None
    k_norm: HeadNorm | None = None
    v_norm: HeadNorm | None = None
    rotary: Rotary | None = None
    scale: float
    """Factor on q k^T. Where the model scales q itself, that factor is included here."""
    softcap: float | None = None
    window: int | None = None
    """Number of newest tokens visible, the query's own included; None where all are."""
    window_in_mask: bool = False
    """True where the mask that the attention is given has the window, so that a user's own mask counts as it is. False
    where the attention applies the window itself to whatever it is given (GPT-Neo), and in sites written before."""
    sinks: str | None = None
    """Parameter with one learned sink logit per query head (GPT-OSS)."""
    alibi_slopes: tuple[float, ...] | None = None
    """One slope per query head; the score of key position n seen from m gains slope * (n - m)."""
    clip_qkv: float | None = None
    """Projections are clamped to [-clip, clip] before anything else (OLMo, DBRX, MPT)."""
    gated_output: bool = False
    """True where something multiplies the head outputs before `o`: nothing can be folded into `o` then."""
    gate: OutputGate | None = None
    """What that is; None without a gate, or where it is of no known form."""
    sees_ahead: bool = False
    """True where the mask may let tokens see later ones: those of one image (Gemma-3) or of a prefix (PaliGemma)."""

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.heads // self.kv_heads

    @property
    def kv_dims(self) -> int:
        """Numbers that one token adds to this layer's cache."""
        return self.kv_heads * (self.head_dim + self.value_dim)

    @property
    def parameters(self) -> frozenset[str]:
        """Names of all parameters that make this attention, in the parent's state dict."""
        parts = [self.q, self.k, self.v, self.o, self.gate, self.q_norm, self.k_norm, self.v_norm]
        named = [self.sinks, *(name for part in parts if part is not None for name in (part.weight, part.bias))]
        return frozenset(n for name in named for n in ((name,) if isinstance(name, str) else name or ()))

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> AttentionSite:
        kinds: dict[str, type] = {
            "q": Projection, "k": Projection, "v": Projection, "o": Projection,
            "q_norm": HeadNorm, "k_norm": HeadNorm, "v_norm": HeadNorm, "rotary": Rotary,
            "gate": OutputGate,
        }  # fmt: skip
        return cls(**{name: _build(kinds.get(name), value) for name, value in data.items()})


@dataclass(frozen=True, kw_only=True)
class Heads:
    """Project axis: K and V heads of full width. `groups[a]` lists the query heads that read KV head `a`."""

    kv_heads: int
    head_dim: int
    value_dim: int
    groups: tuple[tuple[int, ...], ...]
    kind: Literal["heads"] = "heads"

    @property
    def dims(self) -> int:
        """Numbers per cached token."""
        return self.kv_heads * (self.head_dim + self.value_dim)

    @property
    def is_uniform(self) -> bool:
        """True where every group has the same size and holds consecutive query heads: what `repeat_kv` undoes."""
        size = len(self.groups[0])
        return all(g == tuple(range(i * size, (i + 1) * size)) for i, g in enumerate(self.groups))


@dataclass(frozen=True, kw_only=True)
class Latent:
    """Project axis: one latent per token from which K and V of every head are made, and a rotated part beside it.

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
    plans written before that was so count them not."""
    kind: Literal["latent"] = "latent"

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


Project = Heads | Latent


@dataclass(frozen=True, kw_only=True)
class Merge:
    """Retain axis: a gate decides per KV head and token which tokens keep a slot of their own.

    `dms` (Dynamic Memory Sparsification, arXiv:2506.05345): a token whose own decision is 1 is dropped once it is
    `window` tokens old. `dmc` (Dynamic Memory Compression, arXiv:2403.09636): a token whose decision is 1 is averaged
    into the slot before it; the key of a slot is rotated at the position of its newest token.
    """

    method: Literal["dmc", "dms"]
    ratio: float
    """Target: tokens seen per slot kept, at the length that was trained on; what plans predict with."""
    window: int | None
    """`dms`: newest tokens that are never dropped, the query's own included. `dmc`: newest tokens of the open run that
    its slot is the mean of; None: all."""
    gate: str = "adapter"
    """`adapter`: a linear map of the layer's input; `borrowed`: the last channel of q and k; `score:...`: a score that
    nothing was trained for (`gates.SCORES`)."""
    sinks: int = 4
    """First tokens of a sequence that are never dropped or merged, nor merged into."""
    page: int = 16
    """Slots per page of the cache."""
    gain: float = 30.0
    """Factor on the adapter's output."""
    offset: float = -5.0
    """Logit of an untrained gate: the decision is 1 where the logit is above 0."""

    @property
    def protected(self) -> int:
        """First tokens of a sequence whose decision is 0 whatever the gate says: the first token has no slot before it,
        and that behind the sinks would merge into the last of them."""
        return self.sinks + 1 if self.method == "dmc" else max(1, self.sinks)

    @property
    def is_trained(self) -> bool:
        """Whether training can teach the gate its ratio."""
        return not self.gate.startswith("score:")

    @property
    def always_kept(self) -> int:
        """Tokens of any sequence that keep a slot of their own whatever the gate says, the window included."""
        return self.protected + (self.window or 0) if self.method == "dms" else self.protected

    def slots_at(self, tokens: int) -> float:
        """Slots that a KV head is expected to hold after `tokens` tokens."""
        kept = float(min(tokens, self.always_kept))
        return kept if self.gate == "score:window" else max(tokens / self.ratio, kept)

    def drop_rate(self, tokens: int, ratio: float) -> float:
        """Part of the decisions to be 1 for `tokens` tokens to take `tokens / ratio` slots; above 1 where none can."""
        return (tokens - tokens / ratio) / max(tokens - self.always_kept, 1e-9)


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """How one layer makes, shares, keeps and stores its cache (architecture: the four axes)."""

    layer: int
    project: Project
    owner: int
    """Share axis: index of the layer whose cache is read; its own index where it owns one."""
    value_owner: int | None = None
    """Share axis of V alone, in a layer that owns its K: index of the layer whose V is read (SVFormer)."""
    window: int | None = None
    """Retain axis: newest tokens kept; None keeps all."""
    retain: Merge | None = None
    """Retain axis: learned merging or eviction. A reader has that of its owner, whose slots it follows."""
    dtype: str = "bfloat16"
    """Store axis: format of one number."""

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one more token adds to the cache while the window, if any, is not full; on average, if merged."""
        if self.owner != self.layer:
            return 0
        dims = self.project.dims
        if self.value_owner is not None:
            dims -= self.project.kv_heads * self.project.value_dim
        if isinstance(self.project, Latent) and self.project.keeps_positions:
            dims += position_numbers(_BYTES[self.dtype])
        return (
            dims * _BYTES[self.dtype] if self.retain is None else round(dims * _BYTES[self.dtype] / self.retain.ratio)
        )

    @property
    def lenders(self) -> tuple[int, ...]:
        """Layers whose cache this one reads beside its own."""
        if self.owner != self.layer:
            return (self.owner,)
        return () if self.value_owner is None else (self.value_owner,)

    @property
    def absent(self) -> tuple[str, ...]:
        """Modules that the layer does without: those that would make K and V which it reads elsewhere."""
        keys = () if self.owner == self.layer else ("k_proj", "k_norm", "kv_down", "gate")
        return (*keys, "v_proj", "v_norm") if self.lenders else keys

    def bytes_at(self, tokens: int) -> int:
        """Bytes of this layer's dynamic cache after `tokens` tokens; a window keeps its newest but one for the next.

        Where tokens merge or leave: as many as the plan's ratio says.
        """
        if self.retain is not None:
            slots, page = self.retain.slots_at(tokens), self.retain.page
            # The last page of a head is half empty on average; known where the gate leaves no choice.
            known = slots >= tokens or self.retain.gate == "score:window"
            pages = ceil((slots + AHEAD) / page) if known else (slots + AHEAD + (page - 1) / 2) / page
            return self.bytes_of_pages(pages * self.project.kv_heads, _table(pages))
        return self.bytes_per_token * (tokens if self.window is None else min(tokens, self.window - 1))

    def bytes_of_slots(self, slots: Sequence[int]) -> int:
        """Bytes of a dynamic cache just filled with one sequence, whose KV heads hold so many slots (`retain`)."""
        assert self.retain is not None
        pages = [ceil((count + AHEAD) / self.retain.page) for count in slots]
        return self.bytes_of_pages(sum(pages), _table(max(pages)))

    def bytes_of_pages(self, pages: float, table: int) -> int:
        """Bytes of one sequence with so many pages in all, and tables with `table` entries per KV head (`retain`)."""
        assert self.retain is not None and isinstance(self.project, Heads)
        if self.owner != self.layer:
            return 0
        merge, width, number = self.retain, self.project.head_dim + self.project.value_dim, _BYTES[self.dtype]
        # What the methods keep of the newest tokens of each head: see `ragged_dms` and `ragged_dmc`.
        if merge.method == "dms":
            newest = 4 * (merge.window or 0)
        elif merge.window is None:
            newest = 4 * (width + 1)
        else:
            newest = merge.window * (width * number + 4)
        lengths_and_table, tokens = 8 + 4 * table, 4
        slots = round(pages * merge.page * width * number)
        return slots + self.project.kv_heads * (newest + lengths_and_table) + tokens

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> LayerPlan:
        # Plans written before there were latents name no kind.
        project = Latent if data["project"].get("kind") == "latent" else Heads
        kinds: dict[str, type] = {"project": project, "retain": Merge}
        return cls(**{name: _build(kinds.get(name), value) for name, value in data.items()})


AHEAD = 4
"""Slots for which a ragged cache takes pages before they are needed: lengths are read from the device less often."""
TABLE_STEP = 8
"""Block tables of ragged caches widen by so many pages at once."""
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def position_numbers(itemsize: int) -> int:
    """Numbers of so many bytes each that hold the position of a token to the last bit, up to 2^24."""
    return 1 if itemsize >= 4 else 3


def _table(pages: float) -> int:
    """Entries of a block table that has room for `pages`."""
    return ceil(pages / TABLE_STEP) * TABLE_STEP


def _build(kind: type | None, value: Any) -> Any:
    """Undo `dataclasses.asdict` and JSON: dicts become dataclasses, lists become tuples."""
    if kind is not None and isinstance(value, dict):
        return kind(**{name: _build(None, v) for name, v in value.items()})
    return tuple(_build(None, v) for v in value) if isinstance(value, (list, tuple)) else value
