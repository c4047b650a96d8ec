"""Greedy float32 tokens of real prompts against `transformers.generate`, whatever their KV goes through.

    python benchmarks/exactness.py --model MODEL_DIR --prompts a.jsonl b.jsonl --rows 64

Every prompt is generated alone by transformers; then all of them at once by batchpipe, in several settings: stages,
block sizes, and a part of the KV they need at their peak on the device. The rest is computed again, or is on the host,
where all that comes back is verified. The last line is JSON; the exit code is 1 where a token differs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import pyarrow as pa
import torch
from transformers import AutoModelForCausalLM

from batchpipe.job.sampling import Sampling
from batchpipe.job.spec import EngineSpec
from batchpipe.model.describe import ModelInfo, describe_model
from batchpipe.model.tokenizer import load_tokenizer
from batchpipe.pipeline.local import LocalPipeline
from batchpipe.pipeline.memory import StageMemory
from batchpipe.placement.open import stage_specs
from batchpipe.placement.stage_split import StageSplit, stage_layers
from batchpipe.runner.engine import Engine
from batchpipe.scheduler.scheduler import Scheduler
from batchpipe.types import Capacity, Carried, Request, RowKey

if TYPE_CHECKING:
    from transformers._typing import GenerativePreTrainedModel

NO_COLUMNS = pa.RecordBatch.from_pylist([{}], schema=pa.schema([]))
STEP_TOKENS = 512
BATCH_SEQUENCES = 64
RESIDENT_TOKENS = 100_000


@dataclass(frozen=True, slots=True)
class Setting:
    """percent: on the device, of the blocks that the rows use where nothing is short; offload as in `Capacity`."""

    num_stages: int
    block_tokens: int
    percent: int = 100
    offload: str = "none"


RESIDENT = [Setting(1, 64), Setting(2, 16), Setting(3, 1), Setting(1, 16), Setting(3, 16), Setting(4, 16)]
SHORT = [Setting(stages, 16, 25) for stages in (1, 3)] + [
    Setting(stages, 16, percent, offload)
    for stages, percent, offload in (
        *((1, percent, offload) for percent in (100, 50, 25, 10) for offload in ("batch", "layer")),
        *((2, percent, offload) for percent in (50, 10) for offload in ("batch", "both")),
        *((4, percent, offload) for percent in (25, 10) for offload in ("batch", "layer", "both")),
    )
]


def expected_tokens(folder: Path, prompts: Sequence[list[int]], num_new_tokens: int) -> list[list[int]]:
    model = cast("GenerativePreTrainedModel", AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    texts = []
    with torch.inference_mode():
        for prompt in prompts:
            mask = torch.ones(1, len(prompt), dtype=torch.long)
            tokens = model.generate(
                torch.tensor([prompt]), attention_mask=mask, do_sample=False, max_new_tokens=num_new_tokens
            )
            assert isinstance(tokens, torch.Tensor)
            texts.append(tokens[0, len(prompt) :].tolist())
    return texts


def own_tokens(
    info: ModelInfo, prompts: Sequence[list[int]], num_new_tokens: int, setting: Setting, num_blocks: int
) -> tuple[list[list[int]], Scheduler]:
    """The tokens of every prompt, and the scheduler as it was left."""
    with_host = setting.offload != "none"
    split = StageSplit("cpu", stage_layers(info, setting.num_stages))
    engine_spec = EngineSpec(
        device="cpu",
        block_tokens=setting.block_tokens,
        max_step_tokens=STEP_TOKENS,
        max_batch_sequences=BATCH_SEQUENCES,
        kv_verify="all",
    )

    def capacity_of(stages: Sequence[StageMemory]) -> Capacity:
        return Capacity(
            num_blocks=num_blocks,
            block_tokens=setting.block_tokens,
            num_stages=setting.num_stages,
            max_batches=setting.num_stages + (setting.offload in ("batch", "both")),
            max_step_tokens=STEP_TOKENS,
            max_batch_sequences=BATCH_SEQUENCES,
            num_host_blocks=RESIDENT_TOKENS // setting.block_tokens if with_host else 0,
            streams_per_block=split.streams_per_block,
            offload=setting.offload,
        )

    sampling = Sampling(max_tokens=num_new_tokens, temperature=0.0).params()
    with LocalPipeline(stage_specs(engine_spec, info, split, setting.block_tokens), capacity_of) as pipeline:
        engine = Engine([pipeline], "hybrid", frozenset(info.eos_token_ids), lambda params: None)
        engine.add(
            Request(RowKey(i, str(i), Carried(NO_COLUMNS, 0)), np.array(prompt, np.int32), sampling)
            for i, prompt in enumerate(prompts)
        )
        finished = []
        while not engine.idle:
            finished += engine.advance()
    finished.sort(key=lambda end: end.request.key.index)
    return [list(end.completions[0].token_ids) for end in finished], engine.replicas[0].scheduler


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
    needed_blocks: dict[tuple[int, int], int] = {}  # by stages and block size
    for setting in RESIDENT + SHORT:
        kind = setting.num_stages, setting.block_tokens
        num_blocks = RESIDENT_TOKENS // setting.block_tokens
        if setting in SHORT:
            num_blocks = needed_blocks[
                min(needed_blocks, key=lambda known: (known[1] != kind[1], abs(known[0] - kind[0])))
            ]
            num_blocks = num_blocks * setting.percent // 100
        tokens, scheduler = own_tokens(info, prompts, args.max_tokens, setting, num_blocks)
        if setting in RESIDENT:
            needed_blocks[kind] = scheduler.peak_device_blocks
        num_equal = sum(own == theirs for own, theirs in zip(tokens, expected, strict=True))
        figures = {
            "device_blocks": scheduler.peak_device_blocks,
            "host_blocks": scheduler.peak_host_blocks,
            "rows": len(prompts),
            "equal": num_equal,
            "preemptions": scheduler.num_preemptions,
            "kv_faults": scheduler.num_corrupt,
        }
        results.append(asdict(setting) | figures)
        print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    print(json.dumps(results))
    sys.exit(any(result["equal"] != result["rows"] or result["kv_faults"] for result in results))


if __name__ == "__main__":
    main()
