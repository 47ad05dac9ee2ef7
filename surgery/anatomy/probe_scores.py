"""Recognise what lies between q k^T and the softmax: scale, soft cap, window, sinks, ALiBi."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, fx

from ..errors import UnsupportedModel
from .graph import Graph, shape
from .recording import MASK
from .walk import Found

_FAR = (1_048_573, 999_983)
"""Two distant query positions, at which a mask function is asked for its window."""


@dataclasses.dataclass(frozen=True)
class Scores:
    """What happens between q k^T and the softmax."""

    scale: float
    softcap: float | None
    window: int | None
    window_in_mask: bool
    sinks: str | None
    alibi_slopes: tuple[float, ...] | None


def read_scores(graph: Graph, found: Found, heads: int, generator: torch.Generator) -> Scores:
    """Scale, soft cap, window, sinks and ALiBi of one attention.

    Raises:
        UnsupportedModel: the mask or the scores follow no known pattern.
    """
    call = found.call
    if call is None:
        assert found.scores is not None
        scale, bias = _measure_scores(graph, found, generator)
        window, slopes = _read_bias(found.module, bias, heads)
        tags = [n.args[1] for n in graph.between([found.scores], [found.q, found.k]) if n.target is MASK]
        in_mask = any(_window_at(graph, found, tag, _FAR[0]) is not None for tag in tags)  # type: ignore[arg-type]
        return Scores(scale, None, window, in_mask, None, slopes)
    if call.unknown:
        raise UnsupportedModel(
            f"module {found.module}: its attention is given {', '.join(call.unknown)}, which surgery cannot compute."
        )
    window, slopes = _read_mask(graph, found, heads)
    in_mask = window is not None and found.mask is not None
    return Scores(call.scale, call.softcap, window, in_mask, _read_sinks(graph, found, heads, generator), slopes)


def _measure_scores(graph: Graph, found: Found, generator: torch.Generator) -> tuple[float, Tensor]:
    assert found.scores is not None
    _refuse_learned(graph, found, graph.between([found.scores], [found.q, found.k]))
    run = graph.runner([found.scores], [found.q, found.k])
    q = torch.randn(shape(found.q), generator=generator)
    k = torch.randn(shape(found.k), generator=generator)
    tokens = graph.tokens

    def scores(a: Tensor, b: Tensor) -> Tensor:
        return run(a, b)[0].float().reshape(-1, tokens, tokens)

    bias = scores(0 * q, 0 * k)
    seen = bias > -1e4
    plain = (q @ k).reshape(-1, tokens, tokens)
    seen, bias_n = seen.expand_as(plain), bias.expand_as(plain)
    for size in (1.0, 8.0):
        got = (scores(size * q, k).expand_as(plain) - bias_n)[seen]
        wanted = size * plain[seen]
        scale = float((got * wanted).double().sum() / wanted.pow(2).double().sum())
        if float((got - scale * wanted).abs().max()) > 2e-5 * float(bias_n[seen].abs().max() + got.abs().max()):
            raise UnsupportedModel(
                f"module {found.module}: its scores are not a multiple of q k^T plus a bias (a soft cap in the "
                "model's own code is not understood)."
            )
    return scale, bias


def _read_mask(graph: Graph, found: Found, heads: int) -> tuple[int | None, tuple[float, ...] | None]:
    call = found.call
    assert call is not None
    if found.mask is None:
        if not call.causal:
            raise UnsupportedModel(f"module {found.module}: its attention is not causal.")
        return call.window, None
    pieces = graph.between([found.mask], [])
    _refuse_learned(graph, found, pieces)
    tags = [n.args[1] for n in pieces if n.target is MASK]
    value = graph.runner([found.mask], [])()[0]
    if value.dtype == torch.bool:
        value = torch.zeros(value.shape).masked_fill(~value, float("-inf"))
    window, slopes = _read_bias(found.module, value.reshape(-1, *value.shape[-2:]), heads)
    if len(tags) == 1:
        widths = [_window_at(graph, found, tags[0], far) for far in _FAR]  # type: ignore[arg-type]
        if widths[0] != widths[1] or (window is not None and window != widths[0]):
            raise UnsupportedModel(
                f"module {found.module}: its mask is neither causal nor a sliding window (chunks, perhaps)."
            )
        window = widths[0]
    return window, slopes


def _refuse_learned(graph: Graph, found: Found, nodes: Sequence[fx.Node]) -> None:
    for node in nodes:
        if (source := graph.sources.get(node)) is not None and source.kind == "parameter":
            raise UnsupportedModel(
                f"module {found.module}: its mask or the bias on its scores is computed from {source.name}; only fixed "
                "patterns (causal, window, ALiBi) are understood."
            )


def _window_at(graph: Graph, found: Found, tag: int, far: int) -> int | None:
    """How many tokens a query at a far position sees, by bisection of the mask function."""

    def sees(key: int) -> bool:
        return bool(graph.visible(tag, torch.tensor(far), torch.tensor(key)))

    if sees(far + 1) or not sees(far):
        raise UnsupportedModel(f"module {found.module}: its mask is not causal.")
    if sees(0):
        return None
    near, hidden = 0, 1
    while hidden < far and sees(far - hidden):
        near, hidden = hidden, hidden * 2
    hidden = min(hidden, far)
    while hidden - near > 1:
        middle = (near + hidden) // 2
        near, hidden = (middle, hidden) if sees(far - middle) else (near, middle)
    return hidden


def _read_bias(module: str, bias_NTS: Tensor, heads: int) -> tuple[int | None, tuple[float, ...] | None]:
    """Window and ALiBi slopes of what is added to the scores."""
    seen = bias_NTS > -1e4
    tokens = bias_NTS.shape[-1]
    if not (seen == seen[0]).all() or seen.shape[-2] != tokens:
        raise UnsupportedModel(
            f"module {module}: its heads have different masks; one mask for all heads of a layer is understood."
        )
    token = torch.arange(tokens)
    behind = token[:, None] - token
    width = int(seen[0, -1].sum())
    if tokens > 1 and seen[0, 0, -1]:
        raise UnsupportedModel(
            f"module {module}: its attention is not causal: tokens see later ones, so that it keeps no KV cache."
        )
    if not torch.equal(seen[0], (behind >= 0) & (behind < width)):
        raise UnsupportedModel(f"module {module}: its mask is neither causal nor a sliding window.")
    window = None if width == tokens else width
    bias = (bias_NTS - bias_NTS.diagonal(dim1=1, dim2=2)[..., None]).masked_fill(~seen, 0.0)
    if not bias.any():
        return window, None
    if tokens < 2 or len(bias) not in (1, heads):
        raise UnsupportedModel(f"module {module}: an unknown bias is added to its scores.")
    slopes = -bias[:, 1, 0]
    expected = (slopes[:, None, None] * -behind).masked_fill(~seen, 0.0)
    # Falcon makes its slopes times positions in bfloat16: what differs by such rounding is still ALiBi.
    rounding = bias_NTS.masked_fill(~seen, 0.0).abs().amax(-1, keepdim=True) * 2**-7
    if ((bias - expected).abs() > rounding).any():
        raise UnsupportedModel(f"module {module}: the bias on its scores is not linear in the distance (ALiBi).")
    return window, tuple(slopes.expand(heads).tolist())


def _read_sinks(graph: Graph, found: Found, heads: int, generator: torch.Generator) -> str | None:
    if found.sinks is None:
        return None
    parameters = [n for n in graph.between([found.sinks], []) if n in graph.sources]
    if len(parameters) == 1 and graph.sources[parameters[0]].kind == "parameter":
        value = torch.randn(shape(parameters[0]), generator=generator)
        got = graph.runner([found.sinks], parameters)(value)[0]
        if value.numel() == heads and torch.equal(got.flatten(), value.flatten()):
            return graph.sources[parameters[0]].name
    raise UnsupportedModel(f"module {found.module}: its attention sinks are not one parameter per head.")
