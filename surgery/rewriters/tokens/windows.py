"""How long the window of each layer is, decided on calibration text by what short ones cost the model."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from ...calibration.text import Windows
from ...calibration.working_copy import WorkingCopy
from ...console import progress
from ...runtime.gated import SurgeryGatedAttention
from ...runtime.layout import Evict, LayerPlan, Retain
from ...runtime.modeling import from_parent
from ..common.allocation import PARTS, share_out

_log = logging.getLogger(__name__)
MEASURED = 16
"""Windows of text on which the cost of a layer's window is measured."""


def windows_by_layer(copy: WorkingCopy, plans: Sequence[LayerPlan], windows: Windows) -> dict[int, int]:
    """The window of each layer: together as many tokens as the plans', more of them in layers that miss them most.

    Layers trade with those whose tokens are as large as their own. Where windows of text have no more tokens than the
    plans' windows, nothing can be told of older ones: windows stay as they are, and the log says so.
    """
    text = windows.take(MEASURED)
    alike: dict[int, dict[int, int]] = defaultdict(dict)
    for plan in plans:
        assert plan.retain is not None and plan.retain.window is not None
        alike[plan.project.dims][plan.layer] = plan.retain.window
    given = {layer: window for uniform in alike.values() for layer, window in uniform.items()}
    tokens, shortest = text.ids_BT.shape[1], min(given.values())
    if tokens <= shortest:
        _log.warning(
            "windows: sensitivity: each layer keeps a window of its own share, %d tokens, for the calibration text is "
            "read in windows of %d, in which no token is older. Give a `length` of %d or more, and long documents.",
            shortest, tokens, 2 * shortest,
        )  # fmt: skip
        return given
    with progress("measuring windows", len(plans) * len(PARTS)) as advance:
        cost = window_costs(copy, plans, text, advance)
        for uniform in alike.values():
            shared = share_out(cost, uniform, dict.fromkeys(uniform, tokens))
            # What no layer asks for on this text goes to all: longer contexts have tokens that were never missed here.
            more = (sum(uniform.values()) - sum(shared.values())) // len(shared)
            given |= {layer: window + more for layer, window in shared.items()}
    return given


def window_costs(
    copy: WorkingCopy, plans: Sequence[LayerPlan], text: Windows, advance: Callable[[int], None]
) -> Callable[[int, int], float]:
    """KL to the parent in nats per token where one layer drops all tokens older than a window, all others none.

    Args:
        advance: called with 1 whenever a cost is measured.
    """
    tokens = text.ids_BT.shape[1]
    kept = []
    for plan in map(copy.settle, plans):
        assert plan.retain is not None
        kept.append(replace(plan, retain=_all_leave(plan.retain, tokens)))
    model = from_parent(
        copy.model,
        [copy.sites[plan.layer] for plan in plans],
        kept,
        weights={plan.layer: copy.canonical(plan.layer) for plan in plans},
    ).eval()
    gates = {gate.layer_idx: gate for gate in model.modules() if isinstance(gate, SurgeryGatedAttention)}

    def cost(layer: int, window: int) -> float:
        with _window(gates[layer], window):
            found = copy.divergence_of(model, text)
        advance(1)
        return found

    return cost


def _all_leave(retain: Retain, window: int) -> Evict:
    """Every token leaves at the end of the window, as far as `retain` does not protect it."""
    return Evict(ratio=retain.ratio, window=window, scorer="window", sinks=retain.sinks, page=retain.page)


@contextmanager
def _window(attention: SurgeryGatedAttention, window: int) -> Iterator[None]:
    """Inside, the attention drops tokens older than `window`; afterwards, also after an error, it is as it was."""
    whole = attention.retain
    attention.retain = replace(whole, window=window)
    try:
        yield
    finally:
        attention.retain = whole
