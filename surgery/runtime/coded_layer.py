"""What dynamic and static layers of quantised caches share, and how they learn which tokens are padding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .layout import LayerPlan
from .quantised_attention import Seen
from .store import Codec
from .whole_layer import WholeLayer


class CodedLayer(WholeLayer):
    """What dynamic and static layers share.

    `update` gives back what attention reads, decoded: tokens of the call itself, the first ones and the newest as they
    came. So a chunk of tokens sees what each of them would see alone, until a group is full.

    Padding is told by `mask`, which whoever runs the model sets before each call (`prepare`). It is packed with the
    other columns and never sets a scale, and the first tokens of a padded sequence are its own first ones.
    """

    is_croppable = True
    supports_early_init = False
    is_sliding = False
    batch_size: int

    def __init__(self, plan: LayerPlan) -> None:
        super().__init__()
        assert isinstance(plan.store, Codec)
        self.store, self.layer = plan.store, plan.layer
        self.mask: Tensor | None = None
        self.tables: Mapping[str, Tensor] | None = None
        self._clear()

    def _clear(self) -> None:
        raise NotImplementedError

    def step(self, key_states: Tensor, value_states: Tensor) -> Seen:
        """As `update`, for one token of each sequence: what it sees, as it lies there. `can_step` must hold."""
        raise NotImplementedError

    @property
    def can_step(self) -> bool:
        """Whether something is packed, of keys and of values."""
        raise NotImplementedError

    def positions(self, tokens: int, given_BT: Tensor | None) -> Tensor:
        """[B, S]: of every column, by those of the newest `tokens`; none are kept, so that they must follow each other.

        Args:
            given_BT: [B or 1, T]; None where they are the columns.

        Raises:
            ValueError: the tokens of a sequence do not follow each other.
        """
        raise NotImplementedError

    def why_whole(self) -> str:
        return f"that is stored as {self.store.label()} has no {{}} as tensors of numbers"

    def offload(self) -> None:
        raise ValueError(f"layer {self.layer}: a cache of codes cannot be offloaded. Use a dynamic cache.")

    prefetch = offload

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self._select(torch.arange(self.batch_size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.is_initialized:
            self._select(torch.arange(self.batch_size)[indices.cpu()])

    def _select(self, rows_B: Tensor) -> None:
        raise NotImplementedError

    def _check_batch(self, key_states: Tensor) -> None:
        if len(key_states) != self.batch_size:
            raise ValueError(f"layer {self.layer}: the cache holds {self.batch_size} sequences, {len(key_states)} came")

    def _check_crop(self, count: int, held: int) -> None:
        if count > held:
            raise ValueError(
                f"layer {self.layer}: {count} tokens are to be taken back, and only the newest {held} are not packed "
                f"yet ({self.store.label()} keeps at least {self.store.recent} so). Raise `recent` in the recipe."
            )

    def _not_in_order(self) -> str:
        return (
            f"layer {self.layer}: {self.store.label()} holds keys before their rotation, and no positions: the tokens "
            "of a sequence must follow each other, and the position_ids that came do not. Leave them out, or use the "
            "codec kivi or int4."
        )


def require_finite(layer: int, name: str, store: Codec, holds: Tensor) -> None:
    """Refuse keys or values that no codec can keep, unless `holds`; in compiled steps the device asserts it.

    Raises:
        ValueError: names the layer.
    """
    message = (
        f"layer {layer}: its {name} hold numbers that are not finite, which {store.codec} cannot keep. The model "
        "overflows: run it in bfloat16 or float32."
    )
    if torch.compiler.is_compiling():
        torch._assert_async(holds, message)
    elif not bool(holds):
        raise ValueError(message)


def prepare(
    layer: Any, mask: Tensor | None, true_hides: bool = False, tables: Mapping[str, Tensor] | None = None
) -> None:
    """Tell a layer of a cache what the tokens of the next call bring; layers that are not ours ask for nothing.

    Args:
        mask: [B, S] of which 0 is padding, or of four dimensions, bool or additive; None without padding.
        true_hides: what True of a boolean mask of four dimensions means.
        tables: of a codec that is calibrated.
    """
    if isinstance(layer, CodedLayer):
        flip = mask is not None and mask.ndim == 4 and mask.dtype == torch.bool and true_hides
        layer.mask = ~mask if flip else mask  # type: ignore[operator]
        if not layer.is_initialized:
            layer.tables = tables
