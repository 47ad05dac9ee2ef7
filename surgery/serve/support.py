"""What the vLLM plugin runs, decided from a converted model's config alone: vLLM is not imported here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import PlanError
from ..planning.repeated_heads import repeated_heads
from ..planning.targets import Refusal, Subject, stored_otherwise
from ..runtime.layout import AttentionSite, Codec, HeadNorm, Heads, Latent, LayerPlan

PLUGIN_PARENTS = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""Decoders that differ in nothing but their attention: what the plugin builds."""
FP8 = ("fp8", "fp8_e4m3")
"""vLLM's names of caches of 8-bit floats: one scale per layer, here 1, and no token kept in full."""
WRONG_ON_CPU = ("int4_per_token_head", "int8_per_token_head", "turboquant", "ultraquant", "nvfp4")
"""Formats (or how their names begin) that vLLM 0.32 takes on a CPU, and answers wrongly with: a KL of 1.2 to 2."""


def served_layers(surgery: Mapping[str, Any]) -> list[tuple[AttentionSite, LayerPlan, dict[str, tuple[int, ...]]]]:
    """Site, plan and parameter shapes of each layer of `config.surgery`."""
    return [
        (
            AttentionSite.from_dict(layer["site"]),
            LayerPlan.from_dict(layer["plan"]),
            {name: tuple(shape) for name, shape in layer["shapes"].items()},
        )
        for layer in surgery["layers"]
    ]


def check_served(config: Any) -> None:
    """Refuse what vLLM, with the plugin, would not run or not save anything with.

    Args:
        config: of a `Surgery<Parent>`.

    Raises:
        PlanError: names the layer, the part and the way out.
    """
    refused = refusal(Subject.of_config(config))
    if refused is not None:
        raise PlanError(f"vLLM: {refused}")


def refusal(subject: Subject) -> Refusal | None:
    """Why the plugin does not run a `Surgery<Parent>`; None where it does."""
    if subject.architecture not in PLUGIN_PARENTS:
        return Refusal(
            reason=f"no plugin for {subject.architecture}; it runs {', '.join(PLUGIN_PARENTS)}",
            way_out="Use --to hub, or a uniform gqa recipe, whose result vLLM runs without a plugin.",
        )
    config = subject.config
    refused = activation_refusal(config)
    if refused is None and len(subject.plans) != config.num_hidden_layers:
        refused = Refusal(reason=f"{len(subject.plans)} of {config.num_hidden_layers} layers have attention")
    plans = {plan.layer: plan for plan in subject.plans}
    refused = refused or _mixed_refusal(subject.plans)
    for site, plan in zip(subject.sites, subject.plans, strict=True):
        refused = refused or _plan_refusal(plan, plans) or _site_refusal(site, plan.layer)
    return refused


def activation_refusal(config: Any) -> Refusal | None:
    """Why vLLM's decoders of `PLUGIN_PARENTS` and of DeepSeek-V3 do not compute this MLP; None where they do."""
    if config.hidden_act == "silu":
        return None
    return Refusal(reason=f"its decoder computes silu, this model {config.hidden_act}")


def copies_of(plans: Sequence[LayerPlan]) -> dict[int, tuple[int, ...]]:
    """Per layer: which of the checkpoint's KV heads each of the engine's KV heads copies.

    Layers with latents have none. Groups of unequal size are repeated to equal ones. Layers keep counts of their own,
    but not where caches are shared as well: vLLM 0.32 has no place for readers beside caches of several sizes (a
    KeyError at start), so that all get the same count there.
    """
    heads = {plan.layer: plan.project for plan in plans if isinstance(plan.project, Heads)}
    if heads and any(plan.lenders for plan in plans):
        return dict(zip(heads, repeated_heads(list(heads.values()))[1], strict=True))
    return {layer: repeated_heads([one])[1][0] for layer, one in heads.items()}


def cache_dtype(plans: Sequence[LayerPlan]) -> str:
    """vLLM's `kv_cache_dtype` for these caches; `refusal` has said that it is one for all of them."""
    return FP8[0] if any(map(_is_fp8, plans)) else "auto"


def check_cache_dtype(plans: Sequence[LayerPlan], asked: str, on_cpu: bool) -> None:
    """Refuse a `kv_cache_dtype` that is not the plan's, or with which vLLM gives wrong answers.

    Raises:
        PlanError: names both.
    """
    wanted = cache_dtype(plans)
    if wanted != "auto" and asked not in FP8:
        raise PlanError(f"vLLM: this model's caches are planned as {wanted}, not {asked}: leave out --kv-cache-dtype.")
    if on_cpu and asked.startswith(WRONG_ON_CPU):
        raise PlanError(f"vLLM: caches of {asked} give wrong answers on a CPU. Use auto or fp8.")


def check_parallel(plans: Sequence[LayerPlan], heads: int, ranks: int) -> None:
    """Refuse a tensor-parallel size that does not go with the head counts.

    Raises:
        PlanError: names layer and numbers.
    """
    if heads % ranks:
        raise PlanError(f"vLLM: {heads} query heads do not divide among {ranks} ranks (tensor parallel).")
    for layer, copies in copies_of(plans).items():
        kv_heads = len(copies)
        if kv_heads % ranks and ranks % kv_heads:
            raise PlanError(
                f"vLLM: layer {layer} has {kv_heads} KV heads, which neither divide among {ranks} ranks nor "
                "divide them (tensor parallel). Use another size."
            )


def _is_fp8(plan: LayerPlan) -> bool:
    return isinstance(plan.store, Codec) and plan.store.codec == "fp8" and not plan.store.calibrated


def _mixed_refusal(plans: Sequence[LayerPlan]) -> Refusal | None:
    """Why caches of several formats are not served: the option of vLLM is one for all layers."""
    owners = [plan for plan in plans if plan.owns_cache]
    coded = next(filter(_is_fp8, owners), None)
    other = next((plan for plan in owners if not _is_fp8(plan)), None)
    if coded is None or other is None:
        return None
    return Refusal(
        reason=f"layer {other.layer} is stored as {other.store.label() or other.dtype}, layer {coded.layer} as "
        f"{coded.store.label()}: it has one format for all caches",
        way_out="Use codec: fp8 in all layers, or --to hub.",
    )


def _plan_refusal(plan: LayerPlan, plans: Mapping[int, LayerPlan]) -> Refusal | None:
    where, other = f"layer {plan.layer}", stored_otherwise(plan)
    if other is not None and not _is_fp8(plan):
        return Refusal(
            reason=f"{where} {other}; of quantised caches it runs fp8 (its int4, int8, turboquant and nvfp4 answer "
            "wrongly on a CPU)",
            way_out="Use codec: fp8, or --to hub.",
        )
    if isinstance(plan.project, Latent):
        refused = _latent_refusal(plan, plans)
        if refused is not None:
            return refused
    if plan.retain is not None:
        return Refusal(
            reason=f"{where} averages or evicts tokens: the lengths of its paged caches are those of the text"
        )
    if plan.value_owner is not None:
        return Refusal(reason=f"{where} reads V alone of layer {plan.value_owner}: it shares K and V")
    owner = plans[plan.owner]
    if owner.project != plan.project:
        return Refusal(
            reason=f"{where} reads other heads of layer {plan.owner} than that layer itself: its caches are read as "
            "they are kept"
        )
    if owner.window != plan.window:
        return Refusal(
            reason=f"{where} sees {plan.window or 'all'} tokens, layer {plan.owner}, whose cache it reads, keeps "
            f"{owner.window or 'all'}: it shares caches of one kind"
        )
    return None


def _latent_refusal(plan: LayerPlan, plans: Mapping[int, LayerPlan]) -> Refusal | None:
    """Why the plugin's attention over latents does not run the layer."""
    where = f"layer {plan.layer}"
    heads = next((other for other in plans.values() if isinstance(other.project, Heads)), None)
    if _is_fp8(plan):
        what = "caches a latent in fp8"
    elif plan.window is not None:
        what = f"caches latents of a window of {plan.window} tokens"
    elif heads is not None:
        what = f"caches a latent, layer {heads.layer} heads"
    else:
        return None
    return Refusal(reason=f"{where} {what}: it runs latents of all tokens, in all layers, in full")


def _site_refusal(site: AttentionSite, layer: int) -> Refusal | None:
    for found, what in (
        (site.softcap is not None, "caps its scores"),
        (site.sinks is not None, "has attention sinks"),
        (site.alibi_slopes is not None, "adds ALiBi slopes"),
        (site.clip_qkv is not None, "clamps q, k and v"),
        (site.gated_output, "gates its head outputs"),
        (site.v_norm is not None, "norms its values"),
        (site.value_dim != site.head_dim, "has values of another width than its keys"),
        (site.rotary is None, "does not rotate"),
        (site.rotary is not None and site.rotary.interleaved, "rotates interleaved pairs"),
        (site.rotary is not None and site.rotary.dims != site.head_dim, "rotates a part of its channels"),
        (site.rotary is not None and site.rotary.length_dependent, "rotates by the length of the text"),
        (not all(map(_is_plain, (site.q_norm, site.k_norm))), "norms queries or keys otherwise than Qwen3"),
    ):
        if found:
            return Refusal(reason=f"layer {layer} {what}; the plugin's attention does not")
    return None


def _is_plain(norm: HeadNorm | None) -> bool:
    return norm is None or (
        norm.kind == "rms" and norm.span == "head" and norm.bias is None and not norm.weight_offset
        and not norm.after_rotary
    )  # fmt: skip
