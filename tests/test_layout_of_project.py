"""The house keeps its form: folders, packages, and the directions of import."""

import ast
import importlib.util
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINKED = ("kernels", "recipes", "train")

METHODS = tuple(
    f"rewriters.{name}" for name in ("identity", "gqa", "mla", "lowrank", "share", "dms", "dmc", "evict", "quantise")
)
LEVELS = [
    ("kernels",),
    ("errors", "console", "bundled", "torch_state", "versions"),
    ("runtime",),
    ("attention",),
    ("checkpoints.classes", "checkpoints.companions", "checkpoints.tracing"),
    ("rewriters", "planning.schema", "planning.uptrain"),
    (
        "recipe",
        "anatomy",
        "checkpoints",
        "checkpoints.files",
        "checkpoints.gguf",
        "checkpoints.gguf_tokenizer",
        "checkpoints.restored",
        "checkpoints.places",
        "checkpoints.writing",
        "checkpoints.adapters",
        "checkpoints.parents",
    ),
    ("planning", "calibration.text", "calibration.outputs"),
    ("calibration",),
    (
        "rewriters.common",
        "rewriters.heads",
        "rewriters.latent",
        "rewriters.layers",
        "rewriters.stored",
        "rewriters.tokens",
    ),
    METHODS,
    ("plan", "checkpoints.provenance", "checkpoints.storage", "checkpoints.unfinished"),
    ("convert", "assembly", "compiled_steps", "generate", "checkpoints.streaming", "checkpoints.child_files"),
    ("measure", "report"),
    ("quick_evict",),
    ("quick_cache", "composing"),
    ("__main__", "cli", "calibrate", "demo", "real_demo", "export", "serve", "train", "benchmarks"),
]
"""A lower line never imports a higher one. The longest name that fits counts; `rewriters` is the registry alone."""


def level(module):
    """Index of the line of a dotted name below `surgery`; None where it stands nowhere."""
    parts = module.split(".")
    for end in range(len(parts), 0, -1):
        found = [i for i, names in enumerate(LEVELS) if ".".join(parts[:end]) in names]
        if found:
            return found[0]
    return None


def test_linked_folders_have_no_init():
    for name in LINKED:
        assert not (ROOT / name / "__init__.py").exists()
        assert (ROOT / "surgery" / name).is_symlink()


def test_package_list_equals_the_tree():
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {".".join(p.parent.relative_to(ROOT).parts) for p in ROOT.glob("surgery/**/__init__.py")}
    assert set(config["packages"]) == found | {f"surgery.{name}" for name in LINKED}


MODULES = {
    ".".join(file.relative_to(ROOT / "surgery").with_suffix("").parts).removesuffix(".__init__"): file
    for file in sorted((ROOT / "surgery").rglob("*.py"))
}


def _inside(tree, holds):
    """Ids of all nodes inside those for which `holds`."""
    return {id(inner) for outer in ast.walk(tree) if holds(outer) for inner in ast.walk(outer)}


def imports(file, late=True):
    """Dotted names below `surgery` of the modules that a file of the library imports; not those for types alone.

    Args:
        late: also those that are imported inside functions.
    """
    package = ["surgery", *file.relative_to(ROOT / "surgery").parts[:-1]]
    tree = ast.parse(file.read_text())
    inside = _inside(tree, lambda n: isinstance(n, ast.If) and getattr(n.test, "id", "") == "TYPE_CHECKING")
    if not late:
        inside |= _inside(tree, lambda n: isinstance(n, (ast.FunctionDef, ast.Lambda)))
    for node in ast.walk(tree):
        if id(node) in inside:
            continue
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = [part for part in (*base, *(node.module or "").split(".")) if part]
            if name[0] == "surgery":
                for alias in node.names:
                    whole = ".".join([*name[1:], alias.name])
                    yield whole if whole in MODULES else ".".join(name[1:])
        elif isinstance(node, ast.Import):
            yield from (alias.name[8:] for alias in node.names if alias.name.startswith("surgery."))


@pytest.mark.parametrize("module", [module for module in MODULES if module != "__init__"])
def test_imports_run_downwards(module):
    assert level(module) is not None, f"{module} has no place in LEVELS"
    for other in filter(None, imports(MODULES[module])):
        assert level(other) is not None, f"{module} imports {other}, which has no place in LEVELS"
        assert level(other) <= level(module), f"{module} imports {other}, which stands above it"


def test_no_module_imports_one_that_imports_it():
    needs = {module: {m for m in imports(file, late=False) if m in MODULES} for module, file in MODULES.items()}
    left = dict(needs)
    while free := [module for module, others in left.items() if not others & set(left)]:
        for module in free:
            del left[module]
    assert not left, f"these import each other in circles: {sorted(left)}"


def test_runtime_imports_only_itself():
    files = sorted((ROOT / "surgery" / "runtime").glob("*.py"))
    assert {"attention.py", "modeling.py", "ops.py"} <= {file.name for file in files}
    for file in files:
        # Exported models run where the kernels are absent: ops.py alone asks for them, and does without.
        guarded = {"kernels"} if file.name == "ops.py" else set()
        assert {name.partition(".")[0] for name in imports(file)} <= {"runtime"} | guarded, file.name
        assert "from .." not in file.read_text(), file.name


def test_import_needs_no_optional_package_and_works_from_the_root():
    code = (
        "import sys\n"
        "for name in ('triton', 'peft', 'datasets', 'pyarrow', 'lm_eval'): sys.modules[name] = None\n"
        "import surgery, surgery.cli\n"
        "surgery.convert  # imports all public names\n"
        "import transformers.models.llama.modeling_llama  # finds no folder here in the place of a package\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


OWN = [
    file.relative_to(ROOT / "surgery").as_posix()
    for file in MODULES.values()
    if file.relative_to(ROOT / "surgery").parts[0] not in LINKED
]
MOST_LINES = {"plan.py": 350, "recipe.py": 350}


@pytest.mark.parametrize("file", OWN)
def test_files_stay_short(file):
    lines = len((ROOT / "surgery" / file).read_text().splitlines())
    most = MOST_LINES.get(file, 450)
    assert lines <= most, f"surgery/{file} has {lines} lines, more than {most}: split it by what it does"


@pytest.mark.parametrize("file", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda file: file.name)
def test_what_benchmarks_import_is_there(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "surgery":
            module = importlib.import_module(node.module)
            for alias in node.names:
                there = hasattr(module, alias.name) or importlib.util.find_spec(f"{node.module}.{alias.name}")
                assert there, f"{node.module} has no {alias.name}"


def test_the_benchmark_of_real_models_has_a_row_for_every_recipe(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    rows = importlib.import_module("real_rows")
    left = rows.untrained(rows.rows(384, 30, 3))
    assert left
    assert all(rows.needs_training(name) for name in left)
