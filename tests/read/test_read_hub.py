"""`datasets`: saved folders as they are, hub names with the hub's answers played by local files."""

from __future__ import annotations

import types
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import datasets
import pyarrow as pa
import pytest

from batchpipe.errors import InputError
from batchpipe.job.spec import InputSpec
from batchpipe.read.source import Source, open_source
from batchpipe.types import Row

IDS = [f"r{n}" for n in range(2_500)]
PROMPTS = [f"p{n}" for n in range(2_500)]
ROWS = {"id": IDS, "prompt": PROMPTS, "n": list(range(2_500))}


def source_of(path: Path | str | list[str], **keys: Any) -> Source:
    spec = InputSpec.model_validate({"path": path if isinstance(path, list) else str(path), **keys})
    return open_source(spec, carry="all", needed=frozenset(["prompt"]))


def test_a_saved_dataset(tmp_path: Path) -> None:
    saved = datasets.Dataset.from_dict(ROWS)
    saved.save_to_disk(tmp_path / "saved")
    source = source_of(tmp_path / "saved")
    assert (source.num_rows(), source.progress) == (2_500, 0.0)
    assert source.carried_schema == pa.schema({"id": pa.string(), "prompt": pa.string(), "n": pa.int64()})
    rows = list(source.rows(skip={0}))
    assert [row.key.row_id for row in rows] == IDS[1:]
    assert [row.values["prompt"] for row in rows if isinstance(row, Row)] == PROMPTS[1:]
    assert source.progress == 1.0
    assert [row.key.index for row in source_of(tmp_path / "saved", limit=1_030).rows()] == list(range(1_030))
    same = source_of(tmp_path / "saved").fingerprint
    saved.select(range(10)).save_to_disk(tmp_path / "other")
    assert source.fingerprint == same != source_of(tmp_path / "other").fingerprint


def test_a_saved_dataset_of_several_splits_is_refused_by_name(tmp_path: Path) -> None:
    part = datasets.Dataset.from_dict(ROWS)
    datasets.DatasetDict({"train": part, "test": part}).save_to_disk(tmp_path / "saved")
    with pytest.raises(InputError, match=r"holds several splits; name one of them: .*saved/test\|train"):
        source_of(tmp_path / "saved")
    assert source_of(tmp_path / "saved" / "train").num_rows() == 2_500
    with pytest.raises(InputError, match="it can only be read alone"):
        source_of([str(tmp_path / "saved" / "train"), str(tmp_path / "x.jsonl")])


def test_a_missing_column_and_a_damaged_folder(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"prompts": ["x"]}).save_to_disk(tmp_path / "saved")
    with pytest.raises(InputError, match="no column 'prompt'; did you mean 'prompts'"):
        source_of(tmp_path / "saved")
    next((tmp_path / "saved").glob("*.arrow")).unlink()
    with pytest.raises(InputError, match="cannot be read as a saved dataset"):
        source_of(tmp_path / "saved")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A hub with one dataset; gives the list of what was asked of it."""
    asked: list[tuple[Any, ...]] = []
    file = tmp_path / "data.parquet"
    datasets.Dataset.from_dict(ROWS).to_parquet(file)
    load = datasets.load_dataset

    def load_dataset(name: str, config: str | None, **keys: Any) -> Any:
        asked.append((name, config, keys["split"], keys["revision"], keys["streaming"]))
        return load("parquet", data_files=str(file), split="train", streaming=True)

    def dataset_info(self: Any, name: str) -> Any:
        if name != "owner/name":
            raise OSError(f"{name} is not on the hub")
        return types.SimpleNamespace(sha="abc")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", dataset_info)
    return asked


def test_a_hub_name_is_streamed_at_one_revision(hub: list[tuple[Any, ...]]) -> None:
    source = source_of("hf://owner/name/config/train")
    assert hub == [("owner/name", "config", "train", "abc", True)]
    rows = list(source.rows())
    assert [row.key.row_id for row in rows] == ROWS["id"]
    assert rows[2_000].key.carried.batch.column("n")[rows[2_000].key.carried.offset].as_py() == 2_000
    assert source.rows_seen == 2_500
    assert source_of("hf://owner/name/train").fingerprint != source.fingerprint
    assert hub[-1][:3] == ("owner/name", None, "train")


def test_a_hub_name_that_is_not_there(hub: list[tuple[Any, ...]]) -> None:
    with pytest.raises(InputError, match="hf://owner/other/train cannot be read: owner/other is not on the hub"):
        source_of("hf://owner/other/train")


@pytest.fixture
def refusing_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A hub that knows no dataset, and refuses those of `gated`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            is_gated = "/gated/" in self.path
            self.send_response(403 if is_gated else 404)
            self.send_header("X-Error-Code", "GatedRepo" if is_gated else "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    address_hub_at(monkeypatch, server.server_port)
    yield
    server.shutdown()
    server.server_close()


def address_hub_at(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setattr("huggingface_hub.hf_api.ENDPOINT", f"http://127.0.0.1:{port}", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


def test_what_the_hub_refuses_says_what_to_do(refusing_hub: None) -> None:
    with pytest.raises(InputError, match="check the name, or set HF_TOKEN if the dataset is private"):
        source_of("hf://nobody/nothing/train")
    with pytest.raises(InputError, match="accept the dataset's terms .* set HF_TOKEN"):
        source_of("hf://gated/name/train")


def test_no_network_and_no_file_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        port = server.server_port
    address_hub_at(monkeypatch, port)
    with pytest.raises(InputError, match="hf://owner/name/train cannot be read.*the hub is out of reach"):
        source_of("hf://owner/name/train")
    with pytest.raises(InputError, match="name a split, such as hf://owner/name/train"):
        source_of("hf://datasets/owner/name/data/train.parquet")


def test_a_network_that_fails_between_rows(hub: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import HfHubHTTPError

    source = source_of("hf://owner/name/train")
    network_error = HfHubHTTPError.__bases__[0]

    def failing(*_: object, **__: object) -> Iterator[pa.Table]:
        yield pa.table({"id": ["a"], "prompt": ["x"], "n": [1]})
        raise network_error("connection reset")

    monkeypatch.setattr(source._reader._dataset, "iter", failing)  # type: ignore[attr-defined]
    rows = source.rows()
    assert next(rows).key.row_id == "a"
    with pytest.raises(InputError, match="connection reset; the hub is out of reach"):
        next(rows)
