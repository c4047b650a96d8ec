"""What batchpipe does on this machine's GPU: every phase in a process of its own, with a limit of time.

    python benchmarks/gpu/check.py --out FOLDER [--only env,sameness] [--seconds 540]
    python benchmarks/gpu/check.py --out FOLDER --device cpu --tiny      # a dry run, on any machine

FOLDER gets findings.jsonl while the check runs, and summary.json and a log for each phase at its end. The last line on
standard output is JSON: for each phase how it ended. The exit code is 1 where a phase failed or found something wrong.
README.md says what the phases look at.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parents[2]
MARK = "FINDING "
# Seconds at most, in this order: what the figures of later phases are compared with comes first.
PHASES = {
    "env": 60,
    "imports": 90,
    "attention": 120,
    "sameness": 240,
    "kernels": 60,
    "steps": 120,
    "link": 90,
    "throughput": 240,
    "job": 180,
    "errors": 150,
}
# Less is not worth the start of a process.
LEAST_SECONDS = 8.0


class Check:
    """Runs phases one after the other and keeps what they say."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.ends: dict[str, dict[str, Any]] = {}
        self._arguments = arguments
        self._out = Path(arguments.out).resolve()
        self._out.mkdir(parents=True, exist_ok=True)
        self._deadline = time.monotonic() + arguments.seconds
        self._findings: list[dict[str, Any]] = []

    def run(self, name: str) -> None:
        """One phase; its end, good or bad, goes to `ends`."""
        limit_seconds = min(PHASES[name], self._deadline - time.monotonic())
        if limit_seconds < LEAST_SECONDS:
            self.ends[name] = {"end": "left out: no time"}
            return
        started = time.monotonic()
        log_path = self._out / f"{name}.log"
        with (self._out / "findings.jsonl").open("a") as findings, log_path.open("w") as log:
            code, is_late = self._run_process(name, limit_seconds, findings, log)
        num_wrong = sum(one["phase"] == name and bool(one.get("wrong")) for one in self._findings)
        end = "too late" if is_late else f"exit code {code}" if code else "wrong" if num_wrong else "well"
        self.ends[name] = {"end": end, "seconds": round(time.monotonic() - started, 1), "wrong": num_wrong}
        if code:
            self.ends[name]["log"] = log_path.read_text()[-800:]

    def _run_process(self, name: str, limit_seconds: float, findings: TextIO, log: TextIO) -> tuple[int, bool]:
        """The process's exit code, and whether it was ended for its time."""
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu.phase", name, *self._options()],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        late = threading.Event()

        def end() -> None:
            late.set()
            os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(limit_seconds, end)
        timer.start()
        assert process.stdout is not None
        for line in process.stdout:
            if not line.startswith(MARK):
                log.write(line)
                continue
            finding = {"phase": name, **json.loads(line.removeprefix(MARK))}
            self._findings.append(finding)
            findings.write(json.dumps(finding) + "\n")
            print(json.dumps(finding), file=sys.stderr, flush=True)
        code = process.wait()
        timer.cancel()
        return code, late.is_set()

    def _options(self) -> list[str]:
        arguments = self._arguments
        options = ["--device", arguments.device, "--shape", arguments.shape, "--work", str(self._out / "work")]
        return options + ["--tiny"] * arguments.tiny

    def write_summary(self) -> None:
        summary = {"phases": self.ends, "findings": self._findings}
        (self._out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder of the findings, and of models and jobs on the way")
    parser.add_argument("--only", help=f"phases by name, with commas between: {', '.join(PHASES)}")
    parser.add_argument("--seconds", type=float, default=900.0, help="limit of the whole check")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shape", default="llama-3.2-1b", help="llama-3.2-1b or llama-3.1-8b, with random weights")
    parser.add_argument("--tiny", action="store_true", help="small models and few rows: only to see that it runs")
    arguments = parser.parse_args()
    chosen = arguments.only.split(",") if arguments.only else list(PHASES)
    if unknown := set(chosen) - PHASES.keys():
        parser.error(f"no such phase: {', '.join(sorted(unknown))} (there are {', '.join(PHASES)})")
    check = Check(arguments)
    for name in PHASES:
        if name in chosen:
            check.run(name)
            check.write_summary()
    print(json.dumps(check.ends))
    return int(any(one["end"] != "well" for one in check.ends.values()))


if __name__ == "__main__":
    sys.exit(main())
