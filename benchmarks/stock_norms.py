"""How far the norms of DeepSeek-V3's stock class lead from the conversion that was exported: SmolLM2 by `mla-4x`.

    python benchmarks/stock_norms.py --model FOLDER    # a ready checkpoint of SmolLM2, from `smollm2.py`
    python benchmarks/stock_norms.py --tiny            # the same code on the bundled model

The class norms its latents, which conversions do not. Rows: `neutral` (a bias makes the norm constant, which vLLM and
llama.cpp leave out), `gains alone` (fitted to text), `calibrated` (and the channels that a narrower layer has to spare
steer the norm), `calibrated, padded` (so do those up to 512).
KL and the change of the loss are on WikiText-2 (test), in nats per token, of the export to the conversion, both in
float32; `spread` is the norm's standard deviation over text by its mean, in the worst layer.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

from common import calibration_text, environment, reference, write
from rich.console import Console
from rich.table import Table
from smollm2 import restore

import surgery
from surgery.bundled import SMALL
from surgery.calibration.text import load_tokenizer, read_windows
from surgery.export import export
from surgery.export.latent_norm import STRENGTHS, fit_norm

SEED = 0
STEP = {"rewriter": "mla", "keep": 0.25, "selector": "top"}
"""Plain rope, which pads need, has each frequency once: `selector: top`."""
GAINS = "gains alone"
ROWS: dict[str, dict[str, Any]] = {
    "neutral": {"norm": "neutral"},
    GAINS: {"norm": "calibrated"},
    "calibrated": {"norm": "calibrated"},
    "calibrated, padded": {"norm": "calibrated", "pad": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "stock_norms")
    parser.add_argument("--model", type=Path, help="a ready checkpoint of SmolLM2; restored from its package if absent")
    parser.add_argument("--tiny", action="store_true", help="the bundled model and little text; writes no results")
    arguments = parser.parse_args()
    folder: Path = arguments.folder.resolve() / ("tiny" if arguments.tiny else "full")
    folder.mkdir(parents=True, exist_ok=True)
    model = SMALL if arguments.tiny else (arguments.model or folder / "smollm2").resolve()
    if not (model / "config.json").is_file():
        restore(model)
    (samples, length), held_out = ((8, 64), (4, 128)) if arguments.tiny else ((24, 256), (16, 512))
    text = calibration_text(folder)
    recipe = {"steps": [{**STEP, "rope_dims": 16} if arguments.tiny else STEP]}
    child = folder / "child"
    surgery.convert_checkpoint(
        model, recipe, child, calibration=str(text), samples=samples, length=length, seed=SEED, overwrite=True
    )
    source = surgery.load(child).float().eval()
    windows = read_windows(
        source.config,
        reference("text", "wikitext2-test.txt"),
        load_tokenizer(child),
        most=held_out[1],
        samples=held_out[0],
    )
    rows: dict[str, Any] = {}
    for name, options in ROWS.items():
        begun = time.process_time()
        # By its module's name: the package's attribute `export` is the function.
        with patch.object(sys.modules[fit_norm.__module__], "STRENGTHS", () if name == GAINS else STRENGTHS):
            report = export(child, folder / "stock", to="native", text=str(text), overwrite=True, **options)
        seconds = time.process_time() - begun
        stock = surgery.load(folder / "stock").float().eval()
        found = surgery.evaluate(stock, baseline=source, text=windows, path="prefill")
        assert found.baseline is not None
        rows[name] = {
            "kl": found.kl,
            "loss_change": found.model.nats_per_token - found.baseline.nats_per_token,
            "tokens": found.tokens,
            "text": found.text_digest,
            "spread": report.facts.get("norm_spread", 0.0),
            "rank": report.facts["rank"],
            "export_processor_seconds": round(seconds, 1),
        }
        print(f"{name}: {rows[name]}", flush=True)  # noqa: T201
    if not arguments.tiny:
        write("stock_norms", {**environment(SEED), "calibration": [samples, length], "rows": rows})
    table = Table("norm", "KL, nats", "loss", "spread", "latent")
    for name, row in rows.items():
        table.add_row(name, f"{row['kl']:.2e}", f"{row['loss_change']:+.4f}", f"{row['spread']:.2%}", str(row["rank"]))
    Console().print(table)


if __name__ == "__main__":
    main()
