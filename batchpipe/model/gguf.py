"""GGUF files become safetensors folders, once: a stage can then map only its own tensors."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path

from filelock import FileLock

from batchpipe.errors import ModelError
from batchpipe.job.cache_folder import cache_folders
from batchpipe.model.checkpoint import fingerprint
from batchpipe.model.quiet import quiet_transformers
from batchpipe.report.lines import say


def convert_gguf(path: Path, dtype: str) -> tuple[Path, str]:
    """The folder with the file's model and tokenizer, made now if need be, and the file's fingerprint.

    dtype: auto, which is bfloat16 here, or the type to write. Of several processes that ask at once one converts
    and the others wait. Raises ModelError.
    """
    dtype = "bfloat16" if dtype == "auto" else dtype
    revision = fingerprint([path])
    models = _models_folder()
    folder = models / f"{_slug(path.stem)}-{revision}-{dtype}"
    with FileLock(models / f"{folder.name}.lock"):
        if not folder.is_dir():
            say(f"converting {path} to safetensors in {folder}; this is done once")
            workspace = Path(tempfile.mkdtemp(dir=models, prefix=f"{folder.name}."))
            try:
                _convert(path, dtype, workspace)
                os.replace(workspace, folder)
            finally:
                shutil.rmtree(workspace, ignore_errors=True)
    return folder, revision


def _convert(path: Path, dtype: str, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with quiet_transformers():
        try:
            model = AutoModelForCausalLM.from_pretrained(
                str(path.parent),
                gguf_file=path.name,
                dtype=getattr(torch, dtype),
                quantization_config=GgufConfig(dequantize=True),
            )
            tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
        except Exception as error:  # the readers of a damaged file raise what comes along
            raise ModelError(f"model.name: {path} cannot be converted: {error}") from error
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)


def _models_folder() -> Path:
    """The first cache folder that can be written; the last is for machines whose home cannot be."""
    for cache in cache_folders():
        folder = cache / "models"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            return folder
    raise ModelError("no folder to keep the converted model in; set BATCHPIPE_CACHE to one that can be written")
