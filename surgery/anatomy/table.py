"""Attentions as a table: equal layers share a row."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from ..console import spans
from ..runtime.layout import AttentionSite, HeadNorm


def site_table(sites: Sequence[AttentionSite]) -> Table:
    """One row per kind of attention."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("layers", "q heads", "KV heads", "head dim", "position", "window", "also"):
        table.add_column(name, justify="right" if name in ("q heads", "KV heads", "head dim") else "left")
    rows: dict[tuple[str, ...], list[int]] = {}
    for site in sites:
        rows.setdefault(_row(site), []).append(site.layer)
    for cells, layers in rows.items():
        table.add_row(spans(layers), *cells)
    return table


def _row(site: AttentionSite) -> tuple[str, ...]:
    dims = str(site.head_dim) if site.head_dim == site.value_dim else f"{site.head_dim} / v {site.value_dim}"
    window = "all" if site.window is None else f"{site.window:,}"
    return str(site.heads), str(site.kv_heads), dims, _position(site), window, ", ".join(_also(site)) or "-"


def _position(site: AttentionSite) -> str:
    if site.alibi_slopes is not None:
        return "ALiBi"
    if site.rotary is None:
        return "none in attention"
    r = site.rotary
    parts = [f"rotary {r.dims}/{site.head_dim}" if r.dims != site.head_dim else "rotary"]
    parts += ["interleaved"] if r.interleaved else []
    parts += ["varies with length"] if r.length_dependent else []
    return ", ".join(parts)


def _also(site: AttentionSite) -> list[str]:
    found = []
    if len({site.q.weight, site.k.weight, site.v.weight}) < 3:
        found.append("fused q k v" if site.q.weight == site.k.weight else "fused k v")
    biased = [name for name, p in (("q", site.q), ("k", site.k), ("v", site.v), ("o", site.o)) if p.bias]
    found += [f"bias on {' '.join(biased)}"] if biased else []
    found += [f"{norm}" for norm in _norms(site)]
    if abs(site.scale - site.head_dim**-0.5) > 1e-6 * site.scale:
        found.append(f"scale {site.scale:.4g}")
    found += [f"soft cap {site.softcap:g}"] if site.softcap else []
    found += ["sinks"] if site.sinks else []
    found += [f"clip {site.clip_qkv:g}"] if site.clip_qkv else []
    found += ["gated output"] if site.gated_output else []
    return found


def _norms(site: AttentionSite) -> list[str]:
    def spell(norm: HeadNorm) -> str:
        after = " after rotary" if norm.after_rotary else ""
        return f"{norm.kind} norm{' over all heads' if norm.span == 'all' else ''}{after}"

    named = [(name, n) for name, n in (("q", site.q_norm), ("k", site.k_norm), ("v", site.v_norm)) if n is not None]
    if len(named) == 2 and spell(named[0][1]) == spell(named[1][1]):
        return [f"{named[0][0]}/{named[1][0]} {spell(named[0][1])}"]
    return [f"{name} {spell(norm)}" for name, norm in named]
