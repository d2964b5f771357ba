"""A conversation that is being answered turn by turn.

A target must answer its own history: if a row holds several questions, each is asked after the target's own
answer to the one before, whatever the row's old answers were. Tool results are the exception. They belong to
the calls before them, so everything up to the last of them stays as it is, as context with weight 0, since it
is unknown who wrote it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from deepspec.data.conversations import Conversation, Message, tools_of
from deepspec.data.formats import REASONS
from deepspec.data.tokens import answer_message, prompt_ids
from deepspec.errors import DataError, UserError

OURS = ("answer_ids", "finished", "cut_turns", "follow_ups", "engine", *REASONS)
"""Keys that tell how a row was answered; they are never taken over from the row that was asked."""


def turns_of(conversation: Conversation) -> list[list[Message]]:
    """The messages before each answer that will be given; the first also has everything that stays as it is.

    Old answers are left out; the questions in `follow_ups` come last. Raises DataError if `follow_ups` is not
    a list of texts.
    """
    messages = conversation.messages
    results = [i for i, message in enumerate(messages) if message["role"] == "tool"]
    kept = results[-1] + 1 if results else 0
    turns: list[list[Message]] = []
    # A target does not read training weights.
    said = [cast(Message, {k: v for k, v in m.items() if k != "weight"}) for m in messages[:kept]]
    for message in messages[kept:]:
        if message["role"] == "assistant":
            turns.append(said)
            said = []
        else:
            said.append(message)
    if said:
        turns.append(said)
    later = conversation.meta.get("follow_ups") or []
    if not isinstance(later, list) or not all(isinstance(text, str) for text in later):
        raise DataError("'follow_ups' must be a list of questions", where=conversation.where)
    return [*turns, *([Message(role="user", content=text)] for text in later)]


@dataclass(eq=False)
class Dialogue:
    """A conversation under way. `turns`: the messages before each answer; `said`: every message so far."""

    conversation: Conversation
    turns: list[list[Message]]
    said: list[Message] = field(default_factory=list)
    ids: list[list[int] | None] = field(default_factory=list)
    """Each answer's token ids, or None if only its text is known."""
    cut: list[int] = field(default_factory=list)
    """Which answers ended at the budget, not by themselves, counted from 0."""
    tokens: int = 0
    """Tokens in all answers together."""
    begun: list[int] = field(default_factory=list)
    """The next answer's tokens so far, when decoding is interrupted to save them."""
    trouble: str | None = None
    """Why it cannot be answered."""
    broken: bool = False
    """Whether the target gave infinities or NaN for it."""
    exhausted: bool = False
    """Whether every attempt to have a server answer it failed."""

    @classmethod
    def begin(cls, conversation: Conversation) -> Dialogue:
        """The dialogue of a conversation, with nothing answered yet."""
        try:
            return cls(conversation, turns_of(conversation))
        except DataError as error:
            return cls(conversation, [], trouble=error.what)

    @property
    def answered(self) -> bool:
        return len(self.ids) == len(self.turns)

    @property
    def over(self) -> bool:
        """Whether nothing more is asked."""
        return self.answered or self.trouble is not None

    def prompt(self) -> list[Message]:
        """The messages that the next answer follows."""
        return [*self.said, *self.turns[len(self.ids)]]

    def prompt_ids(self, tokenizer: Any, thinking: bool, vocab_size: int | None) -> list[int]:
        """The prompt of the next answer by the target's template. Raises DataError if that refuses it."""
        conversation = self.conversation
        return prompt_ids(
            tokenizer,
            self.prompt(),
            thinking,
            tools=tools_of(conversation),
            where=conversation.where,
            vocab_size=vocab_size,
        )

    def answer(self, text: str | Message, ids: list[int] | None, finished: bool, tokens: int) -> None:
        """Add the next answer: its text or message, its ids if known, whether it ended by itself, its
        length."""
        message = Message(role="assistant", content=text) if isinstance(text, str) else text
        self.said = [*self.prompt(), message]
        if not finished:
            self.cut.append(len(self.ids))
        self.ids.append(ids)
        self.begun = []
        self.tokens += tokens

    def reply(
        self, tokenizer: Any, thinking: bool, text: str, ids: list[int] | None, finished: bool, tokens: int
    ) -> None:
        """Add the next answer as `answer` does, as the message that the template will write into the history.

        If the template cannot write it, the answer's ids are enough for the last turn. For an earlier turn,
        or without ids, the reason becomes `trouble`.
        """
        conversation = self.conversation
        message: str | Message
        try:
            message = answer_message(
                tokenizer,
                self.prompt(),
                text if ids is None else ids,
                thinking,
                finished=finished,
                tools=tools_of(conversation),
                where=conversation.where,
            )
        except UserError as error:
            if ids is None or len(self.ids) + 1 < len(self.turns):
                self.trouble = error.what
                return
            message = tokenizer.decode(ids, skip_special_tokens=True)
        self.answer(message, ids, finished, tokens)

    def state(self) -> dict[str, Any]:
        """What `restore` needs to continue from here, as plain data; all ids must be known."""
        return {name: getattr(self, name) for name in ("ids", "cut", "begun", "trouble", "broken")}

    def restore(self, tokenizer: Any, thinking: bool, state: Mapping[str, Any]) -> None:
        """Continue from the `state` of a dialogue of the same conversation."""
        for number, ids in enumerate(state["ids"]):
            self.reply(tokenizer, thinking, "", ids, number not in state["cut"], len(ids))
        self.begun, self.trouble, self.broken = state["begun"], state["trouble"], state["broken"]

    def row(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """The answered row: messages, the target's own ids if all are known, and the conditions.

        Assistant turns that are not this target's get weight 0. With one assistant turn `answer_ids` is a
        list of ids; with several it has one entry per turn: a list of ids, or null for a turn of weight 0.
        """
        conversation = self.conversation
        messages = [dict(message) for message in self.said]
        assistants = [message for message in messages if message["role"] == "assistant"]
        foreign = assistants[: len(assistants) - len(self.ids)]
        for message in foreign:
            message["weight"] = 0
        row: dict[str, Any] = {"id": conversation.id, "domain": conversation.domain, "messages": messages}
        if None not in self.ids:
            every = [*[None] * len(foreign), *self.ids]
            row["answer_ids"] = every[0] if len(every) == 1 else every
        row["finished"] = not self.cut
        if self.cut and len(assistants) > 1:
            row["cut_turns"] = [len(foreign) + turn + 1 for turn in self.cut]
        row |= facts
        rest = {key: value for key, value in conversation.meta.items() if key not in (*OURS, *facts)}
        return row | ({"meta": rest} if rest else {})
