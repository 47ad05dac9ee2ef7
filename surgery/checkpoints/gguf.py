"""GGUF files as parents: what a file says of its model, and what transformers would make of it otherwise than it says.

transformers reads the settings that it knows, and leaves out all others without a word. Here each setting of the
architecture is taken over, refused by name, or told in a note.
"""

from __future__ import annotations

import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import AutoConfig

from ..errors import CheckpointError, PlanError, UnsupportedModel
from .classes import model_class, plain_config

TESTED = "0.19"
"""Version of the package gguf."""
ORIGINAL = "Give the checkpoint that it was made from (safetensors)."
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_ENCODERS = ("bert", "nomic-bert", "jina-bert", "modern-bert", "neo-bert", "t5encoder", "gemma-embedding")
_ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_ROPE_FACTORS = ("rope.scaling.factor", "rope.scale_linear")
"""The second is what it was called before."""
_READ = {
    "context_length", "embedding_length", "block_count", "feed_forward_length", "vocab_size", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "attention.value_length", "attention.layer_norm_epsilon",
    "attention.layer_norm_rms_epsilon", "attention.sliding_window", "rope.dimension_count", "rope.freq_base",
    "rope.dimension_sections", "rope.scaling.type", *_ROPE_FACTORS, "rope.scaling.attn_factor",
    "rope.scaling.original_context_length", "rope.scaling.finetuned", "attn_logit_softcapping",
    "final_logit_softcapping", "expert_count", "expert_used_count", "expert_feed_forward_length",
    "expert_shared_feed_forward_length", "expert_gating_func", "use_parallel_residual", "tensor_data_layout",
    "attention.causal", "shortconv.l_cache", "full_attention_interval", "nextn_predict_layers", "ssm.conv_kernel",
    "ssm.state_size", "ssm.group_count", "ssm.time_step_rank", "ssm.inner_size", "attention.max_alibi_bias",
}  # fmt: skip
"""Settings of an architecture that transformers reads, or that are read or judged here, or that change no answer."""


def package() -> Any:
    """The package gguf.

    Raises:
        PlanError: it is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise PlanError(
            f"GGUF needs the package gguf, which is not installed (tested: {TESTED}). pip install 'kv-surgery[gguf]'."
        ) from None
    return gguf


@dataclass(frozen=True, kw_only=True)
class Gguf:
    """The header of a GGUF file: settings, tensors by name, tokenizer; no weight is read."""

    file: Path
    settings: dict[str, Any]
    """All keys but the vocabulary's lists."""
    shapes: dict[str, tuple[int, ...]]
    """Of each tensor, outermost dimension first."""
    types: dict[str, str]
    """Of each tensor, as GGUF spells it (`F32`, `Q4_K`)."""
    tokens: list[str]
    token_types: list[int]
    rope_factors: Tensor | None
    """Plain rotary frequencies over those of the model, [rotated dims / 2]."""

    @classmethod
    def read(cls, file: Path) -> Gguf:
        """Read the header of a file, and refuse what is no whole model.

        Raises:
            CheckpointError: not a GGUF, cut short, or one of several parts.
            UnsupportedModel: no decoder.
        """
        reader = _reader(file)
        fields = {name: value for name, value in reader.fields.items() if not name.startswith("GGUF.")}
        lists = ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type")
        long = (*lists, "tokenizer.ggml.scores", "tokenizer.ggml.merges", "tokenizer.ggml.precompiled_charsmap")
        settings = {name: value.contents() for name, value in fields.items() if name not in long}
        tokens, types = (fields[name].contents() if name in fields else [] for name in lists)
        factors = next((tensor for tensor in reader.tensors if tensor.name == "rope_freqs.weight"), None)
        found = cls(
            file=file,
            settings=settings,
            shapes={tensor.name: tuple(int(n) for n in reversed(tensor.shape)) for tensor in reader.tensors},
            types={tensor.name: tensor.tensor_type.name for tensor in reader.tensors},
            tokens=tokens,
            token_types=types,
            rope_factors=None if factors is None else torch.from_numpy(np.array(factors.data, dtype=np.float32)),
        )
        found._check_kind()
        return found

    @property
    def architecture(self) -> str:
        """As GGUF calls it."""
        return str(self.settings.get("general.architecture", ""))

    @property
    def dtype(self) -> torch.dtype | None:
        """Type of the file's matrices where it is one of floating-point numbers; None where they are quantised."""
        kinds = {self.types[name] for name, shape in self.shapes.items() if len(shape) > 1}
        return _FLOATS[kinds.pop()] if len(kinds) == 1 and kinds <= set(_FLOATS) else None

    @property
    def weights(self) -> dict[str, int]:
        """How many numbers each tensor of weights has, by its name."""
        return {name: int(np.prod(shape)) for name, shape in self.shapes.items() if not name.startswith("rope_")}

    def get(self, name: str) -> Any:
        """A setting of the architecture; None where the file has none."""
        return self.settings.get(f"{self.architecture}.{name}")

    def rope_scaling(self) -> str | None:
        """The tensors and the setting by which it scales its rotary frequencies; None where it does not."""
        kind = self.get("rope.scaling.type")
        found = [name for name in _ROPE_TENSORS if name in self.shapes]
        if kind is None:  # a factor alone is linear to llama.cpp
            found += [f"{name} {self.get(name)}" for name in _ROPE_FACTORS if self.get(name) not in (None, 0.0, 1.0)]
        elif kind != "none":
            found.append(f"rope.scaling.type {kind}")
        return ", ".join(found) or None

    def facts(self) -> dict[str, Any]:
        """What a provenance tells of the file."""
        return {"file": str(self.file), "architecture": self.architecture, "types": dict(Counter(self.types.values()))}

    def _check_kind(self) -> None:
        where, kind = self.file, self.architecture
        parts = self.settings.get("split.count") or 0
        if parts > 1:
            raise CheckpointError(
                f"{where}: is one of {parts} parts. Join them by llama.cpp's `llama-gguf-split --merge FIRST WHOLE`. "
                "Give the whole."
            )
        if self.settings.get("general.type", "model") != "model" or kind == "clip":
            raise UnsupportedModel(
                f"{where}: holds no language model ({self.settings.get('general.type')}, {kind}). Give the file that "
                "goes with it."
            )
        if kind in _ENCODERS or self.get("attention.causal") is False:
            raise UnsupportedModel(
                f"{where}: is an encoder ({kind}), which keeps no KV cache. This library converts decoders."
            )

    def refuse(self, what: str) -> UnsupportedModel:
        """The error for a setting that the model's class in transformers cannot say."""
        return UnsupportedModel(f"{self.file}: {what}. {ORIGINAL}")


def _reader(file: Path) -> Any:
    gguf = package()
    try:
        with file.open("rb") as stream:
            head = stream.read(8)
        if head[:4] != b"GGUF":
            raise CheckpointError(f"{file}: does not begin as a GGUF does. Fetch the file again.")
        return gguf.GGUFReader(file)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror or error}).") from None
    except (ValueError, IndexError, KeyError, UnicodeDecodeError, OverflowError, MemoryError, struct.error) as error:
        raise CheckpointError(f"{file}: damaged or cut short ({_first_line(error)}). Fetch the file again.") from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def config_of(file: Gguf) -> tuple[Any, list[str]]:
    """The config of the model, by transformers' reading of the file and with what that leaves out.

    Returns:
        Config, and in sentences what the file does not hold as the checkpoint did that it was made from.

    Raises:
        UnsupportedModel: transformers does not read this family, or its class cannot say a setting.
    """
    try:
        config = AutoConfig.from_pretrained(str(file.file.parent), gguf_file=file.file.name)
    except (ValueError, KeyError, NotImplementedError, TypeError, OSError) as error:
        raise UnsupportedModel(
            f"{file.file}: is of the family {file.architecture}, which transformers {transformers.__version__} does "
            f"not read from a GGUF ({_first_line(error)}). {ORIGINAL}"
        ) from None
    if config.is_encoder_decoder:
        raise UnsupportedModel(
            f"{file.file}: is an encoder-decoder ({file.architecture}). This library converts decoders."
        )
    config = plain_config(config)
    notes: list[str] = []
    for take in (_exact_eps, _take_sizes, _take_heads, _take_scale, _take_biases, _take_rope, _take_window, _take_caps):
        notes += take(file, config)
    config.architectures = [model_class(config).__name__]
    if file.dtype is None:
        held = ", ".join(f"{count} {kind}" for kind, count in Counter(file.types.values()).most_common())
        notes.append(
            f"its tensors are quantised ({held}) and are unpacked as they are: the parent is the quantised model, not "
            "the one that it was made from"
        )
    for name, value in file.settings.items():
        if name.startswith(f"{file.architecture}.") and name.removeprefix(f"{file.architecture}.") not in _READ:
            notes.append(f"nothing reads its setting {name} = {value}")
    return config, notes


# What transformers leaves out of a config. Each function amends it, and returns notes.


def _exact_eps(_: Gguf, config: Any) -> list[str]:
    """Norms' epsilon: the file has it in float32, of which the shortest decimal is what a config says."""
    for name, value in vars(config).items():
        if isinstance(value, float) and name.endswith(("eps", "epsilon")):
            setattr(config, name, float(str(np.float32(value))))
    return []


def _take_sizes(file: Gguf, config: Any) -> list[str]:
    """Rows of the embeddings, positions, and no padding token beyond the rows, which some classes have by default."""
    embeddings, positions = file.shapes.get("token_embd.weight"), file.get("context_length")
    if embeddings:
        config.vocab_size = embeddings[0]
    if positions and hasattr(config, "max_position_embeddings"):
        config.max_position_embeddings = int(positions)
    if (getattr(config, "pad_token_id", None) or 0) >= config.vocab_size:
        config.pad_token_id = None
    return []


def _take_scale(file: Gguf, config: Any) -> list[str]:
    """What scores are divided by, where a class has a setting for it: no file holds that, and llama.cpp knows it."""
    if not hasattr(config, "query_pre_attn_scalar"):
        return []
    is_27b = (file.architecture, config.num_hidden_layers) in (("gemma2", 46), ("gemma3", 62))
    config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads if is_27b else _head_dim(config)
    return [f"its query_pre_attn_scalar is not in the file; {config.query_pre_attn_scalar} is taken, as by llama.cpp"]


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _take_heads(file: Gguf, config: Any) -> list[str]:
    for name in ("attention.key_length", "attention.value_length"):
        wide = file.get(name)
        if wide is None or not isinstance(wide, int) or wide == getattr(config, "global_head_dim", None):
            continue
        if _head_dim(config) != wide and name == "attention.key_length" and hasattr(config, "head_dim"):
            config.head_dim = wide
        if _head_dim(config) != wide:
            raise file.refuse(f"{name} is {wide}, and {type(config).__name__} has heads of {_head_dim(config)}")
    return []


_BIASES = {"attn_q.bias": ("attention_bias", "use_qkv_bias", "qkv_bias"), "ffn_up.bias": ("mlp_bias",)}
"""Tensors of layer 0 -> settings that say that a class has them."""


def _take_biases(file: Gguf, config: Any) -> list[str]:
    for tensor, names in _BIASES.items():
        for name in names:
            if hasattr(config, name):
                setattr(config, name, f"blk.0.{tensor}" in file.shapes)
    return []


def _take_window(file: Gguf, config: Any) -> list[str]:
    window = file.get("attention.sliding_window")
    if not window or getattr(config, "sliding_window", None) == window:
        return []
    if hasattr(config, "sliding_window") and not hasattr(config, "use_sliding_window"):
        config.sliding_window = window
    elif window < (file.get("context_length") or 0):
        raise file.refuse(f"attends to {window} tokens at most, which {type(config).__name__} cannot say")
    return []


def _take_caps(file: Gguf, config: Any) -> list[str]:
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        cap = file.get(name)
        if cap and not hasattr(config, name):
            raise file.refuse(f"has {name} = {cap}, which {type(config).__name__} cannot say")
        if cap:
            setattr(config, name, cap)
    return []


def _take_rope(file: Gguf, config: Any) -> list[str]:
    """Base, rotated share and scaling of the rotary embedding."""
    whole = getattr(config, "rope_parameters", None)
    if whole is None:
        return []
    rope = whole.get("full_attention", whole)
    base, rotated = file.get("rope.freq_base"), file.get("rope.dimension_count")
    if base is not None and "rope_theta" in rope:
        rope["rope_theta"] = float(base)
    share = rope.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", 1.0))
    if rotated is not None and int(_head_dim(config) * share) != rotated and not hasattr(config, "global_head_dim"):
        if "partial_rotary_factor" not in rope and not hasattr(config, "partial_rotary_factor"):
            raise file.refuse(f"rotates {rotated} of {_head_dim(config)} dims per head, which {type(config).__name__} "
                              "cannot say")  # fmt: skip
        rope["partial_rotary_factor"] = rotated / _head_dim(config)
    scaling = file.rope_scaling()
    if scaling is None or rope.get("rope_type", "default") != "default":
        return []
    plain = rope is whole and file.rope_factors is not None and scaling in _ROPE_TENSORS
    found = llama3_rope(file.rope_factors, config) if plain else None  # type: ignore[arg-type]
    if found is None:
        raise file.refuse(f"scales its rotary frequencies ({scaling}) otherwise than llama3 does; transformers leaves "
                          "that out")  # fmt: skip
    config.rope_parameters = found
    return [
        f"its scaled rotary frequencies are read as rope_parameters of llama3 (factor {found['factor']:g}), which give "
        "the same numbers; the parameters themselves are not in the file"
    ]


def llama3_rope(factors: Tensor, config: Any) -> dict[str, Any] | None:
    """The `rope_parameters` of llama3 that give these factors to 1e-5; None where there are none.

    Between two wavelengths the inverse factors are linear in the frequency: that line gives the parameters. Only the
    ratios of `original_max_position_embeddings` to the others count, so that `low_freq_factor` is taken to be 1.

    Args:
        factors: plain frequencies over those of the model, [rotated dims / 2].
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    base, factor = config.rope_parameters["rope_theta"], round(float(factors.max()), 4)
    wanted = factors.double()
    plain = base ** -(torch.arange(len(wanted), dtype=torch.float64) / len(wanted))
    guesses = [(4.0, float(2**power)) for power in range(5, 20)]
    middle = (wanted > 1 + 1e-4) & (wanted < factor * (1 - 1e-4))
    if middle.sum() >= 2:
        smooth = (1 / wanted[middle] - 1 / factor) / (1 - 1 / factor)
        lines = torch.stack([plain[middle] / (2 * torch.pi), -torch.ones_like(smooth)], 1)
        slope, start = torch.linalg.lstsq(lines, smooth[:, None]).solution[:, 0].tolist()
        if start > 0:
            guesses.append((round(1 + 1 / start, 4), float(round(slope / start))))
    for high, length in guesses:
        rope = {
            "rope_type": "llama3", "rope_theta": base, "factor": factor, "low_freq_factor": 1.0,
            "high_freq_factor": high, "original_max_position_embeddings": int(length),
        }  # fmt: skip
        trial = plain_config(config)
        trial.rope_parameters = rope
        if length < 1:
            continue
        found = ROPE_INIT_FUNCTIONS["llama3"](trial, device=torch.device("cpu"))[0].double()
        if len(found) == len(plain) and torch.allclose(plain / found, wanted, rtol=1e-5, atol=0):
            return rope
    return None


# A model that transformers loaded from a file
_COMPARED = ("sliding_window", "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping")


def check_loaded(file: Gguf, model: Any) -> None:
    """Refuse a model whose loader has left out what the file holds: rotary frequencies, settings, or tensors.

    Raises:
        UnsupportedModel: says what is missing.
    """
    where, config = f"{type(model).__name__}: {file.file.name}", model.config.get_text_config(decoder=True)
    rope = getattr(config, "rope_parameters", None) or {}
    parts = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    scaling = file.rope_scaling()
    if scaling is not None and all(part.get("rope_type", "default") == "default" for part in parts):
        raise UnsupportedModel(
            f"{where} scales its rotary frequencies ({scaling}), which transformers left out when it loaded the file: "
            "rope_type is default, and its answers are wrong. Pass the path of the file, the original checkpoint, or "
            "load the file with a config whose rope_parameters say so."
        )
    check_all_taken(file, model)
    if scaling is not None:
        return
    wanted, _ = config_of(file)
    pairs = {name: tuple(getattr(c, name, None) for c in (wanted, config)) for name in _COMPARED}
    theirs = getattr(wanted, "rope_parameters", None) or {}
    pairs |= {name: (theirs.get(name, 1.0), rope.get(name, 1.0)) for name in ("rope_theta", "partial_rotary_factor")}
    for name, (said, found) in pairs.items():
        if said != found:
            raise UnsupportedModel(
                f"{where} has {name} {said}, and the model {found}: transformers left that out when it loaded the "
                "file, and its answers are wrong. Pass the path of the file."
            )


def check_all_taken(file: Gguf, model: Any) -> list[str]:
    """Refuse a model that has not all the numbers of its file: transformers leaves out tensors it has no place for.

    Returns:
        Notes on tensors that are rightly left out.

    Raises:
        UnsupportedModel: names a tensor.
    """
    config, notes = model.config.get_text_config(decoder=True), []
    weights = file.weights
    if "output.weight" in weights and config.tie_word_embeddings:
        del weights["output.weight"]
        notes.append(f"its output.weight is left out: {type(model).__name__} takes the embeddings there")
    beyond = [name for name in weights if name.startswith("blk.") and _layer(name) >= config.num_hidden_layers]
    if beyond:
        notes.append(f"layers that predict further tokens are left out ({len(beyond)} tensors, such as {beyond[0]})")
        weights = {name: count for name, count in weights.items() if name not in beyond}
    found, taken = sum(weights.values()), sum(parameter.numel() for parameter in model.parameters())
    if found == taken:
        return notes
    gguf = package()
    arch = next((key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == file.architecture), None)
    known: set[str] = set()
    if arch is not None:
        places = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
        known = {str(places.get_name(name, (".weight", ".bias"))) for name, _ in model.named_parameters()}
    left = next((name for name in weights if name not in known), None)
    raise file.refuse(
        f"holds {found} numbers, of which transformers' {type(model).__name__} has {taken}"
        + (f": it has no place for {left}" if left and known else "")
    )


def _layer(name: str) -> int:
    number = name.split(".")[1]
    return int(number) if number.isdigit() else -1
