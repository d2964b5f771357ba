"""From conversations to token ids and loss masks, through the target's own chat template (docs/masks.md).

A draft must learn what the target *saw and produced*, so the supervised tokens are built, not searched for in
rendered text: a turn is its generation prompt (mask 0), then the answer and the end of turn (mask 1).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from deepspec.data.conversations import Conversation, answer_ids_by_turn, last_answer, tools_of
from deepspec.data.messages import Message, is_trained
from deepspec.data.template import Template, as_served, stand_in
from deepspec.errors import DataError, TargetError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Encoded:
    """One training sequence. ``loss_mask[i]`` is 1 if and only if the target produced ``ids[i]``."""

    ids: list[int]
    loss_mask: list[int]
    id: str


class OverlongError(DataError):
    """No supervised token of a row lies within the requested length."""


class UnembeddedError(DataError):
    """A row holds a token id that the target's embedding has no row for."""


def require_tokenizer(
    tokenizer: PreTrainedTokenizerBase | None, target: str, otherwise: str = ""
) -> PreTrainedTokenizerBase:
    """The tokenizer of the target with that name. Raises TargetError if it has none."""
    if tokenizer is None:
        raise TargetError(
            f"{target} has no tokenizer, so text cannot become tokens",
            next_step="put the target's tokenizer files next to its config"
            + (otherwise and f", or {otherwise}"),
        )
    return tokenizer


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    thinking: bool,
    *,
    tools: list[dict[str, Any]] | None = None,
    where: str | None = None,
    vocab_size: int | None = None,
) -> list[int]:
    """The ids that the target is given before it answers ``messages``, offered ``tools``.

    ``thinking`` always goes to the template, on or off, because templates disagree on its default.
    ``vocab_size``: of the target's embedding; None checks no id. Raises TargetError without a chat template,
    or if it has no switch for thinking; DataError (naming ``where``) if the template refuses the messages or
    leaves out a part; UnembeddedError for an id without an embedding.
    """
    chat = _Chat(tokenizer, thinking, tools, where)
    chat.check_seen(messages)
    for i, message in enumerate(messages):
        if "tool_calls" in message:
            _check_calls(chat, messages[: i + 1])
    ids = chat.ids(chat.write(messages, ask=True))
    check_embedded(tokenizer, ids, vocab_size, where)
    return ids


def check_embedded(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], vocab_size: int | None, where: str | None
) -> None:
    """Raise UnembeddedError, naming ``where``, for an id past an embedding of ``vocab_size`` rows."""
    outside = next((i for i in ids if vocab_size is not None and not 0 <= i < vocab_size), None)
    if outside is not None:
        token = tokenizer.added_tokens_decoder.get(outside)
        raise UnembeddedError(
            f"token {outside}{f' ({str(token)!r})' if token else ''} has no row in the target's embedding, "
            f"which has {vocab_size}",
            where=where,
            next_step="remove the row, or its 'answer_ids' if they are another model's; a token that was "
            "added to the tokenizer needs a target whose embedding was resized for it",
        )


def encode_turns(
    tokenizer: PreTrainedTokenizerBase,
    conversation: Conversation,
    thinking: bool,
    max_length: int | None = None,
    vocab_size: int | None = None,
) -> list[Encoded]:
    """The fewest sequences that supervise every trained turn exactly once, in order.

    The last one has the row's id; one for an earlier turn alone is called ``ID#TURN``, counted from 1 over
    all assistant turns. The first ``max_length`` tokens of each sequence are kept, and sequences without a
    supervised token are dropped, as are messages after the last trained turn. ``vocab_size``: as for
    ``prompt_ids``.

    Raises DataError, naming the row, if no turn is trained, if an answer is empty or contains the end-of-turn
    token, or if the template refuses, leaves out or alters a part; UnembeddedError for an id without an
    embedding; OverlongError if no supervised token is left after the cut; TargetError if the chat template is
    missing, loses answers, or has no switch for thinking.
    """
    last = last_answer(conversation)
    messages, given = conversation.messages[: last + 1], answer_ids_by_turn(conversation)
    chat = _Chat(tokenizer, thinking, tools_of(conversation), conversation.where)
    turns: dict[int, tuple[list[int], list[int]]] = {}
    assistants = (i for i, message in enumerate(messages) if message["role"] == "assistant")
    for number, index in enumerate(assistants, start=1):
        if not is_trained(messages[index]):
            if "tool_calls" in messages[index]:
                _check_calls(chat, messages[: index + 1])
            continue
        known = given[number - 1]
        prompt = chat.write(messages[:index], ask=True)
        answer = _answer(chat, messages[: index + 1], prompt) if known is None else known
        if not answer:
            raise DataError(
                f"all-zero loss mask: empty answer in message {index + 1}, there is nothing to supervise",
                where=conversation.where,
                next_step="have the target answer the prompt again, or remove the row",
            )
        turns[number] = (chat.ids(prompt), answer)
    trained = [i for i, message in enumerate(messages) if is_trained(message)]
    chat.check_seen(messages[:-1], trained)
    rows = _sequences(conversation.id, turns)
    for row in rows:
        check_embedded(tokenizer, row.ids, vocab_size, conversation.where)
    cut = (replace(r, ids=r.ids[:max_length], loss_mask=r.loss_mask[:max_length]) for r in rows)
    kept = [row for row in cut if any(row.loss_mask)]
    if not kept:
        shortest = min(row.loss_mask.index(1) for row in rows)
        raise OverlongError(
            f"all-zero loss mask: truncated before the answer (the prompt is {shortest} tokens, "
            f"max_length is {max_length})",
            where=conversation.where,
            next_step=f"raise max_length above {shortest}, or remove the row",
        )
    return kept


def _sequences(name: str, turns: Mapping[int, tuple[list[int], list[int]]]) -> list[Encoded]:
    """The sequences of a row with that id; ``turns``: number -> (prompt, answer), in order.

    A sequence that holds a turn also holds every turn in that turn's prompt. So taking the latest turn that
    is not supervised yet, until none is left, needs the fewest sequences.
    """
    found: list[Encoded] = []
    waiting = list(turns)
    while waiting:
        number = waiting.pop()
        prompt, answer = turns[number]
        mask = [0] * len(prompt) + [1] * len(answer)
        for earlier in tuple(waiting):
            before, said = turns[earlier]
            end = len(before) + len(said)
            if prompt[:end] == before + said:
                mask[len(before) : end] = [1] * len(said)
                waiting.remove(earlier)
        found.append(Encoded(prompt + answer, mask, f"{name}#{number}" if found else name))
    return found[::-1]


def system_hash(messages: Sequence[Message]) -> str | None:
    """SHA-256 (hex) of a conversation's system prompt; None without one."""
    if not messages or messages[0]["role"] != "system":
        return None
    return hashlib.sha256(messages[0]["content"].encode("utf-8")).hexdigest()


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 (hex) of what decides how text becomes ids: vocabulary, merges, splitting, special tokens.

    It leaves out the chat template (see ``template_hash``), and the padding and truncation that an earlier
    call may have switched on.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        state = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    else:
        state = json.loads(backend.to_str())
        state.pop("padding", None)
        state.pop("truncation", None)
    state["special"] = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode("utf-8")).hexdigest()


# Rendered instead of an answer, to see what the template writes around it. It has no white space that a
# template would strip, and no markup that a template would interpret.
_STAND_IN = "DEEPSPEC-ANSWER-ENDS-HERE"


@dataclass(frozen=True)
class _Chat(Template):
    """A template, and the tokens of what it writes."""

    def ids(self, text: str) -> list[int]:
        # The template has written all special tokens already.
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def special(self) -> set[int]:
        added = self.tokenizer.added_tokens_decoder
        return {*self.tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}


def _answer(chat: _Chat, messages: Sequence[Message], prompt: str) -> list[int]:
    """Ids of the last message with its end of turn; ``prompt`` is the generation prompt before it."""
    *before, message = messages
    if not message["content"] and "tool_calls" not in message:
        return []
    head, found, tail = chat.write([*before, _plain(_STAND_IN)], ask=False).rpartition(_STAND_IN)
    if not found:
        raise TargetError(
            "the target's chat template does not write the assistant's text unchanged",
            where=chat.where,
            next_step="check the template: no answer can be placed in its prompt",
        )
    special, after = chat.special(), chat.ids(tail)
    first = next((i for i, token in enumerate(after) if token in special), None)
    end = [] if first is None else after[: first + 1]
    if "tool_calls" not in message and "reasoning_content" not in message:
        body = chat.ids(message["content"])
    else:
        text = _rendered(chat, messages, prompt, head)
        body = chat.ids(text.removesuffix(tail))
        if not text.endswith(tail):
            stop = next((i for i in reversed(range(len(body))) if body[i] in special), None)
            if stop is None or "tool_calls" not in message:
                raise _altered(chat, messages, "does not end the turn as it ends a plain answer")
            body, end = body[:stop], body[stop : stop + 1]
    if end and end[-1] in body:
        raise DataError(
            f"the answer contains the end-of-turn token {chat.tokenizer.decode(end[-1:])!r}, at which the "
            "target would have stopped",
            where=chat.where,
            next_step="cut the answer's text before this token, which is added automatically",
        )
    return body + end


def _plain(text: str) -> Message:
    return Message(role="assistant", content=text)


def _rendered(chat: _Chat, messages: Sequence[Message], prompt: str, head: str) -> str:
    """What the template writes for the last message, from where the target began to the end of the text.

    ``prompt``: the generation prompt; ``head``: what the template writes before a plain answer. One may be
    longer than the other by an empty think block, which the target did not write. A turn without thoughts
    begins where a plain answer does; a turn with thoughts begins where the generation prompt ends.
    """
    *before, message = messages
    # Stand-ins show whether every part is written, and in the order in which the target produces them.
    twin, marks = _marked(message)
    written = chat.write([*before, twin], ask=False)
    if lost := [what for mark, what in marks.items() if mark not in written]:
        raise _altered(chat, messages, f"leaves out or changes {lost[0]}")
    places = [written.index(mark) for mark, what in marks.items() if what != _ARGUMENT]
    if places != sorted(places):
        raise _altered(chat, messages, "does not write thoughts, text and tool calls in that order")

    whole = chat.write(messages, ask=False)
    start = prompt if "reasoning_content" in message else head
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


_CALL, _ARGUMENT = "a tool call", "an argument of a tool call"


def _marked(message: Message) -> tuple[Message, dict[str, str]]:
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
    twin = _plain(mark(message["content"], "the text"))
    if thoughts:
        twin["reasoning_content"] = thoughts
    if "tool_calls" in message:
        twin["tool_calls"] = []
        for call in as_served(message)["tool_calls"]:
            name, arguments = call["function"]["name"], call["function"]["arguments"]
            function = {"name": mark(name, _CALL), "arguments": mark(arguments, _ARGUMENT)}
            twin["tool_calls"].append(call | {"function": function})
    return twin, marks


def _check_calls(chat: _Chat, messages: Sequence[Message]) -> None:
    """Raise DataError if the template leaves out a tool call of the last message, or a part of it."""
    *before, message = messages
    twin, marks = _marked(message)
    written = chat.write([*before, twin], ask=False)
    for mark, what in marks.items():
        if what in (_CALL, _ARGUMENT) and mark not in written:
            raise chat.left_out(f"or changes {what} of message {len(messages)} (assistant)", "the row")


def _altered(chat: _Chat, messages: Sequence[Message], how: str) -> DataError:
    return DataError(
        f"message {len(messages)} (assistant): the target's chat template {how}, so it is unknown "
        "which tokens the target produced",
        where=chat.where,
        next_step="give the turn's tokens as 'answer_ids', or all that the target wrote as plain 'content'",
    )
