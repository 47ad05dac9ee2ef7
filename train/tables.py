"""Tables of a training run: the plan before, the result after."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from surgery.console import count, human_bytes
from surgery.measure.gates import gated

from .losses import CHUNK_LOGITS
from .run import Setup, parameter_groups
from .trainer import core

_BARS = "▁▂▃▄▅▆▇█"
_CURVE = 48


def plan_tables(setup: Setup) -> list[Any]:
    """What will be trained, how long, and what it takes."""
    run, section = setup.run, setup.uptrain
    facts = Table(title=f"{'control run of the parent' if run.control else 'uptraining'}: {setup.folder.name}",
                  show_header=False, width=100)  # fmt: skip
    facts.add_column(style="bold")
    facts.add_column()
    facts.add_row(
        "tokens", f"{count(setup.tokens)} in {setup.schedule.steps:,} steps of {section.batch} x {setup.length}"
    )
    facts.add_row("devices", f"{setup.world}, {setup.accumulation} x {setup.micro_batch} sequences each per step")
    facts.add_row("data", f"{run.data}: {len(setup.documents):,} documents")
    for stage in setup.schedule.stages:
        facts.add_row(
            stage.name,
            f"{stage.steps:,} steps, peak learning rate {stage.learning_rate:.2g}: {_loss(setup, stage.name)}",
        )
    facts.add_row("learning rate", curve(setup))
    facts.add_row("parent", _parent(setup))
    for name, size in memory(setup).items():
        facts.add_row(name, human_bytes(size))
    return [facts, groups_table(parameter_groups(setup))]


def plan_data(setup: Setup) -> dict[str, Any]:
    """The numbers of `plan_tables` as plain data."""
    return {
        "tokens": setup.tokens,
        "steps": setup.schedule.steps,
        "parameters": parameter_groups(setup),
        "bytes": memory(setup),
    }


def groups_table(groups: dict[str, dict[str, int]]) -> Table:
    """Trained and frozen parameters by group."""
    table = Table(title="parameters", width=100)
    table.add_column("group")
    table.add_column("trained", justify="right")
    table.add_column("frozen", justify="right")
    for name, numbers in groups.items():
        table.add_row(name, f"{numbers['trained']:,}", f"{numbers['frozen']:,}")
    table.add_row("[bold]all[/bold]", *(f"{sum(n[kind] for n in groups.values()):,}" for kind in ("trained", "frozen")))
    return table


def summary_tables(summary: dict[str, Any]) -> list[Any]:
    """What the run was and what it did to held-out text."""
    table = Table(title="result", width=100)
    for name in ("", "parent", "before", "after", "change"):
        table.add_column(name, justify="left" if not name else "right")
    before, after = summary["before"], summary["after"]
    if before is not None:
        parent = before["parent_nats_per_token"] if summary["parent_bytes"] is not None else None
        values = before["nats_per_token"], after["nats_per_token"]
        table.add_row("held-out nats/token", "" if parent is None else f"{parent:.4f}", *(f"{v:.4f}" for v in values),
                      f"{values[1] - values[0]:+.4f}")  # fmt: skip
        if after.get("ratio") is not None:
            table.add_row("tokens per slot", "1", f"{before['ratio']:.2f}", f"{after['ratio']:.2f}", "")
        if parent is not None:
            table.add_row("KL to the parent", "0", f"{before['kl']:.4f}", f"{after['kl']:.4f}",
                          f"{after['kl'] - before['kl']:+.4f}")  # fmt: skip
            gap, left = values[0] - parent, values[1] - parent
            if gap > 0:
                table.add_row("gap to the parent", "0", f"{gap:.4f}", f"{left:.4f}", f"{1 - left / gap:.0%} closed")
    seconds = max(summary["seconds"], 1e-9)
    table.caption = (
        f"{count(summary['tokens'])} tokens in {summary['steps']:,} steps, {seconds:.0f} s, "
        f"{count(summary['tokens'] / seconds)} tokens/s"
        + (f", {summary['skipped_steps']} steps left out as not finite" if summary["skipped_steps"] else "")
    )
    return [table]


def curve(setup: Setup) -> str:
    """The learning rate over the run, relative to its largest."""
    steps = setup.schedule.steps
    rates = [setup.schedule.learning_rate(min(steps - 1, i * steps // _CURVE)) for i in range(_CURVE)]
    top = max(rates)
    return "".join(_BARS[round(rate / top * (len(_BARS) - 1))] for rate in rates) + f"  to {top:.2g}"


def memory(setup: Setup) -> dict[str, float]:
    """Bytes on one device, roughly; activations by rule of thumb. Nothing is sharded in these numbers."""
    plain = core(setup.model)
    config = plain.config.get_text_config(decoder=True)
    trained = sum(p.numel() for p in setup.model.parameters() if p.requires_grad)
    weights = sum(p.numel() * p.element_size() for p in setup.model.parameters())
    tokens = setup.micro_batch * setup.length
    wide = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    per_layer = (
        tokens * config.hidden_size if setup.run.checkpointing else tokens * (12 * config.hidden_size + 3 * wide)
    )
    logits = 5 * 4 * min(CHUNK_LOGITS, tokens * config.vocab_size)
    parts = {
        "weights": weights,
        "gradients, optimizer": trained * 4 * 3,
        "activations, roughly": 4 * per_layer * config.num_hidden_layers,
        "logits of a chunk": logits,
    }
    if setup.parent is not None:
        parts["parent's own weights"] = setup.parent.bytes
    return parts | {"memory per device": sum(parts.values())}


def _loss(setup: Setup, stage: str) -> str:
    section = setup.uptrain
    if stage == "layer-local":
        return "attention outputs, on the parent's inputs"
    names = {"kl": "KL(parent || model)", "ce": "cross-entropy", "hidden": "last hidden state"}
    if gated(core(setup.model)):
        names["gate_budget"] = "budget of the gates"
    return " + ".join(f"{getattr(section, k):g} {text}" for k, text in names.items() if getattr(section, k))


def _parent(setup: Setup) -> str:
    if setup.parent is None:
        return "not needed"
    return f"{setup.parent_name}" + (" (shares all weights but attention)" if setup.parent.shared else "")
