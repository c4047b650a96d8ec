"""The ladder of imports: a module imports from its own rung or below, and heavy libraries only where they belong."""

from __future__ import annotations

import ast
from pathlib import Path

import batchpipe

PACKAGE = Path(batchpipe.__file__).parent

# From the lowest rung to the highest; what stands on one rung are strangers, who never import each other. A name covers
# what stands below it, and the most specific name decides.
LADDER = (
    ("types",),
    ("errors",),
    (
        "job",
        "sample.stop",
        "sample.detokenize",
        "sample.reasoning",
        "sample.text",
        "sample.rng",
        "sample.on_device",
        "write.durable",
    ),
    ("write.place",),
    ("model.partition", "model.checkpoint", "model.architectures", "model.tokenizer"),
    ("kv.block_manager", "kv.prefix_cache", "kv.device_cache", "kv.layout", "kv.capacity_law"),
    ("cost",),
    ("predict",),
    ("scheduler", "read", "write", "report"),
    ("training", "export"),
    ("kv", "native"),
    ("attention", "sample"),
    ("model",),
    ("pipeline",),
    ("profiling", "placement"),
    ("runner",),
    ("commands",),
    ("cli",),
)
RUNGS = {name: rung for rung, names in enumerate(LADDER) for name in names}
# What computes knows nothing of what decides, nor of files.
APART = {"pipeline": {"scheduler", "read", "write", "report"}}
HEAVY = {"torch", "transformers"}
TORCH_FREE = (
    *(
        "types",
        "errors",
        "job",
        "kv.block_manager",
        "kv.prefix_cache",
        "kv.device_cache",
        "kv.layout",
        "kv.capacity_law",
    ),
    *("sample.stop", "sample.rng", "sample.on_device", "read", "predict", "cost", "scheduler", "write", "report"),
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


def test_nothing_is_imported_from_above_or_from_a_stranger() -> None:
    wrong = []
    for name, path in FILES.items():
        rung = rung_of(name)
        for target in imports_of(path):
            if rung is None or not target.startswith("batchpipe."):
                continue
            inner = target.removeprefix("batchpipe.")
            other = rung_of(inner)
            if other is None:
                continue
            folders = name.partition(".")[0], inner.partition(".")[0]
            if other > rung or (other == rung and folders[0] != folders[1]):
                wrong.append(f"{name} ({rung}) imports {inner} ({other})")
            if folders[1] in APART.get(folders[0], set()):
                wrong.append(f"{name} must not know {inner}")
    assert not wrong


def test_a_folder_has_few_modules_and_the_top_only_folders() -> None:
    assert {name for name in FILES if name and "." not in name and FILES[name].parent == PACKAGE} == {
        *("types", "errors", "cli", "__main__")
    }
    for folder in {path.parent for path in FILES.values()}:
        modules = [path.stem for path in folder.glob("*.py") if path.stem != "__init__"]
        assert len(modules) <= 15, f"{folder.name} holds {len(modules)} modules: {sorted(modules)}"


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
