"""Messages of a conversation: what each role may carry, which are trained on, and the order of roles.

Whatever is not understood is refused, never dropped: a missing thought, tool call or weight would change what
a draft is trained on. The types are checked by `data.schema`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, Required

from pydantic import AfterValidator, BeforeValidator, ConfigDict, WrapValidator, with_config
from typing_extensions import TypedDict  # pydantic cannot read typing's own before Python 3.12

from deepspec.data.readers import json_of
from deepspec.errors import DataError, nearest

KEYS = {
    "system": ("role", "content", "name"),
    "user": ("role", "content", "name"),
    "assistant": ("role", "content", "name", "reasoning_content", "tool_calls", "weight"),
    "tool": ("role", "content", "name", "tool_call_id"),
}
"""What a message of each role may have."""
MAY_FOLLOW: dict[str | None, tuple[str, ...]] = {
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
CALLS = ("function_call", "tool_call")
"""Names for an assistant whose text is the JSON text of its tool calls."""
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(
        ("assistant", "gpt", "chatgpt", "bard", "bing", "bot", "ai", "model", *CALLS), "assistant"
    ),
    **dict.fromkeys(
        ("tool", "function", "observation", "tool_response", "function_response", "ipython"), "tool"
    ),
}
"""Every name of a role, in whichever format, and the role that it means."""
SHAREGPT = {"role": "from", "content": "value"}
CALL = 'expected {"type": "function", "function": {"name": "…", "arguments": {…}}}'
_STRICT = with_config(ConfigDict(extra="forbid"))
# The functions below raise ValueError(what is wrong, what to do next).


def role_name(given: object) -> str | None:
    """A name of ROLES, however it is spelt (USER, function-call); None for anything else."""
    name = given.lower().replace("-", "_") if isinstance(given, str) else None
    return name if name in ROLES else None


def known_role(role: str) -> str:
    if name := role_name(role):
        return ROLES[name]
    near = nearest(role, ROLES)
    raise ValueError(
        f"unknown role {role!r}, expected one of {', '.join(KEYS)}", near and f"did you mean '{near}'?"
    )


def in_our_names(item: Any) -> Any:
    """A message of any format under the names of `Message`, its tool calls included.

    The empty fields that servers log and tables add ("refusal": null, "annotations": []) are left out.
    """
    if not isinstance(item, dict):
        return item
    if isinstance(calls := item.get("tool_calls"), str) and calls.strip():
        item = {**item, "tool_calls": _calls_of(calls) if calls.strip() != "[]" else []}
    if item.keys() != SHAREGPT.keys():
        for ours, theirs in SHAREGPT.items():
            if theirs in item and item.get(ours) is None:
                item = {ours: item[theirs], **{k: v for k, v in item.items() if k not in (ours, theirs)}}
        item = {k: v for k, v in item.items() if k in SHAREGPT or v not in (None, "", [], {})}
    if role_name(item.get("role")) in CALLS:
        item = {**item, "tool_calls": _calls_of(item.get("content")), "content": None}
    if "function_call" in item and "tool_calls" not in item:  # the older name, for a single call
        item["tool_calls"] = _calls_of(item.pop("function_call"))
    if item.get("content") is None and "tool_calls" in item:
        item["content"] = ""
    thoughts = item.get("thinking")  # gpt-oss's name for them
    if thoughts and item.setdefault("reasoning_content", thoughts) == thoughts:
        del item["thinking"]
    return item


def _calls_of(given: Any) -> list[Any]:
    """Tool calls from {"name": …, "arguments": …}, a list of such objects, or the JSON text of either."""
    try:
        found = json_of(given) if isinstance(given, str) else given
    except ValueError as error:
        raise ValueError(f"the text of a {CALLS[0]} is not JSON: {error}", CALL) from error
    calls = found if isinstance(found, list) else [found]
    if not calls or not all(isinstance(call, dict) for call in calls):
        raise ValueError(f"a {CALLS[0]} must be an object, or the JSON text of one", CALL)
    return [call if "function" in call else {"type": "function", "function": call} for call in calls]


def joined_parts(content: Any) -> Any:
    """OpenAI's list of text parts as one text."""
    if not isinstance(content, list):
        return content
    for k, part in enumerate(content, start=1):
        if not (isinstance(part, dict) and part.keys() == {"type", "text"} and part["type"] == "text"):
            raise ValueError(
                f"part {k} of the content must have 'type': 'text' and a 'text', and nothing else",
                "remove the row: drafts are trained on text, and the target answered this part too",
            )
        if not isinstance(part["text"], str):
            raise ValueError(f"the text of part {k} of the content must be a string")
    if not content:
        raise ValueError("the content is an empty list, expected text")
    return "".join(part["text"] for part in content)


def call_arguments(given: object) -> dict[str, Any]:
    """A tool call's arguments as an object. Servers give its JSON text, which is parsed here."""
    found = given
    if isinstance(given, str):
        try:
            found = json_of(given or "{}")
        except ValueError as error:
            raise ValueError(f"'arguments' is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError("'arguments' must be an object, or the JSON text of one")
    return found


def _weight(value: object) -> object:
    if type(value) is int and value in (0, 1):
        return value
    step = "0 keeps a turn that the target did not write as context; 1, or no weight, trains on it"
    raise ValueError(f"'weight' must be 0 or 1, found {value!r}", step)


def _as_given(value: Any, check: Callable[[Any], Any]) -> Any:
    check(value)
    return value  # not pydantic's copy: a chat template may print the keys in their order


@_STRICT
class _Function(TypedDict):
    name: str
    arguments: Annotated[Any, AfterValidator(call_arguments)]


@_STRICT
class ToolCall(TypedDict, total=False):
    id: str | None
    type: Literal["function"]
    index: Any
    function: Required[_Function]


@_STRICT
class Message(TypedDict, total=False):
    """One message of any role."""

    role: Required[Annotated[str, AfterValidator(known_role)]]
    content: Required[Annotated[str, BeforeValidator(joined_parts)]]
    reasoning_content: str
    tool_calls: Annotated[list[ToolCall], WrapValidator(_as_given)]
    tool_call_id: str
    name: str
    weight: Annotated[int, BeforeValidator(_weight)]


def is_trained(message: Message) -> bool:
    """Whether the loss looks at this message: it is an assistant's, and its weight is not 0."""
    return message["role"] == "assistant" and message.get("weight", 1) == 1


def last_trained(messages: Sequence[Message]) -> int | None:
    return next((i for i in reversed(range(len(messages))) if is_trained(messages[i])), None)


def check_order(messages: Sequence[Message], where: str | None) -> None:
    """Raise DataError if a role speaks out of turn, or a tool answers a call that was not made."""
    before: str | None = None
    calls: list[str | None] = []
    for i, message in enumerate(messages, start=1):
        role, allowed = message["role"], MAY_FOLLOW[before]
        if role not in allowed:
            place = f"after {before}" if before else "at the start"
            what = f"roles out of order: message {i} is {role} {place}, expected {' or '.join(allowed)}"
            raise DataError(what, where=where)
        if role == "assistant":
            calls = [call["id"] for call in message.get("tool_calls", []) if call.get("id")]
        elif role == "tool" and (answered := message.get("tool_call_id", "")) and answered not in calls:
            raise DataError(
                f"message {i} (tool): the assistant before it made no call with the id {answered!r}",
                where=where,
                next_step=f"use the id of one of its calls: {', '.join(map(str, calls)) or '(it made none)'}",
            )
        before = role
    if before == "system":
        what = "roles out of order: a system message alone, expected a user message after it"
        raise DataError(what, where=where)
