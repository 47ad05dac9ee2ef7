"""What the gates of a model decide: counted while it trains, and read out on a text.

Decisions are counted as evaluation takes them, without noise. Counts that training uses carry the gradient of
sigmoid(logit), the probability of the decision under the logistic noise of training (straight-through). Of a gate of
heads the part of decisions that are 1 is 1 - alpha, and slots are those of the decision that evaluation takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from ..calibration.text import Windows
from ..errors import CheckpointError
from ..runtime.decisions import alpha_of_logit, hard_decisions, order_of_packed
from ..runtime.gated import SurgeryGatedAttention
from ..runtime.layout import Retain

EXAMPLE = 160
"""Tokens of the first window that are shown."""


class Counted(NamedTuple):
    """Sums over one batch of sequences, [all heads of all gated layers, layer by layer]; a latent counts as one."""

    gone: Tensor
    """Decisions that are 1; carries the gradient."""
    free: Tensor
    """Decisions that the gate is asked for."""
    slots: Tensor
    """Slots that the sequences take at their ends."""
    tokens: Tensor


def gated(model: nn.Module) -> dict[str, SurgeryGatedAttention]:
    """Attentions with a gate by qualified name."""
    found = ((name, module) for name, module in model.named_modules() if isinstance(module, SurgeryGatedAttention))
    return {name: module for name, module in found if "gate" in module._modules}


@contextmanager
def gate_logits(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Record the logits [B, K, T] of every gate in the forward pass inside, by name of the attention."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: tuple[Tensor, Tensor | None]) -> None:
            seen.setdefault(name, output[0])  # of the first pass: activation checkpointing runs layers again

        return hook

    handles = [module.gate.register_forward_hook(keep(name)) for name, module in gated(model).items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def count(
    model: nn.Module, logits: dict[str, Tensor], inputs: dict[str, Tensor], mask_BT: Tensor | None = None
) -> Counted:
    """Count the decisions of one forward pass.

    Args:
        inputs: of that pass: `input_ids`, and `position_ids` that start again at every document.
        mask_BT: False at padding, which stands on the right and is not counted.
    """
    positions = inputs.get("position_ids")
    if positions is None:
        positions = torch.arange(inputs["input_ids"].shape[1], device=inputs["input_ids"].device)[None]
    if mask_BT is not None:
        positions = torch.where(mask_BT, positions, 0)  # each a sequence of its own, of one token, which it keeps
    padding = 0 if mask_BT is None else int((~mask_BT).sum())
    order_BT = order_of_packed(positions).expand(*inputs["input_ids"].shape)
    parts = [count_layer(logits[name], order_BT, module.retain) for name, module in gated(model).items()]
    found = Counted(*(torch.cat(column) for column in zip(*parts, strict=True)))
    return found._replace(slots=found.slots - padding, tokens=found.tokens - padding)


def count_layer(logits_BKT: Tensor, order_BT: Tensor, retain: Retain) -> Counted:
    """`Counted` of one layer, [K] each."""
    hard = hard_decisions(logits_BKT, order_BT, retain.protected)
    free_BT = order_BT >= retain.protected
    if retain.decided_by == "head":
        goes = 1 - alpha_of_logit(logits_BKT.float())
    else:
        p = torch.sigmoid(logits_BKT.float())
        goes = hard + (p - p.detach())
    tokens = torch.full_like(goes[0, :, 0], order_BT.numel()).detach()
    return Counted(
        gone=torch.where(free_BT[:, None], goes, 0.0).sum((0, 2)),
        free=torch.full_like(tokens, float(free_BT.sum())),
        slots=tokens - left_out(hard, order_BT, retain).sum((0, 2)),
        tokens=tokens,
    )


def left_out(hard_BKT: Tensor, order_BT: Tensor, retain: Retain) -> Tensor:
    """[B, K, T] bool: tokens without a slot of their own once each sequence is at its end."""
    if retain.averages:
        return hard_BKT
    return hard_BKT & (_following(order_BT) >= (retain.window or 0))[:, None]


def _following(order_BT: Tensor) -> Tensor:
    """[B, T]: tokens after each one in its own sequence."""
    last = torch.cat((order_BT[:, 1:] == 0, torch.ones_like(order_BT[:, :1], dtype=torch.bool)), dim=1)
    places = torch.arange(order_BT.shape[1], device=order_BT.device).expand_as(order_BT)
    end = torch.where(last, places, order_BT.shape[1]).flip(1).cummin(1).values.flip(1)
    return end - places


def collapsed(gates: Mapping[str, SurgeryGatedAttention], gone: Sequence[float]) -> list[str]:
    """One sentence for each layer whose gate lets all tokens go, or none, unless its heads are to do either.

    Args:
        gone: part of each layer's decisions that are 1.
    """
    judged = [(n, rate) for (n, m), rate in zip(gates.items(), gone, strict=True) if m.retain.decided_by != "head"]
    extremes = [(name, rate) for name, rate in judged if rate >= 0.999 or rate == 0]
    return [f"{name}: its gate lets {'every token' if rate else 'no token'} go" for name, rate in extremes]


@dataclass(frozen=True, kw_only=True)
class GateReport:
    """What the gates of a model did to a text."""

    ratio: dict[int, tuple[float, ...]]
    """Tokens per slot at the ends of the windows, by layer and KV head."""
    total: float
    """The same of all heads together: the factor on their cache."""
    rate: dict[int, float]
    """Part of a layer's decisions that are 1."""
    warnings: tuple[str, ...]
    tokens: int
    length: int
    digest: str
    start: tuple[str, ...] | None
    """Tokens that every window starts with because the tokenizer starts a text so; None where token ids were given."""
    example: tuple[tuple[str, float], ...]
    """Tokens of the first window, and the part of all KV heads that let each go."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data; layers as strings."""
        return {
            "tokens_per_slot": self.total,
            "tokens_per_slot_by_head": {str(layer): list(heads) for layer, heads in self.ratio.items()},
            "decided": {str(layer): rate for layer, rate in self.rate.items()},
            "warnings": list(self.warnings),
            "tokens": self.tokens,
            "length": self.length,
            "text": self.digest,
            "window_start": None if self.start is None else list(self.start),
            "example": [[token, part] for token, part in self.example],
        }

    def tables(self) -> list[Any]:
        """Rich renderables."""
        heads = max(len(row) for row in self.ratio.values())
        table = Table(box=SIMPLE_HEAD, pad_edge=False, title="tokens per slot, by layer and KV head")
        for name in ("layer", *(f"head {k}" for k in range(heads)), "decisions to let go"):
            table.add_column(name, justify="right")
        for layer, row in self.ratio.items():
            cells = [f"{r:.2f}" for r in row] + [""] * (heads - len(row))
            table.add_row(str(layer), *cells, f"{self.rate[layer]:.0%}")
        shown = Text("in brackets: let go by at least half of all heads\n", style="dim")
        inside = False
        for token, part in self.example:
            goes = part >= 0.5
            shown.append("]" * (inside and not goes) + "[" * (goes and not inside))
            inside = goes
            shown.append(token, style="dim" if goes else "bold")
        shown.append("]" * inside)
        total = (
            f"{self.total:.2f} tokens per slot at the ends of windows of {self.length}, {self.tokens:,} tokens in all"
        )
        return [table, *(f"[red]{text}[/red]" for text in self.warnings), total, shown]


@torch.no_grad()
def read_gates(model: Any, windows: Windows, tokenizer: Any = None) -> GateReport:
    """Run `model` over `windows` and read what its gates decide; padding is not counted.

    Raises:
        CheckpointError: the model has no gate.
    """
    modules = gated(model)
    if not modules:
        raise CheckpointError(f"{type(model).__name__}: has no gates. Convert it with a recipe such as dms-4x.")
    was = model.training
    model.eval()
    counts: list[Counted] = []
    first: dict[str, Tensor] = {}
    shown = windows.ids_BT[0, : int(windows.mask_BT[0].sum())].tolist()
    for batch, mask in windows.batches():
        ids = batch.to(model.device)
        with gate_logits(model) as logits:
            model(input_ids=ids, use_cache=False)
        first = first or {name: x[:1, :, : len(shown)] for name, x in logits.items()}
        counts.append(count(model, logits, {"input_ids": ids}, mask.to(model.device)))
    model.train(was)
    sums = Counted(*(torch.stack(column).sum(0) for column in zip(*counts, strict=True)))
    heads = [module.plan.decisions for module in modules.values()]
    layers = [module.layer_idx for module in modules.values()]
    ratio = (sums.tokens / sums.slots.clamp_min(1)).split(heads)
    parts = zip(sums.gone.split(heads), sums.free.split(heads), strict=True)
    rates = [float(gone.sum() / free.sum().clamp_min(1)) for gone, free in parts]
    order = torch.arange(len(shown), device=model.device)[None]
    hard = {name: hard_decisions(first[name], order, module.retain.protected) for name, module in modules.items()}
    gone = torch.cat([left_out(hard[name], order, module.retain)[0] for name, module in modules.items()])
    texts = [f"{i} " for i in shown] if tokenizer is None else _pieces(tokenizer, shown)
    return GateReport(
        ratio={layer: tuple(r.tolist()) for layer, r in zip(layers, ratio, strict=True)},
        total=float(sums.tokens.sum() / sums.slots.sum()),
        rate=dict(zip(layers, rates, strict=True)),
        warnings=tuple(collapsed(modules, rates)),
        tokens=windows.tokens,
        length=windows.ids_BT.shape[1],
        digest=windows.digest,
        start=windows.start,
        example=tuple(zip(texts[:EXAMPLE], gone.float().mean(0)[:EXAMPLE].tolist(), strict=False)),
    )


def _pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    """The text that each token adds."""
    ends = [len(tokenizer.decode(ids[:i], clean_up_tokenization_spaces=False)) for i in range(len(ids) + 1)]
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return [text[a:b] for a, b in pairwise(ends)]
