"""Conversations on disk: one JSON object per line, UTF-8, one documented schema.

What is written::

    {"id": "…", "domain": "math", "messages": [{"role": "user", "content": "…"}, …], "meta": {…}}

* ``messages``: at least one; roles ``system``, ``user``, ``assistant``, ``tool``. A system message may only
  come first; then a user; an assistant answers a user or a tool; a tool follows an assistant or a tool.
  Beside ``role`` and ``content`` an assistant may have ``tool_calls`` (OpenAI's form, ``arguments`` an object
  or its JSON text), ``reasoning_content`` and ``weight`` (0: context only, not the target's own turn), a tool
  ``tool_call_id``, and everyone ``name``. Content may be null where there are tool calls, and a list of text
  parts; both are kept as one text.
* ``id`` (optional): defaults to the first 16 hex digits of the SHA-256 of the normalised prompt, so a prompt
  keeps its id when it is answered, or answered again.
* ``domain`` (optional): the group that results are reported under.
* ``meta`` (optional): anything else. Other top-level keys are gathered into it, so nothing is lost. Checked
  here and used by ``data.tokens``: ``tools`` (the JSON schemas that the chat template is given) and
  ``answer_ids`` (token ids that the target produced: a list for the last assistant turn, or one list or null
  for each turn). ``follow_ups`` holds the later questions of a ``turns`` row.

Also accepted when reading (the first form present wins; the others' keys then go to ``meta``):

* ``{"conversations": [{"from": "human" | "gpt" | "system", "value": "…"}]}`` (ShareGPT);
* ``{"turns": ["first question", "follow-up", …]}``: the first question is the conversation, the others
  wait in ``meta["follow_ups"]``, because each makes sense only after an answer that does not exist yet;
* ``{"prompt": "…", "response": "…"}``, response optional;
* ``{"request": {"messages": […], …}, "response": {"choices": […], …}}``: a line of a request log
  (``data.forms``; ``body`` instead of ``request`` too).
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from deepspec.data.forms import openai_row
from deepspec.data.lines import Skipped, refuse, text_lines
from deepspec.data.messages import (
    Message,
    check_order,
    is_trained,
    items_of,
    kind_of,
    messages_from,
    names_of,
    no_constant,
    text_of,
)
from deepspec.errors import DataError, nearest
from deepspec.files import atomic_file


@dataclass(frozen=True)
class Conversation:
    """One validated row. ``source`` ("file:line") is for error messages only, not for comparing rows."""

    id: str
    domain: str | None
    messages: tuple[Message, ...]
    meta: dict[str, Any] = field(default_factory=dict)
    source: str | None = field(default=None, compare=False, repr=False)

    @property
    def where(self) -> str:
        """How an error message names this row."""
        return f"{self.source} (id {self.id})" if self.source else f"conversation {self.id}"


FORMS = ("messages", "conversations", "turns", "prompt")
EXAMPLE = '{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}'


def read_conversations(
    path: str | Path, *, require_answer: bool = False, skipped: Skipped | None = None
) -> Iterator[Conversation]:
    """Yield the file's conversations one at a time; blank lines are skipped.

    Raises DataError, with ``file:line`` and what was expected, at the first row that breaks the schema, and
    with ``require_answer`` also at a conversation without an assistant turn. With ``skipped`` such rows are
    left out and counted there.
    """
    for where, row in read_rows(path, skipped):
        try:
            conversation = conversation_from_row(row, where)
            if require_answer:
                last_answer(conversation)
        except DataError as error:
            refuse(error, skipped)
            continue
        yield conversation


def read_rows(path: str | Path, skipped: Skipped | None = None) -> Iterator[tuple[str, object]]:
    """("file:line", parsed JSON) of every line that is not blank, in whatever form. Errors as above."""
    for where, text in text_lines(Path(path), skipped):
        if not text.strip():
            continue
        try:
            row = _parse(text, where)
        except DataError as error:
            refuse(error, skipped)
            continue
        yield where, row


def conversation_from_row(row: object, where: str | None = None) -> Conversation:
    """Validate one parsed row (any accepted form). Raises DataError naming ``where``."""
    if not isinstance(row, dict):
        raise DataError(
            f"expected a JSON object, found {kind_of(row)}",
            where=where,
            next_step=_object_a_line(isinstance(row, list)),
        )
    row = openai_row(row, where)
    form = next((name for name in FORMS if row.get(name) is not None), None)
    if form is None:
        raise _no_messages(row, where)
    rest = {key: value for key, value in row.items() if key not in ("id", "domain", "meta", form)}
    meta = _optional(row, "meta", dict, "an object", where)
    if form == "prompt":
        messages = _from_prompt(row, where)
        rest.pop("response", None)
    elif form == "turns":
        messages, follow_ups = _from_turns(row["turns"], where)
        if follow_ups:
            rest["follow_ups"] = follow_ups
    else:
        messages = messages_from(row[form], form, where)
    check_order(messages, where)
    twice = sorted(set(rest) & set(meta or {}))
    if twice:
        raise DataError(
            f"{names_of(twice)} is both beside and inside 'meta'", where=where, next_step="keep one"
        )
    identity = _optional(row, "id", str, "a string", where)
    conversation = Conversation(
        id=identity or "",
        domain=_optional(row, "domain", str, "a string", where),
        messages=messages,
        meta={**(meta or {}), **rest},
        source=where,
    )
    if identity is None:
        conversation = replace(conversation, id=prompt_id(conversation))
    answer_ids_by_turn(conversation)
    tools_of(conversation)
    return conversation


def write_conversations(path: str | Path, rows: Iterable[Conversation]) -> int:
    """Write all rows or nothing: beside, fsync, rename. Returns the number of rows.

    Rows may be a generator: memory stays flat, and if it raises, the file that was there stays as it was.
    Raises DataError for a row that ``read_conversations`` would refuse or that JSON cannot hold.
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
    """Everything before the last trained turn; all messages where there is none."""
    index = _last_trained(conversation.messages)
    return conversation.messages if index is None else conversation.messages[:index]


def last_answer(conversation: Conversation) -> int:
    """Index of the last assistant turn that is trained on. Raises DataError when there is none."""
    index = _last_trained(conversation.messages)
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


def answer_ids(conversation: Conversation) -> list[int] | None:
    """The token ids that the target produced for the last assistant turn, where the row carries them.

    Raises DataError as `answer_ids_by_turn` does.
    """
    by_turn = answer_ids_by_turn(conversation)
    return by_turn[-1] if by_turn else None


def answer_ids_by_turn(conversation: Conversation) -> list[list[int] | None]:
    """For each assistant turn the token ids that the target produced; None where the row does not carry them.

    Raises DataError when ``meta["answer_ids"]`` is neither a list of non-negative integers, for the last
    turn, nor a list of such lists and nulls, one for each turn.
    """
    turns = sum(message["role"] == "assistant" for message in conversation.messages)
    given = conversation.meta.get("answer_ids")
    if given is None or _are_ids(given):
        return [*[None] * (turns - 1), given][-turns:] if turns else []
    if not isinstance(given, list) or not all(entry is None or _are_ids(entry) for entry in given):
        raise DataError(
            "'answer_ids' must be a list of non-negative integers, or a list of such lists and nulls, one "
            "for each assistant turn",
            where=conversation.where,
            next_step="remove it to have the answers' text tokenised instead",
        )
    if len(given) != turns:
        raise DataError(
            f"'answer_ids' has {len(given)} entries, but there are {turns} assistant turns",
            where=conversation.where,
            next_step="give one entry for each assistant turn, null where its ids are not known",
        )
    return given


def tools_of(conversation: Conversation) -> list[dict[str, Any]] | None:
    """The JSON schemas of the tools that the target was offered, for its chat template; None without any.

    Raises DataError when ``meta["tools"]`` is not a list of objects.
    """
    tools = conversation.meta.get("tools")
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) and tool for tool in tools):
        raise DataError(
            "'tools' must be a list of JSON schemas, one object for each tool",
            where=conversation.where,
            next_step='for example [{"type": "function", "function": {"name": "…", "parameters": {…}}}]',
        )
    return tools


def prompt_id(conversation: Conversation) -> str:
    """16 hex digits of the SHA-256 of the normalised prompt (`prompt_messages`): the id of a row that brings
    none, the same for every spelling and every answer."""
    # "\0" cannot survive normalising as white space would, so message boundaries stay part of the hash; a
    # single question is hashed as it stands.
    parts = [
        normalise(m["content"]) + _sorted_json(m.get("tool_calls")) for m in prompt_messages(conversation)
    ]
    prompt = "\0".join(parts) + _sorted_json(conversation.meta.get("tools"))
    return hashlib.sha256(prompt.encode("utf-8")).hexdigest()[:16]


def opening_question(conversation: Conversation) -> str:
    """The first user message: what to give ``holdout_bucket``, so that the same question under another system
    prompt, or continued further, falls on the same side of a split."""
    return next((m["content"] for m in conversation.messages if m["role"] == "user"), "")


def normalise(prompt_text: str) -> str:
    """NFKC, case folded, white space runs made one space: spellings of one prompt that count as the same."""
    return " ".join(unicodedata.normalize("NFKC", prompt_text).casefold().split())


def holdout_bucket(prompt_text: str) -> float:
    """A number in [0, 1) that depends on the normalised prompt alone.

    ``bucket < 0.02`` holds out two per cent: every run, machine and duplicate of a prompt decides alike, so a
    held-out prompt cannot leak into training through another copy or another order of the rows.
    """
    digest = hashlib.sha256(b"holdout\0" + normalise(prompt_text).encode("utf-8")).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53  # 53 bits: the quotient is exact, never 1.0


# -- reading -----------------------------------------------------------------------------------------------


def _parse(text: str, where: str) -> object:
    try:
        return json.loads(text.rstrip("\r\n"), parse_constant=no_constant)
    except json.JSONDecodeError as error:
        what = f"malformed JSON: {error.msg} at column {error.colno}"
        if not text.endswith("\n"):
            what += " (the line has no end: was the file cut while it was written?)"
        raise DataError(what, where=where, next_step=_object_a_line(text.startswith("["))) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"malformed JSON: {error}", where=where, next_step=_object_a_line()) from error


def _object_a_line(array: bool = False) -> str:
    """What to do about a line that is no object; one JSON array of all rows is the usual reason."""
    return (
        "if the file is one array of rows: jq -c '.[]' in.json > out.jsonl"
        if array
        else f"write one object per line: {EXAMPLE}"
    )


def _no_messages(row: Mapping[str, object], where: str | None) -> DataError:
    forms = (*FORMS, "request")
    if null := next((name for name in forms if name in row and row[name] is None), None):
        return DataError(f"'{null}' is null", where=where, next_step=f"expected: {EXAMPLE}")
    close = next((f"'{key}': did you mean '{near}'?" for key in row if (near := nearest(key, forms))), None)
    found = close or (names_of(list(row)[:8]) if row else "an empty object")
    return DataError(
        f"no 'messages' (nor 'conversations', 'turns', 'prompt', 'request'); found {found}",
        where=where,
        next_step=f"expected: {EXAMPLE}",
    )


def _from_prompt(row: Mapping[str, object], where: str | None) -> tuple[Message, ...]:
    messages = [Message(role="user", content=text_of(row["prompt"], "'prompt'", where))]
    if row.get("response") is not None:
        messages.append(Message(role="assistant", content=text_of(row["response"], "'response'", where)))
    return tuple(messages)


def _from_turns(turns: object, where: str | None) -> tuple[tuple[Message, ...], list[str]]:
    texts = [
        text_of(turn, f"turn {i}", where) for i, turn in enumerate(items_of(turns, "turns", where), start=1)
    ]
    return (Message(role="user", content=texts[0]),), texts[1:]


def _optional(row: Mapping[str, Any], key: str, kind: type, expected: str, where: str | None) -> Any:
    value = row.get(key)
    if value is not None and not isinstance(value, kind):
        raise DataError(f"'{key}' must be {expected}, found {kind_of(value)}", where=where)
    return text_of(value, f"'{key}'", where) if isinstance(value, str) else value


def _are_ids(value: object) -> bool:
    return isinstance(value, list) and all(type(token) is int and token >= 0 for token in value)


# -- writing and hashing -----------------------------------------------------------------------------------


def _row(conversation: Conversation) -> dict[str, Any]:
    row: dict[str, Any] = {"id": conversation.id}
    if conversation.domain is not None:
        row["domain"] = conversation.domain
    row["messages"] = list(conversation.messages)
    if conversation.meta:
        row["meta"] = conversation.meta
    return row


def _json(conversation: Conversation, sort_keys: bool = False) -> str:
    try:
        text = json.dumps(_row(conversation), ensure_ascii=False, allow_nan=False, sort_keys=sort_keys)
        text.encode("utf-8")
        return text
    except (TypeError, ValueError) as error:
        raise DataError(f"'meta' cannot be written as JSON: {error}", where=conversation.where) from error


def _last_trained(messages: tuple[Message, ...]) -> int | None:
    return next((i for i in reversed(range(len(messages))) if is_trained(messages[i])), None)


def _sorted_json(value: object) -> str:
    """JSON with sorted keys; nothing at all for nothing."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False) if value else ""
