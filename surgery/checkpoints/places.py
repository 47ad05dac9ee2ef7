"""Where a checkpoint lies that somebody named: a folder, a GGUF, or a repository of the Hub."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from ..errors import CheckpointError
from .companions import BULK, WEIGHTS
from .files import INDEX, SINGLE
from .restored import restored

GGUF = ".gguf"
_ON_HUB = re.compile(r"(?P<name>[^/@]+/[^/@]+)/(?P<file>[^@]+\.gguf)(@(?P<revision>.+))?")


def local_folder(model: str | Path, weights: bool = True) -> Path:
    """The folder of a checkpoint: `model` itself where it is one, else the Hub's copy of that id.

    A GGUF, by its path (whatever its name) or alone in a folder, is restored first as `restored` does: the folder is
    that of the result.

    Args:
        model: folder, GGUF, or Hub id (`owner/name`, `owner/name@revision`, `owner/name/file.gguf`).
        weights: also fetch the safetensors files; False fetches the small files only.

    Raises:
        CheckpointError: neither a folder nor to be had from the Hub; a GGUF that cannot be read. UnsupportedModel: a
            GGUF of another kind of model.
    """
    path = Path(model)
    if path.is_dir():
        file = _gguf_in(path)
        return path if file is None else restored(file, weights)
    if path.is_file() and path.suffix == ".json" and not weights:
        return path.parent
    if path.is_file() and (path.suffix == GGUF or _begins_as_gguf(path)):
        return restored(path, weights)
    if path.exists():
        raise CheckpointError(f"{path}: is a file. Give the folder that holds config.json.")
    at = _ON_HUB.fullmatch(str(model))
    name, _, revision = str(model).partition("@")
    left = [*BULK, *(pattern for pattern in WEIGHTS if pattern != "*.safetensors" or not weights)]
    try:
        if at is not None:
            return restored(Path(hf_hub_download(at["name"], at["file"], revision=at["revision"])), weights)
        return Path(snapshot_download(name, revision=revision or None, ignore_patterns=left))
    except HFValidationError:
        what = "file" if str(model).endswith(GGUF) else "folder"
        raise CheckpointError(f"{model}: no such {what}.") from None
    except LocalEntryNotFoundError:
        raise CheckpointError(f"{model}: no such folder, and the Hub cannot be reached to look for that id.") from None
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{model}: no such folder, and the Hub says: {reason}") from None


def _begins_as_gguf(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(4) == b"GGUF"


def _gguf_in(folder: Path) -> Path | None:
    """The GGUF that a folder holds in the place of safetensors; None where it holds those, or no GGUF.

    Raises:
        CheckpointError: there are several.
    """
    if any((folder / name).is_file() for name in (SINGLE, INDEX, "adapter_config.json")):
        return None
    files = sorted(file for file in folder.glob(f"*{GGUF}") if not file.name.startswith("mmproj"))
    if len(files) > 1:
        raise CheckpointError(
            f"{folder}: holds {len(files)} GGUF files, such as {files[0].name} and {files[1].name}. Give one of them."
        )
    return files[0] if files else None
