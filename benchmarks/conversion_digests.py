"""What every kind of conversion makes, to the last bit: digests that a change of the code must not change.

    python benchmarks/conversion_digests.py                   # record all rows, minutes on one core
    python benchmarks/conversion_digests.py --check           # convert again, print what differs, then exit with 1
    python benchmarks/conversion_digests.py --check mla- dms  # rows whose name holds one of these words
    python benchmarks/conversion_digests.py --keep FOLDER     # also store the tensors there, or read them with --check

The parent is the bundled small model, said to have more positions than it has, for windows. Rows are all shipped
recipes, and recipes below that together use every option. Each is converted with calibration text, and without where
the recipe allows that. A row holds the digest of the state dict (names, dtypes, shapes, bytes) and the class.

The text is the first stories of the reference folder that are long enough, cut to equal windows; where that folder is
absent, random tokens of a fixed generator. The results name the text and its digest, and `--check` refuses another one.
Digests hold for one processor and one version of torch: sums are taken in another order elsewhere, and the last bit of
a bfloat16 turns with it. Record on the machine that checks, before the change.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import REFERENCE, ROOT, environment, write
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

import surgery
from surgery.bundled import SMALL
from surgery.errors import SurgeryError
from surgery.recipe import shipped_recipes

NAME = "conversion_digests"
SEED = 0
WINDOWS, LENGTH = 4, 64
CONTEXT = 4096
"""Positions that the parent claims to have: recipes with windows refuse its own 512."""
STORIES = REFERENCE / "text" / "tinystories-917.jsonl"

Steps = list[dict[str, Any]]
console = Console(highlight=False, soft_wrap=True)


def gqa(**options: Any) -> dict[str, Any]:
    """Without gains, which take long; rows of their own and shipped recipes have them."""
    return {"rewriter": "gqa", "gain_fit": False} | ({} if "groups" in options else {"kv_heads": 4}) | options


def mla(**options: Any) -> dict[str, Any]:
    return {"rewriter": "mla"} | ({} if "rank" in options else {"keep": 0.5}) | options


def lowrank(**options: Any) -> dict[str, Any]:
    return {"rewriter": "lowrank"} | ({} if "rank" in options else {"keep": 0.5}) | options


def share(**options: Any) -> dict[str, Any]:
    """Without gains, as `gqa`."""
    return {"rewriter": "share", "gain_fit": False} | options


def dms(**options: Any) -> dict[str, Any]:
    return {"rewriter": "dms", "window": 24} | options


def dmc(**options: Any) -> dict[str, Any]:
    return {"rewriter": "dmc"} | options


PLAIN = {"refit_queries": False, "refit_output": False, "gain_fit": False}
SOME = "1,4"
"""Layers of rows that take long."""
PAIRS = [[0, 3], [1], [2, 5, 6], [4, 7]]
INITS = (
    "rank1", "aligned", "mean", "sqrt_g", "first", "medoid", "random", "weighted", "key_norm", "asym", "qcqa", "dha",
)  # fmt: skip
RECIPES: dict[str, Steps] = {
    **{f"gqa-{init}": [gqa(init=init)] for init in INITS},
    **{
        f"gqa-{init}-neighbour": [gqa(init=init, grouping="neighbour", layers=SOME, **PLAIN)]
        for init in INITS
        if init != "key_norm"  # which knows no other grouping
    },
    **{f"gqa-{init}-uneven": [gqa(init=init, equal_groups=False)] for init in ("asym", "qcqa", "key_norm")},
    "gqa-groups": [gqa(groups=PAIRS)],
    "gqa-groups-mean": [gqa(groups=PAIRS, init="mean", **PLAIN)],
    "gqa-not-renormed": [gqa(init="aligned", renorm=False, grouping="neighbour")],
    "gqa-queries": [gqa(kv_heads=2, **PLAIN | {"refit_queries": True})],
    "gqa-output": [gqa(kv_heads=2, **PLAIN | {"refit_output": True})],
    "gqa-gains": [gqa(kv_heads=2, **PLAIN | {"gain_fit": True})],
    "gqa-some-layers": [gqa(layers="1-3,5")],
    "gqa-by-layer": [gqa(kv_heads=2, layers="0-2"), gqa(kv_heads="1/8", init="mean", layers="3-4")],
    **{f"mla-{init}": [mla(init=init)] for init in ("svd", "whitened", "transmla")},
    **{
        f"mla-rotation-{rotation}": [mla(rotation=rotation, layers=SOME, **PLAIN)]
        for rotation in ("complex", "real", "none")
    },
    **{
        f"mla-selector-{selector}": [mla(selector=selector, rotation="none", layers=SOME, **PLAIN)]
        for selector in ("gain", "energy", "2norm", "high", "low", "uniform", "top")
    },
    **{f"mla-fold-{fold}": [mla(fold=fold, layers=SOME)] for fold in (2, 4, "auto")},
    "mla-beta-search": [mla(beta="search", layers=SOME)],
    "mla-beta": [mla(beta=0.5, layers=SOME, **PLAIN)],
    "mla-sensitivity": [mla(ranks="sensitivity")],
    "mla-means": [mla(mean_split=True)],
    "mla-gains": [mla(gain_fit=True, layers=SOME)],
    "mla-rank": [mla(rank=96, rope_dims=32)],
    "mla-unrotated": [mla(keep=0.25, rope_dims=0)],
    "mla-some-layers": [mla(layers="0,2-4")],
    **{f"lowrank-{init}": [lowrank(init=init)] for init in ("plain", "whitened")},
    **{f"lowrank-{layout}": [lowrank(layout=layout)] for layout in ("grouped", "head", "freq")},
    "lowrank-grouped-2": [lowrank(layout="grouped", group=2, **PLAIN)],
    "lowrank-grouped-whitened": [lowrank(layout="grouped", init="whitened")],
    "lowrank-freq-gains": [lowrank(layout="freq", keep=0.375, gain_fit=True)],
    "lowrank-freq-sensitivity": [lowrank(layout="freq", ranks="sensitivity")],
    "lowrank-sensitivity": [lowrank(ranks="sensitivity")],
    "lowrank-one-mean": [lowrank(mean_split=False)],
    "lowrank-k-share": [lowrank(k_share=0.4)],
    "lowrank-rank": [lowrank(rank=160)],
    "lowrank-some-layers": [lowrank(layers="1-4")],
    "lowrank-mla": [lowrank(layers="0-2"), mla(layers="3-5")],
    **{f"share-{init}": [share(init=init)] for init in ("best", "replace", "mean", "least_squares")},
    "share-gains": [share(init="replace", **PLAIN | {"gain_fit": True})],
    "share-plain": [share(init="least_squares", **PLAIN)],
    "share-latent": [share(init="latent")],
    "share-latent-half": [share(init="latent", keep=0.5, layout="cla(3)")],
    "share-mlkv": [share(layout="mlkv(layers=2)")],
    "share-mlkv-part": [share(layout="mlkv", kv_layers=0.5)],
    **{
        f"share-{layout}": [share(layout=f"{layout}-bottom", kv_layers=4)]
        for layout in ("pizza", "sandwich", "lasagna")
    },
    "share-search": [share(layout="search", kv_layers=3)],
    "share-search-latent": [share(layout="search", kv_layers=4, init="latent")],
    "share-kvsharer": [share(layout="kvsharer", kv_layers=4, init="replace")],
    **{
        f"share-svformer-{init}": [share(layout="svformer", init=init)] for init in ("best", "replace", "least_squares")
    },
    "share-map": [share(layout={2: 0, 5: 3})],
    "share-some-layers": [share(layers="2-5")],
    "gqa-share": [gqa(), share()],
    "gqa-groups-share": [gqa(groups=PAIRS), share(layout={1: 0, 4: 2}, init="least_squares")],
    "gqa-share-search": [gqa(init="mean"), share(layout="search", kv_layers=3)],
    "gqa-svformer": [gqa(), share(layout="svformer")],
    "dms-adapter": [dms()],
    "dms-borrowed": [dms(gate="borrowed", sinks=2, page=32)],
    "dms-key-norm": [dms(gate="score:key_norm")],
    "dms-window": [dms(gate="score:window")],
    "dms-windows": [dms(windows="sensitivity")],
    "dms-window-windows": [dms(gate="score:window", windows="sensitivity")],
    "dms-by-layer": [dms(layers="0-2", ratio=2), dms(layers="3-5", gate="score:window", window=16)],
    "dmc-adapter": [dmc()],
    "dmc-unlimited": [dmc(window=None, gate="borrowed", ratio=2)],
    "gqa-dms": [gqa(), dms()],
    "gqa-dms-key-norm": [gqa(), dms(gate="score:key_norm")],
    "gqa-dms-windows": [gqa(), dms(gate="score:window", windows="sensitivity")],
    "gqa-groups-dms": [gqa(groups=PAIRS), dms()],
    "gqa-dmc": [gqa(), dmc()],
    "share-dms": [share(), dms()],
    "share-dms-key-norm": [share(), dms(gate="score:key_norm")],
    "share-dmc": [share(), dmc()],
    "gqa-share-dms": [gqa(), share(), dms()],
}

SEARCHES = [f"gqa-{init}" for init in INITS if init != "rank1"]
"""Rows that search for groups: one of them without text is enough, for the search is the same."""


def rows() -> Iterator[tuple[str, Any]]:
    """Name and recipe of every row, without what is said of calibration text."""
    for name in shipped_recipes():
        yield f"{name}.yaml", name
    for name, steps in RECIPES.items():
        yield name, {"name": name, "steps": steps}


def needs_text(anatomy: surgery.Anatomy, recipe: Any) -> bool:
    """Whether there is no conversion without text, be it that there is none at all."""
    try:
        return surgery.plan(anatomy, recipe).needs_calibration
    except SurgeryError:
        return True


def calibration_ids() -> tuple[Tensor, str]:
    """Token ids [windows, tokens], and where they are from."""
    if not STORIES.exists():
        generator = torch.Generator().manual_seed(SEED)
        return torch.randint(1, 4096, (WINDOWS, LENGTH), generator=generator), "random ids, torch.Generator, seed 0"
    tokenizer = AutoTokenizer.from_pretrained(SMALL)
    found: list[list[int]] = []
    for line in STORIES.read_text().splitlines():
        ids = tokenizer(json.loads(line)["text"])["input_ids"]
        if len(ids) >= LENGTH:
            found.append(ids[:LENGTH])
        if len(found) == WINDOWS:
            break
    return torch.tensor(found), f"text/{STORIES.name}, first {LENGTH} tokens of the first {WINDOWS} stories as long"


def digest(tensors: dict[str, Tensor]) -> str:
    """Of names, dtypes, shapes and bytes, in the order of the names."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def describe(model: PreTrainedModel) -> dict[str, Any]:
    """The row of a model."""
    tensors = model.state_dict()
    return {"sha256": digest(tensors), "tensors": len(tensors), "class": type(model).__name__}


def differences(row: dict[str, Any], was: dict[str, Any]) -> list[str]:
    """What differs, a line for each; seconds do not count."""
    names = [name for name in was if name != "seconds"]
    return [f"{name}: {was.get(name)} -> {row.get(name)}" for name in names if was.get(name) != row.get(name)]


def apart(tensors: dict[str, Tensor], kept: dict[str, Tensor]) -> str:
    """How far tensors are from those that were kept."""
    only = sorted(tensors.keys() ^ kept.keys())
    worst = 0.0, "no tensor"
    for name in tensors.keys() & kept.keys():
        if tensors[name].shape != kept[name].shape:
            only.append(name)
        elif tensors[name].numel():
            worst = max(worst, (float((tensors[name].double() - kept[name].double()).abs().max()), name))
    told = f"largest absolute difference {worst[0]:.3g} in {worst[1]}"
    return f"{told}; in one of both alone, or of another shape: {', '.join(only)}" if only else told


def plain_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Clones, which share no memory, as files want them."""
    return {name: tensor.detach().clone().contiguous() for name, tensor in model.state_dict().items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="only rows whose name holds one of these")
    parser.add_argument("--check", action="store_true", help="compare with the recorded rows and write nothing")
    parser.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="store the tensors of each row, or compare with them"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    ids, source = calibration_ids()
    text = {
        "source": source,
        "windows": list(ids.shape),
        "sha256": hashlib.sha256(ids.numpy().tobytes()).hexdigest(),
    }
    path = ROOT / "benchmarks" / "results" / f"{NAME}.json"
    old = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    if options.check and old["calibration"] != text:
        sys.exit(f"The calibration text is another one: {text} instead of {old['calibration']}.")
    parent = surgery.load(SMALL).eval()
    parent.config.max_position_embeddings = CONTEXT
    anatomy = surgery.examine(parent)
    made: dict[str, Any] = {}
    wrong: list[str] = []
    for name, recipe in rows():
        for calibrated in (True, False):
            if not calibrated and (name in SEARCHES or needs_text(anatomy, recipe)):
                continue
            row_name = f"{name} {'text' if calibrated else 'no text'}"
            if options.words and not any(word in row_name for word in options.words):
                continue
            begun = time.perf_counter()
            torch.manual_seed(SEED)
            model = None
            try:
                model = surgery.convert(parent, recipe, calibration=ids if calibrated else None, seed=SEED)
                row = describe(model)
            except Exception as error:
                if not options.check:
                    raise
                row = {"failed": f"{type(error).__name__}: {error}"}
            row["seconds"] = round(time.perf_counter() - begun, 1)
            made[row_name] = row
            kept = options.keep and options.keep / f"{row_name.replace(' ', '_')}.safetensors"
            if options.check:
                found = differences(row, old["rows"].get(row_name, {}))
                if found and kept and kept.exists() and model is not None:
                    found.append(apart(plain_tensors(model), load_file(kept)))
                wrong += [row_name] if found else []
                console.print(f"{'DIFFERS' if found else 'same   '} {row['seconds']:5.1f} s  {row_name}", markup=False)
                for line in found:
                    console.print(f"    {line}", markup=False)
            else:
                if kept and model is not None:
                    kept.parent.mkdir(parents=True, exist_ok=True)
                    save_file(plain_tensors(model), kept)
                # Read again: with words, others may have recorded other rows in the meantime.
                there = json.loads(path.read_text())["rows"] if options.words and path.exists() else {}
                facts = {"parent": "surgery.bundled.SMALL", "calibration": text}
                write(NAME, {**environment(SEED), **facts, "rows": there | made})
                console.print(f"{row['seconds']:5.1f} s  {row_name}", markup=False)
    seconds = round(time.perf_counter() - started)
    if options.check:
        gone = [] if options.words else sorted(old["rows"].keys() - made.keys())
        for row_name in gone:
            console.print(f"GONE    {row_name}", markup=False)
        console.print(f"{len(made)} rows in {seconds} s, {len(wrong) + len(gone)} differ.")
        sys.exit(1 if wrong or gone else 0)
    console.print(f"{len(made)} rows in {seconds} s.")


if __name__ == "__main__":
    main()
