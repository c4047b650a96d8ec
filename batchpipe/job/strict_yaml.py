"""Reads YAML with the core types of YAML 1.2, and refuses what could hide a mistake.

PyYAML reads YAML 1.1, in which `no` is false, `012` is ten, `1e3` is a string and `1:30` is ninety. Here every plain
scalar is a string except true, false, null and decimal, hexadecimal (0x) or octal (0o) numbers; `012` is 12. Duplicate
keys, tags, and aliases that expand to very many values are errors.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

import yaml
from yaml.constructor import ConstructorError

from batchpipe.errors import JobError

_MAX_CHARACTERS = 1 << 20
_MAX_VALUES = 100_000


class _CoreLoader(yaml.SafeLoader):
    """The safe loader without the types of YAML 1.1, without tags beyond the core ones, and without `<<` merging."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    yaml_constructors: ClassVar[dict[str | None, Any]] = {}


def _unique_mapping(loader: _CoreLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    mapping: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if isinstance(key, list | dict):
            raise ConstructorError(None, None, "a list or mapping cannot be a key", key_node.start_mark)
        if key in mapping:
            raise ConstructorError(None, None, f"duplicate key '{key}'", key_node.start_mark)
        mapping[key] = loader.construct_object(value_node, deep=True)
    return mapping


def _sequence(loader: _CoreLoader, node: yaml.SequenceNode) -> list[Any]:
    return list(loader.construct_sequence(node, deep=True))


def _integer(loader: _CoreLoader, node: yaml.ScalarNode) -> int:
    text = node.value
    return int(text, 0) if text[:2] in ("0x", "0o") else int(text)


_CORE_TYPES = {
    "null": (r"~|null|Null|NULL|", lambda loader, node: None),
    "bool": (r"true|True|TRUE|false|False|FALSE", lambda loader, node: node.value.lower() == "true"),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", _integer),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        lambda loader, node: float(re.sub(r"\.(?=[a-zA-Z])", "", node.value)),
    ),
}
for _name, (_pattern, _construct) in _CORE_TYPES.items():
    _tag = f"tag:yaml.org,2002:{_name}"
    _CoreLoader.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})\Z"), None)
    _CoreLoader.add_constructor(_tag, _construct)
_CoreLoader.add_constructor("tag:yaml.org,2002:str", lambda loader, node: node.value)
_CoreLoader.add_constructor("tag:yaml.org,2002:seq", _sequence)
_CoreLoader.add_constructor("tag:yaml.org,2002:map", _unique_mapping)
_CoreLoader.yaml_constructors[None] = yaml.SafeLoader.construct_undefined


def read_yaml_file(path: Path) -> Any:
    """`read_yaml` of a file in UTF-8. Raises JobError that begins with the path."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise JobError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise JobError(f"{path}: is not UTF-8 at byte {error.start}") from None
    return read_yaml(text, str(path))


def read_yaml(text: str, origin: str) -> Any:
    """The single document of `text`, or None if it is empty. Raises JobError that begins with `origin` and the line."""
    if len(text) > _MAX_CHARACTERS:
        raise JobError(f"{origin}: has {len(text)} characters; at most {_MAX_CHARACTERS} are read")
    try:
        loader = _CoreLoader(text)
        root = loader.get_single_node()
        if root is None:
            return None
        _refuse_multiplication(root, origin)
        return loader.construct_document(root)
    except yaml.YAMLError as error:
        raise JobError(_message(error, origin)) from None
    except RecursionError:
        raise JobError(f"{origin}: is nested too deeply, or an alias holds itself") from None
    except ValueError as error:
        raise JobError(f"{origin}: {error}") from None


def _refuse_multiplication(root: yaml.Node, origin: str) -> None:
    """Raises JobError if the document has too many values, counting an aliased value once for each of its uses."""
    pending = [root]
    num_values = 0
    while pending:
        node = pending.pop()
        num_values += 1
        if num_values > _MAX_VALUES:
            raise JobError(f"{origin}: holds more than {_MAX_VALUES} values once its aliases are written out")
        if isinstance(node, yaml.MappingNode):
            pending += [value for _, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            pending += node.value


def _message(error: yaml.YAMLError, origin: str) -> str:
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark is None:
        return f"{origin}: {error}"
    if problem and "'\\t'" in problem:
        problem = "a tab character; YAML indents with spaces"
    elif problem and problem.startswith("could not determine a constructor for the tag"):
        problem = f"the tag {problem.rpartition('tag ')[2]} is not allowed; only plain YAML values are"
    return f"{origin}, line {mark.line + 1}, column {mark.column + 1}: {problem or error}"
