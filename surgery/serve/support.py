"""What the vLLM plugin runs, decided from a converted model's config alone: vLLM is not imported here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import PlanError
from ..planning.engines import PLUGIN_PARENTS
from ..planning.repeated_heads import repeated_heads
from ..runtime.layout import AttentionSite, HeadNorm, Heads, Latent, LayerPlan


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
    parent = config.surgery["parent"]["architecture"]
    if parent not in PLUGIN_PARENTS:
        raise PlanError(
            f"vLLM: no plugin for {parent}; it runs {', '.join(PLUGIN_PARENTS)}. Use --to hub, or a uniform gqa "
            "recipe, whose result vLLM runs without a plugin."
        )
    layers = served_layers(config.surgery)
    plans = {plan.layer: plan for _, plan, _ in layers}
    for site, plan, _ in layers:
        where = f"layer {plan.layer}"
        _check_plan(plan, plans, where)
        _check_site(site, where)
    if len(layers) != config.num_hidden_layers:
        raise PlanError(f"vLLM: {len(layers)} of {config.num_hidden_layers} layers have attention. Use --to hub.")
    if config.hidden_act != "silu":
        raise PlanError(f"vLLM: its decoder computes silu, this model {config.hidden_act}. Use --to hub.")


def copies_of(plans: Sequence[LayerPlan]) -> dict[int, tuple[int, ...]]:
    """Per layer: which of the checkpoint's KV heads each of the engine's KV heads copies.

    Groups of unequal size are repeated to equal ones. Layers keep counts of their own, but not where caches are shared
    as well: vLLM 0.32 has no place for readers beside caches of several sizes (a KeyError at start), so that all get
    the same count there.
    """
    heads = [plan.project for plan in plans if isinstance(plan.project, Heads)]
    together = any(plan.lenders for plan in plans)
    copies = repeated_heads(heads)[1] if together else [repeated_heads([one])[1][0] for one in heads]
    return dict(zip((plan.layer for plan in plans), copies, strict=True))


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


def _check_plan(plan: LayerPlan, plans: Mapping[int, LayerPlan], where: str) -> None:
    if isinstance(plan.project, Latent):
        if any(plan.layer in (other.layer, *other.lenders) and other.lenders for other in plans.values()):
            raise PlanError(f"vLLM: {where} shares its latents: none of its MLA backends does. Use --to hub.")
        raise PlanError(
            f"vLLM: {where} caches a latent: it runs latents as DeepSeek-V3 only. For mla, use --to native --norm "
            "calibrated and serve that; for lowrank, use --to hub."
        )
    if getattr(plan, "retain", None) is not None:
        raise PlanError(
            f"vLLM: {where} merges or evicts tokens: the lengths of its paged caches are those of the text. Use --to "
            "hub."
        )
    if plan.value_owner is not None:
        raise PlanError(f"vLLM: {where} reads V alone of layer {plan.value_owner}: it shares K and V. Use --to hub.")
    owner = plans[plan.owner]
    if owner.project != plan.project:
        raise PlanError(
            f"vLLM: {where} reads other heads of layer {plan.owner} than that layer itself: its caches are read as "
            "they are kept. Use --to hub."
        )
    if owner.window != plan.window:
        raise PlanError(
            f"vLLM: {where} sees {plan.window or 'all'} tokens, layer {plan.owner}, whose cache it reads, keeps "
            f"{owner.window or 'all'}: it shares caches of one kind. Use --to hub."
        )


def _check_site(site: AttentionSite, where: str) -> None:
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
            raise PlanError(f"vLLM: {where} {what}; the plugin's attention does not. Use --to hub.")


def _is_plain(norm: HeadNorm | None) -> bool:
    return norm is None or (
        norm.kind == "rms" and norm.span == "head" and norm.bias is None and not norm.weight_offset
        and not norm.after_rotary
    )  # fmt: skip
