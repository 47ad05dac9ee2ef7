"""The parent's decoder layers, each alone: read, run and let go, with what the model's own forward hands to it.

The model's forward is run with its decoder layers replaced by ones that hand on what they get. It then makes masks,
rotary tables and whatever else it gives each layer, and costs next to nothing. That is what a layer is called with
alone, so that no more than one needs to have its weights in memory.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import UnsupportedModel
from ..runtime.layout import AttentionSite
from .outputs import answers
from .tables import TABLES, narrow_tables

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments of a decoder layer beside the hidden states."""


class DecoderLayers:
    """The stack of decoder layers of a model whose other parts are in memory.

    Args:
        shell: the model in float32; parameters of its decoder layers may be on the meta device.
        sites: its attentions.
        read: the parent's value of a parameter, in float32, by name.

    Raises:
        UnsupportedModel: the attentions are not in one stack of layers, each called once, in order, on what the one
            before it returned.
    """

    def __init__(self, shell: PreTrainedModel, sites: Sequence[AttentionSite], read: Callable[[str], Tensor]) -> None:
        self.shell, self.read = shell.eval(), read
        for site in sites:
            if site.sees_ahead:  # fits are of text whose tokens see those before them, as those that are generated do
                shell.get_submodule(site.module).is_causal = True  # type: ignore[assignment]
        self.name, self.place = stack_of(sites)
        found = shell.get_submodule(self.name)
        if not isinstance(found, nn.ModuleList):
            raise UnsupportedModel(f"{type(shell).__name__}: its decoder layers are no list of modules ({self.name}).")
        self.stack: list[nn.Module] = list(found)
        self.wraps = False
        """Whether layers return more than the hidden states, which then come first."""
        self._check_chain()
        self._narrow_tables()

    def __len__(self) -> int:
        return len(self.stack)

    @property
    def device(self) -> torch.device:
        """Where layers run."""
        return self.shell.device

    def entering(self, ids_BT: Tensor) -> tuple[Tensor, list[Call]]:
        """What the first layer reads, and the other arguments of every layer."""
        seen = self._record(ids_BT, None)
        return seen[0][0], [call for _, call in seen]

    def build(self, index: int) -> nn.Module:
        """Layer `index` of the parent, in float32; nothing is to be written to it."""
        return self._filled(index, lambda name: nn.Parameter(self._value(index, name), requires_grad=False))

    def like(self, index: int, built: nn.Module, own: Mapping[str, Tensor | None]) -> nn.Module:
        """A second layer `index` that has the parameters of `built`, which is the first.

        Args:
            own: parameters, by name in the model, that it has for itself, with their values; None: as in the first.
        """

        def parameter(name: str) -> nn.Parameter:
            shared, full = built.get_parameter(name), f"{self.name}.{index}.{name}"
            if full not in own:
                return shared
            value = own[full]
            value = shared.detach() if value is None else value.to(self.device)
            return nn.Parameter(value.clone(), requires_grad=False)

        return self._filled(index, parameter)

    def _filled(self, index: int, parameter: Callable[[str], nn.Parameter]) -> nn.Module:
        layer = self.stack[index]
        memo: dict[int, Any] = {id(self.shell.config): self.shell.config}
        memo |= {id(empty): parameter(name) for name, empty in layer.named_parameters()}
        return copy.deepcopy(layer, memo).eval()

    def _value(self, index: int, name: str) -> Tensor:
        return self.read(f"{self.name}.{index}.{name}").to(self.device)

    def run(self, layer: nn.Module, h: Tensor, call: Call) -> Tensor:
        """What the layer makes of hidden states `h`."""
        found = layer(h, *call[0], **call[1])
        out: Tensor = found[0] if isinstance(found, tuple) else found
        return out

    def answers(self, h: Tensor, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """`outputs.answers` of the model whose last layer returned `h`."""
        with self._layers(lambda index, got: h if index == len(self.stack) - 1 else got):
            return answers(self.shell, ids_BT, mask_BT)

    def _record(self, ids_BT: Tensor, made: list[Tensor] | None) -> list[tuple[Tensor, Call]]:
        """Hidden states and other arguments of each layer.

        Args:
            made: where given, layers return fresh tensors, which are put there.
        """
        seen: list[tuple[Tensor, Call]] = []

        def note(index: int, h: Tensor, call: Call) -> Tensor:
            if index != len(seen):
                raise UnsupportedModel(
                    f"layer {index}: {type(self.shell).__name__} does not call its layers once each, in order, and its "
                    "arguments cannot be recorded. Convert without calibration text."
                )
            seen.append((h.detach(), call))
            if made is None:
                return h
            made.append(torch.randn_like(h))
            return made[-1]

        base = getattr(self.shell, "base_model", self.shell)
        with self._layers(None, note), torch.no_grad():
            base(input_ids=ids_BT.to(self.device), use_cache=False)
        return seen

    def _check_chain(self) -> None:
        """Find out what layers return, and whether each reads what the one before it returned, and nothing else of it.

        Raises:
            UnsupportedModel: names the layer that does not.
        """
        ids = torch.arange(8).reshape(2, 4) % 3 + 1
        failure = 0
        for self.wraps in (False, True):
            made: list[Tensor] = []
            try:
                seen = self._record(ids, made)
            except UnsupportedModel:
                raise
            except Exception:  # whatever a model raises on what it does not expect
                failure = max(failure, len(made))
                continue
            wrong = next((i for i, (h, _) in enumerate(seen) if i and not _same(h, made[i - 1])), None)
            if wrong is None and len(seen) == len(self.stack):
                return
            failure = max(failure, len(seen) if wrong is None else wrong)
        raise UnsupportedModel(
            f"layer {failure}: {type(self.shell).__name__} does not hand it what the layer before returned, so that "
            "its arguments cannot be recorded. Convert without calibration text."
        )

    @torch.no_grad()
    def _narrow_tables(self) -> None:
        """Keep tables in half precision where what goes into the layers, and comes out of the model, stays the same."""
        ids, mask = torch.arange(8).reshape(2, 4) % 3 + 1, torch.ones(2, 4, dtype=torch.bool)

        def ends() -> list[Tensor]:
            h = self.entering(ids)[0]
            return [h, self.answers(h, ids, mask)]

        before = ends()
        restore = narrow_tables(self.shell, [m for layer in self.stack for m in layer.modules()])
        same = all(a.dtype == b.dtype and torch.allclose(a, b, 1e-5, 1e-5) for a, b in zip(before, ends(), strict=True))
        if not same:  # the model reads a table, or its dtype, in a way of its own
            restore()

    @contextmanager
    def _layers(
        self,
        make: Callable[[int, Tensor], Tensor] | None,
        note: Callable[[int, Tensor, Call], Tensor] | None = None,
    ) -> Iterator[None]:
        """Inside, the shell's layers return what `make` or `note` gives for the hidden states that they get."""

        def stub(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                h = args[0] if args else kwargs["hidden_states"]
                if note is not None:
                    rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
                    out = note(index, h, (args[1:], rest))
                else:
                    assert make is not None
                    out = make(index, h)
                return (out, None) if self.wraps else out

            return forward

        try:
            for index, layer in enumerate(self.stack):
                layer.forward = stub(index)
            yield
        finally:
            for layer in self.stack:
                layer.__dict__.pop("forward", None)


def shell_of(parent: PreTrainedModel, names: Iterable[str], *, shares: bool = False) -> PreTrainedModel:
    """`parent` in float32 without the values of the parameters `names`; all others are its own where they can be.

    Args:
        shares: tables beside the layers are the parent's own modules: what is done to them is done to it.
    """
    left = set(names)
    memo: dict[int, Any] = {}
    for name, module in parent.named_modules() if shares else ():
        if type(module) in TABLES and f"{name}.weight" not in left:
            memo[id(module)] = module
    for name, parameter in parent.named_parameters(remove_duplicate=False):
        if id(parameter) in memo:
            continue
        if name in left:
            dtype = torch.float32 if parameter.is_floating_point() else parameter.dtype
            empty = torch.empty_like(parameter, device="meta", dtype=dtype)
            memo[id(parameter)] = nn.Parameter(empty, requires_grad=False)
        elif parameter.dtype == torch.float32:
            memo[id(parameter)] = parameter
    made = copy.deepcopy(parent, memo).eval()
    return made if all(p.dtype == torch.float32 for p in made.parameters() if p.is_floating_point()) else made.float()


def layer_parameters(model: PreTrainedModel, sites: Sequence[AttentionSite]) -> list[str]:
    """Names of all parameters of the decoder layers that the attentions stand in, and of the other layers beside."""
    prefix = stack_of(sites)[0] + "."
    return [name for name, _ in model.named_parameters(remove_duplicate=False) if name.startswith(prefix)]


def stack_of(sites: Sequence[AttentionSite]) -> tuple[str, dict[int, int]]:
    """The name of the list of layers that all attentions are in, each in a layer of its own; and each one's place.

    Raises:
        UnsupportedModel: there is none.
    """
    found: list[dict[str, int]] = []
    for site in sites:
        parts = site.module.split(".")
        found.append({".".join(parts[:i]): int(parts[i]) for i in range(1, len(parts)) if parts[i].isdigit()})
    for name in found[0]:
        places = [at.get(name) for at in found]
        if None not in places and len(set(places)) == len(places):
            return name, {site.layer: at[name] for site, at in zip(sites, found, strict=True)}
    raise UnsupportedModel(
        f"layer {sites[0].layer}: its attentions do not stand in one list of decoder layers, so that the layers' "
        "arguments cannot be recorded. Convert without calibration text."
    )


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)
