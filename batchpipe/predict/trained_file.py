"""A trained classifier as one .safetensors file, which is usable only with the tokenizer that it was trained for."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from batchpipe.errors import JobError
from batchpipe.model.tokenizer import Tokenizer
from batchpipe.predict.base import FloatArray, Survival
from batchpipe.predict.classifier import LinearModel, TrainedClassifier
from batchpipe.predict.features import FEATURES_VERSION
from batchpipe.write.durable import write_whole

_FORMAT = f"batchpipe-length-predictor 1.{FEATURES_VERSION}"
_FORMAT_KEY = "format"
_TOKENIZER_KEY = "tokenizer"
_DTYPES = {
    "features": np.int64,
    "rarity": np.float32,
    "weights": np.float32,
    "bounds": np.float64,
    "edges_tokens": np.int32,
    "grid_tokens": np.int32,
    "alive": np.float64,
}


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """SHA-256, in hexadecimal, of the vocabulary with its ids: equal for tokenizers with the same meanings of ids."""
    vocabulary = sorted(tokenizer.vocabulary().items())
    return hashlib.sha256(json.dumps([len(vocabulary), vocabulary]).encode()).hexdigest()


def save_classifier(path: Path, classifier: TrainedClassifier, fingerprint: str) -> None:
    """Writes the file, whole or not at all; `fingerprint` is the tokenizer's. Raises OutputError."""
    arrays = {
        "features": classifier.model.features,
        "rarity": classifier.model.rarity,
        "weights": classifier.model.weights,
        "bounds": classifier.bounds,
        "edges_tokens": classifier.edges_tokens,
        "grid_tokens": classifier.prior.grid_tokens,
        "alive": classifier.prior.alive,
    }
    tensors = {name: np.ascontiguousarray(arrays[name], dtype) for name, dtype in _DTYPES.items()}
    write_whole(path, save(tensors, {_FORMAT_KEY: _FORMAT, _TOKENIZER_KEY: fingerprint}))


def load_classifier(path: Path, fingerprint: str) -> TrainedClassifier:
    """The classifier of a file. Raises JobError if it is none, is damaged, or belongs to another tokenizer."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise JobError(f"predict.method: {path} cannot be read: {error.strerror or error}") from error
    metadata = _metadata(data)
    if not metadata.get(_FORMAT_KEY, "").startswith(_FORMAT.split(" ")[0]):
        raise JobError(f"predict.method: {path} is not a trained predictor of batchpipe")
    if metadata[_FORMAT_KEY] != _FORMAT:
        raise JobError(
            f"predict.method: {path} has the format {metadata[_FORMAT_KEY]!r}, this version reads {_FORMAT!r}; "
            "train it again"
        )
    if metadata.get(_TOKENIZER_KEY) != fingerprint:
        raise JobError(
            f"predict.method: {path} was trained for another tokenizer than the model's; train one with this model"
        )
    try:
        tensors = load(data)
    except SafetensorError as error:
        raise JobError(f"predict.method: {path} is damaged: {error}") from error
    fault = _fault(tensors)
    if fault is not None:
        raise JobError(f"predict.method: {path} is damaged: {fault}")
    model = LinearModel(tensors["features"], tensors["rarity"], tensors["weights"])
    prior = Survival(tensors["grid_tokens"], tensors["alive"])
    return TrainedClassifier(model, tensors["bounds"], tensors["edges_tokens"], prior)


def _metadata(data: bytes) -> dict[str, str]:
    """The metadata in the header of a safetensors file; empty if `data` is no such file."""
    header_bytes = int.from_bytes(data[:8], "little")
    if len(data) < 8 or header_bytes > len(data) - 8:
        return {}
    try:
        header = json.loads(data[8 : 8 + header_bytes])
    except ValueError:
        return {}
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    return metadata if isinstance(metadata, dict) else {}


def _fault(tensors: dict[str, FloatArray]) -> str | None:
    """What is inconsistent in the arrays, or None."""
    if {name: array.dtype for name, array in tensors.items()} != {name: np.dtype(t) for name, t in _DTYPES.items()}:
        return "its arrays are not those of a predictor"
    alive, grid = tensors["alive"], tensors["grid_tokens"]
    has_ranks = all(array.ndim == (2 if name == "alive" else 1) for name, array in tensors.items())
    has_model = has_ranks and 1 <= len(tensors["features"]) == len(tensors["rarity"]) == len(tensors["weights"])
    if not has_model or alive.shape != (len(tensors["bounds"]) + 1, len(grid)) or len(grid) < 2:
        return "its arrays do not belong together"
    if not all(np.isfinite(array).all() for array in tensors.values()):
        return "it holds numbers that are not finite"
    is_curve = (alive[:, 0] == 1).all() and (alive[:, -1] == 0).all() and (np.diff(alive, axis=1) <= 0).all()
    increasing = ("features", "bounds", "edges_tokens", "grid_tokens")
    increases = all((np.diff(tensors[name]) > 0).all() for name in increasing)
    return None if is_curve and increases and grid[0] == 0 else "its curves or numbers are not in order"
