"""How one converted layer makes, shares, keeps and stores its cache: one value for each of four axes.

Pure frozen data, JSON round-trippable. It lives in the runtime because exported checkpoints carry it in
`config.surgery` and rebuild their attention from it; plans write it. The values of the axes stand in `project.py`,
`retain.py` and `store.py`; a kind of value that is registered there can be planned, converted, run and loaded.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from .codecs import CODECS
from .project import PROJECTS, Heads, Latent, Project, position_numbers
from .ranked import Ranked
from .retain import RETAINS, Evict, Gate, Pool, Trained
from .retained import AHEAD, Retain
from .site import AttentionSite, HeadNorm, OutputGate, Projection, Rotary, from_json
from .store import STORES, Codec, Dense, Store, itemsize_of

__all__ = [
    "AHEAD", "AttentionSite", "Codec", "Dense", "Evict", "Gate", "HeadNorm", "Heads", "Latent", "LayerPlan",
    "OutputGate", "Pool", "Project", "Projection", "Ranked", "Retain", "Rotary", "Store", "Trained", "position_numbers",
]  # fmt: skip

VERSION = 2
"""Of the JSON of a `LayerPlan`. Version 1 names none, has `dtype` in the place of `store`, `retain` by `method`."""


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """How one layer makes, shares, keeps and stores its cache (architecture: the four axes)."""

    layer: int
    project: Project
    """Project axis: a `Project`."""
    owner: int
    """Share axis: index of the layer whose cache is read; its own index where it owns one."""
    value_owner: int | None = None
    """Share axis of V alone, in a layer that owns its K: index of the layer whose V is read (SVFormer)."""
    window: int | None = None
    """Retain axis: newest tokens that the parent's attention sees; None where it sees all."""
    retain: Retain | None = None
    """Retain axis: averaging or eviction. A reader has that of its owner, whose slots it follows."""
    store: Store = field(default_factory=Dense)
    """Store axis: a `Store`."""

    @property
    def dtype(self) -> str:
        """Format of one number that is not encoded."""
        return self.store.dtype

    @property
    def owns_cache(self) -> bool:
        """Whether the layer keeps a cache of its own, that of K at least."""
        return self.owner == self.layer

    def entry(self, itemsize: int | None = None) -> tuple[int, int, int]:
        """Heads, width of keys and width of values that one token adds to the layer's own cache.

        Args:
            itemsize: bytes of one number; None: those of the plan's dtype.
        """
        if not self.owns_cache:
            return 0, 0, 0
        heads, key, value = self.project.entry(itemsize or itemsize_of(self.dtype))
        return heads, key, 0 if self.value_owner is not None else value

    @property
    def decisions(self) -> int:
        """Decisions per token of a `Retain` value: one for each head of the layer's own cache; a latent is one."""
        return self.entry()[0]

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one more token adds to the cache while the window, if any, is not full; on average where tokens
        are averaged or dropped, and of a format that holds tokens in groups."""
        some, more = (self.store.bytes_at(tokens, self.entry()) for tokens in (2**15, 2**16))
        whole = round((more - some) / 2**15)
        return whole if self.retain is None else round(whole / self.retain.ratio_of(self.decisions))

    @property
    def asks_separators(self) -> bool:
        """Whether the cache of the layer is to be told which tokens separate parts of the text."""
        return self.owns_cache and isinstance(self.retain, Ranked) and self.retain.reads_separators

    @property
    def lenders(self) -> tuple[int, ...]:
        """Layers whose cache this one reads beside its own."""
        if not self.owns_cache:
            return (self.owner,)
        return () if self.value_owner is None else (self.value_owner,)

    @property
    def absent(self) -> tuple[str, ...]:
        """Modules that the layer does without: those that would make K and V which it reads elsewhere."""
        keys = () if self.owns_cache else ("k_proj", "k_norm", "kv_down", "gate", "codec")
        return (*keys, "v_proj", "v_norm") if self.lenders else keys

    def bytes_at(self, tokens: int) -> int:
        """Bytes of this layer's dynamic cache after `tokens` tokens; a window keeps its newest but one for the next.

        Where tokens are averaged or dropped: as many as the plan's ratio leaves.
        """
        if self.retain is not None:
            in_pages = self.retain.bytes_at(tokens, *self._paged()) if self.owns_cache else 0
            return in_pages + self._beside_pages()
        kept = tokens if self.window is None else min(tokens, self.window - 1)
        return self.store.bytes_at(kept, self.entry())

    def static_bytes(self, tokens: int, ratio: float | None = None) -> int:
        """Bytes that a static cache for one sequence of `tokens` tokens allocates at once for this layer.

        Args:
            ratio: tokens per slot that a pool of pages is sized for; None: the plan's.
        """
        if self.retain is not None:
            in_pages = self.retain.static_bytes(tokens, *self._paged(), ratio) if self.owns_cache else 0
            return in_pages + self._beside_pages()
        return self.store.static_bytes(min(tokens, self.window or tokens), self.entry())

    def bytes_of_pages(self, pages: float, table: int) -> int:
        """Bytes of one sequence with so many pages in all, and tables with `table` entries per KV head (`retain`)."""
        assert self.retain is not None
        in_pages = self.retain.bytes_of_pages(pages, table, *self._paged()) if self.owns_cache else 0
        return in_pages + self._beside_pages()

    def _paged(self) -> tuple[int, int, int]:
        """Heads, numbers of a key and a value, and bytes of a number: what the bytes of pages are made of.

        Of codes: bytes of those of a key and a value, and 1.
        """
        heads, key, value = self.entry()
        if isinstance(self.store, Codec):
            return heads, self.store.bytes_of_slot(key, value), 1
        return heads, key + value, itemsize_of(self.dtype)

    def _beside_pages(self) -> int:
        """Bytes of the slots that are held in full beside pages of codes."""
        if not self.owns_cache or not isinstance(self.store, Codec):
            return 0
        heads, key, value = self.entry()
        return heads * (self.store.sinks + self.store.recent) * (key + value) * itemsize_of(self.dtype)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with the version of its form."""
        return {"version": VERSION, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> LayerPlan:
        """Read what `to_dict` wrote, in this version or an earlier one.

        Raises:
            ValueError: a later version wrote it, or it names a kind of value that is not known here.
        """
        data = _upgraded(dict(data))
        for axis, kinds in (("project", PROJECTS), ("retain", RETAINS), ("store", STORES)):
            if data.get(axis) is not None:
                kind = data[axis]["kind"]
                if kind not in kinds:
                    raise ValueError(
                        f"layer {data['layer']}: {axis} is of kind {kind!r}, which is not known here. Known: "
                        f"{', '.join(kinds)}. Use the version of surgery that wrote it, or a newer one."
                    )
                data[axis] = from_json(kinds[kind], data[axis])
        unknown = data["retain"].unknown() if data.get("retain") is not None else None
        if unknown is not None:
            raise ValueError(
                f"layer {data['layer']}: tokens leave by {unknown} Register it first, or use the version of surgery "
                "that wrote it."
            )
        if isinstance(data["store"], Codec) and data["store"].codec not in CODECS:
            raise ValueError(
                f"layer {data['layer']}: its cache is stored by the codec {data['store'].codec!r}, which is not known "
                f"here. Known: {', '.join(CODECS)}. Register it first, or use the version of surgery that wrote it."
            )
        return cls(**data)


def _upgraded(data: dict[str, Any]) -> dict[str, Any]:
    """Data of an earlier version in the form of this one."""
    version = data.pop("version", 1)
    if version > VERSION:
        raise ValueError(
            f"layer {data.get('layer')}: its plan is of version {version}, and this surgery reads up to {VERSION}. "
            "Use a newer surgery."
        )
    if version == 1:
        data["project"] = {"kind": "heads", **data["project"]}  # plans written before there were latents name no kind
        data["store"] = {"kind": "dense", "dtype": data.pop("dtype", "bfloat16")}
        if data.get("retain") is not None:
            data["retain"] = _retain_of_version_1(dict(data["retain"]))
    return data


def _retain_of_version_1(data: dict[str, Any]) -> dict[str, Any]:
    """One class said all: `method`, and a gate whose name began with `score:` where nothing was trained."""
    kind, gate = data.pop("method"), data.pop("gate", "adapter")
    if gate.startswith("score:"):
        data = {name: data[name] for name in ("ratio", "window", "sinks", "page") if name in data}
        return {"kind": "evict", "scorer": gate.removeprefix("score:"), **data}
    return {"kind": kind, "gate": gate, **data}
