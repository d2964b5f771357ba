"""What a row may hold in each format, as pydantic types, and pydantic's errors in plain words."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
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

from deepspec.data.messages import KEYS, SHAREGPT_ROLES, Message, joined_parts, known_role
from deepspec.errors import DataError

_OPEN = with_config(ConfigDict(extra="allow"))
_NonEmpty = Field(min_length=1)
_Id = Annotated[int, Field(strict=True, ge=0)]


def _tidy(item: Any) -> Any:
    """A message without the empty fields that servers log ("refusal": null, "annotations": [])."""
    if not isinstance(item, dict):
        return item
    if len(item) > 2 or "tool_calls" in item:
        kept = ("role", "content", "from", "value")
        item = {k: v for k, v in item.items() if k in kept or v not in (None, "", [], {})}
        if item.get("content") is None and "tool_calls" in item:
            item["content"] = ""
        thoughts = item.get("thinking") if "role" in item else None  # gpt-oss's name for them
        if thoughts and item.setdefault("reasoning_content", thoughts) == thoughts:
            del item["thinking"]
    return {**item, "role": "system"} if item.get("role") == "developer" else item


def _only_its_keys(message: Message) -> Message:
    role = message["role"]
    if wrong := message.keys() - set(KEYS[role]):
        known = f"a {role} message may have {names_of(KEYS[role])}"
        raise ValueError(f"unknown key {names_of(sorted(wrong))}, {known}", _UNKNOWN)
    return message


@with_config(ConfigDict(extra="forbid"))
class _ShareGPT(TypedDict):
    role: Annotated[
        str,
        AfterValidator(partial(known_role, roles=tuple(SHAREGPT_ROLES))),
        AfterValidator(SHAREGPT_ROLES.__getitem__),
        Field(validation_alias="from"),
    ]
    content: Annotated[str, BeforeValidator(joined_parts), Field(validation_alias="value")]


@_OPEN
class _Row(TypedDict, total=False):
    id: str | None
    domain: str | None
    meta: dict[str, Any] | None


class _MessagesRow(_Row):
    messages: Annotated[
        list[Annotated[Message, BeforeValidator(_tidy), AfterValidator(_only_its_keys)]], _NonEmpty
    ]


class _ShareGPTRow(_Row):
    conversations: Annotated[list[Annotated[_ShareGPT, BeforeValidator(_tidy)]], _NonEmpty]


class _TurnsRow(_Row):
    turns: Annotated[list[str], _NonEmpty]


class _PromptRow(_Row, total=False):
    prompt: Required[str]
    response: str | None


@_OPEN
class _Meta(TypedDict, total=False):
    answer_ids: list[_Id] | list[list[_Id] | None] | None
    tools: list[Annotated[dict[str, Any], _NonEmpty]] | None


ROWS: dict[str, TypeAdapter[Any]] = {
    "messages": TypeAdapter(_MessagesRow),
    "conversations": TypeAdapter(_ShareGPTRow),
    "turns": TypeAdapter(_TurnsRow),
    "prompt": TypeAdapter(_PromptRow),
}
"""The formats of a row, by the key that tells them apart; the first that is present counts."""
META = TypeAdapter(_Meta)

_UNKNOWN = (
    "remove the key, or move what the model read or wrote into a known one (thoughts into "
    "'reasoning_content', or into the text as '<think>…</think>')"
)
_CALL = 'expected {"type": "function", "function": {"name": "…", "arguments": {…}}}'
_META_ERRORS = {
    "answer_ids": (
        "'answer_ids' must be a list of non-negative integers, or one such list or null for each turn",
        "remove it to have the answers' text tokenised instead",
    ),
    "tools": (
        "'tools' must be a list of JSON schemas, one object for each tool",
        'for example [{"type": "function", "function": {"name": "…", "parameters": {…}}}]',
    ),
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
    at, value, key = "", row, ""  # "message 2 (assistant), tool call 1: "
    for step in loc:
        value = value[step] if isinstance(step, int) or (isinstance(value, dict) and step in value) else None
        if isinstance(step, int):
            role = value.get("role") if isinstance(value, dict) else None
            role = f" ({role})" if role in tuple(KEYS) else ""
            at += f"{', ' if at else ''}{_ITEMS[key]} {step + 1}{role}"
            key = ""
        else:
            key = step
    expected = _CALL if "tool call" in at else None
    subject = f"{at}: '{key}'" if at and key else at or f"'{key}'"
    at += ": " if at else ""
    if kind == "value_error":
        what, *steps = error["ctx"]["error"].args
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
