"""Which caches a decode loop is timed with: plans over the sizes of a Llama-like decoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from ..anatomy import examine
from ..anatomy.reader import load_config
from ..checkpoints.files import read_json
from ..checkpoints.places import local_folder
from ..errors import RecipeError
from ..plan import plan
from ..runtime.layout import Dense, Heads, Latent, LayerPlan


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a Llama-like decoder."""

    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    """Of the original model."""
    head_dim: int
    vocabulary: int

    def config(self, dtype: str | torch.dtype, kv_heads: int | None = None, positions: int = 2048) -> Any:
        """A Llama of these sizes, or with other `kv_heads`."""
        return LlamaConfig(
            vocab_size=self.vocabulary, hidden_size=self.hidden, intermediate_size=self.mlp,
            num_hidden_layers=self.layers, num_attention_heads=self.heads,
            num_key_value_heads=kv_heads or self.kv_heads, head_dim=self.head_dim, max_position_embeddings=positions,
            dtype=dtype,
        )  # fmt: skip


SHAPES = {
    "llama-2-7b": Shape(hidden=4096, mlp=11008, layers=32, heads=32, kv_heads=32, head_dim=128, vocabulary=32000),
    "llama-3-8b": Shape(hidden=4096, mlp=14336, layers=32, heads=32, kv_heads=8, head_dim=128, vocabulary=128256),
    "small": Shape(hidden=512, mlp=1408, layers=4, heads=8, kv_heads=8, head_dim=64, vocabulary=2048),
}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The caches of all layers, as a plan has them."""

    name: str
    layers: tuple[LayerPlan, ...]
    is_parent: bool
    """Whether these are the shape's own caches."""

    @property
    def bytes_per_token(self) -> int:
        return sum(layer.bytes_per_token for layer in self.layers)

    @property
    def uniform_heads(self) -> int | None:
        """KV heads, where every layer caches so many of its own: what transformers can build too."""
        kinds = {(layer.project.kv_heads, layer.project.kind, layer.owner == layer.layer) for layer in self.layers}
        heads, kind, owns = next(iter(kinds))
        return heads if len(kinds) == 1 and owns and kind == "heads" else None


def layouts(shape: Shape, dtype: str, recipes: Sequence[Any]) -> list[Layout]:
    """What recipes make of a Llama of this shape, from their plans alone.

    Args:
        recipes: what `Recipe.load` takes; `identity` is the shape's own layout.

    Raises:
        RecipeError, PlanError: a recipe that does not fit the shape, or a layout that the loop does not have.
    """
    anatomy = examine(shape.config(dtype))
    made = [plan(anatomy, recipe) for recipe in recipes]
    return [
        Layout(name=p.recipe.name, layers=_supported(p.recipe.name, p.after), is_parent=p.after == p.before)
        for p in made
    ]


def of_model(model: str, dtype: str) -> tuple[Shape, Layout]:
    """Shape and caches of a checkpoint, from its config alone; what is not attention is taken for Llama's.

    Raises:
        CheckpointError: the config cannot be read.
        RecipeError: the loop does not have such caches, or some layers have no attention.
    """
    folder = local_folder(model)
    config: Any = load_config(folder)
    text = config.get_text_config(decoder=True)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    shape = Shape(
        hidden=text.hidden_size, mlp=text.intermediate_size, layers=text.num_hidden_layers,
        heads=text.num_attention_heads, kv_heads=getattr(text, "num_key_value_heads", text.num_attention_heads),
        head_dim=head_dim, vocabulary=text.vocab_size,
    )  # fmt: skip
    name = Path(model).name or model
    surgery = read_json(folder / "config.json").get("surgery") or {}
    if "layers" not in surgery:
        (own,) = layouts(shape, dtype, ["identity"])
        return shape, dataclasses.replace(own, name=name)
    plans = [LayerPlan.from_dict(layer["plan"]) for layer in surgery["layers"]]
    if len(plans) != shape.layers:
        raise RecipeError(f"{model}: {len(plans)} of {shape.layers} layers have an attention that was converted")
    layers = tuple(dataclasses.replace(p, store=Dense(dtype=dtype)) for p in plans)
    return shape, Layout(name=name, layers=_supported(model, layers), is_parent=False)


def _supported(where: str, layers: tuple[LayerPlan, ...]) -> tuple[LayerPlan, ...]:
    """The same layers, where the loop has kernels and caches for all of them."""
    for layer in layers:
        project = layer.project
        reason = None
        if not isinstance(layer.store, Dense):
            reason = f"is stored as {layer.store.label()}; the loop has no kernel for that"
        elif layer.retain is not None:
            reason = f"averages or drops tokens ({layer.retain.kind}); the loop has no cache for that"
        elif layer.window is not None:
            reason = "keeps a window of tokens; the loop has no cache for that"
        elif layer.value_owner is not None:
            reason = "reads V of another layer beside K of its own; the loop has no cache for that"
        elif isinstance(project, Latent) and project.rotate_on_read:
            reason = "rotates its keys at read; the loop has no kernel for that"
        elif isinstance(project, Heads) and not project.is_uniform:
            reason = "has groups of unequal size; the loop has no kernel for that"
        if reason is not None:
            raise RecipeError(f"{where}: layer {layer.layer} {reason}. Time generation instead: surgery eval --speed.")
    return layers
