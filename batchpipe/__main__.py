"""`python -m batchpipe`."""

from batchpipe.cli import entry

entry()
