"""Tests run side by side, a process a processor: each keeps to one thread."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
