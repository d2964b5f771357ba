"""One message of a conversation: what it may carry, and in which order roles may speak.

What is not understood is refused, never left out: a thought, a tool call or a weight that went missing would
change what is trained on. Errors name the message, and what was expected.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, Required, TypedDict

from deepspec.errors import DataError, nearest


class Message(TypedDict, total=False):
    role: Required[str]
    content: Required[str]
    reasoning_content: str
    tool_calls: list[dict[str, Any]]
    tool_call_id: str
    name: str
    weight: int


ROLES = ("system", "user", "assistant", "tool")
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
_FORMS = {
    "messages": ("role", "content", {role: role for role in ROLES}),
    "conversations": ("from", "value", _SHAREGPT_ROLES),
}
"""How each form names a message's role and content, and what it calls the roles."""
_ALSO = {
    "system": ("name",),
    "user": ("name",),
    "assistant": ("reasoning_content", "tool_calls", "name", "weight"),
    "tool": ("tool_call_id", "name"),
}
"""What a message of each role may carry beside its content, in the form 'messages'."""
_CALL = '{"type": "function", "function": {"name": "…", "arguments": {…}}}'
_MAY_FOLLOW: dict[str | None, tuple[str, ...]] = {
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


def messages_from(value: object, form: str, where: str | None) -> tuple[Message, ...]:
    """The messages of a list in the form 'messages' or 'conversations'. Raises DataError naming ``where``."""
    return tuple(
        _message(item, i, form, where) for i, item in enumerate(items_of(value, form, where), start=1)
    )


def _message(item: object, i: int, form: str, where: str | None) -> Message:
    role_key, text_key, roles = _FORMS[form]
    if not isinstance(item, dict):
        raise DataError(
            f"message {i}: expected an object with '{role_key}' and '{text_key}', found {kind_of(item)}",
            where=where,
        )
    # Logs of servers carry fields ("refusal": null, "annotations": []) that are empty and say nothing.
    item = {k: v for k, v in item.items() if k in (role_key, text_key) or v not in (None, "", [], {})}
    if item.get(text_key) is None and "tool_calls" in item:
        item[text_key] = ""
    for key in (role_key, text_key):
        if key not in item:
            raise DataError(f"message {i}: no '{key}'; found {names_of(item)}", where=where)
    role = item[role_key]
    if not isinstance(role, str) or role not in roles:
        near = nearest(role, roles) if isinstance(role, str) else None
        raise DataError(
            f"message {i}: unknown role {role!r}, expected one of {', '.join(roles)}",
            where=where,
            next_step=f"did you mean '{near}'?" if near else None,
        )
    role, name = roles[role], f"message {i} ({role})"
    known = [role_key, text_key, *(_ALSO[role] if form == "messages" else ())]
    unknown = [key for key in item if key not in known]
    if unknown:
        raise DataError(
            f"message {i}: unknown key {names_of(unknown)}, a {role} message may have {names_of(known)}",
            where=where,
            next_step="write everything that the model read or said into keys that are known (thoughts into "
            "'reasoning_content', or as '<think>…</think>' into the text), or remove the key",
        )
    message = Message(role=role, content=_content(item[text_key], f"{name}: '{text_key}'", where))
    if "tool_calls" in item:
        message["tool_calls"] = _tool_calls(item["tool_calls"], name, where)
    if "reasoning_content" in item:
        message["reasoning_content"] = text_of(
            item["reasoning_content"], f"{name}: 'reasoning_content'", where
        )
    if "tool_call_id" in item:
        message["tool_call_id"] = text_of(item["tool_call_id"], f"{name}: 'tool_call_id'", where)
    if "weight" in item:
        message["weight"] = _weight(item["weight"], name, where)
    if "name" in item:
        message["name"] = text_of(item["name"], f"{name}: 'name'", where)
    return message


def _content(value: object, name: str, where: str | None) -> str:
    """A message's text: a string, or OpenAI's list of text parts, put together as they are."""
    if not isinstance(value, list):
        return text_of(value, name, where)
    if not value:
        raise DataError(f"{name} is an empty list, expected text", where=where)
    texts = []
    for k, part in enumerate(value, start=1):
        if not isinstance(part, dict) or part.get("type") != "text" or set(part) - {"type", "text"}:
            found = f"one of type {part.get('type')!r}" if isinstance(part, dict) else kind_of(part)
            raise DataError(
                f"{name}, part {k}: expected a part of type 'text' with nothing but 'text', found {found}",
                where=where,
                next_step="remove the row: drafts are trained on text, and without this part the target "
                "would have answered otherwise",
            )
        texts.append(text_of(part.get("text"), f"{name}, part {k}: 'text'", where))
    return "".join(texts)


def _weight(value: object, name: str, where: str | None) -> int:
    """OpenAI's switch of fine-tuning data: 0 for an assistant turn that is context only."""
    if type(value) is not int or value not in (0, 1):
        raise DataError(
            f"{name}: 'weight' must be 0 or 1, found {value!r}",
            where=where,
            next_step="0 keeps a turn that the target did not write as context, 1 or none trains on it",
        )
    return value


def is_trained(message: Message) -> bool:
    """Whether the loss looks at this message: an assistant's, unless its weight is 0."""
    return message["role"] == "assistant" and message.get("weight", 1) == 1


def _tool_calls(value: object, name: str, where: str | None) -> list[dict[str, Any]]:
    """OpenAI's tool calls, as they stand. Raises DataError for anything a chat template could misread."""
    if not isinstance(value, list):
        raise DataError(f"{name}: 'tool_calls' must be a list, found {kind_of(value)}", where=where)
    for k, call in enumerate(value, start=1):
        what = f"{name}, tool call {k}"
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict):
            raise DataError(
                f"{what}: expected {_CALL}, found {kind_of(call)} without a 'function'", where=where
            )
        unknown = sorted(
            set(call) - {"id", "type", "index", "function"} | set(function) - {"name", "arguments"}
        )
        if unknown or call.get("type", "function") != "function":
            found = f"key {names_of(unknown)}" if unknown else f"type {call['type']!r}"
            raise DataError(f"{what}: unknown {found}, expected {_CALL}", where=where)
        text_of(function.get("name"), f"{what}: 'name'", where)
        text_of(call.get("id") or "", f"{what}: 'id'", where)
        call_arguments(function.get("arguments"), what, where)
    return value


def call_arguments(value: object, name: str = "tool call", where: str | None = None) -> dict[str, Any]:
    """A tool call's arguments as an object; servers give its JSON text, which is read here.

    Raises DataError for anything else.
    """
    found = value
    if isinstance(value, str):
        try:
            found = json.loads(value or "{}", parse_constant=no_constant)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{name}: 'arguments' is not JSON: {error}", where=where) from error
    if not isinstance(found, dict):
        raise DataError(
            f"{name}: 'arguments' must be an object, or the JSON text of one, found {kind_of(found)}",
            where=where,
        )
    return found


def check_order(messages: tuple[Message, ...], where: str | None) -> None:
    """Raise DataError where a role speaks out of turn, or a tool answers a call that was not made."""
    before: str | None = None
    calls: set[str] = set()
    for i, message in enumerate(messages, start=1):
        role, allowed = message["role"], _MAY_FOLLOW[before]
        if role not in allowed:
            place = f"after {before}" if before else "at the start"
            raise DataError(
                f"roles out of order: message {i} is {role} {place}, expected {' or '.join(allowed)}",
                where=where,
            )
        if role == "assistant":
            calls = {call["id"] for call in message.get("tool_calls", []) if call.get("id")}
        answered = message.get("tool_call_id")
        if answered is not None and answered not in calls:
            raise DataError(
                f"message {i} (tool): 'tool_call_id' {answered!r} is no call of the assistant before it",
                where=where,
                next_step=f"the calls before it have the ids {names_of(sorted(calls)) or '(none)'}",
            )
        before = role
    if before == "system":
        raise DataError(
            "roles out of order: a system message alone, expected a user message after it", where=where
        )


# -- shared with the rows they stand in --------------------------------------------------------------------


def items_of(value: object, form: str, where: str | None) -> list[object]:
    if not isinstance(value, list):
        raise DataError(f"'{form}' must be a list, found {kind_of(value)}", where=where)
    if not value:
        raise DataError(f"'{form}' is empty, expected at least one message", where=where)
    return value


def text_of(value: object, name: str, where: str | None) -> str:
    if not isinstance(value, str):
        raise DataError(f"{name} must be a string, found {kind_of(value)}", where=where)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{name} holds half a surrogate pair ({value[error.start]!r}), which is not text",
            where=where,
            next_step="repair the text where it was cut, or remove the row",
        ) from error
    return value


def kind_of(value: object) -> str:
    """JSON's name of a parsed value's type."""
    if value is None:
        return "null"
    names = {bool: "a boolean", str: "a string", int: "a number", float: "a number", list: "an array"}
    return names.get(type(value), "an object" if isinstance(value, dict) else type(value).__name__)


def names_of(keys: Iterable[str]) -> str:
    return ", ".join(f"'{key}'" for key in keys)


def no_constant(name: str) -> object:
    raise ValueError(f"{name} is not a JSON value")
