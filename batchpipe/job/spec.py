"""The job: every key a job file may hold, its default and its check. Frozen, and the only home of a default.

Run-time facts never go in here; what was "auto" is decided elsewhere and stays "auto" in the job.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from batchpipe.job import values as v
from batchpipe.job.sampling import Sampling

__all__ = ["EngineSpec", "InputSpec", "Job", "ModelSpec", "OutputSpec", "PlanSpec", "PredictSpec", "Sampling"]


class ModelSpec(v.Section):
    """Which weights, and how they are loaded."""

    name: Annotated[v.Name, Field(description="Alias of configs/models, local directory, .gguf file or hub id.")]
    revision: Annotated[v.OptionalName, Field(description="Branch, tag or commit of a hub id.")] = None
    dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"], Field(description="Type that the model computes in.")
    ] = "auto"
    trust_remote_code: Annotated[v.Flag, Field(description="Run Python code that comes with the model.")] = False


class InputSpec(v.Section):
    """Where the rows are, and how a row becomes a prompt."""

    path: Annotated[
        v.Paths, Field(description="File, directory, glob, hf://, s3:// or gs:// address, or a list of these.")
    ]
    format: Annotated[
        Literal["auto", "jsonl", "parquet"],
        Field(description="auto goes by the file's name; .gz and .zst are read too."),
    ] = "auto"
    id_column: Annotated[
        v.OptionalName, Field(description="Column of row ids; null makes the id '<file name>:<row number>'.")
    ] = "id"
    prompt_column: Annotated[
        v.Name, Field(description="One user message if the model has a chat template, raw text otherwise.")
    ] = "prompt"
    messages_column: Annotated[
        v.OptionalName, Field(description="Column with a list of {role, content}, read in place of prompt_column.")
    ] = None
    template: Annotated[
        v.OptionalText, Field(description="Text with {column} places, read in place of prompt_column.")
    ] = None
    system: Annotated[v.OptionalText, Field(description="System message put before each row's messages.")] = None
    chat_template: Annotated[
        v.Name, Field(description="auto is the model's own, none is raw text, else the path of a .jinja file.")
    ] = "auto"
    limit: Annotated[v.OptionalCount, Field(description="Read only this many rows.")] = None
    max_line_bytes: Annotated[v.Size, Field(description="A longer JSON line is a failed row.")] = 64 << 20

    @model_validator(mode="after")
    def _one_source_of_prompts(self) -> InputSpec:
        if self.template is not None and self.messages_column is not None:
            raise PydanticCustomError("related_keys", "template: is set beside messages_column; keep one of them")
        return self


# What predict.method may be beside a file.
PREDICT_METHODS = ("auto", "none", "quantile", "classifier")


class PredictSpec(v.Section):
    """Forecast of completion lengths."""

    method: Annotated[
        v.Name,
        Field(description="auto (quantile), none, quantile, classifier (one that is installed), or a trained file."),
    ] = "auto"


class PlanSpec(v.Section):
    """Order of the work."""

    schedule: Annotated[
        Literal["auto", "temporal", "hybrid", "separate", "temporal-published"],
        Field(
            description="temporal plans memory from forecast lengths and balances batches; hybrid mixes prompt and "
            "decode tokens in a step, separate never does; temporal-published is TD-Pipe's own. auto is temporal."
        ),
    ] = "auto"


class EngineSpec(v.Section):
    """How the machine is used. Nothing here changes what a row's completion is."""

    device: Annotated[Literal["auto", "cpu", "cuda"], Field(description="auto takes a GPU where there is one.")] = (
        "auto"
    )
    num_stages: Annotated[v.AutoCount, Field(description="Pipeline stages of one model copy.")] = "auto"
    replicas: Annotated[v.AutoCount, Field(description="Model copies fed from the same rows.")] = "auto"
    kv_device_memory: Annotated[v.AutoSize, Field(description="Bytes of KV per stage on its device.")] = "auto"
    kv_host_memory: Annotated[
        v.SizeOrZero,
        Field(description="Bytes of KV per stage in host memory, which holds a copy of all KV; 0: the device alone."),
    ] = 0
    offload: Annotated[
        Literal["auto", "none", "batch", "layer"],
        Field(
            description="How KV comes back from host memory: batch by batch before a step, or layer by layer beside "
            "it; auto chooses by the stages and the link, and may take both."
        ),
    ] = "auto"
    block_tokens: Annotated[v.BlockTokens, Field(description="Tokens of a KV block.")] = "auto"
    kv_verify: Annotated[
        Literal["off", "sample", "all"],
        Field(
            description="Checksums on KV with host memory: none; of one in 32 blocks that come back; of all of them, "
            "and of all KV that a step read."
        ),
    ] = "off"
    max_batch_sequences: Annotated[v.AutoCount, Field(description="Sequences that one step may hold.")] = "auto"
    max_step_tokens: Annotated[v.AutoCount, Field(description="New tokens that one step may hold.")] = "auto"
    attention: Annotated[
        Literal["auto", "reference", "cpu"], Field(description="Attention kernels; auto goes by the device.")
    ] = "auto"

    @model_validator(mode="after")
    def _offload_has_memory(self) -> EngineSpec:
        if self.offload in ("batch", "layer") and not self.kv_host_memory:
            raise PydanticCustomError(
                "related_keys",
                f"offload: is '{self.offload}' and kv_host_memory is 0; set kv_host_memory to a size such as 8GiB, "
                "or offload to auto",
            )
        return self


class OutputSpec(v.Section):
    """Where completions go."""

    path: Annotated[v.Name, Field(description="Folder of this job's output; running the job again continues it.")]
    columns: Annotated[v.Columns, Field(description="Input columns carried through with their exact types.")] = "all"
    part_rows: Annotated[v.Count, Field(description="Rows of one Parquet part.")] = 1000
    max_failed_fraction: Annotated[
        v.Fraction, Field(description="Stop with exit code 4 once a larger share of the rows failed.")
    ] = 1.0


class Job(v.Section):
    """A batchpipe job: rows in, completions out."""

    version: Annotated[v.One, Field(description="Version of the job file's format.")] = 1
    name: Annotated[v.Name, Field(description="Name in metrics and reports; a job file's stem by default.")] = "job"
    model: ModelSpec
    input: InputSpec
    sampling: Sampling = Sampling()
    predict: PredictSpec = PredictSpec()
    plan: PlanSpec = PlanSpec()
    engine: EngineSpec = EngineSpec()
    output: OutputSpec
