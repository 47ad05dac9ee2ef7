"""Likelihood of text under a model, in one forward pass (prefill) or token by token through its cache (decode).

Scoring in one pass never reads the cache: a lossy or broken cache goes unseen there. Both paths are measured, and for a
cache that loses nothing they must agree.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..calibration.text import Windows
from ..console import progress
from ..errors import UnsupportedModel
from ..runtime.calling import cache_of, going_on

Path = Literal["prefill", "decode"]
BUCKETS = ("early", "middle", "late")
"""Thirds of the window, by the position of the token that predicts."""
PREFILL_LOGITS = 2**26
"""Logits of one prefill batch at most: 256 MB in float32."""
DECODE_BATCH = 64


@dataclass(frozen=True)
class Sums:
    """Sums over the predicted tokens of each window and each third of it, float64 [W, 3]."""

    tokens: Tensor
    nll: Tensor
    baseline_nll: Tensor
    kl: Tensor
    """KL(baseline || model)."""
    same: Tensor
    """Tokens at which both find the same next token likeliest."""
    problem: str | None = None
    """Where the first log-probability that is not a number came from; the sums are then NaN."""


def score_windows(
    model: PreTrainedModel, baseline: PreTrainedModel | None, windows: Windows, path: Path, at_once: int | None = None
) -> Sums:
    """Score `model`, and `baseline` beside it on the same path.

    Args:
        at_once: tokens of each window that come at once before the others are decoded; None: `prompt_of` both.

    Raises:
        UnsupportedModel: the path is `decode` and a model returns no cache.
    """
    W, T = windows.ids_BT.shape
    vocabulary = model.config.get_text_config().vocab_size
    models = [m for m in (model, baseline) if m is not None]
    prompt = T if path == "prefill" else at_once or max(prompt_of(m, T) for m in models)
    size = DECODE_BATCH if prompt == 1 else max(1, PREFILL_LOGITS // (prompt * vocabulary))
    sums = torch.zeros(W, len(BUCKETS), 5, dtype=torch.float64)
    problem = None
    with progress(f"evaluating ({path})", W * T) as advance, torch.inference_mode():
        for start in range(0, W, size):
            rows = slice(start, start + size)
            ids, mask = windows.ids_BT[rows], windows.mask_BT[rows]
            pieces = log_probabilities(model, ids, path, prompt)
            others = pieces if baseline is None else log_probabilities(baseline, ids, path, prompt)
            for (first, logp), (_, base) in zip(pieces, others, strict=True) if baseline else ((p, p) for p in pieces):
                place = slice(first + 1, first + 1 + logp.shape[1])  # of the predicted tokens
                labels, keep = ids[:, place], mask[:, place]
                values = _per_token(logp[:, : labels.shape[1]], base[:, : labels.shape[1]], labels)
                if problem is None and not bool(values[keep].isfinite().all()):
                    problem = _where(values, keep, start, first, path)
                bucket = (torch.arange(first, first + labels.shape[1]) * len(BUCKETS)) // max(T - 1, 1)
                sums[rows].index_add_(1, bucket, torch.where(keep[..., None], values, 0.0))
                advance(ids.shape[0] * logp.shape[1])
    tokens, nll, base_nll, kl, same = sums.unbind(-1)
    return Sums(tokens, nll, base_nll, kl, same, problem)


def prompt_of(model: PreTrainedModel, tokens: int) -> int:
    """Tokens of a window that come at once before others are decoded: one; half of them where slots leave behind
    prompts alone, so that there is something to lose."""
    return max(1, tokens // 2) if _waits(model) else 1


def rows_of(model: PreTrainedModel) -> int:
    """Texts of different lengths that may be decoded together: one where half of each is its prompt, for that of the
    longest would be the prompt of all."""
    return 1 if _waits(model) else DECODE_BATCH


def _waits(model: PreTrainedModel) -> bool:
    return any(plan.retain is not None and plan.retain.waits_for_prompts for plan in getattr(model, "plans", ()))


def log_probabilities(
    model: PreTrainedModel, ids_BT: Tensor, path: Path, prompt: int = 1
) -> Iterator[tuple[int, Tensor]]:
    """(position, [B, t, vocab]) in order of position, float32 on the CPU: all at once, or, behind a prompt, one by one.

    Padding on the right needs no mask: attention is causal.
    """
    ids = ids_BT.to(model.device)
    if path == "prefill":
        yield 0, _logp(model(input_ids=ids, use_cache=False).logits)
        return
    yield from decode(model, ids, prompt, whole_prompt=True)


def decode(
    model: PreTrainedModel, ids_BT: Tensor, prefill: int, whole_prompt: bool = False
) -> Iterator[tuple[int, Tensor]]:
    """Log-probabilities from position `prefill` - 1 on: the first `prefill` tokens at once, then one by one.

    Args:
        whole_prompt: those of all positions of the prompt as well, from 0 on.
    """
    out = model(input_ids=ids_BT[:, :prefill], use_cache=True, **({} if whole_prompt else last_logits(model)))
    cache = cache_of(out)
    if cache is None:
        raise UnsupportedModel(
            f"{type(model).__name__} returns no cache, so it cannot be decoded through one. Use path='prefill'."
        )
    yield (0, _logp(out.logits)) if whole_prompt else (prefill - 1, _logp(out.logits[:, -1:]))
    for t in range(prefill, ids_BT.shape[1]):
        out = model(**going_on(model, ids_BT[:, t : t + 1], cache, t))
        cache = cache_of(out)
        yield t, _logp(out.logits)


def last_logits(model: PreTrainedModel) -> dict[str, int]:
    """Arguments by which a model computes no logits but those of the last token, where it can: those of a long prompt
    over a large vocabulary are gigabytes."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def _logp(logits: Tensor) -> Tensor:
    return logits.float().log_softmax(-1).cpu()


def _per_token(logp: Tensor, base: Tensor, labels: Tensor) -> Tensor:
    """[B, t, 5]: 1, nll, nll of the baseline, KL, same top token."""
    nll, base_nll = (-x.gather(-1, labels[..., None])[..., 0] for x in (logp, base))
    if base is logp:
        kl, same = torch.zeros_like(nll), torch.ones_like(nll)
    else:
        kl, same = divergence(base, logp)
    return torch.stack([torch.ones_like(nll), nll, base_nll, kl, same], -1).double()


def divergence(base: Tensor, logp: Tensor) -> tuple[Tensor, Tensor]:
    """KL(base || model) in nats, and 1 where both find the same token likeliest, [...] each, of log-probabilities.

    Tokens that the baseline excludes (logits of -inf) cost nothing; what is not a number stays so.
    """
    p = base.exp()
    kl = torch.where(p > 0, p * (base - logp), torch.where(base.isnan(), base, 0.0)).sum(-1)
    return kl, (logp.argmax(-1) == base.argmax(-1)).float()


def _where(values: Tensor, keep: Tensor, row: int, first: int, path: Path) -> str:
    bad = (~values.isfinite().all(-1)) & keep
    b, t = (int(i) for i in bad.nonzero()[0])
    return (
        f"{path}: log-probability is not finite at window {row + b}, position {first + t} (first of {int(bad.sum())})"
    )
