"""Prove a description: what it gives equals the graph, step by step, on random weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from ..attention.reference import attend_heads, finished_role, project_out, relative_error, role_heads, turn
from ..errors import UnsupportedModel
from ..runtime.layout import AttentionSite, HeadNorm
from .graph import Graph, shape
from .positions import max_positions
from .probe import Reading
from .walk import Found, OutPath, Path, Paths

_TOLERANCE = 1e-5
_ROLES = {"q": "queries", "k": "keys", "v": "values"}


def prove(
    graph: Graph,
    found: Found,
    paths: Paths,
    site: AttentionSite,
    readings: tuple[Reading, Reading, Reading],
    generator: torch.Generator,
) -> AttentionSite:
    """Compare every step with the graph on random weights; decides whether norms come before or after rotation."""
    positions = torch.arange(graph.tokens)
    x_BTD = torch.randn(1, graph.tokens, site.hidden_size, generator=generator)
    for role, reading in zip("qkv", readings, strict=True):
        path: Path = getattr(paths, role)
        linear = path.linear
        spread = 2 * (site.clip_qkv or 1.0)
        weights = _random_weights(graph, linear, path.parameters, spread, generator)
        run = graph.runner([path.target], [linear.x, *weights])
        got = run(x_BTD.reshape(shape(linear.x)), *weights.values())[0].float()
        got = got.transpose(-1, -2) if found.k_transposed and role == "k" else got
        got = got.reshape(1, -1, *got.shape[-2:])[:, :: reading.repeats][..., list(reading.order)]
        params = {graph.sources[n].name: w for n, w in weights.items()}
        heads = role_heads(getattr(site, role), params, x_BTD, reading.dim, site.clip_qkv)
        rotary = None if role == "v" else site.rotary
        best = float("inf")
        for norm in _orders(reading.norm, rotary is not None):
            mine = reading.factor * finished_role(heads, params, norm, rotary, positions)
            best = min(best, relative_error(mine, got))
            if best <= _TOLERANCE:
                if norm is not None:
                    changed: dict[str, Any] = {f"{role}_norm": norm}
                    site = dataclasses.replace(site, **changed)
                break
        else:
            raise UnsupportedModel(
                f"module {found.module}: its {_ROLES[role]}, computed from what was read of the model, "
                f"differ from its own (relative error {best:.1e}): something in them was not understood."
            )
        _prove_far(graph, found, path, site, reading, role, generator)
        del params, weights, run
    _prove_out(graph, found, paths.o, site, generator)
    return site


def _prove_far(
    graph: Graph, found: Found, path: Path, site: AttentionSite, reading: Reading, role: str, generator: torch.Generator
) -> None:
    """Compare at positions up to the model's limit: some models begin to scale queries thousands of tokens on."""
    limit = max_positions(graph.twin.config)
    if graph.positions is None or limit is None or (site.rotary and site.rotary.length_dependent):
        return
    far = torch.linspace(0, limit - 1, graph.tokens, dtype=torch.float64).long()
    given = {p: torch.ones(shape(p)) for p in path.parameters}
    run = graph.runner([path.target], [path.linear.out, graph.positions, *given])
    y = torch.randn(path.linear.outputs, generator=generator).expand(graph.tokens, -1).reshape(shape(path.linear.out))
    got = run(y, far[None], *given.values())[0].float()
    got = got.transpose(-1, -2) if found.k_transposed and role == "k" else got
    got = got.reshape(1, -1, *got.shape[-2:])[..., list(reading.order)]
    # Position 0 is proved already; a rotation from there must lead to the others (angles lose digits far out).
    here = got[:, :, :1].expand_as(got)
    norm: HeadNorm | None = getattr(site, f"{role}_norm")
    after = norm is not None and norm.after_rotary and norm.kind == "layer"
    expected = here if role == "v" else turn(site.rotary, here, far)
    if not after and relative_error(expected, got) > 1e-2:
        raise UnsupportedModel(
            f"module {found.module}: its {_ROLES[role]} change with the position, far from the start, in a way that "
            "is no rotation at constant frequencies."
        )


def _orders(norm: HeadNorm | None, rotates: bool) -> Iterable[HeadNorm | None]:
    yield norm
    if norm is not None and rotates:
        yield dataclasses.replace(norm, after_rotary=True)


def _random_weights(
    graph: Graph, linear: Any, others: Iterable[fx.Node], spread: float, generator: torch.Generator
) -> dict[fx.Node, Tensor]:
    """Random values for a linear and for what follows it; outputs get about the given spread."""
    limit = spread * (3 / linear.inputs) ** 0.5
    weights = {linear.weight: torch.empty(shape(linear.weight)).uniform_(-limit, limit, generator=generator)}
    if linear.bias is not None:
        weights[linear.bias] = spread * torch.randn(shape(linear.bias), generator=generator)
    for node in others:
        weights[node] = 1 + 0.5 * torch.randn(shape(node), generator=generator)
    return weights


def prove_scores(
    graph: Graph, found: Found, site: AttentionSite, readings: tuple[Reading, ...], generator: torch.Generator
) -> None:
    """Where the graph itself computes the attention, compare its output (the interface's is defined by its call)."""
    if found.scores is None:
        return
    q, k, v = (torch.randn(shape(n), generator=generator) for n in (found.q, found.k, found.v))
    got = graph.runner([found.out], [found.q, found.k, found.v])(q, k, v)[0].float()
    q, k, v = (t.reshape(1, -1, *t.shape[-2:]) for t in (q, k.transpose(-1, -2), v))
    alone = dataclasses.replace(site, scale=site.scale / (readings[0].factor * readings[1].factor))
    # The graph's keys may be repeated already; attend_heads repeats by what is left.
    error = relative_error(attend_heads(alone, q, k, v), got.reshape(1, -1, *got.shape[-2:]))
    # ALiBi that the model rounds to bfloat16 (Falcon) is met to that rounding.
    if error > (_TOLERANCE if site.alibi_slopes is None else 5e-2):
        raise UnsupportedModel(
            f"module {found.module}: its attention, computed from what was read of the "
            f"model, differs from its own (error {error:.1e}): something in it was not understood."
        )


def _prove_out(graph: Graph, found: Found, path: OutPath, site: AttentionSite, generator: torch.Generator) -> None:
    linear = path.linear
    heads_BNTH = torch.randn(1, site.heads, graph.tokens, site.value_dim, generator=generator)
    weights = _random_weights(graph, linear, (), 1.0, generator)
    given = (heads_BNTH.transpose(1, 2) if found.tokens_first else heads_BNTH).reshape(shape(found.out))
    gates = {g: torch.ones(shape(g)) for g in path.others}
    run = graph.runner([linear.out], [found.out, *weights, *gates])
    got = run(given, *weights.values(), *gates.values())[0]
    mine = project_out(site, {graph.sources[n].name: w for n, w in weights.items()}, heads_BNTH)
    error = relative_error(mine, got.reshape(mine.shape).float())
    if error > _TOLERANCE:
        raise UnsupportedModel(
            f"module {found.module}: its output, computed from what was read of the "
            f"model, differs from its own (relative error {error:.1e}): something in it was not understood."
        )
