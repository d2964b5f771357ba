"""The prompts that ship with the pocket target, in three disjoint sets: train, select and test.

`write_prompts` wrote the files. They are frozen in the package, because the text of the standard library
varies with the Python version. Select and test come from the held-out share, which is in the training text
of neither the target nor the drafts.
"""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path

from deepspec.data.conversations import Conversation, write_conversations
from tools.pocket import corpus

SPLITS = {"train": 900, "select": 16, "test": 40}
"""The number of prompts per domain."""


def _by_hash(example: corpus.Example) -> bytes:
    return hashlib.sha256(example.question.encode()).digest()


def choose_prompts() -> dict[str, list[corpus.Example]]:
    """The examples of every set, chosen by hash: held-out ones for select and test, others for train."""
    chosen: dict[str, list[corpus.Example]] = {split: [] for split in SPLITS}
    streams = {
        "math": list(itertools.islice(corpus.math_examples(seed=10**9), 12_000)),
        "code": [e for e in corpus.code_examples() if '"""' in e.question],
        "chat": list(corpus.chat_examples()),
    }
    for domain in corpus.DOMAINS:
        unique = {e.question: e for e in sorted(streams[domain], key=_by_hash)}.values()
        held = [e for e in unique if e.held_out]
        free = [e for e in unique if not e.held_out]
        test, select = SPLITS["test"], SPLITS["select"]
        chosen["test"] += held[:test]
        chosen["select"] += held[test : test + select]
        chosen["train"] += free[: SPLITS["train"]]
    return chosen


def write_prompts(folder: Path) -> dict[str, int]:
    """Write the three files. Returns the number of rows of each."""
    counts = {}
    for split, examples in choose_prompts().items():
        ordered = sorted(examples, key=_by_hash)
        rows = [
            Conversation(
                id=_by_hash(e).hex()[:16],
                domain=e.domain,
                messages=({"role": "user", "content": e.question},),
                meta={},
            )
            for e in ordered
        ]
        counts[split] = write_conversations(folder / f"{split}.jsonl", rows)
    return counts
