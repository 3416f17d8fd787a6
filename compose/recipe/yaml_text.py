"""YAML as plain values with their places; nothing in it is run, and no alias can make it grow.

Plain words stay words ("no" and "on" too); only true, false, null and numbers mean something else.
"""

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from compose.recipe.problems import Key, Place, Problem, Source
from lora_jax.errors import InputError

MOST = 10_000  # values in a recipe, aliases written out
DEEPEST = 12  # lists and tables within each other
_KINDS = ("bool", "float", "int", "map", "merge", "null", "seq", "str", "timestamp", "value")
_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in _KINDS}
_WORDS = {"": None, "~": None, "null": None, "true": True, "false": False}
_WHOLE = re.compile(r"[+-]?\d{1,18}")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_ALIAS = '; in YAML a plain * begins an alias, so put quotes around a pattern: "*.q_proj"'


@dataclass(frozen=True)
class _Found:
    """What has been seen of a file."""

    file: str
    keys: dict[Key, Place] = field(default_factory=dict)
    values: dict[Key, Place] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def parse(text: str, file: str) -> tuple[Any, Source, list[Problem]]:
    """A YAML text as dicts, lists, texts and numbers; the places; and what is wrong so far."""
    found = _Found(file)
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise InputError(f"{file}: {_reason(error)}") from None
    except RecursionError:
        raise InputError(f"{file}: lists and tables are nested too deeply") from None
    value = None if node is None else _value(node, (), found)
    return value, Source(file, text, found.keys, found.values), found.problems


def _reason(error: yaml.YAMLError) -> str:
    """Where a text stops being YAML, why, and what to do."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return f"not YAML: {str(error).splitlines()[0]}"
    mark, reason = error.problem_mark, error.problem or error.context or ""
    remedy = "; indent with spaces" if "\\t" in reason else ""
    remedy = _ALIAS if "alias" in f"{error.context} {reason}" else remedy
    return f"line {mark.line + 1}, column {mark.column + 1}: not YAML: {reason}{remedy}"


def _value(node: yaml.Node, key: Key, found: _Found) -> Any:
    """A node as a plain value."""
    place = (node.start_mark.line + 1, node.start_mark.column + 1)
    found.values[key] = place
    if len(key) > DEEPEST or len(found.values) > MOST:
        limit = f"more than {MOST:,} values" if len(key) <= DEEPEST else "too many tables in tables"
        raise InputError(
            f"{found.file}: line {place[0]}, column {place[1]}: {limit}; a recipe is small: check "
            f"its aliases (&name and *name)"
        )
    if node.tag not in _TAGS:
        message = f"the tag {node.tag!r} has no place in a recipe; take it out"
        found.problems.append(Problem(key, message, place))
    match node:
        case yaml.MappingNode():
            return _table(node, key, found)
        case yaml.SequenceNode():
            return [_value(item, (*key, n), found) for n, item in enumerate(node.value)]
        case yaml.ScalarNode(style=None):
            return _plain(node.value)
    return node.value


def _table(node: yaml.MappingNode, key: Key, found: _Found) -> dict[str, Any]:
    """A mapping whose keys are texts, each there once."""
    table: dict[str, Any] = {}
    for name_node, value_node in node.value:
        mark = name_node.start_mark
        place = (mark.line + 1, mark.column + 1)
        if not isinstance(name_node, yaml.ScalarNode):
            found.problems.append(Problem(key, "a key is a word, not a list or a table", place))
            continue
        name, inner = name_node.value, (*key, name_node.value)
        if name in table:
            message = f"is there twice, on line {found.keys[inner][0]} first; rename one"
            found.problems.append(Problem(inner, message, place))
            continue
        found.keys[inner] = place
        table[name] = _value(value_node, inner, found)
    return table


def _plain(text: str) -> Any:
    """What a text without quotes stands for."""
    if _WHOLE.fullmatch(text):
        return int(text)
    if _NUMBER.fullmatch(text):
        return float(text)
    return _WORDS.get(text.lower(), text)


class _Dumper(yaml.SafeDumper):
    """Lists on one line, tables on lines of their own, and quotes where `parse` needs them."""


def _quoted(dumper: _Dumper, text: str) -> yaml.Node:
    """A text, in quotes if it would be read as a number."""
    style = None if isinstance(_plain(text), str) else "'"
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _quoted)
_Dumper.add_representer(
    list, lambda d, items: d.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=True)
)


def dump(value: Any) -> str:
    """A plain value as YAML text; `parse` gives it back."""
    return yaml.dump(
        value,
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        width=100,
        default_flow_style=False,
    )
