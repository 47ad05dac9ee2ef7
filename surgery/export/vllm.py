"""A folder that vLLM serves: stock classes as they are, Llama-like `Surgery<Parent>` through the plugin.

The folder is the converted checkpoint itself. What the export adds is the answer, before a server is set up, to whether
vLLM runs the model, and the proof that it computes the same and caches as much as planned.
"""

from __future__ import annotations

import copy
import shutil
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..anatomy.positions import max_positions
from ..calibration.outputs import speaks
from ..checkpoints.writing import copy_weights
from ..errors import CheckpointError, PlanError
from ..planning.targets import NATIVE, PLUGIN, PLUGIN_FP8, Refusal, Subject, Way, refused_as_native
from ..runtime.layout import Dense, Latent, LayerPlan
from ..runtime.modeling import rebuild
from ..runtime.store import itemsize_of
from ..serve.engine import Engine
from ..serve.support import PLUGIN_PARENTS, activation_refusal, cache_dtype, copies_of
from ..serve.support import refusal as plugin_refusal
from .parity import TOLERANCE, Ask, Parity, answers_of
from .target import Source, Written

_ROUNDED = {False: "surgery_rounded_to_fp8", True: "surgery_cut_to_fp8"}
"""Names of attention functions, by whether numbers are rounded toward zero."""
_WINDOWS_IN_ALL_OR_NONE = ("qwen2", "qwen2_moe", "qwen3", "qwen3_moe")
"""Model types whose layers all have windows in vLLM 0.32, or none."""


@dataclass(frozen=True, kw_only=True)
class Vllm:
    """What vLLM serves, with its plugin or without."""

    engine: ClassVar[str] = "vLLM"

    python: str | None = field(
        default=None,
        metadata={
            "help": "interpreter of the environment that has vLLM; default: that which SURGERY_VLLM_PYTHON names, else "
            "this one."
        },
    )

    def judge(self, subject: Subject) -> Way | Refusal:
        """Say whether vLLM runs the result: stock classes as they are, others by the plugin, MLA as DeepSeek-V3.

        Judged by the weights when `--to native` is made: whether latents fit into a padded DeepSeek-V3 with the
        frequencies that the calibration text has chosen.
        """
        if subject.kind is not None and not speaks(subject.kind):
            return Refusal(
                reason=f"{subject.kind.__name__} predicts no tokens, so that its answers cannot be checked there",
                way_out="Use --to hub: vLLM loads that folder as it loads the parent's.",
            )
        if subject.native:
            return refused_as_native(subject) or _stock_refusal(subject) or Way(by=NATIVE)
        refused = plugin_refusal(subject)
        return refused or Way(by=PLUGIN if cache_dtype(subject.plans) == "auto" else PLUGIN_FP8)

    def check(self, source: Source) -> None:
        """Refuse an environment without vLLM, or without the plugin where the model needs it."""
        engine = Engine.find(self.python)
        if source.is_own_class and not engine.has_plugin:
            raise PlanError(
                f"{engine} has no plugin for {source.architecture}: install kv-surgery beside it (in that "
                "environment: pip install kv-surgery)."
            )
        if cache_dtype(source.subject.plans) != "auto":
            engine.check_fp8()

    def write(self, source: Source, folder: Path) -> Written:
        """Write weights, config and companions."""
        if source.folder is None:
            source.model.save_pretrained(folder)
        else:
            copy_weights(source.folder, folder)
            shutil.copyfile(source.folder / "config.json", folder / "config.json")
        source.write_companions(folder)
        facts: dict[str, Any] = {"plugin": source.is_own_class}
        lines, served = ["runs without a plugin"], None
        if source.is_own_class:
            planned, served = planned_and_served(source.layers)
            facts |= {"planned_bytes_per_token": planned, "served_bytes_per_token": served}
            lines = ["runs by the plugin of kv-surgery, which must be installed beside vLLM"]
            if served > planned:
                lines.append(
                    f"cache: {served} bytes per token (the conversion has {planned}): vLLM wants equal KV heads here, "
                    "and some are repeated"
                )
        command, dtype = "vllm serve FOLDER_OR_ID", cache_dtype(source.subject.plans)
        if dtype != "auto":
            command += f" --kv-cache-dtype {dtype}"
            lines.append(f"cache: vLLM's own {dtype}, of all tokens and with a scale of 1; compared with that")
        loading = (("vLLM", command),)
        return Written(
            architecture=source.architecture, facts=facts, lines=tuple(lines), loading=loading, bytes_per_token=served
        )

    def parity(self, source: Source, folder: Path) -> Parity:
        """Ask vLLM the same prompts, and how much it caches for one token."""
        engine, model = Engine.find(self.python), source.model
        config = source.config.get_text_config()
        context = max_positions(config)
        ask = Ask.of_vocabulary(config.vocab_size, context and context - 1)
        rounds = cache_dtype(source.subject.plans) != "auto"
        if rounds:
            if engine.on_cpu and model.dtype != torch.float32:  # in 16 bits, rounding hides what else may differ
                model = copy.deepcopy(model).float()
            model = with_rounded_caches(model, toward_zero=engine.on_cpu)
        [got] = engine.ask([case_of(folder, ask, model)])
        if "error" in got:
            raise CheckpointError(f"{engine} does not run the export: {got['error']} Nothing was written.")
        want = answers_of(model, ask)
        parity = compare_scores(want, got, ask, str(engine))
        if not rounds:
            return parity.require(TOLERANCE[model.dtype], same_tokens=model.dtype == torch.float32)
        # A number beside the bound between two codes goes to either by the arithmetic of the processor, and tokens
        # after it differ: by less than half of what rounding changes, or they were rounded in another way.
        model.set_attn_implementation("sdpa")
        unrounded = scores_of(answers_of(model, ask), ask)
        scores = scores_of(want, ask)
        changes = float((unrounded - scores).abs().max() / scores.abs().max().clamp_min(1e-30))
        return parity.require(max(TOLERANCE[model.dtype], changes / 2), same_tokens=False)


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
    expected = scores_of(want, ask)
    difference = float((torch.tensor(got["logprobs"]) - expected).abs().max())
    tokens = want["dynamic"][:, -ask.new_tokens :]
    return Parity(
        engine=f"{engine}, {got['cache']['bytes_per_token']:g} KV bytes per token; log-probabilities for logits",
        logit_difference=difference,
        relative_difference=difference / float(expected.abs().max().clamp_min(1e-30)),
        equal_greedy_tokens=int((torch.tensor(got["tokens"]) == tokens).sum()),
        greedy_tokens=tokens.numel(),
    )


def scores_of(found: dict[str, Tensor], ask: Ask) -> Tensor:
    """[prompts, tokens - 1] log-probabilities of the prompts' own tokens but the first."""
    scores = found["logits"].float().log_softmax(-1)[:, :-1]
    return scores.gather(-1, ask.prompts_BT[:, 1:, None].to(scores.device)).squeeze(-1)


def with_rounded_caches(model: PreTrainedModel, toward_zero: bool) -> PreTrainedModel:
    """What vLLM computes with caches of 8-bit floats, in transformers: keys and values rounded before they are read.

    Args:
        model: a `Surgery<Parent>`; the result shares its tensors.
        toward_zero: cut numbers off, as vLLM's build for CPUs does, in place of rounding to the nearest.
    """
    config = copy.deepcopy(model.config)
    for layer in config.surgery["layers"]:
        plan = LayerPlan.from_dict(layer["plan"])
        layer["plan"] = replace(plan, store=Dense(dtype=plan.dtype)).to_dict()
    made = rebuild(model, type(model), config, dict(model.state_dict()))
    AttentionInterface.register(_ROUNDED[toward_zero], partial(_rounded_attention, toward_zero))
    AttentionMaskInterface.register(_ROUNDED[toward_zero], sdpa_mask)
    made.set_attn_implementation(_ROUNDED[toward_zero])
    return made


def _rounded_attention(
    toward_zero: bool, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> Any:
    key, value = _as_fp8(key, toward_zero), _as_fp8(value, toward_zero)
    return sdpa_attention_forward(module, query, key, value, *args, **kwargs)


def _as_fp8(x: Tensor, toward_zero: bool) -> Tensor:
    top = torch.finfo(torch.float8_e4m3fn).max
    x = x.clamp(-top, top)
    nearest = x.to(torch.float8_e4m3fn)
    if toward_zero:  # the bits of a magnitude count upwards: the next smaller one is one less
        bits = nearest.view(torch.uint8) - (nearest.to(x.dtype).abs() > x.abs()).to(torch.uint8)
        nearest = bits.view(torch.float8_e4m3fn)
    return nearest.to(x.dtype)


def planned_and_served(layers: list[dict[str, Any]]) -> tuple[int, int]:
    """Bytes per token of the plan, and of the cache that vLLM allocates for it."""
    plans = [LayerPlan.from_dict(layer["plan"]) for layer in layers]
    copies = copies_of(plans)
    planned, itemsize = sum(plan.bytes_per_token for plan in plans), 1 if cache_dtype(plans) != "auto" else None
    served = 0
    for plan in plans:
        _, key, value = plan.entry()
        if isinstance(plan.project, Latent):  # positions are not beside them: they are places in the sequence
            served += key * itemsize_of(plan.dtype)
        else:
            served += (key + value) * len(copies[plan.layer]) * (itemsize or itemsize_of(plan.dtype))
    return planned, served


def _stock_refusal(subject: Subject) -> Refusal | None:
    """Compare what vLLM's own classes compute with those of transformers; of other classes vLLM itself must judge."""
    config = subject.config
    deepseek_v3 = config.model_type == "deepseek_v3"
    if deepseek_v3 or subject.architecture in PLUGIN_PARENTS:
        refused = activation_refusal(config)
        if refused is not None:
            return refused
    if not deepseek_v3:
        return _length_refusal(config)
    if config.attention_bias:
        return Refusal(
            reason="this DeepSeek-V3 has biases on its latents (norm neutral), which vLLM leaves out",
            way_out="Use --to native --norm calibrated, and export that.",
        )
    rope = dict(config.rope_parameters or {}).get("rope_type", "default")
    if rope != "default":
        return Refusal(
            reason=f"rope of type {rope}, which it rewrites to deepseek_yarn for DeepSeek-V3",
            way_out="Convert a parent with plain rope by mla with selector: top and rope_dims: the parent's head_dim.",
        )
    return None


def _length_refusal(config: Any) -> Refusal | None:
    """What vLLM's classes take otherwise than transformers in texts that are longer than those of the comparison."""
    config = config.get_text_config()
    rope = dict(getattr(config, "rope_parameters", None) or {})
    if "dynamic" in [rope.get("rope_type"), *(of.get("rope_type") for of in rope.values() if isinstance(of, dict))]:
        return Refusal(
            reason="rope of type dynamic: in texts beyond max_position_embeddings it turns by unscaled angles",
            way_out="Give the config a rope_type that does not depend on the length (yarn, linear), or use --to hub.",
        )
    kinds = list(getattr(config, "layer_types", None) or ())
    if config.model_type in _WINDOWS_IN_ALL_OR_NONE:
        known = len(set(kinds)) <= 1
    elif config.model_type == "gpt_oss":
        known = kinds == [("sliding_attention", "full_attention")[i % 2] for i in range(len(kinds))]
    else:
        known = True
    if known:
        return None
    return Refusal(
        reason=f"it does not look at the layer_types of {config.model_type}, and gives windows to other layers than "
        "these",
        way_out="Use --to hub.",
    )
