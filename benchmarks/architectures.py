"""Every causal language model of the installed transformers: equal to its own `generate`, or refused by name.

    python benchmarks/architectures.py docs/architectures.md

Of each type a small random model is made, in float32, with the type's own defaults but for sizes. It goes the way of a
user's model: what its configuration says, the check of types that are not on the tested list, and then six prompts of
up to 23 tokens, continued greedily by 20, on one stage and on two.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pyarrow as pa
import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from batchpipe.errors import ModelError
from batchpipe.job.sampling import Sampling
from batchpipe.job.spec import EngineSpec
from batchpipe.model.architectures import SUPPORTED, check_supported
from batchpipe.model.describe import describe_model
from batchpipe.model.text_part import text_settings
from batchpipe.model.unlisted.self_check import check_unlisted
from batchpipe.model.unlisted.twin import VOCABULARY_SIZE, save_twin
from batchpipe.pipeline.local import LocalPipeline
from batchpipe.pipeline.memory import StageMemory
from batchpipe.placement.open import stage_specs
from batchpipe.placement.stage_split import StageSplit, stage_layers
from batchpipe.runner.engine import Engine
from batchpipe.types import Capacity, Carried, Request, RowKey

if TYPE_CHECKING:
    from transformers._typing import GenerativePreTrainedModel

LENGTHS = (3, 23, 1, 14, 6, 9)
NEW_TOKENS = 20
NO_COLUMNS = pa.RecordBatch.from_pylist([{}], schema=pa.schema([]))
BLOCK_TOKENS, STEP_TOKENS, BATCH_SEQUENCES = 16, 16, 8
# What a type has too much of by default, where it has it at all.
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_intermediate_size": 32,
    "head_dim": 16,
    "sliding_window": 8,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}


def write_config(model_type: str, folder: Path) -> dict[str, Any]:
    """The type's own configuration, made small; its config.json as it is written."""
    config_class = CONFIG_MAPPING[model_type]
    try:
        own = config_class().to_dict()
    except Exception:  # of a type that refuses its own defaults
        own = {}
    names = {"vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"}
    names |= own.keys() & {"head_dim", "n_routed_experts", "n_shared_experts", "num_experts_per_tok"}
    small = {key: value for key, value in SMALL.items() if own.get(key) is not None or key in names}
    if layer_types := own.get("layer_types"):
        kinds = list(dict.fromkeys(layer_types))
        small["layer_types"] = [kinds[layer % len(kinds)] for layer in range(SMALL["num_hidden_layers"])]
    heads = {"num_key_value_heads": SMALL["num_attention_heads"]}
    config: dict[str, Any] = {"model_type": model_type}  # of a type that refuses its own defaults
    for settings in (small, small | heads, {key: small[key] for key in small if key != "layer_types"}, {}):
        try:
            config_class(**settings).save_pretrained(folder)
            config = json.loads((folder / "config.json").read_text())
            break
        except Exception as error:  # each type checks its own settings, by errors of its own
            print(f"{model_type}: {in_one_line(error)}", file=sys.stderr)
    folder.mkdir(exist_ok=True)
    classes = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    config["architectures"] = [classes if isinstance(classes, str) else classes[0]]
    (folder / "config.json").write_text(json.dumps(config))
    return config


def outcome_of(model_type: str) -> tuple[str, str]:
    """Equal, refused, differs or crash, and what was said."""
    with tempfile.TemporaryDirectory() as name:
        folder, twin = Path(name, "config"), Path(name, "model")
        config = text_settings(write_config(model_type, folder))
        try:
            check_supported(config, trust_remote_code=False)
            if config["model_type"] not in SUPPORTED:
                check_unlisted(folder, trust_remote_code=False)
            save_twin(folder, twin, trust_remote_code=False)
            expected = transformers_tokens(twin)
            found = [engine_tokens(twin, num_stages) for num_stages in (1, 2)]
        except ModelError as error:
            return "refused", in_one_line(error).replace(name, "")
        except Exception as error:  # of any type's own code: the row of the table says so
            return "crash", f"{type(error).__name__}: {in_one_line(error)}"
    if any(tokens != expected for tokens in found):
        return "differs", ""
    if config["model_type"] == model_type:
        return "equal", "" if model_type in SUPPORTED else "by the check before loading"
    return "equal", f"its language model, as {config['model_type']}"


def in_one_line(error: Exception) -> str:
    text = " ".join(str(error).split()).removeprefix("model.name: ").split(" Supported model types")[0]
    return text.replace("|", "/")[:200]


def prompts() -> list[list[int]]:
    random = np.random.default_rng(3)
    return [random.integers(3, VOCABULARY_SIZE, length).tolist() for length in LENGTHS]


def transformers_tokens(folder: Path) -> list[tuple[int, ...]]:
    model = cast("GenerativePreTrainedModel", AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    model.generation_config.eos_token_id = None
    texts = []
    for prompt in prompts():
        ids = torch.tensor([prompt])
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=2
        )
        texts.append(tuple(cast("torch.Tensor", output)[0, len(prompt) :].tolist()))
    return texts


def engine_tokens(folder: Path, num_stages: int) -> list[tuple[int, ...]]:
    engine = EngineSpec.model_validate(
        {
            "device": "cpu",
            "block_tokens": BLOCK_TOKENS,
            "max_step_tokens": STEP_TOKENS,
            "max_batch_sequences": BATCH_SEQUENCES,
            "attention": "reference",
        }
    )
    info = describe_model(folder, "float32")
    specs = stage_specs(engine, info, StageSplit("cpu", stage_layers(info, num_stages)), BLOCK_TOKENS)

    def offered(stages: Sequence[StageMemory]) -> Capacity:
        return Capacity(
            num_blocks=60,
            block_tokens=BLOCK_TOKENS,
            num_stages=num_stages,
            max_batches=num_stages,
            max_step_tokens=STEP_TOKENS,
            max_batch_sequences=BATCH_SEQUENCES,
        )

    params = Sampling(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True).params()
    requests = [
        Request(RowKey(index, str(index), Carried(NO_COLUMNS, 0)), np.array(prompt, np.int32), params)
        for index, prompt in enumerate(prompts())
    ]
    with LocalPipeline(specs, offered) as pipeline:
        running = Engine([pipeline], "hybrid", frozenset(), lambda request: None)
        running.add(requests)
        finished = []
        while not running.idle:
            finished += running.advance()
    return [end.completions[0].token_ids for end in sorted(finished, key=lambda end: end.request.key.index)]


def table(rows: Sequence[tuple[str, str, str]]) -> str:
    counts = Counter(outcome for _, outcome, _ in rows)
    told = ", ".join(f"{number} {outcome}" for outcome, number in counts.most_common())
    lines = [
        "# Architectures",
        "",
        f"Every type of causal language model in transformers {transformers.__version__}: {told}.",
        "",
        f"Equal: six prompts, continued greedily by {NEW_TOKENS} tokens in float32, have the tokens of transformers'",
        "own `generate`, on one stage and on two. A type that is not on the tested list is tried before it is loaded,",
        "by a small random model of its kind; what that says follows. A type whose default has layers that cannot run",
        "may run with other layers. Made by `python benchmarks/architectures.py docs/architectures.md`.",
        "",
        "| model type | outcome | what is said |",
        "|---|---|---|",
    ]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("into", type=Path)
    parser.add_argument("--only", nargs="*", default=sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    rows = []
    for model_type in arguments.only:
        rows.append((model_type, *outcome_of(model_type)))
        print(*rows[-1], file=sys.stderr, flush=True)
    arguments.into.write_text(table(rows))
    return int(any(outcome in ("differs", "crash") for _, outcome, _ in rows))


if __name__ == "__main__":
    sys.exit(main())
