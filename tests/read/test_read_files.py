"""Which files a path means, and what is refused before anything is read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from batchpipe.errors import InputError
from batchpipe.job.spec import InputSpec
from batchpipe.read.source import Source, open_source

LINE = '{"prompt": "x"}\n'


def make(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(LINE)
    return folder


def source_of(path: str | list[str], exclude: Path | None = None, **keys: Any) -> Source:
    spec = InputSpec.model_validate({"path": path, **keys})
    return open_source(spec, carry="none", needed=frozenset(["prompt"]), exclude=exclude)


def ids_of(path: str | list[str], **keys: Any) -> list[str]:
    return [row.key.row_id for row in source_of(path, **keys).rows()]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("", ["a/x.jsonl", "a/y.ndjson", "b.jsonl"]),
        ("*", ["a/x.jsonl", "a/y.ndjson", "b.jsonl"]),
        ("*.jsonl", ["b.jsonl"]),
        ("**/*.jsonl", ["b.jsonl", "x.jsonl"]),
        ("**", ["x.jsonl", "y.ndjson", "b.jsonl"]),
        ("a/[xz].jsonl", ["x.jsonl"]),
        ("?/*.ndjson", ["y.ndjson"]),
    ],
)
@pytest.mark.parametrize("scheme", ["", "file://"])
def test_folders_and_patterns_in_sorted_order(tmp_path: Path, scheme: str, pattern: str, names: list[str]) -> None:
    make(tmp_path, "b.jsonl", "a/y.ndjson", "a/x.jsonl")
    found = ids_of(f"{scheme}{tmp_path}/{pattern}".rstrip("/"))
    assert [row_id.partition(":")[0].rpartition("/")[2] for row_id in found] == [
        name.rpartition("/")[2] for name in names
    ]


def test_what_other_programs_leave_in_a_folder_is_left_out(tmp_path: Path) -> None:
    make(tmp_path, "a.jsonl", "_SUCCESS", "_metadata", ".a.jsonl.crc", "a.jsonl.crc", "_temporary/0/b.jsonl", ".git/x")
    assert ids_of(str(tmp_path)) == ["a.jsonl:1"]


def test_a_list_keeps_its_order_and_equal_names_are_told_apart(tmp_path: Path) -> None:
    make(tmp_path, "b/x.jsonl", "a/x.jsonl", "a/y.jsonl")
    assert ids_of([f"{tmp_path}/b/x.jsonl", f"{tmp_path}/a/y.jsonl"]) == ["x.jsonl:1", "y.jsonl:1"]
    assert ids_of(str(tmp_path)) == ["a/x.jsonl:1", "a/y.jsonl:1", "b/x.jsonl:1"]
    both = [f"{tmp_path}/b/x.jsonl", f"{tmp_path}/a/x.jsonl"]
    assert ids_of(both) == [f"{path}:1" for path in both]


def test_a_name_with_wildcards_that_exists_is_that_file(tmp_path: Path) -> None:
    make(tmp_path, "a[1].jsonl", "a1.jsonl")
    assert ids_of(f"{tmp_path}/a[1].jsonl") == ["a[1].jsonl:1"]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("nope.jsonl", "does not exist"),
        ("*.parquet", "nothing to read in"),
        ("nope/*.jsonl", "cannot read .*nope"),
        ("empty", "nothing to read in"),
        ("ftp://host/x", "is no address that can be read"),
        ("https://host/x.parquet", "is no address that can be read.*download it and name the file"),
        ("hf://onlyname", "is not of the form hf://organisation/name/config/split"),
    ],
)
def test_nothing_there(tmp_path: Path, path: str, words: str) -> None:
    make(tmp_path, "a.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=words):
        source_of(path if "://" in path else f"{tmp_path}/{path}")


def test_formats_are_not_guessed_or_mixed(tmp_path: Path) -> None:
    make(tmp_path, "a.jsonl", "b.parquet")
    with pytest.raises(InputError, match=r"files of several formats .*a\.jsonl is jsonl, .*b\.parquet is parquet"):
        source_of(str(tmp_path))
    make(tmp_path / "other", "readme.md")
    with pytest.raises(InputError, match=r"format of .*readme\.md cannot be told from its name"):
        source_of(str(tmp_path / "other"))
    assert ids_of(str(tmp_path / "other" / "readme.md"), format="jsonl") == ["readme.md:1"]


def test_one_file_is_not_read_twice(tmp_path: Path) -> None:
    make(tmp_path, "a.jsonl")
    with pytest.raises(InputError, match="would be read twice"):
        source_of([f"{tmp_path}/a.jsonl", f"{tmp_path}/*.jsonl"])


def test_a_loop_of_links_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "in", "a.jsonl")
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    with pytest.raises(InputError, match="a loop of symbolic links"):
        source_of(str(tmp_path / "in"))
    (tmp_path / "self.jsonl").symlink_to(tmp_path / "self.jsonl")
    with pytest.raises(InputError, match=r"self\.jsonl"):
        source_of(str(tmp_path / "self.jsonl"))


@pytest.mark.parametrize("pattern", ["", "*", "*.jsonl", "**/*.jsonl"])
def test_a_broken_link_is_refused(tmp_path: Path, pattern: str) -> None:
    """Else its rows would be missing without a word."""
    make(tmp_path, "a.jsonl")
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "gone.jsonl")
    with pytest.raises(InputError, match=r"b\.jsonl is no file that can be read \(a broken or looping link\?\)"):
        source_of(f"{tmp_path}/{pattern}".rstrip("/"))
    (tmp_path / "b.jsonl").rename(tmp_path / ".b.jsonl")  # as editors make them beside a file that they hold open
    assert len(ids_of(f"{tmp_path}/{pattern}".rstrip("/"))) == 1


def test_a_broken_link_that_the_pattern_leaves_out_does_no_harm(tmp_path: Path) -> None:
    make(tmp_path, "a.jsonl")
    (tmp_path / "b.txt").symlink_to(tmp_path / "gone.txt")
    assert len(ids_of(f"{tmp_path}/*.jsonl")) == 1


@pytest.mark.parametrize("path", ["", "*", "**/*.jsonl", "runs/*", "runs/job/a.jsonl"])
def test_the_output_folder_is_no_input(tmp_path: Path, path: str) -> None:
    make(tmp_path, "a.jsonl", "runs/job/a.jsonl", "runs/b.jsonl")
    with pytest.raises(InputError, match="the output folder"):
        source_of(f"{tmp_path}/{path}".rstrip("/"), exclude=tmp_path / "runs" / "job")


@pytest.mark.parametrize("path", ["", "*", "**/*.jsonl"])
def test_an_output_folder_that_would_come_to_be_an_input_is_refused_at_the_first_run(tmp_path: Path, path: str) -> None:
    make(tmp_path, "a.jsonl")
    with pytest.raises(InputError, match="takes in the output folder"):
        source_of(f"{tmp_path}/{path}".rstrip("/"), exclude=tmp_path / "out")
    assert len(ids_of(f"{tmp_path}/*.jsonl")) == 1
    assert source_of(f"{tmp_path}/*.jsonl", exclude=tmp_path / "out").num_rows() is None


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="permissions of this system cannot be tried")
def test_no_permission(tmp_path: Path) -> None:
    make(tmp_path, "a.jsonl")
    (tmp_path / "a.jsonl").chmod(0)
    was_root = os.geteuid() == 0
    if was_root:
        os.seteuid(65_534)
    try:
        with pytest.raises(InputError, match=r"cannot (open|read) .*a\.jsonl"):
            source_of(str(tmp_path / "a.jsonl"))
    finally:
        if was_root:
            os.seteuid(0)


class TestFoldersWithOtherFiles:
    @staticmethod
    def folder(tmp_path: Path, *names: str) -> Path:
        for name in ("data/a.jsonl", "data/b.jsonl", *names):
            path = tmp_path / "in" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text('{"prompt": "x"}\n')
        return tmp_path / "in"

    def test_they_are_left_out_and_named_once(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        path = self.folder(tmp_path, "README.md", "LICENSE", "data/notes", "z.py", ".gitattributes")
        assert ids_of(str(path)) == ["a.jsonl:1", "b.jsonl:1"]
        [warning] = caplog.messages
        assert "README.md" in warning and warning.endswith(" and 1 more") and ".gitattributes" not in warning

    def test_a_pattern_may_take_them_in_as_well(self, tmp_path: Path) -> None:
        assert ids_of(f"{self.folder(tmp_path, 'data/c.md')}/data/*") == ["a.jsonl:1", "b.jsonl:1"]

    def test_with_a_format_only_its_files_are_rows(self, tmp_path: Path) -> None:
        path = self.folder(tmp_path, "x.parquet", "README.md")
        assert ids_of(str(path), format="jsonl") == ["a.jsonl:1", "b.jsonl:1"]

    def test_a_format_reads_names_that_tell_nothing(self, tmp_path: Path) -> None:
        path = tmp_path / "in"
        path.mkdir()
        (path / "part-0").write_text('{"prompt": "x"}\n')
        assert ids_of(str(path), format="jsonl") == ["part-0:1"]
        with pytest.raises(InputError, match=r"format of .*part-0 cannot be told"):
            source_of(str(path))

    def test_a_file_that_the_job_names_is_not_left_out(self, tmp_path: Path) -> None:
        path = self.folder(tmp_path, "README.md")
        with pytest.raises(InputError, match=r"format of .*README\.md cannot be told"):
            source_of([str(path / "data"), str(path / "README.md")])
