"""Tests side by side (`pytest -n auto`) share the cores: each worker takes its part of them, not all."""

import os

workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
if workers > 1:  # read by torch when it is first imported, and by the programs that tests start
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
