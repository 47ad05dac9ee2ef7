"""What a conversion cost and saved: loss and KL beside the parent, and the bytes that the cache really holds."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from .errors import PlanError
from .provenance import versions
from .show import progress, render
from .text import Windows, load_windows, tokenizer_of


@dataclass(frozen=True, kw_only=True)
class Score:
    """One model on one text."""

    name: str
    nats_per_token: float
    kv_bytes_per_token: float
    """Measured: bytes of every tensor of the cache after one window, per token."""
    parameters: int


@dataclass(frozen=True, kw_only=True)
class Report:
    """A model beside its baseline on the same text. `print(report)` is the table."""

    model: Score
    baseline: Score | None
    kl: float | None
    """KL(baseline || model) in nats per token."""
    agreement: float | None
    """Fraction of tokens at which both find the same next token likeliest."""
    tokens: int
    """Predicted tokens."""
    windows: int
    text_digest: str
    versions: dict[str, str]

    @property
    def gap(self) -> float | None:
        """Nats per token that the model lost against the baseline."""
        return None if self.baseline is None else self.model.nats_per_token - self.baseline.nats_per_token

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "gap": self.gap}

    def __str__(self) -> str:
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        for i, name in enumerate(
            ("model", "nats/token", "change", "KL to baseline", "same top token", "KV bytes/token", "saved")
        ):
            table.add_column(name, justify="right" if i else "left")
        base = self.baseline
        if base is not None:
            table.add_row(base.name, f"{base.nats_per_token:.4f}", "", "", "", f"{base.kv_bytes_per_token:,.0f}", "")
        cells = ["", "", "", ""]
        if base is not None:
            assert self.gap is not None
            cells = [
                f"{self.gap / base.nats_per_token:+.1%}",
                f"{self.kl:.4f}",
                f"{self.agreement:.1%}",
                f"{1 - self.model.kv_bytes_per_token / base.kv_bytes_per_token:.0%}",
            ]
        m = self.model
        table.add_row(
            m.name, f"{m.nats_per_token:.4f}", *cells[:3], f"{m.kv_bytes_per_token:,.0f}", cells[3]
        )  # fmt: skip
        footer = f"{self.tokens:,} predicted tokens in {self.windows} windows, text {self.text_digest}"
        return render([table, footer])


def evaluate(
    model: PreTrainedModel,
    *,
    text: Any,
    baseline: PreTrainedModel | None = None,
    tokenizer: Any = None,
    length: int | None = None,
    samples: int | None = None,
    batch_size: int = 8,
) -> Report:
    """Score `model`, and `baseline` beside it, on held-out text.

    Args:
        text: what `load_windows` takes: a file, strings, or token ids.
        tokenizer: defaults to the one beside the model.
        length: tokens per window; the model's context, at most 512, by default.
        samples: at most so many windows.

    Raises:
        CheckpointError: text or tokenizer unusable. PlanError: the two models have different vocabularies.
    """
    config = model.config
    if baseline is not None and baseline.config.vocab_size != config.vocab_size:
        raise PlanError(
            f"baseline knows {baseline.config.vocab_size} tokens, the model {config.vocab_size}: not parent and child."
        )
    if not isinstance(text, (Tensor, Windows)) and tokenizer is None:
        tokenizer = tokenizer_of(config)
    length = length or min(getattr(config, "max_position_embeddings", None) or 512, 512)
    windows = load_windows(
        text, tokenizer, vocab_size=config.vocab_size, length=length, samples=samples, where="evaluation text"
    )
    sums = torch.zeros(4, dtype=torch.float64)  # nll of model, nll of baseline, KL, agreement
    predicted = 0
    with progress("evaluating", len(windows)) as advance, torch.inference_mode():
        for ids, mask in windows.batches(batch_size):
            keep = mask[:, 1:]
            labels = ids[:, 1:][keep]
            logp = log_probabilities(model, ids)[:, :-1][keep]
            sums[0] += F.nll_loss(logp, labels, reduction="sum").double()
            if baseline is not None:
                base = log_probabilities(baseline, ids)[:, :-1][keep]
                sums[1] += F.nll_loss(base, labels, reduction="sum").double()
                sums[2] += F.kl_div(logp, base, reduction="sum", log_target=True).double()
                sums[3] += (logp.argmax(-1) == base.argmax(-1)).sum()
            predicted += len(labels)
            advance(len(ids))
    nll, base_nll, kl, same = (sums / predicted).tolist()

    def score(name: str, which: PreTrainedModel, value: float) -> Score:
        ids = windows.ids_BT[:1, : int(windows.mask_BT[0].sum())]
        size = sum(p.numel() for p in which.parameters())
        return Score(
            name=name, nats_per_token=value, kv_bytes_per_token=cache_bytes(which, ids) / ids.shape[1], parameters=size
        )

    return Report(
        model=score("converted" if baseline is not None else "model", model, nll),
        baseline=None if baseline is None else score("baseline", baseline, base_nll),
        kl=None if baseline is None else kl,
        agreement=None if baseline is None else same,
        tokens=predicted,
        windows=len(windows),
        text_digest=windows.digest,
        versions=versions(),
    )


def log_probabilities(model: PreTrainedModel, ids_BT: Tensor) -> Tensor:
    """[B, T, vocab] in float32. Padding on the right needs no mask: attention is causal."""
    device = next(model.parameters()).device
    return model(input_ids=ids_BT.to(device), use_cache=False).logits.float().log_softmax(-1).cpu()


def cache_bytes(model: PreTrainedModel, ids_BT: Tensor) -> int:
    """Bytes of every tensor that the cache holds after `ids_BT`."""
    with torch.inference_mode():
        cache = model(input_ids=ids_BT.to(next(model.parameters()).device), use_cache=True).past_key_values
    held = [t for layer in cache.layers for t in vars(layer).values() if isinstance(t, Tensor)]
    tensors = {id(t): t for t in held if t.dim()}  # scalars are counters, not cache
    return sum(t.numel() * t.element_size() for t in tensors.values())
