"""What a conversion has reached, layer by layer, on disk: a program that was ended goes on where it was.

A recipe leads through the layers once or more (`WorkingCopy.visits`). After each layer of each way one file is written
whole: what the layer got, what the method keeps between layers, and where the streams stand. Streams that are left
behind go only then. Files survive the end of the program, however it ends.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .packing import load_packed, save_packed
from .streams import Stream

if TYPE_CHECKING:
    from .pipeline import Pipeline
    from .text import Windows
    from .working_copy import WorkingCopy

HELD_BYTES = 2 * 2**30
"""Streams that are kept in memory; larger ones go to files."""
STREAMS = 5
"""Streams that are there at once: those of both models before and after a layer, and the attention's wanted outputs."""


def stream_bytes(windows: Windows, width: int, dtype: torch.dtype, lenders: int = 0) -> int:
    """What the streams over these windows take.

    Args:
        width: numbers in a hidden state.
        lenders: layers whose inputs later ones read.
    """
    return (STREAMS + lenders) * windows.ids_BT.numel() * width * dtype.itemsize


class Journal:
    """The files of one conversion.

    Args:
        folder: theirs alone.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: dict[Any, Any] = {}
        """What the copy has that lies in files."""

    @property
    def is_empty(self) -> bool:
        """Whether no layer is done."""
        return not any(self.folder.glob("way-*.safetensors"))

    def entries(self, way: int) -> list[Path]:
        """The files of a way, in the order of the layers."""
        return sorted(self.folder.glob(f"way-{way:03}-*.safetensors"))

    def file(self, way: int, index: int) -> Path:
        """The file of a layer, or of the end of the way."""
        return self.folder / f"way-{way:03}-{index:04}.safetensors"

    def save(self, file: Path, copy: WorkingCopy, more: dict[str, Any]) -> None:
        """Put away what the copy got since the last time; its numbers then lie in the file, not in memory."""
        parts = {key: part for key, part in copy.parts().items() if self._known.get(key) is not part}
        save_packed({"parts": parts, "facts": copy.facts(), **more}, file)
        self.take(load_packed(file, mapped=True), copy)

    def take(self, entry: dict[str, Any], copy: WorkingCopy) -> None:
        """Give the copy what a file has."""
        copy.take_parts(entry["parts"], entry["facts"])
        self._known |= entry["parts"]


class Way:
    """One way through the layers: where its streams lie, and how far it has come.

    Args:
        folder: for streams; None keeps them in memory.
        journal: where layers that are done are put away; None keeps them in memory, and the way starts anew.
        kept: what the method keeps between layers.
    """

    def __init__(
        self, copy: WorkingCopy, number: int, folder: Path | None, journal: Journal | None, kept: dict[Any, Any]
    ) -> None:
        self.copy, self.number, self.folder, self.journal, self.kept = copy, number, folder, journal, kept

    def is_done(self) -> bool:
        """Whether it was walked to its end before; the copy then has what the layers got."""
        if self.journal is None:
            return False
        last: dict[str, Any] = {}
        for file in self.journal.entries(self.number):
            last = load_packed(file, mapped=True)
            self.copy.forget_model()
            self.journal.take(last, self.copy)
        self.last = last
        if last:
            self.kept.clear()
            self.kept.update(load_packed(self.journal.folder / last["kept"], mapped=False))
        return bool(last.get("is_end"))

    def begin(self, pipeline: Pipeline) -> int:
        """Bring the pipeline to the first layer that is not done; returns its index."""
        if self.journal is None or not self.last:
            self._sweep(set())
            return 0
        self._sweep({name for names in self.last["streams"].values() for name in names or ()})
        for name, files in self.last["streams"].items():
            stream = pipeline.parent
            if files is not None:
                stream = Stream(name if isinstance(name, str) else f"input-{name}", self.folder, pipeline.dtype)
                stream.find(files)
            if name == "parent":
                pipeline.parent = pipeline.student = stream
            elif name == "student":
                pipeline.student = stream
            else:
                pipeline.noted[name] = stream
        return int(self.last["next"])

    def passed(self, pipeline: Pipeline, index: int) -> None:
        """Layer `index` is done, and both streams have come through it."""
        streams: dict[Any, list[str] | None] = {"parent": pipeline.parent.files()}
        streams["student"] = None if pipeline.student is pipeline.parent else pipeline.student.files()
        streams |= {layer: stream.files() for layer, stream in pipeline.noted.items()}
        self._put_away(index, {"streams": streams, "next": index + 1})

    def end(self, layers: int) -> None:
        """All is done."""
        self._put_away(layers, {"is_end": True})

    def _put_away(self, index: int, more: dict[str, Any]) -> None:
        if self.journal is None:
            return
        kept = self.journal.folder / f"kept-{self.number:03}-{index:04}.safetensors"
        save_packed(self.kept, kept)
        self.journal.save(self.journal.file(self.number, index), self.copy, {**more, "kept": kept.name})
        for file in self.journal.folder.glob(f"kept-{self.number:03}-*"):
            if file != kept:
                file.unlink()

    def _sweep(self, used: set[str]) -> None:
        """Remove what an interrupted run has left behind."""
        for file in [] if self.folder is None else list(self.folder.iterdir()):
            if file.name not in used:
                file.unlink()


@contextmanager
def way_of(
    copy: WorkingCopy, number: int, windows: Windows, journal: Journal | None, kept: dict[Any, Any] | None
) -> Iterator[Way]:
    """The `number`th way through the layers of a copy, with a folder for its streams where they are large or stay.

    Args:
        kept: None for a method that keeps more between layers than it says: its way starts anew.
    """
    if journal is None:
        width = next(iter(copy.sites.values())).hidden_size
        if stream_bytes(windows, width, copy.stream_dtype) <= HELD_BYTES:
            yield Way(copy, number, None, None, {})
            return
        with tempfile.TemporaryDirectory(prefix="surgery-streams-") as scratch:
            yield Way(copy, number, Path(scratch), None, {})
        return
    folder = journal.folder / f"streams-{number:03}"
    folder.mkdir(exist_ok=True)
    yield Way(copy, number, folder, None if kept is None else journal, {} if kept is None else kept)
    shutil.rmtree(folder)
