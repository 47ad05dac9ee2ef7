"""Share axis: which layer reads whose cache. Named layouts of the field, and the rules that every map must keep."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from ..errors import PlanError, RecipeError
from ..runtime.layout import AttentionSite, LayerPlan

SEARCHED = ("search", "kvsharer")
"""Layouts that calibration text decides; the plan knows only how many layers keep a cache."""
SVFORMER = "svformer"
"""Layout in which all layers read V of the first and keep their own K."""
LAYOUTS = ("cla2", "cla3", "mlkv", "pizza-bottom", "sandwich-bottom", "lasagna-bottom", "yoco", SVFORMER, *SEARCHED)
BUDGETED = ("mlkv", "pizza", "sandwich", "lasagna", *SEARCHED)
"""Layouts that need to be told how many layers keep a cache."""


def check_layout(layout: str, budget: bool, where: str) -> None:
    """Refuse names that no layout has, and a budget too much or too little.

    Raises:
        RecipeError: says what would do.
    """
    name, size, target = _parse(layout, where)
    if target is not None and name in ("pizza", "sandwich", "lasagna"):
        if target in ("middle", "top"):
            raise RecipeError(
                f"{where}.layout: {layout!r} lets layers read a cache above them, which is not there yet when they run "
                f"(LCKV iterates for that). Use {name}-bottom, or a map: layout: {{3: 2, 5: 2}}."
            )
    elif target is not None:
        raise RecipeError(f"{where}.layout: {layout!r} has no target. Use one of {', '.join(LAYOUTS)}.")
    if name in BUDGETED and not budget and size is None:
        raise RecipeError(
            f"{where}: layout {layout!r} needs `kv_layers`: how many layers keep a cache (4), or what part (0.5)."
        )
    if budget and (name not in BUDGETED or size is not None):
        raise RecipeError(f"{where}: layout {layout!r} fixes how many layers keep a cache. Leave out kv_layers.")


def owners_of(layout: str, layers: Sequence[int], kv_layers: int | float | None, where: str) -> dict[int, int]:
    """Reader -> owner under a named layout; for layouts that text decides, evenly spaced owners as a stand-in.

    For `svformer` the owner is that of V alone.

    Args:
        layers: attention layers that may share, in order.
        kv_layers: how many of them keep a cache, or what part of them.

    Raises:
        PlanError: the budget does not fit the number of layers.

    Source: CLA arXiv:2405.12981; MLKV arXiv:2406.09297; pizza, sandwich, lasagna arXiv:2410.14442; YOCO
    arXiv:2405.05254 (without its windows below); SVFormer arXiv:2410.17897.
    """
    name, size, _ = _parse(layout, where)
    n = len(layers)
    if name == "cla":
        assert size is not None
        owner = [size * (i // size) for i in range(n)]
    elif name == SVFORMER:
        owner = [0] * n
    elif name == "yoco":
        owner = [min(i, n // 2) for i in range(n)]
    else:
        k = size if size is not None else kept_layers(kv_layers, n, where)
        if not 1 <= k <= n:
            raise PlanError(f"{where}: {k} of {n} layers cannot keep a cache. Use 1 to {n}.")
        if name == "pizza":
            owner = [min(i, k - 1) for i in range(n)]
        elif name == "sandwich":
            below = (k - 1) // 2  # layers that own at the lower end; the block of readers follows its owner
            owner = [i if i <= below or i > below + n - k else below for i in range(n)]
        else:  # mlkv, lasagna, and the stand-in of searched layouts
            starts = sorted({i * n // k for i in range(k)})
            owner = [max(s for s in starts if s <= i) for i in range(n)]
    return {layers[i]: layers[o] for i, o in enumerate(owner) if o != i}


def kept_layers(kv_layers: int | float | None, layers: int, where: str) -> int:
    """Layers that keep a cache, of `layers`."""
    assert kv_layers is not None, where
    return kv_layers if isinstance(kv_layers, int) else max(1, int(kv_layers * layers + 1e-9))


def check_map(owners: Mapping[int, int], sites: Mapping[int, AttentionSite], plans: Mapping[int, LayerPlan]) -> None:
    """Refuse maps that cannot run.

    Args:
        owners: reader -> owner.
        plans: what each layer would cache of its own.

    Raises:
        PlanError: names both layers and what is wrong between them.
    """
    for reader, owner in sorted(owners.items()):
        pair = f"layer {reader} cannot read the cache of layer {owner}"
        for layer in (reader, owner):
            if layer not in sites:
                raise PlanError(f"{pair}: the model has no attention layer {layer}.")
        if reader == min(sites):
            raise PlanError(
                f"{pair}: the first attention layer counts the tokens for the model, and must keep a cache of its own."
            )
        if owner >= reader:
            raise PlanError(
                f"{pair}: it is not there yet when layer {reader} runs. Only caches of earlier layers can be read."
            )
        if owner in owners:
            raise PlanError(f"{pair}: layer {owner} keeps none, it reads layer {owners[owner]}. Write {reader}: {owner}"
                            f" as {reader}: {owners[owner]}.")  # fmt: skip
        reason = mismatch(sites[reader], sites[owner], plans[reader], plans[owner])
        if reason:
            raise PlanError(f"{pair}: {reason}. Both must be alike.")


def mismatch(reader: AttentionSite, owner: AttentionSite, reads: LayerPlan, keeps: LayerPlan) -> str | None:
    """Why one layer cannot read the other's cache; None where it can."""
    if reads.project != keeps.project:
        mine, theirs = (
            f"{p.project.kv_heads} KV heads of {p.project.head_dim} + {p.project.value_dim}" for p in (reads, keeps)
        )
        return f"{mine} against {theirs}" if mine != theirs else "their query heads are grouped differently"
    facts: tuple[tuple[str, object, object], ...] = (
        ("a window of", reader.window or "all tokens", owner.window or "all tokens"),
        ("rotary frequencies", reader.rotary, owner.rotary),
        ("ALiBi slopes", reader.alibi_slopes, owner.alibi_slopes),
        ("a norm of the keys", _kind(reader.k_norm), _kind(owner.k_norm)),
        ("a norm of the values", _kind(reader.v_norm), _kind(owner.v_norm)),
    )
    for name, a, b in facts:
        if a != b:
            return f"{name} {_say(a)} against {_say(b)}"
    return None


def sharable(
    layers: Sequence[int], sites: Mapping[int, AttentionSite], plans: Mapping[int, LayerPlan]
) -> dict[int, list[int]]:
    """For each layer the earlier ones whose cache it could read."""
    return {
        reader: [
            owner
            for owner in layers
            if owner < reader and not mismatch(sites[reader], sites[owner], plans[reader], plans[owner])
        ]
        for reader in layers
    }


def _parse(layout: str, where: str) -> tuple[str, int | None, str | None]:
    """`cla(3)`, `mlkv(layers=4)`, `pizza-bottom` -> name, number, target."""
    match = re.fullmatch(r"([a-z]+?)(?:(\d+)|\((?:layers=)?(\d+)\))?(?:[- ]([a-z]+))?", layout.strip())
    name = match.group(1) if match else layout
    if match is None or name not in {"cla", "yoco", SVFORMER, *BUDGETED}:
        raise RecipeError(f"{where}.layout: no layout {layout!r}. Use one of {', '.join(LAYOUTS)}, or a map.")
    size = match.group(2) or match.group(3)
    number = int(size) if size else None
    if name == "cla" and (number is None or number < 2):
        raise RecipeError(f"{where}.layout: {layout!r} must say how many layers share a cache, such as cla2.")
    if name in ("yoco", SVFORMER, *SEARCHED) and number is not None:
        raise RecipeError(f"{where}.layout: {layout!r} takes no number. Write {name}.")
    return name, number, match.group(4)


def _kind(norm: object) -> tuple[object, ...] | None:
    """What of a norm cached keys depend on: not its gains, which belong to the owner."""
    return norm and tuple(getattr(norm, name) for name in ("kind", "span", "eps", "after_rotary"))  # type: ignore[return-value]


def _say(value: object) -> str:
    frequencies = getattr(value, "inv_freq", None)
    if frequencies is not None:
        return f"{len(frequencies)} from {min(frequencies):.3g} up to {max(frequencies):.3g}"
    return "none" if value is None else str(value)
