"""A copy of the parent in which layers are converted one after another, each calibrated on the converted prefix."""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..anatomy import Anatomy
from ..attention.forward import head_outputs
from ..attention.latent import LatentWeights
from ..attention.weights import AttentionWeights, parameter_names, read_attention, write_changed
from ..runtime.canonical import canonical_weights
from ..runtime.layout import AttentionSite, Codec, LayerPlan, Project, Retain
from .forms import HeadsForm, Inputs, LatentForm, ReaderForm
from .journal import Journal, way_of
from .layers import DecoderLayers, layer_parameters, shell_of
from .outputs import answers, distance
from .parameters import is_float32, set_parameter, untie, wide
from .pipeline import Pipeline
from .repeating import collapse, expand
from .statistics import module_of
from .text import Windows
from .visit import Visit

HELD_NUMBERS = 2**27
"""Answers of the parent that are kept in memory (512 MB) rather than computed anew."""


class WorkingCopy:
    """The parent in float32, its attentions rewritten layer by layer; the parent itself is only read.

    Each layer has a form (`forms.py`). Layers with KV heads of their own keep the parent's attention: each new KV head
    is repeated in the places of the heads that it replaces, which is the same function. Layers in another form are
    computed here: a hook on the projection of q notes its input, one before `o` exchanges what `o` reads. The parent's
    attention runs there too and its outputs are thrown away, but every family runs, with any of its layers converted,
    without a module or a class being replaced. This is not the runtime: whole sequences, no cache.

    What is held are the parameters that were written. Layers are run one at a time (`visits`); whole models, `teacher`
    and `model`, are put together when somebody asks for them. They run on the parent's device. Weights that are read
    here, activations and closed forms are on the CPU.
    """

    has_prefix = True
    """Whether a layer is visited on what the layers converted before it give; otherwise on what the parent gives."""

    def __init__(self, parent: PreTrainedModel, anatomy: Anatomy) -> None:
        def read(name: str) -> Tensor:
            return wide(parent.get_parameter(name).detach().cpu())

        self._parent: PreTrainedModel | None = parent
        self._begin(anatomy, lambda: shell_of(parent, layer_parameters(parent, anatomy.sites)), read)

    @classmethod
    def of_checkpoint(
        cls, anatomy: Anatomy, shell: Callable[[], PreTrainedModel], read: Callable[[str], Tensor]
    ) -> WorkingCopy:
        """The copy of a parent that is not in memory.

        Args:
            shell: makes the parent in float32 without the parameters of its decoder layers, which are on the meta
                device.
            read: a parameter in the dtype of its file, by name.
        """
        made = cls.__new__(cls)
        made._parent = None
        attentions = {name for site in anatomy.sites for name in parameter_names(site)}
        # Those of one attention are asked for again and again while it is converted.
        again = lru_cache(maxsize=8)(lambda name: wide(read(name)))
        made._begin(anatomy, shell, lambda name: again(name) if name in attentions else wide(read(name)))
        return made

    def _begin(self, anatomy: Anatomy, shell: Callable[[], PreTrainedModel], read: Callable[[str], Tensor]) -> None:
        self.sites = {site.layer: site for site in anatomy.sites}
        self._beside: dict[str, dict[int, dict[str, Tensor]]] = {"gate": {}, "codec": {}}
        self.gates, self.codecs = self._beside.values()
        """Tensors of the gates that layers got, and tables of the codecs of their caches, by name."""
        self.retain_of: dict[int, Retain | None] = {}
        """Which tokens owners of caches keep, where the text has decided that by layer."""
        self.bits_of: dict[int, tuple[float, float]] = {}
        """Bits of a key's and of a value's number, where the text has decided that by layer."""
        self.fits: dict[int, Any] | None = None
        """By layer: what text says of the streams that a codec holds, whatever the bits; None: it is not kept."""
        self.choice: int | None = None
        """Candidate that the last latent layer chose: where the search of the next one starts."""
        self.held_out: float | None = None
        """KL(parent || copy) in nats per token on windows that nothing was fitted on, after the last way through."""
        self.reading: Mapping[int, Tensor] = {}
        """Of the layer that runs alone: what the projections of earlier layers read, whose caches it reads."""
        self.journal: Journal | None = None
        """Where layers that are done are put away; None keeps them in memory."""
        self.stream_dtype = torch.float32
        """Format of the hidden states over the text that are kept between layers."""
        self.doing = "converting"
        """What is being done, for people."""
        self._ways = 0
        self._make_shell, self._read = shell, read
        self._changed: dict[str, Tensor] = {}
        self._forms: dict[int, HeadsForm] = {}
        self._built: tuple[str, nn.Module] | None = None
        self._hooked: dict[int, set[tuple[str, int]]] = {}
        self._is_parents = False
        self._inputs: dict[int, Tensor] = {}
        """Of the forward pass that runs: by layer, what its projections read, where a form needs that."""
        self._wanted: dict[str, list[Tensor]] = {}

    # ------------------------------------------------------------------------------------------- models

    @cached_property
    def layers(self) -> DecoderLayers:
        """The parent's decoder layers, one at a time."""
        return DecoderLayers(self._make_shell(), list(self.sites.values()), self._read)

    @cached_property
    def teacher(self) -> PreTrainedModel:
        """The whole parent in float32."""
        if self._parent is not None:
            return self._parent if is_float32(self._parent) else copy.deepcopy(self._parent).float()
        made = self._make_shell()
        for name, parameter in list(made.named_parameters(remove_duplicate=False)):
            if parameter.is_meta:
                set_parameter(made, name, nn.Parameter(self._read(name), requires_grad=False))
        return made

    @cached_property
    def model(self) -> PreTrainedModel:
        """The whole copy; what is written to a layer afterwards is written to it, too."""
        made = copy.deepcopy(self.teacher).eval()
        untie(made, [name for site in self.sites.values() for name in parameter_names(site)])
        with torch.no_grad():
            for name, value in self._changed.items():
                made.get_parameter(name).copy_(value)
        for layer, form in self._forms.items():
            if form.is_computed:
                self._install(made, "", form.sources(layer), layer)
        return made

    def forget_model(self) -> None:
        """Let go of the whole copy; it is put together anew when it is asked for."""
        made = self.__dict__.pop("model", None)
        self._hooked.pop(id(made), None)

    def visits(
        self,
        windows: Windows,
        layers: Iterable[int],
        lenders: Iterable[int] = (),
        kept: dict[Any, Any] | None = None,
    ) -> Iterator[Visit]:
        """The attentions of `layers` in order, each to be read and rewritten before the next is reached.

        Where a conversion goes on that was interrupted, layers that are done are not visited again.

        Args:
            lenders: layers whose inputs the forms of later ones read.
            kept: all that the caller keeps from one layer to the next, empty at first: it is saved with the layers, and
                filled where some are done. None for a caller that does not say: all its layers are visited anew.

        Raises:
            UnsupportedModel: a layer of the model cannot be run alone.
        """
        # Forms of earlier steps may read, too.
        lending = {*lenders, *(s for layer, form in self._forms.items() for s in form.sources(layer) if s != layer)}
        number, self._ways = self._ways, self._ways + 1
        with way_of(self, number, windows, self.journal, kept) as way:
            if not way.is_done():
                pipeline = Pipeline(self, windows, way.folder, self.stream_dtype)
                yield from pipeline.visits(layers, lending, way)
                self.held_out = pipeline.divergence() if self.has_prefix else None
                way.end(len(self.layers))

    def parts(self) -> dict[tuple[Any, ...], Any]:
        """All that layers got: parameters, forms, gates and codecs."""
        found: dict[tuple[Any, ...], Any] = {("parameter", name): value for name, value in self._changed.items()}
        found |= {(k, at, n): t for k, by in self._beside.items() for at, ts in by.items() for n, t in ts.items()}
        return found | {("form", layer): form for layer, form in self._forms.items()}

    def facts(self) -> dict[str, Any]:
        """What has been found out beside."""
        return {name: getattr(self, name) for name in ("retain_of", "bits_of", "choice", "held_out")}

    def take_parts(self, parts: Mapping[tuple[Any, ...], Any], facts: Mapping[str, Any]) -> None:
        """Take what `parts` and `facts` gave; the same numbers may lie in another place now."""
        places: dict[str, Any] = {"parameter": self._changed, "form": self._forms}
        for (kind, *where), part in parts.items():
            place = self._beside[kind].setdefault(where[0], {}) if kind in self._beside else places[kind]
            place[where[-1]] = part
        for name, fact in facts.items():
            setattr(self, name, fact)

    def build(self, index: int, like: nn.Module) -> nn.Module:
        """Decoder layer `index` of the copy as it is now; until `leave`, what is written to it goes there, too."""
        prefix = f"{self.layers.name}.{index}."
        here = [site for site in self.sites.values() if self.layers.place[site.layer] == index]
        own = {name: self._changed.get(name) for site in here for name in parameter_names(site)}
        made = self.layers.like(index, like, own)
        self._built = prefix, made
        for layer, form in self._forms.items():
            if form.is_computed and self.layers.place[layer] == index:
                self._install(made, prefix, (layer,), layer)
        return made

    @contextmanager
    def parents_attention(self) -> Iterator[None]:
        """Inside, layers in a form of ours run the parent's attention: somebody else exchanges what it gives."""
        self._is_parents = True
        try:
            yield
        finally:
            self._is_parents = False

    def leave(self) -> None:
        """The layer that was built is done with."""
        if self._built is not None:
            self._hooked.pop(id(self._built[1]), None)
        self._built = None
        self.reading = {}

    # ------------------------------------------------------------------------------------------- layers

    def form(self, layer: int) -> HeadsForm:
        """The form that the layer has now."""
        return self._forms.get(layer, HeadsForm())

    def take_form(self, layer: int, form: HeadsForm) -> None:
        """Give the layer a form; its parameters stay."""
        if form.is_computed:
            if "model" in self.__dict__:
                self._install(self.model, "", form.sources(layer), layer)
            if self._built is not None and self.sites[layer].module.startswith(self._built[0]):
                self._install(self._built[1], self._built[0], (layer,), layer)
        self._forms[layer] = form

    def drop_form(self, layer: int) -> None:
        """Give the layer the form that the parent has; its parameters stay."""
        self._forms.pop(layer, None)

    def read(self, layer: int) -> AttentionWeights:
        """The layer's weights as they are now, with as many KV heads as it really has."""
        return self._weights(layer, self.tensor)

    def parent(self, layer: int) -> AttentionWeights:
        """The parent's weights of the layer."""
        return read_attention(self.sites[layer], self._read)

    def write(self, layer: int, weights: AttentionWeights) -> None:
        """Replace the layer's parameters; a form that does not use its K and V stays in force."""
        site = self.sites[layer]
        self._assign(write_changed(expand(weights, site.kv_heads, layer), site, site, self._read))
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
        found = self._changed.get(name)
        return self._read(name) if found is None else found

    def restore(self, state: dict[str, Tensor]) -> None:
        """Put back parameters by name."""
        self._assign(state)

    @property
    def converted(self) -> list[int]:
        """Layers written so far."""
        return sorted({*self._forms, *self.gates, *self.codecs})

    @property
    def rewritten(self) -> list[int]:
        """Layers that give something else than in the parent; gates and codecs change what a cache keeps, no more."""
        return sorted(self._forms)

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
        if layer in self.bits_of:
            assert isinstance(plan.store, Codec)
            k_bits, v_bits = self.bits_of[layer]
            plan = replace(plan, store=replace(plan.store, k_bits=k_bits, v_bits=v_bits))
        plan = self.form(layer).settle(self.sites[layer], plan)
        return replace(plan, retain=self.retain_of.get(plan.owner, plan.retain))

    def canonical(self, layer: int) -> dict[str, Tensor]:
        """The layer under the names and in the layout of the runtime's attention."""
        tensors = canonical_weights(self.sites[layer], self.tensor)
        tensors |= {f"{k}.{n}": t for k, by in self._beside.items() for n, t in by.get(layer, {}).items()}
        return self.form(layer).canonical(self.sites[layer], tensors)

    # --------------------------------------------------------------------------------------- activations

    def keys_values(self, layer: int, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """K [B, K, T, H] and V that the layer reads, from the inputs of its sources."""
        return self.form(layer).keys_values(layer, self.read, inputs)

    def head_outputs(
        self, layer: int, inputs: Inputs, weights: AttentionWeights | None = None, form: HeadsForm | None = None
    ) -> Tensor:
        """What `o` of a layer reads, [B, T, N, V], from the inputs of its sources; a gate on outputs is not applied.

        Args:
            weights, form: in the place of those that the layer has.
        """
        own = self.read(layer) if weights is None else weights
        found = (form or self.form(layer)).head_outputs(layer, lambda at: own if at == layer else self.read(at), inputs)
        return head_outputs(own, inputs[layer]) if found is None else found

    # ------------------------------------------------------------------------------------------- measures

    @torch.no_grad()
    def divergence(self, windows: Windows, batches: int | None = None) -> float:
        """KL(parent || copy) in nats per token, or what `outputs.distance` takes in its place, by the whole models.

        The parent's answers to these windows are kept for the next call.

        Args:
            batches: only so many batches of windows.
        """
        return self.divergence_of(self.model, windows, batches)

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

    def _assign(self, state: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in state.items():
                self._changed[name] = value.detach().cpu().clone()
                if self._built is not None and name.startswith(self._built[0]):
                    self._built[1].get_parameter(name.removeprefix(self._built[0])).copy_(value)
                if "model" in self.__dict__:
                    self.model.get_parameter(name).copy_(value)

    def _weights(self, layer: int, get_tensor: Callable[[str], Tensor]) -> AttentionWeights:
        """The layer's weights by what `get_tensor` has for its parameters, without the repetitions of KV heads."""
        weights, groups = read_attention(self.sites[layer], get_tensor), self.form(layer).groups
        return weights if groups is None else collapse(weights, groups)

    def _install(self, root: nn.Module, prefix: str, sources: Iterable[int], layer: int) -> None:
        """The hooks that a computed form of `layer` needs in a model, or one layer of it, each once.

        Args:
            prefix: what names of the model begin with that are inside `root`.
        """
        hooked = self._hooked.setdefault(id(root), set())
        for role, at in [*(("q", source) for source in sources), ("o", layer)]:
            if (role, at) in hooked:
                continue
            hooked.add((role, at))
            site = self.sites[at]
            if role == "q":
                root.get_submodule(module_of(site.q).removeprefix(prefix)).register_forward_hook(self._note(at))
            else:
                module = root.get_submodule(module_of(site.o).removeprefix(prefix))
                module.register_forward_pre_hook(self._exchange(site, root, prefix))

    def _note(self, layer: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            self._inputs[layer] = args[0].reshape(-1, *args[0].shape[-2:])

        return hook

    def _exchange(self, site: AttentionSite, root: nn.Module, prefix: str) -> Callable[..., Any]:
        columns = (torch.tensor(site.o.head_rows)[:, None] + torch.arange(site.value_dim)).flatten()
        # A hook that held the layer it hangs on would keep both in memory until Python looks for cycles.
        layers = weakref.proxy(root)

        def tensor(name: str) -> Tensor:
            if not name.startswith(prefix):  # of a layer that is not here: an owner that was passed
                return self.tensor(name).to(self.layers.device)
            # Not get_parameter: torch.func puts tensors there that are no parameters.
            module, _, leaf = name.removeprefix(prefix).rpartition(".")
            found: Tensor = getattr(layers.get_submodule(module), leaf)
            return found

        def hook(_: nn.Module, args: tuple[Any, ...]) -> Any:
            if self._is_parents:
                return None
            weights_of = partial(self._weights, get_tensor=tensor)
            # Of a layer alone, nothing that a whole model has left there: a lender that is missing must be missed.
            inputs = {site.layer: self._inputs[site.layer], **self.reading} if prefix else self._inputs
            found = self.form(site.layer).head_outputs(site.layer, weights_of, inputs)
            if found is None:
                return None
            out = found.flatten(2)
            made = torch.zeros_like(out).index_copy(-1, columns.to(out.device), out)
            return (made.reshape(args[0].shape), *args[1:])

        return hook
