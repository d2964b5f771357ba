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

from deepspec.data.conversations import (
    Conversation,
    answer_ids_by_turn,
    cut_turns,
    last_answer,
    prompt_messages,
    tools_of,
)
from deepspec.data.messages import Message, is_trained
from deepspec.data.produced import ARGUMENT, CALL, heard, marked, produced
from deepspec.data.template import Template, continued
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
            next_step="put the target's tokenizer files next to its config.json or GGUF file"
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
    chat = Template(tokenizer, thinking, tools, where)
    chat.check_seen(messages)
    for i, message in enumerate(messages):
        if "tool_calls" in message:
            _check_calls(chat, messages[: i + 1])
    ids = chat.ids(chat.write(messages, ask=True))
    check_embedded(tokenizer, ids, vocab_size, where)
    return ids


def conversation_prompt(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, thinking: bool, vocab_size: int | None
) -> list[int]:
    """`prompt_ids` of what a conversation asks: its messages before the last answer, with its tools."""
    return prompt_ids(
        tokenizer,
        prompt_messages(conversation),
        thinking,
        tools=tools_of(conversation),
        where=conversation.where,
        vocab_size=vocab_size,
    )


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


def answer_message(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    answer: Sequence[int] | str,
    thinking: bool,
    *,
    finished: bool,
    tools: list[dict[str, Any]] | None = None,
    where: str | None = None,
) -> Message:
    """The message that stands for an answer to ``messages`` in the prompts of later questions.

    ``answer``: its ids, with the end of turn if it has ``finished``, or its text if no ids are known.
    Raises DataError if the answer lacks the form in which the template writes answers.
    """
    chat = Template(tokenizer, thinking, tools, where)
    if isinstance(answer, str):
        return heard(chat, messages, answer, answer, finished)
    said = answer[:-1] if finished and answer and answer[-1] in chat.special() else answer
    raw, bare = (continued(tokenizer, said, skip_special=skip) for skip in (False, True))
    return heard(chat, messages, raw, bare, finished)


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
    cut = cut_turns(conversation)
    chat = Template(tokenizer, thinking, tools_of(conversation), conversation.where)
    turns: dict[int, tuple[list[int], list[int]]] = {}
    assistants = (i for i, message in enumerate(messages) if message["role"] == "assistant")
    for number, index in enumerate(assistants, start=1):
        if not is_trained(messages[index]):
            if "tool_calls" in messages[index]:
                _check_calls(chat, messages[: index + 1])
            continue
        known = given[number - 1]
        prompt = chat.write(messages[:index], ask=True)
        asked = chat.ids(prompt)
        answer = known
        if answer is None:
            answer = produced(chat, messages[: index + 1], prompt, asked, number in cut)
        if not answer:
            raise DataError(
                f"all-zero loss mask: empty answer in message {index + 1}, there is nothing to supervise",
                where=conversation.where,
                next_step="have the target answer the prompt again, or remove the row",
            )
        turns[number] = (asked, answer)
    trained = [i for i, message in enumerate(messages) if is_trained(message)]
    chat.check_seen(messages[:-1], trained)
    rows = _sequences(conversation.id, turns)
    for row in rows:
        check_embedded(tokenizer, row.ids, vocab_size, conversation.where)
    fitting = (replace(r, ids=r.ids[:max_length], loss_mask=r.loss_mask[:max_length]) for r in rows)
    kept = [row for row in fitting if any(row.loss_mask)]
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


def _check_calls(chat: Template, messages: Sequence[Message]) -> None:
    """Raise DataError if the template leaves out a tool call of the last message, or a part of it."""
    *before, message = messages
    twin, marks = marked(message)
    written = chat.write([*before, twin], ask=False)
    for mark, what in marks.items():
        if what in (CALL, ARGUMENT) and mark not in written:
            raise chat.left_out(f"or changes {what} of message {len(messages)} (assistant)", "the row")
