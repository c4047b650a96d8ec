"""What all phases share: the setting of a check, its findings, timing, random models, random rows."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
import transformers

from benchmarks.gpu.check import MARK
from tests.tiny_tokenizer import build_tiny_tokenizer

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True,
    },
    "llama-3.2-1b": {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True,
    },
    "llama-3.1-8b": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False,
    },
}  # fmt: skip
CONTEXT_TOKENS = 8192
END_TOKEN_ID = 2


@dataclass(frozen=True, slots=True)
class Case:
    """A check's setting. work: the folder of models, rows and outputs."""

    device: str  # cuda or cpu
    tiny: bool
    shape: str
    work: Path

    @property
    def torch_device(self) -> torch.device:
        return torch.device("cuda:0" if self.device == "cuda" else "cpu")

    @property
    def holds_two_stages(self) -> bool:
        """A stage needs a GPU of its own; on the CPU stages share it."""
        return self.device == "cpu" or torch.cuda.device_count() > 1

    def say(self, what: str, *, wrong: bool = False, **figures: object) -> None:
        """One finding. wrong: it is not as it must be."""
        print(MARK + json.dumps({"what": what, "wrong": wrong, **figures}, default=str), flush=True)

    def attempt(self, what: str, work: Callable[[], dict[str, Any]]) -> None:
        """One measurement; an error is a finding, and the phase goes on to the next."""
        started = perf_counter()
        try:
            figures = work()
        except Exception as error:
            self.say(what, wrong=True, error=f"{type(error).__name__}: {error}"[:600])
            traceback.print_exc()
            return
        self.say(what, **figures, seconds=round(perf_counter() - started, 2))

    def wait(self) -> None:
        """Until the GPU has done all that it was told to."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def median_seconds(self, work: Callable[[], object], repetitions: int = 5) -> float:
        """Of so many repetitions after one that is not counted."""
        seconds = []
        for _ in range(repetitions + 1):
            started = perf_counter()
            work()
            self.wait()
            seconds.append(perf_counter() - started)
        return median(seconds[1:])

    def queued_seconds(self, work: Callable[[], object], repetitions: int = 20) -> float:
        """The mean of so many repetitions that are queued one behind the other, as a job's steps are."""
        work()
        self.wait()
        started = perf_counter()
        for _ in range(repetitions):
            work()
        self.wait()
        return (perf_counter() - started) / repetitions

    def saved_model(self) -> Path:
        """The folder of a Llama of the case's shape with random bfloat16 weights, and a small tokenizer; made once."""
        folder = self.work / f"model-{self.shape}"
        if (folder / "tokenizer.json").exists():
            return folder
        config = transformers.LlamaConfig(
            **SHAPES[self.shape],
            max_position_embeddings=CONTEXT_TOKENS,
            bos_token_id=None,
            eos_token_id=END_TOKEN_ID,
            pad_token_id=END_TOKEN_ID,
        )
        torch.manual_seed(0)
        models: Any = transformers.AutoModelForCausalLM
        with self.torch_device:
            model = models.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(folder)
        del model
        if self.device == "cuda":
            torch.cuda.empty_cache()
        return build_tiny_tokenizer(folder, chat_template=None)

    def rows(self, number: int, most_characters: int) -> Path:
        """A JSONL file of random prompts of 20 characters and more, about a token each."""
        random = np.random.default_rng(1)
        letters = np.array(list("abcdefghijklmnopqrstuvwxyz     "))
        path = self.work / f"rows-{number}-{most_characters}.jsonl"
        lengths = random.integers(20, most_characters + 1, number).tolist()
        rows = [{"id": f"r{i}", "prompt": "".join(random.choice(letters, length))} for i, length in enumerate(lengths)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path
