"""Conversations on disk: one JSON object per line, UTF-8.

docs/data.md describes the schema, and the other formats that can be read. Three keys of ``meta`` have a
meaning here: ``tools`` (the JSON schemas that the chat template is given), ``answer_ids`` (the token ids that
the target produced: a list for the last assistant turn, or one list or null for each turn) and ``follow_ups``
(the later questions of a ``turns`` row).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from deepspec.data.formats import ended, parsed_row
from deepspec.data.identity import prompt_hash
from deepspec.data.messages import Message, last_trained
from deepspec.data.readers import jsonl_rows
from deepspec.data.schema import META, checked, names_of
from deepspec.data.skipping import Skipped, refuse
from deepspec.errors import DataError
from deepspec.files import atomic_file


@dataclass(frozen=True)
class Conversation:
    """One checked row. ``source`` ("file:line") is for error messages; rows are compared without it."""

    id: str
    domain: str | None
    messages: tuple[Message, ...]
    meta: dict[str, Any] = field(default_factory=dict)
    source: str | None = field(default=None, compare=False, repr=False)

    @property
    def where(self) -> str:
        """How an error message names this row."""
        return f"{self.source} (id {self.id})" if self.source else f"conversation {self.id}"


def read_conversations(
    path: str | Path, *, require_answer: bool = False, skipped: Skipped | None = None
) -> Iterator[Conversation]:
    """Yield the file's conversations one at a time, without its blank lines.

    Raises DataError, with ``file:line`` and what was expected, at the first row that breaks the schema, and
    with ``require_answer`` at the first conversation without an assistant turn. With ``skipped``, such rows
    are left out and counted there.
    """
    for where, row in jsonl_rows(Path(path), skipped):
        try:
            conversation = conversation_from_row(row, where)
            if require_answer:
                last_answer(conversation)
        except DataError as error:
            refuse(error, skipped)
        else:
            yield conversation


def conversation_from_row(row: object, where: str | None = None) -> Conversation:
    """Check one parsed row, in any of the formats. Raises DataError naming ``where``."""
    fields, messages = parsed_row(row, where)
    identity, domain = fields.pop("id", None), fields.pop("domain", None)
    meta = fields.pop("meta", None) or {}
    if twice := fields.keys() & meta.keys():
        raise DataError(
            f"{names_of(sorted(twice))} is both inside 'meta' and outside it",
            where=where,
            next_step="keep one",
        )
    meta |= fields
    if "answer_ids" in meta or "tools" in meta:
        meta = checked(META, meta, where)
    conversation = Conversation(identity or "", domain, messages, meta, where)
    if identity is None:
        conversation = replace(conversation, id=prompt_id(conversation))
    if "answer_ids" in meta:
        answer_ids_by_turn(conversation)
    return conversation


def write_conversations(path: str | Path, rows: Iterable[Conversation]) -> int:
    """Write all rows or none, and return their number; the file is fsynced and renamed into place.

    Rows may be a generator: only one is in memory at a time, and if it raises, the old file stays. Raises
    DataError for a row that ``read_conversations`` would refuse or that JSON cannot hold.
    """
    count = 0
    with atomic_file(Path(path)) as stream:
        for count, row in enumerate(rows, start=1):  # noqa: B007 (count is the result)
            stream.write(line_of(row))
    return count


def line_of(row: Conversation) -> bytes:
    """The row as a line of a file. Raises DataError as ``write_conversations`` does."""
    conversation_from_row(_row(row), row.where)
    return _json(row).encode("utf-8") + b"\n"


def content_hash(rows: Iterable[Conversation]) -> str:
    """SHA-256 (hex) of the rows in their order: ids, domains, messages and meta, not the file's spelling."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(_json(row, sort_keys=True).encode("utf-8") + b"\n")
    return digest.hexdigest()


def prompt_messages(conversation: Conversation) -> tuple[Message, ...]:
    """Everything before the last trained turn, or all messages if no turn is trained."""
    return conversation.messages[: last_trained(conversation.messages)]


def prompt_id(conversation: Conversation) -> str:
    """The default id of the row: the hash of its prompt, as 16 hex digits."""
    return prompt_hash(prompt_messages(conversation), conversation.meta.get("tools"))


def opening_question(conversation: Conversation) -> str:
    """The first user message. Splits go by it, so that the same question under another system prompt, or
    continued further, falls into the same set."""
    return next((m["content"] for m in conversation.messages if m["role"] == "user"), "")


def last_answer(conversation: Conversation) -> int:
    """Index of the last assistant turn that is trained on. Raises DataError if there is none."""
    index = last_trained(conversation.messages)
    if index is None and any(message["role"] == "assistant" for message in conversation.messages):
        raise DataError(
            "every assistant turn has weight 0: nothing is left to train on",
            where=conversation.where,
            next_step="remove the weights of the turns that the target wrote, or remove the row",
        )
    if index is None:
        raise DataError(
            "conversation without an assistant turn",
            where=conversation.where,
            next_step="training needs answers: have the target answer the prompts first "
            "(deepspec data regenerate), or remove the row",
        )
    return index


def answer_ids_by_turn(conversation: Conversation) -> list[list[int] | None]:
    """For each assistant turn the token ids that the target produced; None if the row does not hold them.

    Raises DataError if ``meta["answer_ids"]`` has one entry per turn, but for another number of turns.
    """
    turns = sum(message["role"] == "assistant" for message in conversation.messages)
    given = conversation.meta.get("answer_ids")
    if not given or isinstance(given[0], int):  # for the last turn alone
        return [*[None] * (turns - 1), given][-turns:] if turns else []
    if len(given) != turns:
        raise DataError(
            f"'answer_ids' has {len(given)} entries, but there are {turns} assistant turns",
            where=conversation.where,
            next_step="give one entry for each assistant turn, null where its ids are not known",
        )
    return given


def cut_turns(conversation: Conversation) -> Collection[int]:
    """Numbers of the assistant turns, counted from 1, whose answer did not end by itself.

    ``finished: false`` without ``cut_turns`` does not tell which of the answers it means, so it means all. A
    server's reason (``finish_reason``, ``stop_reason``) is that of the last answer.
    """
    turns = sum(message["role"] == "assistant" for message in conversation.messages)
    if str(conversation.meta.get("finished")).lower() == "false":  # a CSV file's is text
        given = conversation.meta.get("cut_turns")
        return given if isinstance(given, list) else range(1, turns + 1)
    return [] if ended(conversation.meta) else [turns]


def tools_of(conversation: Conversation) -> list[dict[str, Any]] | None:
    """The JSON schemas of the tools that the target was offered, for its chat template; None without any."""
    return conversation.meta.get("tools") or None


def _row(conversation: Conversation) -> dict[str, Any]:
    domain = {} if conversation.domain is None else {"domain": conversation.domain}
    meta = {"meta": conversation.meta} if conversation.meta else {}
    return {"id": conversation.id, **domain, "messages": list(conversation.messages), **meta}


def _json(conversation: Conversation, sort_keys: bool = False) -> str:
    try:
        text = json.dumps(_row(conversation), ensure_ascii=False, allow_nan=False, sort_keys=sort_keys)
        text.encode("utf-8")
        return text
    except (TypeError, ValueError) as error:
        raise DataError(f"the row cannot be written as JSON: {error}", where=conversation.where) from error
