"""What a kind of export is: it refuses, writes, and proves what it wrote. `export` in this package does the rest."""

from __future__ import annotations

import functools
import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import transformers
from transformers import PreTrainedModel

from ..anatomy.reader import load_config
from ..calibration.outputs import speaks
from ..calibration.text import load_tokenizer
from ..checkpoints.adapters import check_adapter
from ..checkpoints.classes import model_class
from ..checkpoints.companions import copy_companions
from ..checkpoints.files import read_json
from ..checkpoints.parents import plain_form
from ..checkpoints.places import local_folder
from ..checkpoints.provenance import FILE, write_provenance
from ..checkpoints.storage import copy_parents_companions, load
from ..planning.targets import Refusal, Subject, Way
from ..runtime.modeling import auto_classes, converted_class
from .parity import Parity

STOCK_BYTES = "stock_bytes_per_token"
"""In the provenance of a stock class that an export wrote: bytes per token of its cache, which holds all in full."""


class Source:
    """A model to export: in memory, or a folder of which no more is read than is asked for.

    Args:
        model_or_path: model, folder or Hub id.
        tokenizer: written beside a model that is in memory; a folder brings its own.
    """

    def __init__(self, model_or_path: PreTrainedModel | str | Path, tokenizer: Any = None) -> None:
        self.folder: Path | None = None
        """Where its files lie; None for a model in memory."""
        self._model: PreTrainedModel | None = None
        if not isinstance(model_or_path, (str, Path)):
            self._model = plain_form(model_or_path)
        else:
            self.folder = local_folder(model_or_path)
            check_adapter(self.folder, merge_adapter=False)
        self._tokenizer = tokenizer

    @functools.cached_property
    def config(self) -> Any:
        """Its config; reads no weights."""
        if self._model is not None:
            return self._model.config
        assert self.folder is not None
        if self.is_own_class:
            return converted_class(str(self.folder)).config_class.from_pretrained(self.folder)  # type: ignore[union-attr]
        return load_config(self.folder)

    @functools.cached_property
    def is_own_class(self) -> bool:
        """Whether it is a `Surgery<Parent>`; else the parent's own class, or no conversion at all."""
        if self._model is not None:
            return "layers" in (getattr(self._model.config, "surgery", None) or {})
        assert self.folder is not None
        return "layers" in (read_json(self.folder / "config.json").get("surgery") or {})

    @functools.cached_property
    def kind(self) -> type[PreTrainedModel]:
        """The class of transformers that it is of, or was converted from; reads no weights."""
        if self.is_own_class:
            kind: type[PreTrainedModel] = getattr(transformers, self.config.surgery["parent"]["architecture"])
            return kind
        return model_class(self.config) if self._model is None else type(self._model)

    @property
    def auto(self) -> str:
        """Name of the Auto class of transformers that loads it."""
        return str(auto_classes(self.kind)[0].__name__)

    @property
    def layers(self) -> list[dict[str, Any]]:
        """`config.surgery["layers"]` of a `Surgery<Parent>`: `site`, `plan`, `call`, `shapes`; none of another."""
        return list(self.config.surgery["layers"]) if self.is_own_class else []

    @property
    def architecture(self) -> str:
        """Name of its class."""
        if self._model is not None:
            return type(self._model).__name__
        assert self.folder is not None
        return str((read_json(self.folder / "config.json").get("architectures") or ["?"])[0])

    @functools.cached_property
    def subject(self) -> Subject:
        """What the targets judge; reads no weights."""
        if self.is_own_class:
            return Subject.of_config(self.config)
        return Subject(architecture=self.architecture, kind=self.kind, config=self.config, native=True)

    @property
    def provenance(self) -> dict[str, Any]:
        """What `convert` wrote into the config; empty for a model that it did not make."""
        surgery = getattr(self.config, "surgery", None) or {}
        return dict(surgery.get("provenance", surgery))

    @property
    def bytes_per_token(self) -> float | None:
        """Of its cache: as the stock class that it was written as has it, else as planned; None where nobody said."""
        planned = (self.provenance.get("plan") or {}).get("bytes_per_token")
        found: float | None = self.provenance.get(STOCK_BYTES, planned)
        return found

    @property
    def parent(self) -> str:
        """The parent's Hub id, or the last part of its path; empty where it is not known."""
        return public_name(self.provenance.get("parent") or "", bool(self.provenance.get("parent_revision")))

    @property
    def parent_id(self) -> str | None:
        """The parent's Hub id, where it came from there."""
        return self.parent.partition("@")[0] if is_hub_id(self.parent) else None

    @functools.cached_property
    def model(self) -> PreTrainedModel:
        """The model, loaded whole and checked when first asked for."""
        if self._model is not None:
            return self._model
        assert self.folder is not None
        return load(self.folder)

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The one given, or that beside the folder; None where there is none."""
        if self._tokenizer is None and self.folder is not None:
            return load_tokenizer(self.folder)
        return self._tokenizer

    def write_companions(self, folder: Path) -> None:
        """Write tokenizer, chat template, licence, recipe and provenance beside the weights."""
        if self.folder is not None:
            copy_companions(self.folder, folder)
        else:
            copy_parents_companions(self.provenance, folder, self._tokenizer)
        if "recipe" in self.provenance:
            write_provenance(folder, self.provenance)


@dataclass(frozen=True, kw_only=True)
class Written:
    """What a target reports about what it wrote."""

    architecture: str
    """Name of the class, or of the format's architecture."""
    facts: dict[str, Any] = field(default_factory=dict)
    """JSON, for `export.json`."""
    lines: tuple[str, ...] = ()
    """For the terminal."""
    loading: tuple[tuple[str, str], ...] = ()
    """For the model card: engine, and the code that loads the export there; FOLDER_OR_ID stands for its place."""
    bytes_per_token: float | None = None
    """Of the cache of the export; None where it is that of the source."""


def in_transformers(source: Source, needs: str, *, trust: bool = False) -> tuple[str, str]:
    """An entry of `Written.loading`: an export in transformers.

    Args:
        needs: what must be installed.
        trust: the export has code of its own.
    """
    use = (
        "tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0])" if speaks(source.kind) else "model(**inputs)"
    )
    more = ", trust_remote_code=True" if trust else ""
    code = (
        f"from transformers import {source.auto}, AutoTokenizer\n\n"
        f'model = {source.auto}.from_pretrained("FOLDER_OR_ID", dtype="auto"{more})\n'
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER_OR_ID")\n'
        'inputs = tokenizer("Once upon a time", return_tensors="pt")\n'
        f"print({use})"
    )
    return f"transformers ({needs})", code


class Target(Protocol):
    """One kind of export: a frozen dataclass in a file of its own, and a line of `planning.targets.TARGETS`.

    Its fields are its options, each with a default: arguments of `export` and options of `surgery export`, whose help
    is `metadata["help"]` of the field. A class attribute `engine` names the engine that it is made for, as plans show
    it; a target without one is a format, and plans do not list it.

    `export` calls the four in order, once, with one source. Whatever they raise, nothing is left at the place of the
    export; errors that a user can act upon are SurgeryErrors.
    """

    def judge(self, subject: Subject) -> Way | Refusal:
        """Say by what the target runs a result, or why it does not, without weights: for plans and exports alike."""

    def check(self, source: Source) -> None:
        """Refuse what cannot be judged without the weights, the files beside them or the engine, before any work.

        Raises:
            PlanError: names the part and the way out.
        """

    def write(self, source: Source, folder: Path) -> Written:
        """Write all files into `folder`, which is empty, and is renamed only after `parity`."""

    def parity(self, source: Source, folder: Path) -> Parity:
        """Load what was written in the target's own engine, and compare its answers with the source's.

        Raises:
            CheckpointError: they are not the same.
        """


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What was written, and how far its answers are from those of the source. Also in `export.json`."""

    target: str
    architecture: str
    parity: Parity
    facts: dict[str, Any]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """What a terminal shows."""
        return [f"{self.target}: {self.architecture}", *self.notes, self.parity.line()]


def hide_paths(folder: Path) -> None:
    """Name the parent by its id, or by the last part of its path: other people have no use for the rest of it."""
    for file in (folder / "config.json", folder / FILE):
        fields = read_json(file) if file.is_file() else {}
        surgery = fields.get("surgery") or {} if file.name == "config.json" else fields
        origin = surgery.get("provenance", surgery)
        named = False
        while origin:
            for part in (origin, *origin.get("uptrained", ())):
                if part.get("parent"):
                    part["parent"], named = public_name(part["parent"], bool(origin.get("parent_revision"))), True
            origin = origin.get("before")
        if named:
            file.write_text(json.dumps(fields, indent=2) + "\n")


def public_name(parent: str, fetched: bool = False) -> str:
    """What other people can make of `parent`: the Hub id in a path of the Hub's cache, or the last part of a path.

    Args:
        fetched: `parent` is an id, under which it came from the Hub; a relative path may look like one.
    """
    cached = re.search(r"models--([^/\\]+?)--([^/\\]+)[/\\]snapshots", parent)
    if cached:
        return "/".join(cached.groups())
    return parent if fetched and is_hub_id(parent) else Path(parent).name


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form `owner/name`, with or without a revision."""
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?", name))
