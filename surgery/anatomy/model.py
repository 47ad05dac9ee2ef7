"""What `examine` found in a decoder, as data."""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from ..console import count, render, spans
from ..runtime.layout import AttentionSite
from .table import site_table


@dataclasses.dataclass(frozen=True, kw_only=True)
class OtherLayer:
    """A decoder layer without softmax attention (Mamba, linear attention); it is left alone."""

    layer: int
    module: str
    kind: str
    """Class name of the layer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Anatomy:
    """What `examine` found in a decoder.

    Examples:
        >>> import surgery
        >>> from surgery.bundled import SMALL
        >>> anatomy = surgery.examine(SMALL)
        >>> site = anatomy.sites[0]
        >>> anatomy.num_layers, site.heads, site.kv_heads, site.head_dim
        (6, 8, 8, 32)
        >>> site.k.weight
        'model.layers.0.self_attn.k_proj.weight'
    """

    architecture: str
    model_type: str
    num_layers: int
    """Decoder layers in all, those without attention included."""
    sites: tuple[AttentionSite, ...]
    other_layers: tuple[OtherLayer, ...]
    parameters: int
    dtype: str
    max_positions: int | None
    vocab_size: int
    irreplaceable: dict[int, str] = dataclasses.field(default_factory=dict)
    """Layers whose attention module cannot be replaced by one of ours, and why."""
    config: PretrainedConfig = dataclasses.field(repr=False, compare=False)
    """The model's config, for building relatives of it; not part of `to_dict`, as `kind`."""
    kind: type[PreTrainedModel] = dataclasses.field(repr=False, compare=False)
    """The model's class, whatever its config names: a model in memory may be of another."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data: everything but the config and the class."""
        names = [f.name for f in dataclasses.fields(self) if f.name not in ("config", "kind")]
        return {name: _plain(getattr(self, name)) for name in names}

    def __str__(self) -> str:
        return render(self.tables())

    def tables(self) -> list[Any]:
        """What `print(anatomy)` and `surgery inspect` show, as rich renderables."""
        context = "" if self.max_positions is None else f", context {self.max_positions:,}"
        headline = (
            f"[bold]{self.architecture}[/bold], {count(self.parameters)} parameters, {self.num_layers} layers, "
            f"{self.dtype}, vocabulary {self.vocab_size:,}{context}"
        )
        notes = [f"{spans([o.layer])}: {o.kind}, no softmax attention, left alone" for o in self.other_layers]
        return [headline, site_table(self.sites), *notes]


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
