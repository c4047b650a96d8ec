"""The job: what the user asked for, checked and frozen.

`spec` and `sampling` hold every key with its default and check, in the types of `values`; `strict_yaml` reads the file,
`load` makes a job of it (`explain` words the mistakes), and `identity` says which jobs have the same output. `shipped`
finds the configuration files that come with the package.

The names below are imported when they are first asked for, as pydantic takes a while: commands that read no job do
without it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from batchpipe.job.load import job_schema, load_job
    from batchpipe.job.sampling import Sampling
    from batchpipe.job.spec import Job

__all__ = ["Job", "Sampling", "job_schema", "load_job"]

_MODULES = {"Job": "spec", "Sampling": "sampling", "job_schema": "load", "load_job": "load"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
