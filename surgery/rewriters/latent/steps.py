"""The `mla` and `lowrank` steps: fit each layer's latent on calibration text, and write it as the runtime runs it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...calibration.latent_copy import LatentCopy
from ...calibration.text import Windows
from ...errors import PlanError
from ...planning.latent_size import ALIGNED, ALIGNED_FROM, full_rank
from ...runtime.canonical import canonical_weights
from ...runtime.functions import as_bits
from ...runtime.layout import AttentionSite, Latent, LayerPlan, Project
from .. import Method
from ..common.allocation import share_out
from ..common.layerwise import Layerwise
from .fit import (
    Candidate,
    FitOptions,
    cost_alone,
    finish,
    fit_layer,
)
from .options import LatentStep
from .weights import LatentWeights, in_site_order


class LatentStepCopy(LatentCopy):
    """The working copy of latent steps: says what the runtime must know of the layers converted so far."""

    @property
    def converted(self) -> list[int]:
        """Layers in latent form."""
        return sorted(self.latents)

    def project(self, layer: int) -> Project:
        """The project axis that the layer has now; the search on text may have split the budget its own way."""
        return latent_of(self.latents[layer], self.sites[layer])

    def canonical(self, layer: int) -> dict[str, Tensor]:
        """The layer under the names and in the layout of `SurgeryLatentAttention`."""
        site = self.sites[layer]
        return canonical_latent(self.latents[layer], site, canonical_weights(site, self.tensor))


class LatentMethod(Layerwise, Method):
    """What both steps share; each layer is fitted on the converted prefix."""

    axis = "project"

    def __init__(self, step: LatentStep, seed: int = 0) -> None:
        super().__init__(step, seed)
        self.fit = FitOptions(queries=step.refit_queries, output=step.refit_output, gains=step.gain_fit)

    def convert(self, copy: LatentCopy, plans: Sequence[LayerPlan], windows: Windows | None) -> None:
        if self.step.ranks == "sensitivity" and windows is not None:
            plans = self._share_out(copy, plans, windows)
        super().convert(copy, plans, windows)

    def _share_out(self, copy: LatentCopy, plans: Sequence[LayerPlan], windows: Windows) -> list[LayerPlan]:
        """`plans` with the same numbers in all, more of them in layers that miss them most."""
        projects = {plan.layer: plan.project for plan in plans if isinstance(plan.project, Latent)}
        most = {layer: min(copy.sites[layer].kv_dims, 2 * full_rank(copy.sites[layer])) for layer in projects}
        least = min(project.dims for project in projects.values())

        def candidate(layer: int, numbers: int) -> Candidate:
            line = self.candidates(copy.sites[layer], self._sized(projects[layer], numbers))[0]
            return line[len(line) // 2]

        given = share_out(
            cost_alone(copy, windows, candidate),
            {layer: project.dims for layer, project in projects.items()},
            most,
            ALIGNED if least >= ALIGNED_FROM else 1,
        )
        copy.forget_streams()
        return [replace(plan, project=self._sized(projects[plan.layer], given[plan.layer])) for plan in plans]

    def _sized(self, project: Latent, numbers: int) -> Latent:
        """`project` with so many cached numbers, its parts in proportion."""
        rope_dims = round(project.rope_dims * numbers / project.dims / 2) * 2
        rank = numbers - rope_dims
        k_rank = project.k_rank and min(rank - 1, max(1, round(project.k_rank * rank / project.rank)))
        return replace(project, rank=rank, rope_dims=rope_dims, k_rank=k_rank)

    def convert_layer(self, copy: LatentCopy, layer: int, project: Latent, windows: Windows | None) -> None:
        """Convert one layer to the best of its candidates, and refit its queries and output to the parent's.

        Raises:
            PlanError: no calibration text.
        """
        site = copy.sites[layer]
        if windows is None:
            raise PlanError(f"layer {layer}: {self.step.rewriter} asks for calibration text: pass calibration=...")
        tokens = windows.split()[0].tokens
        if tokens < site.hidden_size:
            # The same words for every layer: Python shows them once.
            warnings.warn(
                f"{tokens} calibration tokens to fit {site.hidden_size} channels: moments are singular and damped. "
                f"Give {10 * site.hidden_size} tokens or more.",
                stacklevel=2,
            )
        first, *others = self.candidates(site, project)
        fit_layer(copy, layer, first, windows, self.fit, others)

    def finish(self, copy: LatentCopy, windows: Windows | None) -> None:
        """Fit one gain per query head on q and on o, in all converted layers together, by KL to the parent."""
        if windows is not None and self.fit.gains and copy.latents:
            finish(copy, windows)

    def candidates(self, site: AttentionSite, project: Latent) -> list[list[Candidate]]:
        """The forms of one layer that calibration text decides between, all of them within the planned bytes.

        The first list is searched, the others are tried at the same place; see `fit_layer`.
        """
        raise NotImplementedError


def latent_of(latent: LatentWeights, site: AttentionSite) -> Latent:
    """The plan of a layer that runs `latent`."""
    return Latent(
        rank=latent.rank,
        rope_dims=latent.rope_dims,
        kv_heads=site.kv_heads,
        head_dim=site.head_dim,
        value_dim=site.value_dim,
        rotate_on_read=latent.rotate_on_read,
        k_rank=_key_rank(latent),
        means=latent.v_mean_KV is not None,
        keeps_positions=latent.rotate_on_read and site.rotary is not None,
    )


def canonical_latent(latent: LatentWeights, site: AttentionSite, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """`latent` under the names and in the layout of `SurgeryLatentAttention`, in float32.

    Args:
        weights: the layer as `canonical_weights` gives it; q, o and sinks are taken from there.
    """
    latent = in_site_order(latent, site)
    kept = {name: t for name, t in weights.items() if not name.startswith(("k_proj", "v_"))}
    down = torch.cat([latent.down_RD, latent.rope_FD.to(latent.down_RD)])
    made = {"kv_down.weight": down[:, : site.hidden_size]}
    if down.shape[1] > site.hidden_size:
        made["kv_down.bias"] = down[:, site.hidden_size]
    k_rank = _key_rank(latent)
    made["k_up"] = latent.k_up_KHR if k_rank is None else latent.k_up_KHR[..., :k_rank]
    made["v_up"] = latent.v_up_KVR if k_rank is None else latent.v_up_KVR[..., k_rank:]
    made["q_rope"] = latent.q_rope_KFH
    if latent.k_mean_KH is not None:
        made["k_mean"] = latent.k_mean_KH
    if latent.v_mean_KV is not None:
        weight = weights["o_proj.weight"].double()
        common = latent.v_mean_KV.double().repeat_interleave(site.group_size, 0).flatten()
        made["o_proj.bias"] = weight @ common + weights.get("o_proj.bias", weight.new_zeros(len(weight)))
    kept |= {name: tensor.float().contiguous() for name, tensor in made.items() if tensor.numel()}
    if latent.rope_dims:
        kept["rope_freq_bits"] = as_bits(latent.inv_freq_F.tolist())
    return kept


def _key_rank(latent: LatentWeights) -> int | None:
    """0 where only the rotated part makes the keys (`freq`)."""
    if latent.k_rank is None and latent.rope_dims and not bool(latent.k_up_KHR.any()):
        return 0
    return latent.k_rank
