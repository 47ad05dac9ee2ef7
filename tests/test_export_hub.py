"""Exports for the Hub: they run where only torch and transformers are, and answer there as they do here."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import tiny_model
from methods import METHODS, converted, parent
from packaging.requirements import Requirement
from safetensors.torch import load_file, save_file

import surgery
from surgery.cli import main
from surgery.errors import CheckpointError, PlanError
from surgery.export import hub, parity
from surgery.export.remote_code import verify
from surgery.export.target import Source

NEW_TOKENS = 64
GREEDY = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
# Of each variant one family, another one each time; the slow run has them all.
EVERY = [(method, family) for method, row in METHODS.items() for family in row.families]
SOME = [(method, row.families[i % len(row.families)]) for i, (method, row) in enumerate(METHODS.items())]
REST = [pair for pair in EVERY if pair not in SOME]


@pytest.fixture(scope="session")
def bare(tmp_path_factory) -> Path:
    """A folder for `sys.path` with torch, transformers, what these two require, and nothing else."""
    wanted, todo = set(), ["torch", "transformers", "jinja2"]
    folder = tmp_path_factory.mktemp("bare")
    while todo:
        name = todo.pop().lower().replace("_", "-")
        if name in wanted:
            continue
        wanted.add(name)
        distribution = importlib.metadata.distribution(name)
        required = [Requirement(text) for text in distribution.requires or ()]
        todo += [r.name for r in required if r.marker is None or r.marker.evaluate({"extra": ""})]
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            if not (folder / top).exists() and not top.endswith(".pth"):
                (folder / top).symlink_to(Path(distribution.locate_file(top)))
    return folder


def run_bare(bare: Path, code: str, *arguments: object, modules: Path) -> str:
    """Run `code` in a process that sees the bare folder and the standard library only."""
    begin = f"import sys\nsys.path.append({str(bare)!r})\n"
    environment = {**os.environ, "HF_MODULES_CACHE": str(modules), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "-S", "-c", begin + code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def prompt(vocabulary: int) -> torch.Tensor:
    return torch.randint(3, vocabulary, (2, 6), generator=torch.Generator().manual_seed(1))


def statically(family: str) -> bool:
    """Whether the parent itself generates with a static cache."""
    try:
        parent(family).generate(prompt(99), max_new_tokens=2, do_sample=False, cache_implementation="static")
    except Exception:
        return False
    return True


ANSWER = """
import importlib.util, json, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
assert importlib.util.find_spec("surgery") is None and importlib.util.find_spec("accelerate") is None
found = {}
for folder, caches in json.loads(sys.argv[1]).items():
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    ids = torch.tensor(json.loads(sys.argv[2]))
    for cache in caches:
        made = model.generate(ids, attention_mask=torch.ones_like(ids), cache_implementation=cache,
                              **json.loads(sys.argv[3]))
        found[f"{folder} {cache}"] = made.contiguous()
save_file(found, sys.argv[4])
"""


def check_pairs(pairs: list[tuple[str, str]], bare: Path, folder: Path) -> None:
    """Export all pairs, and compare what one bare process makes of them with what they are here."""
    want, asked = {}, {}
    for method, family in pairs:
        model, out = converted(method, family), folder / f"{method}-{family}"
        out.mkdir()
        source = Source(model)
        hub.Hub().check(source)
        hub.Hub().write(source, out)
        caches = ["dynamic", "static"] if statically(family) else ["dynamic"]
        asked[str(out)] = caches
        for cache in caches:
            ids = prompt(99)
            made = model.generate(ids, attention_mask=torch.ones_like(ids), cache_implementation=cache, **GREEDY)
            want[f"{out} {cache}"] = made
    answers = folder / "answers.safetensors"
    questions = [json.dumps(part) for part in (asked, prompt(99).tolist(), GREEDY)]
    run_bare(bare, ANSWER, *questions, answers, modules=folder / "modules")
    got = load_file(answers)
    assert got.keys() == want.keys()
    assert [name for name in want if not torch.equal(got[name], want[name])] == []
    assert sum("static" in name for name in want) >= len(pairs) // 3


def test_every_variant_generates_the_same_where_only_torch_and_transformers_are(bare, tmp_path) -> None:
    check_pairs(SOME, bare, tmp_path)


@pytest.mark.slow
def test_every_variant_of_every_family_generates_the_same_there(bare, tmp_path) -> None:
    check_pairs(REST, bare, tmp_path)
