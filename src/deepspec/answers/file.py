"""The file of answers and what lies beside it: what is there already, what failed, how fast it went.

For `answers.jsonl` there are

* `answers.jsonl`: one answered row a line, only ever appended to;
* `answers.timings.jsonl`: seconds, rows and tokens of each stretch of work, kept out of the rows so that
  these depend on nothing but the prompts; `bytes` says up to where `answers.jsonl` held whole stretches then;
* `answers.failures.jsonl`: the rows that the latest start could not answer, each with its reason. A start
  tries them again, so it begins without the file.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from deepspec.answers.dialogue import Dialogue
from deepspec.conditions import Conditions
from deepspec.errors import DataError
from deepspec.files import JsonlWriter
from deepspec.log import progress
from deepspec.maths.verify import Sampling


@dataclass(frozen=True)
class Settings:
    """What an answer depends on besides its prompt. Every row carries it (`facts`)."""

    target: str
    template_hash: str | None
    """None where a server's own template was used: nobody here has seen it."""
    thinking: bool
    sampling: Sampling
    max_new_tokens: int
    seed: int

    @property
    def facts(self) -> dict[str, Any]:
        now = Conditions(self.thinking, self.template_hash, sampling=asdict(self.sampling))
        return {
            **now.record(),
            "target": self.target,
            "max_new_tokens": self.max_new_tokens,
            "seed": self.seed,
        }


@dataclass
class Tally:
    """What one start did. `tokens` counts those of new answers, `seconds` all of the time."""

    new: int = 0
    there: int = 0
    failed: int = 0
    twice: int = 0
    """Rows left out because their id had come before."""
    tokens: int = 0
    seconds: float = 0.0
    began: float = field(default_factory=time.perf_counter, repr=False, compare=False)

    @property
    def fields(self) -> dict[str, Any]:
        """For a progress bar."""
        spent = max(time.perf_counter() - self.began, 1e-9)
        shown: dict[str, Any] = {"rows/s": self.new / spent, "tokens/s": self.tokens / spent}
        return shown | ({"failed": self.failed} if self.failed else {})


def beside(out: Path, what: str) -> Path:
    """answers.jsonl -> answers.<what>.jsonl"""
    return out.with_name(f"{out.name.removesuffix('.jsonl')}.{what}.jsonl")


class AnswerFile:
    """Answers to append to, made under the same conditions as those that are there. A context.

    done: ids answered in stretches that were finished; tail: ids answered after the last of them, by a
    process that was killed in the middle of one. Rows that came from elsewhere, more than a stretch of them
    or without timings, are done. Raises DataError where the file holds answers made under other conditions,
    UserError where it cannot be written or another process is writing to it.
    """

    def __init__(self, out: Path, facts: Mapping[str, Any], stretch: int = 0) -> None:
        self.out, self.facts = out, dict(facts)
        self.done: set[str] = set()
        self.tail: set[str] = set()
        self._failures: JsonlWriter | None = None
        self._rows = JsonlWriter(out, alone=True)  # a torn last line is repaired before anything is read
        self._times: JsonlWriter | None = None
        try:
            self._times = JsonlWriter(beside(out, "timings"))
            mark = last_mark(self._times.path)
            self._read(self._rows.size if mark is None else mark)
            if mark is None or len(self.tail) > stretch:
                self.done |= self.tail
                self.tail = set()
                self.mark()
            beside(out, "failures").unlink(missing_ok=True)
        except BaseException:
            self.close()
            raise

    def write(self, row: Mapping[str, Any]) -> None:
        self._rows.write(row)

    def fail(self, dialogue: Dialogue) -> None:
        """List a row that could not be answered."""
        if self._failures is None:
            self._failures = JsonlWriter(beside(self.out, "failures"))
        conversation = dialogue.conversation
        self._failures.write(
            {"id": conversation.id, "where": conversation.source, "reason": dialogue.trouble}
        )

    def sync(self) -> None:
        """Have all answers so far on the disk."""
        self._rows.sync()

    def mark(self, **figures: float) -> None:
        """A stretch of work is finished: its answers are on the disk, and its figures beside them."""
        assert self._times is not None
        self.sync()
        when = datetime.now(UTC).isoformat(timespec="seconds")
        self._times.write({"bytes": self._rows.size, **figures, "time": when})
        self._times.sync()

    def _read(self, mark: int) -> None:
        """Sort the ids that are there into `done` and `tail`: lines that begin before the mark, and after."""
        at = 0
        with (
            self.out.open("rb") as stream,
            progress("reading the answers that are there", self._rows.size, count=False) as bar,
        ):
            for number, line in enumerate(stream, start=1):
                (self.done if at < mark else self.tail).add(self._id(line, f"{self.out}:{number}"))
                at += len(line)
                bar.update(completed=at)

    def _id(self, line: bytes, where: str) -> str:
        """A line's id. Raises DataError where it is no answer of ours, made under these conditions."""
        try:
            row = json.loads(line)
            name = row["id"]
        except (ValueError, TypeError, KeyError):
            raise DataError(
                "this line is no answered row", where=where, next_step="give another --out, or mend the file"
            ) from None
        other = next((k for k, v in self.facts.items() if row.get(k) != v), None)
        if other is not None:
            raise DataError(
                f"this answer was made with {other} {row.get(other)!r}, but now it is {self.facts[other]!r}",
                where=where,
                next_step="give another --out, or delete the file to answer everything anew",
            )
        return str(name)

    def close(self) -> None:
        for file in (self._rows, self._times, self._failures):
            if file is not None:
                file.close()

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def last_mark(timings: Path) -> int | None:
    """Up to which byte the answers were whole stretches; None where nothing says so."""
    mark = None
    for line in timings.read_bytes().splitlines():
        try:
            found = json.loads(line)["bytes"]
        except (ValueError, TypeError, KeyError):
            continue
        mark = found if isinstance(found, int) else mark
    return mark
