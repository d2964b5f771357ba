"""What a file of conversations becomes in training: totals, lengths, refused rows, and one row's tokens.

Rows stream: memory grows by a length and two hashes for each row.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from deepspec.data.conversations import Conversation, prompt_id
from deepspec.data.messages import last_trained
from deepspec.data.template import continued
from deepspec.data.tokens import Encoded, UnembeddedError, conversation_prompt, encode_turns
from deepspec.errors import DataError
from deepspec.log import Bar

if TYPE_CHECKING:
    from deepspec.data.tokens import PreTrainedTokenizerBase

PROBLEMS_SHOWN = 20
_COUNTS = ("rows", "sequences", "tokens", "supervised_tokens", "prompts", "prompt_tokens")


def inspect_rows(
    rows: Iterable[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    *,
    thinking: bool,
    max_length: int,
    bar: Bar,
    vocab_size: int | None = None,
) -> dict[str, Any]:
    """Totals of the rows as plain JSON data, in rows and tokens of this tokenizer.

    ``lengths``: of the uncut training sequences; ``prompt_lengths``: of rows without an answer, which
    ``prompts`` and ``prompt_tokens`` count. ``cut``: what ``max_length`` takes away; its ``without_answer``
    counts sequences and prompts that fill it before an answer begins, which training leaves out.
    ``repeated_prompts``: rows whose normalised prompt came before; ``repeated_ids`` likewise. ``other_mode``:
    rows answered with another thinking mode, by their own account. ``follow_ups``: rows with questions that
    are not asked yet. ``empty``: rows with a blank question or answer. ``refused``: rows at which training
    would stop, and the ``unembedded`` ones, with tokens that an embedding of ``vocab_size`` rows lacks, which
    it leaves out; the first are in ``problems``. Errors of reading the rows are raised.
    """
    total: Counter[str] = Counter(dict.fromkeys(_COUNTS, 0))
    domains: dict[str, Counter[str]] = {}
    cut = Counter(sequences=0, tokens=0, supervised_tokens=0, without_answer=0)
    flags = Counter(answered=0, refused=0, unembedded=0, empty=0, other_mode=0, follow_ups=0)
    lengths, prompt_lengths = array("i"), array("i")
    problems: list[dict[str, str | None]] = []
    prompts_seen: set[int] = set()
    ids_seen: set[int] = set()
    for conversation in rows:
        prompts_seen.add(hash(prompt_id(conversation)))
        ids_seen.add(hash(conversation.id))
        mode = conversation.meta.get("thinking")
        flags["other_mode"] += isinstance(mode, bool) and mode != thinking
        flags["follow_ups"] += bool(conversation.meta.get("follow_ups"))
        messages = conversation.messages
        flags["empty"] += any(not m["content"].strip() and "tool_calls" not in m for m in messages)
        answered, sequences = last_trained(messages) is not None, []
        try:
            sequences = row_sequences(tokenizer, conversation, thinking, vocab_size)
        except DataError as error:
            flags["refused"] += 1
            flags["unembedded"] += isinstance(error, UnembeddedError)
            if len(problems) < PROBLEMS_SHOWN:
                problems.append({"where": error.where, "what": error.what, "next": error.next_step})
        flags["answered"] += answered and bool(sequences)
        (lengths if answered else prompt_lengths).extend(len(row.ids) for row in sequences)
        counts = _counted(sequences, answered)
        total.update(counts)
        domains.setdefault(conversation.domain or "(none)", Counter(dict.fromkeys(_COUNTS, 0))).update(counts)
        for row in sequences:
            cut.update(_cut(row, max_length, answered))
        bar.update(1, tokens=total["tokens"], refused=flags["refused"])
    return {
        **total,
        **flags,
        "supervised_share": total["supervised_tokens"] / max(total["tokens"], 1),
        "repeated_prompts": total["rows"] - len(prompts_seen),
        "repeated_ids": total["rows"] - len(ids_seen),
        "thinking": thinking,
        "max_length": max_length,
        "cut": dict(cut),
        "lengths": distribution(lengths),
        "prompt_lengths": distribution(prompt_lengths),
        "domains": {name: dict(counts) for name, counts in sorted(domains.items())},
        "problems": problems,
    }


def _counted(sequences: Sequence[Encoded], answered: bool) -> dict[str, int]:
    """What one row adds to the counts."""
    tokens = sum(len(row.ids) for row in sequences)
    if not answered:
        return {"rows": 1, "prompts": len(sequences), "prompt_tokens": tokens}
    supervised = sum(sum(row.loss_mask) for row in sequences)
    return {"rows": 1, "sequences": len(sequences), "tokens": tokens, "supervised_tokens": supervised}


def _cut(row: Encoded, max_length: int, answered: bool) -> dict[str, int]:
    """What `max_length` takes away from one sequence or prompt."""
    if not answered:
        return {"without_answer": int(len(row.ids) >= max_length)}
    over = max(len(row.ids) - max_length, 0)
    return {
        "sequences": int(over > 0),
        "tokens": over,
        "supervised_tokens": sum(row.loss_mask[max_length:]),
        "without_answer": int(not any(row.loss_mask[:max_length])),
    }


def distribution(lengths: Sequence[int]) -> dict[str, Any] | None:
    """Mean, extremes, percentiles (nearest rank) and counts between powers of two; None without lengths."""
    if not lengths:
        return None
    ordered = sorted(lengths)
    doublings = Counter(length.bit_length() for length in ordered)
    return {
        "count": len(ordered),
        "min": ordered[0],
        "mean": sum(ordered) / len(ordered),
        **{f"p{p}": ordered[max(-(-p * len(ordered) // 100) - 1, 0)] for p in (50, 90, 99)},
        "max": ordered[-1],
        "histogram": [
            {"from": 1 << bits >> 1, "to": (1 << bits) - 1, "count": doublings[bits]}
            for bits in range(min(doublings), max(doublings) + 1)
        ],
    }


@dataclass(frozen=True)
class Piece:
    """Decoded text of tokens with equal flags. ``added``: they are added tokens of the tokenizer."""

    text: str
    supervised: bool
    added: bool
    kept: bool


def find_row(rows: Iterable[Conversation], wanted: str) -> Conversation:
    """The row with that id or, if there is none, with that number, counted from 1. Raises DataError."""
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


def row_sequences(
    tokenizer: PreTrainedTokenizerBase,
    conversation: Conversation,
    thinking: bool,
    vocab_size: int | None = None,
) -> list[Encoded]:
    """The uncut training sequences of a row, or the prompt of an unanswered one. Raises DataError."""
    if last_trained(conversation.messages) is not None:
        return encode_turns(tokenizer, conversation, thinking, vocab_size=vocab_size)
    ids = conversation_prompt(tokenizer, conversation, thinking, vocab_size)
    return [Encoded(ids, [0] * len(ids), conversation.id)]


def pieces(tokenizer: PreTrainedTokenizerBase, row: Encoded, max_length: int) -> list[Piece]:
    """A sequence as decoded pieces. Each is decoded by itself: a character split between two shows as �."""
    added = tokenizer.added_tokens_decoder  # matched whole before text is split

    def flags(i: int) -> tuple[bool, bool, bool]:
        return bool(row.loss_mask[i]), row.ids[i] in added, i < max_length

    found: list[Piece] = []
    for facts, run in groupby(range(len(row.ids)), flags):
        ids = [row.ids[i] for i in run]
        found.append(Piece(continued(tokenizer, ids) if found else tokenizer.decode(ids), *facts))
    return found
