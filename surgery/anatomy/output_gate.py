"""What multiplies the head outputs on their way to the output projection, read by numbers like everything else."""

from __future__ import annotations

import torch
from torch import Tensor

from ..attention.reference import relative_error
from ..errors import UnsupportedModel
from ..runtime.functions import GATE_FUNCTIONS
from ..runtime.layout import OutputGate
from .graph import Graph, shape
from .probe import CODES, match_codes
from .walk import Found, OutPath, Path

_TOLERANCE = 1e-5


def read_gate(
    graph: Graph,
    found: Found,
    out: OutPath,
    path: Path,
    columns: tuple[int, ...],
    value_dim: int,
    generator: torch.Generator,
) -> OutputGate | None:
    """The gate of one attention; None where it is no known function of single rows of its projection.

    Args:
        path: from the gate's projection to the gate.
        columns: first input column of the output projection for each query head.
    """
    if path.parameters:
        return None
    others = [n for n in out.others if n not in out.gates]
    run = graph.runner([out.linear.x], [found.out, path.linear.out, *others])
    lent = [torch.ones(shape(n)) for n in others]
    rows = path.linear.outputs

    def gated(heads: Tensor, y: Tensor) -> Tensor:
        """[T, columns] for head outputs in the graph's shape and rows [rows] of the projection, at all tokens alike."""
        given = y.expand(graph.tokens, rows).reshape(shape(path.linear.out))
        return run(heads, given, *lent)[0].float().reshape(graph.tokens, -1)

    ones = torch.ones(shape(found.out))
    still = gated(ones, torch.zeros(rows))[0]
    codes = torch.randint(0, 2, (CODES, rows), generator=generator) * 2 - 1
    shown = torch.stack([gated(ones, code.float())[0] - still for code in codes]).sign().long()
    try:
        row_of = match_codes(codes, shown, UnsupportedModel("the gate does not grow with its projection"))
    except UnsupportedModel:
        return None
    by_head = row_of[torch.tensor(columns)[:, None] + torch.arange(value_dim)]
    first = by_head[:, 0]
    width = 1 if (by_head == first[:, None]).all() else value_dim
    if not torch.equal(by_head, first[:, None] + torch.arange(value_dim) * (width > 1)):
        return None
    y = 2 * torch.randn(rows, generator=generator)
    heads = torch.randn(shape(found.out), generator=generator)
    # Any gate that is not 0 shows where the heads stand among the columns.
    plain = gated(heads, torch.ones(rows)) / gated(ones, torch.ones(rows))
    alone, product = gated(ones, y)[0], gated(heads, y)
    for name, function in GATE_FUNCTIONS.items():
        gate = function(y)[row_of]
        if max(relative_error(alone, gate), relative_error(product, plain * gate)) <= _TOLERANCE:
            bias = path.linear.bias
            return OutputGate(
                weight=graph.sources[path.linear.weight].name,
                bias=None if bias is None else graph.sources[bias].name,
                head_rows=tuple(first.tolist()),
                transposed=path.linear.transposed,
                width=width,
                function=name,  # type: ignore[arg-type]
            )
    return None
