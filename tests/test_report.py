"""Reports: JSON and back, tables that fit a terminal, a page that compares only what compares."""

import dataclasses
import io
import itertools
import json
import math
import re
import subprocess
import sys

import pytest
from browser import PROGRAM, browser
from rich.console import Console

from surgery.console import render
from surgery.errors import CheckpointError
from surgery.measure.decode_bench import DecodeBench, Row
from surgery.measure.memory import CacheSize
from surgery.measure.recall import RecallCell
from surgery.measure.speed import Rate, Speed
from surgery.measure.statistics import Difference, Estimate, Quality
from surgery.report import plots
from surgery.report.data import GateRatios, Measured, Report, quality_table, recall_table, serving_table
from surgery.report.page import write_report
from surgery.report.samples import differing, side_by_side
from surgery.report.speed_plot import speed_over_context


def rate(median):
    return Rate(median=median, low=0.9 * median, high=1.05 * median)


def measured(name, nats=2.5, bytes_per_token=9216, speed=1234.5):
    own = Estimate(value=nats, low=nats - 0.1, high=nats + 0.1)
    return Measured(
        name=name,
        parameters=3_400_000,
        quality={path: Quality(nats_per_token=own, by_position=(nats,) * 3) for path in ("prefill", "decode")},
        cache=CacheSize(tokens=512, bytes=bytes_per_token * 512, predicted_bytes=bytes_per_token * 512),
        max_batch=123_456,
        context=32768,
        recall=tuple(
            RecallCell(task=task, length=length, depth=depth, questions=8, exact=0.625, nats=12.5)
            for task in ("associative", "passkey", "multi_key", "tracking")
            for length in (128, 504)
            for depth in (0.0, 0.5, 1.0)
        ),
        speed=Speed(
            batch=4,
            prompt=128,
            new=32,
            repeats=5,
            prefill=rate(40 * speed),
            decode=rate(speed),
            peak_memory_bytes=10**9,
        ),
    )


def made_up(name="gqa-2x", gap=0.1, bytes_per_token=4608, parent="parent", **changes):
    around = Estimate(value=gap, low=0.8 * gap, high=1.2 * gap)
    difference = Difference(
        gap=around,
        kl=around,
        agreement=Estimate(value=0.9, low=0.88, high=0.92),
        gap_by_position=(0.5 * gap, gap, 1.5 * gap),
        kl_by_position=(gap,) * 3,
    )
    fields = {
        "model": measured(name, 2.5 + gap, bytes_per_token, 1500.0),
        "baseline": measured(parent),
        "differences": {"prefill": difference, "decode": difference},
        "tokens": 50_000,
        "windows": 98,
        "length": 512,
        "text_digest": "0123456789abcdef",
        "memory_bytes": 80 * 2**30,
        "seed": 0,
        "problems": (),
        "versions": {"surgery": "0.1.0", "torch": "2.13.0"},
        "device": "cpu",
        "tasks": {name: {"hellaswag acc": 0.25}},
    }
    return Report(**{**fields, **changes})


def with_nan():
    nan = Estimate(value=math.nan, low=math.nan, high=math.nan)
    model = dataclasses.replace(
        measured("broken"),
        quality={"prefill": Quality(nats_per_token=nan, by_position=(math.nan,) * 3)},
        recall=(RecallCell(task="passkey", length=128, depth=0.0, questions=8, exact=math.nan, nats=math.nan),),
    )
    difference = Difference(
        gap=nan, kl=nan, agreement=nan, gap_by_position=(math.nan,) * 3, kl_by_position=(math.nan,) * 3
    )
    return made_up(model=model, differences={"prefill": difference}, problems=("prefill: not finite at window 3",))


def test_json_and_back_is_the_same_report():
    report = made_up()
    assert Report.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    alone = made_up(baseline=None, differences={}, tasks={})
    assert Report.from_dict(json.loads(json.dumps(alone.to_dict()))) == alone


def test_a_loss_that_is_nan_is_null_in_json_and_nan_with_its_reason_in_the_table():
    report = with_nan()
    text = json.dumps(report.to_dict(), allow_nan=False)
    assert json.loads(text)["model"]["quality"]["prefill"]["nats_per_token"]["value"] is None
    for shown in (str(report), str(Report.from_dict(json.loads(text))), report.to_markdown()):
        row = next(line for line in shown.splitlines() if "broken" in line)
        assert re.search(r"\bnan\b", row) and "nan%" not in row
        assert "NaN: prefill: not finite at window 3" in shown


def test_a_report_of_another_version_is_refused_by_file_name(tmp_path):
    (tmp_path / "old.json").write_text(json.dumps({**made_up().to_dict(), "colour": "red"}))
    with pytest.raises(CheckpointError, match=r"old\.json.*colour"):
        Report.load(tmp_path / "old.json")


@pytest.mark.parametrize(
    "name", ["gqa-2x", "runs/2026-11/" + "a-very-long-name-of-a-model/" * 4, "[bold]v2[/bold] | $x$"]
)
def test_tables_fit_100_columns_with_whole_headers_numbers_and_names(name):
    reports = [made_up(name), made_up("b", gap=-0.1234, bytes_per_token=1_048_576)]
    tables = [quality_table(reports), recall_table(r.model for r in reports), serving_table(reports)]
    for table in tables:
        lines = render([table]).splitlines()
        assert max(map(len, lines)) <= 100
        header = next(line for line in lines if line.strip())
        assert all(column.header in header for column in table.columns)
        assert "…" not in "".join(lines)
        first = "".join(line[: header.index(table.columns[1].header) - 1].strip() for line in lines)
        assert name.replace(" ", "") in first.replace(" ", "")


def test_names_have_room_on_80_columns():
    made = made_up("2x mean pooling")
    large = dataclasses.replace(made.model.cache, bytes=805_306_368, predicted_bytes=805_306_368)
    wide = dataclasses.replace(made, model=dataclasses.replace(made.model, cache=large, max_batch=109_210))
    console = Console(file=io.StringIO(), width=80)
    console.print(serving_table([wide]), quality_table([made]))
    shown = console.file.getvalue()
    assert shown.count(" 2x mean ") == 2 and "…" not in shown
    assert all(number in shown for number in ("(1.22x)", "768.0 MiB", "109,210", "+4.8%", "90.0%", "4,608", "50%"))


def test_speed_is_compared_with_the_baseline_of_the_same_run():
    slow = dataclasses.replace(made_up("b"), baseline=measured("parent", speed=750.0))
    shown = render([serving_table([made_up("a"), slow])])
    assert "(1.22x)" in next(line for line in shown.splitlines() if line.startswith(" a "))
    assert "(2.00x)" in next(line for line in shown.splitlines() if line.startswith(" b "))


def test_the_page_names_every_model_and_needs_nothing_else(tmp_path):
    reports = [made_up("gqa-2x"), made_up("<b>mla & rank|96</b>", gap=0.2, bytes_per_token=2304)]
    page = write_report(
        reports,
        tmp_path / "out",
        title="Two <models>",
        sensitivities={"halved": {0: 0.1, 1: 0.05}},
        samples=[("gqa-2x", "The box", " is <red>.\n\nNow")],
    )
    text = page.read_text()
    for name in ("parent", "gqa-2x", "&lt;b&gt;mla &amp; rank|96&lt;/b&gt;", "Two &lt;models&gt;", "is &lt;red&gt;."):
        assert name in text
    without_bokeh = re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
    assert "http" not in without_bokeh and not re.findall(r"(?:src|href)=|url\(|@import", without_bokeh)
    cards = (tmp_path / "out" / "report.md").read_text()
    assert r"rank\|96" in cards
    linked = re.findall(r"\]\((plots/[a-z]+\.png)\)", cards)
    assert sorted(linked) == sorted(f"plots/{p.name}" for p in (tmp_path / "out" / "plots").iterdir())
    assert len(linked) == 5
    assert all((tmp_path / "out" / file).read_bytes().startswith(b"\x89PNG") for file in linked)


def test_equal_reports_make_equal_pages(tmp_path):
    pages = [write_report([made_up()], tmp_path / name).read_bytes() for name in ("a", "b")]
    assert pages[0] == pages[1]


def test_models_of_one_name_are_told_apart(tmp_path):
    page = write_report([made_up(), made_up(gap=0.2), made_up("parent")], tmp_path / "out")
    cards = page.with_name("report.md").read_text()
    for name in ("gqa-2x", "gqa-2x (2)", "parent", "parent (2)"):
        assert len(re.findall(rf"^\| {re.escape(name)} \| 2\.", cards, re.MULTILINE)) == 1
    assert "| gqa-2x (2) | parent (2) |\n" in cards  # the header of lm-eval's table


def test_what_models_continue_prompts_with_goes_from_results_to_the_page(tmp_path):
    def saying(report, text):
        heard = {m: dataclasses.replace(getattr(report, m), continued={"The box": t}) for m, t in text.items()}
        return Report.from_dict(json.loads(json.dumps(dataclasses.replace(report, **heard).to_dict())))

    two = saying(made_up(), {"model": " is green.", "baseline": " is red."})
    four = saying(made_up("gqa-4x"), {"model": " was blue.", "baseline": " is red."})
    page = write_report([two, four], tmp_path / "out").with_name("report.md").read_text()
    assert [page.count(text) for text in ("red.", "green.", "blue.")] == [1, 1, 1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"text_digest": "fedcba9876543210"}, "different texts .*0123456789abcdef.*fedcba9876543210"),
        ({"windows": 97}, "different texts .*98 windows.*97 windows"),
        ({"length": 256}, "different texts .*512 tokens.*256 tokens"),
        ({"prompt": 256}, "given 1 tokens of each window at once, the other 256, .*--at-once 256"),
        ({"baseline": measured("other", nats=2.4)}, "different baselines .*parent.*2.5000.*other.*2.4000"),
    ],
)
def test_results_that_do_not_compare_are_refused_by_name(tmp_path, change, words):
    with pytest.raises(CheckpointError, match=f"gqa-2x and gqa-4x: .*{words}"):
        write_report([made_up(), made_up("gqa-4x", **change)], tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_results_of_different_paths_are_refused(tmp_path):
    one = made_up("gqa-4x")
    quality = {"prefill": one.model.quality["prefill"]}
    one = dataclasses.replace(one, model=dataclasses.replace(one.model, quality=quality))
    with pytest.raises(CheckpointError, match="by decode, the other by prefill"):
        write_report([made_up(), one], tmp_path / "out")


@pytest.mark.parametrize(("number", "seed", "said"), [(16, 0, "16 in 128"), (8, 1, "seed 1")])
def test_answers_to_other_questions_do_not_stand_in_one_table(tmp_path, number, seed, said):
    other = made_up("gqa-4x")
    asked = tuple(dataclasses.replace(cell, questions=number) for cell in other.model.recall)
    other = dataclasses.replace(other, model=dataclasses.replace(other.model, recall=asked), seed=seed)
    silent = dataclasses.replace(made_up("int4"), model=dataclasses.replace(measured("int4"), recall=()), seed=5)
    with pytest.raises(CheckpointError, match=f"gqa-2x and gqa-4x: asked other questions of associative .*{said}"):
        write_report([silent, made_up(), other], tmp_path / "out")
    write_report([silent, made_up(), made_up("gqa-4x")], tmp_path / "out")


def test_a_baseline_may_be_spelt_in_two_ways(tmp_path):
    cards = write_report([made_up(), made_up("b", parent="./parent/")], tmp_path / "out").with_name("report.md")
    assert "./parent/" not in cards.read_text()


def test_no_report_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no results given"):
        write_report([], tmp_path / "out")


def test_nothing_is_left_behind_when_writing_fails(tmp_path, monkeypatch):
    write_report([made_up()], tmp_path / "out")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("surgery.report.page._as_html", full)
    with pytest.raises(CheckpointError, match="disk is full"):
        write_report([made_up("b")], tmp_path / "out", overwrite=True)
    with pytest.raises(CheckpointError, match="disk is full"):
        write_report([made_up("b")], tmp_path / "new")
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_older_report_is_replaced_when_asked_and_other_files_never(tmp_path):
    out = tmp_path / "out"
    write_report([made_up()], out)
    with pytest.raises(CheckpointError, match="--overwrite"):
        write_report([made_up("b")], out)
    assert "| b |" in write_report([made_up("b")], out, overwrite=True).with_name("report.md").read_text()
    (out / "result.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"holds result\.json"):
        write_report([made_up()], out, overwrite=True)
    assert (out / "result.json").exists()


def test_reports_without_baseline_speed_or_recall_make_a_page(tmp_path):
    bare = dataclasses.replace(measured("alone"), recall=(), speed=None)
    report = made_up(model=bare, baseline=None, differences={}, tasks={})
    cards = write_report([report], tmp_path / "out").with_name("report.md").read_text()
    assert "alone" in cards and "Recall" not in cards
    assert [p.name for p in (tmp_path / "out" / "plots").iterdir()] == ["quality.png"]


def test_a_nan_makes_a_page_with_its_reason(tmp_path):
    text = write_report([with_nan()], tmp_path / "out").read_text()
    assert "NaN: prefill: not finite at window 3" in text


def boxes(figure, names):
    figure.draw_without_rendering()
    texts = [t for t in figure.axes[0].texts if t.get_text().replace("\n", " ").replace(r"\$", "$") in names]
    assert len(texts) == len(names)
    return [t.get_window_extent() for t in texts], figure.axes[0].get_window_extent()


@pytest.mark.parametrize("step", [0.0, 0.004, 0.05])
def test_names_of_neighbouring_points_do_not_cover_each_other(step):
    names = ["gqa-2x, mean pooling (published)", "gqa-2x, surgery", "int4 keys per channel", "svd", "mla $x$ 96"]
    reports = [made_up(n, gap=0.15 + i * step, bytes_per_token=4608 - 200 * i) for i, n in enumerate(names)]
    found, frame = boxes(plots.pareto(reports), [*names, "parent"])
    for a, b in itertools.combinations(found, 2):
        assert not a.overlaps(b)
    for box in found:
        assert frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1


def test_plots_leave_pyplot_alone_and_import_surgery_does_not_load_matplotlib():
    code = (
        "import sys, surgery, surgery.cli, surgery.report, surgery.report.plots\n"
        "assert not {'matplotlib', 'bokeh'} & set(sys.modules)\n"
        "surgery.report.plots.sensitivities({'halved': {0: 0.1}})\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("first", "text", "marked"),
    [
        ("holds a key. Then", "holds a lamp. Then", ["lamp."]),
        ("a b c d", "a x y d", ["x y"]),
        ("a b", "a b\n\nc <d>", ["c <d>"]),
        ("a b c", "a c", []),
        ("", " all new ", ["all new"]),
        ("same", "same", []),
    ],
)
def test_words_that_differ_are_marked_and_nothing_is_lost(first, text, marked):
    pieces = differing(first, text)
    assert "".join(piece for piece, _ in pieces) == text
    assert [piece for piece, differs in pieces if differs] == marked


def test_answers_to_a_prompt_stand_side_by_side():
    samples = [("parent", "P", " a b"), ("parent", "Q", " c"), ("small", "P", " a x"), ("small", "Q", " c")]
    first, second = side_by_side(samples)
    assert [a.model for a in first.answers] == [a.model for a in second.answers] == ["parent", "small"]
    assert [a.pieces[-1] for a in first.answers] == [(" a b", False), ("x", True)]


def test_costs_of_layers_come_from_a_saved_composition(call, tmp_path):
    keys = [
        [{"rewriter": "mla", "keep": 0.5}],
        [{"rewriter": "mla", "keep": 0.5}, {"rewriter": "quantise", "k_bits": 4}],
    ]
    found = {"sensitivities": {json.dumps(key): {"0": 1e-3, "1": 1e-4 * (i + 1)} for i, key in enumerate(keys)}}
    (tmp_path / "found.json").write_text(json.dumps(found))
    (tmp_path / "result.json").write_text(json.dumps(made_up().to_dict()))
    arguments = ("report", tmp_path / "result.json", "-o", tmp_path / "out", "--composition")
    assert call(*arguments, tmp_path / "found.json")[0] == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Sensitivity of the layers" in page and "mla keep 0.5 + quantise 4 bits</button>" in page
    code, _, said = call(*arguments, tmp_path / "result.json", "--overwrite")
    assert code == 2 and "holds no costs of layers" in said


@pytest.mark.skipif(PROGRAM is None, reason="needs Chromium: apt-get install chromium")
def test_a_browser_shows_the_page_on_any_width_in_both_schemes_without_a_complaint(tmp_path):
    names = ("gqa-2x", "<b>mla & rank|96</b>", "runs/" + "a-long-name-of-a-model/" * 4)
    reports = [made_up(name, gap=0.1 * (i + 1), bytes_per_token=4608 - 999 * i) for i, name in enumerate(names)]
    gates = GateRatios(total=4.1, layers=tuple(range(3)), by_head=((1.5, 9.0) * 8,) * 3)
    reports[0] = dataclasses.replace(reports[0], model=dataclasses.replace(reports[0].model, gates=gates))
    costs = {name: {layer: 0.1**layer for layer in range(5)} for name in names}
    samples = [("parent", "The box", " is red."), (names[1], "The box", " is <green>.")]
    page = write_report(reports, tmp_path / "out", sensitivities=costs, samples=samples)
    drawn = "[...document.querySelectorAll('.plot')].map(plot => Boolean(plot.drawn))"
    ink = "[document.body, document.querySelector('.map td.full')].map(e => getComputedStyle(e).color)"
    seen = set()
    with browser() as tab:
        for width, dark in ((360, False), (360, True), (1280, False)):
            tab.show(width, dark)
            tab.open(page, until=f"{drawn}.every(Boolean)")
            assert tab.value(drawn) == [True] * 3
            assert tab.value("document.documentElement.scrollWidth") == width
            seen.add((dark, *tab.value(ink)))
        assert len(seen) == 2  # two schemes, each the same on any width
        assert tab.value("document.querySelectorAll('mark').length") == 1
        tab.value("document.querySelectorAll('.switch button')[1].click()")
        hidden = "[...document.querySelectorAll('.plot')].map(plot => plot.hidden)"
        assert tab.value(hidden) == [True, False, False]
        tab.value("document.querySelector('.legend button').click()")
        shown = "document.querySelectorAll('.plot')[1].drawn.renderers.map(r => [r.name, r.visible])"
        assert {(name, visible) for name, visible in tab.value(shown) if name} == {
            ("0", False),
            ("1", True),
            ("2", True),
        }
        assert tab.problems == []


def test_speed_over_context_has_a_line_for_each_layout_and_batch(call, tmp_path):
    def row(variant, batch, context, speed):
        parent = variant == "identity"
        return Row(
            variant=variant, batch=batch, context=context, kv_bytes_per_token=8, weight_bytes=8, largest_batch=1,
            tokens_per_s=speed, transformers_tokens_per_s=speed and 7.0, is_parent=parent,
        )  # fmt: skip

    cells = [("identity", 1, 512, 20.0), ("identity", 1, 4096, 9.0), ("mqa", 1, 4096, 15.0), ("mqa", 1, 512, None)]
    cells += [(name, 8, context, speed and 8 * speed) for name, _, context, speed in cells]
    found = DecodeBench(
        shape="small", device="cpu", dtype="float32", compiled=True, bandwidth_gb_per_s=9.0,
        rows=tuple(row(*cell) for cell in cells),
    )  # fmt: skip
    (axes,) = speed_over_context(found).axes
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}
    assert lines["identity, batch 1"] == ([512, 4096], [20.0, 9.0])
    assert lines["mqa, batch 8"] == ([4096], [120.0])
    assert lines["transformers, batch 1"] == ([512, 4096], [7.0, 7.0])
    assert len(lines) == 6 and len({line.get_linestyle() for line in axes.lines}) == 2
    code, _, error = call("bench", "decode", "--shape", "small", "--plot", tmp_path / "speed.gif")
    assert code == 2 and "no format of images is known by that name. Use .png, .svg, .pdf" in " ".join(error.split())
    code, _, error = call("bench", "decode", "--shape", "small", "--plot", tmp_path / "away" / "speed.png")
    assert code == 2 and "there is no folder" in error
