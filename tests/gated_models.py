"""Tiny models with gated attention whose gates decide at random, reproducibly, without training."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from methods import METHODS, fewer_in_odd_layers, own_groups, parent, select_heads, sites, unequal
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from surgery.runtime.canonical import canonical_weights
from surgery.runtime.gates import gate_shapes
from surgery.runtime.layout import Dense, Heads, LayerPlan, Project, Retain
from surgery.runtime.modeling import from_parent
from surgery.runtime.retain import RETAINS

DENSE = Dense(dtype="float32")
GREEDY = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12}
GROUPS = {"own": own_groups, "fewer": fewer_in_odd_layers, "unequal": unequal}


def merge(method: str, window: int | None, ratio: float = 2.0, **more: Any) -> Retain:
    return RETAINS[method](window=window, ratio=ratio, **more)


def merged_model(
    retain: Retain,
    family: str = "llama",
    *,
    drops: float = 0.7,
    groups: str = "own",
    shared: bool = False,
    latent: str | None = None,
) -> PreTrainedModel:
    """Layers with a window of their own stay as they are.

    Args:
        drops: about this part of the decisions is 1; 0 and 1 are exact.
        shared: layer 1 reads layer 0's slots.
        latent: of `METHODS`, in the place of groups: what is cached instead of heads.
    """
    model, plans, weights = parent(family), [], {}
    generator = torch.Generator().manual_seed(7)
    for site in sites(family):
        if latent is None:
            found = GROUPS[groups](site)
            project: Project = Heads(
                kv_heads=len(found), head_dim=site.head_dim, value_dim=site.value_dim, groups=found
            )
            tensors = select_heads(site, canonical_weights(site, model.state_dict().__getitem__), found)
        else:
            project, tensors = METHODS[latent].plan_and_weights(site, model)
        owner = 0 if shared and site.layer else site.layer
        kept = retain if site.window is None else None
        plan = LayerPlan(
            layer=site.layer,
            project=project,
            owner=owner,
            retain=kept,
            window=site.window,
            store=DENSE,
        )
        if kept is not None and owner == site.layer:
            shapes = gate_shapes(retain, site.hidden_size, plan.decisions)
            gate = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
            gate["norm"] = torch.ones(shapes["norm"])
            # Logits are normal with deviation 1 about the quantile.
            share = torch.tensor(min(max(drops, 1e-6), 1 - 1e-6))
            middle = torch.special.ndtri(share) * (1.0 if 0 < drops < 1 else 1e3)
            gate["weight"] *= (0.0 if drops in (0, 1) else 1.0) / (retain.gain * site.hidden_size**0.5)
            gate["bias"] = ((middle - retain.offset) / retain.gain).expand(shapes["bias"]).clone()
            if retain.averages:
                # Weights from 0.02 to 1: their offset is 5.
                gate["mix_weight"] *= 3 / site.hidden_size**0.5
                gate["mix_bias"] -= 4
            tensors |= {f"gate.{name}": tensor for name, tensor in gate.items()}
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(plan.absent)}
        plans.append(plan)
        weights[site.layer] = tensors
    return from_parent(model, [replace(site) for site in sites(family)], plans, {"method": "test"}, weights)


@functools.cache
def model_of(method: str, window: int | None, **arguments: object) -> PreTrainedModel:
    return merged_model(merge(method, window), **arguments).eval()  # type: ignore[arg-type]


def tokens(batch: int = 2, length: int = 40, seed: int = 0) -> Tensor:
    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def run(model: PreTrainedModel, ids: Tensor, ends: Sequence[int], cache: Cache | None = None) -> tuple[Tensor, Cache]:
    """Logits of chunks that end at `ends`, and the cache."""
    cache, logits, begin = cache or DynamicCache(config=model.config), [], 0
    for end in ends:
        logits.append(model(ids[:, begin:end], past_key_values=cache, use_cache=True).logits)
        begin = end
    return torch.cat(logits, dim=1), cache


def contents(cache: Cache) -> list[list[Tensor]]:
    """Keys and values of every slot, by layer and row, in an order that does not depend on their places."""
    found = []
    for layer in cache.layers:
        slots = layer.slots()
        both = torch.cat((slots.key_BKSH, slots.value_BKSV), dim=-1).flatten(0, 1)
        counts = layer.lengths.flatten().tolist()
        found.append([row[:count][row[:count].sum(-1).argsort()] for row, count in zip(both, counts, strict=True)])
    return found
