"""Before a model of a type that is not on the tested list runs: its stages against the model as transformers has it.

What is compared is a small random model of the same kind, see `twin`: whether layers cut apart, with paged attention
in place of the model's own, compute the same is a matter of its code and its settings, not of its weights.
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from batchpipe.attention.reference import ReferenceAttention
from batchpipe.attention.step_inputs import StepInputs
from batchpipe.errors import ModelError
from batchpipe.kv.pool import KvPool
from batchpipe.model.checkpoint import read_json
from batchpipe.model.describe import describe_model
from batchpipe.model.load import load_stage
from batchpipe.model.quiet import quiet_transformers
from batchpipe.model.text_part import text_settings
from batchpipe.model.unlisted.twin import VOCABULARY_SIZE, save_twin

logger = logging.getLogger(__name__)

# Of the logits' norm: float32 rounds 1,000 times finer, a wrong window or scale is 100 times more.
_TOLERANCE = 1e-3
_LENGTHS = (23, 14)  # longer than a twin's window
_STEPS = ((0, 9), (9, 13), (13, 14), (14, 23))  # the new tokens of each step: two prefills, a decode, a prefill
_BLOCK_TOKENS = 16
_NUM_TEXTS = 3
_MOST_SAID = 400  # characters of a library's error


def check_unlisted(folder: Path, *, trust_remote_code: bool) -> None:
    """For a type that is not on the tested list. Raises ModelError where stages compute something else."""
    model_type = text_settings(read_json(folder / "config.json")).get("model_type")
    with tempfile.TemporaryDirectory() as name:
        try:
            save_twin(folder, Path(name), trust_remote_code=trust_remote_code)
            difference = _difference(Path(name), trust_remote_code=trust_remote_code)
        except Exception as error:  # of code that nobody here has seen
            kind = "" if isinstance(error, ModelError) else f"{type(error).__name__}: "
            said = " ".join(str(error).split()).removeprefix("model.name: ").replace(name, "it")
            raise ModelError(
                f"model.name: model_type {model_type!r} is not on the tested list, and a small model of it cannot be "
                f"run in stages: {kind}{said[:_MOST_SAID]}"
            ) from error
    if not difference < _TOLERANCE:
        raise ModelError(
            f"model.name: model_type {model_type!r} is not on the tested list, and a small model of it computes other "
            f"logits in stages than transformers does (relative difference {difference:.1e}): it has something beside "
            "plain causal attention that cannot run here"
        )
    logger.info(
        "model type %s is not on the tested list; a small model of it agrees with transformers to %.0e",
        model_type, difference,
    )  # fmt: skip


@torch.inference_mode()
def _difference(folder: Path, *, trust_remote_code: bool) -> float:
    """Largest difference of the logits of any last token, relative to their norm; on one stage and on two.

    Of several texts the median counts: a rounding that sends one token to another expert says nothing.
    """
    with quiet_transformers():
        whole = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=torch.float32, trust_remote_code=trust_remote_code, attn_implementation="eager"
        ).eval()
    found = []
    for seed in range(_NUM_TEXTS):
        generator = torch.Generator().manual_seed(seed)
        texts = [torch.randint(3, VOCABULARY_SIZE, (length,), generator=generator) for length in _LENGTHS]
        expected = [whole(text[None], use_cache=False).logits[0] for text in texts]
        found.append(
            [
                float((logits - expected[sequence][token]).norm() / expected[sequence][token].norm())
                for num_stages in (1, 2)
                for sequence, token, logits in _in_stages(
                    folder, texts, num_stages, trust_remote_code=trust_remote_code
                )
            ]
        )
    # What is not a number sorts last, and so counts as far apart.
    return float(np.sort(np.array(found), axis=0)[_NUM_TEXTS // 2].max())


def _in_stages(
    folder: Path, texts: list[Tensor], num_stages: int, *, trust_remote_code: bool
) -> list[tuple[int, int, Tensor]]:
    """The logits of the last token of each sequence in each step, with the sequence and the token."""
    info = describe_model(folder, "float32", trust_remote_code=trust_remote_code)
    edges = [info.num_layers * stage // num_stages for stage in range(num_stages + 1)]
    num_blocks = -(-max(_LENGTHS) // _BLOCK_TOKENS)
    tables = np.arange(len(texts) * num_blocks, dtype=np.int32).reshape(len(texts), num_blocks)
    stages = []
    for stage, (first, end) in enumerate(zip(edges, edges[1:], strict=False)):
        pool = KvPool(tables.size, end - first, info.num_kv_heads, _BLOCK_TOKENS, info.head_dim, torch.float32)
        model = load_stage(
            folder,
            range(first, end),
            is_first=stage == 0,
            is_last=stage == num_stages - 1,
            dtype=torch.float32,
            trust_remote_code=trust_remote_code,
        )
        stages.append((model, StepInputs(pool, first_layer=first)))
    found = []
    for begin, end in _STEPS:
        running = [i for i, text in enumerate(texts) if len(text) > begin]
        news = [texts[i][begin:end] for i in running]
        lengths = np.array([len(new) for new in news], np.int32)
        source = torch.cat(news)
        for model, step_inputs in stages:
            inputs = step_inputs.fill(lengths, 0 * lengths + begin, tables[running], backend=ReferenceAttention())
            rows = inputs.query_starts[1:].long() - 1 if model is stages[-1][0] else None
            source = model(inputs, source, inputs.positions, rows)
        found += [(i, begin + len(new) - 1, logits) for i, new, logits in zip(running, news, source, strict=True)]
    return found
