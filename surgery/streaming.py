"""Convert a checkpoint from disk to disk, one layer at a time: the model is never in memory as a whole."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .anatomy import examine
from .checkpoint import Checkpoint, copy_companions, new_folder, write_shards
from .native import native_config
from .plan import Plan
from .provenance import provenance, write_provenance
from .rewriters import rewriter_for
from .rewriters.attention_weights import parameter_names, read_attention, write_attention
from .runtime.layout import AttentionSite
from .show import progress


def can_stream(plan: Plan, checkpoint: Checkpoint) -> bool:
    """Whether the result is of the parent's own class, and the files name tensors as the model does."""
    return plan.native and all(name in checkpoint for site in plan.anatomy.sites for name in parameter_names(site))


def stream(checkpoint: Checkpoint, plan: Plan, out: str | Path, *, seed: int = 0, overwrite: bool = False) -> None:
    """Read, rewrite and write `checkpoint` by the data-free form of the plan's recipe.

    Memory: one output shard (1 GB) and the statistics of one layer.

    Raises:
        CheckpointError: a tensor is unusable or `out` cannot be written; `out` is then as it was.
    """
    config: Any = native_config(plan.anatomy.config, plan.anatomy.sites, plan.after[0].project.kv_heads)
    targets = {site.layer: site for site in examine(config).sites}
    names = checkpoint.names()
    with new_folder(out, overwrite) as folder, progress("converting", len(names)) as advance:
        write_shards(folder, _rewritten(checkpoint, plan, targets, seed, advance))
        data = provenance(plan, plan.anatomy.config, None, seed)
        config.surgery = data
        config.save_pretrained(folder)
        copy_companions(checkpoint.folder, folder)
        write_provenance(folder, data)


def _rewritten(
    checkpoint: Checkpoint, plan: Plan, targets: dict[int, AttentionSite], seed: int, advance: Any
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the result. A layer is rewritten when the first of its tensors is met."""
    torch.manual_seed(seed)
    rewriters = [(step, rewriter_for(step, seed)) for step in plan.recipe.steps]
    site_of = {name: site for site, _ in plan.changed() for name in parameter_names(site)}
    heads_of = {site.layer: layer.project for site, layer in plan.changed()}
    done: set[int] = set()
    for name in checkpoint.names():
        advance(1)
        site = site_of.get(name)
        if site is None:
            yield name, checkpoint.get(name)
        elif site.layer not in done:
            done.add(site.layer)
            weights = read_attention(site, checkpoint.get)
            for step, rewriter in rewriters:
                if step.selects(site.layer):
                    weights = rewriter.rewrite(weights, heads_of[site.layer])
            yield from write_attention(weights, targets[site.layer], checkpoint.get).items()
