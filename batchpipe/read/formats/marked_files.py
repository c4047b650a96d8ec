"""The fingerprints of an input's files, and whether the input only grew since others were taken."""

from __future__ import annotations

from collections.abc import Sequence

import xxhash

from batchpipe.job.input_files import FileMark, InputChange
from batchpipe.read.files import InputFile

_COMPRESSED = (".gz", ".zst")


class MarkedFiles:
    """Files in the order of the input, each with its name in messages. Takes their fingerprints at once."""

    def __init__(self, files: Sequence[tuple[InputFile, str]]) -> None:
        self._files = {name: file for file, name in files}
        digests = [file.fingerprint(name) for file, name in files]
        self.fingerprint: str = xxhash.xxh3_128_hexdigest(b"".join(digests))
        self.marks = [
            FileMark(name, file.size_bytes, digest.hex()) for (file, name), digest in zip(files, digests, strict=True)
        ]

    def change_since(self, old: Sequence[FileMark]) -> InputChange:
        """What differs from the `old` files. New rows may only stand behind all old ones: their places are row indexes.

        A file that grew is told by its beginning and end as they were; lines may only have been added to it.
        """
        lines: list[str] = []
        only_grew = True
        for mark in old:
            line, may_be = self._changed(mark, is_last=mark == old[-1])
            lines += [] if line is None else [line]
            only_grew &= may_be
        names, old_names = list(self._files), [mark.name for mark in old]
        lines += [f"{name} is new" for name in names if name not in old_names]
        if only_grew and names[: len(old)] != old_names:
            only_grew = False
            lines.append(f"rows of new files would stand before those of {old_names[-1]}")
        return InputChange(tuple(lines), only_grew)

    def _changed(self, mark: FileMark, *, is_last: bool) -> tuple[str | None, bool]:
        """What became of a file, and whether its old rows are still in their places."""
        file = self._files.get(mark.name)
        if file is None:
            return f"{mark.name} is gone", False
        sizes = f"{mark.size_bytes:,} to {file.size_bytes:,} bytes"
        if file.size_bytes < mark.size_bytes:
            return f"{mark.name} shrank from {sizes}", False
        if file.fingerprint(mark.name, mark.size_bytes).hex() != mark.fingerprint:
            return f"{mark.name} changed", False
        if file.size_bytes == mark.size_bytes:
            return None, True
        if file.path.endswith(_COMPRESSED) or not file.has_line_end_at(mark.size_bytes):
            return f"{mark.name} grew from {sizes}, and not by whole lines", False
        if not is_last:
            return f"{mark.name} grew from {sizes}, and rows of other files stand behind its own", False
        return f"{mark.name} grew from {sizes}", True
