"""The work folder of a conversion that goes on where it was interrupted: whose it is, and when it goes."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..calibration.journal import Journal
from ..calibration.text import Windows
from ..errors import CheckpointError
from ..plan import Plan
from .adapters import CONFIG as ADAPTER
from .files import read_json
from .provenance import versions

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_log = logging.getLogger(__name__)

SUFFIX = ".unfinished"
"""What the name of a work folder has after that of the result, which it lies beside."""
MANIFEST = "manifest.json"
_PARTIAL = f"{MANIFEST}.partial"
LOCK = "lock"
_LOOKS, _LOOK = 16, 65_536


def manifest(folder: Path, base: Path, plan: Plan, windows: Windows, seed: int, streams: str) -> dict[str, Any]:
    """What a conversion depends on, by the words in which people speak of it.

    Args:
        folder: the parent's, with an adapter where one is merged.
        base: where the parent's weights lie.
    """
    files = {file for place in (folder, base) for file in place.glob("*.safetensors")}
    files |= {base / "config.json", *folder.glob(ADAPTER)}  # which says how much of an adapter is merged
    return {
        "recipe": plan.recipe.to_dict(),
        "model": {file.name: file_digest(file) for file in sorted(files)},
        "text": {"windows": list(windows.ids_BT.shape), "tokens": windows.tokens, "digest": windows.digest},
        "seed": seed,
        "streams": streams,
        "versions": versions(),
    }


@contextmanager
def work_folder(out: str | Path, facts: dict[str, Any]) -> Iterator[Journal]:
    """The folder in which a conversion to `out` puts its layers away; it is removed at the end, or where it is empty.

    Args:
        facts: a `manifest`.

    Raises:
        CheckpointError: there is such a folder of another conversion.
    """
    target = Path(out).absolute()
    folder = target.with_name(target.name + SUFFIX)
    facts = json.loads(json.dumps(facts))
    if (folder / MANIFEST).is_file():
        found = read_json(folder / MANIFEST)
        differing = [name for name, fact in facts.items() if found.get(name) != fact]
        if differing:
            raise CheckpointError(
                f"{folder}: holds an unfinished conversion that differs in: {', '.join(differing)}. Delete that folder "
                "to begin anew, or choose another place for the result."
            )
    elif folder.exists() and {file.name for file in folder.iterdir()} - {LOCK, _PARTIAL}:
        raise CheckpointError(f"{folder}: is not empty, and no unfinished conversion. Choose another place to write.")
    journal = Journal(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written ({error.strerror}).") from None
    with _alone(folder):
        yield from _kept_on_failure(folder, journal, facts)
    done = folder.with_name(f".{folder.name}.done")
    folder.rename(done)  # half a folder must not pass for an unfinished conversion
    shutil.rmtree(done)


def _kept_on_failure(folder: Path, journal: Journal, facts: dict[str, Any]) -> Iterator[Journal]:
    try:
        (folder / _PARTIAL).write_text(json.dumps(facts, indent=2) + "\n")
        (folder / _PARTIAL).replace(folder / MANIFEST)
        yield journal
    except BaseException:
        if journal.is_empty:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            _log.warning("%s has the layers that are done: the same call goes on from there.", folder)
        raise


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Inside, no other process works in the folder; the lock goes with the process, however that ends.

    Raises:
        CheckpointError: another one does.
    """
    if fcntl is None:
        yield
        return
    with (folder / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise CheckpointError(f"{folder}: another process works there. Wait for it, or end it.") from None
        yield


def file_digest(file: Path) -> dict[str, Any]:
    """Size, and a digest of the start and of samples throughout: weights that were trained further differ there."""
    size = file.stat().st_size
    found = hashlib.sha256()
    with file.open("rb") as opened:
        for look in range(_LOOKS):
            opened.seek(max(0, size - _LOOK) * look // (_LOOKS - 1))
            found.update(opened.read(_LOOK))
    return {"bytes": size, "digest": found.hexdigest()}
