"""What users see while layers are converted: a bar on a terminal, and one line per layer in the log."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..console import progress, time_left

_log = logging.getLogger(__name__)


@contextmanager
def told_layers(doing: str, layers: int, start: int) -> Iterator[Callable[[int, float], None]]:
    """The yielded function is called with the index of each layer that is done, and its error.

    Args:
        doing: what is done to them, in a word.
        start: layers that were done before.
    """
    began = last = time.monotonic()
    if start:
        _log.info("going on after layer %d of %d: %s", start, layers, doing)

    def tell(index: int, error: float) -> None:
        nonlocal last
        now = time.monotonic()
        left = time_left((now - began) / (index + 1 - start) * (layers - index - 1))
        _log.info("layer %d of %d: %s, %.1f s, error %.2g, %s", index + 1, layers, doing, now - last, error, left)
        last = now
        advance(1)

    with progress(f"{doing}, layer by layer", layers, lines=False) as advance:
        advance(start)
        yield tell
