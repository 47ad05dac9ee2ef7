"""Read by numbers what a graph does not say in words: run the piece between a linear and a score, and look.

Every probe replaces a linear's output by chosen numbers, and gains by ones, and reads queries, keys or values. At
position 0 a rotary embedding does nothing, and neither norms with unit gain nor positive factors change signs: that
is how rows are recognised. Rotation is then whatever happens between position 0 and the others.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, fx

from ..errors import UnsupportedModel
from ..runtime.layout import HeadNorm, Rotary
from .graph import Graph, shape
from .walk import Found, OutPath, Path

CODES = 62


@dataclasses.dataclass(frozen=True)
class Reading:
    """What one path does between its linear and the score."""

    first_rows: tuple[int, ...]
    """First row of each distinct head."""
    repeats: int
    """How often the graph repeats each head in a row."""
    dim: int
    order: tuple[int, ...]
    """Channel of the graph that holds each channel of a head, in the order of the rows."""
    factor: float
    """What the model multiplies the heads by, rotary scaling left out."""
    rotary: Rotary | None
    norm: HeadNorm | None
    clip: float | None


class PathProbe:
    """Runs one path on chosen linear outputs."""

    def __init__(self, graph: Graph, module: str, path: Path, transposed: bool) -> None:
        self.graph, self.module, self.path, self.transposed = graph, module, path, transposed
        self._run = graph.runner([path.target], [path.linear.out])
        self.rows = path.linear.outputs
        self.tokens = graph.tokens
        ones = {p: torch.ones(shape(p)) for p in path.parameters}
        self.unit = dict(ones)
        self.biases: tuple[fx.Node, ...] = ()
        if ones:
            still = self(torch.zeros(self.rows))
            moved = [p for p in ones if not torch.equal(self(torch.zeros(self.rows), {p: 0 * ones[p]}), still)]
            self.biases = tuple(moved)
            self.unit |= {p: 0 * ones[p] for p in moved}
        self.gains = tuple(p for p in path.parameters if p not in self.biases)

    def __call__(self, y: Tensor, changed: dict[fx.Node, Tensor] | None = None) -> Tensor:
        """[heads, T, H] for a linear output y, [rows] (the same at all positions) or [T, rows]."""
        y = y.expand(self.tokens, self.rows).reshape(shape(self.path.linear.out))
        out = self._run(y, more={**self.unit, **(changed or {})})[0].float()
        if self.transposed:
            out = out.transpose(-1, -2)
        return out.reshape(-1, *out.shape[-2:])

    def refuse(self, what: str) -> UnsupportedModel:
        name = self.graph.sources[self.path.linear.weight].name
        return UnsupportedModel(f"module {self.module}: between the projection {name} and the attention, {what}")

    def name(self, node: fx.Node) -> str:
        return self.graph.sources[node].name


def match_codes(codes: Tensor, shown: Tensor, refusal: UnsupportedModel) -> Tensor:
    """Index into `codes` [probes, n] of every column of `shown` [probes, ...].

    A mean that is subtracted may blank a code now and then, so near matches count where exact ones are missing.
    """
    places = 2 ** torch.arange(len(codes))
    keys, at = ((codes > 0) * places[:, None]).sum(0).sort()
    flat = shown.flatten(1)
    asked = ((flat > 0) * places[:, None]).sum(0)
    slot = torch.searchsorted(keys, asked).clamp_max(len(keys) - 1)
    index = at[slot]
    for i in ((keys[slot] != asked) | (flat == 0).any(0)).nonzero().flatten().tolist():
        score = (codes * flat[:, i : i + 1]).sum(0)
        best = int(score.argmax())
        if score[best] < 0.7 * len(codes):
            raise refusal
        index[i] = best
    return index.reshape(shown.shape[1:])


def snap_one(x: float) -> float:
    return 1.0 if abs(x - 1) < 2e-6 else x


def read_out(graph: Graph, found: Found, path: OutPath, generator: torch.Generator) -> tuple[int, ...]:
    """First input column of the output projection for each query head.

    Raises:
        UnsupportedModel: something between attention and output projection reorders or changes the heads.
    """
    name = graph.sources[path.linear.weight].name
    refusal = UnsupportedModel(
        f"module {found.module}: between the attention and the output projection {name}, something changes or reorders "
        "the heads. Only attentions whose heads go straight there can be rewritten."
    )
    run = graph.runner([path.linear.x], [found.out, *path.others])
    gates = [torch.ones(shape(g)) for g in path.others]
    size = shape(found.out)
    dim = size[-1]
    heads = torch.Size(size).numel() // (graph.tokens * dim)
    codes = torch.randint(0, 2, (CODES, path.linear.inputs), generator=generator) * 2 - 1
    if path.linear.inputs != heads * dim:
        raise refusal
    shown = []
    for code in codes:
        given = code.float().reshape(heads, 1, dim).expand(heads, graph.tokens, dim)
        given = given.transpose(0, 1) if found.tokens_first else given
        out = run(given.reshape(size), *gates)[0].reshape(graph.tokens, -1)
        if not torch.equal(out, out[:1].expand_as(out)) or not torch.equal(out.abs(), torch.ones_like(out)):
            raise refusal
        shown.append(out[0])
    # Column c shows channel `index[c]` of the heads laid end to end.
    index = match_codes(codes, torch.stack(shown).sign().long(), refusal)
    columns = index.argsort().reshape(heads, dim)
    if not torch.equal(columns, columns[:, :1] + torch.arange(dim)):
        raise refusal
    return tuple(columns[:, 0].tolist())
