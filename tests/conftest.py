"""Set before torch is imported."""

from __future__ import annotations

import os

pytest_plugins = ["pytester"]  # the pytest plugin is tested as other projects meet it

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores; threads of torch beside them would only wait for one another.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
