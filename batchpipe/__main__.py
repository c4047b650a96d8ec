"""`python -m batchpipe`."""

from batchpipe.cli import main

main(prog_name="batchpipe")
