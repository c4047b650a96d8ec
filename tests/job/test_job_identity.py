import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from batchpipe.errors import JobError
from batchpipe.job import load_job
from batchpipe.job.identity import Identity, difference, identity

MAPPING = {"model": {"name": "org/model"}, "input": {"path": "p"}, "output": {"path": "o"}}


def identity_of(
    overrides: Sequence[str] | Mapping[str, object] = (),
    revision: str = "abc",
    dtype: str = "float32",
    fingerprint: str = "f1",
) -> Identity:
    job = load_job(MAPPING, overrides)
    return identity(job, model_revision=revision, dtype=dtype, input_fingerprint=fingerprint)


@pytest.mark.parametrize(
    "override",
    [
        "engine.num_stages=2",
        "engine.device=cpu",
        "engine.kv_host_memory=4GiB",
        "engine.offload=none",
        "engine.kv_verify=all",
        "plan.schedule=separate",
        "predict.method=none",
        "output.part_rows=7",
        "output.max_failed_fraction=0.5",
        "output.path=elsewhere",
        "input.path=moved",
        "name=renamed",
        "model.revision=main",
        "model.dtype=float32",
    ],
)
def test_how_a_job_is_run_does_not_make_it_another(override: str) -> None:
    assert identity_of([override]).sha256 == identity_of().sha256


@pytest.mark.parametrize(
    "override",
    [
        "model.name=other",
        "sampling.temperature=0.1",
        "sampling.logit_bias={3: 1}",
        "input.limit=3",
        "input.template=hello",
        "output.columns=none",
    ],
)
def test_what_changes_the_output_makes_another_job(override: str) -> None:
    old, new = identity_of(), identity_of([override])
    assert old.sha256 != new.sha256
    assert [line.partition(":")[0] for line in difference(old.parts, new.parts)] == [override.partition("=")[0]]


def test_what_the_run_found_out_counts() -> None:
    hashes = {identity_of(**found).sha256 for found in ({}, {"revision": "x"}, {"dtype": "y"}, {"fingerprint": "z"})}
    assert len(hashes) == 4


def test_parts_read_back_from_a_file_are_the_same() -> None:
    found = identity_of(["sampling.logit_bias={3: 1}", "sampling.stop=[a]", "output.columns=[b]"])
    assert difference(json.loads(json.dumps(found.parts)), found.parts) == []


def test_difference_is_readable() -> None:
    old = {"sampling.temperature": 0.0, "input.limit": None, "gone": 1}
    new = {"sampling.temperature": 0.7, "input.limit": 5, "come": "x"}
    assert difference(old, new) == [
        "come: (none) -> 'x'",
        "gone: 1 -> (none)",
        "input.limit: null -> 5",
        "sampling.temperature: 0.0 -> 0.7",
    ]


def test_a_chat_template_counts_by_what_it_holds(tmp_path: Path) -> None:
    hashes = []
    for place, text in (("a.jinja", "x"), ("b.jinja", "x"), ("c.jinja", "y")):
        (tmp_path / place).write_text(text)
        hashes.append(identity_of({"input.chat_template": str(tmp_path / place)}).sha256)
    assert hashes[0] == hashes[1] != hashes[2]
    with pytest.raises(JobError, match="input.chat_template: .*absent.jinja' cannot be read: No such file"):
        identity_of({"input.chat_template": str(tmp_path / "absent.jinja")})
