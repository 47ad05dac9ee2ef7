"""A copy of the parent in which layers are converted one after another, each calibrated on the converted prefix."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..anatomy import Anatomy
from ..attention.latent import LatentWeights
from ..attention.weights import AttentionWeights, parameter_names, read_attention, write_changed
from ..errors import PlanError
from ..runtime.canonical import canonical_weights
from ..runtime.layout import AttentionSite, LayerPlan, Project
from .forms import HeadsForm, Inputs, LatentForm, ReaderForm
from .outputs import answers, distance
from .statistics import Activations, Again, layer_activations, module_of
from .streams import Streams, streams_of
from .text import Windows

HELD_NUMBERS = 2**27
"""Activations, and answers of the parent, that are kept in memory (512 MB each) rather than computed anew."""


class WorkingCopy:
    """The parent in float32, its attentions rewritten in place; the parent itself is only read.

    Each layer has a form (`forms.py`). Layers with KV heads of their own keep the parent's attention: each new KV head
    is repeated in the places of the heads that it replaces, which is the same function. Layers in another form are
    computed here: a hook on the projection of q notes its input, one before `o` exchanges what `o` reads. The parent's
    attention runs there too and its outputs are thrown away, but every family runs, with any of its layers converted,
    without a module or a class being replaced. This is not the runtime: whole sequences, no cache.

    Models run on the parent's device. Weights that are read here, activations and closed forms are on the CPU.

    `teacher` is the parent in float32 for statistics and losses; `model` is the copy that changes.
    """

    def __init__(self, parent: PreTrainedModel, anatomy: Anatomy) -> None:
        self.sites = {site.layer: site for site in anatomy.sites}
        self.teacher = parent if _is_float32(parent) else copy.deepcopy(parent).float()
        self.model = copy.deepcopy(self.teacher).eval()
        _untie(self.model, [name for site in anatomy.sites for name in parameter_names(site)])
        self.gates: dict[int, dict[str, Tensor]] = {}
        """Tensors of the gates that layers got, by name."""
        self.window_of: dict[int, int] = {}
        """Newest tokens that gates may not drop, where the text has decided that by layer."""
        self.choice: int | None = None
        """Index of the candidate that the last latent layer chose: where the search of the next one starts."""
        self._forms: dict[int, HeadsForm] = {}
        self._hooked: set[tuple[str, int]] = set()
        self._inputs: dict[int, Tensor] = {}
        """Of the forward pass that runs: by layer, what its projections read, where a form needs that."""
        self._streams: dict[str, Streams | None] = {}
        self._wanted: dict[str, list[Tensor]] = {}

    # ------------------------------------------------------------------------------------------- layers

    def form(self, layer: int) -> HeadsForm:
        """The form that the layer has now."""
        return self._forms.get(layer, HeadsForm())

    def take_form(self, layer: int, form: HeadsForm) -> None:
        """Give the layer a form; its parameters stay."""
        if form.is_computed:
            self._install(form.sources(layer), layer)
        # Streams that stand after the layer have come through its old form.
        self._streams = {d: s for d, s in self._streams.items() if s is None or s.layer <= layer}
        self._forms[layer] = form

    def read(self, layer: int) -> AttentionWeights:
        """The layer's weights as they are now, with as many KV heads as it really has."""
        return self._weights(layer, self.tensor)

    def parent(self, layer: int) -> AttentionWeights:
        """The parent's weights of the layer."""
        return read_attention(self.sites[layer], lambda name: self.teacher.get_parameter(name).detach().cpu())

    def write(self, layer: int, weights: AttentionWeights) -> None:
        """Replace the layer's parameters; a form that does not use its K and V stays in force."""
        site = self.sites[layer]
        changed = write_changed(expand(weights, site.kv_heads, layer), site, site, self.teacher.get_parameter)
        self._assign(changed)
        self.take_form(layer, replace(self.form(layer), groups=weights.groups))

    def write_latent(self, layer: int, latent: LatentWeights, weights: AttentionWeights | None = None) -> None:
        """Run the layer in latent form, with q and o of `weights` if given."""
        self.take_form(layer, LatentForm(groups=self.form(layer).groups, latent=latent.to(torch.float32)))
        if weights is not None:
            self.write(layer, weights)

    def read_from(
        self, layer: int, owner: int, *, values_only: bool = False, latent: LatentWeights | None = None
    ) -> None:
        """Let the layer make K and V, or V alone, from what `owner` reads; see `ReaderForm`."""
        groups = self.form(layer).groups
        self.take_form(layer, ReaderForm(groups=groups, owner=owner, values_only=values_only, latent=latent))

    def tensor(self, name: str) -> Tensor:
        """One parameter of the copy."""
        return self.model.get_parameter(name).detach().cpu()

    def restore(self, state: dict[str, Tensor]) -> None:
        """Put back parameters by name."""
        self.forget_streams()
        self._assign(state)

    @property
    def converted(self) -> list[int]:
        """Layers written so far."""
        return sorted({*self._forms, *self.gates})

    @property
    def computed(self) -> list[int]:
        """Layers whose attention is computed here, not by the parent's own module: latents and readers."""
        return sorted(layer for layer, form in self._forms.items() if form.is_computed)

    @property
    def owners(self) -> dict[int, int]:
        """Reader -> owner, of layers that read the whole cache of another."""
        found = {layer: form.owner_of(layer) for layer, form in self._forms.items()}
        return {layer: owner for layer, owner in found.items() if owner != layer}

    def project(self, layer: int) -> Project:
        """The project axis that the layer has now."""
        return self.form(layer).project(self.sites[layer])

    def settle(self, plan: LayerPlan) -> LayerPlan:
        """`plan` with what the steps and the text have decided for its layer."""
        layer = plan.layer
        if layer in self.window_of:
            assert plan.retain is not None
            plan = replace(plan, retain=replace(plan.retain, window=self.window_of[layer]))
        return self.form(layer).settle(self.sites[layer], plan)

    def canonical(self, layer: int) -> dict[str, Tensor]:
        """The layer under the names and in the layout of the runtime's attention."""
        tensors = canonical_weights(self.sites[layer], self.tensor)
        tensors |= {f"gate.{name}": tensor for name, tensor in self.gates.get(layer, {}).items()}
        return self.form(layer).canonical(self.sites[layer], tensors)

    # --------------------------------------------------------------------------------------- activations

    def activations(self, layer: int, windows: Windows) -> Iterable[Activations]:
        """`layer_activations` with the inputs of all layers that `layer` reads, to go through several times.

        One pass over the model where the text is small enough to keep, else one for each time.
        """
        site = self.sites[layer]
        sources = self.form(layer).sources(layer)
        read = partial(layer_activations, self, site, windows, sources)
        if (3 + len(sources)) * windows.ids_BT.numel() * site.hidden_size > HELD_NUMBERS:
            return Again(read)
        return list(read())

    def keys_values(self, layer: int, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """K [B, K, T, H] and V that the layer reads, from the inputs of its sources."""
        return self.form(layer).keys_values(layer, self.read, inputs)

    def head_outputs(self, layer: int, inputs: Inputs) -> Tensor:
        """What `o` of a layer in a form of ours reads, [B, T, N, V], from the inputs of its sources."""
        found = self.form(layer).head_outputs(layer, self.read, inputs)
        assert found is not None
        return found

    def streams(self, windows: Windows, layer: int) -> Streams | None:
        """Both models' residual streams on `windows`, brought to before `layer`; None where they cannot be kept."""
        if any(len(form.sources(reader)) > 1 for reader, form in self._forms.items()):
            return None  # a layer that is run alone has no inputs of others to read
        known = self._streams.get(windows.digest)
        if windows.digest not in self._streams or (known is not None and known.layer > layer):
            known = self._streams[windows.digest] = streams_of(self, windows, HELD_NUMBERS)
        if known is not None:
            known.move(layer)
        return known

    def forget_streams(self) -> None:
        """To be called where weights of the copy were changed other than by its own methods."""
        self._streams.clear()

    # ------------------------------------------------------------------------------------------- measures

    @torch.no_grad()
    def divergence(self, windows: Windows, layer: int | None = None, batches: int | None = None) -> float:
        """KL(parent || copy) in nats per token, or what `outputs.distance` takes in its place.

        The parent's answers to these windows are kept for the next call.

        Args:
            layer: the only layer that changes between calls: the layers before it are then not run again.
            batches: only so many batches of windows.
        """
        streams = None if layer is None else self.streams(windows, layer)
        if streams is None:
            return self.divergence_of(self.model, windows, batches)
        return self._divergence(self.model, windows, streams.answers(), batches)

    @torch.no_grad()
    def divergence_of(self, model: PreTrainedModel, windows: Windows, batches: int | None = None) -> float:
        """`divergence` of another model."""
        found = (answers(model, *batch) for batch in windows.batches())
        return self._divergence(model, windows, found, batches)

    def _divergence(
        self, model: PreTrainedModel, windows: Windows, found: Iterator[Tensor], batches: int | None
    ) -> float:
        total, tokens = 0.0, 0
        for target, answer in itertools.islice(zip(self.wanted(windows), found, strict=True), batches):
            total += float(distance(model, answer, target))
            tokens += len(answer)
        return total / tokens

    @torch.no_grad()
    def wanted(self, windows: Windows) -> Iterator[Tensor]:
        """The parent's answers at real tokens, batch by batch; kept where they are few enough."""
        known = self._wanted.setdefault(windows.digest, [])
        for i, (ids, mask) in enumerate(windows.batches()):
            if i < len(known):
                yield known[i]
                continue
            found = answers(self.teacher, ids, mask)
            if i == len(known) and found.shape[-1] * windows.tokens <= HELD_NUMBERS:
                known.append(found)
            yield found

    # ---------------------------------------------------------------------------------------------- hooks

    def _assign(self, state: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in state.items():
                self.model.get_parameter(name).copy_(value)

    def _weights(self, layer: int, get_tensor: Callable[[str], Tensor]) -> AttentionWeights:
        """The layer's weights by what `get_tensor` has for its parameters, without the repetitions of KV heads."""
        weights, groups = read_attention(self.sites[layer], get_tensor), self.form(layer).groups
        return weights if groups is None else collapse(weights, groups)

    def _attribute(self, name: str) -> Tensor:
        # Not get_parameter: torch.func puts tensors there that are no parameters.
        module, _, leaf = name.rpartition(".")
        found: Tensor = getattr(self.model.get_submodule(module), leaf)
        return found

    def _install(self, sources: Iterable[int], layer: int) -> None:
        """The hooks that a computed form of `layer` needs, each once."""
        wanted = [*(("q", source) for source in sources), ("o", layer)]
        for role, at in wanted:
            if (role, at) in self._hooked:
                continue
            self._hooked.add((role, at))
            site = self.sites[at]
            if role == "q":
                self.model.get_submodule(module_of(site.q)).register_forward_hook(self._note(at))
            else:
                self.model.get_submodule(module_of(site.o)).register_forward_pre_hook(self._exchange(site))

    def _note(self, layer: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            self._inputs[layer] = args[0].reshape(-1, *args[0].shape[-2:])

        return hook

    def _exchange(self, site: AttentionSite) -> Callable[..., Any]:
        columns = (torch.tensor(site.o.head_rows)[:, None] + torch.arange(site.value_dim)).flatten()

        def hook(_: nn.Module, args: tuple[Any, ...]) -> Any:
            weights_of = partial(self._weights, get_tensor=self._attribute)
            found = self.form(site.layer).head_outputs(site.layer, weights_of, self._inputs)
            if found is None:
                return None
            out = found.flatten(2)
            made = torch.zeros_like(out).index_copy(-1, columns.to(out.device), out)
            return (made.reshape(args[0].shape), *args[1:])

        return hook


def _untie(model: PreTrainedModel, names: list[str]) -> None:
    """Give each of these parameters a tensor of its own: layers that share one are rewritten apart."""
    seen: set[int] = set()
    for name in names:
        parameter = model.get_parameter(name)
        if id(parameter) in seen:
            owner, _, attribute = name.rpartition(".")
            parameter = torch.nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
            setattr(model.get_submodule(owner), attribute, parameter)
        seen.add(id(parameter))


def _is_float32(model: PreTrainedModel) -> bool:
    return all(p.dtype == torch.float32 for p in model.parameters())


def expand(weights: AttentionWeights, kv_heads: int, layer: int) -> AttentionWeights:
    """Repeat KV heads until `kv_heads` equal groups of consecutive queries read them: the same function.

    Raises:
        PlanError: a group of queries would have to be split between two slots.
    """
    size = weights.heads // kv_heads
    kv_of = weights.kv_of()
    sources = kv_of[::size]
    if any(kv_of[h] != sources[h // size] for h in range(weights.heads)):
        sizes = [len(group) for group in weights.groups]
        raise PlanError(
            f"layer {layer}: groups of {sizes} query heads do not fall on the parent's {kv_heads} groups of {size}. "
            "Use an init whose groups are made of whole KV heads."
        )
    groups = tuple(tuple(range(a * size, (a + 1) * size)) for a in range(kv_heads))
    return _select(weights, sources, groups)


def collapse(weights: AttentionWeights, groups: tuple[tuple[int, ...], ...]) -> AttentionWeights:
    """Undo `expand`: keep one copy of each KV head."""
    kv_of = weights.kv_of()
    return _select(weights, [kv_of[group[0]] for group in groups], groups)


def _select(weights: AttentionWeights, sources: list[int], groups: tuple[tuple[int, ...], ...]) -> AttentionWeights:
    """KV heads `sources`, in that order, read by `groups`."""

    def take(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[sources]

    return replace(
        weights,
        k_KHD=weights.k_KHD[sources],
        v_KVD=weights.v_KVD[sources],
        k_bias_KH=take(weights.k_bias_KH),
        v_bias_KV=take(weights.v_bias_KV),
        k_norm_KH=take(weights.k_norm_KH),
        k_norm_bias_KH=take(weights.k_norm_bias_KH),
        groups=groups,
    )
