"""How much training data there is: counted from files where there are any, else assumed and said so."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepspec.config import Recipe
from deepspec.cost.costs import slots_that_count
from deepspec.data.conversations import Conversation, conversation_from_row, read_conversations
from deepspec.data.messages import is_trained
from deepspec.data.tokens import encode_turns, prompt_ids
from deepspec.errors import DataError
from deepspec.features.batches import batch_order

PUBLISHED_ROWS = 1_300_000
PUBLISHED_TOKENS = 38e12 / 30_726
"""Of the published training set: its cache for Qwen3-4B is 38 TB at 30,726 bytes a token."""
PUBLISHED_PROMPT = 200
"""Tokens of a prompt, on average: an assumption."""


@dataclass(frozen=True)
class Counts:
    """Tokens of prompt and answer of some rows, each of which stands for `weight` rows of the training set.

    answered: whether the answers are there. notes: what was assumed or sampled on the way.
    """

    prompts: tuple[float, ...]
    answers: tuple[float, ...]
    weight: float = 1.0
    answered: bool = False
    notes: tuple[str, ...] = ()

    @property
    def rows(self) -> float:
        return len(self.prompts) * self.weight

    def of(self, rows: float) -> Counts:
        """As many rows, spread as these are."""
        return replace(self, weight=self.weight * rows / self.rows)


def assumed_counts(rows: float, prompt: float, answer: float) -> Counts:
    """Every row as long as the mean."""
    words = f"{rows:,.0f} rows of {prompt:,.0f} + {answer:,.0f} tokens, all as long as the mean"
    return Counts((prompt,), (answer,), rows, notes=(words,))


def published_counts() -> Counts:
    """The training set of the published drafts, by its cache's 38 TB."""
    mean = PUBLISHED_TOKENS / PUBLISHED_ROWS
    found = assumed_counts(PUBLISHED_ROWS, PUBLISHED_PROMPT, mean - PUBLISHED_PROMPT)
    note = f"no data file: the published set, {found.notes[0]} (38 TB of cache at 30,726 bytes a token)"
    return replace(found, notes=(note,))


@dataclass(frozen=True)
class Totals:
    """What a recipe makes of the counts, in one pass over the rows.

    reach: the length that a token meets, on average over tokens. padded: tokens computed for each one there.
    anchors, slots: of a sequence, and of a block in the loss, on average. longest: tokens of a sequence.
    """

    rows: float
    tokens: float
    supervised: float
    prompts: float
    reach: float
    padded: float
    anchors: float
    slots: float
    longest: int

    @property
    def length(self) -> float:
        return self.tokens / self.rows


def totals(recipe: Recipe, counts: Counts) -> Totals:
    """Rows cut to `data.max_length`; those without enough supervised tokens left out."""
    prompts, answers = np.asarray(counts.prompts, float), np.asarray(counts.answers, float)
    lengths = np.minimum(prompts + answers, recipe.data.max_length)
    supervised = np.maximum(lengths - prompts, 0)
    kept = supervised >= recipe.data.min_supervised
    if not kept.any():
        raise DataError(
            f"no row has {recipe.data.min_supervised} supervised tokens within {recipe.data.max_length}",
            next_step="raise data.max_length",
        )
    lengths, supervised, prompts = lengths[kept], supervised[kept], prompts[kept]
    anchors = np.minimum(recipe.num_anchors, np.maximum(supervised - 1, 1))
    slots = [slots_that_count(s, recipe.draft.block) for s in supervised]
    assumed = len(counts.prompts) == 1 and counts.weight > 1
    return Totals(
        rows=float(len(lengths)) * counts.weight,
        tokens=float(lengths.sum()) * counts.weight,
        supervised=float(supervised.sum()) * counts.weight,
        prompts=float(prompts.sum()) * counts.weight,
        reach=float((lengths**2).sum() / lengths.sum()),
        padded=1.0 if assumed else _padding(lengths, recipe),
        anchors=float(anchors.mean()),
        slots=float((anchors * slots).sum() / anchors.sum()),
        longest=int(lengths.max()) if counts.weight == 1 else recipe.data.max_length,
    )


def _padding(lengths: NDArray[np.float64], recipe: Recipe) -> float:
    """Tokens that a step computes for each real one: its micro-batches are all as wide as the whole batch."""
    widths = [int(length) for length in lengths]
    batches = batch_order(widths, recipe.optim.batch_size, recipe.seed, 0)
    return sum(len(b) * max(widths[i] for i in b) for b in batches) / sum(widths)


# ── counting ──────────────────────────────────────────────────────────────────────────────────────────

SAMPLED = 1000
"""Rows that are tokenised; of a longer file they are spread over it."""
IN_TURN = 8
"""Lines read at each place of a long file."""
CHARACTERS = 4.0
"""Per token, where there is no tokenizer: an assumption."""


def count_file(path: Path, tokenizer: Any, *, thinking: bool = False, answer: float = 0.0) -> Counts:
    """Counts of a JSONL file, answered or not. tokenizer: the target's, or None. answer: tokens assumed for a
    row without one.

    Raises DataError for a file that cannot be read, an empty one, and a broken row among those sampled.
    """
    rows, weight = _spread_rows(path)
    if not rows:
        raise DataError("no rows", where=str(path), next_step="give a JSONL file, one conversation per line")
    found = [_tokens(row, tokenizer, thinking) for row in rows]
    notes = []
    if weight > 1:
        notes.append(f"{path.name}: {len(rows):,} rows tokenised of about {len(rows) * weight:,.0f}")
    if tokenizer is None:
        notes.append(f"{path.name}: no tokenizer here, {CHARACTERS:g} characters a token (assumed)")
    missing = any(given is None for _, given in found)
    if missing:
        notes.append(f"answers of {answer:,.0f} tokens (expected: {path.name} holds prompts only)")
    prompts = tuple(float(prompt) for prompt, _ in found)
    answers = tuple(answer if given is None else float(given) for _, given in found)
    return Counts(prompts, answers, weight, not missing, tuple(notes))


def _spread_rows(path: Path) -> tuple[list[Conversation], float]:
    """(some SAMPLED rows, how many each of them stands for). A long file is read at places spread over it:
    several lines after each, so that long lines are not met more often than short ones."""
    try:
        size = path.stat().st_size
        if size < 4 * 2**20:
            rows = list(read_conversations(path))
            step = max(math.ceil(len(rows) / SAMPLED), 1)
            return rows[::step], len(rows) / max(len(rows[::step]), 1)
        lines = {}
        with path.open("rb") as stream:
            for i in range(SAMPLED // IN_TURN):
                stream.seek(size * i * IN_TURN // SAMPLED)
                if i:
                    stream.readline()
                for _ in range(IN_TURN):
                    lines[stream.tell()] = stream.readline()
    except OSError as error:
        raise DataError(f"cannot read the rows: {error.strerror or error}", where=str(path)) from error
    found = [line for line in lines.values() if line.strip()]
    rows = [conversation_from_row(_row(line, path), str(path)) for line in found]
    return rows, size / (sum(map(len, found)) / len(found)) / len(rows)


def _row(line: bytes, path: Path) -> object:
    try:
        return json.loads(line)
    except ValueError as error:
        raise DataError(f"malformed JSON: {error}", where=str(path)) from error


def _tokens(row: Conversation, tokenizer: Any, thinking: bool) -> tuple[float, float | None]:
    """(tokens of the prompt, of the answer or None without one)."""
    last = next((i for i in range(len(row.messages))[::-1] if is_trained(row.messages[i])), None)
    if tokenizer is None:
        before = row.messages if last is None else row.messages[:last]
        prompt = sum(len(m["content"]) for m in before) / CHARACTERS
        return prompt, None if last is None else len(row.messages[last]["content"]) / CHARACTERS
    if last is None:
        return len(prompt_ids(tokenizer, row.messages, thinking, where=row.where)), None
    rows = encode_turns(tokenizer, row, thinking)
    supervised = sum(sum(r.loss_mask) for r in rows)
    return sum(len(r.ids) for r in rows) - supervised, supervised
