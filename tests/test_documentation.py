"""The README and the pages of `docs/`: their commands, Python, numbers, notebook and examples are true."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import ModuleType
from typing import Any

import pytest
from typer.main import get_command

import surgery
from surgery.bundled import SMALL
from surgery.cli.app import app

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("*/README.md")), *sorted(DOCS.rglob("*.md"))]
QUICK_START = DOCS / "index.md"
TUTORIAL = DOCS / "tutorial.ipynb"
NO_PACKAGES = (
    "Could not find a version",
    "No matching distribution",
    "Connection",
    "Temporary failure",
    "timed out",
    "No space left on device",
)
"""What pip says where the machine, not the project, is in the way."""


def blocks(page: Path, language: str) -> list[str]:
    """Fenced blocks of a page."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[list[str]]:
    """What follows `surgery` in the commands of a page."""
    found = []
    for block in [*blocks(page, "bash"), *blocks(page, "sh")]:
        for line in block.replace("\\\n", " ").splitlines():
            for command in re.split(r"&&|\|\|", line):
                words = shlex.split(command, comments=True)
                if words and Path(words[0]).name == "surgery":
                    found.append(words[1:])
    return found


COMMANDS = [pytest.param(words, id=f"{page.relative_to(ROOT)}: {' '.join(words)}"[:90])
            for page in PAGES for words in commands(page)]  # fmt: skip


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DOCS / "examples" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class QuietHandler(SimpleHTTPRequestHandler):
    """Files of a folder, without a line for each request."""

    def log_message(self, *_: Any) -> None:
        pass


def code_of_the_tutorial() -> str:
    cells = json.loads(TUTORIAL.read_text())["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_readme_has_the_numbers_that_were_measured() -> None:
    rows = json.loads((ROOT / "benchmarks" / "results" / "real_models.json").read_text())["rows"]
    ours, theirs = (rows[name]["text"] for name in ("kv-3bit", "kivi, 3 bits"))
    text = " ".join((ROOT / "README.md").read_text().split())
    assert f"is {ours['all']['kl']['value']:.3f} nats per token away from the parent" in text
    assert f"is {theirs['all']['kl']['value']:.3f} away with as many bytes" in text
    assert round(1 / ours["part_of_parent"]) == 5
    assert ours["part_of_parent"] == pytest.approx(theirs["part_of_parent"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    """Within the repository; `mkdocs build --strict` checks those within the site."""
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not link.startswith(("http:", "https:", "#")):
            assert (page.parent / link.partition("#")[0]).exists(), link


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_of_the_documentation_is_one(words: list[str]) -> None:
    """Verbs, options and kinds of values; files that it names need not be there."""
    command: Any = get_command(app)
    names = []
    if words[0].startswith("--"):
        return
    while hasattr(command, "commands"):
        names.append(words[0])
        assert words[0] in command.commands, f"surgery {' '.join(names)}"
        command, words = command.commands[words[0]], words[1:]
    with command.make_context(" ".join(names), list(words), resilient_parsing=True) as made:
        parameters = command.get_params(made)
    known = {option for parameter in parameters for option in [*parameter.opts, *parameter.secondary_opts]}
    for word in words:
        if re.match(r"--?[a-z]", word):
            assert word.partition("=")[0] in known, f"surgery {' '.join(names)}: no option {word}"


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda p: str(p.name))
def test_python_of_the_documentation_calls_what_is_there(page: Path) -> None:
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "surgery":
                assert node.attr in surgery.__all__, node.attr
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "surgery":
                module = importlib.import_module(node.module or "")
                assert all(hasattr(module, alias.name) for alias in node.names)


def test_every_public_name_runs_in_the_tutorial() -> None:
    used = set()
    for node in ast.walk(ast.parse(code_of_the_tutorial())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "surgery":
            used.add(node.attr)
    assert used >= set(surgery.__all__)


def test_pages_of_methods_are_those_of_the_registry() -> None:
    from surgery.rewriters import REWRITERS

    assert {page.stem for page in (DOCS / "methods").glob("*.md")} == set(REWRITERS) - {"identity"}


def test_tables_of_the_site_come_from_results_and_a_missing_number_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mkdocs", reason="needs kv-surgery[docs]")
    pytest.importorskip("latex2mathml", reason="needs kv-surgery[docs]")
    monkeypatch.syspath_prepend(str(DOCS))
    macros = importlib.import_module("macros")
    arguments = {"latents": ("mla",), "retained": ("small",)}
    for make in macros.TABLES:
        lines = make(*arguments.get(make.__name__, ())).strip().splitlines()
        assert len(lines) > 2
        assert len({line.count("|") for line in lines}) == 1, make.__name__
    assert macros.number("real_models", "rows", "kv-3bit", "text", "part_of_parent", times=100, form=".0f") == "21"
    with pytest.raises(KeyError, match=r"real_models.json: nothing at rows / kv-9bit"):
        macros.number("real_models", "rows", "kv-9bit", "text")
    with pytest.raises(KeyError, match="no family"):
        macros.real_models("tails")
    assert "<math" in macros.formula(r"\frac{a}{b}", "math", "", {}, None)


def test_examples_run_on_the_bundled_model(capsys: pytest.CaptureFixture[str]) -> None:
    reports = example("compare").main(["--recipes", "gqa-4x", "kv-int4", "--windows", "1", "--length", "96"])
    assert 0 < reports["kv-int4"].kl < reports["gqa-4x"].kl < 1
    sizes = example("stock_cache").main(["--tokens", "200"])
    assert sizes["h2o, 4x"] < sizes["int8"] < sizes["dense"]
    capsys.readouterr()
    example("ask").main(str(SMALL), "It was late in the evening when the old man")
    assert len(capsys.readouterr().out.split()) > 5


@pytest.mark.slow
def test_pages_of_the_site_open_without_a_message_in_the_console(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="needs kv-surgery[docs]")
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium")
    site = tmp_path / "site"
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", site],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    handler = partial(QuietHandler, directory=str(site))
    with ThreadingHTTPServer(("localhost", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        for page in sorted(site.rglob("index.html")):
            url = f"http://localhost:{server.server_port}/{page.parent.relative_to(site).as_posix()}/".replace(
                "/./", "/"
            )
            shown = subprocess.run(
                [browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
                 f"--user-data-dir={tmp_path / 'browser'}", "--virtual-time-budget=3000", "--dump-dom", url],
                capture_output=True, text=True, timeout=120,
            )  # fmt: skip
            assert "md-content" in shown.stdout, url
            assert "CONSOLE" not in shown.stderr, f"{url}: {shown.stderr}"
        server.shutdown()


@pytest.mark.slow
def test_the_tutorial_runs() -> None:
    nbclient = pytest.importorskip("nbclient", reason="needs kv-surgery[docs]")
    nbformat = pytest.importorskip("nbformat", reason="needs kv-surgery[docs]")
    pytest.importorskip("ipykernel", reason="needs kv-surgery[docs]")
    notebook = nbformat.read(TUTORIAL, as_version=4)
    resources = {"metadata": {"path": str(DOCS)}}
    client = nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources)
    client.execute(env=os.environ | {"PYTHONPATH": str(ROOT)})  # this tree's surgery, whatever is installed


@pytest.mark.slow
def test_the_quick_start_runs_word_for_word(tmp_path: Path) -> None:
    """From a clone to an answer of a converted SmolLM2; skipped where packages cannot be installed."""
    lines = next(block for block in blocks(QUICK_START, "bash")).splitlines()
    assert len(lines) == 5
    files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if files.returncode:
        pytest.skip("not a clone of the repository")
    for name in files.stdout.splitlines():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).exists():
            shutil.copy2(ROOT / name, tmp_path / name, follow_symlinks=False)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    out = ""
    for number, line in enumerate(lines):
        done = subprocess.run(
            ["bash", "-c", line], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1800
        )
        if number < 2 and done.returncode and any(word in done.stderr for word in NO_PACKAGES):
            pytest.skip(f"packages cannot be installed: {done.stderr.strip().splitlines()[-1]}")
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        out = done.stdout
    assert "Paris" in out
