"""One byte budget in, the best composition out: settings, their costs, a choice for each layer, and a race."""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..anatomy import examine
from ..calibration.text import Windows, read_windows, tokenizer_of
from ..checkpoints.storage import load_parent
from ..console import spans
from ..errors import PlanError
from ..plan import plan as make_plan
from ..rewriters import AXES
from ..torch_state import plain_torch
from .budget import budget_of
from .choosing import Choice, Chooser, check_reach
from .composition import Composition, recipe_of
from .donors import Donors
from .measuring import measure_costs, weights_digest
from .race import race
from .screening import Screen
from .sensitivity import Bench, measure_by
from .settings import constraint, settings_for

LENGTH = 4096
"""Tokens per window of text at most, where nobody says: that of the budget's context, if it is shorter."""
FITTED, JUDGED, RACED = 8, 2, 6
"""Windows of text to fit on, to measure settings on, and for the race."""
ALONE = 2048
"""Tokens to fit each setting on where it is measured; the race fits on all of the text."""
HOPELESS = 4.0
"""Recipes of a single axis are not raced where they are predicted to cost more than so many times the best of them."""
READ = 8
"""Times as many windows are read, so that those which text fills can be picked from many documents."""


@plain_torch()
def compose(
    model_or_path: Any,
    budget: str | float | None = None,
    calibration: Any = None,
    *,
    ratio: float | None = None,
    memory: str | int | None = None,
    batch: int = 1,
    context: int | str | None = None,
    axes: Collection[str] = AXES,
    keep_layers: Collection[int] = (),
    native_only: bool = False,
    engine: str | None = None,
    samples: int | None = None,
    length: int | None = None,
    tokenizer: Any = None,
    kept: str | Path | None = None,
    with_race: bool = True,
    seed: int = 0,
) -> Composition:
    """Choose for each layer how its cache is projected, kept and stored, so that the whole fits a budget at least loss.

    Each step that methods offer is fitted and measured in each layer alone, through the cache; costs add up; the choice
    of least cost that fits is found exactly. It is then converted and raced against the best recipes of a single axis
    that take no more bytes, on text that none was made with, and on recall questions where the parent answers some.

    Args:
        model_or_path: model, folder, GGUF or Hub id; the parent stays as it is.
        budget: bytes per token, such as `4KiB/token`. Or `ratio`, or `memory` with `batch`; see `budget_of`.
        calibration: text as for `convert`; some of its windows are kept apart to measure on, others for the race.
        context: tokens at which bytes are counted.
        axes: those that may be changed, of `project`, `retain` and `store`. Shared caches are not composed.
        keep_layers: layers that stay as they are.
        native_only: only what the parent's own class can say, and one setting for all layers.
        engine: only what this engine runs (see the plan's table).
        samples, length: windows to fit on (default: 8), and tokens per window (default: the context, at most 4096).
        kept: file for what has been measured; the same call goes on from there.
        with_race: without it nothing is converted and nothing is recommended.
        seed: of everything random.

    Raises:
        PlanError: the budget is below what any composition reaches or above the parent's, or nothing satisfies the
            constraints; before anything is measured.

    Examples:
        >>> import surgery, torch
        >>> from surgery.bundled import SMALL
        >>> text_BT = torch.randint(3, 2000, (24, 64), generator=torch.Generator().manual_seed(0))
        >>> found = surgery.compose(SMALL, ratio=3, calibration=text_BT, axes=["store"], with_race=False)
        >>> found.plan.bytes_per_token <= found.plan.parent_bytes_per_token / 2
        True
    """
    if calibration is None:
        raise PlanError("compose: needs calibration text: what a setting costs is measured on it.")
    check, samples = constraint(native_only, engine), samples or FITTED
    parent = load_parent(model_or_path)[0] if isinstance(model_or_path, (str, Path)) else model_or_path
    anatomy = examine(parent)
    plain = make_plan(anatomy, "identity")
    limit = budget_of(plain, per_token=budget, ratio=ratio, memory=memory, batch=batch, context=context)
    settings = settings_for(anatomy, limit.context, axes=axes, allowed=check)
    layers = tuple(site.layer for site in anatomy.sites)
    unknown = sorted(set(keep_layers) - set(layers))
    if unknown:
        raise PlanError(f"keep_layers: the model has no layer {unknown[0]}; its layers are {spans(list(layers))}.")
    check_reach(settings, limit, layers, keep_layers)
    tokenizer = tokenizer_of(parent.config) if tokenizer is None else tokenizer
    windows = read_windows(
        parent.config,
        calibration,
        tokenizer,
        length=length or min(LENGTH, limit.context),
        samples=READ * (samples + JUDGED + RACED),
        every_window=True,
    )
    fit, judged, raced = parts_of(windows, samples)

    # Differences of 1e-5 nats are to be told apart.
    wide = copy.deepcopy(parent).float().eval().requires_grad_(False)
    bench = Bench(wide, anatomy, judged)
    donors = Donors(wide, anatomy, fit.take(max(4, ALONE // windows.ids_BT.shape[1])), seed)

    told = [anatomy.to_dict(), weights_digest(parent), fit.digest, judged.digest, limit.context, seed]
    file = None if kept is None else Path(kept)
    screen = Screen(settings=settings, layers=layers, budget=limit.bytes, kept=frozenset(keep_layers))
    costs = measure_costs(settings, measure_by(bench, donors.of), layers, file, told, screen)
    chooser = Chooser([s for s in settings if costs.knows(s)], costs, layers, frozenset(keep_layers))
    choice = chooser.best_uniform(limit.bytes) if native_only or engine else chooser.best(limit.bytes)
    if choice is None:
        raise PlanError(f"budget: {limit} is not reached by one setting for all layers. Raise it.")
    name = f"composed-{limit.bytes_per_token:.0f}"
    composed = make_plan(anatomy, recipe_of(layers, choice.settings, name, f"made for {limit}"))
    reason = check(composed)
    if reason is not None:  # where not all layers take the setting
        raise PlanError(f"the composition does not satisfy the constraints: {reason}. Keep no layers as they are.")
    found = Composition(
        budget=limit,
        plan=composed,
        choice=choice,
        front=tuple(chooser.front()),
        singles={axis: c for axis in AXES if (c := chooser.best_uniform(limit.bytes, [axis])) is not None},
        single_fronts={axis: front for axis in AXES if (front := tuple(chooser.front([axis])))},
        costs=costs,
        layers=layers,
    )
    if not with_race:
        return found
    recipes = {found.recipe.name: found.recipe}
    for single in worth_racing(found.singles.values()):
        recipes[single.settings[-1].label] = recipe_of(layers, single.settings, single.settings[-1].label, "")
    done = race(wide, recipes, fit, raced, bench=bench, dtype=parent.dtype, tokenizer=tokenizer, seed=seed)
    return replace(found, race=done)


def worth_racing(singles: Collection[Choice]) -> list[Choice]:
    """Those that are not predicted to cost far more than the best of them."""
    least = min((single.cost for single in singles), default=0.0)
    return [single for single in singles if single.cost <= HOPELESS * least]


def parts_of(windows: Windows, samples: int) -> tuple[Windows, Windows, Windows]:
    """Text to fit on, to measure settings on, and for the race; none of it twice.

    Raises:
        PlanError: too few windows that text fills: a cache is judged once it is long.
    """
    whole = windows.mask_BT.all(1).nonzero()[:, 0].tolist()
    apart, width = JUDGED + RACED, windows.ids_BT.shape[1]
    if len(whole) < apart or len(windows) == apart:
        raise PlanError(
            f"calibration: {len(whole)} windows of {width} tokens are filled by text, of {len(windows)}. Settings are "
            f"measured on {JUDGED} such windows, a race takes {RACED}, and others are fitted on. Give more text or "
            "longer documents, or a smaller length."
        )
    spread = [whole[round(i * (len(whole) - 1) / (apart - 1))] for i in range(apart)]
    judged, rest = spread[:: apart // JUDGED], set(range(len(windows))) - set(spread)
    return (
        windows.pick(sorted(rest)[:samples]),
        windows.pick(judged),
        windows.pick([place for place in spread if place not in judged]),
    )
