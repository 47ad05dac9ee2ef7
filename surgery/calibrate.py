"""`accelerate launch -m surgery.calibrate MODEL -r RECIPE ...`: `surgery convert`, in as many processes as are started.

Each process reads its part of the calibration text; the result is that of one process.
"""

from __future__ import annotations

import sys

from .cli.app import main


def run() -> None:
    """Hand the arguments to `surgery convert`."""
    sys.argv[1:1] = ["convert"]
    main()


if __name__ == "__main__":
    run()
