"""What a file of conversations becomes when it is trained on: totals, lengths, what is cut and refused, and
one row's sequences, token by token.

Rows stream: memory grows by a length and a hash for each, whatever they hold.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

from deepspec.data.conversations import Conversation, prompt_id, prompt_messages, tools_of
from deepspec.data.messages import is_trained
from deepspec.data.tokens import Encoded, added_ids, encode_turns, prompt_ids
from deepspec.errors import DataError
from deepspec.log import Bar

if TYPE_CHECKING:
    from deepspec.data.tokens import PreTrainedTokenizerBase

NO_DOMAIN = "(none)"
PROBLEMS_SHOWN = 20


@dataclass
class Counts:
    """What rows add up to: of all of them, or of a domain's. `prompts`: rows that nobody has answered yet."""

    rows: int = 0
    sequences: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    prompts: int = 0
    prompt_tokens: int = 0

    def add(self, sequences: Sequence[Encoded], prompt: Encoded | None) -> None:
        self.rows += 1
        self.sequences += len(sequences)
        self.tokens += sum(len(row.ids) for row in sequences)
        self.supervised_tokens += sum(sum(row.loss_mask) for row in sequences)
        if prompt is not None:
            self.prompts += 1
            self.prompt_tokens += len(prompt.ids)


@dataclass
class Cut:
    """What `max_length` takes away. `without_answer`: sequences and unanswered prompts that fill it before an
    answer begins; training leaves them out."""

    sequences: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    without_answer: int = 0

    def add(self, row: Encoded, max_length: int) -> None:
        if len(row.ids) > max_length:
            self.sequences += 1
            self.tokens += len(row.ids) - max_length
            self.supervised_tokens += sum(row.loss_mask[max_length:])
            self.without_answer += not any(row.loss_mask[:max_length])


@dataclass
class Totals:
    """The sums over a file's rows."""

    all: Counts = field(default_factory=Counts)
    domains: dict[str, Counts] = field(default_factory=dict)
    cut: Cut = field(default_factory=Cut)
    lengths: array[int] = field(default_factory=lambda: array("i"))
    prompt_lengths: array[int] = field(default_factory=lambda: array("i"))
    answered: int = 0
    empty: int = 0
    other_mode: int = 0
    waiting: int = 0
    refused: int = 0
    problems: list[dict[str, str | None]] = field(default_factory=list)
    prompts: Counter[int] = field(default_factory=Counter)
    ids: Counter[int] = field(default_factory=Counter)


def inspect_rows(
    rows: Iterable[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    *,
    thinking: bool,
    max_length: int,
    bar: Bar | None = None,
) -> dict[str, Any]:
    """Totals of the rows as plain JSON data, in rows and tokens of this tokenizer.

    ``lengths``: of the uncut training sequences; ``prompt_lengths``: of rows that nobody has answered yet, as
    ``prompts`` and ``prompt_tokens`` are. ``cut``: what ``max_length`` takes away. ``repeated_prompts``: rows
    whose normalised prompt came before; ``repeated_ids`` likewise. ``other_mode``: rows that say they were
    answered with another thinking mode. ``follow_ups``: rows with questions that wait for an answer.
    ``empty``: rows with a blank question or answer. ``refused``: rows that training would stop at, the first
    of them in ``problems``. Whatever reading the rows raises is raised here.
    """
    totals = Totals()
    for conversation in rows:
        _add(totals, conversation, tokenizer, thinking, max_length)
        if bar is not None:
            bar.update(1, tokens=totals.all.tokens, refused=totals.refused)
    known = vars(totals.all) | {
        "answered": totals.answered,
        "refused": totals.refused,
        "supervised_share": totals.all.supervised_tokens / max(totals.all.tokens, 1),
        "repeated_prompts": _repeats(totals.prompts),
        "repeated_ids": _repeats(totals.ids),
        "empty": totals.empty,
        "other_mode": totals.other_mode,
        "follow_ups": totals.waiting,
    }
    return known | {
        "thinking": thinking,
        "max_length": max_length,
        "cut": vars(totals.cut),
        "lengths": distribution(totals.lengths),
        "prompt_lengths": distribution(totals.prompt_lengths),
        "domains": {name: vars(counts) for name, counts in sorted(totals.domains.items())},
        "problems": totals.problems,
    }


def _add(
    totals: Totals,
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    thinking: bool,
    max_length: int,
) -> None:
    meta = conversation.meta
    totals.prompts[hash(prompt_id(conversation))] += 1
    totals.ids[hash(conversation.id)] += 1
    totals.empty += any(not m["content"].strip() and "tool_calls" not in m for m in conversation.messages)
    totals.other_mode += isinstance(meta.get("thinking"), bool) and meta["thinking"] != thinking
    totals.waiting += bool(meta.get("follow_ups"))
    sequences: list[Encoded] = []
    try:
        sequences = row_sequences(tokenizer, conversation, thinking)
    except DataError as error:
        totals.refused += 1
        if len(totals.problems) < PROBLEMS_SHOWN:
            totals.problems.append({"where": error.where, "what": error.what, "next": error.next_step})
    prompt = sequences.pop() if sequences and not is_answered(conversation) else None
    if prompt is not None:
        totals.prompt_lengths.append(len(prompt.ids))
        totals.cut.without_answer += len(prompt.ids) >= max_length
    totals.answered += bool(sequences)
    totals.all.add(sequences, prompt)
    totals.domains.setdefault(conversation.domain or NO_DOMAIN, Counts()).add(sequences, prompt)
    for row in sequences:
        totals.lengths.append(len(row.ids))
        totals.cut.add(row, max_length)


def _repeats(counts: Counter[int]) -> int:
    return counts.total() - len(counts)


def distribution(lengths: Sequence[int]) -> dict[str, Any] | None:
    """Least, mean, greatest, percentiles (nearest rank) and counts between powers of two; None of nothing."""
    if not lengths:
        return None
    ordered = sorted(lengths)
    percentiles = {f"p{p}": ordered[max(-(-p * len(ordered) // 100) - 1, 0)] for p in (50, 90, 99)}
    doublings = Counter(length.bit_length() for length in ordered)
    histogram = [
        {"from": 1 << bits >> 1, "to": (1 << bits) - 1, "count": doublings[bits]}
        for bits in range(min(doublings), max(doublings) + 1)
    ]
    return {
        "count": len(ordered),
        "min": ordered[0],
        "mean": sum(ordered) / len(ordered),
        **percentiles,
        "max": ordered[-1],
        "histogram": histogram,
    }


# ── one row ───────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Piece:
    """A stretch of tokens alike in all of this, decoded. ``added``: one of the template's own tokens."""

    text: str
    supervised: bool
    added: bool
    kept: bool


def find_row(rows: Iterable[Conversation], wanted: str) -> Conversation:
    """The row of that id; where there is none, the row of that number, counted from 1. Raises DataError."""
    numbered, count = None, 0
    for count, conversation in enumerate(rows, start=1):
        if conversation.id == wanted:
            return conversation
        if str(count) == wanted:
            numbered = conversation
    if numbered is None:
        raise DataError(
            f"no row {wanted!r} among {count} rows", next_step="give an id, or a number counted from 1"
        )
    return numbered


def is_answered(conversation: Conversation) -> bool:
    return any(map(is_trained, conversation.messages))


def row_sequences(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, thinking: bool
) -> list[Encoded]:
    """The uncut training sequences of a row, or the prompt of an unanswered one. Raises DataError."""
    if is_answered(conversation):
        return encode_turns(tokenizer, conversation, thinking)
    asked = prompt_messages(conversation)
    ids = prompt_ids(tokenizer, asked, thinking, tools=tools_of(conversation), where=conversation.where)
    return [Encoded(ids, [0] * len(ids), conversation.id)]


def pieces(tokenizer: PreTrainedTokenizerBase, row: Encoded, max_length: int) -> list[Piece]:
    """A sequence as stretches of text. Texts decode on their own: half a character at a border shows as �."""
    added = added_ids(tokenizer)

    def kind(i: int) -> tuple[bool, bool, bool]:
        return bool(row.loss_mask[i]), row.ids[i] in added, i < max_length

    found = []
    for facts, run in groupby(range(len(row.ids)), kind):
        found.append(Piece(tokenizer.decode([row.ids[i] for i in run]), *facts))
    return found
