"""Checkpoints of a training run: complete or not there, the oldest ones removed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from surgery.errors import CheckpointError

CHECKPOINT = "checkpoint-"
SAVING = ".saving"
"""Folder beside the checkpoints in which they are written and deleted."""


def checkpoints(root: Path) -> list[Path]:
    """Complete checkpoints, oldest first. What a killed run was writing has another name."""
    found = [p for p in root.glob(f"{CHECKPOINT}*") if p.name.removeprefix(CHECKPOINT).isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix(CHECKPOINT)))


def remove_checkpoints(root: Path, folders: list[Path]) -> None:
    """Delete checkpoints; one that is half deleted has another name, like one that is half written."""
    for folder in folders:
        (root / SAVING).mkdir(exist_ok=True)
        folder.rename(root / SAVING / f"old-{folder.name}")
        shutil.rmtree(root / SAVING / f"old-{folder.name}", ignore_errors=True)


def clean(root: Path) -> None:
    """Remove what a killed run was writing or deleting."""
    shutil.rmtree(root / SAVING, ignore_errors=True)


@contextmanager
def disk_errors(root: Path) -> Iterator[None]:
    """What the many writers of a checkpoint raise when the disk is full, as one error."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        text = str(error)
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in text and "No space" not in text:
            raise
        clean(root)
        kept = checkpoints(root)
        last = f"The last one stays: {kept[-1]}." if kept else "There is none yet."
        reason = "the disk is full" if "No space" in text or "PytorchStreamWriter" in text else text
        raise CheckpointError(
            f"{root}: a checkpoint cannot be written ({reason}). {last} Free space and resume."
        ) from error
