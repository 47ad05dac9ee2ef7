"""GGUF for llama.cpp: heads of Llama-like parents, MLA as `deepseek2`; weights in their own type, tokenizer included.

Takes stock classes: a uniform GQA as it is, what `--to native` wrote otherwise. Quantise the file with llama.cpp.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..checkpoints.files import Checkpoint
from ..checkpoints.gguf import package as _gguf
from ..checkpoints.storage import check_whole
from ..errors import CheckpointError, PlanError
from ..planning.targets import NATIVE, OWN_CODES, Refusal, Subject, Way, in_full, refused_as_native, stored_otherwise
from ..runtime.codecs import CODECS
from ..runtime.layout import Codec, LayerPlan
from . import deepseek, parent_class
from .gguf_tokens import tokens_of
from .llama_cpp import LlamaCpp
from .parity import TOLERANCE, Ask, Parity, answers_of
from .target import Source, Written

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "DeepseekV3ForCausalLM": "deepseek2",
}
FILE = "model.gguf"
CACHE_TYPES: dict[float | None, str] = {8: "q8_0", 5: "q5_0", 4: "q4_0"}
"""Bits of a number -> what llama.cpp calls codes of so many, in groups of 32, which it turns first (Hadamard)."""


@dataclass(frozen=True, kw_only=True)
class Gguf:
    """One file for llama.cpp, from a stock class."""

    engine: ClassVar[str] = "llama.cpp"

    python: str | None = field(
        default=None,
        metadata={
            "help": "interpreter of the environment that has llama-cpp-python; default: that which "
            "SURGERY_LLAMA_PYTHON names, else this one. Without it the file is read back by the gguf package alone."
        },
    )

    def judge(self, subject: Subject) -> Way | Refusal:
        """Say whether llama.cpp has a graph for the result, as it is or as the stock class that `--to native` writes.

        Judged in `check`: the tokenizer beside the weights.
        """
        if subject.native:
            return refused_as_native(subject) or _stock_refusal(subject) or Way(by=NATIVE)
        none = Refusal(
            reason=f"no graph for Surgery{subject.architecture}",
            way_out="Where all layers keep heads of their own, or all keep latents of mla, --to native writes a stock "
            "class; export that. Others stay with --to hub.",
        )
        types = _cache_types(subject.plans)
        if isinstance(types, Refusal):
            return types
        subject = in_full(subject)
        if subject.caches_heads:
            native = parent_class.judge(subject)
        elif subject.caches_latents:
            native = deepseek.judge(subject, norm="calibrated", pad=True)
        else:
            return none
        if isinstance(native, Refusal):
            return native
        if types is not None:
            options = _options(types)
            none = replace(none, way_out=f"--to native writes a stock class; export that, and run it with {options}.")
        return _stock_refusal(subject) or Way(by=native.by if types is None else OWN_CODES, before=none)

    def check(self, source: Source) -> None:
        """Refuse a missing gguf package, and a tokenizer that llama.cpp has not."""
        _gguf()
        if source.folder is not None:
            tokens_of(source.folder, source.config.vocab_size)

    def write(self, source: Source, folder: Path) -> Written:
        """Write one file."""
        gguf = _gguf()
        name = ARCHITECTURES[source.architecture]
        config = source.config
        writer = gguf.GGUFWriter(folder / FILE, name)
        _add_settings(writer, config, name)
        with _tokenizer_folder(source) as at:
            tokens = tokens_of(at, config.vocab_size)
            tokens.write(writer, config)
        tensors = list(_tensors(source, name))
        for key, shape, dtype, _ in tensors:
            size = int(np.prod(shape)) * (4 if dtype == torch.float32 else 2)
            writer.add_tensor_info(key, shape, np.float32, size, raw_dtype=_TYPES[dtype]())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, _, dtype, make in tensors:
            writer.write_tensor_data(_numpy(make(), dtype))
        writer.close()
        size = (folder / FILE).stat().st_size
        facts = {"architecture": name, "tensors": len(tensors), "bytes": size, "tokenizer": tokens.kind}
        lines, command = [f"{len(tensors)} tensors; tokenizer: {tokens.says}"], f"llama-cli -m FOLDER_OR_ID/{FILE}"
        types = recommended_types(source.provenance)
        if types is not None:
            facts["cache_types"] = list(types)
            command += f" {_options(types)}"
            lines.append(f"cache: in full unless llama.cpp is run with {_options(types)}, its own codes of those bits")
        return Written(architecture=name, facts=facts, lines=tuple(lines), loading=(("llama.cpp", command),))

    def parity(self, source: Source, folder: Path) -> Parity:
        """Read every tensor back; then ask llama.cpp, where it is."""
        count = _read_back(source, folder / FILE)
        _check_added_tokens(source, folder / FILE)
        engine = LlamaCpp.find(self.python)
        if engine is None:
            return Parity(
                engine=f"the gguf reader ({count} tensors equal; not loaded: no llama-cpp-python here)",
                logit_difference=None, relative_difference=None, equal_greedy_tokens=0, greedy_tokens=0,
            )  # fmt: skip
        model = source.model
        ask = Ask.of_vocabulary(source.config.vocab_size, source.config.max_position_embeddings)
        parity = engine.compare(answers_of(model, ask), folder / FILE, ask, model)
        # llama.cpp rounds what enters each product to the type of the weights: bfloat16 errs once more.
        return parity.require(2 * TOLERANCE[model.dtype], same_tokens=model.dtype == torch.float32)


def recommended_types(provenance: Mapping[str, Any]) -> tuple[str, str] | None:
    """llama.cpp's types of caches of keys and values with the bits that the recipe asks for; None where it has none.

    Args:
        provenance: of a stock class, which `--to native` wrote: its plan is not there any more.
    """
    steps = [s for s in (provenance.get("recipe") or {}).get("steps", ()) if s.get("rewriter") == "quantise"]
    if len(steps) != 1 or steps[0].get("layers") is not None or steps[0].get("bits", "equal") != "equal":
        return None
    kind = CODECS.get(steps[0].get("codec", "int4"))
    k_bits = steps[0].get("k_bits") or (kind.default if kind else None)
    found = CACHE_TYPES.get(k_bits), CACHE_TYPES.get(steps[0].get("v_bits") or k_bits)
    return None if None in found else found  # type: ignore[return-value]


def _cache_types(plans: Sequence[LayerPlan]) -> tuple[str, str] | Refusal | None:
    """Types of caches of keys and of values for what is stored as codes; None where nothing is."""
    owners = [plan for plan in plans if plan.owns_cache]
    for plan in owners:
        other = stored_otherwise(plan)
        if other is None:
            continue
        bits = {plan.store.k_bits, plan.store.v_bits} - {None} if isinstance(plan.store, Codec) else {None}
        if not bits <= CACHE_TYPES.keys():
            return Refusal(reason=f"layer {plan.layer} {other}; its own caches have codes of 8, 5 and 4 bits")
        unlike = next((p for p in owners if p.store != plan.store), None)
        if unlike is not None:
            said = stored_otherwise(unlike) or f"is stored as {unlike.dtype}"
            return Refusal(reason=f"layer {plan.layer} {other}, layer {unlike.layer} {said}; it has one type for all")
    store = owners[0].store
    if not isinstance(store, Codec):
        return None
    return CACHE_TYPES[store.k_bits], CACHE_TYPES[store.k_bits if store.v_bits is None else store.v_bits]


def _options(types: tuple[str, str]) -> str:
    return f"--cache-type-k {types[0]} --cache-type-v {types[1]}"


_TYPES: dict[torch.dtype, Callable[[], Any]] = {
    torch.float32: lambda: _gguf().GGMLQuantizationType.F32,
    torch.float16: lambda: _gguf().GGMLQuantizationType.F16,
    torch.bfloat16: lambda: _gguf().GGMLQuantizationType.BF16,
}


def _stock_refusal(subject: Subject) -> Refusal | None:
    """Look for an architecture, and settings, that llama.cpp's graphs do not compute."""
    if subject.architecture not in ARCHITECTURES:
        return Refusal(
            reason=f"{subject.architecture} is not among {', '.join(ARCHITECTURES)}",
            way_out="llama.cpp's own converter may read the folder as it reads the parent's.",
        )
    config = subject.config
    rope = dict(config.rope_parameters or {})
    kind = rope.get("rope_type", "default")
    deepseek_v3 = ARCHITECTURES[subject.architecture] == "deepseek2"
    allowed = ("default", "llama3") if subject.architecture == "LlamaForCausalLM" else ("default",)
    window = getattr(config, "sliding_window", None)
    wide = (
        subject.architecture == "Qwen2ForCausalLM"
        and _head_dim(config) * config.num_attention_heads != config.hidden_size
    )
    for found, what, way in (
        (kind not in allowed, f"rope of type {kind}", "For mla, use --to native --pad."),
        (deepseek_v3 and config.attention_bias, "biases on its latents", "Use --to native --norm calibrated --pad."),
        (window is not None and window < config.max_position_embeddings, f"a window of {window} tokens", ""),
        (config.hidden_act != "silu", f"{config.hidden_act} in its MLP", ""),
        (wide, f"heads of {_head_dim(config)}, which is not hidden size over heads,", ""),
    ):
        if found:
            return Refusal(reason=f"the model has {what}, which llama.cpp's graph has not", way_out=way)
    return None


def _add_settings(writer: Any, config: Any, name: str) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(float(dict(config.rope_parameters or {}).get("rope_theta", 10000.0)))
    writer.add_vocab_size(config.vocab_size)
    if name != "deepseek2":
        head_dim = _head_dim(config)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
        writer.add_rope_dimension_count(head_dim)
        return
    if _needs_query_latent(config):
        writer.add_q_lora_rank(config.hidden_size)
    rank, rope = config.kv_lora_rank, config.qk_rope_head_dim
    writer.add_head_count_kv(1)
    writer.add_kv_lora_rank(rank)
    writer.add_key_length(rank + rope)
    writer.add_value_length(rank)
    writer.add_key_length_mla(config.qk_nope_head_dim + rope)
    writer.add_value_length_mla(config.v_head_dim)
    writer.add_rope_dimension_count(rope)
    writer.add_leading_dense_block_count(config.num_hidden_layers)
    writer.add_expert_feed_forward_length(config.intermediate_size)
    writer.add_expert_count(0)
    writer.add_expert_used_count(0)
    writer.add_expert_shared_count(0)
    writer.add_expert_weights_scale(1.0)


Made = tuple[str, tuple[int, ...], torch.dtype, Callable[[], Tensor]]
"""Name in the file, shape, type, and what reads the tensor."""


def _tensors(source: Source, name: str) -> Iterator[Made]:
    """The file's tensors, each read when it is written."""
    config = source.config
    names = _gguf().get_tensor_name_map(_arch(name), config.num_hidden_layers)
    if source.folder is not None:
        checkpoint = Checkpoint(source.folder)
        # Files may hold more than the class loads: rotary tables, position ids, layers that predict further tokens.
        used = {name for parts in check_whole(checkpoint).origins.values() for name in parts}
        found: dict[str, Callable[[], Tensor]] = {n: lambda n=n: checkpoint.get(n) for n in sorted(used)}  # type: ignore[misc]
        shapes = {n: checkpoint.shape(n) for n in found}
        dtypes = {n: checkpoint.weight_dtype(n) or torch.int64 for n in found}
    else:
        state = source.model.state_dict()
        found = {n: lambda n=n: state[n].detach().cpu() for n in state}  # type: ignore[misc]
        shapes, dtypes = ({n: tuple(t.shape) for n, t in state.items()}, {n: t.dtype for n, t in state.items()})
    for old, read in found.items():
        if old == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if dtypes[old] not in _TYPES:
            raise PlanError(f"GGUF: {old} is of type {dtypes[old]}, for which llama.cpp's graph has no place.")
        dtype = torch.float32 if len(shapes[old]) == 1 else dtypes[old]
        if old.endswith("kv_b_proj.weight"):
            yield from _latent_maps(old, read, config, dtype)
            continue
        if old.endswith("q_proj.weight") and _needs_query_latent(config):
            yield from _query_latent(old, read, found[old.replace("self_attn.q_proj", "input_layernorm")], config)
            continue
        new = names.get_name(old, try_suffixes=(".weight", ".bias"))
        if new is None:
            raise PlanError(f"GGUF: no place for {old} in {name}.")
        if name == "llama" and ".self_attn." in old and old.split(".")[-2] in ("q_proj", "k_proj"):
            heads = config.num_attention_heads if ".q_proj." in old else config.num_key_value_heads
            yield new, shapes[old], dtype, lambda read=read, heads=heads: _pairs(read(), heads)  # type: ignore[misc]
        else:
            yield new, shapes[old], dtype, read
    factors = _llama3_factors(config)
    if factors is not None:
        yield "rope_freqs.weight", tuple(factors.shape), torch.float32, lambda: factors


def _arch(name: str) -> Any:
    gguf = _gguf()
    return next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _pairs(rows: Tensor, heads: int) -> Tensor:
    """Rotated halves (j, j + H/2) to neighbours (2j, 2j + 1): llama.cpp's `llama` turns those."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _latent_maps(old: str, read: Callable[[], Tensor], config: Any, dtype: torch.dtype) -> Iterator[Made]:
    """`kv_b_proj` as two: K's map transposed per head, [N, R, H], and V's, [N, V, R]."""
    layer = old.split(".")[2]
    N, H, V, R = config.num_attention_heads, config.qk_nope_head_dim, config.v_head_dim, config.kv_lora_rank

    def part(keys: bool) -> Tensor:
        k_NHR, v_NVR = read().unflatten(0, (N, H + V)).split([H, V], 1)
        return (k_NHR.transpose(1, 2) if keys else v_NVR).contiguous()

    yield f"blk.{layer}.attn_k_b.weight", (N, R, H), dtype, lambda: part(True)
    yield f"blk.{layer}.attn_v_b.weight", (N, V, R), dtype, lambda: part(False)


def _needs_query_latent(config: Any) -> bool:
    """llama.cpp's `deepseek2` has queries without a latent in models of 26 and 27 layers only (DeepSeek-V2-Lite's)."""
    return (
        config.model_type == "deepseek_v3" and config.q_lora_rank is None and config.num_hidden_layers not in (26, 27)
    )


def _query_latent(old: str, read: Callable[[], Tensor], gain: Callable[[], Tensor], config: Any) -> Iterator[Made]:
    """`q_proj` after a latent as wide as the input: undoing the gain of the input's norm leaves numbers whose mean
    square is 1, which the norm on the latent does not change. In float32."""
    layer, D = old.split(".")[2], config.hidden_size
    rows = config.num_attention_heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
    blk = f"blk.{layer}.attn_q_"
    yield f"{blk}a.weight", (D, D), torch.float32, lambda: torch.diag(_gain(gain, layer).reciprocal())
    yield f"{blk}a_norm.weight", (D,), torch.float32, lambda: torch.ones(D)
    yield f"{blk}b.weight", (rows, D), torch.float32, lambda: read().float() * _gain(gain, layer)


def _gain(read: Callable[[], Tensor], layer: str) -> Tensor:
    gain = read().float()
    if float(gain.abs().min()) < 1e-6:
        raise PlanError(
            f"GGUF: layer {layer} has gains of 0 on its input, and llama.cpp's deepseek2 needs their inverse."
        )
    return gain


def _llama3_factors(config: Any) -> Tensor | None:
    """Plain frequencies over those of llama3's rope, [H/2]; None for plain rope."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = dict(config.rope_parameters or {})
    if rope.get("rope_type", "default") == "default":
        return None
    found = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, device=torch.device("cpu"))[0].double()
    plain = rope["rope_theta"] ** -(torch.arange(len(found), dtype=torch.float64) / len(found))
    return (plain / found).float()


def _numpy(tensor: Tensor, dtype: torch.dtype) -> Any:
    tensor = tensor.to(dtype).contiguous()
    return tensor.view(torch.int16).numpy() if dtype == torch.bfloat16 else tensor.numpy()


def _read_back(source: Source, file: Path) -> int:
    """Compare each tensor of the file, bit by bit, with what was to be written.

    Raises:
        CheckpointError: one differs; names it.
    """
    reader = _gguf().GGUFReader(file)
    found = {tensor.name: tensor for tensor in reader.tensors}
    wanted = list(_tensors(source, ARCHITECTURES[source.architecture]))
    if sorted(found) != sorted(name for name, *_ in wanted):
        raise CheckpointError(f"{file.name}: holds other tensors than were written. Nothing was written.")
    for name, shape, dtype, make in wanted:
        tensor, want = found[name], _numpy(make(), dtype)
        same_shape = tuple(int(n) for n in tensor.shape) == tuple(reversed(shape))
        if not same_shape or np.ascontiguousarray(tensor.data).tobytes() != want.tobytes():
            raise CheckpointError(f"{file.name}: {name} reads back otherwise than it was written. Nothing was written.")
    return len(wanted)


def _check_added_tokens(source: Source, file: Path) -> None:
    """Compare each token that was added to the tokenizer's vocabulary (chat markers) with what the file has at its id.

    Raises:
        CheckpointError: the file has another text there, or holds it as text to be split like any other.
    """
    if source.tokenizer is None:
        return
    fields = _gguf().GGUFReader(file).fields
    tokens, types = (fields.get(f"tokenizer.ggml.{name}") for name in ("tokens", "token_type"))
    if tokens is None or types is None:
        return
    for text, number in source.tokenizer.get_added_vocab().items():
        if number >= len(tokens.data):
            continue  # without an embedding: left out, and said so
        found = bytes(tokens.parts[tokens.data[number]]).decode("utf-8", "replace")
        kind = int(types.parts[types.data[number]][0])
        if found != text or kind not in (_gguf().TokenType.CONTROL, _gguf().TokenType.USER_DEFINED,
                                         _gguf().TokenType.UNKNOWN):  # fmt: skip
            raise CheckpointError(
                f"{file.name}: token {number} is {text!r} in the tokenizer, and {found!r} "
                f"({_gguf().TokenType(kind).name.lower()}) in the file. Nothing was written."
            )


@contextlib.contextmanager
def _tokenizer_folder(source: Source) -> Iterator[Path]:
    """The folder of the source, or for a model in memory one that its tokenizer is saved in meanwhile."""
    if source.folder is not None:
        yield source.folder
        return
    with tempfile.TemporaryDirectory(prefix="surgery-gguf-") as scratch:
        if source.tokenizer is not None:
            source.tokenizer.save_pretrained(scratch)
        yield Path(scratch)
