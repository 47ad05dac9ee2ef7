"""What decides, per token and head of the cache, who keeps a slot of its own (`Retain`), and with which weight it is
averaged. A latent is one head.

Logits are float32 whatever the model's dtype: prefill and decoding must not fall on different sides of 0 by rounding.
They depend on the token's own layer input alone, or on nothing, so they are the same in both.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import transformers.initialization as init
from torch import Tensor, nn

from .decisions import logit_of_alpha
from .layout import Evict, Retain, Trained
from .scorers import SCORERS

EPS = 1e-6
_WEIGHT_OFFSET = 5.0


def gate_shapes(retain: Retain, hidden_size: int, decisions: int) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor of the gate by name; none for a gate that needs none.

    Args:
        decisions: per token (`LayerPlan.decisions`); K in the shapes of this file.
    """
    if retain.decided_by in ("adapter", "mlp"):
        assert isinstance(retain, Trained)
        shapes: dict[str, tuple[int, ...]] = {"norm": (hidden_size,)}
        width = hidden_size
        if retain.decided_by == "mlp":
            width = retain.width
            shapes["inner"] = (width, hidden_size)
        shapes |= {"weight": (decisions, width), "bias": (decisions,)}
        if retain.averages:
            shapes |= {"mix_weight": (decisions, width), "mix_bias": (decisions,)}
        return shapes
    if retain.decided_by == "borrowed":
        return {"channel_bits": (1,)}
    if retain.decided_by == "head":
        return {"weight": (decisions,)}
    has_threshold = isinstance(retain, Evict) and SCORERS[retain.scorer].has_threshold
    return {"threshold": (decisions,)} if has_threshold else {}


class SurgeryGate(nn.Module):
    """Logits of the decisions of one layer, and of `Pool` the weights of tokens in the mean of their slot.

    `adapter`: gain * Linear(RMSNorm(x)) + offset of the layer's input, and sigmoid(Linear(RMSNorm(x)) + 5); both linear
    maps are zero at conversion, so every decision is 0 and the model as it was.
    `mlp`: the same of silu(Inner RMSNorm(x)), and Inner random at conversion.
    `borrowed` (arXiv:2403.09636): the last channel of each key before rotation, plus the offset, and sigmoid of the
    mean of that of its queries plus 5. Attention does without both channels. Training fades them out first
    (`set_channel`), with every decision 0 meanwhile, then sets the rows that make them to zero and learns them anew.
    `head` (arXiv:2410.10819): alpha = 1 + gain * weight of each KV head, 1 at conversion; the head's tokens go where it
    is below a half. In training it mixes what the head makes of all tokens with what it makes of the first and newest
    (`decisions.Mixed`); training keeps it between 0 and 1 (`bound`), and ends by making it one of them (`choose`).
    `score` (`Evict`): see `scorers.py`; `threshold` [K] comes from calibration text.

    Args:
        decisions: K, per token.
        groups: query heads that read each KV head, for weights that are borrowed.
    """

    norm: nn.Parameter
    inner: nn.Parameter
    weight: nn.Parameter
    bias: nn.Parameter
    mix_weight: nn.Parameter
    mix_bias: nn.Parameter
    threshold: nn.Parameter
    channel_bits: Tensor

    def __init__(
        self, retain: Retain, decisions: int, hidden_size: int, groups: tuple[tuple[int, ...], ...] = ()
    ) -> None:
        super().__init__()
        self.retain, self.groups = retain, groups
        for name, shape in gate_shapes(retain, hidden_size, decisions).items():
            if name.endswith("_bits"):
                # What fades is state of the training, kept as bits that no cast to another float type can round.
                self.register_buffer(name, torch.ones(shape, dtype=torch.float32).view(torch.int32))
            else:
                self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        self.reset()

    def reset(self) -> None:
        """Initialise what no checkpoint has filled."""
        for name, parameter in self.named_parameters():
            if name == "inner":
                init.normal_(parameter, std=parameter.shape[1] ** -0.5)
            else:
                (init.ones_ if name == "norm" else init.zeros_)(parameter)
        if self.retain.decided_by == "borrowed":
            init.copy_(self.channel_bits, torch.ones(1, dtype=torch.float32).view(torch.int32))

    def forward(self, hidden_BTD: Tensor, q_BTNH: Tensor, k_BTKH: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits [B, K, T], above 0 where a token is to go, and weights [B, K, T] above 0 (of `Pool`); float32.

        Args:
            hidden_BTD: the layer's input, what q, k and v are projected from.
            q_BTNH, k_BTKH: normed, before rotation, with all their channels; of a latent see `scorers.py`.
        """
        with torch.autocast(hidden_BTD.device.type, enabled=False):
            makers = {
                "adapter": self._adapter, "mlp": self._adapter, "borrowed": self._borrowed, "head": self._head,
                "score": self._score,
            }  # fmt: skip
            logits, weight = makers[self.retain.decided_by](hidden_BTD, q_BTNH, k_BTKH)
        return logits.transpose(1, 2), None if weight is None else weight.transpose(1, 2)

    def _adapter(self, hidden: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor | None]:
        x = hidden.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * self.norm.float()
        if self.retain.decided_by == "mlp":
            x = F.silu(F.linear(x, self.inner.float()))
        assert isinstance(self.retain, Trained)
        logits = self.retain.gain * F.linear(x, self.weight.float(), self.bias.float()) + self.retain.offset
        if not self.retain.averages:
            return logits, None
        return logits, torch.sigmoid(F.linear(x, self.mix_weight.float(), self.mix_bias.float()) + _WEIGHT_OFFSET)

    def _borrowed(self, hidden: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor | None]:
        ours = self.channel == 0  # before that it is still the model's own, and nothing decides yet
        assert isinstance(self.retain, Trained)
        logits = torch.where(ours, k[..., -1].float(), 0.0) + self.retain.offset
        if not self.retain.averages:
            return logits, None
        last = torch.where(ours, q[..., -1].float(), 0.0)
        mean = torch.stack([last[..., list(group)].mean(-1) for group in self.groups], dim=-1)
        return logits, torch.sigmoid(mean + _WEIGHT_OFFSET)

    def _head(self, hidden: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, None]:
        alpha = self.alpha_K
        inside = alpha + (alpha.clamp(0, 1) - alpha).detach()  # at the ends, too, it is to learn the way back
        return logit_of_alpha(inside).expand(*hidden.shape[:2], -1), None

    def _score(self, hidden: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, None]:
        assert isinstance(self.retain, Evict)
        scorer = SCORERS[self.retain.scorer]
        score = scorer.score(hidden, q, k)
        return (score - self.threshold.float() if scorer.has_threshold else score), None

    @property
    def alpha_K(self) -> Tensor:
        """Part that each KV head has of what it makes of all tokens; float32 (`head`)."""
        assert isinstance(self.retain, Trained)
        return 1 + self.retain.gain * self.weight.float()

    @torch.no_grad()
    def bound(self) -> None:
        """Bring alphas that a step has carried further back to 0 or 1."""
        assert isinstance(self.retain, Trained)
        self.weight.clamp_(-1 / self.retain.gain, 0)

    @torch.no_grad()
    def choose(self, whole_K: Tensor) -> None:
        """Set the alphas of the heads that keep everything to 1, and those of the others to 0."""
        assert isinstance(self.retain, Trained)
        self.weight.copy_((whole_K - 1) / self.retain.gain)

    @property
    def channel(self) -> Tensor:
        """[1], factor on the borrowed channels inside attention; 1 at conversion, 0 once they belong to the gate."""
        return self.channel_bits.view(torch.float32)

    def set_channel(self, factor: float) -> None:
        """Fade the borrowed channels in attention."""
        self.channel_bits.copy_(torch.tensor([factor], dtype=torch.float32).view(torch.int32))

    def without_borrowed(self, x_BTNH: Tensor) -> Tensor:
        """q or k, before rotation, as attention may use it."""
        if self.retain.decided_by != "borrowed":
            return x_BTNH
        return torch.cat((x_BTNH[..., :-1], x_BTNH[..., -1:] * self.channel.to(x_BTNH.dtype)), dim=-1)

    def extra_repr(self) -> str:
        return f"{self.retain.kind}, {self.retain.decided_by}"


def logistic_noise(like: Tensor) -> Tensor:
    """log(u / (1 - u)) with u uniform: then P(logit + noise > 0) = sigmoid(logit). Float32."""
    u = torch.rand(like.shape, device=like.device, dtype=torch.float32)
    return torch.logit(u, eps=1e-6)
