"""Output in an object store: the same rows as on a disk, whatever is killed and wherever the job goes on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from batchpipe.commands.status import status_of
from batchpipe.errors import OutputError
from batchpipe.job.identity import Identity
from batchpipe.report.metrics import append_metrics, read_metrics
from batchpipe.runner.result import Result
from batchpipe.write import remote_lock
from batchpipe.write.folder import part_names
from batchpipe.write.place import Place, open_place
from batchpipe.write.remote_lock import LOCK_NAME
from batchpipe.write.writer import CompletionWriter
from tests.report.run_metrics_case import RUN_METRICS
from tests.write.completion_cases import IDENTITY, REPOSITORY, open_folder, outcomes_of, run_job
from tests.write.s3_server import s3_server

pytestmark = pytest.mark.filterwarnings("ignore:.*:ResourceWarning")


@pytest.fixture(scope="module")
def query() -> Iterator[str]:
    with s3_server("bucket") as query:
        yield query


@pytest.fixture
def address(query: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Of an output that no test has used, on a machine whose cache is empty."""
    monkeypatch.setenv("BATCHPIPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote_lock, "SETTLE_SECONDS", 0.0)
    return f"s3://bucket/{tmp_path.name}?{query}"


def indexes_in(place: Place) -> list[int]:
    tables = [pq.read_table(place.open(name), columns=["row_index"]) for name in part_names(place)]
    return sorted(index for table in tables for index in table["row_index"].to_pylist())


def test_a_run_leaves_parts_manifest_and_success_in_the_store(address: str) -> None:
    run_job(address, 25)
    place = open_place(address)
    assert indexes_in(place) == list(range(25))
    assert sorted(place.sizes_bytes("completions")) == [f"part-0000{number}.parquet" for number in range(3)]
    assert place.read("_SUCCESS") == b""
    manifest = json.loads(place.read("_batchpipe/manifest.json") or b"")
    assert [part["bytes"] for part in manifest["parts"]] == list(place.sizes_bytes("completions").values())
    assert not list(place.working.glob("tmp/**/*.parquet"))


def test_result_status_and_metrics_read_the_store(address: str) -> None:
    run_job(address, 25)
    place = open_place(address)
    append_metrics(place, RUN_METRICS)
    place.filesystem.move(f"{place.base}/_metrics.parquet", f"{place.base}/metrics.parquet")  # as an older run left it
    append_metrics(place, RUN_METRICS)
    assert len(read_metrics(place)) == 2
    assert sorted(place.sizes_bytes()) == ["_SUCCESS", "_metrics.parquet"]
    result = Result(place, read_metrics(place)[-1], 0)
    assert result.table()["row_index"].to_pylist() == list(range(25))
    assert result.summary["output"] == address.partition("?")[0]
    status = status_of(address)
    assert (status["rows_done"], status["finished"], status["running"]) == (25, True, None)


@pytest.mark.parametrize("elsewhere", [False, True], ids=["same machine", "another machine"])
@pytest.mark.parametrize(
    "crash", ["after_log_append:4", "before_rename:2", "after_rename:2", "after_commit_record:2", "before_success"]
)
def test_a_killed_run_goes_on(
    address: str, crash: str, elsewhere: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "import sys; from tests.write.completion_cases import run_job; run_job(sys.argv[1], 45)"
    environment = {**os.environ, "BATCHPIPE_CRASH_AT": crash}
    command = [sys.executable, "-c", code, address]
    assert subprocess.run(command, cwd=REPOSITORY, env=environment, check=False).returncode == 137
    place = open_place(address)
    assert len(indexes_in(place)) < 45 or place.read("_SUCCESS") is None
    if elsewhere:
        shutil.rmtree(tmp_path / "cache")
        monkeypatch.setattr(remote_lock, "STALE_SECONDS", 0.0)
    run_job(address, 45)
    assert indexes_in(place) == list(range(45))
    assert place.read("_SUCCESS") == b""


def test_rows_of_the_log_are_not_computed_again_on_the_same_machine(address: str) -> None:
    folder = open_folder(address)
    writer = CompletionWriter(folder, part_rows=10)
    writer.write(outcomes_of(range(4)))
    folder.__exit__()  # the writer never leaves, as if its process had died
    with open_folder(address) as folder:
        assert [index for index in range(9) if index in folder.done] == [0, 1, 2, 3]


def test_what_a_machine_had_not_committed_is_dropped_once_another_went_on(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = open_folder(address)
    CompletionWriter(folder, part_rows=10).write(outcomes_of(range(4)))
    folder.__exit__()
    monkeypatch.setenv("BATCHPIPE_CACHE", str(tmp_path / "other"))
    run_job(address, 25, part_rows=7)
    monkeypatch.setenv("BATCHPIPE_CACHE", str(tmp_path / "cache"))
    run_job(address, 25)
    assert indexes_in(open_place(address)) == list(range(25))


class TestLock:
    def test_the_second_run_is_refused_here_and_elsewhere(
        self, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with open_folder(address):
            with pytest.raises(OutputError, match="in use by another run"):
                open_folder(address)
            holder = status_of(address)["running"]
            assert holder["pid"] == os.getpid()
            monkeypatch.setenv("BATCHPIPE_CACHE", str(tmp_path / "other"))
            with pytest.raises(OutputError, match=rf"in use by another run, process {os.getpid()} on .*renewed"):
                open_folder(address)
            monkeypatch.setenv("BATCHPIPE_CACHE", str(tmp_path / "cache"))
        assert status_of(address)["running"] is None

    def test_a_holder_that_lost_the_lock_commits_nothing_more(
        self, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(remote_lock, "RENEW_SECONDS", 0.02)
        folder = open_folder(address)
        place = open_place(address)
        lock = json.loads(place.read(LOCK_NAME) or b"")
        deadline = time.monotonic() + 10
        with pytest.raises(OutputError, match="another run took over"):
            while time.monotonic() < deadline:  # a renewal that had just read its own lock may write it once more
                place.write(LOCK_NAME, json.dumps({**lock, "token": "another"}).encode())
                folder.commit(len(folder.parts), [])
        folder.__exit__()
        assert json.loads(place.read(LOCK_NAME) or b"")["token"] == "another"

    def test_two_that_begin_at_once_do_not_both_go_on(self, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
        place = open_place(address)

        def other_writes(seconds: float) -> None:
            other = {"token": "other", "host": "h", "pid": 1, "renewed_at": time.time(), "released": False}
            place.write(LOCK_NAME, json.dumps(other).encode())

        monkeypatch.setattr(time, "sleep", other_writes)
        with pytest.raises(OutputError, match="another run began at the same moment"):
            open_folder(address)

    def test_what_is_no_lock_is_told(self, address: str) -> None:
        open_place(address).write(LOCK_NAME, b"?")
        with pytest.raises(OutputError, match="is no lock of batchpipe"):
            open_folder(address)


def test_fresh_moves_the_old_output_aside(address: str) -> None:
    run_job(address, 5)
    run_job(address, 3, fresh=True)
    place = open_place(address)
    assert indexes_in(place) == [0, 1, 2]
    parent = place.base.rpartition("/")[0]
    infos = place.filesystem.get_file_info(fs.FileSelector(parent, recursive=True))
    old = [info.path for info in infos if ".old-" in info.path]
    assert any(path.endswith("completions/part-00000.parquet") for path in old)


def test_another_job_and_foreign_files_are_refused(address: str) -> None:
    run_job(address, 5)
    with pytest.raises(OutputError, match="belongs to another job"):
        open_folder(address, identity=Identity({**IDENTITY.parts, "sampling.temperature": 0.7}))
    stranger = address.replace("?", "-stranger?")
    open_place(stranger).write("thesis.tex", b"precious")
    with pytest.raises(OutputError, match="holds files, but is no output folder"):
        open_folder(stranger)


def test_a_lost_or_changed_part_is_told(address: str) -> None:
    run_job(address, 25)
    place = open_place(address)
    whole = place.read("completions/part-00001.parquet") or b""
    place.write("completions/part-00001.parquet", whole[:-1])
    with pytest.raises(OutputError, match=rf"was committed with {len(whole)} bytes and has {len(whole) - 1}"):
        open_folder(address)
    place.filesystem.delete_file(f"{place.base}/completions/part-00001.parquet")
    with pytest.raises(OutputError, match=r"part-00001\.parquet: was committed and cannot be found"):
        open_folder(address)


def test_a_store_that_refuses_is_an_error_of_the_output(query: str) -> None:
    with pytest.raises(OutputError, match="s3://absent/run.*bucket does not exist"):
        open_folder(f"s3://absent/run?{query.replace('allow_bucket_creation=true', 'allow_bucket_creation=false')}")


@pytest.mark.parametrize("address", ["s3://", "nosuch://bucket/run", "s3://bucket/run?nosuch=1"])
def test_what_is_no_address_is_told_without_its_options(address: str) -> None:
    with pytest.raises(OutputError, match=r"output\.path: .* is no address that can be written to"):
        open_place(address)
