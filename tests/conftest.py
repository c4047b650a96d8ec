"""Settings of every test: one thread a process, and which examples Hypothesis draws."""

import os

from hypothesis import settings

# Tests run side by side, a process a processor (pytest-xdist).
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A continuous-integration run must not fail by chance: it draws the same examples each time. Runs elsewhere look for
# new ones. Neither limits an example's time, which depends on what else the machine does.
settings.register_profile("ci", derandomize=True, deadline=None)
settings.register_profile("local", deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "local")
