"""The command line: `surgery inspect | plan | convert | train | eval | report | export | push | generate | ...`."""

from .app import app, main, run

__all__ = ["app", "main", "run"]
