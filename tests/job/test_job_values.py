import json
from typing import Any

import pytest
from pydantic import ValidationError

from batchpipe.errors import JobError
from batchpipe.job import Job, Sampling, job_schema, load_job
from batchpipe.job.explain import key_paths, shown
from batchpipe.job.values import parse_size

MINIMAL = {"model": {"name": "some/model"}, "input": {"path": "rows.jsonl"}, "output": {"path": "out"}}


def job_with(section: str, **keys: Any) -> dict[str, Any]:
    return {**MINIMAL, section: {**MINIMAL.get(section, {}), **keys}}


@pytest.mark.parametrize(
    ("section", "key", "value", "words"),
    [
        ("sampling", "temperature", -0.5, "-0.5 is not a finite number >= 0"),
        ("sampling", "temperature", float("nan"), "nan is not a finite number >= 0"),
        ("sampling", "temperature", float("inf"), "inf is not a finite number >= 0"),
        ("sampling", "temperature", 10**400, "is not a finite number >= 0"),
        ("sampling", "temperature", "0.7", "'0.7' is not a finite number >= 0"),
        ("sampling", "temperature", True, "true is not a finite number >= 0"),
        ("sampling", "top_p", 0, "0 is not a number above 0, up to 1"),
        ("sampling", "top_p", 1.1, "1.1 is not a number above 0, up to 1"),
        ("sampling", "top_k", -1, "-1 is not an integer >= 0"),
        ("sampling", "top_k", 1.0, "1.0 is not an integer >= 0"),
        ("sampling", "min_p", 1.5, "1.5 is not a number from 0 to 1"),
        ("sampling", "repetition_penalty", 0, "0 is not a finite number > 0"),
        ("sampling", "presence_penalty", 2.5, "2.5 is not a number from -2 to 2"),
        ("sampling", "frequency_penalty", -3, "-3 is not a number from -2 to 2"),
        ("sampling", "max_tokens", 0, "0 is not an integer >= 1"),
        ("sampling", "max_tokens", None, "null is not an integer >= 1"),
        ("sampling", "max_tokens", True, "true is not an integer >= 1"),
        ("sampling", "n", 0, "0 is not an integer from 1 to 128"),
        ("sampling", "n", 10_000, "10000 is not an integer from 1 to 128"),
        ("sampling", "stop", "", "'' is not a nonempty string, or a list of at most 64 of them"),
        ("sampling", "stop", ["a", ""], "['a', ''] is not a nonempty string"),
        ("sampling", "stop", ["x"] * 65, "is not a nonempty string, or a list of at most 64 of them"),
        ("sampling", "stop_token_ids", [-1], "[-1] is not a list of token ids"),
        ("sampling", "stop_token_ids", ["3"], "['3'] is not a list of token ids"),
        ("sampling", "seed", -1, "-1 is not an integer from 0 to 2^63 - 1"),
        ("sampling", "seed", 2**63, "is not an integer from 0 to 2^63 - 1"),
        ("sampling", "logprobs", 21, "21 is not an integer from 0 (off) to 20"),
        ("sampling", "logit_bias", {"the": 1}, "{'the': 1} is not a mapping of token ids"),
        ("sampling", "logit_bias", {-4: 1}, "{-4: 1} is not a mapping of token ids"),
        ("sampling", "logit_bias", {5: 101}, "{5: 101} is not a mapping of token ids"),
        ("sampling", "logit_bias", {5: 1, "5": 2}, "is not a mapping of token ids (integers >= 0, each once)"),
        ("sampling", "logit_bias", [5], "[5] is not a mapping of token ids"),
        ("sampling", "ignore_eos", 1, "1 is not true or false"),
        ("sampling", "min_tokens", 300, "300 is more than max_tokens, which is 256"),
        ("model", "name", "", "'' is not a nonempty string"),
        ("model", "revision", 12, "12 is not null or a nonempty string"),
        ("model", "dtype", "int8", "'int8' is not one of 'auto', 'bfloat16', 'float16', 'float32'"),
        ("input", "path", [], "[] is not a path, or a nonempty list of paths"),
        ("input", "format", "orc", "'orc' is not one of 'auto', 'jsonl', 'json', 'csv'"),
        ("input", "limit", 0, "0 is not null or an integer >= 1"),
        ("input", "max_line_bytes", "0MiB", "'0MiB' is not a size above zero"),
        ("predict", "method", 3, "3 is not a nonempty string"),
        ("plan", "schedule", "fifo", "'fifo' is not one of 'auto', 'temporal', 'hybrid', 'separate'"),
        ("engine", "num_stages", 0, "0 is not 'auto' or an integer >= 1"),
        ("engine", "num_stages", True, "true is not 'auto' or an integer >= 1"),
        ("engine", "replicas", 0, "0 is not 'auto' or an integer >= 1"),
        ("engine", "block_tokens", 257, "257 is not 'auto' or an integer from 1 to 256"),
        ("engine", "kv_device_memory", "4GB", "'4GB' is not 'auto' or a size above zero such as 4GiB"),
        ("engine", "kv_host_memory", -1, "-1 is not 0 or a size such as 4GiB"),
        ("engine", "kv_host_memory", "auto", "'auto' is not 0 or a size such as 4GiB"),
        ("engine", "offload", "swap", "'swap' is not one of 'auto', 'none', 'batch', 'layer'"),
        ("engine", "offload", "both", "'both' is not one of 'auto', 'none', 'batch', 'layer'"),
        ("engine", "offload", "layer", "is 'layer' and kv_host_memory is 0; set kv_host_memory to a size such as 8GiB"),
        ("engine", "kv_verify", False, "false is not one of 'off', 'sample', 'all'"),
        ("output", "columns", "id", "'id' is not 'all', 'none' or a list of column names"),
        ("output", "part_rows", 0, "0 is not an integer >= 1"),
        ("output", "max_failed_fraction", 1.01, "1.01 is not a number from 0 to 1"),
    ],
)
def test_a_wrong_value_is_named_with_its_path_and_what_is_accepted(
    section: str, key: str, value: object, words: str
) -> None:
    with pytest.raises(JobError) as refusal:
        load_job(job_with(section, **{key: value}))
    lines = str(refusal.value).splitlines()[1:]
    assert len(lines) == 1
    assert lines[0].startswith(f"  {section}.{key}: ")
    assert words in lines[0]


def test_version_is_one() -> None:
    for wrong in (2, True, "1"):
        with pytest.raises(JobError, match="version: .* is not 1, the only version there is"):
            load_job({**MINIMAL, "version": wrong})


@pytest.mark.parametrize("name", ["messages", "tokenize", "add_generation_prompt"])
def test_what_a_chat_template_is_called_with_is_no_variable(name: str) -> None:
    with pytest.raises(JobError, match=f"input.template_variables: '{name}' cannot be set; remove it"):
        load_job(job_with("input", template_variables={"enable_thinking": False, name: True}))


def test_template_and_messages_column_exclude_each_other() -> None:
    with pytest.raises(JobError, match="input.template: is set beside messages_column; keep one of them"):
        load_job(job_with("input", template="{a}", messages_column="chat"))


@pytest.mark.parametrize("offload", ["auto", "none", "batch", "layer"])
def test_offload_with_host_memory(offload: str) -> None:
    engine = load_job(job_with("engine", offload=offload, kv_host_memory="1.5GiB")).engine
    assert (engine.offload, engine.kv_host_memory) == (offload, 3 << 29)


@pytest.mark.parametrize("offload", ["auto", "none"])
def test_offload_without_host_memory_is_one_tier(offload: str) -> None:
    assert load_job(job_with("engine", offload=offload)).engine.kv_host_memory == 0


def test_greedy_beside_a_filter_is_no_mistake() -> None:
    sampling = load_job(job_with("sampling", temperature=0, top_p=0.5, top_k=10**9)).sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.0, 0.5, 10**9)


def test_what_is_accepted_is_normalised() -> None:
    job = load_job(
        {
            **MINIMAL,
            "sampling": {"stop": "END", "logit_bias": {"7": -100, 8: 0.5}, "temperature": 1},
            "engine": {"kv_device_memory": "1.5GiB", "kv_host_memory": "0GiB", "block_tokens": 1},
            "output": {"path": "out", "columns": ["a", "b"]},
        }
    )
    assert job.sampling.stop == ("END",)
    assert job.sampling.logit_bias == {7: -100.0, 8: 0.5}
    assert isinstance(job.sampling.temperature, float)
    assert (job.engine.kv_device_memory, job.engine.kv_host_memory) == (3 << 29, 0)
    assert job.output.columns == ("a", "b")


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("4GiB", 4 << 30), ("512MiB", 512 << 20), ("64 KiB", 65536), ("1TiB", 1 << 40), ("1024", 1024), ("7B", 7)],
)
def test_sizes(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize("text", ["4GB", "4G", "GiB", "-1GiB", "1e3", "4 gib", "", "0.3B", "1_000"])
def test_a_size_that_could_be_misread_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a"):
        parse_size(text)


def test_a_job_cannot_be_changed() -> None:
    job = load_job(MINIMAL)
    with pytest.raises(ValidationError, match="frozen"):
        job.sampling.seed = 3


def test_every_key_is_explained_in_the_schema() -> None:
    schema = job_schema()
    json.dumps(schema)
    for model in [schema, *schema["$defs"].values()]:
        assert model["additionalProperties"] is False
        assert model["description"]
        for key, described in model["properties"].items():
            assert "description" in described or "$ref" in described, key


def test_the_keys_that_a_row_cannot_override() -> None:
    assert set(Sampling.model_fields) - set(Sampling().params().__slots__) == {"column", "defaults"}


def test_key_paths_reach_into_sections() -> None:
    paths = key_paths(Job)
    assert "engine.num_stages" in paths
    assert "version" in paths
    assert "engine" not in paths


def test_a_long_value_is_cut() -> None:
    assert len(shown("x" * 1000)) < 100
    assert (shown(None), shown(True), shown("a")) == ("null", "true", "'a'")
