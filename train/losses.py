"""Losses of recovery training, none of which holds logits of a whole batch.

`distil` reads last hidden states and output heads, and works through the tokens in chunks: forward KL to the parent
and cross-entropy, with the gradient computed in the same pass. Peak memory is a few [chunk, V] tensors in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
"""Label of a position at which nothing is predicted."""
CHUNK_LOGITS = 2**25
"""Logits of one chunk: 128 MB in float32. Five such tensors live at the peak."""


@dataclass(frozen=True, kw_only=True)
class Head:
    """Logits from last hidden states: softcap * tanh(scale * (h Wᵀ + b) / softcap), in float32."""

    weight_VD: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, h_PD: Tensor) -> Tensor:
        bias = None if self.bias_V is None else self.bias_V.to(h_PD.dtype)
        x = F.linear(h_PD, self.weight_VD.to(h_PD.dtype), bias).float()
        if self.scale != 1.0:
            x = x * self.scale
        return x if self.softcap is None else (x / self.softcap).tanh_() * self.softcap


class Weights(NamedTuple):
    """What the loss adds up, and the temperature of both distributions in the KL."""

    kl: float = 1.0
    ce: float = 0.0
    temperature: float = 1.0


class TopK(NamedTuple):
    """What is kept of the parent's distribution over the next token at each position."""

    ids: Tensor
    """[B, T, k] or [P, k], integers."""
    log_p: Tensor
    """Log-probabilities of these tokens, at the temperature of the loss."""
    nll: Tensor
    """Cross-entropy of the text at temperature 1, [B, T] or [P]."""


class Distilled(NamedTuple):
    """Sums over the predicted tokens. Only `total` carries a gradient."""

    total: Tensor
    kl: Tensor
    """KL(parent || model) in nats, at the temperature, times its square."""
    nll: Tensor
    """Cross-entropy of the text in nats."""
    parent_nll: Tensor
    """The parent's; 0 where there is no parent."""


def distil(
    h_BTD: Tensor,
    head: Head,
    labels_BT: Tensor,
    parent_h_BTD: Tensor | None = None,
    parent_head: Head | None = None,
    weights: Weights = Weights(),  # noqa: B008 - immutable
    chunk_logits: int = CHUNK_LOGITS,
    kept: TopK | None = None,
) -> Distilled:
    """Sum of kl * KL(parent || model) + ce * cross-entropy over the tokens that `labels_BT` names.

    Args:
        h_BTD: last hidden states of the model, what its head reads.
        labels_BT: the token to predict *at* each position (not shifted): position t is predicted from t - 1. `IGNORE`
            where nothing is.
        parent_h_BTD, parent_head: None where the KL is not asked for; the widths may differ, the vocabulary may not.
        chunk_logits: numbers in the logits of one chunk of tokens.
        kept: instead of the parent: its likeliest tokens. The KL is then that of the distributions over these and
            "another token", which is at most the whole one.

    The KL is the forward one: the expectation is the parent's. Gradients reach `h_BTD` and the head's tensors.

    Source: chunking of tokens with the gradient taken in the forward pass as in Liger's fused linear cross-entropy,
    arXiv:2410.10989.
    """
    wanted = labels_BT[:, 1:] != IGNORE
    h_PD = h_BTD[:, :-1][wanted]
    parent_h_PD = None if parent_h_BTD is None else parent_h_BTD[:, :-1][wanted]
    chosen = None if kept is None else TopK(*(tensor[:, :-1][wanted] for tensor in kept))
    call = _Call(head, parent_head, labels_BT[:, 1:][wanted], parent_h_PD, weights, chunk_logits, chosen)
    return Distilled(*_Distil.apply(h_PD, head.weight_VD, head.bias_V, call))


class _Call(NamedTuple):
    """The arguments that take no gradient."""

    head: Head
    parent_head: Head | None
    labels_P: Tensor
    parent_h_PD: Tensor | None
    weights: Weights
    chunk_logits: int
    kept: TopK | None


class _Distil(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h_PD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, call: _Call
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        head, weights = call.head, call.weights
        needs_h, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad_h = torch.empty_like(h_PD) if needs_h else None
        grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if needs_weight else None
        grad_bias = (
            torch.zeros_like(head.bias_V, dtype=torch.float32) if needs_bias and head.bias_V is not None else None
        )
        sums = torch.zeros(3, dtype=torch.float64, device=h_PD.device)
        size = max(1, call.chunk_logits // len(weight_VD))
        for start in range(0, len(h_PD), size):
            rows = slice(start, start + size)
            logits = head(h_PD[rows])
            logits_t = None
            if call.parent_h_PD is not None and call.parent_head is not None:
                logits_t = call.parent_head(call.parent_h_PD[rows])
            kept = None if call.kept is None else TopK(*(tensor[rows] for tensor in call.kept))
            grad = _chunk(logits, logits_t, kept, call.labels_P[rows], weights, sums, any(ctx.needs_input_grad))
            if grad is None:
                continue
            if head.softcap is not None:
                grad.mul_(1 - (logits / head.softcap).square_())
            if head.scale != 1.0:
                grad.mul_(head.scale)
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            grad = grad.to(h_PD.dtype)
            if grad_h is not None:
                torch.mm(grad, weight_VD.to(grad.dtype), out=grad_h[rows])
            if grad_weight is not None:
                grad_weight += (grad.T @ h_PD[rows]).float()
        ctx.save_for_backward(grad_h, grad_weight, grad_bias)
        ctx.dtypes = weight_VD.dtype, None if bias_V is None else bias_V.dtype
        kl, nll, parent_nll = sums.float()
        total = weights.kl * kl + weights.ce * nll
        ctx.mark_non_differentiable(kl, nll, parent_nll)
        return total, kl, nll, parent_nll

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        grad_h, grad_weight, grad_bias = ctx.saved_tensors
        dtype, bias_dtype = ctx.dtypes
        return (
            None if grad_h is None else grad_h * grads[0].to(grad_h.dtype),
            None if grad_weight is None else (grad_weight * grads[0]).to(dtype),
            None if grad_bias is None else (grad_bias * grads[0]).to(bias_dtype),
            None,
        )


def _chunk(
    logits: Tensor,
    logits_t: Tensor | None,
    kept: TopK | None,
    labels_P: Tensor,
    weights: Weights,
    sums: Tensor,
    needs_grad: bool,
) -> Tensor | None:
    """Add KL and cross-entropies of one chunk to `sums`; the gradient with respect to `logits`, which stay as they are.

    `logits_t` is overwritten.
    """
    at = labels_P[:, None]
    log_sum = logits.logsumexp(-1, keepdim=True)
    sums[1] += (log_sum - logits.gather(-1, at)).sum()
    grad: Tensor | None = None
    if logits_t is not None:
        sums[2] += (logits_t.logsumexp(-1, keepdim=True) - logits_t.gather(-1, at)).sum()
        tau = weights.temperature
        log_p = logits_t if tau == 1.0 else logits_t.div_(tau)
        log_p -= log_p.logsumexp(-1, keepdim=True)
        log_q = logits - log_sum if tau == 1.0 else (logits / tau).log_softmax(-1)
        p = log_p.exp()
        sums[0] += log_p.sub_(log_q).mul_(p).sum(dtype=torch.float64) * tau**2
        if needs_grad and weights.kl:
            grad = log_q.exp_().sub_(p).mul_(weights.kl * tau)
    if kept is not None:
        sums[2] += kept.nll.sum()
        kl, grad = _kept_chunk(logits, kept, weights.temperature)
        sums[0] += kl
        grad = grad.mul_(weights.kl) if needs_grad and weights.kl else None
    if needs_grad and weights.ce:
        own = (logits - log_sum).exp_()
        own.scatter_add_(-1, at, torch.full_like(at, -1, dtype=own.dtype))
        grad = own.mul_(weights.ce) if grad is None else grad.add_(own, alpha=weights.ce)
    return grad


def _kept_chunk(logits: Tensor, kept: TopK, tau: float) -> tuple[Tensor, Tensor]:
    """KL over the kept tokens and the rest as one, times tau², and its gradient with respect to `logits`."""
    ids, log_p = kept.ids.long(), kept.log_p.float()
    p, q = log_p.exp(), (logits / tau).softmax(-1)
    q_kept = q.gather(-1, ids)
    rest_p = (1 - p.sum(-1)).clamp_min(0.0)
    rest_q = (1 - q_kept.sum(-1)).clamp_min(1e-7)
    kl = (p * (log_p - q_kept.clamp_min(1e-30).log())).sum(-1) + torch.special.xlogy(rest_p, rest_p / rest_q)
    grad = q.mul_(1 - (rest_p / rest_q)[:, None]).scatter_(-1, ids, q_kept - p).mul_(tau)
    return kl.sum(dtype=torch.float64) * tau**2, grad


def squared_error(y_BTD: Tensor, target_BTD: Tensor, scale: Tensor | float) -> Tensor:
    """Sum over tokens of |y - target|² / scale, in float32.

    Args:
        scale: E|target|² over some text, fixed, so that layers weigh alike and the loss is a plain sum over tokens: the
            same whether a batch is worked through at once or split over devices.
    """
    return (y_BTD.float() - target_BTD.detach().float()).square().sum() / scale


def hidden_match(h_BTD: Tensor, parent_h_BTD: Tensor, labels_BT: Tensor) -> Tensor:
    """Sum over predicted tokens of |h - parent's|² / |parent's|²."""
    wanted = labels_BT[:, 1:] != IGNORE
    target = parent_h_BTD[:, :-1][wanted].detach().float()
    error = (h_BTD[:, :-1][wanted].float() - target).square().sum(-1)
    return (error / target.square().sum(-1).clamp_min(1e-12)).sum()
