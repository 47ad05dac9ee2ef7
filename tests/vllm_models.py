"""Tiny models that vLLM is asked about, and the vLLM that is there to ask."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from transformers import PreTrainedModel

import surgery
from surgery.errors import PlanError
from surgery.serve.engine import PYTHON, Engine

BESIDE = Path(__file__).parent.parent / ".venv-vllm" / "bin" / "python"
"""Where `.ci/vllm` puts it."""
_SHAPE: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 256, "initializer_range": 0.2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def vllm_engine() -> Engine | str:
    """The vLLM of SURGERY_VLLM_PYTHON or of `.venv-vllm`, or why there is none."""
    python = os.environ.get(PYTHON) or (str(BESIDE) if BESIDE.exists() else None)
    if python is None:
        return f"no vLLM: .ci/vllm sets up {BESIDE.parent.parent.name}, or {PYTHON} names an interpreter that has it"
    try:
        return Engine.find(python)
    except PlanError as error:
        return str(error)


def decoder(family: str = "Llama", **changes: Any) -> PreTrainedModel:
    """Four layers, random, gains spread around 1."""
    torch.manual_seed(0)
    config = getattr(hf, f"{family}Config")(**{**_SHAPE, **changes})
    model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.4 * torch.randn(parameter.shape))
    return model


def text() -> torch.Tensor:
    return torch.randint(3, 128, (4, 16), generator=torch.Generator().manual_seed(1))


def converted(parent: PreTrainedModel, *steps: dict[str, Any]) -> PreTrainedModel:
    asks = any(step["rewriter"] in ("mla", "lowrank") or step.get("init") == "latent" for step in steps)
    return surgery.convert(parent, {"steps": list(steps)}, calibration=text() if asks else None)


_BARE = {"refit_queries": False, "refit_output": False}
CLA2 = {"rewriter": "share", "layout": "cla2", "init": "replace", "gain_fit": False, **_BARE}
GQA = {"rewriter": "gqa", "kv_heads": 1, "init": "mean"}
MLA = {"rewriter": "mla", "rank": 48, "rope_dims": 32, "selector": "top", **_BARE}
ANY_MLA = {"rewriter": "mla", "rank": 40, "rope_dims": 8, **_BARE}
LOWRANK = {"rewriter": "lowrank", "keep": 0.5, **_BARE}
LATENT_CLA2 = {**CLA2, "init": "latent"}
FP8 = {"rewriter": "quantise", "codec": "fp8"}
