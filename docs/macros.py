"""What pages of this site may call: numbers and tables of `benchmarks/results/*.json`, and formulas as MathML.

Pages never hold a measured number. They name the place where it stands, and a place that is not there stops the build.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


@cache
def results(name: str) -> Any:
    """What `benchmarks/results/NAME.json` holds."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def at(name: str, *path: str | int) -> Any:
    """The value at a path of keys; a name leads to the row of a list that has it.

    Raises:
        KeyError: names the file and the key that it does not have.
    """
    value = results(name)
    for i, key in enumerate(path):
        try:
            if isinstance(value, list) and isinstance(key, str):
                value = {row["name"]: row for row in value}
            value = value[key]
        except (KeyError, IndexError, TypeError):
            raise KeyError(f"{name}.json: nothing at {' / '.join(map(str, path[: i + 1]))}") from None
    return value


def number(name: str, *path: str | int, form: str = "", times: float = 1) -> str:
    """The number at a path, `times` a factor, in a format of Python (`.3f`)."""
    value = at(name, *path)
    return format(value * times if times != 1 else value, form)


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A Markdown table; the first `left` columns start at the left, the others end at the right."""
    lines = [heads, ["---" if i < left else "---:" for i in range(len(heads))], *rows]
    return "\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def measured_on(name: str, *path: str) -> str:
    """Machine, versions and date of a measurement, in one sentence."""
    where = at(name, *path)
    versions = where["versions"]
    threads = "one core" if where["threads"] == 1 else f"{where['threads']} cores"
    software = f"torch {versions['torch']} and transformers {versions['transformers']}"
    machine = f"{threads} of an {where['processor']} ({where['machine']})"
    return f"Measured on {machine} on {where['date']} with {software}, seed {where['seed']}, commit {where['commit']}."


# --------------------------------------------------------------------------------------- SmolLM2-135M, all methods


def _real_cells(name: str, row: dict[str, Any]) -> list[str]:
    text, every = row["text"], row["text"]["all"]
    recall = row.get("recall-512")
    return [
        f"{name}{' (published form)' if row['published'] else ''}",
        f"{100 * text['part_of_parent']:.0f} %" + ("" if text["is_measured"] else " (computed)"),
        f"{max(0.0, every['kl']['value']):.3f}",
        f"{max(0.0, every['kl']['low']):.3f} to {max(0.0, every['kl']['high']):.3f}",
        f"{every['tvd_kept']['value']:.2f}",
        f"{every['nats_per_token']['value']:.2f}",
        f"{100 * recall['exact']:.0f} %" if recall and recall["questions"] else "",
    ]


def real_models(*families: str) -> str:
    """Rows of `real_models.json`, largest cache first: of all families, or of those that are named."""
    rows = {name: row for name, row in at("real_models", "rows").items() if "text" in row}
    known = {row["family"] for row in rows.values()}
    for family in families:
        if family not in known:
            raise KeyError(f"real_models.json: no family {family!r}")
    chosen = {n: r for n, r in rows.items() if not families or n == "parent" or r["family"] in families}
    order = sorted(chosen.items(), key=lambda item: (item[0] != "parent", -item[1]["text"]["part_of_parent"],
                                                     item[1]["text"]["all"]["kl"]["value"]))  # fmt: skip
    heads = ["row", "cache", "KL", "95 % interval", "1 - TVD", "nats/token", "questions answered"]
    return table(heads, (_real_cells(name, row) for name, row in order))


def shipped_recipes() -> str:
    """Every shipped recipe on SmolLM2-135M, or why it has no row."""
    found = {row["recipe"]: row for row in at("real_models", "rows").values() if isinstance(row["recipe"], str)}
    heads = ["recipe", "cache", "KL", "95 % interval", "1 - TVD", "nats/token", "questions answered"]

    def cells(name: str) -> list[str]:
        row = found.get(name, {})
        if "text" in row:
            return _real_cells(f"`{name}`", row)
        if name in at("real_models", "needs_training"):
            why = "answers as the parent until its gates are trained"
        elif "refused" in row:
            why = f"not for this model: {row['refused']['reason']}"
        else:
            why = "not measured yet"
        return [f"`{name}`", why, *[""] * (len(heads) - 2)]

    return table(heads, (cells(path.stem) for path in sorted((ROOT / "recipes").glob("*.yaml"))))


def evict_ranks(name: str = "evict_quality") -> str:
    """SmolLM2-135M with the eviction by rank; `name` is the file of results."""

    def cells(row_name: str, row: dict[str, Any]) -> list[str]:
        text, recall = row["text"], row["recall-512"]
        parts = [f"{100 * text.get(key, 1.0):.0f} %" for key in ("part_of_parent", "part_at_end")]
        return [
            row_name,
            *parts,
            f"{text['kl']:.3f}",
            f"{text['nats_per_token']:.2f}",
            f"{recall['right']} of {recall['questions']}",
            f"{recall['nats']:.2f}",
        ]

    rows = at(name, "rows")
    order = sorted(rows, key=lambda row_name: (row_name != "parent", rows[row_name]["text"]["kl"]))
    heads = ["row", "cache after the prompt", "at the end", "KL", "nats/token", "answered", "nats of the answers"]
    return table(heads, (cells(row_name, rows[row_name]) for row_name in order))


def codecs() -> str:
    """Quantised caches of both models, most bits first."""
    small, real = at("store_quality", "models", "small", "rows"), at("store_quality", "models", "smollm2", "rows")
    names = [name for name in dict.fromkeys([*real, *small]) if "gqa" not in name and "mla" not in name]
    bits = {name: {rows[name]["bits"] for rows in (real, small) if name in rows} for name in names}

    def cells(name: str) -> list[str]:
        return [
            name,
            "; ".join(f"{b:g}" for b in sorted(bits[name])),
            f"{real[name]['kl']:.4g}" if name in real else "",
            f"{real[name]['variation']:.3f}" if name in real else "",
            f"{small[name]['kl']:.2g}" if name in small else "",
        ]

    order = sorted(names, key=lambda name: (-min(bits[name]), "other text" in name, name))
    heads = ["codec", "bits, all counted", "KL, SmolLM2-135M", "total variation", "KL, bundled model"]
    return table(heads, map(cells, order))


def codec_speed() -> str:
    """Time of a decoding step over quantised caches, as a multiple of that over a dense dynamic one."""
    late, early = at("store_speed_static", "rows"), at("store_speed", "rows")

    def cells(name: str) -> list[str]:
        size = (late.get(name) or early[name])["bytes_of_bf16"]
        return [
            name,
            *(f"{run[name]['ratio']:.2f}" if name in run else "" for run in (late, early)),
            "" if size is None else f"{size:.2f}",
        ]

    heads = ["cache", "time of a step", "an earlier run on a busier machine", "bytes, of bfloat16"]
    return table(heads, map(cells, dict.fromkeys([*late, *early])))


# ------------------------------------------------------------------------------------------------- small models


def pooled_heads() -> str:
    """stories940K with fewer KV heads, by initialisation."""
    model = at("gqa_quality", "results", "stories940K-tok105-hf")
    by_name: dict[str, dict[int, str]] = {}
    for row in model["rows"]:
        by_name.setdefault(row["init"], {})[row["kv_heads"]] = f"{row['nats_per_token']:.3f}"
    lines = ([name, *(found.get(heads, "") for heads in (2, 1))] for name, found in by_name.items())
    return table(["initialisation", "4 to 2 KV heads, nats/token", "4 to 1"], lines)


def latents(kind: str, model: int = 0) -> str:
    """Latents (`mla`) or low rank (`lowrank`): what they cost in nats per token at the same cached numbers."""
    rows = [row for row in at("latent_quality", "models", model, "rows") if row["name"].startswith(kind)]
    parts = sorted({row["keep"] for row in rows}, reverse=True)
    by_name: dict[str, dict[float, str]] = {}
    for row in rows:
        name = re.sub(r" \d+[+:]\d+$", "", row["name"].removeprefix(f"{kind} "))  # how the numbers are split
        by_name.setdefault(name, {})[row["keep"]] = f"{row['gap']:+.4f}"
    heads = ["initialisation", *(f"{100 * part:g} % of the bytes" for part in parts)]
    return table(heads, ([name, *(found.get(part, "") for part in parts)] for name, found in by_name.items()))


def shared_layers() -> str:
    """stories940K with two of five layers reading another layer's cache."""
    model = at("share_quality", "results", "stories940K-tok105-hf")

    def cells(row: dict[str, Any]) -> list[str]:
        owners = row["owners"]
        readers = ", ".join(f"{reader} reads {owner}" for reader, owner in enumerate(owners) if reader != owner)
        return [row["name"], readers, f"{row['nats_per_token']:.3f}"]

    rows = [row for row in model["rows"] if sum(a != b for a, b in enumerate(row["owners"])) == 2]
    return table(["layers and initialisation", "who reads whom", "nats/token"], map(cells, rows), left=2)


def retained(model: str) -> str:
    """Caches that drop or merge tokens: `stories` or `small`."""

    def cells(row: dict[str, Any]) -> list[str]:
        thirds, window, trained = row.get("gap_by_third"), row.get("window"), row.get("trained_tokens")
        return [
            row["name"],
            "" if window is None else f"{window:g}",
            f"{trained:,}" if trained else "none",
            f"{row['tokens_per_slot']:.2f}" if "tokens_per_slot" in row else "1 (fewer heads)",
            f"{100 * row['gap'] / row['parent']:+.2f} %",
            f"{thirds[2]:+.4f}" if thirds else "",
        ]

    rows = sorted(at("retain_quality", "results", model), key=lambda row: row["gap"])
    heads = ["row", "window", "tokens trained on", "tokens per slot", "change of nats/token", "last third, nats"]
    return table(heads, map(cells, rows))


def recalled(result: str = "retain_recall") -> str:
    """A model that was made to look up notes: answers right with slots for a part of the tokens."""

    def cells(row: dict[str, Any]) -> list[str]:
        return [
            row["name"],
            f"{row['tokens_per_slot']:.2f}",
            f"{100 * row['answers_right']:.0f} %",
            f"{row['answer_nats']:.3f}",
            f"{row['nats_per_token']:.3f}",
        ]

    heads = ["row", "tokens per slot", "answers right", "nats of the answers", "nats/token"]
    return table(heads, map(cells, at(result, "rows")))


def decoding_with_less() -> str:
    """Decoding and prefill with a quarter of the slots, beside the parent."""

    def cells(row: dict[str, Any]) -> list[str]:
        return [
            row["model"],
            str(row["kv_heads"]),
            str(row["batch"]),
            f"{row['decode_speed_ratio']:.2f}",
            f"{row['prefill_time_ratio']:.2f}",
            f"{row['cache_bytes'] / 2**20:.0f} MiB",
        ]

    heads = ["model", "KV heads", "batch", "speed of decoding", "time of prefill", "cache"]
    return table(heads, map(cells, at("retain_decode", "rows")))


def uptrained() -> str:
    """What 33 thousand tokens give back, by recipe."""
    rows = at("uptrain", "recipes", "result")
    control = rows["control"]

    def cells(name: str) -> list[str]:
        row = rows[name]
        stages = [f"{row[when]['nats_per_token']:.3f} ({row[when]['kl']:.4f})" for when in ("before", "after")]
        parent = row["before"]["parent_nats_per_token"]
        return [name, f"{row['tokens']:,}", f"{row['seconds']:.0f} s", f"{parent:.3f}", *stages,
                f"{control['after']['nats_per_token']:.3f}"]  # fmt: skip

    heads = ["recipe", "tokens", "time", "parent", "after conversion (KL)", "after training (KL)", "parent trained on"]
    return table(heads, (cells(name) for name in sorted(rows) if name != "control"))


def recovered() -> str:
    """Distillation beside plain cross-entropy, from the same start."""

    def cells(goal: str, name: str, run: dict[str, Any], nats: float) -> list[str]:
        points = run["points"]
        reached = next((f"{point['tokens']:,} tokens" for point in points if point["nats"] <= nats), "not reached")
        return [goal, name, f"{run['parent']:.3f}", f"{points[0]['nats']:.3f}", f"{nats:.3f}", reached,
                f"{points[-1]['nats']:.3f} after {points[-1]['tokens']:,}"]  # fmt: skip

    found = at("uptrain", "recover", "result")
    heads = ["model and cache", "start, loss", "parent", "after conversion", "goal", "goal reached after", "at the end"]
    lines = (cells(goal, name, run, model["goals"]["nats"]) for goal, model in found.items()
             for name, run in model["runs"].items())  # fmt: skip
    return table(heads, lines, left=2)


# ------------------------------------------------------------------------------------------- planner, cost, releases


def composed() -> str:
    """Compositions beside the best recipe of a single axis."""

    def cells(name: str, row: dict[str, Any]) -> list[str]:
        single = row["best_single_kl"]
        tokens = row["race"]["tokens"]
        best = min(
            (r for r in row["race"]["runners"][1:]), key=lambda runner: runner["kl"]["value"], default={"name": ""}
        )
        return [
            name,
            f"{row['kl']:.2g}",
            f"{row['race']['runners'][0]['bytes'] / tokens:,.0f}",
            "none fits" if single is None else f"{best['name']}: {single:.2g}",
            "" if single is None else f"{row['over_best_single']:.2g}",
        ]

    rows = {name: row for name, row in at("planner", "rows").items() if "race" in row}
    heads = ["model and budget", "composition, KL", "bytes per token", "best single axis, KL", "ratio"]
    return table(heads, (cells(name, row) for name, row in rows.items()))


def left_out() -> str:
    """Methods that the planner did not measure in all layers of SmolLM2."""
    return ", ".join(f"`{name}`" for name in at("planner", "rows", "smollm2, race 1/4", "left_out"))


def cpu_decode() -> str:
    """Tokens per second of whole models on one core, one sequence, and over the parent's compiled static decoding."""
    rows = [row for row in at("cpu_decode", "rows") if (row["dtype"], row["batch"]) == ("float32", 1)]
    contexts = sorted({row["context"] for row in rows})
    speed = {(r["model"], r["attention"], r["cache"], r["context"]): r["tokens_per_s"] for r in rows}

    def cell(key: tuple[str, ...], context: int) -> str:
        if (*key, context) not in speed:
            return ""
        found = speed[*key, context]
        return f"{found:.1f} ({found / speed['parent', 'sdpa', 'static', context]:.2f}x)"

    keys = dict.fromkeys((row["model"], row["attention"], row["cache"]) for row in rows)
    heads = ["model", "attention", "cache", *(f"{context:,} tokens" for context in contexts)]
    return table(heads, ([*key, *(cell(key, context) for context in contexts)] for key in keys), left=3)


def conversion_cost() -> str:
    """Processor time of calibrated conversions of SmolLM2-135M, in forward passes over the text."""
    rows = {name: row for name, row in at("conversion_cost", "rows", "cost").items() if "passes" in row}

    def cells(row: dict[str, Any]) -> list[str]:
        minutes = row["processor_seconds"] / 60
        return [row["recipe"], f"{row['passes']:.1f}", f"{minutes:.1f} min", f"{row['peak_bytes'] / 1e9:.1f} GB"]

    heads = ["recipe", "forward passes over the text", "processor time", "memory at most"]
    return table(heads, (cells(row) for row in sorted(rows.values(), key=lambda row: row["passes"])))


def conversion_at_7b() -> str:
    """Calibrated conversions at the width of a 7B model: as many layers as were measured, one in memory at a time."""
    rows = at("conversion_cost", "rows", "seven_b")

    def cells(row: dict[str, Any]) -> list[str]:
        return [row["recipe"], f"{row['layers']}", f"{row['passes']:.1f}", f"{row['peak_bytes'] / 1e9:.1f} GB"]

    heads = ["recipe", "layers", "forward passes over the text", "memory at most"]
    return table(heads, (cells(row) for row in rows.values()))


def conversion_growth() -> str:
    """How processor time grows with the layers and with the text."""
    rows = at("conversion_cost", "rows", "growth")

    def cells(name: str) -> list[str]:
        first = rows[f"{name}, 8 layers, 8x512"]["processor_seconds"]
        more = (
            rows[f"{name}, {size}"]["processor_seconds"] / first for size in ("16 layers, 8x512", "8 layers, 16x512")
        )
        return [rows[f"{name}, 8 layers, 8x512"]["recipe"], *(f"{factor:.2f}x" for factor in more)]

    names = dict.fromkeys(name.partition(",")[0] for name in rows)
    return table(["recipe", "twice the layers", "twice the text"], map(cells, names))


def conversion_before() -> str:
    """Conversions with little text by the build before and by this one; KL to the parent of what both give."""
    before, after = (
        {name: row for name, row in at("conversion_cost", "rows", when).items() if "failed" not in row}
        for when in ("before", "after")
    )
    quality = at("conversion_cost", "rows", "quality")

    def cells(name: str) -> list[str]:
        old, new = before[name]["processor_seconds"], after[name]["processor_seconds"]
        gaps = (quality.get(f"{name}, {when}", {}).get("kl") for when in ("before", "after", "refined"))
        windows, length = after[name]["windows"]
        memory = (f"{rows[name]['peak_bytes'] / 1e9:.1f} GB" for rows in (before, after))
        return [
            after[name]["recipe"], f"{windows} x {length}", f"{old:,.0f} s", f"{new:,.0f} s", f"{old / new:.1f}x",
            *memory, *("" if gap is None else f"{gap:.2f}" for gap in gaps),
        ]  # fmt: skip

    heads = ["recipe", "windows of tokens", "before", "now", "times faster", "memory before", "now"]
    heads += ["KL before", "now", "with `refine: 200`"]
    return table(heads, (cells(name) for name in before if name in after))


def conversion_kills() -> str:
    """What came of conversions that were killed at random moments and begun again."""
    rows = at("conversion_cost", "rows", "kills").values()
    keys = ("kills", "conversions", "different", "half_results")
    heads = ["recipe", "kills", "conversions that came to an end", "with a bit that differs", "half results found"]
    return table(heads, ([row["recipe"], *(str(row[key]) for key in keys)] for row in rows))


def releases() -> str:
    """The pairs of torch and transformers on which all families were compared with their parents."""

    def cells(pair: str, row: dict[str, Any]) -> list[str]:
        worst = row["worst"]
        tokens = sum(count for name, count in worst.items() if name.endswith("_tokens"))
        largest = max(value for name, value in worst.items() if not name.endswith("_tokens"))
        return [pair, str(len(row["families"])), f"{largest:.1g}", str(tokens)]

    pairs = at("releases", "pairs")
    heads = ["versions", "families", "largest difference of logits", "greedy tokens that differ"]
    return table(heads, (cells(pair, row) for pair, row in pairs.items()))


def kvpress_overlap() -> str:
    """How many of the tokens that stay are those that NVIDIA's kvpress keeps."""
    rows = at("kvpress_overlap", "rows")
    lines = ([name, f"{100 * row['overlap']:.1f} %"] for name, row in rows.items())
    return table(["score", "the same tokens stay"], lines)


# ------------------------------------------------------------------------------------------------------- the site


def example(name: str) -> str:
    """A script of `docs/examples/` as a block of code."""
    return f"```python\n{(ROOT / 'docs' / 'examples' / f'{name}.py').read_text()}```"


def formula(source: str, language: str, css: str, options: Any, md: Any, **_: Any) -> str:
    """MathML of a fence ```math, which needs no script; GitHub shows the same fences as formulas."""
    return convert(source, display="block")


TABLES: tuple[Callable[..., str], ...] = (
    real_models, shipped_recipes, evict_ranks, codecs, codec_speed, pooled_heads, latents, shared_layers, retained,
    recalled, decoding_with_less, uptrained, recovered, composed, cpu_decode, conversion_cost, conversion_at_7b,
    conversion_growth, conversion_before, conversion_kills, releases, kvpress_overlap,
)  # fmt: skip


def on_files(files: Files, config: Any) -> Files:
    """Called by mkdocs: the results are part of the site, plots to be shown and numbers to be read."""
    for path in sorted([*RESULTS.glob("*.json"), *RESULTS.glob("*.png")]):
        files.append(File.generated(config, f"benchmarks/results/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs: links to results lead to where the site has them; as written they work in a checkout."""
    return re.sub(r"\]\(\.\./((?:\.\./)*benchmarks/results/)", r"](\1", markdown)


def define_env(env: Any) -> None:
    """Called by mkdocs-macros: names for pages, and the fence for formulas."""
    for function in (number, measured_on, example, left_out, *TABLES):
        env.macro(function)
    fences = env.conf["mdx_configs"].setdefault("pymdownx.superfences", {})
    fences.setdefault("custom_fences", []).append({"name": "math", "class": "math", "format": formula})
