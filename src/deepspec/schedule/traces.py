"""Traces as a file: at every position of some answers, the draft's confidence and how much was accepted.

N positions of all answers, γ proposals at each.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
    begin and the last one's end; prompts [A]: their tokens. An answer has one token more than positions."""

    confidences: Floats
    accepted: Lengths
    starts: Lengths
    prompts: Lengths

    @property
    def block(self) -> int:
        return self.confidences.shape[1]

    @property
    def longest(self) -> int:
        """Tokens of the longest request with its answer."""
        return int((self.prompts + np.diff(self.starts) + 1).max())


def write_traces(path: Path, conditions: Mapping[str, Any], answers: Sequence[Mapping[str, Any]]) -> None:
    """answers: of each its id, domain, `prompt` (tokens), `logits` [n, γ] of confidences, `accepted` [n]."""
    write_json(path, {"format": FORMAT, "conditions": dict(conditions), "answers": list(answers)})


def read_traces(
    path: Path,
    *,
    draft: str | None,
    target: str | None = None,
    temperatures: Sequence[float] | None = None,
) -> Traces:
    """Read traces. draft, target: the hashes that they have to be of; temperatures [γ]: of the confidences.

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
    scaled = logits / (1.0 if temperatures is None else np.array(temperatures))
    return Traces(1 / (1 + np.exp(-scaled)), accepted, np.concatenate([[0], np.cumsum(counts)]), prompts)
