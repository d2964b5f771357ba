"""Columns beside the messages that change the prompt: they are read into it, or refused by name.

As metadata they would be lost, and a draft trained on prompts that its target never saw. What a row keeps in
its `meta` is metadata by the row's own account.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deepspec.data.messages import Message, joined_parts
from deepspec.data.schema import FUNCTIONS, META, checked
from deepspec.errors import DataError

SYSTEM = ("system", "system_prompt", "system_message", "system_instruction")
"""Names of a column that holds the system prompt."""
ALPACA = ("instruction", "input", "context", "history")
"""What the rows of instruction sets ask, in parts."""
UNREAD = ("documents", "chat_template", "chat_template_kwargs")
ASKED = (*SYSTEM, "tools", "functions", "documents", "chat_template")
"""Those that a server may be given in a request, besides the messages."""
PROMPT_COLUMNS = (*SYSTEM, "tools", "functions", *UNREAD, *ALPACA)

_THINKING = {"enable_thinking", "thinking"}
_NEXT = "if the target was given it, put it into a message; if not, move it into 'meta'"


def is_empty(value: object) -> bool:
    return value in (None, "", [], {}) or (isinstance(value, str) and not value.strip())


def read_columns(
    fields: dict[str, Any], messages: tuple[Message, ...], where: str | None
) -> tuple[Message, ...]:
    """The messages, with the system prompt of `fields`; the `functions` of `fields` become its `tools`.

    Raises DataError for a column that is not what its name says, that contradicts another, or that changes
    the prompt and cannot be read.
    """
    if not is_empty(fields.get("functions")):  # OpenAI's older name
        given = checked(FUNCTIONS, {"functions": fields.pop("functions")}, where)["functions"]
        tools = [f if "function" in f else {"type": "function", "function": f} for f in given]
        beside = checked(META, {"tools": fields.get("tools")}, where)["tools"]
        if beside and beside != tools:
            raise DataError("'functions' and 'tools' differ", where=where, next_step="keep one of them")
        fields["tools"] = tools
    messages = _with_system(fields, messages, where)
    refuse_unsaid(fields, ["instruction"], messages, where)
    for name in UNREAD:
        value = fields.get(name)
        # Thinking is the command line's to choose.
        if not is_empty(value) and not (isinstance(value, dict) and value.keys() <= _THINKING):
            raise DataError(f"'{name}' changes the prompt, but is not read", where=where, next_step=_NEXT)
    return messages


def refuse_unsaid(
    row: Mapping[str, Any], names: Sequence[str], messages: Sequence[Message], where: str | None
) -> None:
    """Raise DataError if a column of these names holds a list, or a text that is in none of the messages."""
    for name in names:
        value = row.get(name)
        said = isinstance(value, str) and any(value.strip() in message["content"] for message in messages)
        if isinstance(value, str | list) and not is_empty(value) and not said:
            step = f"{_NEXT}; --map reads it as another field (system={name})"
            raise DataError(f"'{name}' is in none of the row's messages", where=where, next_step=step)


def _with_system(
    fields: dict[str, Any], messages: tuple[Message, ...], where: str | None
) -> tuple[Message, ...]:
    """The messages after the system prompt that a column of `fields` holds."""
    first = messages[0]
    texts = {"the first message": first["content"]} if first["role"] == "system" else {}
    for name in SYSTEM:
        if is_empty(fields.get(name)):
            continue
        try:
            text = joined_parts(fields.pop(name))
        except ValueError as error:
            raise DataError(f"'{name}': {error.args[0]}", where=where) from error
        if not isinstance(text, str):
            raise DataError(f"'{name}' is not the text of a system prompt", where=where, next_step=_NEXT)
        texts[f"'{name}'"] = text
    if len({text.strip() for text in texts.values()}) > 1:
        raise DataError(
            f"two system prompts that differ: {' and '.join(texts)}",
            where=where,
            next_step="keep the one that the target was given, and move the other into 'meta'",
        )
    if first["role"] == "system" or not texts:
        return messages
    return (Message(role="system", content=next(iter(texts.values()))), *messages)
