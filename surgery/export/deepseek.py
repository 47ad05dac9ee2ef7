"""MLA as the stock class of DeepSeek-V3: one of the two forms of the target `native`.

Of DeepSeek-V3 every layer is dense (`first_k_dense_replace` is the number of layers). What it asks for and how that is
met:

- Rotated rows are stored interleaved, pairs (2j, 2j+1).
- Scores are divided by sqrt(nope + rope): q is multiplied by the parent's scale times that.
- One rank and one set of frequencies for all layers: narrower layers are padded with zeros, which changes nothing but
  the cache. Frequencies that are no plain ladder of powers are written as `longrope` factors; transformers takes any.
- The RMSNorm on the latent is no identity. `neutral`: one more latent channel is a large constant M (a bias on
  `kv_a_proj_with_mqa`), so that the norm divides by M / sqrt(R) up to |c|²/2M². `calibrated`: one gain per channel,
  fitted to text, and where the rank has channels to spare (`pad`), they read what makes the norm nearly constant
  (`latent_norm`); an approximation that can be trained further in place.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, PreTrainedModel

from ..calibration.text import Windows, load_windows, read_windows
from ..errors import PlanError
from ..planning.parent_class import meta_model
from ..planning.targets import DEEPSEEK, Refusal, Subject, Way, stored_otherwise
from ..runtime.layout import AttentionSite, Latent, LayerPlan
from .latent_norm import CalibratedNorm, fit_norm, largest_latent, read_by_layers
from .parent_class import stock_config
from .target import STOCK_BYTES, Source, Written

Norm = Literal["neutral", "calibrated"]
ROOM = 2.0**11
"""The constant of a neutral norm over the largest latent: the norm then errs by 1e-7, less than float32 rounds."""
ENGINE_RANK, ENGINE_PAIRS = 512, 32
CHECKED_TOKENS = 64
LATENT_EPS = 1e-6
"""Of `kv_a_layernorm`: the class leaves its default there, whatever `rms_norm_eps` says."""

_SAME_FIELDS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "hidden_act", "rms_norm_eps",
                "initializer_range", "pad_token_id", "bos_token_id", "eos_token_id")  # fmt: skip
_CARRIES_NONE = "the calibrated form carries none"


@dataclass(frozen=True)
class _Layer:
    site: AttentionSite
    plan: Latent
    weights: dict[str, Tensor]
    """Of the layer's attention, under the runtime's names, float32."""
    snapped: dict[float, float] = field(default_factory=dict)
    """Frequencies as the export's ladder has them, where rounding told them apart."""

    def up(self, name: str) -> Tensor:
        """`k_up` [K, H, R] or `v_up` [K, V, R] over the whole latent."""
        p, keys = self.plan, name == "k_up"
        width = p.head_dim if keys else p.value_dim
        whole = torch.zeros(p.kv_heads, width, p.rank)
        if name in self.weights:
            part = slice(0, p.key_rank) if keys else slice(p.rank - p.value_rank, p.rank)
            whole[..., part] = self.weights[name]
        return whole

    @property
    def down(self) -> Tensor:
        """[R, D]: what makes the latents."""
        return self.weights["kv_down.weight"][: self.plan.rank]

    @property
    def latent_bias(self) -> Tensor | None:
        bias = self.weights.get("kv_down.bias")
        return None if bias is None else bias[: self.plan.rank]

    def frequencies(self) -> list[float]:
        if not self.plan.rope_dims:
            return []
        own = [float(f) for f in self.weights["rope_freq_bits"].view(torch.float32)]
        return [self.snapped.get(f, f) for f in own]


def judge(subject: Subject, norm: Norm, pad: bool) -> Way | Refusal:
    """Say whether DeepSeek-V3 can say a result, as far as its config and its plan tell."""
    config = subject.config.get_text_config()
    if len(subject.plans) != config.num_hidden_layers:
        return Refusal(
            reason=f"{len(subject.plans)} of {config.num_hidden_layers} layers have attention; DeepSeek-V3 has it in "
            "all"
        )
    layers = list(zip(subject.sites, subject.plans, strict=True))
    found = [_plan_refusal(plan) for plan in subject.plans] + [_site_refusal(site, norm, plan) for site, plan in layers]
    refused = next(filter(None, found), None) or _decoder_refusal(subject)
    if refused is None and pad:
        refused = _rope_refusal(subject.sites[0])
    return refused or Way(by=DEEPSEEK)


def check(model: PreTrainedModel, norm: Norm, text: Any, pad: bool) -> None:
    """Refuse options that do not go together, and what the weights have and the format has not.

    Raises:
        PlanError: names the part.
    """
    if norm not in ("neutral", "calibrated"):
        raise PlanError(f"norm {norm!r} is not known. Use neutral or calibrated.")
    if norm == "calibrated" and text is None:
        raise PlanError("norm calibrated fits its gains to text. Give a few hundred documents, or take norm neutral.")
    layers = _layers(model)
    for layer in layers:
        where = f"layer {layer.site.layer}"
        if "q_proj.bias" in layer.weights:
            raise PlanError(f"{where} has a bias on q: DeepSeek-V3 does not. Use --to hub.")
        biases = [name for name in ("kv_down.bias", "o_proj.bias") if name in layer.weights]
        if biases and norm == "calibrated":
            raise PlanError(f"{where} has {' and '.join(biases)}: {_CARRIES_NONE}. Use norm neutral.")
    _frequencies(layers, pad)


def write(source: Source, folder: Path, norm: Norm, text: Any, pad: bool) -> Written:
    """Write a `DeepseekV3ForCausalLM`."""
    model = source.model
    layers, windows = _layers(model), _windows(source, text)
    frequencies, layers = _frequencies(layers, pad)
    rank = max(layer.plan.rank for layer in layers) + (norm == "neutral")
    if pad:
        rank = max(rank, ENGINE_RANK)
    config = _config(model, layers, rank, frequencies, norm)
    # Of all layers; above what the conversion has where layers were padded.
    numbers = len(layers) * (rank + 2 * len(frequencies))
    cached = numbers * model.dtype.itemsize
    config.surgery = {**source.provenance, STOCK_BYTES: cached}
    tensors = {name: t for name, t in model.state_dict().items() if ".self_attn." not in name}
    spread: list[float] = []
    read = read_by_layers(model, [layer.site for layer in layers], windows)
    for i, (layer, x) in enumerate(zip(layers, read, strict=True)):
        steering: CalibratedNorm | float
        if norm == "calibrated":
            steering = fit_norm(x, layer.down, tensors[f"model.layers.{i}.input_layernorm.weight"].cpu(), rank)
            spread.append(steering.spread)
        else:
            steering = largest_latent(x, layer.down, layer.latent_bias)
        made = _attention(layer, rank, frequencies, config, steering)
        tensors |= {f"model.layers.{i}.self_attn.{name}": tensor for name, tensor in made.items()}
    child = _build(config, tensors, model.dtype)
    child.generation_config = model.generation_config
    child.save_pretrained(folder)
    source.write_companions(folder)
    facts = {
        "norm": norm,
        "rank": rank,  # of every layer, the constant channel included
        "rope_dims": 2 * len(frequencies),
        "rope_type": _rope_type(config),
        **({"norm_spread": max(spread)} if spread else {}),
        "numbers_per_token": numbers,
        "planned_numbers_per_token": sum(layer.plan.dims for layer in layers),
    }
    lines = (
        f"norm {norm}, latent {rank} + {facts['rope_dims']} per layer, rope {facts['rope_type']}",
        f"cache: {facts['numbers_per_token']} numbers per token (the conversion has "
        f"{facts['planned_numbers_per_token']})",
        *_notes(config, norm, spread),
    )
    return Written(architecture="DeepseekV3ForCausalLM", facts=facts, lines=lines, bytes_per_token=cached)


def _layers(model: PreTrainedModel) -> list[_Layer]:
    found = []
    for entry in model.config.surgery["layers"]:
        site, plan = AttentionSite.from_dict(entry["site"]), LayerPlan.from_dict(entry["plan"])
        assert isinstance(plan.project, Latent)
        weights = {name: t.detach().cpu() for name, t in model.get_submodule(site.module).state_dict().items()}
        weights = {name: t.float() if t.is_floating_point() else t for name, t in weights.items()}
        found.append(_Layer(site, plan.project, weights))
    return found


def _plan_refusal(plan: LayerPlan) -> Refusal | None:
    where, other = f"layer {plan.layer}", stored_otherwise(plan)
    if other is not None:
        return Refusal(reason=f"{where} {other}: no stock class does that")
    if not isinstance(plan.project, Latent):
        return Refusal(
            reason=f"{where} caches heads: DeepSeek-V3 has latents in all layers", way_out="Convert all of them by mla."
        )
    if plan.project.rotate_on_read:
        return Refusal(
            reason=f"{where} rotates keys at read (lowrank): no stock class does that", way_out="Convert by mla."
        )
    if plan.lenders:
        return Refusal(reason=f"{where} reads the cache of layer {plan.lenders[0]}: no stock class shares latents")
    if plan.retain is not None:
        return Refusal(reason=f"{where} averages or evicts tokens: no stock class does that")
    return None


def _site_refusal(site: AttentionSite, norm: Norm, plan: LayerPlan) -> Refusal | None:
    for found, what in (
        (site.softcap is not None, "caps its scores"),
        (site.sinks is not None, "has attention sinks"),
        (site.alibi_slopes is not None, "adds ALiBi slopes"),
        (site.window is not None, f"sees a window of {site.window} tokens"),
        (site.q_norm is not None, "norms its queries"),
        (site.gated_output, "gates its head outputs"),
        (site.q.bias is not None, "has a bias on q"),
    ):
        if found:
            return Refusal(reason=f"layer {site.layer} {what}: DeepSeek-V3 does not")
    means = isinstance(plan.project, Latent) and plan.project.means
    biases = [name for name, part in (("k", site.k), ("v", site.v), ("o", site.o)) if part.bias is not None]
    if (biases or means) and norm == "calibrated":
        has = f"biases on {', '.join(biases)}" if biases else "means of K and V"
        return Refusal(reason=f"layer {site.layer} has {has}: {_CARRIES_NONE}", way_out="Use norm neutral.")
    return None


def _decoder_refusal(subject: Subject) -> Refusal | None:
    """Compare the parameters around the attentions with those of DeepSeek-V3's dense layers."""
    wanted = ("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight",
              "input_layernorm.weight", "post_attention_layernorm.weight")  # fmt: skip
    known = {f"model.layers.{i}.{name}" for i in range(len(subject.plans)) for name in wanted}
    known |= {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    inside = tuple(f"{site.module}." for site in subject.sites)
    names = meta_model(stock_config(subject), subject.kind).state_dict()
    others = {name for name in names if not name.startswith(inside)}
    odd = sorted((others - known) | (known - others - {"lm_head.weight"}))
    if odd:
        return Refusal(
            reason=f"{subject.architecture} is built otherwise than DeepSeek-V3 (`{odd[0]}`): only Llama-like decoders "
            "fit"
        )
    missing = [name for name in _SAME_FIELDS if not hasattr(subject.config.get_text_config(), name)]
    if missing:
        return Refusal(
            reason=f"{subject.architecture}: its config has no {missing[0]}; only Llama-like decoders fit",
        )
    return None


def _rope_refusal(site: AttentionSite) -> Refusal | None:
    """Why `pad` has no ladder of plain rope to fill up; None where it has."""
    rotary = site.rotary
    if rotary is not None and _ladder(rotary.inv_freq) is not None and rotary.scaling == 1:
        return None
    return Refusal(
        reason="pad: the parent's own rope is not a plain one (`default`)",
        way_out="Leave out pad; transformers runs it.",
    )


def _union(ladders: Sequence[Sequence[float]]) -> list[float]:
    """Frequencies, each as often as the layer that has it most often; fastest first. One where no layer turns."""
    most: Counter[float] = Counter()
    for ladder in ladders:
        most |= Counter(ladder)
    return sorted(most.elements(), reverse=True) or [1.0]


def _frequencies(layers: list[_Layer], pad: bool) -> tuple[list[float], list[_Layer]]:
    """The frequencies of all layers in one, and the layers with theirs spelled as there.

    Raises:
        PlanError: `pad`, and they do not fit into the ladder of plain rope.
    """
    union = _union([layer.frequencies() for layer in layers])
    rotary = layers[0].site.rotary
    if not pad or not union:
        return union, layers
    theta = None if rotary is None else _ladder(rotary.inv_freq)
    assert rotary is not None and theta is not None, "judged by _rope_refusal"
    pairs = len(rotary.inv_freq)
    pairs = ENGINE_PAIRS if ENGINE_PAIRS % pairs == 0 else pairs
    ladder = [theta ** (-i / pairs) for i in range(pairs)]
    used = union if any(layer.frequencies() for layer in layers) else []
    nearest = {f: min(ladder, key=lambda step: abs(math.log(step / f))) for f in set(used)}
    if any(abs(step / f - 1) > 1e-5 for f, step in nearest.items()):
        raise PlanError(
            "pad: some rotated parts turn at frequencies that the parent has not (fold). Convert by fold: 1."
        )
    if len(used) > len(nearest):
        raise PlanError(
            f"pad: plain rope has each frequency once, and {len(used) - len(nearest)} rotated parts repeat one. "
            f"Convert by mla with selector: top and rope_dims of at most {2 * len(rotary.inv_freq)}."
        )
    return ladder, [replace(layer, snapped=nearest) for layer in layers]


def _ladder(frequencies: Sequence[float]) -> float | None:
    """theta where frequency i is theta^(-i / n); None for any other set."""
    n = len(frequencies)
    if n == 1 and frequencies[0] == 1:
        return 10000.0  # any: it names no second one
    if n < 2 or abs(frequencies[0] - 1) > 1e-6:
        return None
    theta = frequencies[1] ** -n
    return theta if all(abs(f * theta ** (i / n) - 1) < 1e-5 for i, f in enumerate(frequencies)) else None


def _config(
    model: PreTrainedModel, layers: Sequence[_Layer], rank: int, frequencies: Sequence[float], norm: Norm
) -> DeepseekV3Config:
    old, site = model.config.get_text_config(), layers[0].site
    theta, context = _ladder(frequencies), old.max_position_embeddings
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if theta is None:
        factors = [1 / f for f in frequencies]
        rope = {
            "rope_type": "longrope", "rope_theta": 1.0, "factor": 1.0, "attention_factor": 1.0,
            "short_factor": factors, "long_factor": factors, "original_max_position_embeddings": context,
        }  # fmt: skip
    return DeepseekV3Config(
        **{name: getattr(old, name) for name in _SAME_FIELDS},
        max_position_embeddings=context, num_attention_heads=site.heads, num_key_value_heads=site.heads,
        q_lora_rank=None, kv_lora_rank=rank, qk_rope_head_dim=2 * len(frequencies), qk_nope_head_dim=site.head_dim,
        v_head_dim=site.value_dim, first_k_dense_replace=old.num_hidden_layers, num_mtp_layers=0,
        rope_parameters=rope, rope_interleave=True, attention_bias=norm == "neutral", tie_word_embeddings=False,
        architectures=["DeepseekV3ForCausalLM"], dtype=model.dtype,
    )  # fmt: skip


def _attention(
    layer: _Layer, rank: int, frequencies: Sequence[float], config: Any, norm: CalibratedNorm | float
) -> dict[str, Tensor]:
    """One attention under the names of `DeepseekV3Attention`, float32.

    Args:
        norm: the calibrated one; for the neutral one the greatest length of a latent.
    """
    w, p, site = layer.weights, layer.plan, layer.site
    D, N, R, F = site.hidden_size, site.heads, p.rank, len(frequencies)
    kv_of = torch.arange(N) // (N // p.kv_heads)
    place = _places(layer.frequencies(), frequencies)
    scale = site.scale * (p.head_dim + 2 * F) ** 0.5
    q_NHD = w["q_proj.weight"].reshape(N, p.head_dim, D) * scale
    half = p.rope_dims // 2
    rope = torch.zeros(N, F, 2, D)
    k_rope, k_rope_bias = torch.zeros(F, 2, D), torch.zeros(F, 2)
    if half:
        q_rope = torch.einsum("nfh,nhd->nfd", w["q_rope"][kv_of], q_NHD).unflatten(1, (2, half))
        rope[:, place] = q_rope.transpose(1, 2)
        k_rope[place] = w["kv_down.weight"][R:].unflatten(0, (2, half)).transpose(0, 1)
    down, bias = torch.zeros(rank, D), torch.zeros(rank)
    down[:R] = layer.down
    if "kv_down.bias" in w:
        bias[:R] = w["kv_down.bias"][:R]
        k_rope_bias[place] = w["kv_down.bias"][R:].unflatten(0, (2, half)).transpose(0, 1)
    up = torch.cat([layer.up("k_up")[kv_of], layer.up("v_up")[kv_of]], 1)
    up = torch.nn.functional.pad(up, (0, rank - R))
    gain = torch.zeros(rank)
    if not isinstance(norm, CalibratedNorm):
        large = 2.0 ** math.ceil(math.log2(norm * ROOM))
        bias[-1] = large  # the gain of this channel is 0: it steers the norm, and is cached as 0
        wanted = math.sqrt(large**2 / rank + LATENT_EPS)
        gain[:R] = 2.0 ** round(math.log2(wanted))  # as the constant, a power of two: bfloat16 rounds neither
        up = up * (wanted / float(gain[0]))
    else:
        gain[:R] = norm.gain_R
        down[R : R + len(norm.rows_ED)] = norm.rows_ED  # their gain is 0: they steer the norm, and are cached as 0
        down = down * norm.size
    made = {
        "q_proj.weight": torch.cat([q_NHD, rope.flatten(1, 2)], 1).flatten(0, 1),
        "kv_a_proj_with_mqa.weight": torch.cat([down, k_rope.flatten(0, 1)]),
        "kv_a_layernorm.weight": gain,
        "kv_b_proj.weight": up.flatten(0, 1),
        "o_proj.weight": w["o_proj.weight"],
    }
    if config.attention_bias:
        made["kv_a_proj_with_mqa.bias"] = torch.cat([bias, k_rope_bias.flatten()])
        made["o_proj.bias"] = w.get("o_proj.bias", torch.zeros(D))
    return {name: tensor.contiguous() for name, tensor in made.items()}


def _places(own: Sequence[float], all_: Sequence[float]) -> list[int]:
    """For each of a layer's frequencies an index into all of them, none twice."""
    free: dict[float, list[int]] = {}
    for i, f in enumerate(all_):
        free.setdefault(f, []).append(i)
    return [free[f].pop(0) for f in own]


def _build(config: DeepseekV3Config, tensors: dict[str, Tensor], dtype: torch.dtype) -> PreTrainedModel:
    tensors = {name: t.to(dtype) for name, t in tensors.items()}
    # Of its own, for vLLM and mlx-lm tie none for this class.
    tensors["lm_head.weight"] = tensors["lm_head.weight"].clone()
    child: PreTrainedModel = DeepseekV3ForCausalLM.from_pretrained(None, config=config, state_dict=tensors, dtype=dtype)
    return child.eval()


def _windows(source: Source, text: Any) -> Windows:
    if text is None:
        vocab = source.config.get_text_config().vocab_size
        ids = torch.randint(vocab, (2, CHECKED_TOKENS), generator=torch.Generator().manual_seed(0))
        return load_windows(ids, vocab_size=vocab, length=CHECKED_TOKENS)
    tokenizer = None if isinstance(text, (Tensor, Windows)) else source.tokenizer
    return read_windows(source.config, text, tokenizer, most=256, samples=64)


def _rope_type(config: DeepseekV3Config) -> str:
    return str(dict(config.rope_parameters or {})["rope_type"])


def _notes(config: DeepseekV3Config, norm: Norm, spread: Sequence[float]) -> tuple[str, ...]:
    notes = []
    if _rope_type(config) != "default":
        notes.append("engines that rewrite rope types other than `default` (vLLM) compute something else")
    if norm == "neutral":
        notes.append("engines that leave out attention biases (vLLM) compute something else")
    else:
        notes.append(
            f"the norm on the latent is an approximation, off by {max(spread):.2%} in the layer where it is worst "
            "(one standard deviation over the text): train the exported model further if that is much"
        )
    return tuple(notes)
