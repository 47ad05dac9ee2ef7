"""One softmax attention of the parent, as the graph shows it: where its weights are, and what it computes.

Pure frozen data, JSON round-trippable. It lives in the runtime because exported checkpoints carry it in
`config.surgery` and rebuild their attention from it; anatomy writes it.

Shape suffixes of the whole project: `B` batch, `T` new tokens, `S` cached tokens, `N` query heads, `K` KV heads,
`G = N/K`, `H` head dim, `R` latent rank, `D` model dim, `L` layers.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
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
        return cls(**{name: from_json(kinds.get(name), value) for name, value in data.items()})


def from_json(kind: type | None, value: Any) -> Any:
    """Undo `dataclasses.asdict` and JSON: dicts become dataclasses, lists become tuples."""
    if kind is not None and isinstance(value, dict):
        return kind(**{name: from_json(None, v) for name, v in value.items()})
    return tuple(from_json(None, v) for v in value) if isinstance(value, (list, tuple)) else value
