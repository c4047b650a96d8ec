"""A job's identity: the part of the resolved job that changes the output, and nothing about how it is run.

The sections `predict`, `plan`, `engine` and `run` are left out, and so are `name`, `input.path` (the input's
fingerprint identifies its files, wherever they are) and all of `output` but what decides its columns. So a job can be
continued on another machine and with parts of another size.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from batchpipe.errors import JobError
from batchpipe.job.explain import shown
from batchpipe.job.spec import Job

_ABSENT = "(none)"


@dataclass(frozen=True)
class Identity:
    """`parts` maps dotted keys to plain JSON values, so that what is read from a file equals what was written."""

    parts: Mapping[str, Any]

    @cached_property
    def sha256(self) -> str:
        text = json.dumps(self.parts, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def identity(job: Job, *, model_revision: str, dtype: str, input_fingerprint: str) -> Identity:
    """The identity of a loaded `job` after its model and input have been opened.

    `model_revision` is the commit or content hash of the weights, `dtype` the type that was chosen for "auto".
    Raises JobError if the file of `input.chat_template` cannot be read.
    """
    sections = job.model_dump(mode="json", include={"model", "input", "sampling"}, exclude={"input": {"path"}})
    output = job.model_dump(mode="json")["output"]
    sections["output"] = {key: output[key] for key in ("columns", "prefix", "reasoning")}
    sections["model"] |= {"revision": model_revision, "dtype": dtype}
    sections["input"] |= {
        "fingerprint": input_fingerprint,
        "chat_template": _chat_template_mark(job.input.chat_template),
    }
    return Identity({f"{section}.{key}": value for section, keys in sections.items() for key, value in keys.items()})


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """A line "key: old -> new" for each key that differs between the parts of two identities."""
    return [
        f"{key}: {shown(old[key]) if key in old else _ABSENT} -> {shown(new[key]) if key in new else _ABSENT}"
        for key in sorted(old.keys() | new.keys())
        if key not in old or key not in new or old[key] != new[key]
    ]


def _chat_template_mark(chat_template: str) -> str:
    """The setting itself, or for a file the hash of its content, because only its content changes the output."""
    if chat_template in ("auto", "none"):
        return chat_template
    try:
        content = Path(chat_template).read_bytes()
    except OSError as error:
        raise JobError(f"input.chat_template: {chat_template!r} cannot be read: {error.strerror}") from None
    return f"sha256:{hashlib.sha256(content).hexdigest()}"
