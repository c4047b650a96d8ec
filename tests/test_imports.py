"""The ladder of imports: a module imports from its own rung or below, and heavy libraries only where they belong."""

from __future__ import annotations

import ast
from pathlib import Path

import batchpipe

PACKAGE = Path(batchpipe.__file__).parent

# The most specific prefix decides.
RUNGS = {
    "types": 0, "errors": 0,
    "job": 1, "tokenizer": 1, "kv.ledger": 1, "kv.prefixes": 1, "kv.residency": 1,
    "sample.stop": 1, "sample.detokenize": 1, "sample.rng": 1,
    "model.partition": 1, "model.checkpoint": 1, "model.architectures": 1, "plan.cost": 1,
    "read": 2, "predict": 2, "plan": 2, "write": 2, "report": 2, "result": 2,
    "kv": 3, "attention": 3, "native": 3, "model": 3, "sample": 3,
    "execute": 4,
    "engine": 5, "prepare": 5, "account": 5, "run_job": 5, "validate": 5, "status": 5, "doctor": 5, "interrupt": 5,
    "collector": 5, "replica": 5, "forecaster": 5, "measure": 5, "simulate": 5,
    "profile_command": 5, "predict_command": 5, "plan_command": 5, "plan_lengths": 5, "machine": 5,
    "cli": 6,
}  # fmt: skip
# Rungs that look at the same things from two sides: they never import each other.
STRANGERS = {"execute": {"plan", "read", "write", "report"}}
# What a step costs is the one thing of planning that doing, on a virtual clock, must know.
ALLOWED = {("execute.simulate", "plan.cost")}
HEAVY = {"torch", "transformers"}
TORCH_FREE = (
    *("types", "errors", "job", "kv.ledger", "kv.prefixes", "kv.residency", "sample.stop", "sample.rng"),
    *("read", "predict", "plan", "write", "report"),
)


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def rung_of(name: str) -> int | None:
    while name:
        if name in RUNGS:
            return RUNGS[name]
        name = name.rpartition(".")[0]
    return None


def imports_of(path: Path) -> list[str]:
    """Every module a file imports while it runs; not what only type checkers read."""
    tree = ast.parse(path.read_text())
    ignored = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        if node in ignored:
            continue
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


FILES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def test_every_module_has_a_rung() -> None:
    strangers = [name for name in FILES if name not in ("", "__main__") and rung_of(name) is None]
    assert not strangers, "give these a rung in RUNGS and in CONTRIBUTING.md"


def test_nothing_is_imported_from_above() -> None:
    wrong = []
    for name, path in FILES.items():
        rung = rung_of(name)
        for target in imports_of(path):
            if rung is None or not target.startswith("batchpipe."):
                continue
            inner = target.removeprefix("batchpipe.")
            other = rung_of(inner)
            if other is not None and other > rung:
                wrong.append(f"{name} ({rung}) imports {inner} ({other})")
            if (name, ".".join(inner.split(".")[:2])) in ALLOWED:
                continue
            folders = name.partition(".")[0], inner.partition(".")[0]
            strangers = STRANGERS.get(folders[0], set()) if rung < 5 else set()
            if folders[1] in strangers or (folders[0] in STRANGERS.get(folders[1], set()) and rung < 5):
                wrong.append(f"{name} and {inner} must not know each other")
    assert not wrong


def test_the_deciding_part_is_free_of_torch() -> None:
    wrong = [
        f"{name} imports {target}"
        for name, path in FILES.items()
        if any(name == part or name.startswith(part + ".") for part in TORCH_FREE)
        for target in imports_of(path)
        if target.partition(".")[0] in HEAVY
    ]
    assert not wrong


def test_no_pickle_anywhere() -> None:
    wrong = [
        f"{name} imports {target}"
        for name, path in FILES.items()
        for target in imports_of(path)
        if target.partition(".")[0] in {"pickle", "dill", "cloudpickle", "multiprocessing", "shelve"}
    ]
    assert not wrong
