"""The code that travels in an export: `surgery/runtime/` as it is, and two generated modules that name the classes.

transformers fetches and imports such code with `trust_remote_code=True`. Its rules: modules lie flat beside the
config, reach each other by `from .x import y`, and import nothing that may be missing outside of a `try`.
"""

from __future__ import annotations

import hashlib
import keyword
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from transformers import MODEL_MAPPING

from .. import runtime
from ..checkpoints.files import read_json
from ..errors import CheckpointError, PlanError
from ..runtime.configuration import PREFIX
from ..runtime.modeling import auto_classes

MIN_TRANSFORMERS = "5.16"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib")
RUNTIME = Path(runtime.__file__).parent

_CONFIGURATION = '''"""Config of models converted from {parent_config}'s by surgery: one more field says how."""

from transformers import {parent_config}
from transformers.utils.versions import require_version

from .configuration import config_class

require_version("transformers>={minimum}", "This model's code was written for that version and later ones.")


class {config}(config_class({parent_config})):  # type: ignore[misc]
    """{parent_config} with the field `surgery`: what each attention caches, and where the model comes from."""


{config}.register_for_auto_class()
'''

_MODELING = '''"""{parent} with rewritten attention: the parent's code around attention modules of surgery."""

from transformers import {imported}

from .configuration_{name} import {config}
from .modeling import SurgeryMixin
{classes}

{registrations}
'''

_CLASS = '''

class Surgery{parent}(SurgeryMixin, {parent}):
    """{parent} with the attentions that its config names."""

    config_class = {config}
    decoder_class = {decoder}
'''


@dataclass(frozen=True)
class RemoteCode:
    """The classes of one kind of parent, and the files that hold them."""

    model_type: str
    """Of the parent."""
    parent_config: str
    parent_base: str
    parent: str
    """The class with the head: of a language model, or of another task; the base itself where there is none."""
    autos: tuple[str, ...]
    """Names of the Auto classes that make `parent`."""

    @classmethod
    def of(cls, surgery: Mapping[str, Any]) -> RemoteCode:
        """From `config.surgery` of a `Surgery<Parent>`.

        Raises:
            PlanError: this transformers has no such parent.
        """
        parent = surgery["parent"]
        kind = getattr(transformers, parent["architecture"], None)
        base = None if kind is None else MODEL_MAPPING.get(kind.config_class, None)
        if kind is None or not isinstance(base, type):
            raise PlanError(
                f"transformers {transformers.__version__} has no {parent['architecture']} with a base model, which "
                "the exported code is to build on."
            )
        autos = tuple(auto.__name__ for auto in auto_classes(kind))
        return cls(parent["model_type"], kind.config_class.__name__, base.__name__, kind.__name__, autos)

    @property
    def name(self) -> str:
        """Of the modules, behind `configuration_` and `modeling_`."""
        name = PREFIX + "".join(c if c.isalnum() else "_" for c in self.model_type)
        assert name.isidentifier() and not keyword.iskeyword(name)
        return name

    @property
    def architecture(self) -> str:
        """Name of the model's class."""
        return f"Surgery{self.parent}"

    @property
    def auto_map(self) -> dict[str, str]:
        """For `config.json`; SGLang and vLLM look for `AutoModel` too, which transformers would not write."""
        return {
            "AutoConfig": f"configuration_{self.name}.Surgery{self.parent_config}",
            "AutoModel": f"modeling_{self.name}.Surgery{self.parent_base}",
            **{auto: f"modeling_{self.name}.{self.architecture}" for auto in self.autos},
        }

    def write(self, folder: Path) -> None:
        """Write the runtime and the two modules into `folder`.

        Raises:
            PlanError: code that lay beside the parent's weights has the name of a module of the runtime.
        """
        for file in runtime_files():
            if (folder / file.name).exists():
                raise PlanError(
                    f"{file.name}: code of the parent's tokenizer or processor has the name of a module that runs the "
                    "export. Rename it, in auto_map too."
                )
            shutil.copyfile(file, folder / file.name)
        config, parents = f"Surgery{self.parent_config}", list(dict.fromkeys((self.parent_base, self.parent)))
        base = f"Surgery{self.parent_base}"
        autos = {"AutoModel": self.parent_base, **dict.fromkeys(self.autos, self.parent)}
        fields = {
            "parent_config": self.parent_config,
            "parent": self.parent,
            "imported": ", ".join(parents),
            "config": config,
            "classes": "".join(
                _CLASS.format(parent=parent, config=config, decoder=None if parent == self.parent_base else base)
                for parent in parents
            ),
            "registrations": "\n".join(
                f'Surgery{parent}.register_for_auto_class("{auto}")' for auto, parent in autos.items()
            ),
            "name": self.name,
            "minimum": MIN_TRANSFORMERS,
        }
        (folder / f"configuration_{self.name}.py").write_text(_CONFIGURATION.format(**fields))
        (folder / f"modeling_{self.name}.py").write_text(_MODELING.format(**fields))


def runtime_files() -> list[Path]:
    """The modules of `surgery/runtime/`."""
    return [file for file in sorted(RUNTIME.glob("*.py")) if file.name != "__init__.py"]


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every code file in an export, by its path there."""
    files = sorted(file for file in folder.rglob("*.py"))
    return {file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def verify(folder: str | Path) -> list[str]:
    """Check that the code in an export is what the export wrote, that no other code came in, and that nothing pickled.

    Digests are those of `export.json` in the folder: they show changes to the code, not who made the export.

    Returns:
        The names of the code files; none where the export has no code.

    Raises:
        CheckpointError: not an export; a code file is changed, missing or added, `config.json` names code that is not
            listed, or there is a file of a format that runs code when it is read.
    """
    folder = Path(folder)
    if not (folder / "export.json").is_file():
        raise CheckpointError(
            f"{folder}: has no export.json. Make an export with: surgery export {folder} --to hub ..."
        )
    listed = dict((read_json(folder / "export.json").get("facts") or {}).get("code") or {})
    found = digests(folder)
    for name in sorted({*listed, *found}):
        if name not in found:
            raise CheckpointError(f"{folder / name}: this code file is missing. Export again.")
        if name not in listed:
            raise CheckpointError(f"{folder / name}: no export wrote this code file. Remove it, or export again.")
        if listed[name] != found[name]:
            raise CheckpointError(
                f"{folder / name}: changed since the export (sha256 {found[name][:12]}, was {listed[name][:12]}). "
                "Export again."
            )
    for file in sorted(folder.glob("*config.json")):
        for key, value in (read_json(file).get("auto_map") or {}).items():
            for name in filter(None, [value] if isinstance(value, str) else value):
                if f"{name.partition('.')[0]}.py" not in listed:  # of another repository: `owner/name--module.Class`
                    raise CheckpointError(
                        f"{file}: {key} is {name}, code that no export wrote. Remove that line, or export again."
                    )
    pickles = sorted(file for file in folder.rglob("*") if file.suffix in PICKLES)
    if pickles:
        raise CheckpointError(f"{pickles[0]}: a pickle, which runs code when it is read. Remove it.")
    return sorted(listed)
