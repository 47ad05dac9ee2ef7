"""A decode step over caches as plans have them: random weights of a real shape, compiled as one graph.

The loop is the one that a served model would run: static caches, positions on the device, one graph (CUDA graphs where
there is a GPU), greedy sampling inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.decode_gqa import decode_gqa
from ..kernels.decode_latent import decode_latent
from ..kernels.rope_append import rope_append_
from ..runtime.layout import Latent, LayerPlan
from .decode_layouts import Shape


class Layer(nn.Module):
    """Attention and MLP of one decoder layer, for one new token per sequence."""

    def __init__(self, shape: Shape, plan: LayerPlan) -> None:
        super().__init__()
        self.shape, self.plan, self.owns = shape, plan, plan.owner == plan.layer
        D, N, H = shape.hidden, shape.heads, shape.head_dim
        self.rank, self.turning = _rank_and_turning(plan)
        R, P = self.rank, self.turning
        self.norms = nn.ParameterList(nn.Parameter(torch.ones(D)) for _ in range(2))
        self.q = _linear(D, N * (H + P if R else H))
        self.o = _linear(N * H, D)
        if self.owns:
            self.kv = _linear(D, plan.project.dims)
        if R:
            self.k_up = nn.Parameter(torch.randn(N, H, R) / H**0.5)
            self.v_up = nn.Parameter(torch.randn(N, R, H) / R**0.5)
        self.gate_up = _linear(D, 2 * shape.mlp)
        self.down = _linear(shape.mlp, D)

    def forward(self, x: Tensor, stored: tuple[Tensor, ...], cos: Tensor, sin: Tensor, places: Tensor) -> Tensor:
        shape, R, P = self.shape, self.rank, self.turning
        B, N, H = len(x), shape.heads, shape.head_dim
        h = F.rms_norm(x, (shape.hidden,), self.norms[0])
        if R:
            q_nope, q_rope = self.q(h).view(B, N, -1).split((H, P), -1)
            q = torch.cat((torch.bmm(q_nope.transpose(0, 1), self.k_up).transpose(0, 1), q_rope), -1)
            if self.owns:
                q = rope_append_(q, self.kv(h)[:, None], None, cos, sin, places, *stored, None, False, R)
            else:
                q = _turn(q, cos, sin, R)
            mean, _ = decode_latent(q, *stored, places + 1, (H + P) ** -0.5, R)
            attended = torch.bmm(mean.transpose(0, 1), self.v_up).transpose(0, 1)
        else:
            q = self.q(h).view(B, N, H)
            if self.owns:
                k, v = self.kv(h).view(B, 2, self.plan.project.kv_heads, H).unbind(1)
                q = rope_append_(q, k, v, cos, sin, places, *stored)
            else:
                q = _turn(q, cos, sin, 0)
            attended, _ = decode_gqa(q, *stored, places + 1, H**-0.5)
        x = x + self.o(attended.reshape(B, N * H))
        h = F.rms_norm(x, (shape.hidden,), self.norms[1])
        gate, up = self.gate_up(h).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class DecodeLoop(nn.Module):
    """A whole model at a decode step: tokens in, greedy next tokens out, caches and positions advanced in place."""

    places: Tensor

    def __init__(self, shape: Shape, plans: Sequence[LayerPlan], batch: int, capacity: int) -> None:
        super().__init__()
        self.shape, H = shape, shape.head_dim
        self.embedding = nn.Parameter(torch.randn(shape.vocabulary, shape.hidden))
        self.layers = nn.ModuleList(Layer(shape, plan) for plan in plans)
        self.norm = nn.Parameter(torch.ones(shape.hidden))
        self.head = _linear(shape.hidden, shape.vocabulary)
        angles = {}
        for plan in plans:
            rank, turning = _rank_and_turning(plan)
            pairs = (turning if rank else H) // 2
            angles[pairs] = torch.arange(capacity)[:, None] * 10000.0 ** -(torch.arange(pairs) / max(pairs, 1))
            if plan.owner != plan.layer:
                continue
            shapes = [(1, plan.project.dims)] if rank else [(plan.project.kv_heads, H)] * 2
            for part, (heads, width) in enumerate(shapes):
                self.register_buffer(f"cache{plan.layer}_{part}", torch.randn(batch, heads, capacity, width))
        for pairs, table in angles.items():
            self.register_buffer(f"cos{pairs}", table.cos().float())
            self.register_buffer(f"sin{pairs}", table.sin().float())
        self.tables = tuple(angles)
        self.register_buffer("places", torch.zeros(batch, dtype=torch.int32))

    def start(self, length: int) -> None:
        """Say that `length` tokens are cached."""
        self.places.fill_(length)

    def forward(self, tokens_B: Tensor) -> Tensor:
        places = self.places
        turns = {
            pairs: [getattr(self, f"{name}{pairs}").index_select(0, places) for name in ("cos", "sin")]
            for pairs in self.tables
        }
        x = F.embedding(tokens_B, self.embedding)
        for module in self.layers:
            layer = cast(Layer, module)
            stored = tuple(getattr(self, f"cache{layer.plan.owner}_{part}") for part in range(1 if layer.rank else 2))
            cos, sin = turns[(layer.turning if layer.rank else self.shape.head_dim) // 2]
            x = layer(x, stored, cos, sin, places)
        x = F.rms_norm(x, (self.shape.hidden,), self.norm)
        places += 1
        return self.head(x).argmax(-1)


def _rank_and_turning(plan: LayerPlan) -> tuple[int, int]:
    """Numbers of a latent that never turn, and that are rotated; zeros where heads are cached."""
    return (plan.project.rank, plan.project.rope_dims) if isinstance(plan.project, Latent) else (0, 0)


def _linear(columns: int, rows: int) -> nn.Linear:
    return nn.Linear(columns, rows, bias=False)


def _turn(q_BNH: Tensor, cos_BF: Tensor, sin_BF: Tensor, start: int) -> Tensor:
    a, b = q_BNH[..., start:].chunk(2, -1)
    cos, sin = cos_BF[:, None], sin_BF[:, None]
    return torch.cat((q_BNH[..., :start], a * cos - b * sin, b * cos + a * sin), -1).to(q_BNH.dtype)
