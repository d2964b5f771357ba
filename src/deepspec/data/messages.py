"""Messages of a conversation: what each role may carry, which are trained on, and the order of roles.

Whatever is not understood is refused, never dropped: a missing thought, tool call or weight would change what
a draft is trained on. The types are checked by `data.schema`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, Required

from pydantic import AfterValidator, BeforeValidator, ConfigDict, WrapValidator, with_config
from pydantic_core import from_json
from typing_extensions import TypedDict  # pydantic cannot read typing's own before Python 3.12

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
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
_STRICT = with_config(ConfigDict(extra="forbid"))
# The functions below raise ValueError(what is wrong, what to do next).


def known_role(role: str, roles: Sequence[str] = tuple(KEYS)) -> str:
    if role in roles:
        return role
    near = nearest(role, roles)
    raise ValueError(
        f"unknown role {role!r}, expected one of {', '.join(roles)}", near and f"did you mean '{near}'?"
    )


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
        raise ValueError("'content' is an empty list, expected text")
    return "".join(part["text"] for part in content)


def call_arguments(given: object) -> dict[str, Any]:
    """A tool call's arguments as an object. Servers give its JSON text, which is parsed here."""
    found = given
    if isinstance(given, str):
        try:
            found = from_json(given or "{}", allow_inf_nan=False)
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
