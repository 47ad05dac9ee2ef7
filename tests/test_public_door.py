"""What users call, on every family: these tests run on each pair of torch and transformers that is supported."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from closeness import assert_close
from families import FAMILIES, tiny_model
from methods import METHODS, converted
from safetensors.torch import load_file
from test_runtime import GREEDY, left_padded, parent_or_skip, tokens
from transformers import PreTrainedModel, StaticCache

import surgery
from surgery.export import answers
from surgery.export.hub import Hub
from surgery.export.parity import Ask
from surgery.export.target import Source
from surgery.runtime.calling import cache_argument
from surgery.versions import NEWEST, NEWEST_TRANSFORMERS, warn_of_untested_transformers

pytestmark = pytest.mark.public
ROOT = Path(__file__).parent.parent
OTHER_PYTHON = os.environ.get("SURGERY_OTHER_PYTHON")


def continued(model: PreTrainedModel, **arguments: object) -> torch.Tensor:
    return model.generate(tokens(), **GREEDY, **arguments)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_identity_is_its_parent(family: str, tmp_path: Path) -> None:
    """In prefill, decoding through dynamic and static caches, padded batches, and after saving and loading."""
    parent = tiny_model(family)
    before = copy.deepcopy(parent.state_dict())
    child = surgery.convert(parent, "identity")
    assert type(child).__name__ == f"Surgery{type(parent).__name__}"
    assert_close(child(tokens()).logits, parent(tokens()).logits)
    assert torch.equal(continued(child), continued(parent))
    ids, mask = left_padded()
    got, want = (model(ids, attention_mask=mask).logits[mask.bool()] for model in (child, parent))
    assert_close(got, want)
    padded = {"attention_mask": mask, **GREEDY}
    assert torch.equal(child.generate(ids, **padded), parent.generate(ids, **padded))
    assert all(t.equal(before[name]) for name, t in parent.state_dict().items())
    surgery.save(child, tmp_path / "child")
    again = surgery.load(tmp_path / "child")
    assert_close(again(tokens()).logits, child(tokens()).logits, 1e-6)
    assert all(t.equal(again.state_dict()[name]) for name, t in child.state_dict().items())
    assert torch.equal(continued(again), continued(child))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_identity_decodes_through_static_caches_as_its_parent(family: str) -> None:
    parent_or_skip(family, cache_implementation="static")
    want = continued(tiny_model(family), cache_implementation="static")
    assert torch.equal(continued(converted("identity", family), cache_implementation="static"), want)


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_lengths_of_static_caches_are_read_and_not_kept(method: str) -> None:
    """A static layer hands out its live counter: what was read before an update must not move with it."""
    model = converted(method, METHODS[method].families[0])
    static = model.static_cache if hasattr(model, "static_cache") else None
    cache = static(24, ratio=1.0) if static else StaticCache(config=model.config, max_cache_len=24)
    name = cache_argument(model)
    parts = [model(part, use_cache=True, **{name: cache}).logits for part in (tokens()[:, :9], tokens()[:, 9:])]
    assert_close(torch.cat(parts, dim=1), model(tokens(), use_cache=False).logits)


@pytest.mark.skipif(OTHER_PYTHON is None, reason="SURGERY_OTHER_PYTHON names no interpreter with another transformers")
@pytest.mark.parametrize("method", ["identity", "per_layer_heads", "mla", "lowrank", "shared", "dms", "dmc"])
def test_an_export_answers_the_same_under_another_release(method: str, tmp_path: Path) -> None:
    model = converted(method, "llama")
    ask = Ask.of_vocabulary(128)
    want = answers.answers(model, ask.prompts_BT, **ask.arguments())
    (tmp_path / "out").mkdir()
    Hub().write(Source(model), tmp_path / "out")
    request = {"folder": str(tmp_path / "out"), "auto": "AutoModelForCausalLM", "kwargs": {"trust_remote_code": True}}
    request["ask"] = {"prompts": ask.prompts_BT.tolist(), **ask.arguments()}
    (tmp_path / "request.json").write_text(json.dumps(request))
    command = [OTHER_PYTHON, "-I", answers.__file__, tmp_path / "request.json", tmp_path / "answers.safetensors"]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    got = load_file(tmp_path / "answers.safetensors")
    assert_close(got["logits"], want["logits"])
    assert torch.equal(got["dynamic"], want["dynamic"])


def test_a_release_that_nobody_tested_warns_once_at_import() -> None:
    major, minor = (int(part) for part in NEWEST_TRANSFORMERS.split("."))
    with pytest.warns(UserWarning, match=rf"transformers {major}\.{minor + 1}\.0\.dev0 is newer than"):
        warn_of_untested_transformers(f"{major}.{minor + 1}.0.dev0")
    with pytest.warns(UserWarning, match="is newer than"):
        warn_of_untested_transformers(f"{major + 1}.0.0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_untested_transformers(f"{NEWEST_TRANSFORMERS}.7")
        warn_of_untested_transformers("5.16.0")
    code = (
        "import transformers, warnings\n"
        "transformers.__version__ = '99.0.0'\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    import surgery, surgery.cli\n"
        "print([str(w.message) for w in seen if 'transformers 99.0.0' in str(w.message)])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.count("transformers 99.0.0 is newer than") == 1, done.stdout + done.stderr


def test_the_pairs_that_are_tested_are_those_that_are_claimed() -> None:
    def pins(file: str) -> dict[str, str]:
        lines = [line for line in (ROOT / file).read_text().splitlines() if "==" in line]
        return dict(line.split("==") for line in lines)

    lowest, newest, pinned = pins(".ci/lowest.txt"), pins(".ci/newest.txt"), pins("constraints.txt")
    project = (ROOT / "pyproject.toml").read_text()
    for name in ("torch", "transformers"):
        assert f'"{name}>={lowest[name].rpartition(".")[0]}"' in project
        assert newest[name].startswith(NEWEST[name] + ".")
    versions = [tuple(int(n) for n in pair["transformers"].split(".")) for pair in (lowest, pinned, newest)]
    assert versions == sorted(versions)
    assert transformers.__version__.split(".")[0] == "5"


def test_public_names_are_imported_when_they_are_asked_for() -> None:
    code = (
        "import sys\n"
        "import surgery\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
        "import surgery.plan, surgery.export\n"
        "assert set(surgery.__all__) <= set(dir(surgery))\n"
        "for name in surgery.__all__:\n"
        "    assert callable(getattr(surgery, name)), name\n"
        "assert surgery.plan.__module__ == 'surgery.plan' and surgery.export.__module__ == 'surgery.export'\n"
        "assert surgery.runtime.layout.LayerPlan\n"
        "from surgery import *\n"
        "assert plan is surgery.plan\n"
        "assert not hasattr(surgery, 'nothing')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    assert set(surgery.__all__) == {name for names in surgery._DEFINED_IN.values() for name in names}
    typed = (ROOT / "tests" / "typed_user.py").read_text()  # which .ci/run has checked
    assert all(f"surgery.{name}" in typed for name in surgery.__all__)
