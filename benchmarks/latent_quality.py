"""Latent KV without training: loss of `mla` and `lowrank` on real checkpoints, published forms in the same run.

    python benchmarks/latent_quality.py                # all rows
    python benchmarks/latent_quality.py --only default # rows whose name contains the word
    python benchmarks/latent_quality.py --resume       # keep the rows that an interrupted run has written

The results are written after every row: an interrupted run keeps what it measured (`complete` is then false).

Text. `stories940K-tok105-hf`: stories 400 onward for evaluation, the first 200 for calibration, lower-cased. The
bundled model: 64 documents of the reference corpus that it was not trained on; 160 of those that it was for
calibration. First 256 tokens of each. Seven eighths of the calibration text to fit, the rest (at most 32 windows) to
choose and to accept on. Beside the loss stands the KL to the parent on the evaluation text: what a cut blurs may lower
the loss of a parent that is too sure of itself, but not the KL.

Contenders at the same numbers per token: `default` searches each layer's split of them and refits q and o; `closed
form` and the published forms take one split for all layers and fit nothing. The attentions run as the float64-checked
forward of `surgery.attention.latent`, over whole sequences. No language-model loss is used. `fits` of each row
says what was fitted around the latent: `prefix` moments and refits on the converted prefix, `queries` rows of W_q
to the parent's scores, `output` W_o to the parent's output; `searched` what was chosen by how far hidden states after
the layer are from the parent's on calibration text that nothing was fitted on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import lzma
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from common import ROOT, environment, reference, write
from rich.console import Console
from rich.table import Table

import surgery
from surgery.anatomy import examine
from surgery.bundled import SMALL
from surgery.calibration.text import Windows, load_tokenizer, load_windows
from surgery.calibration.working_copy import WorkingCopy
from surgery.measure.scoring import score_windows
from surgery.planning.latent_size import rope_splits
from surgery.rewriters import rewriter_for
from surgery.rewriters.latent.fit import (
    Candidate,
    FitOptions,
    fit_layer,
    freq_candidates,
    lowrank_candidates,
    mla_candidates,
    visit_moments,
)
from surgery.rewriters.latent.moments import LatentMoments
from surgery.rewriters.lowrank import SHARES
from surgery.runtime.layout import Latent

SEED = 0
PLAIN = FitOptions(queries=False, output=False)
STORIES, BUNDLED = "stories940K-tok105-hf", "surgery.bundled.SMALL"
KEPT = {0.5: 1 / 4, 0.375: 1 / 3, 0.25: 1 / 2, 0.125: 1 / 2}
"""Part of the parent's bytes, and the part of it that the published forms rotate."""


@dataclass(frozen=True)
class Row:
    """One conversion of all layers; with several candidates each layer takes its own best."""

    name: str
    keep: float
    candidates: Sequence[Candidate]
    fit: FitOptions = PLAIN
    searched: str = "none"
    step: dict[str, Any] | None = None
    """Instead of candidates: a step of a recipe, as users run it."""

    @property
    def is_closed(self) -> bool:
        """Whether nothing is fitted or chosen, and moments come from the parent alone."""
        return self.fit == PLAIN and len(self.candidates) == 1


def rows_of(site: Any) -> list[Row]:
    """The whole table, the rows that take a second first."""
    found = []
    for keep, turning in KEPT.items():
        numbers = int(keep * site.kv_dims)
        rope = round(numbers * turning / 2) * 2
        every = mla_candidates(rope_splits(numbers, site))
        found.append(Row("mla default", keep, every, FitOptions(), "rank:rope_dims"))
        for init in ("transmla", "svd", "whitened", "default"):
            name = "mla closed form" if init == "default" else f"mla {init}"
            found.append(
                Row(f"{name} {numbers - rope}+{rope}", keep, mla_candidates([(numbers - rope, rope)], (1.0,), init))
            )
    for keep in (0.5, 0.3):
        numbers = int(keep * site.kv_dims)
        found.append(Row("lowrank default", keep, lowrank_candidates(numbers, SHARES), FitOptions(), "k_rank:v_rank"))
        for init in ("plain", "whitened", "qw"):
            name = "lowrank closed form" if init == "qw" else f"lowrank {init}"
            found.append(Row(f"{name} 42:58", keep, lowrank_candidates(numbers, (0.42,), init)))
    found.append(Row("lowrank freq", 0.5, freq_candidates(int(0.5 * site.kv_dims), SHARES, site), FitOptions(), "k:v"))
    for rewriter, keep in (("mla", 0.125), ("mla", 0.25), ("lowrank", 0.3)):
        step = {"rewriter": rewriter, "keep": keep, "ranks": "sensitivity", "mean_split": True}
        found.append(Row(f"{rewriter} ranked", keep, (), FitOptions(), "numbers of each layer, their split", step))
    return sorted(found, key=lambda row: (row.step is not None, row.fit != PLAIN))


class Bench:
    """The parent, its text, and what is the same for all rows."""

    def __init__(self, name: str) -> None:
        self.name = name
        if name == STORIES:
            folder = reference("checkpoints", name)
            self.parent = surgery.load(folder).float()
            lines = reference("text", "tinystories-917.jsonl").read_text().splitlines()
            texts = [json.loads(line)["text"].lower() for line in lines]
            parts = texts[:200], texts[400:]
        else:
            folder = SMALL
            self.parent = surgery.load(SMALL).float()
            parts = _corpus("train", 160), _corpus("valid", 64)
        vocab_size = self.parent.config.vocab_size
        tokenizer = load_tokenizer(folder)
        self.calibration, self.held_out = (
            load_windows(part, tokenizer, vocab_size=vocab_size, length=256) for part in parts
        )
        self.anatomy = examine(self.parent)
        self.loss = self.nats(self.parent)
        self.moments: dict[int, LatentMoments] = {}

    def facts(self) -> dict[str, Any]:
        """What is the same for all rows."""
        return {
            "model": self.name, "parent": self.loss, "text": self.held_out.digest,
            "calibration": self.calibration.digest, "tokens": self.held_out.tokens,
            "calibration_tokens": self.calibration.tokens,
        }  # fmt: skip

    def nats(self, model: Any) -> float:
        """Nats per token of the evaluation text."""
        nll = tokens = 0.0
        for ids, mask in self.held_out.batches(32):
            sums = score_windows(model, None, Windows(ids, mask, ""), "prefill")
            nll, tokens = nll + float(sums.nll.sum()), tokens + float(sums.tokens.sum())
        return nll / tokens

    def measure(self, row: Row) -> dict[str, Any]:
        """One row of the table."""
        begun = time.process_time()
        copy = WorkingCopy(self.parent, self.anatomy)
        layers = []
        if row.step is not None:
            recipe = surgery.Recipe.load({"steps": [row.step]})
            plan = surgery.plan(self.anatomy, recipe)
            rewriter_for(recipe.steps[0]).convert(copy, [layer for _, layer in plan.changed()], self.calibration)
        elif row.is_closed:
            for layer in copy.sites:
                copy.write_latent(layer, row.candidates[0](copy.parent(layer), self.of_parent(layer)))
        else:
            for visit in copy.visits(self.calibration, copy.sites):
                found = {
                    "layer": visit.layer,
                    "choice": fit_layer(visit, row.candidates, row.fit),
                    "error": visit.error(),
                }
                layers.append(found)
                print(f"  {found}", flush=True)  # noqa: T201
        kl, seconds = copy.divergence(self.calibration.split()[1]), time.process_time() - begun
        latents = [latent for layer in copy.sites if isinstance(latent := copy.project(layer), Latent)]
        numbers = sum(latent.dims for latent in latents)
        if numbers > row.keep * sum(site.kv_dims for site in self.anatomy.sites):
            raise AssertionError(f"{row.name}: {numbers} numbers per token are more than keep {row.keep} allows")
        loss, held_out_kl = self.nats(copy.model), copy.divergence(self.held_out)
        return {
            "name": row.name, "keep": row.keep, "nats_per_token": loss, "gap": loss - self.loss,
            "held_out_kl": held_out_kl, "calibration_kl": kl, "numbers_per_token": numbers,
            "rank_and_rope_dims": [
                (latent.k_rank or latent.rank, latent.rank - latent.k_rank if latent.k_rank else latent.rope_dims)
                for latent in latents
            ],
            "fits": [
                name for name, on in (
                    ("prefix", not row.is_closed), ("queries", row.fit.queries), ("output", row.fit.output),
                ) if on
            ],
            "searched": row.searched, "layers": layers, "processor_seconds": seconds,
        }  # fmt: skip

    def of_parent(self, layer: int) -> LatentMoments:
        """Moments from the parent's own stream, for the rows that fit nothing."""
        if not self.moments:
            copy = WorkingCopy(self.parent, self.anatomy)
            for visit in copy.visits(self.calibration, copy.sites):
                self.moments[visit.layer] = visit_moments(visit, copy.parent(visit.layer))
        return self.moments[layer]


def _corpus(part: str, documents: int) -> list[str]:
    with lzma.open(reference("corpus", f"{part}.jsonl.xz"), "rt", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in itertools.islice(lines, documents)]


def save(data: dict[str, Any]) -> None:
    """Replace the results as a whole: a run that dies while it writes leaves those of the row before."""
    write("latent_quality.part", data)
    results = ROOT / "benchmarks" / "results"
    (results / "latent_quality.part.json").replace(results / "latent_quality.json")


def show(facts: dict[str, Any]) -> None:
    """One model's table."""
    table = Table(title=f"{facts['model']}, parent {facts['parent']:.4f} nats/token, no training")
    for column in ("keep", "form", "gap", "calibration KL", "seconds", "fits"):
        table.add_column(column, justify="left" if column in ("form", "fits") else "right")
    for row in sorted(facts["rows"], key=lambda r: (-r["keep"], r["gap"])):
        cells = [f"{row['keep']:.3g}", row["name"], f"{row['gap']:+.4f}", f"{row['calibration_kl']:.4f}"]
        table.add_row(*cells, f"{row['processor_seconds']:.0f}", ", ".join(row["fits"]))
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--resume", action="store_true", help="keep the rows that are there, measure the others")
    args = parser.parse_args()
    torch.manual_seed(SEED)
    results = ROOT / "benchmarks" / "results" / "latent_quality.json"
    old = json.loads(results.read_text())["models"] if args.resume and results.exists() else []
    before = {facts["model"]: facts["rows"] for facts in old}
    benches = [Bench(STORIES), Bench(BUNDLED)]
    models = [{**bench.facts(), "rows": before.get(bench.name, [])} for bench in benches]
    data = {**environment(SEED), "only": args.only, "complete": False, "models": models}
    for bench, facts in zip(benches, models, strict=True):
        known = {(row["name"], row["keep"]) for row in facts["rows"]}
        for row in rows_of(bench.anatomy.sites[0]):
            if args.only not in row.name or (row.name, row.keep) in known:
                continue
            facts["rows"].append({"commit": data["commit"], **bench.measure(row)})
            last = facts["rows"][-1]
            shown = f"{last['keep']:5} {last['name']:40} {last['gap']:+.4f} {last['processor_seconds']:.0f} s"
            print(shown, flush=True)  # noqa: T201
            save(data)
    save({**data, "complete": not args.only})
    for facts in models:
        show(facts)


if __name__ == "__main__":
    main()
