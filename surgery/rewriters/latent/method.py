"""The `mla` and `lowrank` steps: fit each layer's latent on calibration text, and write it as the runtime runs it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ...calibration import processes
from ...calibration.pipeline import TOKENS_PER_CHANNEL, batch_size
from ...calibration.text import Windows
from ...calibration.visit import Visit
from ...calibration.working_copy import WorkingCopy
from ...errors import PlanError
from ...planning.latent_size import ALIGNED, ALIGNED_FROM, full_rank
from ...runtime.layout import AttentionSite, Latent, LayerPlan
from .. import Method
from ..common.allocation import share_out, tried_sizes
from ..common.gains import tune_gains
from ..common.layerwise import Layerwise
from ..common.refine import refine
from .fit import Candidate, FitOptions, errors_alone, fit_layer
from .options import LatentStep


class LatentMethod(Layerwise, Method):
    """What both steps share; each layer is fitted on the converted prefix."""

    axis = "project"

    def __init__(self, step: LatentStep, seed: int = 0) -> None:
        super().__init__(step, seed)
        self.fit = FitOptions(queries=step.refit_queries, gains=step.gain_fit is True, output=step.refit_output)

    def convert(self, copy: WorkingCopy, plans: Sequence[LayerPlan], windows: Windows | None) -> None:
        if windows is not None and self.step.ranks == "sensitivity":
            plans = self._share_out(copy, plans, windows)
        super().convert(copy, plans, windows)

    def _share_out(self, copy: WorkingCopy, plans: Sequence[LayerPlan], windows: Windows) -> list[LayerPlan]:
        """`plans` with the same numbers in all, more of them in layers that miss them most."""
        projects = {plan.layer: plan.project for plan in plans if isinstance(plan.project, Latent)}
        most = {layer: min(copy.sites[layer].kv_dims, 2 * full_rank(copy.sites[layer])) for layer in projects}
        least = min(project.dims for project in projects.values())

        def candidate(layer: int, numbers: int) -> Candidate:
            line = self.candidates(copy.sites[layer], self._sized(projects[layer], numbers))[0]
            return line[len(line) // 2]

        uniform = {layer: project.dims for layer, project in projects.items()}
        unit = ALIGNED if least >= ALIGNED_FROM else 1
        with processes.apart():  # few windows, and the same ones however many processes there are
            errors = errors_alone(copy, _enough(copy, windows), candidate, tried_sizes(uniform, most, unit))
        errors = processes.of_first(errors)
        given = share_out(lambda layer, numbers: errors[layer][numbers], uniform, most, unit)
        return [replace(plan, project=self._sized(projects[plan.layer], given[plan.layer])) for plan in plans]

    def _sized(self, project: Latent, numbers: int) -> Latent:
        """`project` with so many cached numbers, its parts in proportion."""
        rope_dims = round(project.rope_dims * numbers / project.dims / 2) * 2
        rank = numbers - rope_dims
        k_rank = project.k_rank and min(rank - 1, max(1, round(project.k_rank * rank / project.rank)))
        return replace(project, rank=rank, rope_dims=rope_dims, k_rank=k_rank)

    def convert_layer(self, visit: Visit, plan: LayerPlan) -> None:
        """Convert one layer to the best of its candidates, and refit its queries and output to the parent's."""
        assert isinstance(plan.project, Latent)
        first, *others = self.candidates(visit.site, plan.project)
        fit_layer(visit, first, self.fit, others)
        refine(visit, self.step.refine)

    def without_text(self, copy: WorkingCopy, plan: LayerPlan) -> None:
        """Latents are fitted to text.

        Raises:
            PlanError: always.
        """
        raise PlanError(f"layer {plan.layer}: {self.step.rewriter} asks for calibration text: pass calibration=...")

    def finish(self, copy: WorkingCopy, windows: Windows) -> None:
        """With `gain_fit: global`, the factors of all converted layers together."""
        if self.step.gain_fit == "global":
            tune_gains(copy, copy.computed, windows)

    def candidates(self, site: AttentionSite, project: Latent) -> list[list[Candidate]]:
        """The forms of one layer that calibration text decides between, all of them within the planned bytes.

        The first list is searched, the others are tried at the same place; see `fit_layer`.
        """
        raise NotImplementedError


def _enough(copy: WorkingCopy, windows: Windows) -> Windows:
    """The windows by which ranks are shared out: ten tokens per channel, and two batches at least."""
    channels = max(site.hidden_size for site in copy.sites.values())
    return windows.take(max(len(windows.reaching(TOKENS_PER_CHANNEL * channels)), 2 * batch_size(windows)))
