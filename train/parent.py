"""The parent as a teacher: checked against what the model was converted from, frozen, and sharing what it can.

Where only attention differs, the parent is the model with the parent's attention modules in the place of its own: it
costs their weights and nothing else, on one device as under DDP and FSDP.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from surgery.checkpoints.provenance import provenance_of
from surgery.errors import CheckpointError, UnsupportedModel
from surgery.runtime.attention import SHARED_STATES
from surgery.runtime.layout import AttentionSite

from .losses import Head


class Parent:
    """What training asks of the parent: last hidden states, its head, its attention modules by name.

    Args:
        model: the parent as a whole; None where it shares the weights of the model that is trained.
        attention: the parent's attention modules by qualified name.
        head_scale, head_softcap: how logits follow from the output embedding (`read_head`).
    """

    def __init__(
        self,
        model: PreTrainedModel | None,
        attention: Mapping[str, nn.Module],
        head_scale: float = 1.0,
        head_softcap: float | None = None,
    ) -> None:
        self.model, self.attention = model, dict(attention)
        self.head_scale, self.head_softcap = head_scale, head_softcap
        for module in [*self.attention.values(), *([] if model is None else [model])]:
            module.requires_grad_(False).eval()
        for module in self.attention.values():
            module.register_forward_pre_hook(_without_shared_states, with_kwargs=True)

    @property
    def shared(self) -> bool:
        """Whether everything but attention is the trained model's own."""
        return self.model is None

    @property
    def bytes(self) -> int:
        """Bytes of the weights that the parent holds for itself."""
        modules = self.attention.values() if self.model is None else [self.model]
        tensors = {t.data_ptr(): t for module in modules for t in module.parameters()}
        return sum(t.numel() * t.element_size() for t in tensors.values())

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> None:
        """Move to `device`, and to `dtype` where one is named: under autocast the parent may be in its own."""
        for module in [*self.attention.values(), *([] if self.model is None else [self.model])]:
            nn.Module.to(module, device=device, dtype=dtype)

    @torch.no_grad()
    def last_hidden(self, trained: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Head]:
        """Last hidden states [B, T, D] and head of the parent.

        Args:
            trained: the model that is trained, unwrapped from DDP.
        """
        if self.model is not None:
            model: nn.Module = self.model
            with head_input(model) as seen:
                model(**inputs, use_cache=False)
            return seen[-1], head_of(model, self.head_scale, self.head_softcap)
        was = trained.training
        trained.eval()
        try:
            with self.in_place(trained), head_input(trained) as seen:
                trained(**inputs, use_cache=False)
        finally:
            trained.train(was)
        return seen[-1], head_of(trained, self.head_scale, self.head_softcap)

    @contextmanager
    def in_place(self, trained: nn.Module) -> Iterator[None]:
        """`trained` with the parent's attention modules in the place of its own."""
        own = {name: trained.get_submodule(name) for name in self.attention}
        try:
            for name, module in self.attention.items():
                _put(trained, name, module)
            yield
        finally:
            for name, module in own.items():
                _put(trained, name, module)


def _without_shared_states(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The parent's attention has no use for what a converted model hands from layer to layer."""
    return args, {name: value for name, value in kwargs.items() if name != SHARED_STATES}


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, module)


@contextmanager
def head_input(model: nn.Module) -> Iterator[list[Tensor]]:
    """Record what the output embedding reads, [B, T, D] per forward pass, and let it compute one token of it.

    The logits of the forward passes inside are those of the first token only.
    """
    seen: list[Tensor] = []

    def record(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen.append(args[0])
        return (args[0][:, :1], *args[1:])

    handle = output_embedding(model).register_forward_pre_hook(record)
    try:
        yield seen
    finally:
        handle.remove()


def output_embedding(model: Any) -> Any:
    """The last linear layer, which makes logits."""
    return model.get_output_embeddings()


def head_of(model: nn.Module, scale: float, softcap: float | None) -> Head:
    """The head as it is now; sharded weights are gathered, with their gradient scattered again."""
    embedding = output_embedding(model)
    bias = getattr(embedding, "bias", None)
    return Head(
        weight_VD=_whole(embedding.weight), bias_V=None if bias is None else _whole(bias), scale=scale, softcap=softcap
    )


def _whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@torch.no_grad()
def read_head(model: PreTrainedModel) -> tuple[float, float | None]:
    """(scale, softcap) between the output embedding and the logits, found on a few tokens and proved there.

    Raises:
        UnsupportedModel: the logits are made in another way.
    """
    config = model.config.get_text_config(decoder=True)
    softcap = getattr(config, "final_logit_softcapping", None)
    seen: list[Tensor] = []
    embedding = output_embedding(model)
    if not isinstance(embedding, nn.Linear):
        raise UnsupportedModel(f"{type(model).__name__}: its logits are not made by one linear layer.")
    handle = embedding.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    was = model.training
    try:
        model.eval()
        ids = torch.arange(8, device=model.device)[None] % config.vocab_size
        logits = model(input_ids=ids, use_cache=False).logits.float()
    finally:
        handle.remove()
        model.train(was)
    plain = embedding(seen[-1]).float()
    before = logits if softcap is None else torch.atanh((logits / softcap).clamp(-0.999999, 0.999999)) * softcap
    scale = float((before * plain).sum() / plain.square().sum().clamp_min(1e-30))
    scale = 1.0 if abs(scale - 1.0) < 1e-3 else scale
    made = head_of(model, scale, softcap)(seen[-1])
    if float((made - logits).norm()) > 1e-2 * float(logits.norm()):
        raise UnsupportedModel(
            f"{type(model).__name__}: its logits do not follow from its output embedding by a factor or a soft cap. "
            "Distillation in chunks cannot be computed for it."
        )
    return scale, softcap


def check_parent(child: PreTrainedModel, parent: PreTrainedModel, where: str) -> None:
    """Raise CheckpointError where `parent` cannot be what `child` was converted from, judged by their configs."""
    mine, theirs = (m.config.get_text_config(decoder=True) for m in (child, parent))
    surgery: dict[str, Any] = child.config.surgery
    own_class = "layers" in surgery  # otherwise the model is of the parent's
    architecture = surgery["parent"]["architecture"] if own_class else type(child).__name__
    if type(parent).__name__ != architecture:
        raise CheckpointError(f"{where}: is a {type(parent).__name__}, the model was converted from a {architecture}.")
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
        a, b = getattr(mine, name, None), getattr(theirs, name, None)
        if a != b:
            raise CheckpointError(
                f"{where}: {name} is {b}, the model has {a}: not its parent. It was converted from "
                f"{provenance_of(child).get('parent') or 'a model in memory'}."
            )


def check_sites(child: PreTrainedModel, sites: tuple[AttentionSite, ...], where: str) -> None:
    """Raise CheckpointError where the parent's attention is not of the form that the model's own record names."""
    for layer in child.config.surgery.get("layers", ()):
        site = AttentionSite.from_dict(layer["site"])
        found = next((s for s in sites if s.module == site.module), None)
        for name in ("heads", "kv_heads", "head_dim", "value_dim"):
            if found is None or getattr(found, name) != getattr(site, name):
                raise CheckpointError(
                    f"{where}: layer {site.layer} has {name} {getattr(found, name, None)}, the model was converted "
                    f"from one with {getattr(site, name)}: not its parent."
                )


def different_weights(child: nn.Module, parent: nn.Module, attention: set[str]) -> list[str]:
    """Names of parameters outside `attention` whose values differ, in the child's dtype."""
    inside = tuple(name + "." for name in attention)
    theirs = dict(parent.named_parameters())
    return [
        name
        for name, p in child.named_parameters()
        if not name.startswith(inside)
        and (
            name not in theirs
            or p.shape != theirs[name].shape
            or not torch.equal(p.detach().cpu(), theirs[name].to(p.dtype).cpu())
        )
    ]
