"""Public data sets in small: their columns and types as the hub has them, and the job that one would write first.

docs/layouts.md lists the same data sets with what comes of each.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import ipc

from batchpipe.errors import InputError
from batchpipe.job.spec import InputSpec
from batchpipe.model.tokenizer import Tokenizer, load_tokenizer
from batchpipe.read.render import Renderer, needed_columns
from batchpipe.read.source import open_source
from batchpipe.types import Row
from tests.tiny_tokenizer import CHAT_TEMPLATE, build_tiny_tokenizer

TEMPLATE = (
    "{% if tools %}<|start|>tools\n{% for tool in tools %}{{ tool.name }}{% endfor %}<|end|>\n{% endif %}"
    + CHAT_TEMPLATE
)
DOCUMENT = Path(__file__).parents[2] / "docs" / "layouts.md"

text, number, texts = pa.string(), pa.int64(), pa.list_(pa.string())


def many(**fields: pa.DataType) -> pa.DataType:
    """A list of structs."""
    return pa.list_(pa.struct(list(fields.items())))


def chat(*turns: tuple[str, str]) -> str:
    """The prompt that asks for the turn behind `turns`."""
    return "".join(f"<|start|>{role}\n{content}<|end|>\n" for role, content in turns) + "<|start|>assistant\n"


def user(content: str) -> str:
    return chat(("user", content))


@dataclass(frozen=True)
class Layout:
    """`types` None: the rows are JSON. `first`: the first row's prompt, or what the error says that names the line."""

    name: str
    types: dict[str, pa.DataType] | None
    rows: list[dict[str, Any]]
    job: dict[str, Any]
    first: str
    file: str = "train-00000-of-00001.parquet"
    refused: bool = field(default=False)


HUMAN = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]
ROLES = [{"content": "Why?", "role": "user"}, {"content": "So.", "role": "assistant"}]
DROP = {"last_answer": "drop"}

LAYOUTS = [
    Layout(
        "Alpaca",
        {"instruction": text, "input": text, "output": text, "text": text},
        [{"instruction": "Add.", "input": "1, 2", "output": "3", "text": "t"}, {"instruction": "Go.", "input": ""}],
        {"template": "{instruction}\n{input}"},
        user("Add.\n1, 2"),
    ),
    Layout(
        "Dolly",
        None,
        [{"instruction": "When?", "context": "In 2003.", "response": "2003", "category": "closed_qa"}],
        {"template": "{context}\n{instruction}"},
        user("In 2003.\nWhen?"),
        file="databricks-dolly-15k.jsonl",
    ),
    Layout(
        "ShareGPT",
        None,
        [{"id": "QWJhYvA_0", "conversations": HUMAN}, {"id": "i6IyJda_0", "conversations": HUMAN[:1]}],
        {"messages_column": "conversations", **DROP},
        user("Why?"),
        file="ShareGPT_V3_unfiltered_cleaned_split.json",
    ),
    Layout(
        "OpenAssistant",
        {
            "message_id": text,
            "parent_id": text,
            "created_date": text,
            "text": text,
            "role": text,
            "lang": text,
            "review_count": pa.int32(),
            "detoxify": pa.struct({"toxicity": pa.float64()}),
            "emojis": pa.struct({"name": texts, "count": pa.list_(pa.int32())}),
        },
        [
            {"message_id": "6ab24d72", "text": "Why?", "role": "prompter", "lang": "en", "review_count": 3},
            {"message_id": "c8e83833", "parent_id": "6ab24d72", "text": "So.", "role": "assistant"},
        ],
        {"prompt_column": "text", "id_column": "message_id"},
        user("Why?"),
    ),
    Layout(
        "UltraChat",
        {"prompt": text, "prompt_id": text, "messages": many(content=text, role=text)},
        [{"prompt": "Why?", "prompt_id": "f0e37e9f", "messages": ROLES}],
        {"messages_column": "messages", **DROP},
        user("Why?"),
    ),
    Layout(
        "UltraFeedback",
        {
            "source": text,
            "instruction": text,
            "models": texts,
            "correct_answers": texts,
            "completions": many(
                annotations=pa.struct({"helpfulness": many(Rating=text, Rationale=text)}),
                custom_system_prompt=text,
                model=text,
                overall_score=pa.float64(),
                response=text,
            ),
        },
        [{"source": "evol", "instruction": "Why?", "models": ["m"], "completions": [{"response": "So."}]}],
        {"prompt_column": "instruction"},
        user("Why?"),
    ),
    Layout(
        "GSM8K",
        {"question": text, "answer": text},
        [{"question": "2 + 2?", "answer": "It is <<2+2=4>>4.\n#### 4"}],
        {"prompt_column": "question"},
        user("2 + 2?"),
    ),
    Layout(
        "MMLU",
        {"question": text, "subject": text, "choices": texts, "answer": number},
        [{"question": "Which?", "subject": "law", "choices": ["a", "b"], "answer": 1}],
        {"template": "{question}\n{choices}"},
        user("Which?\na\nb"),
    ),
    Layout(
        "BBH",
        {"input": text, "target": text},
        [{"input": "not True is", "target": "False"}],
        {"prompt_column": "input"},
        user("not True is"),
    ),
    Layout(
        "HumanEval",
        {"task_id": text, "prompt": text, "canonical_solution": text, "test": text, "entry_point": text},
        [{"task_id": "HumanEval/0", "prompt": "def f():\n", "entry_point": "f"}],
        {"id_column": "task_id"},
        user("def f():\n"),
    ),
    Layout(
        "MBPP",
        {"task_id": pa.int32(), "text": text, "code": text, "test_list": texts, "challenge_test_list": texts},
        [{"task_id": 601, "text": "Write f.", "test_list": ["assert f(1)", "assert f(2)"], "challenge_test_list": []}],
        {"template": "{text}\n{test_list}", "id_column": "task_id"},
        user("Write f.\nassert f(1)\nassert f(2)"),
    ),
    Layout(
        "MT-Bench",
        {"prompt": texts, "reference": texts, "category": text, "prompt_id": number},
        [{"prompt": ["Write.", "Again."], "reference": [], "category": "writing", "prompt_id": 81}],
        {},
        'write `template: "{prompt}"` for its values as text under `input`',
        refused=True,
    ),
    Layout(
        "IFEval",
        {
            "key": number,
            "prompt": text,
            "instruction_id_list": texts,
            "kwargs": many(num_highlights=number, relation=text, keywords=texts),
        },
        [{"key": 1000, "prompt": "No comma.", "instruction_id_list": ["p:c"], "kwargs": [{"num_highlights": None}]}],
        {"id_column": "key"},
        user("No comma."),
    ),
    Layout(
        "WildChat",
        {
            "conversation_hash": text,
            "model": text,
            "timestamp": pa.timestamp("us", "UTC"),
            "turn": number,
            "conversation": many(content=text, language=text, redacted=pa.bool_(), role=text, toxic=pa.bool_()),
        },
        [{"timestamp": datetime(2023, 4, 9, tzinfo=UTC), "conversation": [{**ROLES[0], "toxic": False}, ROLES[1]]}],
        {"messages_column": "conversation", **DROP},
        user("Why?"),
    ),
    Layout(
        "LMSYS-Chat-1M",
        {
            "conversation_id": text,
            "model": text,
            "turn": number,
            "language": text,
            "redacted": pa.bool_(),
            "conversation": many(content=text, role=text),
            "openai_moderation": many(categories=pa.struct({"hate": pa.bool_()}), flagged=pa.bool_()),
        },
        [{"conversation_id": "33f01939", "conversation": [*ROLES, *ROLES], "turn": 2, "redacted": False}],
        {"messages_column": "conversation", "id_column": "conversation_id", **DROP},
        chat(("user", "Why?"), ("assistant", "So."), ("user", "Why?")),
    ),
    Layout(
        "OpenOrca",
        {"id": text, "system_prompt": text, "question": text, "response": text},
        [{"id": "niv.242684", "system_prompt": "", "question": "Why?", "response": "So."}],
        {"template": "{system_prompt}\n{question}"},
        user("\nWhy?"),
    ),
    Layout(
        "SlimOrca",
        {"conversations": pa.list_(pa.struct({"from": text, "value": text, "weight": pa.float64()}))},
        [{"conversations": [{"from": "system", "value": "Be kind."}, {**HUMAN[0], "weight": 0.0}, HUMAN[1]]}],
        {"messages_column": "conversations", **DROP},
        chat(("system", "Be kind."), ("user", "Why?")),
    ),
    Layout(
        "Capybara",
        {"source": text, "conversation": many(input=text, output=text)},
        [{"source": "s", "conversation": [{"input": "Why?", "output": "So."}, {"input": "And?", "output": "Yes."}]}],
        {"messages_column": "conversation", **DROP},
        chat(("user", "Why?"), ("assistant", "So."), ("user", "And?")),
    ),
    Layout(
        "xLAM function calling",
        None,
        [{"id": 0, "query": "Live giveaways?", "answers": "[]", "tools": '[{"name": "live", "parameters": {}}]'}],
        {"prompt_column": "query", "tools_column": "tools"},
        chat(("tools", "live"), ("user", "Live giveaways?")),
        file="xlam_function_calling_60k.json",
    ),
    Layout(
        "ToolACE",
        {"system": text, "conversations": pa.list_(pa.struct({"from": text, "value": text}))},
        [{"system": "You may call.", "conversations": [{"from": "user", "value": "Why?"}, HUMAN[1]]}],
        {"messages_column": "conversations", **DROP},
        user("Why?"),
    ),
    Layout(
        "SQuAD",
        {
            "id": text,
            "title": text,
            "context": text,
            "question": text,
            "answers": pa.struct({"text": texts, "answer_start": pa.list_(pa.int32())}),
        },
        [
            {
                "id": "5733",
                "context": "In 1858.",
                "question": "When?",
                "answers": {"text": ["1858"], "answer_start": [3]},
            }
        ],
        {"template": "{context}\n{question}"},
        user("In 1858.\nWhen?"),
    ),
    Layout(
        "CNN/DailyMail",
        {"article": text, "highlights": text, "id": text},
        [{"article": "LONDON -- It rains.", "highlights": "Rain.", "id": "42c0"}],
        {"template": "Summarise:\n{article}"},
        user("Summarise:\nLONDON -- It rains."),
    ),
    Layout(
        "WMT",
        {"translation": pa.struct({"de": text, "en": text})},
        [{"translation": {"de": "Warum?", "en": "Why?"}}],
        {"template": "To English: {translation.de}"},
        user("To English: Warum?"),
    ),
    Layout(
        "Magpie",
        {
            "uuid": text,
            "instruction": text,
            "response": text,
            "min_similar_uuid": text,
            "conversations": pa.list_(pa.struct({"from": text, "value": text})),
            "gen_input_configs": pa.struct({"temperature": pa.float64(), "seed": number}),
        },
        [{"uuid": "0a1", "instruction": "Why?", "conversations": HUMAN, "gen_input_configs": {"seed": 1}}],
        {"prompt_column": "instruction"},
        user("Why?"),
    ),
    Layout(
        "Tulu 3",
        {"id": text, "messages": many(content=text, role=text), "source": text},
        [{"id": "flan_1", "messages": [{"content": "Be kind.", "role": "system"}, *ROLES], "source": "flan"}],
        {"messages_column": "messages", **DROP},
        chat(("system", "Be kind."), ("user", "Why?")),
        file="data-00000-of-00001.arrow",
    ),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(build_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"), chat_template=TEMPLATE))


def write(layout: Layout, folder: Path) -> None:
    """The folder as a copy of the repository: the file, and what lies beside it."""
    (folder / "README.md").write_text("# A data set")
    path = folder / layout.file
    if layout.types is None:
        lines = "".join(json.dumps(row) + "\n" for row in layout.rows)
        path.write_text(lines if path.suffix == ".jsonl" else json.dumps(layout.rows, indent=2))
        return
    table = pa.Table.from_pylist(layout.rows, pa.schema(layout.types))
    if path.suffix == ".parquet":
        pq.write_table(table, path)
        return
    with ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_the_first_job_runs_or_names_the_line(layout: Layout, tokenizer: Tokenizer, tmp_path: Path) -> None:
    write(layout, tmp_path)
    spec = InputSpec.model_validate({"path": str(tmp_path), **layout.job})
    needed = needed_columns(spec, sampling_column=None)
    if layout.refused:
        with pytest.raises(InputError, match=re.escape(layout.first)):
            open_source(spec, carry="all", needed=needed)
        return
    source = open_source(spec, carry="all", needed=needed)
    rows = [row for row in source.rows() if isinstance(row, Row)]
    assert len(rows) == len(layout.rows)
    renderer = Renderer(spec, tokenizer)
    assert [renderer.render(row.values) for row in rows][0] == layout.first
    if layout.types is not None:
        assert source.carried_schema == pa.schema(layout.types)


def test_the_document_lists_them() -> None:
    rows = re.findall(r"^\| ([^|]+?) \|", DOCUMENT.read_text(), re.MULTILINE)
    assert rows[1:] == [layout.name for layout in LAYOUTS]
