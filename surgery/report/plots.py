"""Plots of evaluation reports, each a `matplotlib.figure.Figure` that belongs to nobody else.

matplotlib is imported when a plot is asked for; pyplot, with its state for the whole process, never.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

from ..measure.scoring import BUCKETS
from ..measure.speed import Speed
from .figures import DPI, new_figure, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation

    from ..measure.gates import GateReport
    from .data import GateRatios, Measured, Report

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's, told apart by colour-blind readers; its yellow is too pale for lines on white."""
MARKERS = ("o", "s", "^", "D", "v", "P")
BASELINE = "#333333"
_GREY = "#999999"
_WIDTH = 8.0  # inches


def pareto(reports: Sequence[Report]) -> Figure:
    """Loss against cached bytes per token; lower and further left is better.

    Where there is a baseline, error bars are the 95 % interval of the difference to it, on the same text: the losses
    of two models rise and fall together from text to text, so intervals of each alone would say nothing about order.
    """
    figure, axes = new_figure(_WIDTH, 5.0)
    names: list[str] = []
    colours: list[str] = []
    xs: list[float] = []
    spans: list[tuple[float, float, float]] = []
    baselines = {r.baseline.name: r.baseline for r in reports if r.baseline is not None}
    for i, report in enumerate(reports):
        m = report.model
        x, (low, y, high) = m.kv_bytes_per_token, low_and_high(report)
        if not (math.isfinite(y) and x > 0):
            continue
        spread = [[max(0.0, y - low)], [max(0.0, high - y)]] if high > low else None
        axes.errorbar(
            x, y, yerr=spread, fmt=MARKERS[marker_of(i)], color=colour_of(i), markersize=7, capsize=3, zorder=3
        )
        names.append(m.name)
        colours.append(colour_of(i))
        xs.append(x)
        spans.append((min(low, y), y, max(high, y)))
    for b in baselines.values():
        if math.isfinite(b.nats_per_token) and b.kv_bytes_per_token > 0:
            axes.plot(b.kv_bytes_per_token, b.nats_per_token, "*", color=BASELINE, markersize=14, zorder=4)
            axes.axhline(b.nats_per_token, color=BASELINE, linestyle="--", linewidth=1, zorder=1)
            names.append(b.name)
            colours.append(BASELINE)
            xs.append(b.kv_bytes_per_token)
            spans.append((b.nats_per_token,) * 3)
    best = unbeaten(zip(xs, (y for _, y, _ in spans), strict=True))
    axes.plot([x for x, _ in best], [y for _, y in best], color=_GREY, linewidth=1, zorder=0)
    axes.set_xlabel("KV cache, bytes/token (log scale)")
    what = "95 % interval of the difference to the baseline" if baselines else "95 % interval"
    axes.set_ylabel(f"loss, nats/token\n(bars: {what})")
    if xs:
        _log2_bytes(axes, xs)
        axes.margins(y=0.2)
        place_labels(
            figure, axes, names, colours, xs, spans, {b.nats_per_token for b in baselines.values()} - {math.nan}
        )
    return figure


def low_and_high(report: Report) -> tuple[float, float, float]:
    """Loss of a model in its 95 % interval, (low, value, high): that of the difference where there is a baseline."""
    m, d = report.model, report.difference
    own = m.quality[m.path].nats_per_token
    low, high = own.low, own.high
    if report.baseline is not None and d is not None:
        low, high = (report.baseline.nats_per_token + bound for bound in (d.gap.low, d.gap.high))
    if not math.isfinite(high - low):  # one window says nothing about others
        low = high = m.nats_per_token
    return low, m.nats_per_token, high


def unbeaten(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points to whose left nothing is as low, from left to right."""
    found: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if not found or y < found[-1][1]:
            found.append((x, y))
    return found


def loss_by_position(reports: Sequence[Report]) -> Figure:
    """Change of the loss in each third of the window; reports without a baseline are left out."""
    figure, axes = new_figure(_WIDTH, 3.6)
    rows = [(i, r) for i, r in enumerate(reports) if r.difference is not None]
    for place, (i, report) in enumerate(rows):
        width = 0.8 / len(rows)
        at = [third + (place - (len(rows) - 1) / 2) * width for third in range(len(BUCKETS))]
        assert report.difference is not None
        values = report.difference.gap_by_position
        axes.bar(at, values, 0.92 * width, color=colour_of(i), label=_wrap(report.model.name, 44))
    axes.axhline(0, color=BASELINE, linewidth=1)
    third = f" third of {reports[0].length} tokens" if reports else ""
    axes.set_xticks(range(len(BUCKETS)), [f"{bucket}{third}" for bucket in BUCKETS])
    axes.set_ylabel("change against the baseline,\nnats/token")
    _legend(figure, len(rows))
    return figure


def recall_maps(models: Sequence[Measured]) -> Figure:
    """Exact match by depth and length, and the nats of the right answer below: a row per model, a map per task.

    Colour shows exact match, or the nats where no model answers a single question, as small ones do.
    """
    models = [m for m in models if m.recall]
    tasks = list(dict.fromkeys(cell.task for m in models for cell in m.recall))
    lengths = sorted({cell.length for m in models for cell in m.recall})
    depths = sorted({cell.depth for m in models for cell in m.recall})
    from matplotlib.figure import Figure

    height = 0.9 + 0.42 * len(depths)
    width = max(_WIDTH, 1.2 + len(tasks) * max(1.6, 0.62 * len(lengths)))
    figure = Figure(figsize=(width, max(1, len(models)) * height + 0.3), dpi=DPI, layout="constrained")
    if not models:
        return figure
    answered = any(cell.exact > 0 for m in models for cell in m.recall)
    worst = max((cell.nats for m in models for cell in m.recall if math.isfinite(cell.nats)), default=1.0) or 1.0
    rows = figure.subfigures(len(models), 1, squeeze=False)[:, 0]
    for m, row in zip(models, rows, strict=True):
        row.suptitle(_wrap(m.name, 90), x=0.01, ha="left", fontsize=11, fontweight="bold")
        panels = row.subplots(1, len(tasks), squeeze=False, sharey=True)[0]
        for task, axes in zip(tasks, panels, strict=True):
            cells = {(c.length, c.depth): c for c in m.recall if c.task == task}
            style(axes)
            axes.grid(False)
            axes.set_xlim(-0.5, len(lengths) - 0.5)
            axes.set_ylim(len(depths) - 0.5, -0.5)
            axes.set_title(task.replace("_", " "), fontsize=10)
            for (i, length), (j, depth) in product(enumerate(lengths), enumerate(depths)):
                cell = cells.get((length, depth))
                shade = math.nan if cell is None else cell.exact if answered else 1 - cell.nats / worst
                text = "" if cell is None else f"{cell.exact:.0%}\n{cell.nats:.2f}" if math.isfinite(shade) else "nan"
                _cell(axes, i, j, shade, text)
            axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
            axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
            axes.tick_params(length=0)
        panels[0].set_ylabel("depth of the fact")
    figure.supxlabel(
        "context, tokens.  In a cell: share answered exactly, nats of the right answer.  "
        + ("Hatched: not asked." if answered else "Darker: fewer nats."),
        fontsize=10,
    )
    return figure


def sensitivities(changes: Mapping[str, Mapping[int, float]]) -> Figure:
    """Loss of a model of which one layer is converted, by layer: bars, or a line for each of several conversions."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = new_figure(_WIDTH, 3.0 if len(changes) == 1 else 5.0)
    for i, (name, by) in enumerate(changes.items()):
        layers = sorted(by)
        values = [by[layer] for layer in layers]
        if len(changes) == 1:
            axes.bar(layers, values, 0.8, color=colour_of(i))
            axes.axhline(0, color=BASELINE, linewidth=1)
            axes.set_title(_wrap(name, 90), fontsize=11, loc="left")
        else:
            axes.plot(
                layers, values, MARKERS[marker_of(i)] + "-", color=colour_of(i), markersize=4, label=_wrap(name, 44)
            )
    if len(changes) > 1:
        if all(value > 0 for by in changes.values() for value in by.values()):
            axes.set_yscale("log")
        _legend(figure, len(changes))
    axes.grid(False, axis="x")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=16, integer=True))
    axes.set_xlabel("converted layer")
    axes.set_ylabel("change of the loss,\nnats/token")
    return figure


def gate_map(gates: GateReport | GateRatios) -> Figure:
    """Tokens per slot of each layer and KV head; darker heads keep more tokens."""
    ratio = gates.ratio
    heads = max(len(row) for row in ratio.values())
    figure, axes = new_figure(max(4.0, 0.9 + 0.6 * heads), 1.2 + 0.32 * len(ratio))
    axes.grid(False)
    axes.set_xlim(-0.5, heads - 0.5)
    axes.set_ylim(len(ratio) - 0.5, -0.5)
    for (j, row), i in product(enumerate(ratio.values()), range(heads)):
        shade = 1 / row[i] if i < len(row) else math.nan
        _cell(axes, i, j, shade, "" if i >= len(row) else f"{row[i]:.1f}")
    axes.set_xticks(range(heads))
    axes.set_yticks(range(len(ratio)), [str(layer) for layer in ratio])
    axes.tick_params(length=0)
    axes.set_xlabel("KV head")
    axes.set_ylabel("layer")
    axes.set_title(f"tokens per slot, {gates.total:.2f} overall", fontsize=11, loc="left")
    return figure


def composition_front(found: Mapping[str, Any]) -> Figure:
    """KL over cached bytes per token, predicted, of compositions and of single axes; what was raced as stars.

    Args:
        found: `Composition.to_dict()`.
    """
    figure, axes = new_figure(_WIDTH, 5.0)
    fronts = {"composition": found["front"]} | {f"{axis} alone": f for axis, f in found["single_fronts"].items()}
    xs: list[float] = []
    for i, (name, front) in enumerate(fronts.items()):
        points = [(p["bytes_per_token"], p["predicted_kl"]) for p in front if p["predicted_kl"] > 0]
        if not points:
            continue
        axes.plot(*zip(*points, strict=True), MARKERS[marker_of(i)] + "-", color=colour_of(i), markersize=4, label=name)
        xs += [x for x, _ in points]
    # What windows of the race held would lie elsewhere: newest tokens and windows weigh more in fewer tokens.
    at = {single["settings"][-1]: single["bytes_per_token"] for single in found["singles"].values()}
    for i, runner in enumerate(found["race"]["runners"] if found["race"] is not None else ()):
        x, kl = at[runner["name"]] if i else found["choice"]["bytes_per_token"], runner["kl"]
        spread = [[max(0.0, kl["value"] - kl["low"])], [max(0.0, kl["high"] - kl["value"])]]
        axes.errorbar(x, kl["value"], yerr=spread, fmt="*", color=BASELINE if i else colour_of(0), markersize=12,
                      capsize=3, zorder=4, label=f"raced: {runner['name']}")  # fmt: skip
        xs.append(x)
    budget = found["budget"]["bytes"] / found["budget"]["context"]
    axes.axvline(budget, color=_GREY, linestyle="--", linewidth=1, label="budget")
    axes.set_yscale("log")
    axes.set_xlabel(f"KV cache, bytes/token at {found['budget']['context']:,} tokens (log scale)")
    axes.set_ylabel("KL to the parent, nats/token (log scale)\nlines: predicted; stars: measured on other text")
    if xs:
        _log2_bytes(axes, xs)
    axes.legend(fontsize=8, frameon=False)
    return figure


def decode_speed(reports: Sequence[Report]) -> Figure:
    """Decoded tokens per second with slowest and fastest repeat: each model beside the baseline of the same run."""
    bars: list[tuple[str, str, Speed, str]] = []
    for i, report in enumerate(reports):
        mine, base = report.model.speed, None if report.baseline is None else report.baseline.speed
        if mine is None:
            continue
        ratio = "" if base is None else f" ({mine.decode.median / base.decode.median:.2f}x)"
        bars.append((report.model.name, colour_of(i), mine, ratio))
        if base is not None and report.baseline is not None:
            bars.append((report.baseline.name, _GREY, base, ""))
    figure, axes = new_figure(_WIDTH, 1.0 + 0.42 * max(1, len(bars)))
    # The baseline stands right below its model, with a gap to the next pair.
    places, place = [], 0.0
    for _, colour, _, _ in bars:
        place += 0.85 if colour == _GREY else 1.25
        places.append(place)
    for at, (_, colour, speed, ratio) in zip(places, bars, strict=True):
        rate = speed.decode
        spread = [[rate.median - rate.low], [rate.high - rate.median]]
        axes.barh(at, rate.median, 0.75, color=colour)
        axes.errorbar(rate.median, at, xerr=spread, fmt="none", ecolor=BASELINE, capsize=3, linewidth=1.2)
        text = f"{rate.median:,.0f}{ratio}"
        axes.annotate(text, (rate.high, at), (6, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_yticks(places, [_wrap(name, 34) for name, *_ in bars])
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.margins(x=0.22)
    axes.set_xlim(left=0)
    axes.set_xlabel("decoding, tokens/s")
    if bars:
        speed = bars[0][2]
        figure.suptitle(
            f"Batch {speed.batch}, prompt of {speed.prompt} tokens, {speed.new} decoded. "
            f"Median, slowest and fastest of {speed.repeats};\n"
            "in brackets the ratio to the grey bar below it, from the same run.",
            fontsize=9,
            x=0.01,
            ha="left",
        )
    return figure


def colour_of(index: int) -> str:
    """Colours come again, with other markers."""
    return COLOURS[index % len(COLOURS)]


def marker_of(index: int) -> int:
    """Index into `MARKERS`: 36 models are told apart by colour and marker."""
    return (index + index // len(COLOURS)) % len(MARKERS)


def _wrap(name: str, width: int) -> str:
    # A name is data: no mathtext between two dollar signs.
    return textwrap.fill(name, width).replace("$", r"\$")


def _legend(figure: Figure, entries: int) -> None:
    if entries:
        figure.legend(loc="outside lower center", ncols=2 if entries > 1 else 1, frameon=False, fontsize=9)


def _log2_bytes(axes: Axes, xs: Sequence[float]) -> None:
    """Powers of two as ticks, written out."""
    axes.set_xscale("log", base=2)
    low, high = math.floor(math.log2(min(xs)) - 0.3), math.ceil(math.log2(max(xs)) + 0.3)
    axes.set_xlim(2.0**low, 2.0**high)
    powers = [2.0**i for i in range(low, high + 1, max(1, (high - low) // 8))]
    axes.set_xticks(powers, [f"{power:,g}" if power < 1 else f"{power:,.0f}" for power in powers])
    axes.minorticks_off()


def _cell(axes: Axes, i: int, j: int, shade: float, text: str) -> None:
    """One square, from white at 0 to dark blue at 1; hatched where `shade` is NaN."""
    from matplotlib.patches import Rectangle

    known = math.isfinite(shade)
    red, green, blue = (1 - shade * (1 - part) for part in (0.0, 0.30, 0.55)) if known else (0.93,) * 3
    square = Rectangle((i - 0.5, j - 0.5), 1, 1, facecolor=(red, green, blue), hatch=None if known else "///")
    square.set_edgecolor("#D8D8D8")
    axes.add_patch(square)
    axes.text(i, j, text, ha="center", va="center", fontsize=8.5, color="white" if known and shade > 0.75 else "black")


def place_labels(
    figure: Figure,
    axes: Axes,
    names: Sequence[str],
    colours: Sequence[str],
    xs: Sequence[float],
    spans: Sequence[tuple[float, float, float]],
    lines: Iterable[float],
) -> list[Annotation]:
    """Name each point near it, where the name covers no other name, point, error bar or line.

    Args:
        names: empty for points that have none, which are kept clear all the same.
        spans: (low, value, high) on the y axis.
        lines: heights of horizontal lines.
    """
    from matplotlib.colors import to_rgb
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # the axes stand where they will be drawn
    frame = axes.get_window_extent()
    unit = figure.dpi / 100

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = axes.transData.transform((x, y))
        return float(across), float(up)

    def around(x: float, low: float, high: float, width: float, margin: float) -> Any:
        return Bbox.from_extents(x - width * unit, low - margin * unit, x + width * unit, high + margin * unit)

    points: list[tuple[float, float]] = []
    taken = [Bbox.from_extents(frame.x0, y - unit, frame.x1, y + unit) for y in (place(xs[0], y)[1] for y in lines)]
    for x, (low, y, high) in zip(xs, spans, strict=True):
        across, up = place(x, y)
        points.append((across, up))
        taken += [around(across, up, up, 7, 7), around(across, place(x, low)[1], place(x, high)[1], 4, 2)]
    labels = []
    for name, colour, point in zip(names, colours, points, strict=True):
        if not name:
            continue
        label = axes.annotate(
            _wrap(name, 30), (0, 0), xycoords="figure pixels", fontsize=9, va="center", ha="center", zorder=5
        )
        red, green, blue = to_rgb(colour)
        label.set_color((0.7 * red, 0.7 * green, 0.7 * blue))  # dark enough to read
        size = label.get_window_extent()
        half = size.width / 2 + 2 * unit, size.height / 2 + unit

        def tried(
            radius: int, angle: int, point: tuple[float, float] = point, half: tuple[float, float] = half
        ) -> tuple[float, Any]:
            """How bad a place is, and its box."""
            x = point[0] + math.cos(math.radians(angle)) * (radius * unit + half[0])
            y = point[1] + math.sin(math.radians(angle)) * (radius * unit + half[1])
            box = Bbox.from_extents(x - half[0], y - half[1], x + half[0], y + half[1])
            outside = not (frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1)
            crossed = sum(_near_line(other, point, _nearest(box, point), 8 * unit) for other in points)
            return 1000 * (outside + box.count_overlaps(taken)) + 40 * crossed + radius + (angle != 0), box

        _, box = min((tried(*at) for at in product(range(9, 200, 5), range(0, 360, 15))), key=lambda found: found[0])
        label.set_position(((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2))
        taken.append(box)
        near = _nearest(box, point)
        if math.dist(point, near) > 20 * unit:
            line = {"arrowstyle": "-", "color": colour, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 5}
            axes.annotate("", point, near, "figure pixels", "figure pixels", arrowprops=line, zorder=2)
        labels.append(label)
    return labels


def _nearest(box: Any, point: Sequence[float]) -> tuple[float, float]:
    return min(max(point[0], box.x0), box.x1), min(max(point[1], box.y0), box.y1)


def _near_line(point: Sequence[float], start: Sequence[float], end: Sequence[float], radius: float) -> bool:
    """Whether a marker of `radius` at `point` touches the line, unless it lies where the line starts."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    along = ((point[0] - start[0]) * dx + (point[1] - start[1]) * dy) / max(dx * dx + dy * dy, 1e-9)
    foot = start[0] + min(max(along, 0), 1) * dx, start[1] + min(max(along, 0), 1) * dy
    return math.dist(point, start) > 1 and math.dist(point, foot) < radius
