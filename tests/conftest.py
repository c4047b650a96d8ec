"""Settings of every test: one thread a process, and which examples Hypothesis draws."""

import os
from ctypes.util import find_library

from hypothesis import settings

# Tests run side by side, a process a processor (pytest-xdist).
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Kernels for GPUs run in Triton's interpreter where there is no GPU's driver; Triton reads this as it is imported.
if find_library("cuda") is None:
    os.environ["TRITON_INTERPRET"] = "1"

# A continuous-integration run must not fail by chance: it draws the same examples each time. Runs elsewhere look for
# new ones. Neither limits an example's time, which depends on what else the machine does.
settings.register_profile("ci", derandomize=True, deadline=None)
settings.register_profile("local", deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "local")
