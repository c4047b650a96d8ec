"""What a model's own files say of how it should be sampled, and when it ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from batchpipe.errors import JobError
from batchpipe.job.sampling import Sampling
from batchpipe.model.generation_config import end_token_ids, job_sampling, with_tokenizers_end

DRAWN = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20}


def stating(folder: Path, **stated: Any) -> Path:
    (folder / "generation_config.json").write_text(json.dumps(stated))
    return folder


def test_what_the_job_does_without_is_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = stating(tmp_path, **DRAWN, repetition_penalty=1.05, suppress_tokens=[1, 2])
    sampling = Sampling(top_p=0.9)
    assert job_sampling(sampling, folder) is sampling
    [warning] = caplog.messages
    assert "repetition_penalty 1.05" in warning and "temperature 0.6" in warning and "logit_bias" in warning
    assert "top_p" not in warning and warning.endswith("sampling.defaults: model applies it")


@pytest.mark.parametrize(
    "stated",
    [
        {},
        {"eos_token_id": 1, "max_length": 20},
        {"temperature": 0.6, "top_p": 0.9},  # without do_sample they have no effect
        {"repetition_penalty": 1.0, "num_beams": 1, "no_repeat_ngram_size": 0},
    ],
)
def test_what_changes_nothing_is_not_named(
    tmp_path: Path, stated: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    job_sampling(Sampling(), stating(tmp_path, **stated))
    assert not caplog.messages


def test_a_model_without_the_file_asks_for_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert job_sampling(Sampling(), tmp_path) == Sampling()
    assert not caplog.messages


def test_the_models_defaults_fill_what_the_job_does_not_set(tmp_path: Path) -> None:
    folder = stating(tmp_path, **DRAWN, repetition_penalty=1.1, suppress_tokens=[7])
    found = job_sampling(Sampling(defaults="model", temperature=0.0, max_tokens=5), folder)
    assert (found.temperature, found.top_p, found.top_k, found.max_tokens) == (0.0, 0.95, 20, 5)
    assert (found.repetition_penalty, found.logit_bias) == (1.1, {7: -100.0})


def test_drawing_without_a_temperature_is_at_one(tmp_path: Path) -> None:
    folder = stating(tmp_path, do_sample=True)
    assert job_sampling(Sampling(defaults="model"), folder).temperature == 1.0


@pytest.mark.parametrize("key", ["bad_words_ids", "no_repeat_ngram_size", "begin_suppress_tokens"])
def test_what_batchpipe_lacks_is_refused_or_named(tmp_path: Path, key: str, caplog: pytest.LogCaptureFixture) -> None:
    folder = stating(tmp_path, **{key: [[3]] if key != "no_repeat_ngram_size" else 3})
    with pytest.raises(JobError, match=rf"generation_config.json sets {key} to .*leave sampling.defaults at job"):
        job_sampling(Sampling(defaults="model"), folder)
    job_sampling(Sampling(), folder)
    [warning] = caplog.messages
    assert key in warning and not warning.endswith("applies it")


def test_values_that_no_job_may_have_are_refused(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"generation_config.json: repetition_penalty: "):
        job_sampling(Sampling(defaults="model"), stating(tmp_path, repetition_penalty=-1))


def test_end_tokens(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert end_token_ids(tmp_path, 2) == (2,)
    assert end_token_ids(stating(tmp_path, eos_token_id=[0, 5]), 2) == (0, 5)
    assert with_tokenizers_end((0, 5), 5, "</s>") == (0, 5)
    assert with_tokenizers_end((0,), None, None) == (0,)
    assert not caplog.messages
    assert with_tokenizers_end((0,), 2, "<|im_end|>") == (0, 2)
    assert caplog.messages == [
        "model: the tokenizer's end token <|im_end|> (2) ends completions too; the model's files name [0]"
    ]
