"""What can be known of a checkpoint without reading its weights: its tensors, and a fingerprint. No torch."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import xxhash

from batchpipe.errors import ModelError

_INDEX = "model.safetensors.index.json"
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format
_SAMPLE_BYTES = 1 << 20
_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
_RUNNING_QUANTIZATIONS = {"mxfp4"}  # transformers unpacks it on loading
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
        weight_map = read_json(folder / _INDEX).get("weight_map", {})
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise ModelError(f"model.name: weight_map of {folder / _INDEX} does not map tensors to files")
        names = sorted(set(weight_map.values()))
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


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of the checkpoint as stored; `dtype` is safetensors' name of its type, such as BF16."""

    dtype: str
    shape: tuple[int, ...]


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor by name. Raises ModelError on a file that is missing, cut short or damaged."""
    tensors: dict[str, Tensor] = {}
    for path in weight_files(folder):
        for name, entry in _read_header(path).items():
            if name != "__metadata__":
                tensors[name] = Tensor(entry["dtype"], tuple(entry["shape"]))
    return tensors


def stored_dtype(tensors: Mapping[str, Tensor]) -> str | None:
    """The type of most numbers of the checkpoint, as torch names it; None if they are packed or of no such type."""
    num_elements: Counter[str] = Counter()
    for tensor in tensors.values():
        if tensor.dtype in _DTYPES:
            num_elements[_DTYPES[tensor.dtype]] += prod(tensor.shape)
    return num_elements.most_common(1)[0][0] if num_elements else None


def unpacked_shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shapes of tensors as they are computed with.

    MXFP4 stores a tensor X as `X_blocks`, two numbers a byte in its last two dimensions, and `X_scales`.
    """
    shapes = {}
    for name, tensor in tensors.items():
        whole = name.removesuffix("_blocks")
        if whole != name and f"{whole}_scales" in tensors:
            *outer, num_blocks, block_bytes = tensor.shape
            shapes[whole] = (*outer, num_blocks * block_bytes * 2)
        elif f"{name.removesuffix('_scales')}_blocks" not in tensors:
            shapes[name] = tensor.shape
    return shapes


def check_is_plain_model(folder: Path) -> None:
    """Raises ModelError, with what to do, for a folder that holds an adapter, or weights in a form that cannot run."""
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path") or "its base model"
        raise ModelError(
            f"model.name: {folder} holds an adapter of {base}; merge it (peft: PeftModel.from_pretrained(model, folder)"
            ".merge_and_unload().save_pretrained(...)) and name the merged model"
        )
    quantization = read_json(folder / "config.json").get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method is not None and method not in _RUNNING_QUANTIZATIONS:
        raise ModelError(
            f"model.name: the weights of {folder} are quantised ({method}), which cannot run; name the model that they "
            "were made from, or a .gguf file of it"
        )


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
