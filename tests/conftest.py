"""Set before torch is imported."""

from __future__ import annotations

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores; threads of torch beside them would only wait for one another.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
