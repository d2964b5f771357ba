"""What a row's text and id alone decide, in every run and on every machine: ids, seeds, hold-out buckets."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Sequence

from deepspec.data.messages import Message


def prompt_hash(prompt: Sequence[Message], tools: object = None) -> str:
    """16 hex digits of the SHA-256 of a normalised prompt and the tools offered: the default id of a row.

    It is the same for every spelling of the prompt and for every answer to it.
    """
    # Normalising leaves no "\0", so message boundaries stay part of the hash; a single question is hashed as
    # it is.
    parts = [normalise(m["content"]) + _sorted_json(m.get("tool_calls")) for m in prompt]
    text = "\0".join(parts) + _sorted_json(tools)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


def normalise(text: str) -> str:
    """The text in NFKC, case folded, with single spaces: equal for all spellings that count as one prompt."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def holdout_bucket(question: str) -> float:
    """A number in [0, 1) that depends on the normalised question alone.

    ``bucket < 0.02`` holds out two per cent; no copy of a held-out question can leak into training.
    """
    digest = hashlib.sha256(b"holdout\0" + normalise(question).encode("utf-8")).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53  # 53 bits: the quotient is exact, never 1.0


def row_seed(seed: int, row_id: str, turn: int = 0) -> int:
    """The sampling seed (56 bits) of one answer: a function of the run's seed, the row's id and the turn.

    `data regenerate` and `eval` both use it, so neither depends on the order of the rows or on batches.
    """
    later = f"\0{turn}" if turn else ""
    digest = hashlib.sha256(f"{seed}:{row_id}{later}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


def _sorted_json(value: object) -> str:
    """JSON with sorted keys; an empty text for an empty value."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False) if value else ""
