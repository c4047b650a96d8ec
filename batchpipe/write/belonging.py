"""Which job an output folder belongs to: `identity.json`, which the first run writes and `--extend` replaces."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from batchpipe.errors import OutputError
from batchpipe.job.identity import Identity, difference
from batchpipe.job.input_files import CompareInput, FileMark, InputChange
from batchpipe.write.durable import to_json
from batchpipe.write.place import COMPLETIONS, PART_NAME, STATE, SUCCESS, Place
from batchpipe.write.schema import SCHEMA_VERSION

NAME = f"{STATE}/identity.json"
# What of an identity may differ where an input only grew, or more of it is read.
_FINGERPRINT, _LIMIT = "input.fingerprint", "input.limit"


@dataclass(frozen=True, slots=True)
class Owner:
    """The job that a folder belongs to. earlier: sha256 of the identities that it had before it was extended.

    files: of the input; empty where the folder was begun before files were kept, or the input is no files.
    """

    identity: Identity
    files: Sequence[FileMark] = ()
    earlier: Sequence[str] = field(default=())

    @property
    def identities(self) -> frozenset[bytes]:
        """As in the footers of its parts."""
        return frozenset(sha256.encode() for sha256 in (self.identity.sha256, *self.earlier))


def claim(
    place: Place,
    identity: Identity,
    files: Sequence[FileMark],
    compare: CompareInput | None,
    check_extension: Callable[[], None] | None,
) -> Owner:
    """The owner of the folder, which is `identity` or becomes it where its input only grew and that is allowed.

    check_extension: called before that, to raise what speaks against it; None where the user did not ask for it.
    Raises OutputError if the folder belongs to another job, or it is unknown to which.
    """
    owner = read_owner(place)
    if owner is None:
        if any(PART_NAME.fullmatch(name) for name in place.sizes_bytes(COMPLETIONS)):
            raise OutputError(
                f"{place / NAME} is missing, so it is unknown which job {place.address} belongs to; use --fresh."
            )
        owner = Owner(identity, files)
        _write(place, owner)
        return owner
    old, new = owner.identity.parts, identity.parts
    if not difference(old, new):
        return owner
    change = compare(owner.files) if compare is not None and owner.files else None
    if not _only_grew(old, new, change):
        raise OutputError(_refusal(place, old, new, change))
    if check_extension is None:
        raise OutputError(
            "\n  ".join([f"{place.address}: holds the rows of a smaller input:", *_lines(old, new, change)])
            + "\nAll old rows are there: run the new ones with --extend, choose another output.path, or start over "
            "with --fresh."
        )
    check_extension()
    owner = Owner(identity, files, [*owner.earlier, owner.identity.sha256])
    place.delete(SUCCESS)  # first, so that no crash leaves a larger input declared complete
    _write(place, owner)
    return owner


def read_owner(place: Place) -> Owner | None:
    """None if there is none yet. Raises OutputError for a file that cannot be read, or another layout."""
    data = place.read(NAME)
    if data is None:
        return None
    try:
        found = json.loads(data)
        version, parts = found["schema_version"], found["identity"]
        files = [FileMark(**mark) for mark in found.get("input_files", ())]
        earlier = list(found.get("earlier_sha256", ()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise OutputError(f"{place / NAME}: cannot be read ({error}); start over with --fresh.") from error
    if version != SCHEMA_VERSION:
        raise OutputError(
            f"{place.address}: holds completions of layout {version}, this batchpipe writes {SCHEMA_VERSION}; choose "
            "another output.path, or move the old output aside with --fresh."
        )
    return Owner(Identity(parts), files, earlier)


def _write(place: Place, owner: Owner) -> None:
    content = {
        "schema_version": SCHEMA_VERSION,
        "identity": owner.identity.parts,
        "input_files": [asdict(mark) for mark in owner.files],
        "earlier_sha256": list(owner.earlier),
    }
    place.write(NAME, to_json(content))


def _only_grew(old: Any, new: Any, change: InputChange | None) -> bool:
    differing = {key for key in old.keys() | new.keys() if old.get(key) != new.get(key)}
    if not differing <= {_FINGERPRINT, _LIMIT}:
        return False
    was, now = old.get(_LIMIT), new.get(_LIMIT)
    if _LIMIT in differing and (was is None or (now is not None and now < was)):
        return False
    return _FINGERPRINT not in differing or (change is not None and change.only_grew)


def _lines(old: Any, new: Any, change: InputChange | None) -> list[str]:
    """The difference; in place of the fingerprints what became of the files, where that is known."""
    lines = difference(old, new)
    if change is None or not change.lines:
        return lines
    kept = [line for line in lines if not line.startswith(_FINGERPRINT)]
    return [*kept, *(f"input.path: {line}" for line in change.lines)]


def _refusal(place: Place, old: Any, new: Any, change: InputChange | None) -> str:
    lines = "\n  ".join([f"{place.address}: belongs to another job:", *_lines(old, new, change)])
    return f"{lines}\nChoose another output.path, or move the old output aside with --fresh."
