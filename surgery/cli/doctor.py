"""The command `surgery doctor`: what is installed against what is needed, devices, engines, room."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, Literal

import typer
from packaging.requirements import Requirement
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from .. import __version__
from ..console import human_bytes, show, write_json
from ..errors import SurgeryError
from ..versions import NEWEST, is_newer
from . import answer_files
from .verbs import BROKEN

DISTRIBUTION = "kv-surgery"
PURPOSES = {
    "train": "LoRA, and text of Hub datasets, in surgery train",
    "eval": "tasks of lm-eval in surgery eval --tasks",
    "serve": "vLLM with our plugin",
    "gguf": "reading and writing GGUF",
}
"""What each extra of the distribution is for; other extras are for those who work on surgery."""
GROUPS = {"needed": "needed", "optional": "optional", "devices": "devices", "room": "memory and disk"}
"""Groups of findings, with their headings."""
_VLLM_ADVICE = (
    f"pip install '{DISTRIBUTION}[serve]' in an environment of its own, whose python SURGERY_VLLM_PYTHON then names"
)
_INTERPRETERS = {"vLLM": "SURGERY_VLLM_PYTHON", "llama.cpp": "SURGERY_LLAMA_PYTHON"}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    group: Literal["needed", "optional", "devices", "room"]
    name: str
    found: str
    wanted: str = ""
    """The range that is supported, or what the thing is for."""
    state: Literal["ok", "note", "absent", "fault"] = "ok"
    """`fault`: surgery does not work without it being mended."""
    advice: str = ""
    """What to do, where something is to be done."""


def doctor() -> None:
    """Show whether this installation works, and what is missing.

    Looks at the versions of all packages that surgery needs, at optional ones and engines (vLLM, llama.cpp, lm-eval,
    peft, GGUF), devices, memory, the cache folder and disk space; nothing is downloaded or written.

    Exit code 0: surgery works here; what is optional may be absent. 1: something needed is missing, too old or does not
    import.
    """
    findings = [*needed(), *optional(), *devices(), *room()]
    faults = [finding for finding in findings if finding.state == "fault"]
    show(f"surgery {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}")
    show(*(table(name, [f for f in findings if f.group == name]) for name in GROUPS))
    for finding in faults:
        show(Text(f"{finding.name}: {finding.found or 'missing'}. {finding.advice}", style="red"))
    show("Not ready: see above." if faults else "Ready: everything that surgery needs is here.")
    write_json(
        {
            "version": __version__,
            "python": platform.python_version(),
            "ready": not faults,
            "findings": [asdict(finding) for finding in findings],
        }
    )
    if faults:
        raise typer.Exit(BROKEN)


def table(group: str, findings: list[Finding]) -> Table:
    """The findings of a group for a terminal."""
    shown = Table(box=SIMPLE_HEAD, pad_edge=False)
    shown.add_column(GROUPS[group], no_wrap=True)
    shown.add_column("found", overflow="fold")
    shown.add_column("supported" if group == "needed" else "for" if group == "optional" else "")
    shown.add_column("what to do" if any(finding.advice for finding in findings) else "")
    for finding in findings:
        style = {"fault": "red", "note": "yellow", "absent": "dim"}.get(finding.state, "")
        cells = (finding.name, finding.found or "-", finding.wanted, finding.advice)
        shown.add_row(*(Text(cell, style=style) for cell in cells))
    return shown


def needed() -> Iterator[Finding]:
    """The packages that surgery does not work without."""
    try:
        asked = requires(DISTRIBUTION) or []
    except PackageNotFoundError:
        where = Path(__file__).parent.parent
        yield Finding(
            group="needed", name=DISTRIBUTION, found=f"not installed, imported from {where}", state="fault",
            advice="Install it: pip install kv-surgery, or pip install -e . in a clone.",
        )  # fmt: skip
        return
    for requirement in map(Requirement, asked):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield _package(requirement)
    for name in ("torch", "transformers"):
        if _version(name):
            try:
                importlib.import_module(name)
            except Exception as error:  # whatever a broken installation raises
                said = " ".join(str(error).split())
                yield Finding(
                    group="needed", name=f"import {name}", found=f"{type(error).__name__}: {said}", state="fault",
                    advice=f"Install it again: pip install --force-reinstall {name}",
                )  # fmt: skip


def _package(requirement: Requirement) -> Finding:
    name, found = requirement.name, _version(requirement.name)
    newest = NEWEST.get(name)
    wanted = str(requirement.specifier) + (f", tested to {newest}" if newest else "") or "any"
    state: Literal["ok", "note", "fault"] = "ok"
    advice = ""
    if found is None or not requirement.specifier.contains(found, prereleases=True):
        state, advice = "fault", f"pip install -U '{name}{requirement.specifier}'"
    elif newest and is_newer(found, newest):
        state, advice = (
            "note",
            f"Newer than what was tested: compare results with the parent (surgery eval), or use {newest}.",
        )
    return Finding(group="needed", name=name, found=found or "", wanted=wanted, state=state, advice=advice)


def optional() -> Iterator[Finding]:
    """Packages and engines that single commands ask for."""
    extras: dict[str, list[Requirement]] = {name: [] for name in PURPOSES}
    with contextlib.suppress(PackageNotFoundError):
        for requirement in map(Requirement, requires(DISTRIBUTION) or []):
            for extra, members in extras.items():
                marker = requirement.marker
                if marker is not None and marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""}):
                    members.append(requirement)
    for extra, members in extras.items():
        for requirement in members:
            if requirement.name == "vllm":
                yield _engine("vLLM", _vllm, PURPOSES[extra], _VLLM_ADVICE)
                continue
            found = _version(requirement.name)
            fits = found is not None and requirement.specifier.contains(found, prereleases=True)
            yield Finding(
                group="optional", name=requirement.name, found=found or "", wanted=PURPOSES[extra],
                state="ok" if fits else "absent" if found is None else "note",
                advice="" if fits else f"pip install '{DISTRIBUTION}[{extra}]'",
            )  # fmt: skip
    yield _engine("llama.cpp", _llama_cpp, "checking exports to GGUF", "pip install llama-cpp-python")
    for name, purpose, advice in (
        ("pyarrow", "text from .parquet files", "pip install pyarrow"),
        ("triton", "kernels on a GPU", "comes with torch on Linux"),
    ):
        found = _version(name)
        state: Literal["ok", "absent"] = "ok" if found else "absent"
        yield Finding(
            group="optional", name=name, found=found or "", wanted=purpose, state=state, advice="" if found else advice
        )


def _engine(name: str, find: Any, purpose: str, advice: str) -> Finding:
    """An engine, which may lie in another environment that a variable names."""
    try:
        found = find()
    except (SurgeryError, ImportError, OSError) as error:
        named = isinstance(error, SurgeryError) and bool(os.environ.get(_INTERPRETERS[name]))
        return Finding(
            group="optional", name=name, found="", wanted=purpose, state="note" if named else "absent",
            advice=str(error) if named else advice,
        )  # fmt: skip
    state: Literal["ok", "absent"] = "ok" if found else "absent"
    return Finding(
        group="optional", name=name, found=found, wanted=purpose, state=state, advice="" if found else advice
    )


def _vllm() -> str:
    from ..serve.engine import Engine

    engine = Engine.find()
    return engine.version + ("" if engine.has_plugin else ", without our plugin") + _beside(engine.python)


def _llama_cpp() -> str:
    from ..export.llama_cpp import LlamaCpp

    engine = LlamaCpp.find()
    if engine is None:
        return ""
    here = _version("llama-cpp-python") if engine.python == sys.executable else None
    return (here or "found") + _beside(engine.python)


def _beside(python: str) -> str:
    return "" if python == sys.executable else f" ({python})"


def devices() -> Iterator[Finding]:
    """Processors, and the GPUs that torch sees."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding(group="devices", name="CPU", found=f"{cores} cores")
    try:
        import torch

        gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        built = torch.version.cuda or torch.version.hip
    except Exception:  # said under what is needed
        return
    for i, gpu in enumerate(gpus):
        free, total = torch.cuda.mem_get_info(i)
        yield Finding(
            group="devices", name=f"GPU {i}",
            found=f"{gpu.name}, {human_bytes(free)} free of {human_bytes(total)}, "
            f"compute capability {gpu.major}.{gpu.minor}",
        )  # fmt: skip
    if not gpus:
        why = "this torch is built for CPUs only" if built is None else "torch finds none"
        yield Finding(
            group="devices", name="GPU", found="", wanted=f"{why}; everything also runs on the CPU", state="absent"
        )


def room() -> Iterator[Finding]:
    """Memory, the cache folder, and free disk."""
    if importlib.util.find_spec("psutil") is not None:  # comes with accelerate
        import psutil

        memory = psutil.virtual_memory()
        yield Finding(
            group="room", name="memory", found=f"{human_bytes(memory.available)} free of {human_bytes(memory.total)}"
        )
    try:
        cache = answer_files.folder().parent.parent
    except ImportError:
        return
    writable = _writable(cache)
    yield Finding(
        group="room", name="cache", found=f"{cache}, {_free(cache)}", state="ok" if writable else "note",
        wanted="downloads, restored GGUF, answers of inspect and plan",
        advice="" if writable else "Cannot be written: set HF_HOME to a folder that can.",
    )  # fmt: skip
    for name, folder in (("here", Path.cwd()), ("temporary", Path(tempfile.gettempdir()))):
        yield Finding(group="room", name=name, found=f"{folder}, {_free(folder)}")


def _existing(folder: Path) -> Path:
    """The folder itself, or the nearest above it that is there."""
    return next(place for place in (folder, *folder.absolute().parents) if place.exists())


def _writable(folder: Path) -> bool:
    return os.access(_existing(folder), os.W_OK)


def _free(folder: Path) -> str:
    return f"{human_bytes(shutil.disk_usage(_existing(folder)).free)} free"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
