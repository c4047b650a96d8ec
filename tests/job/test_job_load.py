import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from batchpipe.errors import JobError
from batchpipe.job import Job, load_job

JobFile = Callable[..., Path]  # (text, name) of a job file to write

MINIMAL = "model: {name: some/model}\ninput: {path: rows.jsonl}\noutput: {path: out}\n"


@pytest.fixture
def job_file(tmp_path: Path) -> JobFile:
    def write(text: str = MINIMAL, name: str = "nightly.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


def refusal_of(source: Path, overrides: Sequence[str] = ()) -> str:
    with pytest.raises(JobError) as refusal:
        load_job(source, overrides)
    return str(refusal.value)


def test_defaults_fill_what_the_file_leaves_out(job_file: JobFile) -> None:
    job = load_job(job_file())
    assert (job.version, job.name, job.sampling.max_tokens, job.output.part_rows) == (1, "nightly", 256, 1000)


def test_name_in_the_file_and_name_of_a_mapping(job_file: JobFile) -> None:
    assert load_job(job_file(MINIMAL + "name: mine\n")).name == "mine"
    mapping = {"model": {"name": "m"}, "input": {"path": "p"}, "output": {"path": "o"}}
    assert load_job(mapping).name == "job"
    assert mapping["input"] == {"path": "p"}


def test_precedence_is_default_then_file_then_override(job_file: JobFile) -> None:
    path = job_file(MINIMAL + "sampling: {seed: 1, max_tokens: 9}\n")
    job = load_job(path, ["sampling.seed=2", "sampling.seed=3", "engine.kv_device_memory=4GiB", "name=other"])
    assert (job.sampling.seed, job.sampling.max_tokens, job.engine.kv_device_memory) == (3, 9, 4 << 30)
    assert job.name == "other"
    assert load_job(path, {"sampling.seed": 4, "input.limit": 100}).sampling.seed == 4


def test_override_values_are_yaml(job_file: JobFile) -> None:
    job = load_job(job_file(), ["sampling.stop=[a, 'b']", "sampling.logit_bias={5: 1e1}", "input.id_column=null"])
    assert (job.sampling.stop, job.sampling.logit_bias, job.input.id_column) == (("a", "b"), {5: 10.0}, None)
    assert load_job(job_file(), ["engine.kv_verify=off"]).engine.kv_verify == "off"


def test_off_without_quotes_is_a_word_as_in_yaml_1_2(job_file: JobFile) -> None:
    engine = load_job(job_file(MINIMAL + "engine: {kv_verify: off, kv_host_memory: 0GiB}\n")).engine
    assert (engine.kv_verify, engine.kv_host_memory) == ("off", 0)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("sampling.temprature=1", "sampling.temprature: unknown key; did you mean 'temperature'?"),
        ("temperature=1", "temperature: unknown key; did you mean 'sampling.temperature'?"),
        ("sampling=3", "sampling: is a section; set its keys, such as sampling.max_tokens"),
        ("input.path.first=a", "input.path.first: input.path is not a section"),
        ("name.first=a", "name.first: name is not a section"),
        ("a.b=1", "a.b: unknown key"),
        ("sampling.seed", "override 'sampling.seed': is not of the form section.key=value"),
        ("sampling.temperature=hot", "sampling.temperature: 'hot' is not a finite number >= 0"),
        ("sampling.stop=[a", "override 'sampling.stop=[a', line 1"),
        ("sampling.stop={a: 1, a: 2}", "duplicate key 'a'"),
    ],
)
def test_a_wrong_override_is_named(job_file: JobFile, override: str, words: str) -> None:
    assert words in refusal_of(job_file(), [override])


def test_all_mistakes_come_at_once_a_line_each(job_file: JobFile) -> None:
    path = job_file(
        "model: {nam: x}\ninput: [1]\nengin: {}\nsampling: {n: 0, seed: -1}\noutput: {path: '${env:NOT_SET}'}\n"
    )
    message = refusal_of(path, ["plan.x=1"])
    assert message.splitlines() == [
        f"{path}: cannot be run as it is:",
        "  output.path: '${env:NOT_SET}': the environment variable 'NOT_SET' is not set",
        "  override plan.x: unknown key",
        "  model.name: is required",
        "  model.nam: unknown key; did you mean 'name'?",
        "  input: [1] is not a section of keys",
        "  sampling.n: 0 is not an integer from 1 to 128",
        "  sampling.seed: -1 is not an integer from 0 to 2^63 - 1",
        "  engin: unknown key; did you mean 'engine'?",
    ]


def test_key_that_is_no_string_and_section_that_is_null(job_file: JobFile) -> None:
    message = refusal_of(job_file(MINIMAL + "1: a\nsampling:\n"))
    assert "  1: unknown key" in message
    assert "  sampling: null is not a section of keys" in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty; a job file needs at least model.name, input.path and output.path"),
        ("# only a comment\n", "is empty"),
        ("- a\n- b\n", "holds ['a', 'b']; a job file is a mapping of sections"),
        ("just words", "holds 'just words'; a job file is a mapping"),
        (MINIMAL + "model: {name: other}\n", "line 4, column 1: duplicate key 'model'"),
        ("model:\n\tname: x\n", "a tab character; YAML indents with spaces"),
    ],
)
def test_a_file_that_holds_no_job(job_file: JobFile, text: str, words: str) -> None:
    path = job_file(text)
    message = refusal_of(path)
    assert message.startswith(str(path))
    assert words in message


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    assert "cannot be read: No such file or directory" in refusal_of(tmp_path / "absent.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9")
    assert "is not UTF-8 at byte 9" in refusal_of(tmp_path / "latin.yaml")


def test_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbf" + MINIMAL.encode())
    assert load_job(tmp_path / "bom.yaml").name == "bom"


def test_environment_is_filled_in_anywhere_in_a_string(job_file: JobFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUCKET", "s3://rows")
    monkeypatch.setenv("DAY", "mon")
    text = MINIMAL.replace("rows.jsonl", "['${env:BUCKET}/${env:DAY}/*.jsonl', $DAY]")
    job = load_job(job_file(text), ["input.system=It is ${env:DAY}."])
    assert job.input.path[0] == "s3://rows/mon/*.jsonl"
    assert job.input.path[1].endswith("/$DAY")
    assert job.input.system == "It is mon."


def test_unset_variable_in_a_list_is_named_by_its_place(job_file: JobFile) -> None:
    message = refusal_of(job_file(MINIMAL.replace("rows.jsonl", "[a, '${env:ABSENT_ONE}']")))
    assert "input.path.1: '${env:ABSENT_ONE}': the environment variable 'ABSENT_ONE' is not set" in message


def test_local_paths_are_relative_to_the_job_file(job_file: JobFile, tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    text = (
        "model: {name: weights}\ninput: {path: [a.jsonl, /b, 'hf://x/y', 'data/*.parquet'], chat_template: t.jinja}\n"
    )
    job = load_job(job_file(text + "output: {path: ../out}\n"))
    assert job.model.name == str(tmp_path / "weights")
    assert job.input.path == (f"{tmp_path}/a.jsonl", "/b", "hf://x/y", f"{tmp_path}/data/*.parquet")
    assert job.input.chat_template == str(tmp_path / "t.jinja")
    assert job.output.path == str(tmp_path.parent / "out")


@pytest.mark.parametrize(
    ("name", "is_path"),
    [("org/model", False), ("alias", False), ("./alias", True), ("../a", True), ("m.gguf", True)],
)
def test_a_models_name_is_a_path_where_it_looks_like_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, is_path: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    job = load_job({"model": {"name": name}, "input": {"path": "p"}, "output": {"path": "o"}})
    assert job.model.name == (os.path.abspath(tmp_path / name) if is_path else name)
    assert job.input.path == (str(tmp_path / "p"),)


def test_a_job_is_loaded_as_it_is_and_can_be_overridden(job_file: JobFile) -> None:
    job = load_job(job_file())
    assert load_job(job) == job
    changed = load_job(job, {"sampling.seed": 8})
    assert isinstance(changed, Job)
    assert changed.sampling.seed == 8
    assert changed.input == job.input


def test_paths_may_be_path_objects(tmp_path: Path) -> None:
    job = load_job({"model": {"name": "m"}, "input": {"path": [tmp_path / "p"]}, "output": {"path": tmp_path}})
    assert (job.input.path, job.output.path) == ((str(tmp_path / "p"),), str(tmp_path))


def test_importing_the_job_loads_nothing_heavy() -> None:
    check = "import sys, batchpipe.job; print([m for m in ('torch', 'pyarrow', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", check], capture_output=True, text=True).stdout == "[]\n"


def test_paths_of_overrides_are_relative_to_the_working_folder(
    job_file: JobFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    (here / "local-model").mkdir(parents=True)
    monkeypatch.chdir(here)
    path = job_file()
    for overrides in (
        ["input.path=[a.jsonl, 's3://b/c', ../d]", "output.path=out", "model.name=local-model", "predict.method=p.st"],
        {
            "input.path": [Path("a.jsonl"), "s3://b/c", "../d"],
            "output.path": "out",
            "model.name": "local-model",
            "predict.method": "p.st",
        },
    ):
        job = load_job(path, overrides)
        assert job.input.path == (str(here / "a.jsonl"), "s3://b/c", str(tmp_path / "d"))
        assert (job.output.path, job.model.name) == (str(here / "out"), str(here / "local-model"))
        assert job.predict.method == str(here / "p.st")
    job = load_job(path, ["model.name=some/hub-id", "input.chat_template=none", "predict.method=quantile"])
    assert (job.model.name, job.input.chat_template, job.predict.method) == ("some/hub-id", "none", "quantile")
