"""A folder that vLLM serves: stock classes as they are, Llama-like `Surgery<Parent>` through the plugin.

The folder is the converted checkpoint itself. What the export adds is the answer, before a server is set up, to whether
vLLM runs the model, and the proof that it computes the same and caches as much as planned.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..anatomy.positions import max_positions
from ..calibration.outputs import speaks
from ..checkpoints.writing import copy_weights
from ..errors import CheckpointError, PlanError
from ..runtime.layout import LayerPlan
from ..serve.engine import Engine
from ..serve.support import check_served, copies_of
from .parity import TOLERANCE, Ask, Parity, answers_of
from .target import Source, Written


@dataclass(frozen=True, kw_only=True)
class Vllm:
    """The target `vllm`."""

    python: str | None = None
    """Interpreter of the environment that has vLLM; default: what SURGERY_VLLM_PYTHON says, else this one."""

    def check(self, source: Source) -> None:
        """Refuse what vLLM does not run, and an environment without it."""
        if not speaks(source.kind):
            raise PlanError(
                f"vLLM: {source.kind.__name__} predicts no tokens, so that its answers cannot be checked there. Use "
                "--to hub: vLLM loads that folder as it loads the parent's."
            )
        if source.is_own_class:
            check_served(source.config)
        else:
            _check_stock(source.config)
        engine = Engine.find(self.python)
        if source.is_own_class and not engine.has_plugin:
            raise PlanError(
                f"{engine} has no plugin for {source.architecture}: install kv-surgery beside it (in that "
                "environment: pip install kv-surgery)."
            )

    def write(self, source: Source, folder: Path) -> Written:
        """Write weights, config and companions."""
        if source.folder is None:
            source.model.save_pretrained(folder)
        else:
            copy_weights(source.folder, folder)
            shutil.copyfile(source.folder / "config.json", folder / "config.json")
        source.write_companions(folder)
        facts: dict[str, Any] = {"plugin": source.is_own_class}
        lines = ["runs without a plugin"]
        if source.is_own_class:
            planned, served = planned_and_served(source.layers)
            facts |= {"planned_bytes_per_token": planned, "served_bytes_per_token": served}
            lines = ["runs by the plugin of kv-surgery, which must be installed beside vLLM"]
            if served != planned:
                lines.append(
                    f"cache: {served} bytes per token (the conversion has {planned}): vLLM wants equal KV heads here, "
                    "and some are repeated"
                )
        loading = (("vLLM", "vllm serve FOLDER_OR_ID"),)
        return Written(architecture=source.architecture, facts=facts, lines=tuple(lines), loading=loading)

    def parity(self, source: Source, folder: Path) -> Parity:
        """Ask vLLM the same prompts, and how much it caches for one token."""
        engine, model = Engine.find(self.python), source.model
        config = source.config.get_text_config()
        context = max_positions(config)
        ask = Ask.of_vocabulary(config.vocab_size, context and context - 1)
        [got] = engine.ask([case_of(folder, ask, model)])
        if "error" in got:
            raise CheckpointError(f"{engine} does not run the export: {got['error']} Nothing was written.")
        parity = compare_scores(answers_of(model, ask), got, ask, str(engine))
        return parity.require(TOLERANCE[model.dtype], same_tokens=model.dtype == torch.float32)


def case_of(folder: Path, ask: Ask, model: PreTrainedModel, **more: Any) -> dict[str, Any]:
    """A case for `Engine.ask`, about `folder`, which says what `model` does."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    return {
        "folder": str(folder),
        "prompts": ask.prompts_BT.tolist(),
        "start": ask.start,
        "new_tokens": ask.new_tokens,
        "dtype": str(model.dtype).removeprefix("torch."),
        "ends": [ends] if isinstance(ends, int) else list(ends or ()),
        **more,
    }


def compare_scores(want: dict[str, Tensor], got: dict[str, Any], ask: Ask, engine: str) -> Parity:
    """Greedy tokens, and the log-probabilities of the prompts' own tokens: vLLM gives no logits."""
    scores = want["logits"].float().log_softmax(-1)[:, :-1]
    expected = scores.gather(-1, ask.prompts_BT[:, 1:, None].to(scores.device)).squeeze(-1)
    difference = float((torch.tensor(got["logprobs"]) - expected).abs().max())
    tokens = want["dynamic"][:, -ask.new_tokens :]
    return Parity(
        engine=f"{engine}, {got['cache']['bytes_per_token']:g} KV bytes per token; log-probabilities for logits",
        logit_difference=difference,
        relative_difference=difference / float(expected.abs().max().clamp_min(1e-30)),
        equal_greedy_tokens=int((torch.tensor(got["tokens"]) == tokens).sum()),
        greedy_tokens=tokens.numel(),
    )


def planned_and_served(layers: list[dict[str, Any]]) -> tuple[int, int]:
    """Bytes per token of the plan, and of the cache that vLLM allocates for it."""
    plans = [LayerPlan.from_dict(layer["plan"]) for layer in layers]
    copies = copies_of(plans)
    planned = sum(plan.bytes_per_token for plan in plans)
    served = sum(
        plan.bytes_per_token * len(copies[plan.layer]) // plan.project.kv_heads
        for plan in plans
        if plan.bytes_per_token
    )
    return planned, served


def _check_stock(config: Any) -> None:
    """What vLLM's DeepSeek-V3 does otherwise than the class of transformers; other classes are for vLLM to judge."""
    if config.model_type != "deepseek_v3":
        return
    if config.attention_bias:
        raise PlanError(
            "vLLM: this DeepSeek-V3 has biases on its latents (norm neutral), which vLLM leaves out. Use --to native "
            "--norm calibrated, and export that."
        )
    rope = dict(config.rope_parameters or {}).get("rope_type", "default")
    if rope != "default":
        raise PlanError(
            f"vLLM: rope of type {rope}, which it rewrites to deepseek_yarn for DeepSeek-V3. Convert a parent with "
            "plain rope by mla with selector: top and rope_dims: the parent's head_dim."
        )
