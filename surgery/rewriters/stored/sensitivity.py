"""How many bits the keys and values of each layer get, by what codes of each alone cost the model on text.

Codes of one stream (the keys, or the values, of one layer) at the bits of an equal division cost a KL, which is
measured, all other streams in full. From there the error of the codes says what other bits would cost: it falls by
(2^b - 1)^2 where steps are uniform, and is known for directions of text. Bits then go where they save most.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...attention.forward import probabilities, project, rotation
from ...attention.maths import rotate_pairs
from ...attention.weights import AttentionWeights, halves
from ...calibration.forms import HeadsForm, Inputs, WeightsOf
from ...calibration.text import Windows
from ...calibration.working_copy import WorkingCopy
from ...console import progress
from ...runtime.codecs import CODECS, Form
from ...runtime.layout import Codec, LayerPlan
from ..common.allocation import choose
from .samples import Fitted, tables_of, uniform_error

_log = logging.getLogger(__name__)
TOKENS = 1024
"""Tokens of text on which the cost of a stream is measured."""
Stream = tuple[int, str]
"""A layer, and `k` or `v`."""


@dataclass(frozen=True, kw_only=True)
class CodedForm(HeadsForm):
    """Heads whose cache is encoded as the runtime does it: a group at a time, once it is old enough."""

    keys: Form | None
    """None: in full, as for `values`."""
    values: Form | None
    store: Codec
    order: tuple[int, ...]
    """Channels of keys, as the runtime has them, in the order of `AttentionWeights`."""

    @property
    def is_computed(self) -> bool:
        return True

    def head_outputs(self, layer: int, weights_of: WeightsOf, inputs: Inputs) -> Tensor | None:
        weights, x, store = weights_of(layer), inputs[layer], self.store
        q, k, v = project(weights, x)
        k_coded, v_coded = self._keys(weights, x, k), v
        if self.values is not None:
            v_coded = self._coded(self.values, v)
        tokens, kv_of, found = x.shape[1], weights.kv_of(), []
        starts = [0, *range(store.sinks + store.recent, tokens, store.group), tokens]
        for start, end in itertools.pairwise(starts):
            # Tokens of a group see what is packed when it begins.
            packed = slice(store.sinks, store.sinks + store.packed(start))
            k_seen, v_seen = k.clone(), v.clone()
            k_seen[:, :, packed], v_seen[:, :, packed] = k_coded[:, :, packed], v_coded[:, :, packed]
            time = torch.arange(start, end, device=x.device)
            weight = probabilities(weights, q[:, :, start:end], k_seen[:, kv_of], time)[1]
            found.append(weight @ v_seen[:, kv_of])
        return torch.cat(found, 2).transpose(1, 2)

    def _keys(self, weights: AttentionWeights, x_BTD: Tensor, k_BKTH: Tensor) -> Tensor:
        if self.keys is None:
            return k_BKTH
        if not self.store.unrotated:
            return self._coded(self.keys, k_BKTH[..., self._back])[..., list(self.order)]
        plain = project(replace(weights, rotary=None), x_BTD, torch.tensor([0]))[1]
        coded = self._coded(self.keys, plain[..., self._back])[..., list(self.order)]
        return rotate_pairs(weights.rotary, coded, *rotation(weights, x_BTD.shape[1], x_BTD))

    @property
    def _back(self) -> list[int]:
        return [self.order.index(j) for j in range(len(self.order))]

    def _coded(self, form: Form, x_BKTW: Tensor) -> Tensor:
        """All whole groups decoded; what is behind them is never packed."""
        sinks, group = self.store.sinks, self.store.group
        count = max(0, x_BKTW.shape[2] - sinks) // group * group
        if not count:
            return x_BKTW
        packed = x_BKTW[:, :, sinks : sinks + count]
        decoded = form.decode(form.encode(packed), x_BKTW.shape[-1]).to(x_BKTW.dtype)
        return torch.cat((x_BKTW[:, :, :sinks], decoded, x_BKTW[:, :, sinks + count :]), 2)


def bits_by_layer(
    copy: WorkingCopy,
    plans: Sequence[LayerPlan],
    windows: Windows,
    budget: float,
    directions: Mapping[int, Sequence[Fitted]],
) -> dict[int, tuple[float, float]]:
    """Bits of the keys and of the values of each layer: together at most `budget` per number, all that is packed.

    Where no token of the text sees a packed one, nothing can be told of codes: bits stay equal, and the log says so.

    Args:
        plans: of layers with heads, whose stores have the bits of an equal division.
        directions: of each layer, where the codec is calibrated.
    """
    text = windows.split()[1]
    text = text.take(max(1, TOKENS // text.ids_BT.shape[1]))
    if (unseen := _equal_where_unseen(plans, text)) is not None:
        return unseen
    lines: dict[Stream, list[tuple[int, float]]] = {}
    bits_at: dict[tuple[Stream, int], float] = {}
    allowed = 0.0
    with progress("measuring bits", 2 * len(plans)) as advance:
        for plan in plans:
            store = plan.store
            assert isinstance(store, Codec)
            heads, *widths = plan.entry()
            for i, (letter, width) in enumerate(zip("kv", widths, strict=True)):
                error, stream = _error(letter, directions.get(plan.layer, ())), (plan.layer, letter)
                equal = store.k_bits
                cost = _cost(copy, store, letter, directions.get(plan.layer, ()), plan.layer, text) / error(equal)
                allowed += budget * store.group * heads * width / 8
                lines[stream] = []
                for bits in choices(store.codec, width):
                    form = replace(store, k_bits=bits, v_bits=bits).forms()[i]
                    assert form is not None
                    size = form.bytes_of(store.group, heads, width)
                    lines[stream].append((size, cost * error(bits)))
                    bits_at[stream, size] = bits
                advance(1)
    copy.forget_model()
    got = {stream: bits_at[stream, size] for stream, size in choose(lines, int(allowed)).items()}
    return {plan.layer: (got[plan.layer, "k"], got[plan.layer, "v"]) for plan in plans}


def _equal_where_unseen(plans: Sequence[LayerPlan], text: Windows) -> dict[int, tuple[float, float]] | None:
    """The plans' own bits where all tokens of the text come before the first group is packed; else None."""
    stores = [plan.store for plan in plans if isinstance(plan.store, Codec)]
    # Those of a group are packed when the next group begins.
    before, tokens = max(s.sinks + s.recent + s.group for s in stores), int(text.mask_BT.sum(1).max())
    if tokens > before:
        return None
    _log.warning(
        "bits: sensitivity: keys and values of all layers get equal bits, for the text that costs are measured on is "
        "read in windows of %d tokens at most, and the first codes are read behind %d. Give a `length` of %d or more, "
        "and long documents.",
        tokens, before, 2 * before,
    )  # fmt: skip
    return {p.layer: (s.k_bits, s.k_bits if s.v_bits is None else s.v_bits) for p, s in zip(plans, stores, strict=True)}


def choices(codec: str, width: int) -> list[float]:
    """Bits of a number that a stream of vectors of this width may get."""
    kind = CODECS[codec]
    if not kind.any_bits:
        return list(kind.bits)
    return [8 * n / width for n in range(1, width + 1) if kind.knows(8 * n / width)]


def equal_bits(store: Codec, budget: float, entry: tuple[int, int, int]) -> float | None:
    """The most bits of a number that all streams can have within the budget; None where the least are too many.

    Args:
        store: whose own bits count for nothing.
    """
    heads, *widths = entry
    found = None
    for bits in choices(store.codec, min(widths)):
        forms = replace(store, k_bits=bits, v_bits=bits).forms()
        sizes = [form.bytes_of(store.group, heads, width) for form, width in zip(forms, widths, strict=True) if form]
        if 8 * sum(sizes) <= budget * store.group * heads * sum(widths):
            found = bits
    return found


def _error(letter: str, directions: Sequence[Fitted]) -> Callable[[float], float]:
    return next((found.error for found in directions if found.letter == letter), uniform_error)


def _cost(
    copy: WorkingCopy, store: Codec, letter: str, directions: Sequence[Fitted], layer: int, text: Windows
) -> float:
    """KL to the parent in nats per token with codes of one stream, of equal bits."""
    site, before = copy.sites[layer], copy.form(layer)
    forms = dict(zip("kv", store.forms(tables_of(directions, store) or None), strict=True))
    coded = CodedForm(
        groups=before.groups, keys=forms["k"] if letter == "k" else None, values=forms["v"] if letter == "v" else None,
        store=store, order=tuple(halves(site.rotary, site.head_dim)),
    )  # fmt: skip
    copy.take_form(layer, coded)
    try:
        return copy.divergence(text)
    finally:
        copy.take_form(layer, before)
