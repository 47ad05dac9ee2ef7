"""How far an identity conversion is from its parent on the installed pair of torch and transformers, family by family.

    python benchmarks/releases.py

Every family of the tests, as a tiny random model in float32: the largest logit difference over the largest logit in
prefill, in a left-padded batch, and after saving and loading; new greedy tokens (of 24) that differ through a dynamic
cache, through a static one where the parent has one that agrees with its own dynamic cache, and in the padded batch.
Rows of other pairs in `results/releases.json` stay, so that one run in each environment fills the table.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from common import ROOT, environment, write
from rich.console import Console
from rich.table import Table

import surgery

sys.path.append(str(ROOT / "tests"))
from families import FAMILIES, tiny_model

SEED = 0
GREEDY = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12}
FIELDS = ("prefill", "padded", "reloaded", "dynamic_tokens", "static_tokens", "padded_tokens")


def difference(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest difference over the largest magnitude."""
    return float((got - want).abs().max() / want.abs().max())


@torch.no_grad()
def measure(family: str, folder: Path) -> dict[str, Any]:
    """One row; `static_tokens` is None where the parent has no static cache that agrees with its dynamic one."""
    parent = tiny_model(family)
    child = surgery.convert(parent, "identity")
    ids = torch.randint(3, 128, (2, 14), generator=torch.Generator().manual_seed(SEED))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0

    def tokens(model: Any, **arguments: Any) -> torch.Tensor:
        return model.generate(ids, **GREEDY, **arguments)[:, ids.shape[1] :]

    padded = [model(ids, attention_mask=mask).logits[mask.bool()] for model in (child, parent)]
    want = tokens(parent)
    try:
        static = tokens(parent, cache_implementation="static")
    except Exception:
        static = None  # the parent's own limit
    surgery.save(child, folder)
    return {
        "prefill": difference(child(ids).logits, parent(ids).logits),
        "padded": difference(*padded),
        "reloaded": difference(surgery.load(folder)(ids).logits, parent(ids).logits),
        "dynamic_tokens": int((tokens(child) != want).sum()),
        "static_tokens": None
        if static is None or not torch.equal(static, want)
        else int((tokens(child, cache_implementation="static") != static).sum()),
        "padded_tokens": int((tokens(child, attention_mask=mask) != tokens(parent, attention_mask=mask)).sum()),
    }


def main() -> None:
    rows = {}
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            rows[family] = measure(family, Path(folder) / "child")
    pair = f"torch {torch.__version__.partition('+')[0]}, transformers {transformers.__version__}"
    file = ROOT / "benchmarks" / "results" / "releases.json"
    known = json.loads(file.read_text())["pairs"] if file.is_file() else {}
    worst = {field: max(row[field] for row in rows.values() if row[field] is not None) for field in FIELDS}
    known[pair] = {"environment": environment(SEED), "worst": worst, "families": rows}
    write("releases", {"pairs": dict(sorted(known.items()))})
    table = Table("pair", *(field.replace("_", " ") for field in FIELDS), title=f"worst of {len(rows)} families")
    for name, found in sorted(known.items()):
        table.add_row(name, *(f"{found['worst'][field]:.2g}" for field in FIELDS))
    Console().print(table)


if __name__ == "__main__":
    main()
