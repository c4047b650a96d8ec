"""Hugging Face `datasets`: a folder written by `save_to_disk`, or a dataset of the hub, which is streamed.

The address of the latter is `hf://NAME/SPLIT`, `hf://ORGANISATION/NAME/SPLIT` or
`hf://ORGANISATION/NAME/CONFIG/SPLIT`; it is read at the revision that is the newest when the input is opened.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import xxhash

from batchpipe.errors import InputError
from batchpipe.read.columns import BATCH_ROWS, RawBatch, Wanted
from batchpipe.read.formats.arrow import ArrowColumns

HUB_SCHEME = "hf://"


class DatasetReader:
    """A `Reader` of one split of a `datasets` dataset, stored or streamed."""

    marked = None

    def __init__(self, dataset: Any, name: str, fingerprint: str, num_rows: int | None, wanted: Wanted) -> None:
        self._dataset = dataset.with_format("arrow")
        self._name = name
        self._num_rows = num_rows
        self._rows_read = 0
        self.fingerprint = fingerprint
        schema = dataset.features.arrow_schema.remove_metadata()
        self._columns = ArrowColumns.choose(schema, wanted, name)
        self.id_column = self._columns.id_column
        self.carried_schema = self._columns.carried_schema

    @property
    def progress(self) -> float:
        return self._rows_read / self._num_rows if self._num_rows else 0.0

    def num_rows(self) -> int | None:
        return self._num_rows

    def batches(self) -> Iterator[RawBatch]:
        self._rows_read = 0
        tables = self._dataset.iter(batch_size=BATCH_ROWS)
        while True:
            with _hub_errors(self._name):
                table = next(tables, None)
            if table is None:
                return
            for batch in table.to_batches():
                yield self._columns.raw_batch(batch, self._name, self._rows_read + 1)
                self._rows_read += batch.num_rows


def is_saved_dataset(path: str) -> bool:
    """Whether `path` is a folder that `save_to_disk` wrote; InputError if it holds several splits."""
    if os.path.isfile(f"{path}/dataset_dict.json"):
        splits = sorted(state.parent.name for state in Path(path).glob("*/state.json"))
        raise InputError(f"input.path: {path} holds several splits; name one of them: {path}/{'|'.join(splits)}")
    return os.path.isfile(f"{path}/state.json") and os.path.isfile(f"{path}/dataset_info.json")


def open_saved(path: str, wanted: Wanted) -> DatasetReader:
    from datasets import load_from_disk

    try:
        dataset = load_from_disk(path)
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise InputError(f"input.path: {path} cannot be read as a saved dataset: {error}") from error
    digest = xxhash.xxh3_128()
    for file in sorted(Path(path).rglob("*")):
        if file.is_file():
            digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
    digest.update((Path(path) / "state.json").read_bytes())  # holds the dataset's own hash of its content
    return DatasetReader(dataset, Path(path).name, digest.hexdigest(), dataset.num_rows, wanted)


def open_hub(address: str, wanted: Wanted) -> DatasetReader:
    """Raises InputError if the address names no dataset, or the hub cannot be reached."""
    from datasets import load_dataset
    from huggingface_hub import HfApi

    parts = address.removeprefix(HUB_SCHEME).split("/")
    if parts[0] == "datasets" and len(parts) > 2:
        split = f"{HUB_SCHEME}{parts[1]}/{parts[2]}/train"
        raise InputError(f"input.path: {address} names a repository or a file of it; name a split, such as {split}")
    if not 2 <= len(parts) <= 4 or not all(parts):
        raise InputError(f"input.path: {address} is not of the form hf://organisation/name/config/split")
    *path, split = parts
    name, config = "/".join(path[:2]), path[2] if len(path) == 3 else None
    with _hub_errors(address):
        revision = HfApi(token=os.environ.get("HF_TOKEN")).dataset_info(name).sha
        dataset = load_dataset(name, config, split=split, revision=revision, streaming=True)
        if dataset.features is None:
            dataset = dataset._resolve_features()
    fingerprint = xxhash.xxh3_128_hexdigest(f"{name}\0{config}\0{split}\0{revision}".encode())
    known = (dataset.info.splits or {}).get(split)
    num_rows = known.num_examples if known is not None else None
    return DatasetReader(dataset, address, fingerprint, num_rows, wanted)


@contextmanager
def _hub_errors(address: str) -> Iterator[None]:
    """Turns what the hub refuses, or the network, into an InputError that says what to do."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    # The errors of the HTTP client, which differs between the hub's versions.
    of_network = cast("tuple[type[Exception], ...]", HfHubHTTPError.__bases__)
    foreign: tuple[type[Exception], ...] = (OSError, ValueError, RuntimeError, *of_network)
    try:
        yield
    except foreign as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        message = f"input.path: {address} cannot be read: {reason}"
        if isinstance(error, GatedRepoError):
            hint = "; accept the dataset's terms on its page of the hub, and set HF_TOKEN to a token of that account"
        elif isinstance(error, RepositoryNotFoundError):
            hint = "; check the name, or set HF_TOKEN if the dataset is private"
        elif isinstance(error, (ConnectionError, TimeoutError, *of_network)) and not isinstance(error, HfHubHTTPError):
            hint = "; the hub is out of reach: try again with a network, or name files that were downloaded before"
        else:
            hint = ""
        raise InputError(message + hint) from error
