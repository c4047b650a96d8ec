"""One phase of the check, in this process: `python -m benchmarks.gpu.phase NAME`; see check.py, which starts it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from benchmarks.gpu import exact, jobs, kernels, link, machine, steps, throughput
from benchmarks.gpu.case import SHAPES, Case

PHASES: dict[str, Callable[[Case], None]] = {
    "env": machine.env,
    "imports": machine.imports,
    "attention": exact.attention,
    "sameness": exact.sameness,
    "kernels": kernels.kernels,
    "steps": steps.steps,
    "link": link.link,
    "throughput": throughput.throughput,
    "job": jobs.job,
    "errors": jobs.errors,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=PHASES)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    shape = "tiny" if arguments.tiny else arguments.shape
    PHASES[arguments.name](Case(arguments.device, arguments.tiny, shape, arguments.work))


if __name__ == "__main__":
    main()
