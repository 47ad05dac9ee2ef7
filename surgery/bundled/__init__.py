"""The bundled model: a small MHA Llama, really pretrained (`surgery.train.pretrain`), for the demo and for tests."""

from pathlib import Path

SMALL = Path(__file__).parent / "small"
"""Its folder, an ordinary checkpoint."""
