"""Layers of a cache that hold something else than a key and a value for each token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin


class Counted:
    """Stands where keys would be: says how many numbers are held, which some parents ask of every layer (Mllama)."""

    def __init__(self, layer: WholeLayer) -> None:
        self._layer = layer

    def numel(self) -> int:
        return sum(tensor.numel() for tensor in self._layer.tensors())

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # Python asks whether they are there
            raise AttributeError(name)
        raise self._layer.refusal("keys")


class WholeLayer(CacheLayerMixin):
    """A layer that is copied whole or not at all.

    What rebuilds a cache from its tensors, as `DynamicCache(list(cache))` does, would begin an empty one unnoticed.
    """

    layer: int

    def why_whole(self) -> str:
        """What a cache like this has not; `{}` stands for the word for what was asked for."""
        raise NotImplementedError

    def tensors(self) -> list[Tensor]:
        """All that the layer keeps."""
        raise NotImplementedError

    def _require(self, holds: bool | Tensor, message: str, more: Callable[[], str] = str) -> None:
        """Raise RuntimeError unless `holds`; in compiled steps the device asserts it, a GPU for good."""
        if isinstance(holds, Tensor) and torch.compiler.is_compiling():
            torch._assert_async(holds, message)
        elif not holds:
            raise RuntimeError(message + more())

    def _require_room(self, seen: int | Tensor, tokens: int, most: int) -> None:
        """Refuse tokens behind the end of a static cache."""
        self._require(
            seen + tokens <= most,
            f"layer {self.layer}: the static cache is for {most} tokens, and more came. Raise max_cache_len, or use a "
            "dynamic cache.",
            lambda: f" These make {int(seen) + tokens}.",
        )

    def refusal(self, what: str) -> ValueError:
        """Of `what` a layer of this kind has not."""
        return ValueError(
            f"layer {self.layer}: a cache {self.why_whole().format(what)}, and cannot be taken apart into tensors or "
            "built from them. Copy it whole: copy.deepcopy(cache)."
        )

    @property
    def keys(self) -> Any:
        return Counted(self)

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        if value is not None:
            raise self.refusal("keys")

    @property
    def values(self) -> Tensor:
        raise self.refusal("values")

    @values.setter
    def values(self, value: Tensor | None) -> None:
        if value is not None:
            raise self.refusal("values")
