"""Where output goes: a folder of a local disk, or a prefix of an object store (s3://, gs://).

An object store has no rename, no append and no lock that the kernel releases, and an object appears whole or not at
all. So a remote place keeps what a run appends to (row log, commit log, temporary parts) in a working folder of this
machine, and gets each finished file under its final name.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from pyarrow import fs

from batchpipe.errors import OutputError
from batchpipe.job.cache_folder import cache_folder
from batchpipe.write.durable import publish, write_whole, writing

STATE = "_batchpipe"
COMPLETIONS = "completions"
SUCCESS = "_SUCCESS"
COMMITS = "commits.jsonl"  # in the state folder, as is the row log of each part to be
LOG_NAME = re.compile(r"rows-(\d{5,})\.log")
PART_NAME = re.compile(r"part-(\d{5,})\.parquet")


@dataclass(frozen=True, slots=True)
class Place:
    """`address` is what the job calls it, `base` its path in `filesystem`; names are relative to it, with slashes."""

    address: str
    filesystem: fs.FileSystem
    base: str
    working: Path  # a local folder for what is appended to; where the place is local, its own state folder

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, fs.LocalFileSystem)

    def __truediv__(self, name: str) -> str:
        """The full name of a file in messages."""
        return f"{self.address}/{name}"

    def read(self, name: str) -> bytes | None:
        """The content of a file; None if there is none. Raises OutputError if it cannot be read."""
        try:
            with self.filesystem.open_input_file(f"{self.base}/{name}") as file:
                return bytes(file.read())
        except FileNotFoundError:
            return None
        except (OSError, pa.ArrowException) as error:
            raise OutputError(f"{self / name}: cannot be read: {_reason(error)}.") from error

    def open(self, name: str) -> pa.NativeFile:
        """A file to read from any place in it; OSError if there is none."""
        return self.filesystem.open_input_file(f"{self.base}/{name}")

    def write(self, name: str, data: bytes) -> None:
        """Replaces a file as a whole; OutputError if the disk or the store refuses."""
        if self.is_local:
            write_whole(Path(self.base, name), data)
            return
        with _storing(self / name), self.filesystem.open_output_stream(f"{self.base}/{name}") as stream:
            stream.write(data)

    def delete(self, name: str) -> None:
        """Removes a file, if there is one; OutputError if the disk or the store refuses."""
        if self.size_bytes(name) is not None:
            with _storing(self / name):
                self.filesystem.delete_file(f"{self.base}/{name}")

    def publish(self, temporary: Path, name: str) -> None:
        """Gives a synced local file its final name; OutputError if the disk or the store refuses."""
        if self.is_local:
            with writing(Path(self.base, name)):
                publish(temporary, Path(self.base, name))
            return
        num_bytes = temporary.stat().st_size
        with _storing(self / name):
            fs.copy_files(str(temporary), f"{self.base}/{name}", fs.LocalFileSystem(), self.filesystem)
        if (stored_bytes := self.size_bytes(name)) != num_bytes:
            raise OutputError(f"{self / name}: {num_bytes} bytes were stored and {stored_bytes} are there.")
        temporary.unlink()

    def size_bytes(self, name: str) -> int | None:
        """The size of a file; None if there is none."""
        with _storing(self / name):
            info = self.filesystem.get_file_info(f"{self.base}/{name}")
        return info.size if info.type == fs.FileType.File else None

    def modified_seconds(self, name: str) -> int:
        """When a file was written, in seconds since 1970; 0 if there is none."""
        with _storing(self / name):
            return int((self.filesystem.get_file_info(f"{self.base}/{name}").mtime_ns or 0) // 10**9)

    def sizes_bytes(self, folder: str = "") -> dict[str, int]:
        """The files that lie directly in `folder`, by name, with their sizes; {} if there is no such folder."""
        selector = fs.FileSelector(f"{self.base}/{folder}".rstrip("/"), allow_not_found=True)
        with _storing(self / folder):
            infos = self.filesystem.get_file_info(selector)
        return {info.base_name: info.size for info in infos if info.type == fs.FileType.File}

    def make_folder(self, name: str) -> None:
        """An object store needs none."""
        if self.is_local:
            with writing(Path(self.base, name)):
                Path(self.base, name).mkdir(exist_ok=True)

    def move_to(self, aside: str) -> None:
        """Renames the whole place to the sibling `aside`; an object store copies each file, then deletes it."""
        if self.is_local:
            with writing(Path(aside)):
                Path(self.base).rename(aside)
            return
        with _storing(self.address):
            infos = self.filesystem.get_file_info(fs.FileSelector(self.base, recursive=True))
            files = [info.path for info in infos if info.type == fs.FileType.File]
            for path in files:
                self.filesystem.copy_file(path, aside + path.removeprefix(self.base))
            for path in files:
                self.filesystem.delete_file(path)
        shutil.rmtree(self.working, ignore_errors=True)


def open_place(path: str | Path) -> Place:
    """The place that output.path names; nothing is made or read. Raises OutputError if it is no address to write to."""
    address = str(path)
    if "://" not in address:
        absolute = Path(address).absolute()
        return Place(str(path), fs.LocalFileSystem(), str(absolute), absolute / STATE)
    shown = address.partition("?")[0].rstrip("/")  # without the connection's options, which may hold a password
    if address.startswith("hf://"):
        repository = "/".join(shown.removeprefix("hf://").removeprefix("datasets/").split("/")[:2])
        raise OutputError(
            f"output.path: {shown} cannot be written to while a job runs: the hub takes too few commits an hour; write "
            f"to a folder, then `hf upload {repository} FOLDER/{COMPLETIONS} data --repo-type dataset`."
        )
    try:
        filesystem, base = fs.FileSystem.from_uri(address)
    except (ValueError, OSError, pa.ArrowException) as error:
        raise OutputError(f"output.path: {shown} is no address that can be written to: {_reason(error)}.") from error
    if not base.strip("/"):
        raise OutputError(f"output.path: {shown} is no address that can be written to: it names no bucket.")
    address = shown
    mark = hashlib.sha256(address.encode()).hexdigest()[:16]
    return Place(address, filesystem, base.rstrip("/"), cache_folder() / "outputs" / mark)


@contextmanager
def _storing(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise OutputError(
            f"{name}: the store refuses: {_reason(error)}. What is committed stays as it is; once this is mended the "
            "same command continues."
        ) from error


def _reason(error: BaseException) -> str:
    return (getattr(error, "strerror", None) or str(error)).split("\n")[0].rstrip(".")
