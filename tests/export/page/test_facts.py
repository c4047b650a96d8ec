from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from batchpipe.errors import OutputError
from batchpipe.export.page.facts import EXAMPLES_PER_CODE, LENGTH_EDGES, Facts, gather
from batchpipe.write.place import open_place
from tests.export.page.page_cases import done, failed, make_output


def facts_of(folder: Path) -> Facts:
    return gather(open_place(str(folder)))


def bin_of(tokens: int) -> int:
    return int(np.searchsorted(LENGTH_EDGES, tokens, side="right")) - 1


def test_counts_and_histograms_are_of_all_parts(tmp_path: Path) -> None:
    parts = [
        [done(0, 5, 7), done(1, 300, 100, finish_reason="length"), failed(2, "wrong_type", "no text")],
        [done(3, 5, 5), failed(4, "wrong_type", "no text"), failed(5, "empty_prompt", "nothing")],
    ]
    facts = facts_of(make_output(tmp_path / "out", parts, num_runs=2))
    assert facts.is_finished and len(facts.runs) == 2 and facts.num_completions == 6
    assert facts.statuses == {"succeeded": 3, "failed": 3}
    assert facts.finish_reasons == {"stop": 2, "length": 1}
    assert facts.error_codes == {"wrong_type": 2, "empty_prompt": 1}
    assert [one.row_id for one in facts.examples["wrong_type"]] == ["r2", "r4"]
    assert facts.completion_lengths.sum() == 3 and facts.completion_lengths[bin_of(5)] == 2
    assert facts.prompt_tokens == 10 + 11 + 13 and facts.completion_tokens == 310
    assert (facts.predicted_tokens, facts.drawn_tokens) == (112, 310)
    assert facts.forecast.sum() == 3 and facts.forecast[bin_of(100), bin_of(300)] == 1


def test_examples_are_few(tmp_path: Path) -> None:
    rows = [failed(index, "wrong_type", "x" * 5000) for index in range(40)]
    [examples] = facts_of(make_output(tmp_path / "out", [rows[:20], rows[20:]])).examples.values()
    assert len(examples) == EXAMPLES_PER_CODE and all(len(one.message) < 500 for one in examples)


def test_an_output_without_completions_has_its_facts_too(tmp_path: Path) -> None:
    facts = facts_of(make_output(tmp_path / "out", [], num_runs=0))
    assert facts.num_completions == 0 and facts.runs == [] and not facts.completion_lengths.any()


def test_what_is_no_output_is_told(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="is no output folder of batchpipe"):
        facts_of(tmp_path)


def test_a_damaged_part_is_told(tmp_path: Path) -> None:
    folder = make_output(tmp_path / "out", [[done(0, 5)]])
    (folder / "completions" / "part-00000.parquet").write_bytes(b"PAR1 not at all PAR1")
    with pytest.raises(OutputError, match=r"part-00000\.parquet: cannot be read"):
        facts_of(folder)
