"""The job: every key that a job file can hold, with its check and its default, which is written nowhere else.

A job is frozen and holds no facts of the run: a key that is "auto" stays "auto" here, whatever is chosen for it.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import model_validator
from pydantic_core import PydanticCustomError

from batchpipe.job import values as v
from batchpipe.job.sampling import Sampling


class ModelSpec(v.Section):
    """Which weights are used, and how they are loaded."""

    name: Annotated[v.Name, v.about("Alias of configs/models, local directory, .gguf file or hub id.")]
    revision: Annotated[v.OptionalName, v.about("Branch, tag or commit of a hub id.")] = None
    dtype: Annotated[Literal["auto", "bfloat16", "float16", "float32"], v.about("Type that the model computes in.")] = (
        "auto"
    )
    max_context_tokens: Annotated[
        v.OptionalCount, v.about("Longest prompt and completion together; null goes by the model's files.")
    ] = None
    trust_remote_code: Annotated[v.Flag, v.about("Run Python code that comes with the model.")] = False


# Variables of a chat template that no job and no row may set: they are the call's own.
RESERVED_TEMPLATE_VARIABLES = frozenset(
    [
        *("messages", "conversation", "conversations", "chat_template", "add_generation_prompt", "tokenize"),
        *("continue_final_message", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
        *("return_assistant_tokens_mask", "sanitize_control_tokens", "tokenizer_kwargs", "strftime_now"),
    ]
)


class InputSpec(v.Section):
    """Where the rows are, and how a row becomes a prompt."""

    path: Annotated[v.Paths, v.about("File, directory, glob, hf://, s3:// or gs:// address, or a list of these.")]
    format: Annotated[
        Literal["auto", "jsonl", "json", "csv", "tsv", "text", "arrow", "parquet", "openai-batch"],
        v.about(
            "auto goes by the file's name (.txt: text, a prompt a line; .feather: arrow), and takes JSON lines that "
            "are OpenAI's requests for openai-batch; .gz and .zst are read too."
        ),
    ] = "auto"
    id_column: Annotated[
        v.OptionalName, v.about("Column of row ids; null makes the id '<file name>:<row number>'.")
    ] = "id"
    prompt_column: Annotated[
        v.Name, v.about("One user message if the model has a chat template, raw text otherwise.")
    ] = "prompt"
    messages_column: Annotated[
        v.OptionalName,
        v.about("Column with a list of {role, content} or {from, value}, read in place of prompt_column."),
    ] = None
    last_answer: Annotated[
        Literal["auto", "continue", "drop"],
        v.about(
            "An assistant's turn that ends a conversation is continued, or dropped so that it is written anew; auto "
            "continues it and says so once."
        ),
    ] = "auto"
    template: Annotated[v.OptionalText, v.about("Text with {column} places, read in place of prompt_column.")] = None
    system: Annotated[v.OptionalText, v.about("System message put before each row's messages.")] = None
    chat_template: Annotated[
        v.Name, v.about("auto is the model's own, none is raw text, else the path of a .jinja file.")
    ] = "auto"
    template_variables: Annotated[
        v.Variables, v.about("Variables of the chat template for every row, such as {enable_thinking: false}.")
    ] = {}
    template_variables_column: Annotated[
        v.OptionalName,
        v.about("Column with a struct or JSON object of variables for its row, before those of the job."),
    ] = None
    tools_column: Annotated[
        v.OptionalName, v.about("Column with the row's tools for the chat template, a list or that as JSON text.")
    ] = None
    limit: Annotated[v.OptionalCount, v.about("Read only this many rows.")] = None
    max_line_bytes: Annotated[v.Size, v.about("A longer JSON line is a failed row.")] = 64 << 20

    @model_validator(mode="after")
    def _one_source_of_prompts(self) -> InputSpec:
        if self.template is not None and self.messages_column is not None:
            raise PydanticCustomError("related_keys", "template: is set beside messages_column; keep one of them")
        return self

    @model_validator(mode="after")
    def _requests_bring_prompts(self) -> InputSpec:
        if self.format == "openai-batch" and (keys := self.keys_against_requests):
            message = f"{keys[0]}: is set beside format: openai-batch, whose requests bring ids and prompts; remove it"
            raise PydanticCustomError("related_keys", message)
        return self

    @property
    def keys_against_requests(self) -> list[str]:
        """The keys that read a line's id or prompt otherwise than as those of an OpenAI request."""
        fields = type(self).model_fields
        ours = {key: fields[key].default for key in ("prompt_column", "messages_column", "template")}
        keys = [key for key, default in ours.items() if getattr(self, key) != default]
        return keys if self.id_column in (fields["id_column"].default, "custom_id") else ["id_column", *keys]

    @model_validator(mode="after")
    def _variables_are_not_the_calls_own(self) -> InputSpec:
        for name in sorted(RESERVED_TEMPLATE_VARIABLES & self.template_variables.keys()):
            raise PydanticCustomError("related_keys", f"template_variables: '{name}' cannot be set; remove it")
        return self


# The values of predict.method that are not the path of a file.
PREDICT_METHODS = ("auto", "none", "quantile", "classifier")


class PredictSpec(v.Section):
    """Forecast of completion lengths."""

    method: Annotated[
        v.Name, v.about("auto (quantile), none, quantile, classifier (one that is installed), or a trained file.")
    ] = "auto"


class PlanSpec(v.Section):
    """The order of the work."""

    schedule: Annotated[
        Literal["auto", "temporal", "hybrid", "separate", "temporal-published", "pipemax-published"],
        v.about(
            "temporal plans memory from forecast lengths and balances batches; hybrid mixes prompt and "
            "decode tokens in a step, separate never does; temporal-published and pipemax-published are TD-Pipe's and "
            "PipeMax's own. auto is temporal."
        ),
    ] = "auto"


class EngineSpec(v.Section):
    """How the machine is used. Nothing here changes a row's completion."""

    device: Annotated[Literal["auto", "cpu", "cuda"], v.about("auto takes a GPU where there is one.")] = "auto"
    num_stages: Annotated[v.AutoCount, v.about("Pipeline stages of one model copy.")] = "auto"
    replicas: Annotated[v.AutoCount, v.about("Model copies fed from the same rows.")] = "auto"
    kv_device_memory: Annotated[v.AutoSize, v.about("Bytes of KV per stage on its device.")] = "auto"
    kv_host_memory: Annotated[
        v.SizeOrZero,
        v.about("Bytes of KV per stage in host memory, which holds a copy of all KV; 0: the device alone."),
    ] = 0
    offload: Annotated[
        Literal["auto", "none", "batch", "layer"],
        v.about(
            "How KV comes back from host memory: batch by batch before a step, or layer by layer beside "
            "it; auto chooses by the stages' layers and the link."
        ),
    ] = "auto"
    block_tokens: Annotated[v.BlockTokens, v.about("Tokens of a KV block.")] = "auto"
    kv_verify: Annotated[
        Literal["off", "sample", "all"],
        v.about(
            "Checksums on KV with host memory: none; of one in 32 blocks that come back; of all of them, "
            "and of all KV that a step read."
        ),
    ] = "off"
    max_batch_sequences: Annotated[v.AutoCount, v.about("Sequences that one step may hold.")] = "auto"
    max_step_tokens: Annotated[v.AutoCount, v.about("New tokens that one step may hold.")] = "auto"
    attention: Annotated[
        Literal["auto", "reference", "cpu", "triton"], v.about("Attention kernels; auto goes by the device.")
    ] = "auto"

    @model_validator(mode="after")
    def _offload_has_memory(self) -> EngineSpec:
        if self.offload in ("batch", "layer") and not self.kv_host_memory:
            message = f"offload: is '{self.offload}' and kv_host_memory is 0; set kv_host_memory to a size such as 8GiB"
            raise PydanticCustomError("related_keys", f"{message}, or offload to auto")
        return self


class OutputSpec(v.Section):
    """Where completions are written."""

    path: Annotated[v.Name, v.about("Folder of this job's output; running the job again continues it.")]
    columns: Annotated[v.Columns, v.about("Input columns carried through with their exact types.")] = "all"
    prefix: Annotated[
        v.OptionalName,
        v.about("Put before the name of a carried column that is also one of the completions', such as input_."),
    ] = None
    reasoning: Annotated[
        v.Reasoning,
        v.about(
            "Put the reasoning of a completion in the column reasoning: auto goes by the chat template, or the two "
            "markers around it; null leaves it where it is."
        ),
    ] = None
    part_rows: Annotated[v.Count, v.about("Rows of one Parquet part.")] = 1000
    max_failed_fraction: Annotated[
        v.Fraction, v.about("Stop with exit code 4 once a larger share of the rows failed.")
    ] = 1.0


class RunSpec(v.Section):
    """What a run leaves beside its completions."""

    trace: Annotated[
        bool, v.about("Write every step to _steps-N.parquet, and to _trace-N.json for ui.perfetto.dev.")
    ] = False


class Job(v.Section):
    """A batchpipe job: rows in, completions out."""

    version: Annotated[v.One, v.about("Version of the job file's format.")] = 1
    name: Annotated[v.Name, v.about("Name in metrics and reports; a job file's stem by default.")] = "job"
    model: ModelSpec
    input: InputSpec
    sampling: Sampling = Sampling()
    predict: PredictSpec = PredictSpec()
    plan: PlanSpec = PlanSpec()
    engine: EngineSpec = EngineSpec()
    run: RunSpec = RunSpec()
    output: OutputSpec
