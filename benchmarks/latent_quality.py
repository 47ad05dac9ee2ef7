"""Latent KV without training: loss of `mla` and `lowrank` on a real checkpoint, published forms in the same run.

    python benchmarks/latent_quality.py                # all rows, about 40 minutes on one core
    python benchmarks/latent_quality.py --only default # rows whose name contains the word
    python benchmarks/latent_quality.py --resume       # keep the rows that an interrupted run has written

The results are written after every row: an interrupted run keeps what it measured (`complete` is then false).

Text: stories 400 onward for evaluation, the first 200 for calibration (175 to fit, 25 to choose and to accept on),
lower-cased for the character model, first 256 tokens each. The attentions run as the float64-checked reference forward
of `surgery.rewriters.latent`, over whole sequences.

No language-model loss is used but for the gains, two numbers per query head. `fits` of each row says what was fitted
around the latent: `prefix` moments and refits on the converted prefix, `queries` rows of W_q to the parent's scores,
`output` W_o to the parent's output, `gains` by KL; `searched` what was chosen by KL on the held-out calibration part.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from common import ROOT, environment, reference, write
from rich.console import Console
from rich.table import Table

import surgery
from surgery.anatomy import examine
from surgery.calibrate import layer_activations
from surgery.measure.scoring import score_windows
from surgery.rewriters.latent import rope_splits
from surgery.rewriters.latent_copy import LatentCopy
from surgery.rewriters.latent_fit import (
    Candidate,
    FitOptions,
    finish,
    fit_layer,
    lowrank_candidates,
    mla_candidates,
)
from surgery.rewriters.latent_mla import MLA_INITS, mla_freq
from surgery.rewriters.latent_moments import LatentMoments, MomentSums
from surgery.text import Windows, load_tokenizer, load_windows

SEED = 0
GAIN_STEPS = 30
NAME = "stories940K-tok105-hf"
PLAIN = FitOptions(compensate=False, queries=False, output=False, gains=False)
UNIFORM = replace(MLA_INITS["default"], cov="uniform", steps=0)
SHARES = (0.34, 0.38, 0.42, 0.46)


@dataclass(frozen=True)
class Row:
    """One conversion of all layers alike; with several candidates each layer takes its own best."""

    name: str
    keep: float
    candidates: Sequence[Candidate]
    fit: FitOptions = PLAIN
    searched: str = "none"


def rows_of(site: Any) -> list[Row]:
    """The whole table, the rows that matter most first."""
    found = []
    for keep in (0.5, 0.375, 0.25):
        splits = rope_splits(keep, site)
        every = mla_candidates(splits)
        found.append(Row("mla default", keep, every, FitOptions(), "rank:rope_dims"))
    for keep in (0.5, 0.3):
        low = lowrank_candidates(int(keep * site.kv_dims), SHARES)
        found.append(Row("lowrank default", keep, low, FitOptions(), "k_rank:v_rank"))
    for keep, (rank, rope) in ((0.5, (48, 16)), (0.375, (32, 16)), (0.25, (16, 16))):
        split = [(rank, rope)]
        every = mla_candidates(rope_splits(keep, site))
        for init in ("transmla", "svd", "whitened"):
            found.append(Row(f"mla {init} {rank}+{rope}", keep, mla_candidates(split, (1.0,), init)))
        no_phase = replace(UNIFORM, phase="one")
        found += [
            Row(f"mla uniform moments, no mean phase {rank}+{rope}", keep, mla_candidates(split, (1.0,), no_phase)),
            Row(f"mla uniform moments {rank}+{rope}", keep, mla_candidates(split, (1.0,), UNIFORM)),
            Row(f"mla closed form {rank}+{rope}", keep, mla_candidates(split, (1.0,))),
            Row("mla closed form, searched", keep, every, PLAIN, "rank:rope_dims"),
            Row(
                "mla + output refit", keep, every,
                FitOptions(queries=False, gains=False), "rank:rope_dims",
            ),
        ]  # fmt: skip
        freq: Candidate = lambda w, m, rank=rank, rope=rope: mla_freq(w, m, (rank + rope) // 2, (rank + rope) // 2)  # noqa: E731
        found.append(Row("freq (all of K rotated, half of the numbers)", keep, [freq]))
    for keep in (0.5, 0.3):
        numbers = int(keep * site.kv_dims)
        for init in ("plain", "whitened", "qw"):
            found.append(Row(f"lowrank {init} 42:58", keep, lowrank_candidates(numbers, (0.42,), init)))
        grouped = lowrank_candidates(numbers, (0.42,), "qw", "grouped", 2)
        found.append(Row("lowrank qw 42:58, groups of 2", keep, grouped))
        found.append(Row("lowrank qw 42:58, per head", keep, lowrank_candidates(numbers, (0.42,), "qw", "head")))
    heavy = [row for row in found if len(row.candidates) > 1 and row.fit != FitOptions()]
    return [*(row for row in found if row not in heavy), *heavy]


class Bench:
    """The parent, its text, and what is the same for all rows."""

    def __init__(self) -> None:
        self.parent = surgery.load(reference("checkpoints", NAME)).float()
        lines = reference("text", "tinystories-917.jsonl").read_text().splitlines()
        texts = [json.loads(line)["text"].lower() for line in lines]
        tokenizer = load_tokenizer(reference("checkpoints", NAME), self.parent.config.vocab_size)
        self.calibration, self.held_out = (
            load_windows(part, tokenizer, vocab_size=self.parent.config.vocab_size, length=256)
            for part in (texts[:200], texts[400:])
        )
        self.anatomy = examine(self.parent)
        self.loss = self.nats(self.parent)
        self.moments: dict[int, LatentMoments] = {}

    def nats(self, model: Any) -> float:
        """Nats per token of the evaluation text."""
        nll = tokens = 0.0
        for ids, mask in self.held_out.batches(32):
            sums = score_windows(model, None, Windows(ids, mask, ""), "prefill")
            nll, tokens = nll + float(sums.nll.sum()), tokens + float(sums.tokens.sum())
        return nll / tokens

    def measure(self, row: Row) -> dict[str, Any]:
        """One row of the table."""
        begun = time.monotonic()
        copy = LatentCopy(self.parent, self.anatomy)
        layers = []
        for layer in copy.sites:
            if row.fit == PLAIN and len(row.candidates) == 1:
                copy.write_latent(layer, row.candidates[0](copy.parent(layer), self.of_parent(copy, layer)))
            else:
                found = fit_layer(copy, layer, row.candidates, self.calibration, row.fit)
                layers.append({"layer": layer, **asdict(found)})
                print(f"  layer {layer}: {found}", flush=True)  # noqa: T201
        kl = (
            finish(copy, self.calibration, GAIN_STEPS)
            if row.fit.gains
            else copy.divergence(self.calibration.split()[1])
        )
        latents = [copy.latents[layer] for layer in copy.sites]
        numbers = sum(latent.numbers for latent in latents)
        if numbers > row.keep * sum(site.kv_dims for site in self.anatomy.sites):
            raise AssertionError(f"{row.name}: {numbers} numbers per token are more than keep {row.keep} allows")
        loss = self.nats(copy.model)
        return {
            "name": row.name, "keep": row.keep, "nats_per_token": loss, "gap": loss - self.loss,
            "calibration_kl": kl, "numbers_per_token": numbers,
            "rank_and_rope_dims": [
                (latent.k_rank or latent.rank, latent.rank - latent.k_rank if latent.k_rank else latent.rope_dims)
                for latent in latents
            ],
            "fits": [
                name for name, on in (
                    ("prefix", row.fit.compensate), ("queries", row.fit.queries), ("output", row.fit.output),
                    ("gains", row.fit.gains),
                ) if on
            ],
            "searched": row.searched, "layers": layers, "seconds": time.monotonic() - begun,
        }  # fmt: skip

    def of_parent(self, copy: LatentCopy, layer: int) -> LatentMoments:
        """Moments from the parent's own stream, for the rows that fit nothing."""
        if layer not in self.moments:
            sums = MomentSums(copy.parent(layer))
            fit: Windows = self.calibration.split()[0]
            for a in layer_activations(copy, copy.sites[layer], fit):
                sums.add(a.x_parent_BTD, a.x_parent_BTD, a.mask_BT)
            self.moments[layer] = sums.finish()
        return self.moments[layer]


def save(data: dict[str, Any]) -> None:
    """Replace the results as a whole: a run that dies while it writes leaves those of the row before."""
    write("latent_quality.part", data)
    results = ROOT / "benchmarks" / "results"
    (results / "latent_quality.part.json").replace(results / "latent_quality.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--resume", action="store_true", help="keep the rows that are there, measure the others")
    args = parser.parse_args()
    only = args.only
    torch.manual_seed(SEED)
    bench = Bench()
    results = ROOT / "benchmarks" / "results" / "latent_quality.json"
    rows: list[dict[str, Any]] = []
    if args.resume and results.exists():
        old = json.loads(results.read_text())
        rows = [{"commit": old["commit"], **row} for row in old["rows"]]
    known = {(row["name"], row["keep"]) for row in rows}
    data = {
        **environment(SEED), "model": NAME, "parent": bench.loss, "text": bench.held_out.digest,
        "calibration": bench.calibration.digest, "tokens": bench.held_out.tokens, "only": only, "complete": False,
        "rows": rows,
    }  # fmt: skip
    for row in rows_of(bench.anatomy.sites[0]):
        if only not in row.name or (row.name, row.keep) in known:
            continue
        rows.append({"commit": data["commit"], **bench.measure(row)})
        last = rows[-1]
        print(f"{last['keep']:5} {last['name']:50} {last['gap']:+.4f} {last['seconds']:.0f} s", flush=True)  # noqa: T201
        save(data)
    save({**data, "complete": not only})
    console = Console(width=120)
    table = Table(title=f"{NAME}, parent {bench.loss:.4f} nats/token, no training")
    for column in ("keep", "form", "gap", "calibration KL", "fits"):
        table.add_column(column, justify="left" if column in ("form", "fits") else "right")
    for row in sorted(rows, key=lambda r: (-r["keep"], r["gap"])):
        cells = [f"{row['keep']:.3g}", row["name"], f"{row['gap']:+.4f}", f"{row['calibration_kl']:.4f}"]
        table.add_row(*cells, ", ".join(row["fits"]))
    console.print(table)


if __name__ == "__main__":
    main()
