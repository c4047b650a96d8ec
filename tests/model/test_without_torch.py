"""Without torch a model's description and tokenizer are the same."""

from __future__ import annotations

import subprocess
import sys

from batchpipe.model.describe import describe_model
from batchpipe.model.tokenizer import load_tokenizer
from tests.tiny_models import ARCHITECTURES, tiny_model

_TEXT = "<|start|>user\n the quick\u00e9 fox<|end|>"
_MESSAGES = [{"role": "user", "content": _TEXT}]
_PROGRAM = """
import sys
from pathlib import Path
from batchpipe.model.describe import describe_model
from batchpipe.model.tokenizer import load_tokenizer
from batchpipe.model.without_torch import keep_torch_out
keep_torch_out()
text = sys.argv[1]
for folder in map(Path, sys.argv[2:]):
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode_batch([text], add_special_tokens=True)
    print(ascii((describe_model(folder), ids, tokenizer.apply_chat_template([{"role": "user", "content": text}]))))
print("torch" in sys.modules)
"""


def test_every_model_is_described_as_with_torch() -> None:
    folders = [tiny_model(architecture) for architecture in sorted(ARCHITECTURES)]
    command = [sys.executable, "-c", _PROGRAM, _TEXT, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = []
    for folder in folders:
        tokenizer = load_tokenizer(folder)
        ids = tokenizer.encode_batch([_TEXT], add_special_tokens=True)
        expected.append(ascii((describe_model(folder), ids, tokenizer.apply_chat_template(_MESSAGES))))
    assert done.stdout.splitlines() == [*expected, "False"]
