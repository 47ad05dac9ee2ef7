"""Table, goals and plot of `real_models.py`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter
from real_measure import LENGTHS
from real_rows import FAMILIES
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from surgery.report.figures import DPI
from surgery.report.plots import COLOURS, place_labels

Rows = dict[str, dict[str, Any]]
NARROW = ("95 %", "nats")
"""Columns that are left out where there are less than 100."""
NOTHING = 1e-5
"""KL that is rounding; such rows have no place on a logarithmic axis."""
CLOSE = 0.02
"""Part of right answers that a row may lose at half of the bytes."""


def measured(data: dict[str, Any]) -> Rows:
    """Rows with text measured, largest cache first, the parent at the top."""
    rows = {name: row for name, row in data["rows"].items() if "text" in row}
    return dict(sorted(rows.items(), key=lambda r: (r[0] != "parent", -r[1]["text"]["part_of_parent"], r[1]["group"],
                                                    r[1]["text"]["kl"])))  # fmt: skip


def recall_of(row: dict[str, Any], length: int) -> dict[str, Any] | None:
    """Answers at a length, where the parent answers anything there."""
    found = row.get(f"recall-{length}")
    return found if found and found["questions"] else None


# ----------------------------------------------------------------------------------------------- table


def lines_of(data: dict[str, Any], lengths: list[int]) -> Iterator[list[str]]:
    """One row of the table each: ours plain, published forms marked."""
    for name, row in measured(data).items():
        text, every = row["text"], row["text"]["all"]
        kl = every["kl"]
        yield [
            name + (" *" if row["published"] else ""),
            f"{100 * text['part_of_parent']:.0f}" + ("" if text["is_measured"] else "?"),
            f"{max(0.0, kl['value']):.3f}",
            f"{max(0.0, kl['low']):.2f}-{max(0.0, kl['high']):.2f}",
            f"{every['tvd_kept']['value']:.2f}",
            f"{every['nats_per_token']['value']:.2f}",
            f"{100 * row['greedy']['until_first_difference']['value']:.0f}" if "greedy" in row else "",
            *(f"{100 * found['exact']:.0f}" if (found := recall_of(row, n)) else "" for n in lengths),
        ]


def show(data: dict[str, Any], width: int) -> None:
    """The table and the goals."""
    lengths = [n for n in LENGTHS if any(recall_of(row, n) for row in data["rows"].values())]
    asked = [f"@{n // 1024}k" if n >= 1024 else f"@{n}" for n in lengths]
    heads = ["row", "bytes", "KL", "95 %", "1-TVD", "nats", "greedy", *asked]
    lines = list(lines_of(data, lengths))
    console = Console(width=width)
    table = Table(title=f"{data['parent']['name']}, no training", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    shown = [i for i, head in enumerate(heads) if width >= 100 or head not in NARROW]
    for i in shown:
        table.add_column(heads[i], justify="left" if i == 0 else "right", no_wrap=True)
    for line in lines:
        table.add_row(*(line[i] for i in shown))
    console.print(table)
    sizes = data["sizes"]
    decoded = sizes["windows"] * sizes["decoded"]
    console.print(
        f"* published form. bytes: of the cache after {sizes['prompt'] + sizes['decoded']} tokens, % of the parent's "
        f"(?: computed). KL to the parent, 1-TVD, nats per token: {decoded} tokens of each of three texts, decoded "
        "through the cache. greedy: % of 64 tokens before the first that differs. @n: % of questions answered at n "
        "tokens, of tasks that the parent answers.",
        highlight=False,
    )
    for name, row in data["rows"].items():
        if "refused" in row:
            console.print(f"{name}: refused: {row['refused']['reason']}", highlight=False)
    console.print(f"need training: {', '.join(data['needs_training'])}", highlight=False)
    for goal in goals(data):
        console.print(goal, highlight=False, markup=False)


# ----------------------------------------------------------------------------------------------- goals


def goals(data: dict[str, Any]) -> list[str]:
    """What was to be reached, with numbers: reached, missed, or not measured."""
    rows = measured(data)
    return [*_ahead(rows), *_budgets(rows), *_evicted(rows), *_refined(rows)]


def said(is_reached: bool | None, goal: str, numbers: str) -> str:
    """One line."""
    return f"{'not measured' if is_reached is None else 'reached' if is_reached else 'MISSED'}: {goal}: {numbers}"


def _ahead(rows: Rows) -> Iterator[str]:
    """Every default ahead of every published form of as many bytes, in KL and in recall."""
    for group in dict.fromkeys(row["group"] for row in rows.values() if row["group"]):
        inside = {n: r for n, r in rows.items() if r["group"] == group}
        ours = {n: r for n, r in inside.items() if not r["published"] and not r["refines"]}
        theirs = {n: r for n, r in inside.items() if r["published"]}
        for name, row in ours.items():
            goal = f"{group}: {name} ahead of published forms"
            if not theirs:
                yield said(None, goal, "none of them yet")
                continue
            best = min(theirs, key=lambda n: theirs[n]["text"]["kl"])
            kl, other = row["text"]["kl"], theirs[best]["text"]["kl"]
            yield said(kl < other, f"{goal} in KL", f"{kl:.4f}, {best} {other:.4f}")
            for length in LENGTHS:
                mine = recall_of(row, length)
                found = {n: r for n, t in theirs.items() if (r := recall_of(t, length))}
                if mine and found:
                    best = max(found, key=lambda n: found[n]["exact"])
                    numbers = (f"{mine['right']} of {mine['questions']}, {best} {found[best]['right']}; nats "
                               f"{mine['nats']:.2f}, {found[best]['nats']:.2f}")  # fmt: skip
                    yield said(
                        mine["right"] > 0 and mine["exact"] >= found[best]["exact"],
                        f"{goal} in recall at {length}",
                        numbers,
                    )


def _budgets(rows: Rows) -> Iterator[str]:
    """KL at half and at a quarter of the bytes by the best recipe, and recall at half."""
    plain = {n: r for n, r in rows.items() if not r["published"] and n != "parent" and not r["evicts"]}
    for part, limit in ((0.5, 0.02), (0.25, 0.10)):
        fitting = {n: r for n, r in plain.items() if r["text"]["part_of_parent"] <= part + 0.005}
        goal = f"KL <= {limit:.2f} at {100 * part:.0f} % of the bytes"
        if not fitting:
            yield said(None, goal, "no row")
            continue
        best = min(fitting, key=lambda n: fitting[n]["text"]["kl"])
        kl = fitting[best]["text"]["kl"]
        yield said(kl <= limit, goal, f"{best} {kl:.4f}")
        parent, own = (recall_of(r, 2048) for r in (rows["parent"], fitting[best]))
        if part == 0.5:
            yield _lost("recall at 2048 within 2 points at 50 % of the bytes", best, own, parent, CLOSE)


def _lost(goal: str, name: str, own: Any, parent: Any, most: float) -> str:
    if not own or not parent:
        return said(None, goal, f"{name} has no answers there yet")
    numbers = f"{name} {100 * own['exact']:.1f} %, parent {100 * parent['exact']:.1f} % of {own['questions']}"
    return said(own["exact"] >= parent["exact"] - most, goal, numbers)


def _evicted(rows: Rows) -> Iterator[str]:
    """Recall at 4096 tokens of the best row that keeps a quarter."""
    parent = recall_of(rows["parent"], 4096)
    found = {n: r["recall-4096"] for n, r in rows.items() if r["evicts"] and recall_of(r, 4096)}
    best = max(found, key=lambda n: found[n]["exact"], default="every row that evicts")
    yield _lost("eviction at 4x, recall at 4096 within 5 points", best, found.get(best), parent, 0.05)


def _refined(rows: Rows) -> Iterator[str]:
    """KL with `refine` against the same without."""
    for name, row in rows.items():
        if row["refines"] in rows:
            plain = rows[row["refines"]]["text"]["kl"]
            ratio = row["text"]["kl"] / plain
            yield said(ratio <= 0.7, f"{name}: KL <= 0.7 of that without", f"{ratio:.2f} of {plain:.4f}")


# ----------------------------------------------------------------------------------------------- plot


def plot(data: dict[str, Any], path: Path) -> None:
    """KL to the parent against bytes per token; published forms hollow; lower and further left is better.

    Rows that save no bytes are left out.
    """
    figure = Figure(figsize=(9.6, 7.2), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colours = dict(zip(FAMILIES, COLOURS, strict=False))
    rows = measured(data)
    xs, spans, names, shades, named = [], [], [], [], _named(rows)
    for name, row in rows.items():
        if row["family"] not in colours or row["text"]["kl"] < NOTHING or row["text"]["part_of_parent"] > 1:
            continue
        x, kl = 100 * row["text"]["part_of_parent"], row["text"]["all"]["kl"]
        low, high = (kl[end] if math.isfinite(kl[end]) else kl["value"] for end in ("low", "high"))
        colour = colours[row["family"]]
        axes.errorbar(
            x, kl["value"], yerr=[[max(0, kl["value"] - low)], [max(0, high - kl["value"])]], color=colour,
            fmt="o" if not row["refines"] else "*", markersize=8, capsize=2, elinewidth=0.8,
            markerfacecolor="white" if row["published"] else colour,
        )  # fmt: skip
        xs.append(x)
        spans.append((low, kl["value"], high))
        names.append(name if name in named else "")
        shades.append("#aaaaaa" if row["published"] else colour)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    values = [value for _, value, _ in spans]
    if values and max(values) < 10 * min(values):
        axes.yaxis.set_minor_formatter(FuncFormatter(lambda y, _: f"{y:g}"))  # else there would be one number or none
    axes.set_xlim(0, max([60.0, *(x + 10 for x in xs)]))
    axes.set_xlabel("bytes of the cache, % of the parent's", fontsize=11)
    axes.set_ylabel("KL to the parent, nats per decoded token", fontsize=11)
    axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    used = {row["family"] for row in rows.values()}
    handles = [Line2D([], [], color=colours[f], marker="o", linestyle="", label=f) for f in FAMILIES if f in used]
    handles.append(
        Line2D([], [], color="#333333", marker="o", markerfacecolor="white", linestyle="", label="published form")
    )
    if any(row["refines"] for row in rows.values()):
        handles.append(Line2D([], [], color="#333333", marker="*", linestyle="", label="layers refined"))
    figure.legend(handles=handles, fontsize=9, frameon=False, loc="outside lower center", ncols=4)
    folder = data["parent"]["name"]
    axes.set_title(f"{'SmolLM2-135M' if folder == 'smollm2' else folder}, no training", fontsize=12, loc="left")
    if xs:
        place_labels(figure, axes, names, shades, xs, spans, ())
    figure.savefig(path)


def _named(rows: Rows) -> set[str]:
    """Rows whose names stand in the plot: ours, and the best published form of as many bytes."""
    found = {name for name, row in rows.items() if not row["published"] and not row["refines"]}
    for group in {row["group"] for row in rows.values()}:
        theirs = [name for name, row in rows.items() if row["published"] and row["group"] == group]
        found |= set(sorted(theirs, key=lambda name: rows[name]["text"]["kl"])[:1])
    return found
