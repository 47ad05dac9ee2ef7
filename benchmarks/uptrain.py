"""Uptraining: tokens until most of a conversion's damage is gone, equality of runs, step time, memory.

    python benchmarks/uptrain.py recover      # tokens to close 90 % of the gap: ours beside plain cross-entropy
    python benchmarks/uptrain.py recipes      # every recipe on the bundled model, before and after, with its control
    python benchmarks/uptrain.py resume       # kill -9 at three random moments, compared bit for bit
    python benchmarks/uptrain.py processes    # two gloo processes beside one, 50 steps
    python benchmarks/uptrain.py overhead     # step time with the parent beside plain fine-tuning
    python benchmarks/uptrain.py memory       # chunked KL at a vocabulary of 128k
    python benchmarks/uptrain.py plot         # the curves of `recover`

Each part replaces its own section of results/uptrain.json. Text: of the bundled model's corpus, the first 1500
documents of the training split, and the validation split; for the stories model, stories 0-379 and from 400 on,
lower-cased. The stories model is first trained on its text until that teaches it nothing more (`adapted`): otherwise
plain cross-entropy gets better than the parent by learning the text, whatever the conversion did.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import ROOT, environment, peak_gigabytes, reference, write
from rich.console import Console
from rich.table import Table

import surgery
from surgery.bundled import SMALL
from surgery.train.checkpoints import checkpoints
from surgery.train.losses import Head, distil
from surgery.train.pretrain import read_corpus
from surgery.train.run import Run
from surgery.train.uptrain import uptrain

SEED = 0
LENGTH = 256
OURS = {"layer_local": 0.1}
CE = {"layer_local": 0, "kl": 0, "ce": 1}
WORK = Path(tempfile.gettempdir()) / "surgery-uptrain-benchmark"
"""Converted models and runs; kept, so that a later part need not convert again."""


def jsonl(path: Path, texts: list[str]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def text_of(model: str) -> tuple[str, str]:
    """(training, held-out) text files."""
    train, held = WORK / f"{model}-train.jsonl", WORK / f"{model}-held.jsonl"
    if not held.exists() and model == "small":
        corpus = reference("corpus")
        jsonl(train, list(itertools.islice(read_corpus(corpus / "train.jsonl.xz"), 1500)))
        jsonl(held, list(read_corpus(corpus / "valid.jsonl.xz")))
    elif not held.exists():
        lines = reference("text", "tinystories-917.jsonl").read_text().splitlines()
        texts = [json.loads(line)["text"].lower() for line in lines]
        jsonl(train, texts[:380])
        jsonl(held, texts[400:])
    return str(train), str(held)


def adapted() -> Path:
    """stories940K after 0.8M more tokens of its training text."""
    folder = WORK / "stories" / "model"
    if not folder.exists():
        train, held = text_of("stories")
        source = reference("checkpoints", "stories940K-tok105-hf")
        seedling = WORK / "stories-seedling"
        if not seedling.exists():  # the program trains converted models, and their parents as a control
            surgery.save(surgery.convert(surgery.load(source), recipe("mqa", MEAN)), seedling)
        uptrain(
            Run(
                model=str(seedling),
                data=train,
                out=WORK / "stories",
                control=True,
                held_out=held,
                held_out_windows=64,
                eval_steps=40,
                overrides=("train=all", "tokens=800000", "batch=16", f"length={LENGTH}", "learning_rate=1e-3"),
            )
        )
    return folder


def recipe(name: str, options: dict[str, Any]) -> dict[str, Any]:
    made = surgery.Recipe.load(name, [f"{key}={value}" for key, value in options.items()])
    return {**made.to_dict(), "uptrain": {"tokens": 1}}


def converted(model: str, name: str, options: dict[str, Any] | None = None) -> str:
    """A conversion of the bundled or the adapted stories model, made once; `options`: of the published form."""
    out = WORK / f"{model}-{name}{'-mean' if options else ''}"
    if not out.exists():
        parent = SMALL if model == "small" else adapted()
        train, _ = text_of(model)
        made = recipe(name, options or {})
        plain = options and all(step.text != "needed" for step in surgery.Recipe.load(made).steps)
        surgery.convert_checkpoint(
            parent, made, out, **({} if plain else {"calibration": train, "samples": 32, "length": LENGTH})
        )
    return str(out)


NO_REFIT = {"refit_queries": False, "refit_output": False, "gain_fit": False}
MEAN = {"init": "mean", "grouping": "neighbour", **NO_REFIT}
MEAN_SHARED = {"init": "mean", **NO_REFIT}
SVD = {"init": "svd", **NO_REFIT}
RECOVER: dict[str, dict[str, Any]] = {
    "small gqa-4x": {
        "runs": {
            "mean, ours": ("small", "gqa-4x", MEAN, OURS),
            "mean, cross-entropy": ("small", "gqa-4x", MEAN, CE),
        },
        "tokens": 114688, "batch": 8, "learning_rate": 2e-3, "target": "mean, ours",
    },
    "small cla2": {
        "runs": {
            "ours, ours": ("small", "cla2", None, OURS),
            "mean, ours": ("small", "cla2", MEAN_SHARED, OURS),
            "mean, cross-entropy": ("small", "cla2", MEAN_SHARED, CE | {"tokens": 229376}),
        },
        "tokens": 114688, "batch": 8, "learning_rate": 2e-3, "target": "mean, ours",
    },
    "small mla-4x": {
        "runs": {
            "ours, ours": ("small", "mla-4x", None, OURS),
            "svd, ours": ("small", "mla-4x", SVD, OURS),
            "svd, cross-entropy": ("small", "mla-4x", SVD, CE),
        },
        "tokens": 114688, "batch": 8, "learning_rate": 5e-4, "target": "svd, ours",
    },
    "stories 4->1": {
        "runs": {
            "ours, ours": ("stories", "mqa", None, {}),
            "ours, cross-entropy": ("stories", "mqa", None, CE),
            "mean, cross-entropy": ("stories", "mqa", MEAN, CE),
        },
        "tokens": 524288, "batch": 8, "learning_rate": 5e-4, "target": "ours, ours",
    },
}  # fmt: skip
"""Conversion, then training. The common goal closes 90 % of the gap of the run named `target`. Runs that are in the
results with the same options are kept."""


def curve(name: str, model: str, text: str, sets: dict[str, Any]) -> dict[str, Any]:
    """Held-out loss and KL along one run with the `uptrain` options `sets`."""
    train, held = text_of(text)
    out = WORK / "runs" / name.replace(" ", "-").replace(",", "").replace(">", "")
    shutil.rmtree(out, ignore_errors=True)
    summary = uptrain(
        Run(
            model=model,
            data=train,
            out=out,
            held_out=held,
            held_out_windows=32,
            seed=SEED,
            eval_steps=max(1, sets["tokens"] // (sets["batch"] * LENGTH) // 12),
            save_steps=10**9,
            log_steps=10,
            overrides=tuple(f"{key}={value}" for key, value in sets.items()),
        )
    )
    log = json.loads((out / "uptraining.json").read_text())["log"]
    points = [
        {"tokens": e["tokens"], "nats": e["held_out_nats_per_token"], "kl": e["held_out_kl"], "seconds": e["seconds"]}
        for e in log
        if "held_out_kl" in e
    ]
    shutil.rmtree(out / "checkpoints")
    return {
        "options": sets,
        "parent": summary["before"]["parent_nats_per_token"],
        "points": points,
        "seconds": summary["seconds"],
        "held_out": summary["held_out"],
    }


def reached(points: list[dict[str, Any]], key: str, goal: float) -> float | None:
    """Tokens at which the curve falls to `goal`, between the points on a line; None where it does not."""
    for a, b in itertools.pairwise(points):
        if b[key] <= goal:
            part = (a[key] - goal) / max(a[key] - b[key], 1e-12)
            return float(a["tokens"] + max(0.0, min(1.0, part)) * (b["tokens"] - a["tokens"]))
    return None


def recover(only: str | None) -> dict[str, Any]:
    found: dict[str, Any] = section("recover")
    for case, spec in RECOVER.items():
        if only and only not in case:
            continue
        runs = {}
        for name, (text, made, init, options) in spec["runs"].items():
            sets = {
                "tokens": spec["tokens"],
                "batch": spec["batch"],
                "length": LENGTH,
                **options,
                "learning_rate": spec["learning_rate"],
            }
            runs[name] = found.get(case, {}).get("runs", {}).get(name, {})
            if runs[name].get("options") != sets:
                runs[name] = curve(f"{case} {name}", converted(text, made, init), text, sets)
            print(case, name, [round(p["nats"], 3) for p in runs[name]["points"]], flush=True)  # noqa: T201
        base = runs[spec["target"]]
        goals = {
            "nats": base["parent"] + 0.1 * (base["points"][0]["nats"] - base["parent"]),
            "kl": 0.1 * base["points"][0]["kl"],
        }
        for run in runs.values():
            own = run["parent"] + 0.1 * (run["points"][0]["nats"] - run["parent"])
            run["tokens_to_goal"] = reached(run["points"], "nats", goals["nats"])
            run["tokens_to_kl_goal"] = reached(run["points"], "kl", goals["kl"])
            run["tokens_to_90_percent_of_own_gap"] = reached(run["points"], "nats", own)
        found[case] = {"goals": goals, "runs": runs}
        save("recover", found)
    return found


RECIPES = (
    "gqa-4x", "mla-4x", "cla2-latent", "cla2", "cla2-gqa-2x", "gqa-2x", "mqa", "lowrank-2x", "mla-2x", "yoco-half",
    "mlkv-4", "lowrank-freq-2x", "lowrank-3x", "mla-8x",
)  # fmt: skip
RECIPE_TOKENS = 32768


def recipes(only: str | None) -> dict[str, Any]:
    """Rows of docs/how-to/train.md. The control is the same for all of them: the parent, the same tokens."""
    found: dict[str, Any] = section("recipes")
    train, held = text_of("small")
    common = ("batch=8", f"length={LENGTH}")
    for name in (*RECIPES, "control"):
        if only and only != name:
            continue
        out = WORK / "recipes" / name
        shutil.rmtree(out, ignore_errors=True)
        model = converted("small", "gqa-4x" if name == "control" else name)
        summary = uptrain(
            Run(
                model=model,
                data=train,
                out=out,
                held_out=held,
                held_out_windows=64,
                seed=SEED,
                save_steps=10**9,
                control=name == "control",
                overrides=(f"tokens={RECIPE_TOKENS}", *common),
                recipe=None if name == "control" else name,
            )
        )
        found[name] = {
            key: summary[key] for key in ("tokens", "seconds", "before", "after", "held_out", "parent_bytes")
        }
        save("recipes", found)
        print(name, json.dumps(found[name]), flush=True)  # noqa: T201
    return found


def command(model: str, data: str, out: Path, *sets: str, steps: int = 5) -> list[str]:
    arguments = [sys.executable, "-m", "surgery.train.uptrain", "--model", model, "--data", data, "-o", str(out)]
    arguments += ["--log-steps", "1", "--save-steps", str(steps)]
    return arguments + [word for each in sets for word in ("--set", each)]


def losses(out: Path) -> list[dict[str, Any]]:
    state = json.loads((checkpoints(out / "checkpoints")[-1] / "trainer_state.json").read_text())
    return [{k: v for k, v in e.items() if k != "seconds"} for e in state["log_history"] if "loss" in e]


def newest_step(out: Path) -> int:
    """Of the last whole checkpoint; 0 where there is none."""
    found = checkpoints(out / "checkpoints") if (out / "checkpoints").exists() else []
    return int(found[-1].name.rpartition("-")[2]) if found else 0


def resume(only: str | None) -> dict[str, Any]:
    """Kill -9 three times at random moments; losses and weights beside the run that nobody touched."""
    model, (train, _) = converted("small", "gqa-4x", MEAN), text_of("small")
    sets = ("tokens=30720", "batch=8", "length=128")
    rng = random.Random(SEED)
    for name in ("whole", "killed"):
        shutil.rmtree(WORK / name, ignore_errors=True)
    subprocess.run(command(model, train, WORK / "whole", *sets), check=True, capture_output=True)
    log = json.loads((WORK / "whole" / "uptraining.json").read_text())["log"]
    times = [entry["seconds"] for entry in log if "loss" in entry]
    interval = 5 * (times[-1] - times[0]) / (len(times) - 1)
    kills: list[dict[str, Any]] = []
    for moment in sorted(rng.uniform(0, 5) for _ in range(3)):  # in intervals of 5 steps, of which there are 6
        job = subprocess.Popen(command(model, train, WORK / "killed", *sets), stdout=subprocess.DEVNULL)
        while job.poll() is None and newest_step(WORK / "killed") < 5 * int(moment):
            time.sleep(0.02)
        time.sleep(moment % 1 * interval)
        if job.poll() is not None:
            sys.exit("the run ended before it could be killed: give it more tokens")
        job.send_signal(signal.SIGKILL)
        job.wait()
        kills.append({"step": round(5 * moment, 2), "last checkpoint": newest_step(WORK / "killed")})
    subprocess.run(command(model, train, WORK / "killed", *sets), check=True, capture_output=True)
    a, b = (surgery.load(WORK / name / "model").state_dict() for name in ("whole", "killed"))
    result = {
        "steps": len(losses(WORK / "whole")),
        "kills": kills,
        "losses_equal": losses(WORK / "whole") == losses(WORK / "killed"),
        "weights_equal": all(torch.equal(a[name], b[name]) for name in a),
    }
    save("resume", result)
    return result


def processes(only: str | None) -> dict[str, Any]:
    """Largest difference of the loss over 50 steps."""
    model, (train, _) = converted("small", "gqa-4x", MEAN), text_of("small")
    sets = ("tokens=25600", "batch=8", "length=64")
    for name in ("one", "two"):
        shutil.rmtree(WORK / name, ignore_errors=True)
    subprocess.run(command(model, train, WORK / "one", *sets, steps=50), check=True, capture_output=True)
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(ROOT / "train/configs/cpu-2.yaml"),
    ]
    subprocess.run(launch + command(model, train, WORK / "two", *sets, steps=50)[1:], check=True, capture_output=True)
    one, two = losses(WORK / "one"), losses(WORK / "two")
    devices = json.loads((WORK / "two" / "uptraining.json").read_text())["devices"]
    differences = [abs(a["loss"] - b["loss"]) for a, b in zip(one, two, strict=True)]
    result = {"steps": len(one), "devices": devices, "largest_difference": max(differences)}
    save("processes", result)
    return result


def overhead(only: str | None) -> dict[str, Any]:
    """Median seconds of a step, runs in turn: plain fine-tuning of the student, KL with the parent, layer-local."""
    model, (train, _) = converted("small", "gqa-4x", MEAN), text_of("small")
    kinds = {"plain cross-entropy": CE, "KL to the parent": {"layer_local": 0}, "layer-local": {"layer_local": 1}}
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(2):
        for name, options in kinds.items():
            out = WORK / "overhead"
            shutil.rmtree(out, ignore_errors=True)
            sets = {"tokens": 8 * LENGTH * 8, "batch": 8, "length": LENGTH, **options}
            uptrain(
                Run(
                    model=model,
                    data=train,
                    out=out,
                    save_steps=10**9,
                    log_steps=1,
                    overrides=tuple(f"{key}={value}" for key, value in sets.items()),
                )
            )
            log = [e["seconds"] for e in json.loads((out / "uptraining.json").read_text())["log"] if "loss" in e]
            seconds[name] += [b - a for a, b in itertools.pairwise(log)]
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    plain = medians["plain cross-entropy"]
    result = {"seconds": medians, "ratio": {name: median / plain for name, median in medians.items()}}
    save("overhead", result)
    return result


def memory(only: str | None) -> dict[str, Any]:
    """Growth of the peak of resident memory by the loss at a vocabulary of 128k, 2048 tokens, width 1024, float32."""
    B, T, D, V = 1, 2048, 1024, 128 * 1024
    torch.manual_seed(SEED)
    weight = torch.randn(V, D) * D**-0.5
    h, parent_h = torch.randn(B, T, D, requires_grad=True), torch.randn(B, T, D)
    labels = torch.randint(V, (B, T))
    warm = labels.clone()
    warm[:, 2:] = -100
    head = Head(weight_VD=weight)
    distil(h, head, warm, parent_h, head).total.backward()
    before = peak_gigabytes()
    begun = time.monotonic()
    distil(h, head, labels, parent_h, head).total.backward()
    result = {
        "vocabulary": V, "tokens": T, "added_gigabytes": peak_gigabytes() - before,
        "logits_of_all_tokens_gigabytes": 4 * T * V / 1e9, "seconds": time.monotonic() - begun,
    }  # fmt: skip
    save("memory", result)
    return result


def plot(only: str | None) -> dict[str, Any]:
    """results/uptrain.png."""
    from matplotlib.figure import Figure

    from surgery.report.figures import DPI
    from surgery.report.plots import COLOURS

    cases = section("recover")
    figure = Figure(figsize=(10, 3.6 * -(-len(cases) // 2)), dpi=DPI, layout="constrained")
    panels = figure.subplots(-(-len(cases) // 2), 2, squeeze=False).flatten()
    for panel, (case, data) in zip(panels, cases.items(), strict=False):
        for name, run in data["runs"].items():
            start, training = name.split(", ")
            panel.plot(
                [p["tokens"] / 1000 for p in run["points"]],
                [p["nats"] - run["parent"] for p in run["points"]],
                color=COLOURS[training == "cross-entropy"],
                linestyle="-" if start == "ours" else "--",
                marker="o",
                markersize=3,
                label=f"{start}, {'KL to the parent' if training == 'ours' else training}",
            )
        panel.axhline(data["goals"]["nats"] - run["parent"], color="#999999", linestyle=":", linewidth=1)
        panel.set_yscale("log")
        panel.set_ylim(top=2.5 * panel.get_ylim()[1])  # room for the legend
        panel.set_title(f"{case} (conversion, training)", fontsize=10)
        panel.set_xlabel("thousand tokens")
        panel.set_ylabel("nats/token above the parent")
        panel.legend(fontsize=8, frameon=False, loc="upper right", handlelength=3)
    figure.savefig(ROOT / "benchmarks" / "results" / "uptrain.png")
    return {}


def section(name: str) -> dict[str, Any]:
    path = ROOT / "benchmarks" / "results" / "uptrain.json"
    return dict(json.loads(path.read_text()).get(name, {}).get("result", {})) if path.exists() else {}


def save(name: str, result: dict[str, Any]) -> None:
    path = ROOT / "benchmarks" / "results" / "uptrain.json"
    data = json.loads(path.read_text()) if path.exists() else {}
    write("uptrain", {**data, name: {**environment(SEED), "result": result}})


PARTS = {f.__name__: f for f in (recover, recipes, resume, processes, overhead, memory, plot)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--only", help="one case of `recover`, or one recipe")
    arguments = parser.parse_args()
    result = PARTS[arguments.part](arguments.only)
    table = Table(title=arguments.part, width=100)
    table.add_column("")
    table.add_column("")
    for name, value in result.items():
        shown = {k: v["tokens_to_goal"] for k, v in value["runs"].items()} if arguments.part == "recover" else value
        table.add_row(name, json.dumps(shown))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
