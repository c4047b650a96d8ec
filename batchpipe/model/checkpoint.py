"""What can be known of a checkpoint without reading its weights: its tensors, and a fingerprint. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import xxhash

from batchpipe.errors import ModelError

_INDEX = "model.safetensors.index.json"
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format
_SAMPLE_BYTES = 1 << 20
# What shapes the output besides the weights.
_SETTINGS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of the model folder. Raises ModelError where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"model.name: {path.parent} has no {path.name}") from error
    except (ValueError, OSError) as error:
        raise ModelError(f"model.name: {path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"model.name: {path} is not a JSON object")
    return content


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, all of them there. Raises ModelError."""
    if (folder / _INDEX).is_file():
        names = sorted(set(read_json(folder / _INDEX).get("weight_map", {}).values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ModelError(
                f"model.name: {folder} lacks {len(missing)} of {len(names)} weight files, the first of them "
                f"{missing[0]}; fetch the model again"
            )
        return [folder / name for name in names]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if any(folder.glob("*.bin")) or any(folder.glob("*.pth")):
        raise ModelError(
            f"model.name: {folder} holds only pickled weights (.bin, .pth), which can run code when loaded; "
            "convert them with transformers' save_pretrained, which writes safetensors"
        )
    raise ModelError(f"model.name: {folder} has no model.safetensors and no {_INDEX}")


def has_weights(folder: Path) -> bool:
    """Whether there is any weight file, of whatever format; what is wrong with them `weight_files` says."""
    return any(next(folder.glob(pattern), None) for pattern in ("*.safetensors", "*.bin", "*.pth"))


def read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Every tensor's shape, by name. Raises ModelError on a file that is missing, cut short or damaged."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in weight_files(folder):
        for name, entry in _read_header(path).items():
            if name != "__metadata__":
                shapes[name] = tuple(entry["shape"])
    return shapes


def _read_header(path: Path) -> dict[str, Any]:
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if size_bytes < 8 or header_bytes > min(_MAX_HEADER_BYTES, size_bytes - 8):
            raise ModelError(
                f"model.name: {path} is not a whole safetensors file: its header claims {header_bytes} bytes "
                f"and the file has {size_bytes}; fetch it again"
            )
        raw = file.read(header_bytes)
    try:
        header: dict[str, Any] = json.loads(raw)
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ModelError(f"model.name: the header of {path} is damaged: {error}; fetch it again") from error
    expected_bytes = 8 + header_bytes + max(ends, default=0)
    if size_bytes < expected_bytes:
        raise ModelError(f"model.name: {path} is cut short: {size_bytes} bytes of {expected_bytes}; fetch it again")
    return header


def fingerprint_folder(folder: Path, *, needs_weights: bool = True) -> str:
    """Names a local model by its settings and weights, wherever the folder is; see `fingerprint`.

    Raises ModelError where it needs weights and they are not all there.
    """
    settings = [folder / name for name in _SETTINGS if (folder / name).is_file()]
    return fingerprint([*settings, *(weight_files(folder) if needs_weights or has_weights(folder) else ())])


def fingerprint(paths: Iterable[Path]) -> str:
    """16 hex digits over name, size, first and last MiB of each file: quick at any size, and a weight file's
    first MiB holds its header."""
    digest = xxhash.xxh3_64()
    for path in paths:
        size_bytes = path.stat().st_size
        digest.update(f"{path.name}\0{size_bytes}\0".encode())
        with path.open("rb") as file:
            digest.update(file.read(_SAMPLE_BYTES))
            file.seek(max(0, size_bytes - _SAMPLE_BYTES))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
