"""Scores that nothing is trained for: which tokens of a KV head or a latent may leave the cache."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Scorer(Protocol):
    """One score. Tokens whose score is above a threshold leave once they are out of the window."""

    has_threshold: bool
    """Whether the threshold [K] comes from calibration text, so that the planned ratio is met; else it is 0."""
    describes: str
    """What leaves, and the source, for people."""

    def score(self, hidden_BTD: Tensor, q_BTNH: Tensor, k_BTKH: Tensor) -> Tensor:
        """Scores [B, T, K] of new tokens, float32; above the threshold where they are to leave.

        A score depends on the token alone, so that prefill and decoding decide alike.

        Args:
            hidden_BTD: the layer's input, what q, k and v are projected from.
            q_BTNH, k_BTKH: normed, before rotation, with all their channels. A latent has one key (K = 1): those of
                all KV heads that are made from it side by side.
        """


class WindowScorer:
    """Every token leaves."""

    has_threshold = False
    describes = "every token leaves at the end of the window (StreamingLLM, arXiv:2309.17453)"

    def score(self, hidden_BTD: Tensor, q_BTNH: Tensor, k_BTKH: Tensor) -> Tensor:
        return torch.ones_like(k_BTKH[..., 0], dtype=torch.float32)


class KeyNormScorer:
    """Long keys leave; of a latent, by the norm of the keys of all heads together."""

    has_threshold = True
    describes = "norm of the key before rotation; long keys leave (arXiv:2406.11430)"

    def score(self, hidden_BTD: Tensor, q_BTNH: Tensor, k_BTKH: Tensor) -> Tensor:
        return k_BTKH.float().norm(dim=-1)


SCORERS: dict[str, Scorer] = {"window": WindowScorer(), "key_norm": KeyNormScorer()}
"""Name in recipes and plans -> score."""
