"""Traces as a file: at every position of some answers, the draft's confidence and how much was accepted.

N positions of all answers, γ proposals at each.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from deepspec.errors import DataError, MismatchError
from deepspec.files import write_json
from deepspec.schedule.policies import Floats, Lengths

FORMAT = 1
LEAST = 100
"""Positions; fewer tell nothing of a load."""
AGAIN = "record them: deepspec calibrate DRAFT --traces FILE"


@dataclass(frozen=True, eq=False)
class Traces:
    """confidences [N, γ]; accepted [N]: of all γ proposals; starts [A + 1]: where each answer's positions
    begin and the last one's end; prompts [A]: their tokens. An answer has one token more than positions.
    draft_hash, target_hash: what was recorded; context: the most tokens that this target reads."""

    confidences: Floats
    accepted: Lengths
    starts: Lengths
    prompts: Lengths
    draft_hash: str
    target_hash: str
    context: int | None

    @property
    def block(self) -> int:
        return self.confidences.shape[1]

    @property
    def longest(self) -> int:
        """Tokens of the longest request with its answer."""
        return int((self.prompts + np.diff(self.starts) + 1).max())

    def scaled(self, temperatures: Sequence[float]) -> Traces:
        """With calibrated confidences, whose logits are divided by temperatures [γ]."""
        odds = np.log(self.confidences / (1 - self.confidences)) / np.array(temperatures)
        return replace(self, confidences=1 / (1 + np.exp(-odds)))

    def with_prompts(self, tokens: int) -> Traces:
        """With prompts of another length. Raises DataError if a request then exceeds the context."""
        found = replace(self, prompts=np.full_like(self.prompts, tokens))
        if self.context is not None and found.longest > self.context:
            raise DataError(
                f"the longest request is {found.longest} tokens with its answer, and the target reads "
                f"{self.context}",
                next_step="give shorter prompts",
            )
        return found


def write_traces(path: Path, conditions: Mapping[str, Any], answers: Sequence[Mapping[str, Any]]) -> None:
    """answers: of each its id, domain, `prompt` (tokens), `logits` [n, γ] of confidences, `accepted` [n]."""
    write_json(path, {"format": FORMAT, "conditions": dict(conditions), "answers": list(answers)})


def read_traces(path: Path, *, draft: str | None = None, target: str | None = None) -> Traces:
    """Read traces. draft, target: the hashes that they have to be of; None for whatever they are of.

    Raises DataError for another file and for fewer than `LEAST` positions, MismatchError for traces of other
    weights or another target.
    """
    try:
        record = json.loads(path.read_text("utf-8"))
        conditions, answers = record["conditions"], [a for a in record["answers"] if a["accepted"]]
        of = {"draft": conditions["draft_hash"], "target": conditions["target_hash"]}
        logits = np.array([row for a in answers for row in a["logits"]], float)
        accepted = np.array([n for a in answers for n in a["accepted"]], np.int64)
        counts = [len(a["accepted"]) for a in answers]
        context = conditions.get("context_length")
        prompts = np.array([int(a["prompt"]) for a in answers], np.int64)
        if record["format"] != FORMAT:
            raise ValueError("its format is another version's")
        if len(logits) != len(accepted):
            raise ValueError("it has not as many confidences as counts")
        if answers and not (
            np.isfinite(logits).all() and ((accepted >= 0) & (accepted <= logits.shape[1])).all()
        ):
            raise ValueError("a confidence is not finite, or more is accepted than was proposed")
    except OSError as error:
        raise DataError("there are no such traces", where=str(path), next_step=AGAIN) from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(f"this is not a file of traces: {error}", where=str(path), next_step=AGAIN) from error
    for what, wanted in (("draft", draft), ("target", target)):
        if wanted is not None and of[what] != wanted:
            raise MismatchError(
                f"these traces are of another {what}, or of other weights", where=str(path), next_step=AGAIN
            )
    if len(accepted) < LEAST:
        raise DataError(
            f"there are traces of {len(accepted)} positions, and at least {LEAST} are needed",
            where=str(path),
            next_step="record the answers to more prompts",
        )
    confidences = 1 / (1 + np.exp(-np.clip(logits, -30, 30)))
    starts = np.concatenate([[0], np.cumsum(counts)])
    return Traces(confidences, accepted, starts, prompts, of["draft"], of["target"], context)
