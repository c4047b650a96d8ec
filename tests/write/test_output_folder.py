import errno
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from batchpipe.errors import OutputError
from batchpipe.job.identity import Identity
from batchpipe.write.commit import CommitLog
from batchpipe.write.lock import FolderLock, holder
from batchpipe.write.row_log import RowLog
from batchpipe.write.row_set import RowCounts
from batchpipe.write.schema import to_batch
from tests.write.completion_cases import IDENTITY, open_folder, outcomes_of, row_indexes, run_job


def test_a_new_folder_is_made_with_its_parents_and_holds_nothing(tmp_path: Path) -> None:
    with open_folder(tmp_path / "runs" / "new") as folder:
        assert len(folder.done) == 0 and folder.counts == RowCounts() and not folder.finished
    state = tmp_path / "runs" / "new" / "_batchpipe"
    assert json.loads((state / "identity.json").read_bytes())["identity"] == IDENTITY.parts
    assert (state / "job.yaml").read_text() == "version: 1\n"


def test_what_is_no_folder_of_ours_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    for fresh in (False, True):
        with pytest.raises(OutputError, match="holds files, but is no output folder of batchpipe"):
            open_folder(tmp_path, fresh=fresh)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_in_the_place_of_the_folder_or_its_parent(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(OutputError, match="cannot be made a folder to write to"):
            open_folder(path)


def test_a_read_only_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(OutputError, match="Read-only file system"):
        open_folder(tmp_path / "run")


def test_another_job_is_refused_with_the_difference(tmp_path: Path) -> None:
    run_job(tmp_path / "run", 5)
    other = Identity({**IDENTITY.parts, "sampling.temperature": 0.7})
    with pytest.raises(OutputError, match=r"belongs to another job:\n  sampling\.temperature: 0\.0 -> 0\.7\n"):
        open_folder(tmp_path / "run", identity=other)
    assert row_indexes(tmp_path / "run") == list(range(5))


def test_fresh_moves_the_old_output_aside(tmp_path: Path) -> None:
    run_job(tmp_path / "run", 5)
    run_job(tmp_path / "run", 3, fresh=True)
    (old,) = tmp_path.glob("run.old-*")
    assert row_indexes(old) == list(range(5))
    assert row_indexes(tmp_path / "run") == list(range(3))


def test_fresh_of_what_is_not_there_yet_moves_nothing(tmp_path: Path) -> None:
    run_job(tmp_path / "run", 3, fresh=True)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_folder_of_another_layout_is_refused(tmp_path: Path) -> None:
    open_folder(tmp_path / "run").__exit__(None, None, None)
    path = tmp_path / "run" / "_batchpipe" / "identity.json"
    path.write_text(json.dumps({"schema_version": 99, "identity": IDENTITY.parts}))
    with pytest.raises(OutputError, match="layout 99"):
        open_folder(tmp_path / "run")


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '{"schema_version": 1}'])
def test_an_identity_that_cannot_be_read_is_told(tmp_path: Path, text: str) -> None:
    run_job(tmp_path / "run", 3)
    (tmp_path / "run" / "_batchpipe" / "identity.json").write_text(text)
    with pytest.raises(OutputError, match=r"identity\.json: cannot be read .*; start over with --fresh"):
        open_folder(tmp_path / "run")
    run_job(tmp_path / "run", 2, fresh=True)
    assert row_indexes(tmp_path / "run") == [0, 1]


def test_completions_without_an_identity_belong_to_nobody(tmp_path: Path) -> None:
    run_job(tmp_path / "run", 3)
    (tmp_path / "run" / "_batchpipe" / "identity.json").unlink()
    with pytest.raises(OutputError, match=r"identity\.json is missing"):
        open_folder(tmp_path / "run")


def test_the_second_run_is_refused_and_told_by_whom(tmp_path: Path) -> None:
    with open_folder(tmp_path / "run"):
        for fresh in (False, True):
            with pytest.raises(OutputError, match=rf"in use by another run, process {os.getpid()} on "):
                open_folder(tmp_path / "run", fresh=fresh)
    open_folder(tmp_path / "run").__exit__(None, None, None)


def test_a_dead_holders_lock_is_free(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    code = (
        "import os, pathlib, sys; from batchpipe.write.lock import FolderLock;"
        "lock = FolderLock(pathlib.Path(sys.argv[1])); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, path], check=False).returncode == -9
    assert json.loads(path.read_bytes())["pid"] != os.getpid()
    with FolderLock(path):
        held_by = holder(path)
        assert held_by is not None and held_by["pid"] == os.getpid()
    assert holder(path) is None


def test_a_lock_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    open_folder(tmp_path / "run").__exit__(None, None, None)
    lock = tmp_path / "run" / "_batchpipe" / "lock"
    lock.unlink()
    lock.mkdir()
    with pytest.raises(OutputError, match=r"lock: cannot be opened for the lock: Is a directory\."):
        open_folder(tmp_path / "run")


@pytest.mark.parametrize("text", ["", '{"pid": 1'])
def test_a_lock_file_that_does_not_name_its_process_yet(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run" / "_batchpipe" / "lock"
    path.parent.mkdir(parents=True)
    with FolderLock(path):
        path.write_text(text)
        assert holder(path) == {}
        with pytest.raises(OutputError, match="run: in use by another run, which is just starting"):
            FolderLock(path)


def test_where_no_lock_was_ever_taken_nothing_holds_it(tmp_path: Path) -> None:
    assert holder(tmp_path / "lock") is None


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OutputError, match="the file system has no locks"):
        open_folder(tmp_path / "run")


def test_a_lock_whose_folder_was_moved_meanwhile_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lock"
    real_flock = fcntl.flock

    def move_then_lock(descriptor: int, operation: int) -> None:
        path.rename(tmp_path / "moved")
        real_flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", move_then_lock)
    with pytest.raises(OutputError, match="moved aside by another run just now"):
        FolderLock(path)


def test_a_committed_part_that_is_gone_or_changed_is_an_error(tmp_path: Path) -> None:
    run_job(tmp_path / "run", 25)
    part = tmp_path / "run" / "completions" / "part-00001.parquet"
    data = part.read_bytes()
    part.write_bytes(data[:-1])
    with pytest.raises(OutputError, match=rf"part-00001\.parquet: was committed with {len(data)} bytes and has"):
        open_folder(tmp_path / "run")
    part.unlink()
    with pytest.raises(OutputError, match=r"part-00001\.parquet: was committed and cannot be found"):
        open_folder(tmp_path / "run")


def test_a_copy_of_a_part_or_anothers_part_is_an_error(tmp_path: Path) -> None:
    run_job(tmp_path / "run", 5)
    completions = tmp_path / "run" / "completions"
    copy = completions / "part-00007.parquet"
    copy.write_bytes((completions / "part-00000.parquet").read_bytes())
    with pytest.raises(OutputError, match=r"part-00007\.parquet: holds rows that another part holds too"):
        open_folder(tmp_path / "run")
    with open_folder(tmp_path / "other", identity=Identity({"model.name": "other"})) as other:
        other.commit(0, [])
    copy.write_bytes((tmp_path / "other" / "completions" / "part-00000.parquet").read_bytes())
    with pytest.raises(OutputError, match=r"part-00007\.parquet: belongs to another job"):
        open_folder(tmp_path / "run")


@pytest.mark.parametrize("data", [b"", b"PAR1 and no more", b"PAR1" + bytes(100) + b"PAR1"])
def test_a_part_that_is_no_parquet_is_an_error(tmp_path: Path, data: bytes) -> None:
    run_job(tmp_path / "run", 5)
    (tmp_path / "run" / "completions" / "part-00001.parquet").write_bytes(data)
    with pytest.raises(OutputError, match=r"part-00001\.parquet: cannot be read as a part of the completions"):
        open_folder(tmp_path / "run")


def test_a_commit_log_torn_at_any_byte_or_lost_is_made_again_from_the_parts(tmp_path: Path) -> None:
    run_job(tmp_path / "run", 12, part_rows=5)
    path = tmp_path / "run" / "_batchpipe" / "commits.jsonl"
    data = path.read_bytes()
    line_ends = [i + 1 for i in range(len(data)) if data[i : i + 1] == b"\n"]
    for length in range(len(data)):
        path.write_bytes(data[:length])
        records, intact = CommitLog(path).read()
        num_whole = sum(
            end - 1 <= length for end in line_ends
        )  # a line that lacks only its end is whole, if not intact
        assert len(records) == num_whole and intact == (length in (0, *line_ends))
    for length in (0, 1, line_ends[0] - 1, line_ends[0], line_ends[0] + 50, len(data) - 1):
        path.write_bytes(data[:length])
        with open_folder(tmp_path / "run") as folder:
            assert len(folder.done) == folder.counts.total == 12
            assert len(folder.parts) == 3
        assert path.read_bytes() == data
    path.unlink()
    with open_folder(tmp_path / "run") as folder:
        assert len(folder.done) == 12


def test_a_record_damaged_in_the_middle_is_made_again(tmp_path: Path) -> None:
    run_job(tmp_path / "run", 12, part_rows=5)
    path = tmp_path / "run" / "_batchpipe" / "commits.jsonl"
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"failed":1', b'"failed":3', 1))
    with open_folder(tmp_path / "run") as folder:
        assert folder.counts == RowCounts(10, 2, 0, {"empty_prompt": 2}, prompt_tokens=60, completion_tokens=30)
    assert sorted(path.read_bytes().splitlines()) == sorted(data.splitlines())


def test_a_row_log_with_rows_of_a_part_is_an_error(tmp_path: Path) -> None:
    run_job(tmp_path / "run", 5)
    with open_folder(tmp_path / "run") as folder:
        log = RowLog(folder.log_path(4), folder.schema)
        log.append(to_batch(outcomes_of([3]), folder.schema))
        log.close()
    with pytest.raises(OutputError, match=r"rows-00004\.log: holds rows that a part holds already"):
        open_folder(tmp_path / "run")
