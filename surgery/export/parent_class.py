"""KV heads by layer, or unequal ones, in the parent's own class: one of the two forms of the target `native`.

Heads are repeated until all layers have the same number.
Repetition is lossless and gives back a part of the saving; the report says how much.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..anatomy import examine
from ..attention.weights import read_attention, write_attention
from ..planning.parent_class import meta_model, native_config
from ..planning.repeated_heads import repeated_heads
from ..planning.targets import REPEATED, Refusal, Subject, Way, stored_otherwise
from ..runtime.layout import AttentionSite, HeadNorm, Heads, Projection
from ..runtime.store import itemsize_of
from .target import STOCK_BYTES, Source, Written


def judge(subject: Subject) -> Way | Refusal:
    """Say whether the parent's class can say heads by layer, or in groups of unequal size."""
    for plan in subject.plans:
        other = stored_otherwise(plan)
        if other is not None:
            return Refusal(reason=f"layer {plan.layer} {other}; {subject.architecture} does not")
    if len({site.heads for site in subject.sites}) > 1:
        return Refusal(reason=f"layers of {subject.architecture} have query heads of several numbers")
    kv_heads, copies = repeated_heads(_heads(subject))
    if _with_kv_heads(subject, kv_heads) is None:
        return Refusal(reason=f"{subject.architecture} has no config field that gives all layers {kv_heads} KV heads")
    for site, copied in zip(subject.sites, copies, strict=True):
        often = {copied.count(head) for head in copied}
        if site.k_norm is not None and site.k_norm.span == "all" and len(often) > 1:
            return Refusal(
                reason=f"layer {site.layer} norms all keys together, and its heads would be repeated {min(often)} to "
                f"{max(often)} times, which changes the norm",
                way_out="Use equal groups, or --to hub.",
            )
    return Way(by=REPEATED)


def stock_config(subject: Subject) -> Any:
    """The config of the parent's class, of that of the result."""
    assert subject.kind is not None
    fields = subject.config.to_diff_dict()
    for name in ("model_type", "surgery", "architectures"):
        fields.pop(name, None)
    kind: Any = subject.kind.config_class
    return kind(**fields)


def write(source: Source, folder: Path) -> Written:
    """Write the parent's own class."""
    model, parent, subject = source.model, source.kind, source.subject
    sites, plans = subject.sites, subject.plans
    kv_heads, copies = repeated_heads(_heads(subject))
    config = _with_kv_heads(subject, kv_heads)
    assert config is not None, "judged before"
    inside = tuple(f"{site.module}." for site in sites)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(inside)}
    for old, new, copied in zip(sites, examine(meta_model(config, parent)).sites, copies, strict=True):
        weights = {name: t.detach() for name, t in model.get_submodule(old.module).state_dict().items()}
        weights = _repeat(weights, copied, old)
        plain = _canonical_site(old, kv_heads, weights)
        tensors |= write_attention(read_attention(plain, weights.__getitem__), new)
    own = [plan.project.kv_heads for plan in plans]
    planned = sum(plan.project.dims for plan in plans)
    written = len(plans) * kv_heads * (sites[0].head_dim + sites[0].value_dim)
    cached = written * itemsize_of(plans[0].dtype)
    config.surgery = {**source.provenance, STOCK_BYTES: cached}
    child = parent.from_pretrained(None, config=config, state_dict=tensors, dtype=model.dtype)
    if model.can_generate():
        child.generation_config = model.generation_config
    child.save_pretrained(folder)
    source.write_companions(folder)
    facts = {"kv_heads": kv_heads, "numbers_per_token": written, "planned_numbers_per_token": planned}
    lines = (
        f"{min(own)} to {max(own)} KV heads by layer, repeated to {kv_heads} in each (lossless)",
        f"cache: {written} numbers per token (the conversion has {planned})",
    )
    return Written(architecture=parent.__name__, facts=facts, lines=lines, bytes_per_token=cached)


def _heads(subject: Subject) -> list[Heads]:
    return [plan.project for plan in subject.plans if isinstance(plan.project, Heads)]


def _with_kv_heads(subject: Subject, kv_heads: int) -> Any | None:
    """The config of the parent's class with so many KV heads; None where it has no such form."""
    config = stock_config(subject)
    if kv_heads == subject.sites[0].kv_heads:
        return config
    assert subject.kind is not None
    return native_config(config, subject.sites, kv_heads, subject.kind)


def _repeat(weights: Mapping[str, Tensor], copies: Sequence[int], site: AttentionSite) -> dict[str, Tensor]:
    """K and V heads, and gains of each, as often as `copies` says."""
    kept = weights["k_proj.weight"].shape[0] // site.head_dim
    found = dict(weights)
    for name, tensor in weights.items():
        part = name.partition(".")[0]
        if part in ("k_proj", "v_proj"):
            found[name] = tensor.unflatten(0, (kept, -1))[list(copies)].flatten(0, 1)
        elif part == "k_norm" and site.k_norm is not None and (site.k_norm.span == "all" or tensor.ndim > 1):
            found[name] = tensor.reshape(kept, site.head_dim)[list(copies)]
    return found


def _canonical_site(site: AttentionSite, kv_heads: int, weights: Mapping[str, Tensor]) -> AttentionSite:
    """`site` with the names and the layout of `SurgeryHeadsAttention`."""

    def projection(name: str, heads: int, width: int) -> Projection:
        bias = f"{name}.bias"
        return Projection(
            weight=f"{name}.weight",
            head_rows=tuple(range(0, heads * width, width)),
            bias=bias if bias in weights else None,
        )

    def norm(name: str, found: HeadNorm | None) -> HeadNorm | None:
        if found is None:
            return None
        names = {part: f"{name}.{part}" if f"{name}.{part}" in weights else None for part in ("weight", "bias")}
        return replace(found, weight=names["weight"], bias=names["bias"])

    return replace(
        site,
        kv_heads=kv_heads,
        q=projection("q_proj", site.heads, site.head_dim),
        k=projection("k_proj", kv_heads, site.head_dim),
        v=projection("v_proj", kv_heads, site.value_dim),
        o=projection("o_proj", site.heads, site.value_dim),
        q_norm=norm("q_norm", site.q_norm),
        k_norm=norm("k_norm", site.k_norm),
        sinks="sinks" if "sinks" in weights else None,
    )
