"""What the chat template is given beside the messages: the job's variables, the row's own, and the row's tools."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import orjson

from batchpipe.errors import JobError, RowError
from batchpipe.job.spec import RESERVED_TEMPLATE_VARIABLES, InputSpec
from batchpipe.read.nested import value_at
from batchpipe.types import ErrorCode

TOOLS = "tools"  # the variable that holds them, as in every chat template


class TemplateInputs:
    """The variables of each row, by name. JobError if the job's own tools are none."""

    def __init__(self, spec: InputSpec) -> None:
        self._variables_column = spec.template_variables_column
        self._tools_column = spec.tools_column
        try:
            self.of_job = _with_checked_tools(spec.template_variables, "template_variables")
        except RowError as error:
            raise JobError(f"input.{error.message}") from error

    @property
    def columns(self) -> frozenset[str]:
        """The columns that bring variables or tools; without any, all rows have those of the job."""
        return frozenset(name for name in (self._variables_column, self._tools_column) if name is not None)

    def of(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """The row's variables before those of the job; RowError (WRONG_TYPE) if a column does not hold any."""
        given = dict(self.of_job)
        if (column := self._variables_column) is not None:
            given |= _with_checked_tools(_checked_variables(value_at(values, column), column), f"column {column!r}")
        if (column := self._tools_column) is not None:
            tools = _checked_tools(value_at(values, column), f"column {column!r}")
            given |= {TOOLS: tools} if tools else {}
        return given


def _checked_variables(value: Any, column: str) -> Mapping[str, Any]:
    value = _parsed(value, f"column {column!r}")
    if value is None or value == []:  # Arrow's empty map is a list
        return {}
    if not isinstance(value, dict):
        _refuse(f"column {column!r} holds a {type(value).__name__}, not an object of variables")
    for name in sorted(RESERVED_TEMPLATE_VARIABLES & value.keys()):
        _refuse(f"column {column!r} sets {name!r}, which is no variable of a row; leave it out")
    return {name: inner for name, inner in value.items() if inner is not None}


def _with_checked_tools(variables: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The variables without tools that are an empty list: to templates that would mean something else than none."""
    tools = _checked_tools(variables.get(TOOLS), f"{where}.{TOOLS}")
    others = {name: value for name, value in variables.items() if name != TOOLS}
    return {**others, TOOLS: tools} if tools else others


def _checked_tools(value: Any, where: str) -> list[dict[str, Any]]:
    """The tools of a list of objects, each as an object or JSON text, or of such a list as JSON text; [] of null."""
    value = _parsed(value, where)
    if value is None:
        return []
    if not isinstance(value, list):
        _refuse(f"{where} holds a {type(value).__name__}, not a list of tools")
    tools = [_parsed(tool, where) for tool in value]
    for number, tool in enumerate(tools, 1):
        if not isinstance(tool, dict):
            _refuse(f"{where}: tool {number} is a {type(tool).__name__}, not an object")
    return list(map(_with_object_parameters, tools))


def _with_object_parameters(tool: dict[str, Any]) -> dict[str, Any]:
    """A schema that is kept as JSON text, as tables do whose columns hold one type alone, becomes the object."""
    if isinstance(tool.get("function"), dict):
        return {**tool, "function": _with_object_parameters(tool["function"])}
    if not isinstance(tool.get("parameters"), str):
        return tool
    try:
        schema = orjson.loads(tool["parameters"])
    except orjson.JSONDecodeError:
        return tool
    return {**tool, "parameters": schema} if isinstance(schema, dict) else tool


def _parsed(value: Any, where: str) -> Any:
    """JSON text as what it stands for, an empty one as nothing; other values as they are."""
    if not isinstance(value, str):
        return value
    try:
        return orjson.loads(value) if value.strip() else None
    except orjson.JSONDecodeError as error:
        message = f"{where} is not valid JSON: {error}"
        raise RowError(ErrorCode.WRONG_TYPE, message) from error


def _refuse(message: str) -> NoReturn:
    raise RowError(ErrorCode.WRONG_TYPE, message)
