"""One conversation being answered turn by turn: what has been said, and what is still to be said before each
answer.

A target must answer its own history: where a row holds several questions, each is asked after the target's
own answer to the one before, whatever the row's old answers were. Tool results are the exception. They belong
to the calls that stand before them, so everything up to the last of them stays as it is: as context, since
nobody knows who wrote it (weight 0).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, cast

from deepspec.data.conversations import Conversation, Message
from deepspec.errors import DataError

OURS = ("answer_ids", "finished", "follow_ups")
"""Keys of an answered row that say how it was answered: never carried over from the row that was asked."""


def turns_of(conversation: Conversation) -> list[list[Message]]:
    """What is said before each answer to be given, the first with everything that stays as it is.

    Old answers fall away; the questions waiting in `follow_ups` come last. Raises DataError where
    `follow_ups` is not a list of texts.
    """
    messages = conversation.messages
    results = [i for i, message in enumerate(messages) if message["role"] == "tool"]
    kept = results[-1] + 1 if results else 0
    turns: list[list[Message]] = []
    said = [_unweighted(message) for message in messages[:kept]]
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
    """A conversation on its way. `turns`: what is said before each answer; `said`: everything so far."""

    conversation: Conversation
    turns: list[list[Message]]
    said: list[Message] = field(default_factory=list)
    ids: list[list[int] | None] = field(default_factory=list)
    """Each answer's token ids, None where only its text is known."""
    finished: bool = True
    """Every answer ended by itself, not at the budget."""
    tokens: int = 0
    """Of all answers."""
    trouble: str | None = None
    """Why it cannot be answered."""

    @classmethod
    def begin(cls, conversation: Conversation) -> Dialogue:
        return cls(conversation, turns_of(conversation))

    @property
    def answered(self) -> bool:
        return len(self.ids) == len(self.turns)

    def prompt(self) -> list[Message]:
        """Everything that the next answer answers."""
        return [*self.said, *self.turns[len(self.ids)]]

    def answer(self, text: str, ids: list[int] | None, finished: bool, tokens: int) -> None:
        """Take the next answer: its text, its ids where known, whether it ended by itself, its length."""
        self.said = [*self.prompt(), Message(role="assistant", content=text)]
        self.ids.append(ids)
        self.finished = self.finished and finished
        self.tokens += tokens

    def row(self, facts: dict[str, Any]) -> dict[str, Any]:
        """The answered row: messages, the target's own ids where all are known, and the conditions.

        Assistant turns that are not this target's get weight 0. `answer_ids` is the list of ids where there
        is one assistant turn, else one entry for each: a list of ids, or null for a turn of weight 0.
        """
        conversation = self.conversation
        messages = [dict(message) for message in self.said]
        assistants = [message for message in messages if message["role"] == "assistant"]
        foreign = assistants[: len(assistants) - len(self.ids)]
        for message in foreign:
            message["weight"] = 0
        row: dict[str, Any] = {
            "id": conversation.id,
            "domain": conversation.domain,
            "messages": messages,
        }
        if None not in self.ids:
            every = [*[None] * len(foreign), *self.ids]
            row["answer_ids"] = every[0] if len(every) == 1 else every
        row |= {"finished": self.finished, **facts}
        rest = carried(conversation.meta, (*OURS, *facts))
        return row | ({"meta": rest} if rest else {})


def _unweighted(message: Message) -> Message:
    """Without the weight that it was given for training: no part of what a target reads."""
    return cast(Message, {key: value for key, value in message.items() if key != "weight"})


def carried(meta: dict[str, Any], ours: Collection[str]) -> dict[str, Any]:
    """What a row brought along beside its messages and keeps when it is answered."""
    return {key: value for key, value in meta.items() if key not in ours}
