"""The house keeps its form: folders, packages, and the directions of import."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINKED = ("kernels", "recipes", "train")

LEVELS = [
    ("kernels",),
    ("errors", "linalg", "show", "reference", "torch_state", "tracing"),
    ("runtime",),
    ("classes", "companions", "outputs", "versions"),
    ("anatomy", "sharing", "uniform", "recipe", "checkpoint", "adapters", "parents", "text"),
    ("native", "budget", "engines", "plan"),
    ("rewriters", "working_copy", "calibrate", "provenance"),
    ("storage", "streaming", "convert"),
    ("measure", "decisions"),
    ("report", "plots", "harness"),
    ("evaluate", "generate", "capacity"),
    ("cli", "bench", "demo", "export", "serve", "train", "benchmarks"),
]


def level(module):
    return next((i for i, names in enumerate(LEVELS) if module in names), None)


def test_linked_folders_have_no_init():
    for name in LINKED:
        assert not (ROOT / name / "__init__.py").exists()
        assert (ROOT / "surgery" / name).is_symlink()


def test_package_list_equals_the_tree():
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {"surgery"} | {f"surgery.{p.parent.name}" for p in ROOT.glob("surgery/*/__init__.py")}
    assert set(config["packages"]) == found | {f"surgery.{name}" for name in LINKED}


def imports(file):
    """(package part after `surgery`, line) of every import in a file of the library."""
    package = ["surgery", *file.relative_to(ROOT / "surgery").parts[:-1]]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = [*base, *(node.module or "").split(".")]
            name = [part for part in name if part]
            if name[0] == "surgery":
                yield from ([name[1]] if len(name) > 1 else [alias.name for alias in node.names])
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("surgery."):
                    yield alias.name.split(".")[1]


@pytest.mark.parametrize("file", sorted((ROOT / "surgery").rglob("*.py")), ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_run_downwards(file):
    parts = file.relative_to(ROOT / "surgery").parts
    own = parts[0].removesuffix(".py")
    if own == "__init__":
        return
    assert level(own) is not None, f"{own} has no place in LEVELS"
    for other in imports(file):
        if other != own and other != "__version__":
            assert level(other) is not None, f"{file.name} imports {other}, which has no place in LEVELS"
            assert level(other) <= level(own), f"{file.name} imports {other}, which stands above it"


def test_runtime_imports_only_itself():
    for file in (ROOT / "surgery" / "runtime").glob("*.py"):
        # Exported models run where the kernels are absent: ops.py alone asks for them, and does without.
        guarded = {"kernels"} if file.name == "ops.py" else set()
        assert set(imports(file)) <= {"runtime"} | guarded, file.name
        assert "from .." not in file.read_text(), file.name


def test_import_needs_no_optional_package():
    code = (
        "import sys\n"
        "for name in ('triton', 'peft', 'datasets', 'pyarrow', 'lm_eval'): sys.modules[name] = None\n"
        "import surgery, surgery.cli\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_transformers_imports_from_the_root():
    code = "import transformers.models.llama.modeling_llama"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
