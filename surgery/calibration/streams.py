"""Hidden states over the calibration windows, batch by batch: in memory while they are small, else in files."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


class Stream:
    """One tensor for each batch of windows.

    Args:
        name: the start of file names.
        folder: where tensors are put; None keeps them in memory.
        dtype: that they are kept in; they are given out in float32.
    """

    def __init__(self, name: str, folder: Path | None, dtype: torch.dtype = torch.float32) -> None:
        self.name, self.folder, self.dtype = name, folder, dtype
        self._held: dict[int, Tensor] = {}
        self._files: dict[int, Path] = {}

    def __setitem__(self, batch: int, value: Tensor) -> None:
        kept = value.detach().to("cpu", self.dtype).contiguous()
        if self.folder is None:
            self._held[batch] = kept
            return
        file = self.folder / f"{self.name}-{batch}.safetensors"
        save_file({"h": kept}, file)
        self._files[batch] = file

    def __getitem__(self, batch: int) -> Tensor:
        if batch in self._held:
            return self._held[batch].float()
        with safe_open(self._files[batch], framework="pt") as file:
            found: Tensor = file.get_tensor("h")
        return found.to(torch.float32, copy=True)  # not the mapped file, whose place in memory is none of a tensor's

    def files(self) -> list[str]:
        """Names of the files that hold it, in the order of the batches."""
        return [self._files[batch].name for batch in sorted(self._files)]

    def find(self, files: list[str]) -> None:
        """Take up the files that an interrupted run has left."""
        assert self.folder is not None
        self._files = {batch: self.folder / name for batch, name in enumerate(files)}

    def drop(self) -> None:
        """Let go of all that it holds."""
        self._held.clear()
        for file in self._files.values():
            file.unlink(missing_ok=True)
        self._files.clear()
