"""Columns next to the messages that change the prompt: they are read into it, or refused by name.

As metadata they would be lost, and a draft trained on prompts that its target never saw. What a row keeps in
its `meta` is metadata by the row's own account.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deepspec.conditions import SWITCHES
from deepspec.data.messages import Message
from deepspec.errors import DataError

SYSTEM = ("system", "system_prompt", "system_message", "system_instruction")
"""Names of a column that holds the system prompt."""
ALPACA = ("instruction", "input", "context", "history")
"""What the rows of instruction sets ask, in parts."""
UNREAD = ("documents", "chat_template", "chat_template_kwargs")
"""What a template may read besides messages and tools. Of the last one, thinking is understood."""
ASKED = (*SYSTEM, "tools", "functions", *UNREAD)
"""Those that a server may be given in a request, besides the messages."""
PROMPT_COLUMNS = (*SYSTEM, "tools", "functions", *UNREAD, *ALPACA)


def is_empty(value: object) -> bool:
    return value in (None, "", [], {}) or (isinstance(value, str) and not value.strip())


def read_columns(
    fields: dict[str, Any], messages: tuple[Message, ...], where: str | None
) -> tuple[Message, ...]:
    """The messages, with the system prompt of `fields`; the `functions` of `fields` become its `tools`.

    Raises DataError for a column that contradicts another, or that changes the prompt and cannot be read.
    """
    if fields.keys().isdisjoint(PROMPT_COLUMNS):
        return messages
    if not is_empty(fields.get("functions")):  # OpenAI's older name
        given = fields.pop("functions")
        tools = [f if "function" in f else {"type": "function", "function": f} for f in given]
        if (fields.get("tools") or tools) != tools:
            raise DataError("'functions' and 'tools' differ", where=where, next_step="keep one of them")
        fields["tools"] = tools
    if any(map(_is_filled, fields.get("tools") or ())):
        fields["tools"] = _without_nulls(fields["tools"])
        messages = tuple(map(_without_nulls, messages))
    first = messages[0]
    systems = {"the first message": first["content"]} if first["role"] == "system" else {}
    systems |= {f"'{name}'": fields.pop(name) for name in SYSTEM if not is_empty(fields.get(name))}
    if len({text.strip() for text in systems.values()}) > 1:
        raise DataError(
            f"two system prompts that differ: {' and '.join(systems)}",
            where=where,
            next_step="keep the one that the target was given, and move the other into 'meta'",
        )
    if systems and first["role"] != "system":
        messages = (Message(role="system", content=next(iter(systems.values()))), *messages)
    refuse_unsaid(fields, ("instruction", *UNREAD), messages, where)
    return messages


def _is_filled(tool: Any) -> bool:
    """Whether a table filled a tool's schema with the properties of all other tools: null is not a schema."""
    for key in ("function", "parameters", "properties"):
        tool = tool.get(key, tool if key == "function" else None)
        if not isinstance(tool, dict):
            return False
    return None in tool.values()


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def refuse_unsaid(
    row: Mapping[str, Any], names: Sequence[str], messages: Sequence[Message], where: str | None
) -> None:
    """Raise DataError if the row has something in a column of these names that none of the messages says."""
    for name in names:
        value = row.get(name)
        said = isinstance(value, str) and any(value.strip() in message["content"] for message in messages)
        chosen = isinstance(value, dict) and value.keys() <= set(SWITCHES)  # by the command line
        if not (is_empty(value) or said or chosen):
            raise DataError(
                f"'{name}' may change the prompt, but is in none of the row's messages",
                where=where,
                next_step="if the target was given it, put it into a message, or tell deepspec data download "
                "--map which field it is; if not, move it into 'meta'",
            )
