"""Eviction by rank on SmolLM2: KL on decoded positions and recall, for each score and budget at several ratios.

    python benchmarks/evict_quality.py /path/to/checkpoint                    # see smollm2.py
    python benchmarks/evict_quality.py CHECKPOINT --only "snapkv 4x" h2o     # rows whose names contain one of these
    python benchmarks/evict_quality.py CHECKPOINT --lengths 512               # recall at these lengths alone
    python benchmarks/evict_quality.py CHECKPOINT --quick                     # less text, to evict_quality_quick.json

Rows that are there are kept: an interrupted run goes on. Nothing is trained; `duo` and `headkv` find their heads on
windows of other text (`calibration_text`). Each window of text is a
prompt of 448 tokens, of which slots leave once it has been read, and 64 tokens that are decoded through what is left;
only those count. Questions are asked at the end of their context, so that scores of a prompt observe them. 4 first and
32 newest tokens always stay. `part_of_parent` is the cache after such a prompt, `part_at_end` after 64 tokens more:
scores that look at prompts alone keep all of those. `--quick` reads one window of each text in the place of two,
decodes 32 tokens, and asks half of the questions: rows of one file are compared with each other alone.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import ROOT, calibration_text, environment, write
from real_measure import Answers, Recall, Sizes, decoded, read_texts
from transformers import DynamicCache, PreTrainedModel

import surgery
from surgery.calibration.text import load_tokenizer
from surgery.measure.memory import tensor_bytes
from surgery.recipe import Recipe
from surgery.runtime.calling import cache_argument
from surgery.runtime.reading import READERS

SEED = 0
SIZES = Sizes(calibration=(0, 0), windows=2, prompt=448, decoded=64, questions=2)
QUICK = Sizes(calibration=(0, 0), windows=1, prompt=448, decoded=32, questions=1)
LENGTHS = (512, 1024)
RATIOS = (4, 2, 8)
KINDS: dict[str, dict[str, Any]] = {
    "snapkv": {"scorer": "snapkv"},
    "ada snapkv": {"scorer": "snapkv", "budget": "ada"},
    "pyramid snapkv": {"scorer": "snapkv", "budget": "pyramid"},
    "h2o": {"scorer": "h2o"},
    "ada h2o": {"scorer": "h2o", "budget": "ada"},
    "tova": {"scorer": "tova"},
    "expected": {"scorer": "expected"},
    "ada expected": {"scorer": "expected", "budget": "ada"},
    "vatp": {"scorer": "vatp"},
    "knorm": {"scorer": "knorm"},
    "streaming": {"scorer": "streaming"},
    "scissorhands": {"scorer": "scissorhands"},
    "keyformer": {"scorer": "keyformer"},
    "buzz": {"scorer": "buzz"},
    "nacl": {"scorer": "nacl"},
    "triattention": {"scorer": "triattention"},
    "kvzip": {"scorer": "kvzip"},
    "ada kvzip": {"scorer": "kvzip", "budget": "ada"},
    "dynamic kvzip": {"scorer": "kvzip", "budget": "dynamic"},
    "lean snapkv": {"scorer": "snapkv", "budget": "lean"},
    "cake snapkv": {"scorer": "snapkv", "budget": "cake"},
    "dynamic snapkv": {"scorer": "snapkv", "budget": "dynamic"},
    "prefix snapkv": {"scorer": "snapkv", "budget": "prefix"},
    "simlayer snapkv": {"scorer": "snapkv", "budget": "simlayer"},
    "h2o, d2o merges": {"scorer": "h2o", "merge": "d2o"},
    "h2o, lookm merges": {"scorer": "h2o", "merge": "lookm"},
    "h2o, cam merges": {"scorer": "h2o", "merge": "cam"},
    "snapkv, d2o merges": {"scorer": "snapkv", "merge": "d2o"},
    "sepllm": {"scorer": "sepllm"},
    "h2o, kvmerger merges": {"scorer": "h2o", "merge": "kvmerger"},
    "streaming, mean merges": {"scorer": "streaming", "merge": "mean"},
    "duo": {"scorer": "streaming", "budget": "duo"},
    "razor": {"scorer": "streaming", "budget": "razor"},
    "razor, mean merges": {"scorer": "streaming", "budget": "razor", "merge": "mean"},
    "headkv snapkv": {"scorer": "snapkv", "budget": "headkv"},
    "headkv h2o": {"scorer": "h2o", "budget": "headkv"},
    "streaming, positions in the cache": {"scorer": "streaming", "positions": "cache"},
}
WHOLE = 0.15
"""Part of the KV heads that keep everything in rows of retrieval heads; the others stream, to the same bytes in all."""
ROWS = {
    f"{name} {ratio}x": {"rewriter": "evict", "ratio": ratio, "recent": 32, "sinks": 4, **kind}
    for ratio in RATIOS
    for name, kind in KINDS.items()
    if not (ratio > 1 / 0.15 and kind.get("budget") == "razor")  # whose whole heads alone are more than that
}
ROWS |= {
    f"{read} {ratio}x": {"rewriter": "evict", "scorer": "streaming", "ratio": 1, "recent": 32, "read": read,
                         "read_ratio": ratio}
    for ratio in RATIOS
    for read in READERS
}  # fmt: skip
HEADS = {f"retrieval heads {ratio}x": (1 - WHOLE) / (1 / ratio - WHOLE) for ratio in (4, 2)}
"""Row -> tokens per slot of the heads that stream."""


@torch.inference_mode()
def text_quality(model: PreTrainedModel, answers: Answers) -> dict[str, Any]:
    """Means over decoded tokens: KL to the parent, the probability that both give alike, the same first choice."""
    ids, prompt = answers.ids_WT, answers.sizes.prompt
    kl = kept = same = nats = 0.0
    for i, logp in enumerate(decoded(model, ids, prompt)):
        base = answers.logp[i]
        p, q = base.exp(), logp.exp()
        kl += float((p * (base - logp)).sum(-1).mean())
        kept += float(torch.minimum(p, q).sum(-1).mean())
        same += float((base.argmax(-1) == logp.argmax(-1)).float().mean())
        nats -= float(logp.gather(-1, ids[:, prompt + i + 1, None]).mean())
    means = {"kl": kl, "tvd_kept": kept, "agreement": same, "nats_per_token": nats}
    return {name: value / answers.sizes.decoded for name, value in means.items()}


@torch.inference_mode()
def bytes_held(model: PreTrainedModel, answers: Answers) -> dict[str, int]:
    """Bytes of the cache of one window after its prompt, and after what is decoded behind that."""
    cache, found = DynamicCache(config=model.config), {}
    ids, prompt = answers.ids_WT[:1, :-1], answers.sizes.prompt
    model(ids[:, :prompt], use_cache=True, **{cache_argument(model): cache})
    found["cache_bytes"] = tensor_bytes(cache)
    for token in ids[:, prompt:].split(1, dim=1):
        model(token, use_cache=True, **{cache_argument(model): cache})
    return found | {"cache_bytes_at_end": tensor_bytes(cache)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "evict_quality")
    parser.add_argument("--only", nargs="+", default=[""], metavar="PART", help="rows whose names contain one of these")
    parser.add_argument("--lengths", nargs="*", type=int, default=LENGTHS, help="tokens of context of the questions")
    parser.add_argument("--quick", action="store_true", help="less of everything, to a file of its own")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no measurement after so many")
    arguments = parser.parse_args()
    torch.manual_seed(SEED)
    sizes, file = (QUICK, "evict_quality_quick") if arguments.quick else (SIZES, "evict_quality")
    begun = time.monotonic()
    parent = surgery.load(arguments.checkpoint, dtype=torch.float32).eval()
    anatomy, tokenizer = surgery.examine(parent), load_tokenizer(arguments.checkpoint)
    answers = Answers(arguments.folder, read_texts(tokenizer, anatomy.config, sizes), sizes, lambda: parent)
    recall = Recall(anatomy.config, tokenizer, sizes.questions, SEED)
    place = ROOT / "benchmarks" / "results" / f"{file}.json"
    data = json.loads(place.read_text()) if place.exists() else {"rows": {}}

    def keep(row: str, part: str, found: dict[str, Any]) -> None:
        data["rows"].setdefault(row, {})[part] = found
        data.update(environment=environment(SEED), sizes=vars(sizes))
        write(file, data)
        said = {key: value for key, value in found.items() if not isinstance(value, dict | list)}
        print(f"{time.strftime('%H:%M')} {row}, {part}: {said}", flush=True)  # noqa: T201

    def lacks(row: str, part: str) -> bool:
        return part not in data["rows"].get(row, {}) and time.monotonic() - begun < 60 * arguments.minutes

    if lacks("parent", "text"):
        keep("parent", "text", {**text_quality(parent, answers), **bytes_held(parent, answers)})
    for length in arguments.lengths:
        if lacks("parent", f"recall-{length}"):
            keep("parent", f"recall-{length}", recall.ask(parent, length, None, False))
    parts = ["text", *(f"recall-{length}" for length in arguments.lengths)]
    for name, step in (ROWS | HEADS).items():
        wanted = [part for part in parts if lacks(name, part)]
        if not wanted or not any(part in name for part in arguments.only):
            continue
        if name in HEADS:
            whole = surgery.retrieval_heads(parent, WHOLE)
            step = {"rewriter": "evict", "scorer": "streaming", "ratio": step, "recent": 4, "whole": whole}
        recipe = Recipe.load({"steps": [step]})
        text = calibration_text(arguments.folder) if recipe.steps[0].text == "needed" else None
        model = surgery.convert(parent, recipe, calibration=text, samples=8, tokenizer=tokenizer).eval()
        for part in filter(partial(lacks, name), wanted):
            if part == "text":
                found, whole = {**text_quality(model, answers), **bytes_held(model, answers)}, data["rows"]["parent"]
                for at in ("", "_at_end"):
                    found[f"part{at or '_of_parent'}"] = found[f"cache_bytes{at}"] / whole["text"][f"cache_bytes{at}"]
            else:
                found = recall.ask(model, int(part.partition("-")[2]), data["rows"]["parent"][part]["answered"], False)
            keep(name, part, found)


if __name__ == "__main__":
    main()
