"""A plot of the decoding benchmark: tokens per second over the length of the context."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .figures import new_figure
from .plots import BASELINE, MARKERS, colour_of, marker_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..measure.decode_bench import DecodeBench

LINES = ("-", "--", ":", "-.")
"""By batch, the smallest first; they come again."""


def speed_over_context(found: DecodeBench) -> Figure:
    """Tokens of the whole batch per second over cached tokens, both on logarithmic scales: one line for each layout and
    batch, and in grey what transformers does with the heads of the shape itself. Cells that were skipped are left out.
    """
    figure, axes = new_figure(8.0, 5.0)
    batches = sorted({row.batch for row in found.rows})
    names = list(dict.fromkeys(row.variant for row in found.rows))

    def line(points: list[tuple[int, float]], batch: int, name: str, **style: Any) -> None:
        if points:
            xs, ys = zip(*sorted(points), strict=True)
            label = name if len(batches) == 1 else f"{name}, batch {batch}"
            axes.plot(xs, ys, LINES[batches.index(batch) % len(LINES)], label=label, linewidth=1.5, **style)

    for batch in batches:
        for i, name in enumerate(names):
            rows = [row for row in found.rows if (row.variant, row.batch) == (name, batch)]
            line(
                [(row.context, row.tokens_per_s) for row in rows if row.tokens_per_s is not None],
                batch, name, color=colour_of(i), marker=MARKERS[marker_of(i)],
            )  # fmt: skip
            line(
                [(r.context, r.transformers_tokens_per_s) for r in rows if r.is_parent and r.transformers_tokens_per_s],
                batch, "transformers", color=BASELINE, marker="*",
            )  # fmt: skip
    contexts = sorted({row.context for row in found.rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(contexts, [f"{context:,}" for context in contexts])
    axes.minorticks_off()
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.4g}")
    axes.set_xlabel("cached tokens")
    axes.set_ylabel("tokens/s of the whole batch")
    axes.set_title(
        f"decoding, {found.shape}, {found.dtype}, {found.device}, {'compiled' if found.compiled else 'eager'}",
        fontsize=10,
    )
    if axes.lines:
        axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    return figure
