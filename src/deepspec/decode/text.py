"""The text of an answer, in runs by who produced it: the draft or the target."""

from __future__ import annotations

from typing import Any

from deepspec.decode.engine import Generation

Piece = tuple[str, bool]
"""Some text, and whether the draft proposed it."""


class TextStream:
    """Turns an answer into text while it grows."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._shown = ""
        self._read = 0

    def new(self, answer: Generation, *, finished: bool) -> list[Piece]:
        """What was not returned before, without the stop token.

        Everything is decoded from the start each time: a character may be spread over tokens of both. A
        character that is not complete yet is held back until it is, or until the answer has finished.
        """
        ids = answer.token_ids[: -1 if answer.stopped else None]
        pieces: list[Piece] = []
        # The last token again at the end: it may have held a character back.
        for i in range(max(0, min(self._read, len(ids) - finished)), len(ids)):
            last, drafted = i + 1 == len(ids), answer.from_draft[i]
            if not last and answer.from_draft[i + 1] == drafted:
                continue
            text = self.tokenizer.decode(ids[: i + 1], skip_special_tokens=True)
            if not (last and finished):
                text = text.rstrip("\ufffd")
            if len(text) > len(self._shown):
                pieces.append((text[len(self._shown) :], drafted))
                self._shown = text
        self._read = len(ids)
        return pieces


def pieces_of(tokenizer: Any, answer: Generation) -> list[Piece]:
    """The text of a whole answer in runs, without the stop token."""
    return TextStream(tokenizer).new(answer, finished=True)
