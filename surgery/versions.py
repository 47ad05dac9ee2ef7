"""Releases that the tests were run on, and a warning where an installed one is newer."""

from __future__ import annotations

import contextlib
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version

NEWEST_TRANSFORMERS = "5.24"
"""Newest minor release of transformers that the whole suite passed on; the pairs that are tested stand in `.ci/`."""
NEWEST = {"torch": "2.15", "transformers": NEWEST_TRANSFORMERS}
"""The same of both."""


def warn_of_untested_transformers(installed: str) -> None:
    """Warn once where the installed transformers is newer than any that was tested.

    Releases rename arguments between modules; a converted model then raises rather than ignore its cache, but nobody
    has looked at the rest.

    Args:
        installed: version of transformers, such as `5.24.0` or `6.0.0.dev0`.
    """
    if is_newer(installed, NEWEST_TRANSFORMERS):
        warnings.warn(
            f"transformers {installed} is newer than {NEWEST_TRANSFORMERS}, the newest that this version of surgery "
            f"was tested with. Compare converted models with their parents (surgery eval --baseline), or install "
            f"'transformers<{_next(NEWEST_TRANSFORMERS)}'.",
            stacklevel=3,
        )


def is_newer(installed: str, tested: str) -> bool:
    """Whether a version is of a later minor release than `tested`, which names one."""
    return _minor(installed) > _minor(tested)


def transformers_version() -> str:
    """Version of transformers, by the installed package where nobody has imported it yet: that would take seconds."""
    if "transformers" not in sys.modules:
        with contextlib.suppress(PackageNotFoundError):  # a folder on the path is no installed package
            return version("transformers")
    import transformers

    return str(transformers.__version__)


def _minor(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def _next(version: str) -> str:
    major, minor = _minor(version)
    return f"{major}.{minor + 1}"
