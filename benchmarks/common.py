"""What every benchmark records beside its numbers, and where the reference checkpoints are."""

from __future__ import annotations

import hashlib
import itertools
import json
import lzma
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from surgery.checkpoints.provenance import versions

ROOT = Path(__file__).parent.parent
REFERENCE = Path(os.environ.get("SURGERY_REFERENCE", ROOT.parent / "shared" / "reference"))


def reference(*parts: str) -> Path:
    """A file of the reference folder; ends the script with a sentence where it is absent."""
    path = REFERENCE.joinpath(*parts)
    if not path.exists():
        sys.exit(f"{path} is absent. Point SURGERY_REFERENCE to the folder with checkpoints/ and text/.")
    return path


def calibration_text(folder: Path) -> Path:
    """A file in `folder` of 128 documents of the reference corpus that fill a window each.

    WikiText, which is evaluated on, is not in it.
    """
    path = folder / "calibration.jsonl"
    if not path.is_file():
        with lzma.open(reference("corpus", "train.jsonl.xz"), "rt", encoding="utf-8") as lines:
            texts = (json.loads(line)["text"] for line in lines)
            chosen = list(itertools.islice((text[:6000] for text in texts if len(text) > 6000), 128))
        part = path.with_suffix(".part")
        part.write_text("".join(json.dumps({"text": text}) + "\n" for text in chosen))
        part.replace(path)
    return path


def file_digest(*files: Path) -> str:
    """One digest of the content of files."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]


def environment(seed: int) -> dict[str, Any]:
    """Hardware, versions, commit, seed."""
    return {
        "machine": platform.machine(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "commit": commit_of(ROOT),
        "seed": seed,
        "date": time.strftime("%Y-%m-%d"),
    }


def measured_on() -> dict[str, str]:
    """For a row of a file whose rows are measured one by one: the processor and the day."""
    return {"processor": processor(), "date": time.strftime("%Y-%m-%d")}


def commit_of(checkout: Path) -> str:
    """The last commit that changed the library of a checkout: one that adds results leaves it as it is."""
    paths = ("surgery", "kernels", "recipes", "train")

    def git(*command: str) -> str:
        return subprocess.run(["git", *command, "--", *paths], capture_output=True, text=True, cwd=checkout).stdout

    said = git("log", "-1", "--format=%h").strip()
    return f"{said}-dirty" if git("status", "--porcelain").strip() else said


def write(name: str, data: dict[str, Any]) -> None:
    """Write `results/<name>.json`; an interrupted run leaves the last whole one."""
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(data, indent=2) + "\n")
    part.replace(path)


def peak_gigabytes() -> float:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
