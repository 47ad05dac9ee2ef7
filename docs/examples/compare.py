"""Convert a model by several recipes and compare them with the parent: KL, loss and bytes, decoded through the cache.

    python docs/examples/compare.py [MODEL] [--recipes gqa-2x kv-int4] [--calibration FILE] [--text FILE]

Without arguments it takes the small model that comes with surgery, and this project's own pages as text.
"""

import argparse
from pathlib import Path

import surgery
from surgery.bundled import SMALL

ROOT = Path(__file__).parents[2]


def main(argv: list[str] | None = None) -> dict[str, surgery.Report]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(SMALL))
    parser.add_argument("--recipes", nargs="+", default=["gqa-2x", "gqa-4x", "kv-int4"])
    parser.add_argument("--calibration", default=[(ROOT / "recipes" / "README.md").read_text()])
    parser.add_argument("--text", default=[(ROOT / "CHANGELOG.md").read_text()], help="held out: no step may see it")
    parser.add_argument("--windows", type=int, default=8, help="of text, for calibration and for evaluation")
    parser.add_argument("--length", type=int, default=256, help="tokens of a window")
    options = parser.parse_args(argv)

    parent = surgery.load(options.model)
    sizes = {"samples": options.windows, "length": options.length}
    reports = {}
    print(f"{'recipe':12} {'KL':>9} {'nats/token':>11} {'parent':>8} {'bytes/token':>12} {'parent':>8}")
    for recipe in options.recipes:
        child = surgery.convert(parent, recipe, calibration=options.calibration, **sizes)
        report = surgery.evaluate(child, baseline=parent, text=options.text, path="decode", **sizes)
        own, other = report.model, report.baseline
        print(
            f"{recipe:12} {report.kl:9.5f} {own.nats_per_token:11.3f} {other.nats_per_token:8.3f} "
            f"{own.kv_bytes_per_token:12,.0f} {other.kv_bytes_per_token:8,.0f}"
        )
        reports[recipe] = report
    return reports


if __name__ == "__main__":
    main()
