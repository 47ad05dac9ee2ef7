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
from ..checkpoint import read_json
from ..errors import CheckpointError, PlanError
from ..runtime.configuration import PREFIX

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

_MODELING = '''"""{parent_lm} with rewritten attention: the parent's code around attention modules of surgery."""

from transformers import {parent_lm}, {parent_base}

from .configuration_{name} import {config}
from .modeling import SurgeryMixin


class {base}(SurgeryMixin, {parent_base}):
    """{parent_base} with the attentions that its config names."""

    config_class = {config}


class {lm}(SurgeryMixin, {parent_lm}):
    """{parent_lm} with the attentions that its config names."""

    config_class = {config}


{base}.register_for_auto_class("AutoModel")
{lm}.register_for_auto_class("AutoModelForCausalLM")
'''


@dataclass(frozen=True)
class RemoteCode:
    """The classes of one kind of parent, and the files that hold them."""

    model_type: str
    """Of the parent."""
    parent_config: str
    parent_base: str
    parent_lm: str

    @classmethod
    def of(cls, surgery: Mapping[str, Any]) -> RemoteCode:
        """From `config.surgery` of a `Surgery<Parent>`.

        Raises:
            PlanError: this transformers has no such parent.
        """
        parent = surgery["parent"]
        lm = getattr(transformers, parent["architecture"], None)
        base = None if lm is None else MODEL_MAPPING.get(lm.config_class, None)
        if lm is None or not isinstance(base, type):
            raise PlanError(
                f"transformers {transformers.__version__} has no {parent['architecture']} with a base model, which "
                "the exported code is to build on."
            )
        return cls(parent["model_type"], lm.config_class.__name__, base.__name__, lm.__name__)

    @property
    def name(self) -> str:
        """Of the modules, behind `configuration_` and `modeling_`."""
        name = PREFIX + "".join(c if c.isalnum() else "_" for c in self.model_type)
        assert name.isidentifier() and not keyword.iskeyword(name)
        return name

    @property
    def architecture(self) -> str:
        """Name of the causal model's class."""
        return f"Surgery{self.parent_lm}"

    @property
    def auto_map(self) -> dict[str, str]:
        """For `config.json`; SGLang and vLLM look for `AutoModel` too, which transformers would not write."""
        return {
            "AutoConfig": f"configuration_{self.name}.Surgery{self.parent_config}",
            "AutoModel": f"modeling_{self.name}.Surgery{self.parent_base}",
            "AutoModelForCausalLM": f"modeling_{self.name}.{self.architecture}",
        }

    def write(self, folder: Path) -> None:
        """Write the runtime and the two modules into `folder`."""
        for file in runtime_files():
            shutil.copyfile(file, folder / file.name)
        fields = {
            "parent_config": self.parent_config,
            "parent_base": self.parent_base,
            "parent_lm": self.parent_lm,
            "config": f"Surgery{self.parent_config}",
            "base": f"Surgery{self.parent_base}",
            "lm": self.architecture,
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
                    raise CheckpointError(f"{file}: {key} is {name}, code that no export wrote.")
    pickles = sorted(file for file in folder.rglob("*") if file.suffix in PICKLES)
    if pickles:
        raise CheckpointError(f"{pickles[0]}: a pickle, which runs code when it is read. Remove it.")
    return sorted(listed)
