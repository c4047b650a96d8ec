"""The check of a GPU machine, run dry: its phases, their limits, and what it leaves."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu.check import PHASES
from benchmarks.gpu.phase import PHASES as RUNNABLE

ROOT = Path(__file__).parent.parent


def check(out: Path, *options: str) -> tuple[int, dict[str, dict[str, object]]]:
    command = [sys.executable, "benchmarks/gpu/check.py", "--out", str(out), "--device", "cpu", "--tiny", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    ends: dict[str, dict[str, object]] = json.loads(done.stdout.splitlines()[-1])
    return done.returncode, ends


def test_every_phase_can_be_run() -> None:
    assert PHASES.keys() == RUNNABLE.keys()


def test_a_dry_run_leaves_its_findings(tmp_path: Path) -> None:
    code, ends = check(tmp_path, "--only", "attention,link")
    assert code == 0
    assert {name: end["end"] for name, end in ends.items()} == {"attention": "well", "link": "well"}
    findings = [json.loads(line) for line in (tmp_path / "findings.jsonl").read_text().splitlines()]
    assert {one["phase"] for one in findings} == {"attention", "link"}
    assert json.loads((tmp_path / "summary.json").read_text()) == {"phases": ends, "findings": findings}


def test_what_there_is_no_time_for_is_named(tmp_path: Path) -> None:
    code, ends = check(tmp_path, "--seconds", "0")
    assert code == 1
    assert ends.keys() == PHASES.keys()
    assert {end["end"] for end in ends.values()} == {"left out: no time"}
