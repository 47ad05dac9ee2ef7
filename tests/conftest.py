"""What tests share: the command line as a fixture, the cores among workers, and a collection of error messages.

Every message of our own exceptions that a run of tests meets, in one file that a person can read in one go:

    SURGERY_MESSAGES=messages.txt python -m pytest -n auto
"""

import json
import os
import sys
import traceback
from pathlib import Path

import pytest

# Side by side (`pytest -n auto`) each worker takes its part of the cores, not all of them.
workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
if workers > 1:  # read by torch when it is first imported, and by the programs that tests start
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

# Programs that tests start leave nothing in the user's cache, and work out what they are asked.
os.environ.setdefault("SURGERY_CACHE", "0")


EVERY_FAMILY = {f"test_{name}" for name in ("anatomy", "convert", "generation", "pipeline", "public_door", "runtime")}
"""Files with tests of all models in `families.py`."""


def pytest_collection_modifyitems(items):
    """These files come one after the other: a worker that has read the models for one has them for the next."""
    items.sort(key=lambda item: item.path.stem not in EVERY_FAMILY)


@pytest.fixture(scope="session", autouse=True)
def readings():
    """No description is read twice in a run: the tests ask for those of more models than users have."""
    from surgery.anatomy import known  # not above: torch would come before the number of its threads is set

    known.MOST = 100_000


@pytest.fixture(scope="session", autouse=True)
def answers():
    """What checks an export is not started anew for each: `test_export_hub.py` starts it as users do."""
    import warm

    from surgery.export import parity  # not above, as there

    parity.subprocess = warm


@pytest.fixture
def call(monkeypatch, capsys):
    """(exit code, stdout, stderr) of one `surgery` command in this process."""
    from surgery.cli import main  # not above, as there

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["surgery", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        captured = capsys.readouterr()
        return caught.value.code, captured.out, captured.err

    return run


def _messages():
    """The file that was asked for, and where the workers note what they meet until the end."""
    asked = os.environ.get("SURGERY_MESSAGES")
    return (Path(asked), Path(f"{asked}.part")) if asked else (None, None)


def pytest_configure(config):
    file, part = _messages()
    if file is None:
        return
    from surgery.errors import SurgeryError

    if not hasattr(config, "workerinput"):  # the process that starts the workers
        part.write_text("")

    def note(error, *arguments):
        ValueError.__init__(error, *arguments)
        frame = traceback.extract_stack(limit=2)[0]
        place = frame.filename.rpartition("/surgery/")[2]
        if place != frame.filename:  # raised by the library, not by a test
            line = json.dumps([place, frame.lineno, type(error).__name__, str(error)])
            with part.open("a") as notes:  # one write of a short line: workers do not mix
                notes.write(line + "\n")

    SurgeryError.__init__ = note


def pytest_sessionfinish(session):
    file, part = _messages()
    if file is None or hasattr(session.config, "workerinput"):
        return
    found = {}
    for place, line, kind, message in map(json.loads, part.read_text().splitlines()):
        found.setdefault((place, line), f"{kind}: {message}")  # one example of each
    file.write_text("".join(f"{place}:{line}\n    {text}\n" for (place, line), text in sorted(found.items())))
    part.unlink()
