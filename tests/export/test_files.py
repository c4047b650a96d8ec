"""Two files that appear whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from batchpipe.errors import OutputError
from batchpipe.export.files import Written, write_lines
from batchpipe.export.plain_lines import Line

LINES: list[Line] = [(True, b"one\n"), (False, b"bad\n"), (True, b"two\n")]


def test_results_and_errors_have_a_file_each(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    written = write_lines(LINES, folder, ".csv", header=b"name\n", replace=False)
    assert written == Written(folder / "results.csv", folder / "errors.csv", 2, 1)
    assert written.results.read_bytes() == b"name\none\ntwo\n"
    assert written.errors.read_bytes() == b"name\nbad\n"
    assert len(list(folder.iterdir())) == 2


def test_without_a_failure_the_errors_are_an_empty_file(tmp_path: Path) -> None:
    assert write_lines([(True, b"one\n")], tmp_path, ".jsonl", replace=False).errors.read_bytes() == b""


def test_files_that_exist_are_replaced_only_if_they_may_be(tmp_path: Path) -> None:
    write_lines(LINES, tmp_path, ".jsonl", replace=False)
    (tmp_path / "errors.jsonl").unlink()
    with pytest.raises(OutputError, match=r"results\.jsonl: exists already"):
        write_lines([], tmp_path, ".jsonl", replace=False)
    assert (tmp_path / "results.jsonl").read_bytes() == b"one\ntwo\n"
    write_lines([], tmp_path, ".jsonl", replace=True)
    assert (tmp_path / "results.jsonl").read_bytes() == b""


def test_a_failure_on_the_way_leaves_what_was_there(tmp_path: Path) -> None:
    write_lines(LINES, tmp_path, ".jsonl", replace=False)

    def broken() -> Iterator[Line]:
        yield True, b"half\n"
        raise OutputError("a part is damaged")

    with pytest.raises(OutputError, match="a part is damaged"):
        write_lines(broken(), tmp_path, ".jsonl", replace=True)
    assert (tmp_path / "results.jsonl").read_bytes() == b"one\ntwo\n"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file/folder: cannot be written"):
        write_lines(LINES, tmp_path / "file" / "folder", ".jsonl", replace=False)
