"""What a row may hold in each format, as pydantic types, and pydantic's errors in plain words."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Required

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    with_config,
)
from typing_extensions import TypedDict

from deepspec.data.messages import CALL, KEYS, ROLES, SHAREGPT, Message, in_our_names, joined_parts, role_name
from deepspec.data.readers import json_of
from deepspec.errors import DataError

_OPEN = with_config(ConfigDict(extra="allow"))
_NonEmpty = Field(min_length=1)
_Id = Annotated[int, Field(strict=True, ge=0)]


def _only_its_keys(message: Message) -> Message:
    role = message["role"]
    if wrong := message.keys() - set(KEYS[role]):
        known = f"a {role} message may have {names_of(KEYS[role])}"
        raise ValueError(f"unknown key {names_of(sorted(wrong))}, {known}", _UNKNOWN)
    return message


_Messages = Annotated[
    list[Annotated[Message, BeforeValidator(in_our_names), AfterValidator(_only_its_keys)]], _NonEmpty
]


def _from_text(value: Any) -> Any:
    """A list that a table holds as JSON text, or the items of which it holds so."""
    if isinstance(value, str):
        return _from_text(json_of(value)) if value.strip() else None
    return [json_of(v) if isinstance(v, str) else v for v in value] if isinstance(value, list) else value


def _function_inside(tool: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(tool.get("function", {}), dict):
        raise ValueError("'function' must be an object")
    return tool


_Tool = Annotated[dict[str, Any], _NonEmpty, AfterValidator(_function_inside)]
_Tools = Annotated[list[_Tool] | None, BeforeValidator(_from_text)]
_Text = Annotated[str | None, BeforeValidator(joined_parts)]


@_OPEN
class _Row(TypedDict, total=False):
    id: str | None
    domain: str | None
    meta: dict[str, Any] | None
    system: _Text
    system_prompt: _Text
    system_message: _Text
    system_instruction: _Text
    tools: _Tools
    functions: _Tools


class _MessagesRow(_Row):
    messages: _Messages


class _ShareGPTRow(_Row):
    conversations: _Messages


class _TurnsRow(_Row):
    turns: Annotated[list[str], _NonEmpty]


class _PromptRow(_Row, total=False):
    prompt: Required[str]
    response: str | None


class _InstructionRow(_Row, total=False):
    instruction: Required[str]
    input: str | None
    output: str | None
    response: str | None


@_OPEN
class _Meta(TypedDict, total=False):
    answer_ids: list[_Id] | list[list[_Id] | None] | None
    tools: _Tools


ROWS: dict[str, TypeAdapter[Any]] = {
    "messages": TypeAdapter(_MessagesRow),
    "conversations": TypeAdapter(_ShareGPTRow),
    "turns": TypeAdapter(_TurnsRow),
    "prompt": TypeAdapter(_PromptRow),
    "instruction": TypeAdapter(_InstructionRow),
}
"""The formats of a row, by the key that tells them apart; the first that is present counts."""
META = TypeAdapter(_Meta)

_UNKNOWN = (
    "remove the key, or move what the model read or wrote into a known one (thoughts into "
    "'reasoning_content', or into the text as '<think>…</think>')"
)
_NO_PROMPT = "if it is not a system prompt, move it into 'meta'"
_TOOLS = (
    "must be a list of JSON schemas, one object for each",
    'for example [{"type": "function", "function": {"name": "…", "parameters": {…}}}]; '
    "if it is something else, move it into 'meta'",
)
_META_ERRORS = {
    "answer_ids": (
        "'answer_ids' must be a list of non-negative integers, or one such list or null for each turn",
        "remove it to have the answers' text tokenised instead",
    ),
    "tools": (f"'tools' {_TOOLS[0]}", _TOOLS[1]),
    "functions": (f"'functions' {_TOOLS[0]}", _TOOLS[1]),
}
_EXPECTED = {"string_type": "a string", "list_type": "a list", "dict_type": "an object"}
_ITEMS = {"messages": "message", "conversations": "message", "turns": "turn", "tool_calls": "tool call"}


def checked(adapter: TypeAdapter[Any], value: object, where: str | None) -> dict[str, Any]:
    """`value` as the adapter returns it. Raises DataError for the first thing that is wrong with it."""
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        what, next_step = _explained(value, error.errors(include_url=False)[0])
        raise DataError(what, where=where, next_step=next_step) from None


def _explained(row: Any, error: Any) -> tuple[str, str | None]:
    """What is wrong and what to do next, for one of pydantic's errors about a row."""
    kind, found, loc = error["type"], error["input"], error["loc"]
    if loc[0] in _META_ERRORS:
        return _META_ERRORS[loc[0]]
    at, value, key, holder = "", row, "", row  # "message 2 (assistant), tool call 1: "
    for step in loc:
        holder = value
        inside = range(len(value)) if isinstance(value, list) else value if isinstance(value, dict) else ()
        value = value[step] if step in inside else None
        if isinstance(step, int):
            named = (value.get("role") or value.get("from")) if isinstance(value, dict) else None
            role = f" ({ROLES[name]})" if (name := role_name(named)) else ""
            at += f"{', ' if at else ''}{_ITEMS[key]} {step + 1}{role}"
            key = ""
        else:
            key = step
    if isinstance(holder, dict):
        found = holder if kind == "missing" else found
        key = SHAREGPT.get(key, key) if holder.keys() & set(SHAREGPT.values()) else key
    expected = CALL if "tool call" in at else _NO_PROMPT if key.startswith("system") else None
    subject = f"{at}: '{key}'" if at and key else at or f"'{key}'"
    at += ": " if at else ""
    if kind == "value_error":
        what, *steps = error["ctx"]["error"].args
        if not at:
            return f"'{key}': {what}", expected
        return f"{at}{what}", steps[0] if steps else expected
    if kind == "missing":
        return f"{at}no '{key}'; found {names_of(found)}", expected
    if kind == "extra_forbidden":
        return f"{at}unknown key '{key}'", expected or _UNKNOWN
    if kind == "too_short":
        return f"{subject} is empty, expected at least one message", None
    if kind in _EXPECTED:
        return f"{subject} must be {_EXPECTED[kind]}, found {kind_of(found)}", expected
    return f"{subject}: {error['msg']}", expected


def kind_of(value: object) -> str:
    """What JSON calls the type of a parsed value."""
    if value is None:
        return "null"
    names = {bool: "a boolean", str: "a string", int: "a number", float: "a number", list: "an array"}
    return names.get(type(value), "an object" if isinstance(value, dict) else type(value).__name__)


def names_of(keys: Iterable[str]) -> str:
    return ", ".join(f"'{key}'" for key in list(keys)[:8])
