"""Greedy float32 tokens of real prompts against `transformers.generate`, for stages, block sizes and preemption.

    python benchmarks/exactness.py --model MODEL_DIR --prompts a.jsonl b.jsonl --rows 64

Every prompt is generated alone by transformers; then all of them at once by batchpipe, in several settings. A setting
whose KV is too small for all rows must preempt. The last line is JSON; the exit code is 1 where a token differs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from transformers import AutoModelForCausalLM

from batchpipe.engine import Engine
from batchpipe.execute.local import LocalPipeline
from batchpipe.execute.memory import StageMemory
from batchpipe.execute.open import stage_specs
from batchpipe.job.sampling import Sampling
from batchpipe.job.spec import EngineSpec
from batchpipe.model.describe import ModelInfo, describe_model
from batchpipe.tokenizer import load_tokenizer
from batchpipe.types import Capacity, Carried, Request, RowKey

NO_COLUMNS = pa.RecordBatch.from_pylist([{}], schema=pa.schema([]))
STEP_TOKENS = 512
BATCH_SEQUENCES = 64
# Stages, tokens a block, tokens of KV in all; the last two hold a part of the rows only and preempt.
SETTINGS = [(1, 64, 100_000), (2, 16, 100_000), (3, 1, 100_000), (1, 16, 6_000), (3, 16, 6_000)]


def expected_tokens(folder: Path, prompts: Sequence[list[int]], num_new_tokens: int) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    texts = []
    with torch.inference_mode():
        for prompt in prompts:
            mask = torch.ones(1, len(prompt), dtype=torch.long)
            tokens = model.generate(
                torch.tensor([prompt]), attention_mask=mask, do_sample=False, max_new_tokens=num_new_tokens
            )
            texts.append(tokens[0, len(prompt) :].tolist())
    return texts


def own_tokens(
    info: ModelInfo, prompts: Sequence[list[int]], num_new_tokens: int, setting: tuple[int, int, int]
) -> tuple[list[list[int]], int]:
    """The tokens of every prompt, and how many preemptions there were."""
    num_stages, block_tokens, num_kv_tokens = setting
    engine_spec = EngineSpec(
        device="cpu", block_tokens=block_tokens, max_step_tokens=STEP_TOKENS, max_batch_sequences=BATCH_SEQUENCES
    )

    def capacity_of(stages: Sequence[StageMemory]) -> Capacity:
        return Capacity(
            num_blocks=num_kv_tokens // block_tokens,
            block_tokens=block_tokens,
            num_stages=num_stages,
            max_batches=num_stages,
            max_step_tokens=STEP_TOKENS,
            max_batch_sequences=BATCH_SEQUENCES,
        )

    sampling = Sampling(max_tokens=num_new_tokens, temperature=0.0).params()
    with LocalPipeline(stage_specs(engine_spec, info, "cpu", num_stages), capacity_of) as pipeline:
        engine = Engine([pipeline], "hybrid", frozenset(info.eos_token_ids), lambda params: None)
        engine.add(
            Request(RowKey(i, str(i), Carried(NO_COLUMNS, 0)), np.array(prompt, np.int32), sampling)
            for i, prompt in enumerate(prompts)
        )
        finished = []
        while not engine.idle:
            finished += engine.advance()
    finished.sort(key=lambda end: end.request.key.index)
    num_preemptions = engine.replicas[0].planner.num_preemptions
    return [list(end.completions[0].token_ids) for end in finished], num_preemptions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, nargs="+", required=True)
    parser.add_argument("--rows", type=int, default=64, help="of each file")
    parser.add_argument("--max-tokens", type=int, default=32)
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.model)
    texts = []
    for path in args.prompts:
        with path.open() as file:
            texts += [json.loads(line)["prompt"] for line in islice(file, args.rows)]
    chats = [tokenizer.apply_chat_template([{"role": "user", "content": text}]) for text in texts]
    prompts = tokenizer.encode_batch(chats, add_special_tokens=False)
    info = describe_model(args.model, "float32")
    expected = expected_tokens(args.model, prompts, args.max_tokens)
    results = []
    for setting in SETTINGS:
        tokens, num_preemptions = own_tokens(info, prompts, args.max_tokens, setting)
        num_equal = sum(own == theirs for own, theirs in zip(tokens, expected, strict=True))
        keys = ("num_stages", "block_tokens", "kv_tokens")
        results.append(
            dict(zip(keys, setting, strict=True))
            | {"rows": len(prompts), "equal": num_equal, "preemptions": num_preemptions}
        )
        print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    print(json.dumps(results))
    sys.exit(any(result["equal"] != result["rows"] for result in results))


if __name__ == "__main__":
    main()
