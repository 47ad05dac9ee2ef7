"""The planner over all axes: does a composition beat the best single axis, and is what it predicts true?

    python benchmarks/planner.py --models small                            # minutes on one core
    python benchmarks/planner.py --models smollm2 --smollm2 FOLDER         # FOLDER: made by benchmarks/smollm2.py
    python benchmarks/planner.py --only exhaustive

Each row is written when it is done and skipped when it is there; `--again` measures anew. Rows of a model:

- `race 1/2` to `race 1/16`: `surgery.compose` with that part of the parent's bytes, and its race (KL on tokens decoded
  through the cache, on text that nothing was made with) against the best recipe of each axis alone within the bytes.
- `prediction`: Spearman's rank correlation of predicted and measured KL over random compositions.
- `exhaustive`: four layers with three settings each; the KL of the choice beside the best of all 81 that fit.

Models are compared in bfloat16's bytes; KL is measured in float32.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import random
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import ROOT, calibration_text, environment, measured_on, write

import surgery
from surgery.bundled import SMALL
from surgery.calibration.text import Windows, read_windows
from surgery.checkpoints.storage import load_parent
from surgery.composing.choosing import Chooser
from surgery.composing.compose import parts_of
from surgery.composing.costs import to_measure
from surgery.composing.donors import Donors
from surgery.composing.measuring import measure_costs
from surgery.composing.sensitivity import Bench, measure_by
from surgery.composing.settings import Setting, settings_for
from surgery.report.figures import save_figure
from surgery.report.plots import composition_front
from surgery.rewriters import AXES

SEED = 0
RATIOS = (2, 4, 8, 16)
DRAWN = 40
GOALS = {"KL over the best single axis": 0.7, "rank correlation": 0.9, "over exhaustive search": 1.05, "minutes": 15}
EXHAUSTIVE = ("metric 2 bits", "window", "gqa")


class Rows:
    """What is measured so far."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.only, self.again = arguments.only, arguments.again
        self.file = ROOT / "benchmarks/results/planner.json"

    def all(self) -> dict[str, Any]:
        return json.loads(self.file.read_text())["rows"] if self.file.is_file() else {}

    def row(self, name: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Measure a row and keep it, unless it is there or not asked for."""
        if self.only not in name or (name in self.all() and not self.again):
            return
        begun, used = time.monotonic(), time.process_time()
        found = measure()
        found |= {
            "seconds": round(time.monotonic() - begun, 1),
            "processor_seconds": round(time.process_time() - used, 1),
            "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "threads": torch.get_num_threads(),
            **measured_on(),
        }
        write("planner", {**environment(SEED), "goals": GOALS, "rows": self.all() | {name: found}})
        print(name, {k: v for k, v in found.items() if not isinstance(v, (dict, list))}, flush=True)  # noqa: T201


class Subject:
    """A model, its text, and the settings of its layers."""

    def __init__(
        self, name: str, folder: Path, text: Path, context: int, work: Path, axes: tuple[str, ...] = AXES
    ) -> None:
        self.name, self.text, self.context, self.work, self.axes = name, text, context, work, axes
        self.parent = load_parent(folder)[0].to(torch.bfloat16)
        self.parent.config._name_or_path = str(folder)

    def race(self, ratio: int) -> dict[str, Any]:
        found = surgery.compose(
            self.parent, ratio=ratio, calibration=self.text, context=self.context, axes=self.axes, seed=SEED,
            kept=self.work / f"{self.name}.json",
        )  # fmt: skip
        data = found.to_dict()
        save_figure(composition_front(data), ROOT / f"benchmarks/results/planner-{self.name}.png")
        own, *others = data["race"]["runners"]
        best = min((other["kl"]["value"] for other in others), default=None)
        return {
            "kl": own["kl"]["value"],
            "best_single_kl": best,
            "over_best_single": None if best is None else own["kl"]["value"] / best,
            "predicted_kl": data["choice"]["predicted_kl"],
            "judged_kl": own["judged"],
            "verdict": data["verdict"],
            "left_out": data["left_out"],
            "race": data["race"],
            "recipe": data["recipe"],
            "front": data["front"],
            "single_fronts": data["single_fronts"],
        }

    def opened(self) -> tuple[Any, Any, Windows, Bench]:
        """The parent in float32, its anatomy, text to fit on, and the bench."""
        wide = copy.deepcopy(self.parent).float().eval()
        anatomy = surgery.examine(wide)
        windows = read_windows(wide.config, self.text, length=self.context, samples=192, every_window=True)
        fit, judged, _ = parts_of(windows, 16)
        return wide, anatomy, fit.take(max(4, 4096 // self.context)), Bench(wide, anatomy, judged)

    def exhaustive(self) -> dict[str, Any]:
        """Four layers, three settings each."""
        wide, anatomy, fit, bench = self.opened()
        settings = self.chosen(settings_for(anatomy, self.context))
        donors = Donors(wide, anatomy, fit, SEED)
        layers = sorted(bench.names)[:4]
        of_all = {s.label: donors.of(s) for s in settings[1:]}
        made = {label: {layer: found[layer] for layer in layers} for label, found in of_all.items()}
        costs = measure_costs(settings, measure_by(bench, lambda s, _: made[s.label]), layers, None, "exhaustive")
        found: dict[tuple[int, ...], tuple[int, float]] = {}
        for places in itertools.product(range(1, len(settings)), repeat=len(layers)):
            chosen = {layer: made[settings[p].label][layer] for layer, p in zip(layers, places, strict=True)}
            size = sum(settings[p].bytes_of[layer] for layer, p in zip(layers, places, strict=True))
            found[places] = size, bench.kl(chosen)
        sizes = sorted(size for size, _ in found.values())
        rows = []
        for part in (0.25, 0.5, 0.75):
            budget = sizes[int(part * (len(sizes) - 1))]
            choice = Chooser([_only(s, layers) for s in settings[1:]], costs, layers).best(budget)
            assert choice is not None
            labels = [s.label for s in settings]
            kl = found[tuple(labels.index(s.label) for s in choice.settings)][1]
            best = min(other for size, other in found.values() if size <= budget)
            rows.append({"budget": budget, "kl": kl, "best_kl": best, "over_best": kl / best})
        return {"compositions": len(found), "budgets": rows, "over_best": max(r["over_best"] for r in rows)}

    def prediction(self) -> dict[str, Any]:
        """Random compositions of all that is measured for a plan: by KL, or by errors and the KL of another setting."""
        wide, anatomy, fit, bench = self.opened()
        settings = settings_for(anatomy, self.context)
        donors = Donors(wide, anatomy, fit, SEED)
        known = to_measure(settings)
        made = {s.label: donors.of(s) for s in known}
        layers = sorted(bench.names)
        costs = measure_costs(settings, measure_by(bench, lambda s, _: made[s.label]), layers, None, "prediction")
        draw = random.Random(SEED)
        pairs = []
        for number in range(DRAWN):
            # Between hardly anything and everything is changed, so that costs differ by orders of magnitude.
            part = (number + 1) / DRAWN
            chosen = {layer: draw.choice(known) for layer in layers if draw.random() < part}
            if chosen:
                predicted = sum(costs.of(setting, layer) for layer, setting in chosen.items())
                pairs.append((predicted, bench.kl({layer: made[s.label][layer] for layer, s in chosen.items()})))
        return {"compositions": len(pairs), "rank_correlation": _spearman(pairs), "pairs": pairs}

    def chosen(self, settings: list[Setting]) -> list[Setting]:
        """The parent's form, and one setting of each of three axes."""
        found = [settings[0]]
        for start in EXHAUSTIVE:
            found.append(next(s for s in settings if len(s.steps) == 1 and s.label.startswith(start)))
        return found


def _only(setting: Setting, layers: list[int]) -> Setting:
    return Setting(steps=setting.steps, axes=setting.axes, bytes_of=tuple(setting.bytes_of[layer] for layer in layers))


def _spearman(pairs: list[tuple[float, float]]) -> float:
    ranks = torch.tensor(pairs, dtype=torch.float64).argsort(0).argsort(0).double()
    return float(torch.corrcoef(ranks.T)[0, 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=("small", "smollm2"), default=["small"])
    parser.add_argument("--smollm2", type=Path)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/planner"), help="where measured settings are kept")
    parser.add_argument("--context", type=int, help="tokens; default: 512 for small, 1024 for smollm2")
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES), help="that may change in the races")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(arguments.threads)
    rows = Rows(arguments)
    for name in arguments.models:
        folder, context = (SMALL, 512) if name == "small" else (arguments.smollm2, 1024)
        text = calibration_text(arguments.folder)
        axes = tuple(arguments.axes)
        subject = Subject(name, folder, text, arguments.context or context, arguments.folder, axes)
        beside = "" if axes == AXES else f", {' and '.join(axes)} alone"
        for ratio in RATIOS:
            rows.row(f"{name}, race 1/{ratio}{beside}", lambda s=subject, r=ratio: s.race(r))
        rows.row(f"{name}, exhaustive", subject.exhaustive)
        rows.row(f"{name}, prediction", subject.prediction)


if __name__ == "__main__":
    main()
