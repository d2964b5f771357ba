"""Answers by the target itself: a draft must learn what this target writes, not what a data set says.

Append-only and resumable by row id: every finished answer is a fsynced line, a torn last line is
repaired, and rows that are already there are not asked again. In process, each row's tokens depend on
its own seed, so the file does not depend on where a run was cut.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deepspec.data.conversations import Conversation, prompt_messages, read_conversations
from deepspec.data.tokens import prompt_ids, template_hash
from deepspec.decode import Decoder, Request
from deepspec.errors import DataError, TargetError
from deepspec.files import JsonlWriter
from deepspec.log import progress
from deepspec.target import Target
from deepspec.verify import Sampling


def row_seed(seed: int, row_id: str) -> int:
    """A row's own seed: a function of the run's seed and the row's id only."""
    digest = hashlib.sha256(f"{seed}:{row_id}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


def regenerate(
    target: Target,
    conversations: Sequence[Conversation],
    out: Path,
    *,
    thinking: bool = False,
    sampling: Sampling | None = None,
    max_new_tokens: int = 256,
    max_rows: int = 16,
    seed: int = 0,
) -> int:
    """Answer every conversation's prompt and append it to `out`; how many answers were new.

    The default sampling is temperature 1: the draft then sees the target's own law. Answers are stored
    as text and, in `meta.answer_ids`, as the exact tokens. Raises TargetError without a tokenizer, DataError
    where `out` holds answers made under other conditions: they are not this run's answers.
    """
    sampling = sampling or Sampling(temperature=1.0)
    tokenizer = target.tokenizer
    if tokenizer is None:
        raise TargetError(f"{target.spec.name} has no tokenizer", next_step="regeneration works on text")
    out.parent.mkdir(parents=True, exist_ok=True)
    facts = {
        "thinking": thinking,
        "template_hash": template_hash(tokenizer),
        "sampling": {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p},
        "target": target.spec.name,
        "max_new_tokens": max_new_tokens,
        "seed": seed,
    }
    # The writer repairs a torn last line before anything is read.
    with JsonlWriter(out) as writer:
        done = _done(out, facts) if out.stat().st_size else set()
        wanted = {c.id: c for c in conversations if c.id not in done}
        # Rows of like length share the batch best; the order is a function of the rows alone.
        requests = sorted(
            (
                Request(
                    prompt_ids(tokenizer, prompt_messages(c), thinking, where=c.where),
                    max_new_tokens,
                    row_seed(seed, c.id),
                    c.id,
                )
                for c in wanted.values()
            ),
            key=lambda r: (len(r.input_ids), r.key),
        )
        decoder = Decoder(
            target,
            None,
            sampling,
            stop_token_ids=target.stop_token_ids,
            max_rows=min(max_rows, len(requests) or 1),
        )
        tokens = 0
        with progress("regenerating answers", len(requests)) as bar:
            for answer in decoder.run(requests):
                conversation = wanted[answer.key]
                tokens += len(answer.token_ids)
                text = tokenizer.decode(answer.token_ids, skip_special_tokens=True).strip()
                prompt = [dict(m) for m in prompt_messages(conversation)]
                writer.write(
                    {
                        "id": conversation.id,
                        "domain": conversation.domain,
                        "messages": [*prompt, {"role": "assistant", "content": text or " "}],
                        "answer_ids": answer.token_ids,
                        "finished": answer.stopped,
                        **facts,
                    }
                )
                bar.update(1, tokens=tokens)
    return len(requests)


def _done(out: Path, facts: Mapping[str, Any]) -> set[str]:
    """Ids that `out` has answers for, each made under these conditions. Raises DataError for any other."""
    ids = set()
    for row in read_conversations(out):
        other = next((k for k, v in facts.items() if row.meta.get(k) != v), None)
        if other is not None:
            raise DataError(
                f"this answer was made with {other} {row.meta.get(other)!r}, but now it is {facts[other]!r}",
                where=row.where,
                next_step="give another --out, or delete the file to answer everything anew",
            )
        ids.add(row.id)
    return ids
