"""Plots of a page that answer to hovering, zooming and the switches of their legend; drawn by Bokeh in the browser.

Bokeh is imported when a plot is asked for. Its script (1.3 MB) goes into the page once, so that the page needs no
network; plotly's is 4.8 MB. Colours of axes and grids are `--bk-...` variables of the page's style sheet.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from .data import Measured, Report
from .plots import colour_of, low_and_high, marker_of, unbeaten

if TYPE_CHECKING:
    from bokeh.plotting import figure

BOKEH_MARKERS = ("circle", "square", "triangle", "diamond", "inverted_triangle", "hex")
"""Bokeh's names of `plots.MARKERS`."""
BASELINE = "#8a8a8a"
"""Grey that is read on white and on black."""


@dataclass(frozen=True, kw_only=True)
class LegendEntry:
    """A switch that hides and shows what belongs to a name."""

    number: str
    name: str
    colour: str


@dataclass(frozen=True, kw_only=True)
class Plot:
    """What `Bokeh.embed.embed_item` draws, and its legend."""

    label: str
    """What the y axis shows, in a word or two: the name of a switch where a page has several plots in one place."""
    item: str
    """JSON without `<`."""
    legend: tuple[LegendEntry, ...]
    height: int


@cache
def script() -> str:
    """Bokeh's own JavaScript, to stand in a page."""
    from bokeh.resources import Resources

    return "\n".join(Resources(mode="inline", components=["bokeh"], log_level="error").js_raw)


def fronts(reports: Sequence[Report]) -> list[Plot]:
    """What a cache costs over its bytes per token: KL to the baseline where there is one, and the loss.

    The grey line joins the models that no other beats in both. Bars are 95 % intervals, of the loss as in
    `plots.pareto`.
    """
    entries = tuple(
        LegendEntry(number=str(i + 1), name=r.model.name, colour=colour_of(i)) for i, r in enumerate(reports)
    )
    baselines = tuple({r.baseline.name: r.baseline for r in reports if r.baseline is not None}.values())
    closeness = [
        (i, r.model, (e.low, e.value, e.high))
        for i, r in enumerate(reports)
        if r.difference is not None and (e := r.difference.kl).value > 0
    ]
    plots = []
    if closeness:
        plots.append(_front("KL to the baseline", "nats/token (log)", closeness, entries, baselines, is_log=True))
    losses = [(i, r.model, low_and_high(r)) for i, r in enumerate(reports)]
    plots.append(_front("Loss", "nats/token", losses, entries, baselines, is_log=False))
    return plots


def _front(
    label: str,
    unit: str,
    points: Sequence[tuple[int, Measured, tuple[float, float, float]]],
    entries: tuple[LegendEntry, ...],
    baselines: Sequence[Measured],
    *,
    is_log: bool,
) -> Plot:
    from bokeh.models import ColumnDataSource, HoverTool, LogTicker, NumeralTickFormatter, Span, TeeHead, Whisker

    drawn = _figure(440, x_axis_type="log", y_axis_type="log" if is_log else "linear")
    shown = [p for p in points if p[1].kv_bytes_per_token > 0 and all(map(math.isfinite, p[2][1:2]))]
    ends = [(m.kv_bytes_per_token, value) for _, m, (_, value, _) in shown]
    if not is_log:
        ends += [(b.kv_bytes_per_token, b.nats_per_token) for b in baselines if math.isfinite(b.nats_per_token)]
    best = unbeaten(ends)
    if len(best) > 1:
        drawn.line([x for x, _ in best], [y for _, y in best], line_color=BASELINE, line_width=1.5, line_alpha=0.7)
    hovered = []
    for i, m, (low, value, high) in shown:
        source = ColumnDataSource(
            {
                "x": [m.kv_bytes_per_token],
                "y": [value],
                "low": [low if math.isfinite(low) and (low > 0 or not is_log) else value],
                "high": [high if math.isfinite(high) else value],
                "name": [m.name],
                "number": [entries[i].number],
            }
        )
        colour = entries[i].colour
        heads = {"upper_head": TeeHead(size=7, line_color=colour), "lower_head": TeeHead(size=7, line_color=colour)}
        drawn.add_layout(
            Whisker(base="x", upper="high", lower="low", source=source, line_color=colour, name=f"{i}", **heads)
        )
        marker = BOKEH_MARKERS[marker_of(i)]
        hovered.append(drawn.scatter("x", "y", source=source, size=11, marker=marker, color=colour, name=f"{i}"))
        drawn.text(
            "x", "y", "number", source=source, x_offset=9, y_offset=-5, text_color=BASELINE, text_font_size="12px",
            name=f"{i}",
        )  # fmt: skip
    for b in baselines:
        drawn.add_layout(Span(location=b.kv_bytes_per_token, dimension="height", **_DASHED))
        if not is_log and math.isfinite(b.nats_per_token):
            drawn.add_layout(Span(location=b.nats_per_token, dimension="width", **_DASHED))
    drawn.add_tools(
        HoverTool(
            renderers=hovered,
            tooltips=_tooltip(f"{label} @y{{0.0000}}", "95 %: @low{0.0000} to @high{0.0000}", "@x{0,0} bytes/token"),
        )
    )
    xs = [m.kv_bytes_per_token for m in (*(m for _, m, _ in shown), *baselines) if m.kv_bytes_per_token > 0]
    if xs:  # the ends that Bokeh finds leave out the dashed lines, and the numbers beside the last points
        drawn.x_range.start, drawn.x_range.end = min(xs) / 1.15, max(xs) * 1.25
    drawn.xaxis.ticker = LogTicker(base=2, mantissas=[1])
    drawn.xaxis.formatter = NumeralTickFormatter(format="0,0")
    drawn.xaxis.axis_label = "KV cache, bytes/token (log)"
    drawn.yaxis.axis_label = unit
    return _plot(label, drawn, entries)


def over_layers(changes: Mapping[str, Mapping[int, float]], label: str) -> Plot:
    """Lines over the layers of a model, one for each name."""
    from bokeh.models import BasicTicker, ColumnDataSource, HoverTool

    positive = all(value > 0 for by in changes.values() for value in by.values())
    drawn = _figure(360, y_axis_type="log" if positive and len(changes) > 1 else "linear")
    entries, hovered = [], []
    for i, (name, by) in enumerate(changes.items()):
        colour, layers = colour_of(i), sorted(by)
        source = ColumnDataSource({"x": layers, "y": [by[layer] for layer in layers], "name": [name] * len(layers)})
        drawn.line("x", "y", source=source, line_color=colour, line_width=1.5, name=f"{i}")
        marker = BOKEH_MARKERS[marker_of(i)]
        hovered.append(drawn.scatter("x", "y", source=source, size=7, color=colour, marker=marker, name=f"{i}"))
        entries.append(LegendEntry(number="", name=name, colour=colour))
    drawn.add_tools(HoverTool(renderers=hovered, tooltips=_tooltip("layer @x", "@y{0.000000} nats/token")))
    drawn.xaxis.ticker = BasicTicker(min_interval=1)
    drawn.xaxis.axis_label = "converted layer"
    drawn.yaxis.axis_label = "nats/token"
    return _plot(label, drawn, tuple(entries))


_DASHED: dict[str, Any] = {"line_color": BASELINE, "line_dash": "dashed", "line_width": 1}


def _tooltip(*lines: str) -> str:
    """HTML; Bokeh escapes what it puts in."""
    return "<br>".join(["<b>@name</b>", *lines])


def _figure(height: int, **axes: Any) -> figure:
    from bokeh.models import PrintfTickFormatter
    from bokeh.plotting import figure

    drawn = figure(
        sizing_mode="stretch_width",
        height=height,
        tools="pan,box_zoom,wheel_zoom,reset,save",
        toolbar_location="above",
        active_drag=None,
        active_scroll=None,
        **axes,
    )
    # A finger that scrolls the page moves no plot: tools act once they are chosen.
    drawn.toolbar.logo = None
    drawn.background_fill_color = drawn.border_fill_color = drawn.outline_line_color = None
    if axes.get("y_axis_type") == "log":
        drawn.yaxis.formatter = PrintfTickFormatter(format="%g")  # 0.001, where Bokeh writes 10 to a power
    return drawn


def _plot(label: str, drawn: figure, legend: tuple[LegendEntry, ...]) -> Plot:
    from bokeh.embed import json_item

    text = json.dumps(json_item(drawn))
    numbers: dict[str, str] = {}
    # Bokeh counts on from plot to plot; equal plots shall be equal text.
    text = re.sub(r'"p(\d+)"', lambda found: f'"p{numbers.setdefault(found[1], str(len(numbers)))}"', text)
    return Plot(label=label, item=text.replace("<", "\\u003c"), legend=legend, height=drawn.height or 0)
