"""Write checkpoints: complete or not at all, one shard in memory."""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..errors import CheckpointError
from .files import INDEX, SINGLE, read_json


@contextmanager
def new_folder(target: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder that appears at `target` complete, or not at all.

    Yields a temporary sibling to write into. On success it is renamed to `target`; on any error, Ctrl-C included, it
    is removed and an older `target` stays as it was.

    Raises:
        CheckpointError: `target` exists and is not empty (without `overwrite`), cannot be written, or the disk fills.
    """
    target = Path(target).absolute()
    check_output(target, overwrite)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        sibling = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be written ({error.strerror}).") from None
    try:
        yield sibling
        sibling.chmod(0o755)
        if target.exists():
            # Two renames, not remove-then-rename: an interrupt between them leaves both versions on disk.
            old = sibling.with_suffix(".old")
            target.rename(old)
            sibling.rename(target)
            shutil.rmtree(old)
        else:
            sibling.rename(target)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(sibling, ignore_errors=True)
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            raise CheckpointError(f"{target}: the disk is full. Nothing was written.") from None
        raise CheckpointError(f"{target}: cannot be written ({error}). Nothing was written.") from error
    except BaseException:
        shutil.rmtree(sibling, ignore_errors=True)
        raise


def check_output(target: str | Path, overwrite: bool = False) -> None:
    """Raise CheckpointError where `new_folder` would refuse `target`: asked before long work is begun."""
    target = Path(target).absolute()
    if target.is_file():
        raise CheckpointError(f"{target}: is a file. Name a folder.")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise CheckpointError(f"{target}: exists and is not empty. Choose another folder, or pass --overwrite.")
    above = next(p for p in target.parents if p.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise CheckpointError(f"{target}: {above} cannot be written.")


def check_space(target: str | Path, bytes_needed: int) -> None:
    """Raise CheckpointError where the disk of `target` has less than `bytes_needed` free."""
    above = next(p for p in Path(target).absolute().parents if p.exists())
    free = shutil.disk_usage(above).free
    if free < bytes_needed:
        raise CheckpointError(
            f"{target}: needs {bytes_needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free. Choose another disk."
        )


def write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int = 1_000_000_000) -> None:
    """Write a stream of tensors as safetensors shards with an index, holding one tensor at a time in memory.

    Args:
        tensors: (name, tensor) in the order of writing.
        shard_bytes: size at which a shard is closed.
    """
    weight_map: dict[str, str] = {}
    shard = _Shard(folder, 1)
    written, count = 0, 1
    for name, tensor in tensors:
        bytes_here = tensor.numel() * tensor.element_size()
        if shard.bytes and shard.bytes + bytes_here > shard_bytes:
            shard.close()
            count += 1
            shard = _Shard(folder, count)
        shard.add(name, plain(tensor))
        weight_map[name] = shard.name
        written += bytes_here
    shard.close()
    # The number of shards is known only now; the names follow the convention of the Hub.
    names = {f"shard-{i}.safetensors": f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)}
    if count == 1:
        names = {"shard-1.safetensors": SINGLE}
    for old, new in names.items():
        (folder / old).rename(folder / new)
    if count > 1:
        index = {
            "metadata": {"total_size": written},
            "weight_map": {name: names[file] for name, file in weight_map.items()},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


class _Shard:
    """A safetensors file that is written tensor by tensor, which the library writes only whole, from memory.

    Numbers go to a file beside it at once; the header, which says where each tensor lies, is put before them at the
    end. Format: https://github.com/huggingface/safetensors#format.
    """

    def __init__(self, folder: Path, number: int) -> None:
        self.folder, self.name, self.bytes = folder, f"shard-{number}.safetensors", 0
        self._header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._numbers = (folder / f"{self.name}.numbers").open("w+b")

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one tensor, which lies one number after another."""
        size = tensor.numel() * tensor.element_size()
        offsets = [self.bytes, self.bytes + size]
        self._header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        tensor.cpu().reshape(-1).view(torch.uint8).numpy().tofile(self._numbers)
        self.bytes += size

    def close(self) -> None:
        """Put header and numbers together."""
        header = json.dumps(self._header).encode()
        header += b" " * (-len(header) % 8)
        self._numbers.seek(0)
        with (self.folder / self.name).open("wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            shutil.copyfileobj(self._numbers, file, 2**22)
        self._numbers.close()
        Path(self._numbers.name).unlink()


_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""Names of the format."""


def plain(tensor: Tensor) -> Tensor:
    """The same numbers laid out one after another: safetensors writes memory as it lies, and a lazily conjugated or
    negated tensor lies there as it was before."""
    return tensor.detach().resolve_conj().resolve_neg().contiguous()


def copy_weights(source: Path, target: Path, link: bool = False) -> None:
    """Copy the safetensors files of a checkpoint and their index, as they are.

    Args:
        link: hard links in the place of copies.

    Raises:
        CheckpointError: the disk has no room.
    """
    files = sorted(source.glob("*.safetensors"))
    index = source / INDEX
    if index.is_file():
        files = sorted({source / name for name in read_json(index)["weight_map"].values()})
        shutil.copyfile(index, target / INDEX)
    if not link:
        check_space(target, sum(file.stat().st_size for file in files))
    for file in files:
        if link:
            os.link(file.resolve(), target / file.name)  # a file of the Hub's cache is a symbolic link itself
        else:
            shutil.copyfile(file, target / file.name)
