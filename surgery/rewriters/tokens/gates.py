"""Gates for layers whose tokens are averaged or dropped. Every other weight stays, to the last bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...attention.maths import apply_norm
from ...attention.weights import AttentionWeights
from ...calibration.statistics import projection_inputs
from ...calibration.text import Windows
from ...calibration.working_copy import WorkingCopy
from ...errors import PlanError
from ...runtime.gated_latent import keys_before_rotation
from ...runtime.gates import gate_shapes
from ...runtime.layout import Evict, Latent, LayerPlan, Retain
from ...runtime.scorers import SCORERS
from .. import Method
from .options import RetainStep
from .windows import windows_by_layer


class GatedMethod(Method):
    """Gives each layer that owns its cache a gate that is untrained, and decides nothing, or a score."""

    axis = "retain"
    step: Any

    @property
    def _measures_windows(self) -> bool:
        return getattr(self.step, "windows", "uniform") == "sensitivity"

    def conflict(self, other: Any) -> str | None:
        """Windows are measured layer by layer, on caches that nobody else reads."""
        if self._measures_windows and other.axis == "share":
            return (
                f"{self.step.rewriter} asks for windows: sensitivity, which is measured on layers that keep caches of "
                f"their own. Beside share, write one {self.step.rewriter} step for each window, with its `layers`."
            )
        return None

    def convert(self, copy: WorkingCopy, plans: Sequence[LayerPlan], windows: Windows | None) -> None:
        """Write the gates into `copy`, in place.

        Args:
            windows: calibration text, for thresholds of scores and for `windows: sensitivity`.
        """
        if self._measures_windows:
            assert windows is not None
            copy.window_of |= windows_by_layer(copy, plans, windows)
            plans = [copy.settle(plan) for plan in plans]
        for plan in plans:
            assert plan.retain is not None
            settled = copy.settle(plan)
            if not settled.owns_cache:
                continue
            made = new_gate(plan.retain, copy.sites[plan.layer].hidden_size, settled.decisions)
            if "threshold" in made:
                assert windows is not None and isinstance(plan.retain, Evict)
                made["threshold"] = score_threshold(copy, plan.layer, plan.retain, windows)
            copy.gates[plan.layer] = made


def training_note(step: RetainStep) -> str:
    """For the printed plan: what its bytes stand for."""
    return f"{step.rewriter}: nothing goes before the gates are trained; bytes above are for {step.ratio:g}x"


def new_gate(retain: Retain, hidden_size: int, decisions: int) -> dict[str, Tensor]:
    """Tensors of a gate that takes so many decisions per token, and decides nothing yet."""
    made = {name: torch.zeros(shape) for name, shape in gate_shapes(retain, hidden_size, decisions).items()}
    if "norm" in made:
        made["norm"] += 1.0
    if "channel_bits" in made:
        made["channel_bits"] = torch.ones(1).view(torch.int32)
    return made


def score_threshold(copy: WorkingCopy, layer: int, evict: Evict, windows: Windows) -> Tensor:
    """[K]: the score above which tokens must go so that a sequence of the text's length reaches `evict.ratio`.

    Raises:
        PlanError: sequences of that length are shorter than what always stays, times the ratio.
    """
    tokens = windows.ids_BT.shape[1]
    rate = evict.drop_rate(tokens, evict.ratio)
    if rate > 1:
        raise PlanError(
            f"layer {layer}: the first {evict.protected} and the newest {evict.window} of {tokens} calibration tokens "
            f"always stay: {evict.ratio:g}x is out of reach. Use a smaller window, or longer calibration windows."
        )
    scores_PK = torch.cat(list(_scores(copy, layer, evict.scorer, windows)))
    return torch.quantile(scores_PK, 1 - rate, dim=0)


def _scores(copy: WorkingCopy, layer: int, scorer: str, windows: Windows) -> Iterator[Tensor]:
    """[tokens, K] per batch."""
    weights, project = copy.read(layer), copy.project(layer)
    tensors = copy.canonical(layer) if isinstance(project, Latent) else {}
    for x_PD in projection_inputs(copy.model, copy.sites[layer], windows):
        if isinstance(project, Latent):
            keys = (
                _normed(weights, _keys_of_latent(project, tensors, x_PD)).transpose(0, 1)[None].flatten(2)[:, :, None]
            )
        else:
            keys = _normed(weights, _keys(weights, x_PD)).transpose(0, 1)[None]
        yield SCORERS[scorer].score(x_PD[None], _queries(weights, x_PD), keys)[0]


def _keys(weights: AttentionWeights, x_PD: Tensor) -> Tensor:
    """[K, tokens, H], before their norm."""
    k_KPH = torch.einsum("pd,khd->kph", x_PD, weights.k_KHD)
    return k_KPH if weights.k_bias_KH is None else k_KPH + weights.k_bias_KH[:, None]


def _keys_of_latent(latent: Latent, tensors: dict[str, Tensor], x_PD: Tensor) -> Tensor:
    """The same from a latent, whose `tensors` are those of the runtime."""
    entry = F.linear(x_PD, tensors["kv_down.weight"], tensors.get("kv_down.bias"))
    maps = (tensors.get(name) for name in ("k_up", "q_rope", "k_mean"))
    return keys_before_rotation(latent, entry[None], *maps)[0].transpose(0, 1)


def _normed(weights: AttentionWeights, k_KPH: Tensor) -> Tensor:
    """As the gate sees keys: normed where their norm comes first, not rotated."""
    if weights.k_norm is None or weights.k_norm.after_rotary:
        return k_KPH
    return apply_norm(k_KPH[None], weights.k_norm, weights.k_norm_KH, weights.k_norm_bias_KH)[0]


def _queries(weights: AttentionWeights, x_PD: Tensor) -> Tensor:
    """[1, tokens, N, H], alike."""
    q_NPH = torch.einsum("pd,nhd->nph", x_PD, weights.q_NHD)
    if weights.q_bias_NH is not None:
        q_NPH = q_NPH + weights.q_bias_NH[:, None]
    if weights.q_norm is not None and not weights.q_norm.after_rotary:
        q_NPH = apply_norm(q_NPH[None], weights.q_norm, weights.q_norm_NH, weights.q_norm_bias_NH)[0]
    return q_NPH.transpose(0, 1)[None]
