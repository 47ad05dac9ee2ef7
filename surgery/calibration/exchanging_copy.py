"""A working copy whose attentions may be computed in a form that the parent's classes do not have.

This is not the runtime: it has no cache, it runs whole sequences, and the parent's own attention is computed too and
thrown away. What it buys is that every family runs, at any layer, without a module or a class being replaced: a hook
on the projection of q notes its input, one before `o` exchanges what `o` reads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..anatomy import Anatomy
from ..runtime.layout import AttentionSite
from .statistics import module_of
from .working_copy import WorkingCopy


class ExchangingCopy(WorkingCopy):
    """Subclasses say which layers they compute (`computes`), and compute them (`head_outputs`)."""

    def __init__(self, parent: PreTrainedModel, anatomy: Anatomy) -> None:
        super().__init__(parent, anatomy)
        self.inputs: dict[int, Tensor] = {}
        """What q, k and v of each layer were projected from in the last forward pass, [B, T, D]."""
        for site in self.sites.values():
            self.model.get_submodule(module_of(site.q)).register_forward_hook(self._note(site.layer))
            self.model.get_submodule(module_of(site.o)).register_forward_pre_hook(self._exchange(site))

    def computes(self, layer: int) -> bool:
        """Whether the layer is in a form of ours."""
        raise NotImplementedError

    def head_outputs(self, layer: int, get_tensor: Callable[[str], Tensor]) -> Tensor:
        """What `o` reads, [B, T, N, V], from `inputs` and parameters by name."""
        raise NotImplementedError

    def _note(self, layer: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            self.inputs[layer] = args[0].reshape(-1, *args[0].shape[-2:])

        return hook

    def _exchange(self, site: AttentionSite) -> Callable[..., Any]:
        columns = (torch.tensor(site.o.head_rows)[:, None] + torch.arange(site.value_dim)).flatten()

        def attribute(name: str) -> Tensor:
            # Not get_parameter: torch.func puts tensors there that are no parameters.
            module, _, leaf = name.rpartition(".")
            found: Tensor = getattr(self.model.get_submodule(module), leaf)
            return found

        def hook(_: nn.Module, args: tuple[Any, ...]) -> Any:
            if not self.computes(site.layer):
                return None
            out = self.head_outputs(site.layer, attribute).flatten(2)
            made = torch.zeros_like(out).index_copy(-1, columns, out)
            return (made.reshape(args[0].shape), *args[1:])

        return hook
