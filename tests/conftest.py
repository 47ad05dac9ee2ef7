"""What tests share: the command line as a fixture, and the cores among workers."""

import os
import sys

import pytest

# Side by side (`pytest -n auto`) each worker takes its part of the cores, not all of them.
workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
if workers > 1:  # read by torch when it is first imported, and by the programs that tests start
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

# Programs that tests start leave nothing in the user's cache, and work out what they are asked.
os.environ.setdefault("SURGERY_CACHE", "0")


@pytest.fixture
def call(monkeypatch, capsys):
    """(exit code, stdout, stderr) of one `surgery` command in this process."""
    from surgery.cli import main  # not above: torch would come before the number of its threads is set

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["surgery", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        captured = capsys.readouterr()
        return caught.value.code, captured.out, captured.err

    return run
