"""One attention as per-head tensors, whatever the model calls and fuses: read from a site, write to another.

Rewriters see one layout only. Rotated channels come in halves: channel `start + j` turns with `start + dims/2 + j`
(interleaved models are permuted on read and back on write, norm gains included). Nothing is folded or rounded here:
`write_attention(read_attention(...))` gives back the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import PlanError
from ..runtime.layout import AttentionSite, HeadNorm, Projection, Rotary


@dataclass(frozen=True, kw_only=True)
class AttentionWeights:
    """The tensors of one attention, per head. `Hv` is the value dim, `F` the number of rotated pairs.

    Query head h reads the KV head a with h in `groups[a]`. q = q_NHD x + q_bias_NH, and alike for k and v, where x is
    what the projections see (after the layer's input norm and its gain).
    """

    q_NHD: Tensor
    k_KHD: Tensor
    v_KVD: Tensor
    """[K, Hv, D]"""
    o_DNV: Tensor
    """[D, N, Hv]"""
    q_bias_NH: Tensor | None = None
    k_bias_KH: Tensor | None = None
    v_bias_KV: Tensor | None = None
    o_bias_D: Tensor | None = None
    groups: tuple[tuple[int, ...], ...]
    rotary: Rotary | None = None
    """Always in halves here (`interleaved` is False)."""
    scale: float
    q_norm: HeadNorm | None = None
    k_norm: HeadNorm | None = None
    v_norm: HeadNorm | None = None
    q_norm_NH: Tensor | None = None
    """Effective gain of the q norm per head (offset added, shared gains repeated); None without norm or gain."""
    k_norm_KH: Tensor | None = None
    q_norm_bias_NH: Tensor | None = None
    k_norm_bias_KH: Tensor | None = None
    q_norm_shared: bool = True
    """The norm has one gain [H] for all heads: a native checkpoint cannot scale heads apart."""
    k_norm_shared: bool = True
    alibi_slopes: tuple[float, ...] | None = None
    sinks_N: Tensor | None = None
    softcap: float | None = None
    window: int | None = None
    clip_qkv: float | None = None
    """Projections are clamped to [-clip, clip] before anything else."""
    gated_output: bool = False
    permutable: bool = True
    """Query heads may change places. False where the model computes slopes itself (BLOOM) or gates the outputs."""

    @property
    def heads(self) -> int:
        return self.q_NHD.shape[0]

    @property
    def kv_heads(self) -> int:
        return self.k_KHD.shape[0]

    @property
    def head_dim(self) -> int:
        return self.q_NHD.shape[1]

    @property
    def value_dim(self) -> int:
        return self.v_KVD.shape[1]

    @property
    def has_bias(self) -> bool:
        """One of q, k, v is affine: statistics then carry a bias coordinate, x~ = [x; 1]."""
        return any(b is not None for b in (self.q_bias_NH, self.k_bias_KH, self.v_bias_KV))

    @property
    def v_foldable(self) -> bool:
        """A linear map of a value head can be undone in `o`: nothing stands between them."""
        return not self.gated_output and self.v_norm is None

    @property
    def frequencies(self) -> int:
        """F: pairs of channels that turn."""
        return 0 if self.rotary is None else self.rotary.dims // 2

    def kv_of(self) -> list[int]:
        """The KV head that each query head reads."""
        of = {h: a for a, group in enumerate(self.groups) for h in group}
        return [of[h] for h in range(self.heads)]

    def rotated(self) -> tuple[list[int], list[int]]:
        """Channels of the first and of the second halves of the rotated pairs."""
        if self.rotary is None:
            return [], []
        first = range(self.rotary.start, self.rotary.start + self.frequencies)
        return list(first), [j + self.frequencies for j in first]

    def unrotated(self) -> list[int]:
        """Channels without position (NoPE)."""
        first, second = self.rotated()
        turning = {*first, *second}
        return [j for j in range(self.head_dim) if j not in turning]

    def with_bias(self, name: str) -> Tensor:
        """`q`, `k` or `v` as [heads, dim, D or D+1] in float64; the bias, if any has one, is the last column."""
        w, b = {
            "q": (self.q_NHD, self.q_bias_NH),
            "k": (self.k_KHD, self.k_bias_KH),
            "v": (self.v_KVD, self.v_bias_KV),
        }[name]
        w = w.double()
        if not self.has_bias:
            return w
        column = torch.zeros_like(w[..., :1]) if b is None else b.double()[..., None]
        return torch.cat([w, column], -1)


def read_attention(site: AttentionSite, get_tensor: Callable[[str], Tensor]) -> AttentionWeights:
    """Slice the parameters that `site` names into per-head tensors, in their own dtype.

    Args:
        get_tensor: name in the state dict -> tensor, for example `model.state_dict().__getitem__`.

    Where q is read from a parameter that also holds an output gate, the gate's rows stay behind; `write_attention`
    takes them from the old parameter.
    """
    rotary = site.rotary
    order = halves(rotary, site.head_dim)

    def shared(norm: HeadNorm | None) -> bool:
        # Names of one parameter per head say that heads may differ, and so does a gain longer than one head.
        if norm is None or norm.weight is None:
            return True
        return isinstance(norm.weight, str) and get_tensor(norm.weight).numel() == site.head_dim

    def norms(norm: HeadNorm | None, heads: int) -> tuple[Tensor | None, Tensor | None]:
        if norm is None:
            return None, None
        found = read_norm(norm, heads, site.head_dim, get_tensor)
        return _take(found[0], order), _take(found[1], order)

    o = get_tensor(site.o.weight)
    o = o.T if site.o.transposed else o
    (q, q_bias), (k, k_bias), (v, v_bias) = (
        read_rows(part, dim, get_tensor)
        for part, dim in ((site.q, site.head_dim), (site.k, site.head_dim), (site.v, site.value_dim))
    )
    q_gain, q_shift = norms(site.q_norm, site.heads)
    k_gain, k_shift = norms(site.k_norm, site.kv_heads)
    group = site.group_size
    return AttentionWeights(
        q_NHD=q[:, order],
        k_KHD=k[:, order],
        v_KVD=v,
        o_DNV=torch.stack([o[:, c : c + site.value_dim] for c in site.o.head_rows], 1),
        q_bias_NH=None if q_bias is None else q_bias[:, order],
        k_bias_KH=None if k_bias is None else k_bias[:, order],
        v_bias_KV=v_bias,
        o_bias_D=None if site.o.bias is None else get_tensor(site.o.bias),
        groups=tuple(tuple(range(a * group, (a + 1) * group)) for a in range(site.kv_heads)),
        rotary=None if rotary is None else replace(rotary, interleaved=False),
        scale=site.scale,
        q_norm=site.q_norm,
        k_norm=site.k_norm,
        v_norm=site.v_norm,
        q_norm_NH=q_gain,
        k_norm_KH=k_gain,
        q_norm_bias_NH=q_shift,
        k_norm_bias_KH=k_shift,
        q_norm_shared=shared(site.q_norm),
        k_norm_shared=shared(site.k_norm),
        alibi_slopes=site.alibi_slopes,
        sinks_N=None if site.sinks is None else get_tensor(site.sinks),
        softcap=site.softcap,
        window=site.window,
        clip_qkv=site.clip_qkv,
        gated_output=site.gated_output,
        permutable=is_permutable(site),
    )


def is_permutable(site: AttentionSite) -> bool:
    """Whether query heads may change places: not where the model computes slopes itself, or gates the outputs."""
    return not site.gated_output and site.alibi_slopes is None


def read_rows(part: Projection, dim: int, get_tensor: Callable[[str], Tensor]) -> tuple[Tensor, Tensor | None]:
    """Weight [heads, dim, D] and bias [heads, dim] of one projection, channels as the model has them."""
    w = get_tensor(part.weight)
    w = w.T if part.transposed else w
    b = None if part.bias is None else get_tensor(part.bias)
    bias = None if b is None else torch.stack([b[r : r + dim] for r in part.head_rows])
    return torch.stack([w[r : r + dim] for r in part.head_rows]), bias


def read_norm(
    norm: HeadNorm, heads: int, dim: int, get_tensor: Callable[[str], Tensor]
) -> tuple[Tensor | None, Tensor | None]:
    """Effective gain and bias of a norm, [heads, dim] each, channels as the model has them; None where it has none."""

    def read(name: str | tuple[str, ...] | None, offset: float) -> Tensor | None:
        if name is None:
            return None
        w = get_tensor(name) if isinstance(name, str) else torch.stack([get_tensor(n) for n in name])
        w = w + offset if offset else w
        return w.expand(heads, -1) if isinstance(name, str) and w.numel() == dim else w.reshape(heads, dim)

    return read(norm.weight, norm.weight_offset), read(norm.bias, 0.0)


def write_attention(
    weights: AttentionWeights, site: AttentionSite, get_tensor: Callable[[str], Tensor] | None = None
) -> dict[str, Tensor]:
    """The full parameters of `site` that hold `weights`.

    Args:
        site: the attention of the *new* model: its KV heads, its row layout (fused or not, transposed or not).
        get_tensor: the new model's parameters before, needed only where they have rows that no head covers (an output
            gate fused with q).

    Raises:
        PlanError: the site cannot hold these weights (head counts, a bias without a place, unequal groups of queries,
            gains per head where the norm shares one).
    """
    where = f"layer {site.layer}"
    _check_fits(weights, site, where)
    order = halves(site.rotary, site.head_dim)
    back = [order.index(j) for j in range(site.head_dim)]
    parts = [
        (site.q, weights.q_NHD[:, back], _take(weights.q_bias_NH, back)),
        (site.k, weights.k_KHD[:, back], _take(weights.k_bias_KH, back)),
        (site.v, weights.v_KVD, weights.v_bias_KV),
    ]
    out: dict[str, Tensor] = {}
    transposed: set[str] = set()
    names = [p.weight for p, _, _ in parts] + [p.bias for p, _, _ in parts if p.bias is not None]
    for name in dict.fromkeys(names):
        pieces = [(p, w, w.shape[1]) for p, w, _ in parts if p.weight == name]
        for p, w, b in parts:
            if p.bias == name:
                pieces.append((p, torch.zeros_like(w[..., 0]) if b is None else b, w.shape[1]))
        covered = sum(len(p.head_rows) * dim for p, _, dim in pieces)
        size = max(max(p.head_rows) + dim for p, _, dim in pieces)
        is_transposed = any(p.transposed and p.weight == name for p, _, _ in pieces)
        # Only a gate that rides on q has rows of its own; what lies beyond the heads elsewhere are dropped KV heads.
        gate = site.gated_output and name in (site.q.weight, site.q.bias)
        if covered != size or (gate and get_tensor is not None):
            if get_tensor is None:
                raise PlanError(
                    f"{where}: {name} has {size} rows, the heads cover {covered}. Pass get_tensor to keep the rest."
                )
            old = get_tensor(name)
            full = (old.T if is_transposed else old).to(pieces[0][1].dtype).clone()
        else:
            full = pieces[0][1].new_empty((size, *pieces[0][1].shape[2:]))
        for p, piece, dim in pieces:
            for r, rows in zip(p.head_rows, piece, strict=True):
                full[r : r + dim] = rows
        out[name] = full
        if is_transposed:
            transposed.add(name)
    o = weights.o_DNV.new_empty(weights.o_DNV.shape[0], max(site.o.head_rows) + site.value_dim)
    for h, c in enumerate(site.o.head_rows):
        o[:, c : c + site.value_dim] = weights.o_DNV[:, h]
    out[site.o.weight] = o
    if site.o.transposed:
        transposed.add(site.o.weight)
    if site.o.bias is not None:
        out[site.o.bias] = weights.o_DNV.new_zeros(o.shape[0]) if weights.o_bias_D is None else weights.o_bias_D
    for norm, source, gain, shift, shared in (
        (site.q_norm, weights.q_norm, weights.q_norm_NH, weights.q_norm_bias_NH, weights.q_norm_shared),
        (site.k_norm, weights.k_norm, weights.k_norm_KH, weights.k_norm_bias_KH, weights.k_norm_shared),
    ):
        if norm is None:
            continue
        # With one head left, a norm over all heads reads as one per head; where the gain came from tells them apart.
        flat = "all" in (norm.span, source.span if source else None)
        for parameter, value, base in ((norm.weight, gain, norm.weight_offset), (norm.bias, shift, 0.0)):
            if parameter is not None and value is not None:
                if not isinstance(parameter, str):
                    out.update(zip(parameter, value[:, back] - base, strict=True))
                    continue
                full = _norm_parameter(value[:, back], shared, f"{where}: {parameter}") - base
                # One head's own gain is stored [1, H] (Cohere) or [H] (StableLM): the old parameter says which.
                lone = len(full) == 1 and get_tensor is not None and get_tensor(parameter).ndim == 1
                out[parameter] = full.reshape(-1) if flat or lone else full
    if site.sinks is not None and weights.sinks_N is not None:
        out[site.sinks] = weights.sinks_N
    return {name: (w.T if name in transposed else w).contiguous() for name, w in out.items()}


def write_changed(
    weights: AttentionWeights, target: AttentionSite, site: AttentionSite, get_tensor: Callable[[str], Tensor]
) -> dict[str, Tensor]:
    """`write_attention`, with the parent's dtypes and devices, and its own bits where a parameter did not change.

    Args:
        weights: of the result, in any dtype.
        target: the attention of the new model; its parameters have the parent's names.
        site: the attention of the parent.
        get_tensor: the parent's parameters.
    """
    old = {name: get_tensor(name).detach() for name in parameter_names(site)}
    wide = {name: tensor.float() for name, tensor in old.items()}
    written = write_attention(weights, target, wide.__getitem__)
    # An offset that is added on read and taken off on write costs digits: what both ways give alike is as it was.
    same = write_attention(read_attention(site, wide.__getitem__), site, wide.__getitem__)
    return {
        name: old[name].clone() if name in same and same[name].equal(tensor.to(same[name])) else like(tensor, old[name])
        for name, tensor in written.items()
    }


def like(tensor: Tensor, original: Tensor) -> Tensor:
    """`tensor` in the dtype, and on the device, of what it replaces; integers stay what they are."""
    return tensor.to(original.device, original.dtype if tensor.is_floating_point() else None)


def _check_fits(weights: AttentionWeights, site: AttentionSite, where: str) -> None:
    found = (weights.heads, weights.kv_heads, weights.head_dim, weights.value_dim)
    needed = (site.heads, site.kv_heads, site.head_dim, site.value_dim)
    if found != needed:
        raise PlanError(f"{where}: heads, KV heads, head dim, value dim are {found}, the site has {needed}.")
    for name, b, p in (
        ("q", weights.q_bias_NH, site.q),
        ("k", weights.k_bias_KH, site.k),
        ("v", weights.v_bias_KV, site.v),
        ("o", weights.o_bias_D, site.o),
    ):
        if b is not None and p.bias is None and bool((b != 0).any()):
            raise PlanError(f"{where}: {name} has a bias and the site has no place for one.")
    group = site.group_size
    if weights.groups != tuple(tuple(range(a * group, (a + 1) * group)) for a in range(site.kv_heads)):
        raise PlanError(
            f"{where}: query groups {weights.groups} are not {site.kv_heads} equal runs of {group}: "
            "a plain checkpoint cannot say so. Use equal groups, or a target with an index map."
        )
    if weights.alibi_slopes is not None and weights.alibi_slopes != site.alibi_slopes:
        raise PlanError(f"{where}: ALiBi slopes moved with their query heads, but the site computes its own.")


def _norm_parameter(gain_NH: Tensor, shared: bool, where: str) -> Tensor:
    if not shared:
        return gain_NH
    if not bool((gain_NH == gain_NH[:1]).all()):
        raise PlanError(f"{where}: the heads' gains differ, and the norm has one for all.")
    return gain_NH[0]


def halves(rotary: Rotary | None, head_dim: int) -> list[int]:
    """Channel order that brings rotated pairs from (2j, 2j+1) to (j, j + dims/2); the identity where they are so."""
    if rotary is None or not rotary.interleaved:
        return list(range(head_dim))
    s, e = rotary.start, rotary.start + rotary.dims
    return [*range(s), *range(s, e, 2), *range(s + 1, e, 2), *range(e, head_dim)]


def _take(x: Tensor | None, order: list[int]) -> Tensor | None:
    return None if x is None else x[:, order]


def parameter_names(site: AttentionSite) -> list[str]:
    """The parameters of one attention, each once."""
    norms = [norm for norm in (site.q_norm, site.k_norm) if norm is not None]
    parts = [*(n for p in (site.q, site.k, site.v, site.o) for n in (p.weight, p.bias)), site.sinks]
    for norm in norms:
        for name in (norm.weight, norm.bias):
            parts += [name] if name is None or isinstance(name, str) else name
    return list(dict.fromkeys(name for name in parts if name is not None))
