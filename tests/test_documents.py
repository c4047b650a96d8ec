"""The documents tell the truth: what they name exists, what they link to is there, and their examples are what runs."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from batchpipe.job.spec import EngineSpec, Job
from batchpipe.job.strict_yaml import read_yaml
from tests.test_imports import LADDER

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "batchpipe"
DOCUMENTS = [
    *(ROOT / "README.md", ROOT / "CONTRIBUTING.md"),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "benchmarks").glob("*/README.md")),
]
ARCHITECTURE = ROOT / "docs" / "ARCHITECTURE.md"
FOLDERS = {path.parent.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")} - {"."}
SECTIONS = {name: field.annotation for name, field in Job.model_fields.items()}

LINK = re.compile(r"\[([^\]]+)\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")
PATH = re.compile(r"(?<![\w/.-])(?:batchpipe|benchmarks|configs|docs|jobs|tests|\.ci)/[\w./*-]*\w\*?/?")
FILE_ENDINGS = {"parquet", "yaml", "json", "jsonl"}
DOTTED = re.compile(r"(?<![\w./-])[a-z_]+(?:\.\w+)+(?![\w(/-])")

each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())


def links_of(document: Path) -> Iterator[tuple[str, str]]:
    """(text, target) of every link that does not leave the repository."""
    for text, target in LINK.findall(document.read_text()):
        if "://" not in target:
            yield text, target


def names_in(path: Path) -> set[str]:
    """What a Python file defines at its top level."""
    names: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names.update(target.id for target in targets if isinstance(target, ast.Name))
    return names


def tables_of(document: Path) -> dict[str, list[list[str]]]:
    """The rows of every table, less its dashes, by its first heading cell."""
    tables: dict[str, list[list[str]]] = {}
    rows: list[list[str]] | None = None
    for line in document.read_text().splitlines():
        if not line.startswith("|"):
            rows = None
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if rows is None:
            rows = tables.setdefault(cells[0], [])
        elif not set(line) <= set("|-: "):
            rows.append(cells)
    return tables


def anchors_of(document: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def is_job_key(dotted: str) -> bool:
    section, *keys = dotted.split(".")
    model = SECTIONS.get(section)
    return bool(
        isinstance(model, type) and issubclass(model, BaseModel) and len(keys) == 1 and keys[0] in model.model_fields
    )


def is_in_package(dotted: str) -> bool:
    """A module or folder of the package, or a name that one of them defines."""
    *parents, last = dotted.removeprefix("batchpipe.").split(".")
    folder = PACKAGE.joinpath(*parents)
    if (folder / last).is_dir() or (folder / f"{last}.py").is_file():
        return True
    module = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    return module.is_file() and last in names_in(module)


@each_document
def test_links_lead_somewhere(document: Path) -> None:
    broken = []
    for text, target in links_of(document):
        name, _, anchor = target.partition("#")
        path = (document.parent / name).resolve() if name else document
        if not path.exists() or (anchor and anchor not in anchors_of(path)):
            broken.append(target)
        elif text.endswith(".py") and not path.as_posix().endswith("/" + text.removeprefix("batchpipe/")):
            broken.append(f"{text} goes to {target}")
    assert not broken


@each_document
def test_every_path_named_exists(document: Path) -> None:
    named = {match.group().rstrip("/") for match in PATH.finditer(LINK.sub(r"\1", document.read_text()))}
    for code in CODE.findall(document.read_text()):  # a path below the package, as in `scheduler/policies/`
        if code.partition("/")[0] in FOLDERS and "/" in code and re.fullmatch(r"[\w./-]+", code):
            named.add(f"batchpipe/{code}")
    assert not sorted(path for path in named if not list(ROOT.glob(path)))


@each_document
def test_every_module_and_job_key_named_exists(document: Path) -> None:
    starts = {folder.partition("/")[0] for folder in FOLDERS} | SECTIONS.keys() | {"batchpipe"}
    unknown = []
    for dotted in {match.group() for code in CODE.findall(document.read_text()) for match in DOTTED.finditer(code)}:
        start, _, end = dotted.partition(".")
        if end == "py":
            known = any(ROOT.glob(f"benchmarks/{dotted}")) or any(PACKAGE.rglob(dotted))
        else:
            known = start not in starts or end in FILE_ENDINGS or is_job_key(dotted) or is_in_package(dotted)
        if not known:
            unknown.append(dotted)
    assert not unknown


@each_document
def test_every_name_said_to_be_in_a_file_is_there(document: Path) -> None:
    """As in: `Policy` in [scheduler/policies/base.py](...)."""
    said = re.findall(r"`(\w+)(?:\.\w+)?`\s+(?:of|in)\s+\[[^\]]+\]\(([^)]+\.py)\)", document.read_text())
    assert not [(name, path) for name, path in said if name not in names_in(document.parent / path)]


def yaml_blocks() -> list[dict[str, Any]]:
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return [read_yaml(block, "README.md") for block in blocks]


def test_every_job_key_of_the_readme_is_in_the_spec() -> None:
    assert yaml_blocks()
    for block in yaml_blocks():
        keys = [f"{section}.{key}" for section, values in block.items() for key in values]
        assert not [key for key in keys if not is_job_key(key)]


def test_the_readme_shows_every_engine_key_with_its_default() -> None:
    whole = max((block["engine"] for block in yaml_blocks() if "engine" in block), key=len)
    assert list(whole) == list(EngineSpec.model_fields)
    assert EngineSpec.model_validate(whole) == EngineSpec()


def test_every_folder_has_its_line() -> None:
    [rows] = [rows for heading, rows in tables_of(ARCHITECTURE).items() if heading.startswith("folder of")]
    lines = {row[0].strip("`").rstrip("/") for row in rows}
    assert lines == FOLDERS | {"cli.py", "types.py", "errors.py"}
    assert all(len(row) == 3 and all(row) for row in rows)


def test_a_stranger_finds_everything_in_three_hops() -> None:
    """README, this page, the file, the name in it."""
    assert "docs/ARCHITECTURE.md" in [target for _, target in links_of(ROOT / "README.md")]
    tables = tables_of(ARCHITECTURE)
    rows = [[row[1], row[2]] for row in tables["looked for"]] + [[row[2], row[2]] for row in tables["our word"]]
    for link, name in rows:
        path = (ARCHITECTURE.parent / LINK.findall(link)[0][1]).resolve()
        names = CODE.findall(LINK.sub("", name))
        assert path.is_file()
        assert set(names) <= names_in(path), f"{path.name} does not define {names}"


def test_contributing_has_the_ladder() -> None:
    [rows] = [rows for heading, rows in tables_of(ROOT / "CONTRIBUTING.md").items() if heading.startswith("rung")]
    assert [tuple(CODE.findall(row[1])) for row in rows] == list(LADDER)


def test_the_worked_step_is_what_the_scheduler_does() -> None:
    """`python benchmarks/worked_step.py` prints what docs/ARCHITECTURE.md quotes."""
    command = [sys.executable, str(ROOT / "benchmarks" / "worked_step.py")]
    printed = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True
    )
    assert printed.stdout.strip() in ARCHITECTURE.read_text()


def test_every_result_names_the_command_that_made_it() -> None:
    folder = ROOT / "benchmarks" / "results"
    rows = tables_of(folder / "README.md")["file"]
    assert sorted(row[0] for row in rows) == sorted(path.name for path in folder.glob("*.json"))
    assert all(CODE.search(row[1]) and re.fullmatch(r"\d{4}-\d\d-\d\d", row[2]) for row in rows)
