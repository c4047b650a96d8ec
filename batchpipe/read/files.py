"""The files that an input path names, their order, and fingerprints that show whether a file has changed.

Every path goes through `pyarrow.fs`, so the same code serves local folders, s3:// and gs://. Files have the order of
the job's list of paths; those that one path of it names are sorted by name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

import pyarrow as pa
import xxhash
from pyarrow import fs

from batchpipe.errors import InputError
from batchpipe.write.place import COMPLETIONS, STATE, SUCCESS

FINGERPRINT_BYTES = 65_536  # read from the beginning of a file, and from its end
_WILDCARD = re.compile(r"[*?\[]")
_OPTIONS = re.compile(r"\?\w+=[^&/]*(&\w+=[^&/]*)*$")  # of a connection, at the end of an address


@dataclass(frozen=True, slots=True)
class InputFile:
    """One file to read. `relative` is its path below the folder or pattern that found it.

    `named`: the job names this very file, which it does not where it names a folder or a pattern.
    """

    filesystem: fs.FileSystem
    path: str
    relative: str
    size_bytes: int
    modified_ns: int | None
    named: bool = False

    def open(self) -> pa.NativeFile:
        """The bytes as stored, seekable. Raises InputError if the file cannot be opened."""
        with _file_errors("open", self.path):
            return self.filesystem.open_input_file(self.path)

    def fingerprint(self, name: str, size_bytes: int | None = None) -> bytes:
        """Hash of name, size, beginning and end: equal for a copy, different for an edited or longer file.

        size_bytes: of the first bytes alone, as if the file ended there.
        """
        size_bytes = self.size_bytes if size_bytes is None else size_bytes
        num_bytes = min(FINGERPRINT_BYTES, size_bytes)
        digest = xxhash.xxh3_128(f"{name}\0{size_bytes}\0".encode())
        with self.open() as file, _file_errors("read", self.path):
            digest.update(file.read(num_bytes))
            file.seek(size_bytes - num_bytes)
            digest.update(file.read(num_bytes))
        return digest.digest()

    def has_line_end_at(self, size_bytes: int) -> bool:
        """Whether a line ends with the first `size_bytes` bytes, or right behind them."""
        with self.open() as file, _file_errors("read", self.path):
            file.seek(max(0, size_bytes - 1))
            around = file.read(3 if size_bytes else 0)
        return not around or around[:1] == b"\n" or around[1:2] == b"\n" or around[1:3] == b"\r\n"

    def check_unchanged(self) -> None:
        """Raises InputError if size or time of the file differ from those found at the start."""
        info = self.filesystem.get_file_info(self.path)
        if info.type != fs.FileType.File or (info.size, info.mtime_ns) != (self.size_bytes, self.modified_ns):
            raise InputError(
                f"input.path: {self.path} changed while the job was reading it; "
                "restore it and run again, or start over with --fresh"
            )


def find_files(paths: Iterable[str], exclude: Path | None) -> list[InputFile]:
    """The files that `paths` name. `exclude` is the output folder, which the input must not contain.

    Raises InputError if a path names no file, a file is named twice, or one lies in `exclude`.
    """
    files = [file for path in paths for file in _expand(path, exclude)]
    seen: dict[str, str] = {}
    for file in files:
        is_local = isinstance(file.filesystem, fs.LocalFileSystem)
        real = os.path.realpath(file.path) if is_local else file.path
        if real in seen:
            raise InputError(
                f"input.path: {file.path} is the same file as {seen[real]}; it would be read twice "
                "(named twice, overlapping patterns, or a loop of symbolic links)"
            )
        seen[real] = file.path
        if exclude is not None and is_local and Path(real).is_relative_to(exclude.resolve()):
            raise InputError(f"input.path: {file.path} lies in the output folder {exclude}; write somewhere else")
    return files


def file_names(files: Sequence[InputFile]) -> list[str]:
    """The name of each file in messages and generated row ids: the shortest form that is unique for every file."""
    for names in ([PurePosixPath(f.path).name for f in files], [f.relative for f in files]):
        if len(set(names)) == len(names):
            return names
    return [file.path for file in files]


def _expand(path: str, exclude: Path | None) -> list[InputFile]:
    options = _OPTIONS.search(path) if "://" in path else None
    path, query = (path[: options.start()], options[0]) if options else (path, "")
    with _file_errors("read", path):
        filesystem, literal = _locate(path, query)
        info = filesystem.get_file_info(literal)
        if info.type == fs.FileType.File:
            return [_input_file(filesystem, info, literal.rpartition("/")[0], named=True)]
        wild = _WILDCARD.search(literal)
        if info.type == fs.FileType.Directory:
            _check_leaves_out(exclude, path, literal, [])
            folder = _rows_folder(filesystem, literal, path)
            found = _walk(filesystem, folder, folder)
        elif wild is not None:
            base = literal[: wild.start()].rpartition("/")[0]
            segments = literal[len(base) + 1 :].split("/")
            _check_leaves_out(exclude, path, base, segments)
            found = _match(filesystem, base or "/", segments, base)
        else:
            raise InputError(f"input.path: {path} does not exist")
    if not found:
        raise InputError(f"input.path: nothing to read in {path} (names that begin with _ or . are left out)")
    return found


def _rows_folder(filesystem: fs.FileSystem, folder: str, path: str) -> str:
    """The folder with the rows: of an output of ours its completions, else `folder`; InputError if some are missing."""
    state, success = filesystem.get_file_info([f"{folder}/{STATE}", f"{folder}/{SUCCESS}"])
    if state.type != fs.FileType.Directory:
        return folder
    if success.type != fs.FileType.File:
        raise InputError(
            f"input.path: {path} is the output of a job that is not finished; finish it with `batchpipe run`, or name "
            f"{path.rstrip('/')}/{COMPLETIONS} to read the rows that are there"
        )
    return f"{folder}/{COMPLETIONS}"


def _locate(path: str, query: str) -> tuple[fs.FileSystem, str]:
    if "://" not in path:
        return fs.LocalFileSystem(), os.path.abspath(path)
    wild = _WILDCARD.search(path)
    base, pattern = path, ""
    if wild is not None:  # wildcards are not part of a URI, so only what stands before them is parsed as one
        base, _, pattern = path[: wild.start()].rpartition("/")
        pattern += path[wild.start() :]
    try:
        filesystem, literal = fs.FileSystem.from_uri(base + query)
    except ValueError as error:
        hint = "; download it and name the file" if path.startswith(("http://", "https://")) else ""
        raise InputError(f"input.path: {path} is no address that can be read: {error}{hint}") from error
    return filesystem, f"{literal}/{pattern}" if pattern else literal


def _walk(filesystem: fs.FileSystem, folder: str, root: str) -> list[InputFile]:
    """Every file below `folder`, sorted by its path."""
    infos = [info for info in _listed(filesystem, folder, recursive=True) if info.type != fs.FileType.Directory]
    visible = [info for info in infos if not _is_hidden(_relative(info, root))]
    return sorted((_input_file(filesystem, info, root) for info in visible), key=lambda file: file.relative)


def _listed(filesystem: fs.FileSystem, folder: str, *, recursive: bool = False) -> list[fs.FileInfo]:
    """What the folder holds, links that point nowhere included: Arrow leaves them out, and so rows without a word."""
    infos: list[fs.FileInfo] = filesystem.get_file_info(fs.FileSelector(folder, recursive=recursive))
    if isinstance(filesystem, fs.LocalFileSystem):
        below = [info.path for info in infos if recursive and info.type == fs.FileType.Directory]
        folders = {
            os.path.realpath(path): path for path in (*reversed(below), folder)
        }  # once each, whatever links loop
        paths = {os.path.join(path, name) for path in folders.values() for name in os.listdir(path)}
        infos += filesystem.get_file_info(sorted(paths.difference(info.path for info in infos)))
    return infos


def _match(filesystem: fs.FileSystem, folder: str, segments: Sequence[str], root: str) -> list[InputFile]:
    """Files with a path below `folder` that matches the pattern `segments`, and all files of folders that match it."""
    segment, *rest = segments
    infos = sorted(_listed(filesystem, folder), key=lambda info: info.base_name)
    infos = [info for info in infos if not _is_hidden(info.base_name)]
    found = _match(filesystem, folder, rest, root) if segment == "**" and rest else []
    for info in infos:
        is_folder = info.type == fs.FileType.Directory
        if segment == "**" and rest:
            found += _match(filesystem, info.path, segments, root) if is_folder else []
        elif fnmatchcase(info.base_name, segment):
            if is_folder:
                found += _match(filesystem, info.path, rest, root) if rest else _walk(filesystem, info.path, root)
            elif not rest:
                found.append(_input_file(filesystem, info, root))
    return found


def _check_leaves_out(exclude: Path | None, path: str, base: str, segments: Sequence[str]) -> None:
    """Raises InputError if `path` would contain the folder `exclude`, even if that does not exist yet."""
    if exclude is None or not exclude.absolute().is_relative_to(base or "/"):
        return
    folders = exclude.absolute().relative_to(base or "/").parts
    if "**" in segments or (len(folders) >= len(segments) and all(map(fnmatchcase, folders, segments))):
        raise InputError(
            f"input.path: {path} takes in the output folder {exclude}; "
            "write somewhere else (output.path) or name the input more narrowly"
        )


def _is_hidden(relative: str) -> bool:
    return relative.endswith(".crc") or any(part[0] in "_." for part in relative.split("/"))


def _input_file(filesystem: fs.FileSystem, info: fs.FileInfo, root: str, *, named: bool = False) -> InputFile:
    if info.type != fs.FileType.File:
        raise InputError(f"input.path: {info.path} is no file that can be read (a broken or looping link?)")
    return InputFile(filesystem, info.path, _relative(info, root), info.size, info.mtime_ns, named)


def _relative(info: fs.FileInfo, root: str) -> str:
    relative: str = info.path.removeprefix(root).lstrip("/")
    return relative


@contextmanager
def _file_errors(doing: str, path: str) -> Iterator[None]:
    """Turns an error of the file system into an InputError that says what was done to which path."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
        raise InputError(f"input.path: cannot {doing} {path}: {reason}") from error
