"""The mathematics of fewer KV heads."""

from typing import Literal

Init = Literal[
    "rank1", "aligned", "mean", "sqrt_g", "first", "medoid", "random", "weighted", "key_norm", "asym", "qcqa", "dha"
]  # fmt: skip
"""How heads that are pooled are made."""
