"""Learned eviction and merging: loss at equal bytes beside eviction that nothing was trained for, and fewer heads.

    python benchmarks/retain_quality.py                    # all models and rows
    python benchmarks/retain_quality.py stories            # one model
    python benchmarks/retain_quality.py --resume           # keep the rows that an interrupted run has written

The results are written after every row: an interrupted run keeps what it measured (`complete` is then false).
Trainings go on where they were stopped.

stories: stories940K (characters, context 256), gates trained on the first 380 stories, lower-cased; evaluated on the
first 256 tokens of stories 400 onward, with hard decisions. small: the bundled model at its full context of 512;
documents of its corpus that it was trained on for training, of the validation split for evaluation.

`nats_per_token` is of one forward pass under hard decisions; `cache_gap` says how far decoding token by token through
the cache is from that, on 64 (small: 16) windows. Bytes are those of a float32 cache of one window, pages and tables
included. Window, sinks and newest tokens count as kept.

The baselines have the slots that the trained model takes at the end of a window: `window and sinks` keeps the first and
the newest tokens (StreamingLLM), `windows by layer` as many in all, more of them in layers that miss them most on
training text (ours, no training), `key_norm` drops long keys behind the window, `h2o` keeps per KV head the tokens with
most attention so far, half of them the newest (arXiv:2306.14048): computed query by query here, as decoding would, and
not through a cache. Early in a window they hold every token yet, where a gate has dropped most: see `gap_by_third`.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import ROOT, environment, reference, write
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from uptrain import text_of

import surgery
from surgery.bundled import SMALL
from surgery.calibration.text import Windows, load_windows, tokenizer_of
from surgery.measure.gates import read_gates
from surgery.measure.memory import cache_size
from surgery.measure.scoring import score_windows
from surgery.train.run import Run
from surgery.train.uptrain import uptrain

SEED = 0
WORK = Path(tempfile.gettempdir()) / "surgery-merge-benchmark"
"""Converted models and training runs; kept."""
GATES = {"train": "gates", "learning_rate": 2e-3}
BY_LAYER = {"windows": "sensitivity"}
MODELS: dict[str, dict[str, Any]] = {
    "stories": {
        "length": 256,
        "trained": {
            "dms-4x": (
                [{"rewriter": "dms", "ratio": 4, "window": 16}],
                {**GATES, "tokens": 1024000, "learning_rate": 1e-3},
            ),
            "dms-4x, window 40": (
                [{"rewriter": "dms", "ratio": 4, "window": 40}],
                {**GATES, "tokens": 204800, "learning_rate": 1e-3},
            ),
            "dms-4x, windows by layer": (
                [{"rewriter": "dms", "ratio": 4, "window": 42, **BY_LAYER}],
                {**GATES, "tokens": 204800, "learning_rate": 1e-3},
            ),
        },
        "other": "war-and-peace.txt",
    },
    "small": {
        "length": 512,
        "trained": {
            "dms-4x": ([{"rewriter": "dms", "ratio": 4, "window": 64}], {**GATES, "tokens": 98304}),
            "dms-16x": ([{"rewriter": "dms", "ratio": 16, "window": 12}], {**GATES, "tokens": 98304}),
            "gqa-4x": ([{"rewriter": "gqa", "kv_heads": "1/4"}], {"tokens": 98304}),
            "dms-4x, windows by layer": (
                [{"rewriter": "dms", "ratio": 4, "window": 85, **BY_LAYER}],
                {**GATES, "tokens": 98304},
            ),
            "dms-8x": ([{"rewriter": "dms", "ratio": 8, "window": 42, **BY_LAYER}], {**GATES, "tokens": 98304}),
            "gqa-2x-dms-4x": (
                [{"rewriter": "gqa", "kv_heads": "1/2"}, {"rewriter": "dms", "ratio": 4, "window": 85, **BY_LAYER}],
                {"tokens": 98304},
            ),
            "gqa-2x-dms-4x, gates alone": (
                [{"rewriter": "gqa", "kv_heads": "1/2"}, {"rewriter": "dms", "ratio": 4, "window": 85, **BY_LAYER}],
                {**GATES, "tokens": 98304},
            ),
            "dms-4x, long windows by layer": (
                [{"rewriter": "dms", "ratio": 4, "window": 104, **BY_LAYER}],
                {**GATES, "tokens": 98304},
            ),
            "dmc-4x": ([{"rewriter": "dmc", "ratio": 4, "window": 12}], {"tokens": 98304}),
            "dmc-4x, gates alone": ([{"rewriter": "dmc", "ratio": 4, "window": 12}], {**GATES, "tokens": 98304}),
        },
        "other": "tinyshakespeare.txt",
    },
}
"""Windows by layer are two thirds of the slots on average, long ones nine tenths; which layers get more is decided on
training text."""
TRAINING = {"batch": 8, "layer_local": 0.0}


def parent_of(model: str) -> str:
    return str(SMALL if model == "small" else reference("checkpoints", "stories940K-tok105-hf"))


def folder_of(model: str, name: str) -> Path:
    return WORK / f"{model}-{name}".replace(", window ", "-w").replace(" ", "-").replace(",", "")


def converted(model: str, name: str) -> Path:
    """The conversion before training, made once."""
    steps, training = MODELS[model]["trained"][name]
    folder, length = folder_of(model, name) / "start", MODELS[model]["length"]
    if not folder.exists():
        train, _ = text_of(model)
        recipe = {"name": name, "steps": steps, "uptrain": {**TRAINING, "length": length, **training}}
        surgery.convert_checkpoint(
            parent_of(model), recipe, folder, samples=64, length=length, seed=SEED, calibration=train
        )
    return folder


def trained(model: str, name: str) -> Path:
    """The trained conversion; a run that was stopped goes on."""
    out = folder_of(model, name) / "run"
    if not (out / "model").exists():
        train, held = text_of(model)
        uptrain(
            Run(
                model=str(converted(model, name)),
                data=train,
                out=out,
                held_out=held,
                held_out_windows=128 if model == "stories" else 24,
                eval_steps=100 if model == "stories" else None,
                log_steps=20 if model == "stories" else 4,
                save_steps=50 if model == "stories" else 8,
                seed=SEED,
            )
        )
    return out


class Attended:
    """H2O as an attention function: each query sees the tokens that earlier ones have left."""

    def __init__(self, budget: int) -> None:
        self.budget, self.recent = budget, budget // 2

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        B, N, T, _H = query.shape
        K = key.shape[1]
        q = query.reshape(B, K, N // K, T, -1)
        kept = torch.zeros(B, K, T, dtype=torch.bool)
        mass = torch.zeros(B, K, T)
        out = torch.empty(B, K, N // K, T, value.shape[-1])
        for t in range(T):
            kept[..., t] = True
            score = torch.einsum("bkgh,bksh->bkgs", q[:, :, :, t], key[:, :, : t + 1]) * scaling
            weight = score.masked_fill(~kept[:, :, None, : t + 1], -math.inf).softmax(-1)
            out[:, :, :, t] = weight @ value[:, :, : t + 1]
            mass[..., : t + 1] += weight.sum(2)
            if t >= self.budget:
                old = torch.where(kept, mass, math.inf)
                old[..., max(0, t + 1 - self.recent) :] = math.inf
                kept.scatter_(-1, old.argmin(-1, keepdim=True), False)
        return out.reshape(B, N, T, -1).transpose(1, 2), None


def windows_of(model: str, source: Any, samples: int | None = None) -> Windows:
    config = surgery.load(parent_of(model)).config
    config.name_or_path = parent_of(model)
    return load_windows(
        source, tokenizer_of(config), vocab_size=config.vocab_size, length=MODELS[model]["length"], samples=samples
    )


def other_text(model: str) -> Windows:
    text = reference("text", MODELS[model]["other"]).read_text()[20_000:220_000]
    return windows_of(model, [text.lower() if model == "stories" else text], 64)


def measured(model: str, child: PreTrainedModel, parent: PreTrainedModel, held: Windows) -> dict[str, Any]:
    """One row: loss, bytes, what the gates did."""
    report = surgery.evaluate(child, baseline=parent, text=held, path="prefill", tokenizer=None)
    some = surgery.evaluate(child, text=held.take(64 if model == "stories" else 16), path="both")
    cache = some.model.cache
    row: dict[str, Any] = {
        "nats_per_token": report.model.nats_per_token,
        "gap_by_third": report.difference.gap_by_position if report.difference else None,
        "parent": report.baseline.nats_per_token if report.baseline else None,
        "gap": report.gap,
        "kl": report.kl,
        "cache_gap": some.model.cache_gap,
        "cache_bytes": cache.bytes,
        "cache_tokens": cache.tokens,
        "tokens": report.tokens,
        "text": report.text_digest,
    }
    if any(layer["plan"].get("retain") for layer in child.config.surgery.get("layers", ())):
        whole = Windows(held.ids_BT[held.mask_BT.all(-1)], held.mask_BT[held.mask_BT.all(-1)], held.digest)
        gates, other = read_gates(child, whole), read_gates(child, other_text(model))
        row |= {"tokens_per_slot": gates.total, "by_head": gates.to_dict()["tokens_per_slot_by_head"],
                "other_domain": {"text": MODELS[model]["other"], "tokens_per_slot": other.total},
                "warnings": list(gates.warnings)}  # fmt: skip
    if model == "small":
        cells = surgery.evaluate(
            child, text=held.take(1), path="prefill", recall_tasks=("all",), questions=2,
            tokenizer=tokenizer_of(parent.config),
        ).model.recall  # fmt: skip
        row["recall_exact"] = sum(c.exact for c in cells) / len(cells)
        row["recall_nats"] = sum(c.nats for c in cells) / len(cells)
    return row


def rows(model: str, known: list[dict[str, Any]], save: Any) -> None:
    parent = surgery.load(parent_of(model), dtype=torch.float32)
    parent.config.name_or_path = parent_of(model)
    _, file = text_of(model)
    held = windows_of(model, file, None if model == "stories" else 48)
    found: list[dict[str, Any]] = []

    def add(name: str, make: Any, **more: Any) -> dict[str, Any]:
        row = next((r for r in known if r["name"] == name), None)
        if row is None:
            begun = time.monotonic()
            row = {"name": name, **more, **make()}
            if "cache_bytes" in row:
                row["parent_cache_bytes"] = cache_size(parent, held.ids_BT[:1, : row["cache_tokens"]]).bytes
            row["seconds"] = round(time.monotonic() - begun, 1)
            print(f"{model}, {name}: {row['nats_per_token']:.4f} ({row['gap']:+.4f})", flush=True)  # noqa: T201
        found.append(row)
        names = {r["name"] for r in found}
        save(found + [r for r in known if r["name"] not in names])
        return row

    def of_training(name: str) -> dict[str, Any]:
        out = trained(model, name)
        summary = json.loads((out / "uptraining.json").read_text())
        child = surgery.load(out / "model", dtype=torch.float32)
        row = measured(model, child, parent, held)
        curve = [
            {key: entry[key] for key in ("step", "held_out_ratio", "held_out_nats_per_token") if key in entry}
            for entry in summary["log"]
            if "held_out_nats_per_token" in entry
        ]
        return row | {"trained_tokens": summary["tokens"], "training_seconds": summary["seconds"], "curve": curve}

    def of_score(step: dict[str, Any]) -> dict[str, Any]:
        train, _ = text_of(model)
        calibration = windows_of(model, train, 64)
        child = surgery.convert(parent, {"steps": [{"rewriter": "dms", **step}]}, calibration=calibration, seed=SEED)
        return measured(model, child, parent, held)

    def of_h2o(budget: int) -> dict[str, Any]:
        name = f"h2o-{budget}"
        AttentionInterface.register(name, Attended(budget))
        AttentionMaskInterface.register(name, sdpa_mask)
        child = surgery.load(parent_of(model), dtype=torch.float32, attn_implementation=name)
        own, base = (score_windows(m.eval(), None, held, "prefill") for m in (child, parent))
        nll, base_nll = (float(x.nll.sum() / x.tokens.sum()) for x in (own, base))
        thirds = ((own.nll.sum(0) - base.nll.sum(0)) / own.tokens.sum(0)).tolist()
        return {"nats_per_token": nll, "parent": base_nll, "gap": nll - base_nll, "gap_by_third": thirds,
                "tokens_per_slot": MODELS[model]["length"] / budget}  # fmt: skip

    trained_rows = {
        name: add(name, lambda name=name: of_training(name), window=steps[-1].get("window"))
        for name, (steps, _) in MODELS[model]["trained"].items()
    }
    for name, row in trained_rows.items():
        if "tokens_per_slot" not in row or any(word in name for word in ("gqa", "long", "alone")):  # as those without
            continue
        slots, at = round(MODELS[model]["length"] / row["tokens_per_slot"]), "" if name == "dms-4x" else f", as {name}"
        window = {"gate": "score:window", "window": slots - 4, "ratio": 1}
        add(f"window and sinks{at}", lambda step=window: of_score(step), window=slots - 4)
        if "by layer" in name or name == "dms-8x":
            add(f"windows by layer{at}", lambda step=window: of_score({**step, **BY_LAYER}), window=slots - 4)
        add(f"h2o{at}", lambda slots=slots: of_h2o(slots))
        if name == "dms-4x":
            key_norm = {"gate": "score:key_norm", "window": row["window"], "ratio": row["tokens_per_slot"]}
            add(f"key_norm{at}", lambda step=key_norm: of_score(step), window=row["window"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(MODELS), help=f"of {', '.join(MODELS)}")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--train-only", action="store_true", help="stop before anything is measured")
    arguments = parser.parse_args()
    torch.manual_seed(SEED)
    if arguments.train_only:
        for model in arguments.models:
            for name in MODELS[model]["trained"]:
                trained(model, name)
        return
    path = ROOT / "benchmarks" / "results" / "retain_quality.json"
    old = json.loads(path.read_text())["results"] if path.is_file() else {}
    results: dict[str, Any] = dict(old)
    data = {**environment(SEED), "complete": False, "results": results}
    for model in arguments.models:

        def save(found: list[dict[str, Any]], model: str = model) -> None:
            results[model] = found
            write("retain_quality", data)

        rows(model, old.get(model, []) if arguments.resume else [], save)
    write("retain_quality", {**data, "complete": set(results) == set(MODELS)})
    console = Console(width=100)
    for model, found in results.items():
        table = Table(title=f"{model}: parent {found[0]['parent']:.4f} nats/token")
        for column in ("cache", "tokens per slot", "cache bytes", "nats/token", "change", "recall nats"):
            table.add_column(column, justify="left" if column == "cache" else "right")
        for row in found:
            table.add_row(
                row["name"],
                f"{row['tokens_per_slot']:.2f}" if "tokens_per_slot" in row else "",
                f"{row['cache_bytes']:,}" if "cache_bytes" in row else "",
                f"{row['nats_per_token']:.4f}",
                f"{row['gap'] / row['parent']:+.2%}",
                f"{row['recall_nats']:.3f}" if "recall_nats" in row else "",
            )
        console.print(table)


if __name__ == "__main__":
    main()
