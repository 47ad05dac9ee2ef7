"""Layers of a cache that hold something else than a key and a value for each token."""

from __future__ import annotations

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin


class WholeLayer(CacheLayerMixin):
    """A layer that is copied whole or not at all.

    What rebuilds a cache from its tensors, as `DynamicCache(list(cache))` does, would begin an empty one unnoticed.
    """

    layer: int

    def why_whole(self) -> str:
        """What a cache like this has not; `{}` stands for the word for what was asked for."""
        raise NotImplementedError

    def _refusal(self, what: str) -> ValueError:
        return ValueError(
            f"layer {self.layer}: a cache {self.why_whole().format(what)}, and cannot be taken apart into tensors or "
            "built from them. Copy it whole: copy.deepcopy(cache)."
        )

    @property
    def keys(self) -> Tensor:
        raise self._refusal("keys")

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        if value is not None:
            raise self._refusal("keys")

    @property
    def values(self) -> Tensor:
        raise self._refusal("values")

    @values.setter
    def values(self, value: Tensor | None) -> None:
        if value is not None:
            raise self._refusal("values")
