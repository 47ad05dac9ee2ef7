"""Gates for layers whose tokens are averaged or dropped. Every other weight stays, to the last bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...attention.maths import apply_norm
from ...attention.weights import halves
from ...calibration.processes import gathered
from ...calibration.text import Windows
from ...calibration.visit import Visit
from ...calibration.working_copy import WorkingCopy
from ...errors import PlanError
from ...runtime.gated_latent import keys_before_rotation
from ...runtime.gates import gate_shapes
from ...runtime.layout import Evict, HeadNorm, Latent, LayerPlan, Retain
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
            given = windows_by_layer(copy, plans, windows)
            copy.retain_of |= {p.layer: replace(p.retain, window=given[p.layer]) for p in plans if p.retain is not None}
            plans = [copy.settle(plan) for plan in plans]
        scored: dict[int, Evict] = {}
        for plan in plans:
            assert plan.retain is not None
            settled = copy.settle(plan)
            if not settled.owns_cache:
                continue
            made = new_gate(plan.retain, copy.sites[plan.layer].hidden_size, settled.decisions, self.seed + plan.layer)
            if "threshold" in made:
                assert isinstance(plan.retain, Evict)
                scored[plan.layer] = plan.retain
            copy.gates[plan.layer] = made
        if scored:
            assert windows is not None
            for visit in copy.visits(windows, scored, kept={}):
                copy.gates[visit.layer]["threshold"] = score_threshold(visit, scored[visit.layer])


def training_note(step: RetainStep) -> str:
    """For the printed plan: what its bytes stand for."""
    return f"{step.rewriter}: nothing goes before the gates are trained; bytes above are for {step.ratio:g}x"


def new_gate(retain: Retain, hidden_size: int, decisions: int, seed: int = 0) -> dict[str, Tensor]:
    """Tensors of a gate that takes so many decisions per token, and decides nothing yet.

    Args:
        seed: of what is random, the first of two maps.
    """
    made = {name: torch.zeros(shape) for name, shape in gate_shapes(retain, hidden_size, decisions).items()}
    if "norm" in made:
        made["norm"] += 1.0
    if "inner" in made:
        random = torch.Generator().manual_seed(seed)
        made["inner"] = torch.randn(made["inner"].shape, generator=random) * hidden_size**-0.5
    if "channel_bits" in made:
        made["channel_bits"] = torch.ones(1).view(torch.int32)
    return made


def score_threshold(visit: Visit, evict: Evict) -> Tensor:
    """[K]: the score above which tokens must go so that a sequence of the text's length reaches `evict.ratio`.

    Raises:
        PlanError: sequences of that length are shorter than what always stays, times the ratio.
    """
    tokens = visit.windows.ids_BT.shape[1]
    rate = evict.drop_rate(tokens, evict.ratio)
    if rate > 1:
        raise PlanError(
            f"layer {visit.layer}: the first {evict.protected} and the newest {evict.window} of {tokens} calibration "
            f"tokens always stay: {evict.ratio:g}x is out of reach. Use a smaller window, or longer windows of text."
        )
    scores_PK = gathered(torch.cat(list(_scores(visit, evict.scorer))))
    return torch.quantile(scores_PK, 1 - rate, dim=0)


def _scores(visit: Visit, scorer: str) -> Iterator[Tensor]:
    """[tokens, K] per batch, from queries and keys whose channels stand where the runtime has them."""
    copy, layer, site = visit.copy, visit.layer, visit.site
    weights, project = copy.read(layer), copy.project(layer)
    tensors = copy.canonical(layer) if isinstance(project, Latent) else {}
    order = halves(site.rotary, site.head_dim)
    back = [order.index(j) for j in range(site.head_dim)]
    for x_PD in visit.inputs():
        if isinstance(project, Latent):
            k_KPH = _keys_of_latent(project, tensors, x_PD)[..., order]
        else:
            k_KPH = _projected(x_PD, weights.k_KHD, weights.k_bias_KH)
        q_NPH = _projected(x_PD, weights.q_NHD, weights.q_bias_NH)
        k_KPH = _normed(k_KPH, weights.k_norm, weights.k_norm_KH, weights.k_norm_bias_KH)
        q_NPH = _normed(q_NPH, weights.q_norm, weights.q_norm_NH, weights.q_norm_bias_NH)
        q, k = (y[..., back].transpose(0, 1)[None] for y in (q_NPH, k_KPH))
        if isinstance(project, Latent):
            k = k.flatten(2)[:, :, None]  # one decision for all heads: their keys side by side
        yield SCORERS[scorer].score(x_PD[None], q, k)[0]


def _projected(x_PD: Tensor, w_NHD: Tensor, bias_NH: Tensor | None) -> Tensor:
    """[N, tokens, H], before any norm."""
    y_NPH = torch.einsum("pd,nhd->nph", x_PD, w_NHD)
    return y_NPH if bias_NH is None else y_NPH + bias_NH[:, None]


def _keys_of_latent(latent: Latent, tensors: dict[str, Tensor], x_PD: Tensor) -> Tensor:
    """[K, tokens, H] from a latent, whose `tensors` are those of the runtime, in its order of channels."""
    entry = F.linear(x_PD, tensors["kv_down.weight"], tensors.get("kv_down.bias"))
    maps = (tensors.get(name) for name in ("k_up", "q_rope", "k_mean"))
    return keys_before_rotation(latent, entry[None], *maps)[0].transpose(0, 1)


def _normed(y_NPH: Tensor, norm: HeadNorm | None, gain_NH: Tensor | None, shift_NH: Tensor | None) -> Tensor:
    """As gates see queries and keys: normed where their norm comes first, not rotated."""
    if norm is None or norm.after_rotary:
        return y_NPH
    return apply_norm(y_NPH[None], norm, gain_NH, shift_NH)[0]
