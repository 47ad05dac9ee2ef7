"""Convert a checkpoint from disk to disk, one layer at a time: the model is never in memory as a whole."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from ..anatomy import examine
from ..attention.weights import parameter_names, read_attention, write_changed
from ..console import progress
from ..plan import Plan
from ..planning.parent_class import native_config
from ..rewriters import rewriter_for
from ..runtime.layout import AttentionSite
from .companions import copy_companions
from .files import Checkpoint, Fit
from .provenance import provenance, write_provenance
from .writing import new_folder, write_shards


def can_stream(plan: Plan, fit: Fit) -> bool:
    """Whether the result is of the parent's own class, each method rewrites a layer from its weights alone, and the
    files hold the attentions as the model does."""
    alone = all(hasattr(method, "rewrite") for method in plan.methods())
    return (
        plan.native and alone and all(name in fit.same for site in plan.anatomy.sites for name in parameter_names(site))
    )


def stream(
    checkpoint: Checkpoint,
    plan: Plan,
    fit: Fit,
    out: str | Path,
    *,
    tokenizer: Any = None,
    seed: int = 0,
    overwrite: bool = False,
) -> None:
    """Read, rewrite and write `checkpoint` by the data-free form of the plan's recipe.

    Memory: the tensors and the statistics of one layer.

    Args:
        tokenizer: written in the place of the checkpoint's.

    Raises:
        CheckpointError: a tensor is unusable or `out` cannot be written; `out` is then as it was.
    """
    anatomy = plan.anatomy
    config: Any = native_config(anatomy.config, anatomy.sites, plan.after[0].project.kv_heads, anatomy.kind)
    targets = {site.layer: site for site in examine(config).sites}
    names = [name for name in checkpoint.names() if name not in fit.unused]
    with new_folder(out, overwrite) as folder, progress("converting", len(names)) as advance:
        write_shards(folder, _rewritten(checkpoint, names, plan, targets, seed, advance))
        data = provenance(plan, plan.anatomy.config, None, seed, fit.left_out)
        config.surgery = data
        config.save_pretrained(folder)
        copy_companions(checkpoint.folder, folder, tokenizer)
        write_provenance(folder, data)


def _rewritten(
    checkpoint: Checkpoint,
    names: list[str],
    plan: Plan,
    targets: dict[int, AttentionSite],
    seed: int,
    advance: Any,
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the result. A layer is rewritten, in float32, when the first of its tensors is met."""
    rewriters = [(step, rewriter_for(step, seed)) for step in plan.recipe.steps]
    site_of = {name: site for site, _ in plan.changed() for name in parameter_names(site)}
    heads_of = {site.layer: layer.project for site, layer in plan.changed()}
    done: set[int] = set()
    for name in names:
        advance(1)
        site = site_of.get(name)
        if site is None:
            yield name, checkpoint.get(name)
        elif site.layer not in done:
            done.add(site.layer)
            weights = read_attention(site, lambda name: checkpoint.get(name).float())
            for step, rewriter in rewriters:
                if step.selects(site.layer):
                    weights = rewriter.rewrite(weights, heads_of[site.layer])
            yield from write_changed(weights, targets[site.layer], site, checkpoint.get).items()
