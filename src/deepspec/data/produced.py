"""What the target wrote in a turn: its text as token ids, and its token ids as the message for its history.

A chat template renders a plain answer as

    prompt + lead + answer + tail

where the prompt ends with the generation prompt. The lead is what the target writes before the answer itself:
a space for Llama-2, `<|channel|>final<|message|>` for gpt-oss, nothing for most. The tail begins with the end
of turn. Text becomes ids where it stands in the rendered text, never in pieces: many tokenizers put a space
before a piece, or split it otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from deepspec.data.messages import Message
from deepspec.data.template import Template, as_served, decoded, stand_in
from deepspec.errors import DataError, TargetError

_ANSWER, _THOUGHTS = "DEEPSPEC-ANSWER-ENDS-HERE", stand_in(0)
"""Rendered instead of an answer and its thoughts, to see what the template writes around them."""
# Texts after which an answer may be tokenised, none of which merges with every answer.
_NEUTRAL = ("", "\n", ":", "0")


def plain(text: str, thoughts: str = "") -> Message:
    message = Message(role="assistant", content=text)
    return Message(**message, reasoning_content=thoughts) if thoughts else message


@dataclass(frozen=True)
class _Around:
    """What the template writes around a plain answer.

    head: all that comes before it, the lead included; closing: the tail up to the end of turn; end: the id of
    the end of turn, None without one; rest: how many ids follow it in the tail.
    """

    head: str
    lead: str
    tail: str
    closing: str
    end: int | None
    rest: int


def _around(chat: Template, before: Sequence[Message], prompt: str) -> _Around:
    """What is written around an answer to the messages in `before`, whose generation prompt is `prompt`."""
    head, found, tail = chat.write([*before, plain(_ANSWER)], ask=False).rpartition(_ANSWER)
    if not found:
        raise TargetError(
            "the target's chat template does not write the assistant's text unchanged",
            where=chat.where,
            next_step="check the template: no answer can be placed in its prompt",
        )
    lead = head[len(prompt) :] if head.startswith(prompt) else ""
    if lead:
        # The block for thoughts, which the template writes empty without any, is not the target's.
        written = chat.write([*before, plain(_ANSWER, _THOUGHTS)], ask=False)
        at = written.find(_THOUGHTS)
        if at >= len(prompt) and head.startswith(written[:at].rstrip()):
            lead = ""
    after, special = chat.ids(tail), chat.special()
    first = next((i for i, token in enumerate(after) if token in special), None)
    if first is None:
        return _Around(head, lead, tail, tail, None, 0)
    # The first special token, or the tokenizer's own end if that follows it at once.
    run = list(takewhile(special.__contains__, after[first:]))
    eos = chat.tokenizer.eos_token_id
    end = first + (run.index(eos) if eos in run else 0)
    closing = tail.partition(chat.tokenizer.convert_ids_to_tokens(after[end]))[0]
    return _Around(head, lead, tail, closing, after[end], len(after) - end - 1)


# -- text to ids -------------------------------------------------------------------------------------------


def produced(
    chat: Template, messages: Sequence[Message], prompt: str, asked: list[int], cut: bool
) -> list[int]:
    """The ids that the target wrote for the last message, its end of turn included unless it was `cut`.

    prompt: the generation prompt before the message, asked: its ids. An empty message has no ids.
    """
    *before, message = messages
    if not message["content"] and "tool_calls" not in message:
        return []
    around, special = _around(chat, before, prompt), chat.special()
    if message.keys() & {"tool_calls", "reasoning_content"}:
        if cut and "tool_calls" in message:
            raise _altered(chat, messages, "closes a tool call after which the answer was cut")
        text = _rendered(chat, messages, prompt, around)
    else:
        text = _said(chat, messages, prompt, around) + around.tail
    end = around.end
    if not text.endswith(around.tail):
        ids = _following(chat, prompt, asked, text)
        stop = next((i for i in reversed(range(len(ids))) if ids[i] in special), None)
        if stop is None or "tool_calls" not in message:
            raise _altered(chat, messages, "does not end the turn as it ends a plain answer")
        ids, end = ids[: stop + 1], ids[stop]
    elif end is None or cut:
        ids = _following(chat, prompt, asked, text.removesuffix(around.tail))
    else:
        # A special token separates texts, so what follows it is tokenised alike in any place.
        ids = _following(chat, prompt, asked, text)
        ids = ids[: len(ids) - around.rest]
    if end is not None and end in (ids if cut else ids[:-1]):
        raise DataError(
            f"the answer contains the end-of-turn token {chat.tokenizer.decode([end])!r}, at which the "
            "target would have stopped",
            where=chat.where,
            next_step="cut the answer's text before this token, which is added automatically",
        )
    return ids


def _following(chat: Template, prompt: str, asked: list[int], text: str) -> list[int]:
    """The ids of a text that follows a prompt with the ids `asked`."""
    whole = chat.ids(prompt + text)
    if whole[: len(asked)] == asked:
        return whole[len(asked) :]
    # A token reaches over the border, which the target, given the prompt's tokens, cannot have written. The
    # text is split as it is after some other text, from which it comes off cleanly.
    found = []
    for other in _NEUTRAL:
        start, both = chat.ids(other), chat.ids(other + text)
        if both[: len(start)] == start:
            found.append(both[len(start) :])
    wanted = decoded(chat.tokenizer, whole)
    return next((ids for ids in found if decoded(chat.tokenizer, [*asked, *ids]) == wanted), found[0])


def _said(chat: Template, messages: Sequence[Message], prompt: str, around: _Around) -> str:
    """What the target wrote for the last message, which is plain, up to the tail."""
    content, lead = messages[-1]["content"], around.lead
    if not lead:
        return content
    whole = chat.write(messages, ask=False)
    if whole != around.head + content + around.tail:
        if lead.isspace():
            content = content.lstrip()  # as the template takes it
        elif whole.startswith(prompt + content):
            return content  # with a lead of its own
    return lead + content


def _rendered(chat: Template, messages: Sequence[Message], prompt: str, around: _Around) -> str:
    """What the template writes for the last message, from where the target began to the end of the text.

    The generation prompt and what comes before a plain answer may differ by an empty think block, which the
    target did not write. A turn without thoughts begins where a plain answer's lead does; a turn with
    thoughts begins where the generation prompt ends.
    """
    *before, message = messages
    head = around.head
    # Stand-ins show whether every part is written, and in the order in which the target produces them.
    twin, marks = marked(message)
    written = chat.write([*before, twin], ask=False)
    if lost := [what for mark, what in marks.items() if mark not in written]:
        raise _altered(chat, messages, f"leaves out or changes {lost[0]}")
    places = [written.index(mark) for mark, what in marks.items() if what != ARGUMENT]
    if places != sorted(places):
        raise _altered(chat, messages, "does not write thoughts, text and tool calls in that order")

    whole = chat.write(messages, ask=False)
    start = prompt if "reasoning_content" in message else head.removesuffix(around.lead)
    if not whole.startswith(start) or not (head.startswith(prompt) or prompt.startswith(head)):
        if "reasoning_content" in message and not chat.thinking:
            raise DataError(
                f"message {len(messages)} (assistant) has thoughts, but thinking is off",
                where=chat.where,
                next_step="switch thinking on, or remove 'reasoning_content'",
            )
        raise _altered(chat, messages, "begins the turn differently from the generation prompt")
    text = whole[len(start) :]
    # The real texts show whether they are changed. Outer white space may be: servers differ there too.
    for given in (message.get("reasoning_content", ""), message["content"]):
        if given.strip() not in text:
            raise _altered(chat, messages, f"alters {given.strip()[:40]!r}")
    return text


CALL, ARGUMENT = "a tool call", "an argument of a tool call"


def marked(message: Message) -> tuple[Message, dict[str, str]]:
    """The message with stand-ins for its texts, names and arguments, and {stand-in: what it stands for}."""
    marks: dict[str, str] = {}

    def mark(value: Any, what: str) -> Any:
        if isinstance(value, dict):
            return {key: mark(item, what) for key, item in value.items()}
        if isinstance(value, list):
            return [mark(item, what) for item in value]
        if value == "":
            return value
        marks[name := stand_in(len(marks))] = what
        return name

    thoughts = mark(message.get("reasoning_content", ""), "'reasoning_content'")
    twin = plain(mark(message["content"], "the text"), thoughts)
    if "tool_calls" in message:
        twin["tool_calls"] = []
        for call in as_served(message)["tool_calls"]:
            name, arguments = call["function"]["name"], call["function"]["arguments"]
            function = {"name": mark(name, CALL), "arguments": mark(arguments, ARGUMENT)}
            twin["tool_calls"].append(call | {"function": function})
    return twin, marks


def _altered(chat: Template, messages: Sequence[Message], how: str) -> DataError:
    return DataError(
        f"message {len(messages)} (assistant): the target's chat template {how}, so it is unknown "
        "which tokens the target produced",
        where=chat.where,
        next_step="give the turn's tokens as 'answer_ids', or all that the target wrote as plain 'content'",
    )


# -- ids to a message --------------------------------------------------------------------------------------


def heard(chat: Template, messages: Sequence[Message], raw: str, bare: str, finished: bool) -> Message:
    """The message that stands for an answer to `messages` in the history, as a server's client sends it back.

    raw: its text without the end of turn; bare: the same without special tokens. Special tokens inside it are
    markup: what the template writes around thoughts and text is taken off, and markup that the template
    takes off itself stays in the text. Raises DataError if the template's answers have markup, but not this
    one, or another.
    """
    prompt = chat.write(messages, ask=True)
    around, special = _around(chat, messages, prompt), chat.special()
    closing = around.closing if finished and around.end is not None else ""
    names = chat.tokenizer.convert_ids_to_tokens(sorted(special))

    def holds(text: str) -> bool:
        return any(name in text for name in names)

    if not holds(raw) and not holds(around.lead):
        return plain(raw.removeprefix(around.lead).removesuffix(closing))
    thoughts, content = _unwrapped(chat, messages, prompt, around.lead, raw.removesuffix(closing))
    if content is not None and not holds(content):
        return plain(content, "" if holds(thoughts) else thoughts)
    if holds(around.lead):
        raise DataError(
            f"the answer does not have the form that the target's chat template gives to answers, "
            f"{around.lead!r} and the text: {raw[:60]!r}",
            where=chat.where,
            next_step="if this is a server's text without the special tokens, use a server that gives token "
            "ids (vLLM, llama-server); else ask only one question in this row",
        )
    try:
        written = chat.ids(chat.write([*messages, plain(raw)], ask=False))
    except DataError:
        return plain(bare)
    without = chat.ids(around.head + around.tail)
    understood = [i for i in written if i in special] == [i for i in without if i in special]
    return plain(raw if understood else bare)


def _unwrapped(
    chat: Template, messages: Sequence[Message], prompt: str, lead: str, raw: str
) -> tuple[str, str | None]:
    """(thoughts, text) of an answer, without what the template writes around them; no text if that is
    not around them."""
    written = chat.write([*messages, plain(_ANSWER, _THOUGHTS)], ask=False)
    opening, found, rest = written.removeprefix(prompt).partition(_THOUGHTS)
    if found and written.startswith(prompt):
        between = rest.partition(_ANSWER)[0]
        thoughts, ended, content = raw.rpartition(between) if between else ("", "", "")
        if ended:
            return thoughts.removeprefix(opening), content
        if raw.startswith(opening) and opening:
            return raw.removeprefix(opening), ""  # cut among the thoughts
    return "", raw.removeprefix(lead) if lead and raw.startswith(lead) else None
