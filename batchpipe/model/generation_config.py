"""What a model says of how it should be sampled: generation_config.json and the tokenizer's end token.

One rule: the job's sampling settings apply, and those of generation_config.json that it would do without are named in
one line. With `sampling.defaults: model` they apply wherever the job does not set the key.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from batchpipe.errors import JobError, RowError
from batchpipe.job.sampling import Sampling
from batchpipe.model.checkpoint import read_json

logger = logging.getLogger(__name__)

# Keys that have the same name and meaning, with the value that changes nothing.
_SAME = {"repetition_penalty": 1.0}
_OF_DRAWING = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
# Settings that change what is generated and that batchpipe lacks, with the value that changes nothing.
_LACKED = {
    "begin_suppress_tokens": None,
    "bad_words_ids": None,
    "sequence_bias": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "encoder_no_repeat_ngram_size": 0,
    "exponential_decay_length_penalty": None,
    "guidance_scale": 1.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "num_beams": 1,
    "penalty_alpha": None,
    "watermarking_config": None,
}
_SUPPRESSED = -100.0  # the least bias that a job may give


def end_token_ids(folder: Path, config_token_ids: Any) -> tuple[int, ...]:
    """The tokens that end a completion: generation_config.json's where it names any, else those of config.json."""
    stated = _generation_config(folder).get("eos_token_id")
    token_ids = config_token_ids if stated is None else stated
    if token_ids is None:
        return ()
    return tuple(token_ids) if isinstance(token_ids, list) else (token_ids,)


def with_tokenizers_end(end_ids: tuple[int, ...], token_id: int | None, token: str | None) -> tuple[int, ...]:
    """`end_ids` with the tokenizer's own end token, which chat models of base models often have alone."""
    if token_id is None or token_id in end_ids:
        return end_ids
    logger.warning(
        "model: the tokenizer's end token %s (%d) ends completions too; the model's files name %s",
        *(token, token_id, list(end_ids)),
    )
    return (*end_ids, token_id)


def job_sampling(sampling: Sampling, folder: Path) -> Sampling:
    """The job's settings with those of generation_config.json, by the rule above.

    Raises JobError if `sampling.defaults` is `model` and the file asks for what batchpipe lacks or refuses.
    """
    stated = _generation_config(folder)
    lacked = {key: stated[key] for key, neutral in _LACKED.items() if stated.get(key) not in (None, neutral)}
    unset = {key: value for key, value in _settings(stated).items() if key not in sampling.model_fields_set}
    if sampling.defaults == "model":
        for key, value in lacked.items():
            raise JobError(
                f"sampling.defaults: the model's generation_config.json sets {key} to {_short(value)}, which batchpipe "
                "does not have; leave sampling.defaults at job"
            )
        try:
            return sampling.override(unset)
        except RowError as error:
            raise JobError(f"sampling.defaults: of the model's generation_config.json: {error.message}") from error
    if unset or lacked:
        logger.warning(
            "sampling: the model's generation_config.json asks for %s, which this job does without%s",
            ", ".join(f"{key} {_short(value)}" for key, value in (unset | lacked).items()),
            "; sampling.defaults: model applies it" if not lacked else "",
        )
    return sampling


def _settings(stated: Mapping[str, Any]) -> dict[str, Any]:
    """The file's settings as keys of `sampling`, without those that change nothing."""
    neutral = _SAME | _OF_DRAWING if stated.get("do_sample") else _SAME
    found = {key: stated[key] for key, value in neutral.items() if stated.get(key) not in (None, value)}
    if stated.get("do_sample"):
        found.setdefault("temperature", _OF_DRAWING["temperature"])
    if suppressed := stated.get("suppress_tokens"):
        found["logit_bias"] = {int(token_id): _SUPPRESSED for token_id in suppressed}
    return {key: float(value) if key != "top_k" and type(value) is int else value for key, value in found.items()}


def _generation_config(folder: Path) -> dict[str, Any]:
    path = folder / "generation_config.json"
    return read_json(path) if path.is_file() else {}


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
