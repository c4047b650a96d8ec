"""`batchpipe validate`: every row read, rendered and tokenised as a run would, without a model's weights."""

from __future__ import annotations

from collections import Counter
from typing import Any

from batchpipe.job import Job
from batchpipe.runner.open_job import open_job
from batchpipe.runner.prepare import complete
from batchpipe.types import FailedRow

# Rows of each kind of failure that are listed; the counts are of all.
LISTED_PER_CODE = 5
SHOWN_CHARACTERS = 1_000


def validate_job(job: Job, *, own_process: bool = False) -> dict[str, Any]:
    """Counts of rows and tokens, and what would fail and why.

    own_process: it ends with this command, so transformers may do without torch (`model.without_torch`).
    Raises the errors that a run of the job would raise before it loads the model.
    """
    prepared = complete(open_job(job), computes=not own_process)
    num_rows = num_prompt_tokens = longest_prompt_tokens = num_output_tokens = 0
    codes: Counter[str] = Counter()
    listed: dict[str, list[str]] = {}
    first_prompt: str | None = None
    for item in prepared.requests():
        num_rows += 1
        if isinstance(item, FailedRow):
            codes[item.code] += 1
            if codes[item.code] <= LISTED_PER_CODE:
                problem = f"row {item.key.index} ({item.key.row_id}): {item.code}: {item.message}"
                listed.setdefault(item.code, []).append(problem)
            continue
        if first_prompt is None:
            first_prompt = prepared.tokenizer.decode(item.prompt_token_ids.tolist(), skip_special_tokens=False)
        num_prompt_tokens += len(item.prompt_token_ids)
        longest_prompt_tokens = max(longest_prompt_tokens, len(item.prompt_token_ids))
        num_output_tokens += item.sampling.max_tokens * item.sampling.n
    return {
        "rows": num_rows,
        "failed": sum(codes.values()),
        "failed_by_code": dict(codes),
        "prompt_tokens": num_prompt_tokens,
        "longest_prompt_tokens": longest_prompt_tokens,
        "max_output_tokens": num_output_tokens,
        "model": prepared.model.name,
        "problems": [line for code, lines in listed.items() for line in _with_rest(code, lines, codes[code])],
        "first_prompt": first_prompt,
    }


def _with_rest(code: str, lines: list[str], count: int) -> list[str]:
    rest = count - len(lines)
    return [*lines, f"and {rest:,} more: {code}"] if rest else lines


def shown_prompt(prompt: str) -> str:
    """A prompt as it goes to the model, for people: special tokens written out, a long one cut."""
    cut = f"{prompt[:SHOWN_CHARACTERS]}... ({len(prompt):,} characters)" if len(prompt) > SHOWN_CHARACTERS else prompt
    return "the first prompt, as the model gets it:\n" + "".join(f"  | {line}\n" for line in cut.split("\n")).rstrip(
        "\n"
    )
