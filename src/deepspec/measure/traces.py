"""Traces: at every position of some answers, how sure the draft was and how much was accepted.

Rounds skip what they accept, so that a recording of rounds tells of one policy only. Here every round keeps
one token: any policy can then be replayed on the trace.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from deepspec.decode.engine import Decoder, Event, Generation, Row
from deepspec.decode.settle import Settled
from deepspec.drafts.base import Proposal
from deepspec.maths.slots import Ragged
from deepspec.measure.rows import Prompt


class Tracing(Decoder):
    """Verifies all proposals, and keeps one token of each round: "trim after verify", which is lossless and
    wasteful. An answer's `accepted` are the counts before the cut, its `kept` are ones."""

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        self._accepted: dict[int, int] = {}

    def _settled(self, rows: Sequence[Row], tokens: Ragged, proposal: Proposal, uniforms: Tensor) -> Settled:
        held = [self.target.length(row.slot) for row in rows]
        settled = super()._settled(rows, tokens, proposal, uniforms)
        for i, row in enumerate(rows):
            self._accepted[row.slot] = settled.accepted[i]
            if settled.accepted[i] and i not in settled.faults:
                settled.accepted[i], settled.next_token[i] = 0, tokens[i][0]
                self.target.rollback(row.slot, held[i] + 1)
        return settled

    def _event(self, row: Row, tokens: list[int]) -> Event:
        if row.answer.accepted:
            row.answer.accepted[-1] = self._accepted[row.slot]
        return super()._event(row, tokens)


def traced(answers: Sequence[Generation], prompts: Sequence[Prompt], block: int) -> list[dict[str, Any]]:
    """Answers of `Tracing` to the prompts as `write_traces` takes them, without positions whose block the end
    of the target's context cut."""
    found = []
    for answer, prompt in zip(answers, prompts, strict=True):
        rounds = zip(answer.confidence, answer.accepted, answer.kept, strict=True)
        whole = [(c, n) for c, n, kept in rounds if kept and len(c) == block]
        about = {"id": prompt.id, "domain": prompt.domain, "prompt": len(prompt.ids)}
        found.append(about | {"logits": [c for c, _ in whole], "accepted": [n for _, n in whole]})
    return found
