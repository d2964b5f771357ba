"""The file of answers and the files next to it.

The files of `answers.jsonl` are

* `answers.jsonl`: one answered row per line; it only ever grows;
* `answers.timings.jsonl`: seconds, rows and tokens of each group of rows. They are not in the rows, so that
  the rows depend only on the prompts. `bytes` is the size of `answers.jsonl` when the group was finished. In
  process, a line may say after how many decoding steps an unfinished group is saved;
* `answers.partial.jsonl`: in process, what an unfinished group had written when it was last saved;
* `answers.failures.jsonl`: the rows that the latest run could not answer, each with its reason. Every run
  tries them again, so it begins without this file.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from deepspec.answers.dialogue import Dialogue
from deepspec.conditions import Conditions
from deepspec.data.conversations import Conversation
from deepspec.files import JsonlWriter, ResumableLog, write_text
from deepspec.log import progress, warn
from deepspec.maths.verify import Sampling


@dataclass(frozen=True)
class Settings:
    """What an answer depends on, apart from its prompt. Every row carries it (`facts`)."""

    target: str
    template_hash: str | None
    """None if a server used its own template, which is not known here."""
    thinking: bool
    sampling: Sampling
    max_new_tokens: int
    seed: int

    @property
    def facts(self) -> dict[str, Any]:
        now = Conditions(self.thinking, self.template_hash, sampling=asdict(self.sampling))
        rest = {"target": self.target, "max_new_tokens": self.max_new_tokens, "seed": self.seed}
        return now.record() | rest


@dataclass
class Tally:
    """What one run did. `tokens` counts those of new answers; `seconds` is all of its time."""

    new: int = 0
    there: int = 0
    failed: int = 0
    twice: int = 0
    """Rows left out because an earlier row has the same id."""
    tokens: int = 0
    seconds: float = 0.0
    broken: list[str] = field(default_factory=list)
    """Ids of failed rows for which the target gave infinities or NaN."""
    began: float = field(default_factory=time.perf_counter, repr=False, compare=False)

    @property
    def fields(self) -> dict[str, Any]:
        """For a progress bar."""
        spent = max(time.perf_counter() - self.began, 1e-9)
        shown: dict[str, Any] = {"rows/s": self.new / spent, "tokens/s": self.tokens / spent}
        return shown | ({"failed": self.failed} if self.failed else {})


def each_once(conversations: Iterable[Conversation], tally: Tally) -> Iterator[Conversation]:
    """The conversations in their order, without those whose id came before; the tally counts these."""
    seen: set[str] = set()
    for conversation in conversations:
        if conversation.id in seen:
            tally.twice += 1
        else:
            seen.add(conversation.id)
            yield conversation


def beside(out: Path, what: str) -> Path:
    """answers.jsonl -> answers.<what>.jsonl"""
    return out.with_name(f"{out.name.removesuffix('.jsonl')}.{what}.jsonl")


class AnswerFile(ResumableLog):
    """Append answers to a file that was made under the same conditions. A context.

    done: ids that were answered in finished groups; tail: ids that a killed process answered after the last
    finished group. If there are more than `group` such rows, or no timings, they came from elsewhere and
    count as done. Raises DataError if the file holds answers made under other conditions, UserError if
    it cannot be written or another process is writing to it.
    """

    def __init__(self, out: Path, facts: Mapping[str, Any], group: int = 0) -> None:
        super().__init__(out, facts)  # this drops a torn last line before anything is read
        self.done: set[str] = set()
        self.tail: set[str] = set()
        self.steps: int | None = None
        """Decoding steps after which an unfinished group is saved; None until it was measured."""
        self._steps = f"steps_of_{group}"  # groups of another size take another time
        self._failures: JsonlWriter | None = None
        self._beside = ExitStack()
        try:
            self._times = self._beside.enter_context(JsonlWriter(beside(out, "timings")))
            mark, self.steps = last_mark(self._times.path), last_mark(self._times.path, self._steps)
            with progress("reading the answers so far", self.size, count=False) as bar:
                for at, row in self.records():
                    (self.done if mark is None or at < mark else self.tail).add(str(row.get("id")))
                    bar.update(completed=at)
            if mark is None or len(self.tail) > group:
                self.done |= self.tail
                self.tail = set()
                self.mark()
            beside(out, "failures").unlink(missing_ok=True)
        except BaseException:
            self.close()
            raise

    def keep(self, dialogue: Dialogue, facts: Mapping[str, Any], tally: Tally) -> None:
        """Write a row with its answers, or list it as one that could not be answered, and count it."""
        if dialogue.trouble is None:
            tally.new += 1
            tally.tokens += dialogue.tokens
            self.write(dialogue.row(facts))
            return
        tally.failed += 1
        if self._failures is None:
            self._failures = self._beside.enter_context(JsonlWriter(beside(self.path, "failures")))
        asked = dialogue.conversation
        self._failures.write({"id": asked.id, "where": asked.source, "reason": dialogue.trouble})

    def mark(self, **figures: float) -> None:
        """Finish a group of rows: put its answers on the disk, then a line with its figures."""
        self.sync()
        when = datetime.now(UTC).isoformat(timespec="seconds")
        self._times.write({"bytes": self.size, **figures, "time": when})
        self._times.sync()
        beside(self.path, "partial").unlink(missing_ok=True)

    def save(self, group: str, dialogues: Sequence[Dialogue], steps: int) -> None:
        """Keep what the dialogues of an unfinished group have written after `steps` of decoding. group: a
        hash of its rows."""
        self.sync()
        if self.steps is None:
            self.steps = steps
            self._times.write({self._steps: steps})
            self._times.sync()
        kept = {"group": group, "facts": self.conditions, "states": [d.state() for d in dialogues]}
        write_text(beside(self.path, "partial"), json.dumps(kept) + "\n")

    def saved(self, group: str) -> list[dict[str, Any]]:
        """The state of each dialogue of a group as `save` kept it; empty if another group, or none, was
        saved."""
        partial = beside(self.path, "partial")
        try:
            kept = json.loads(partial.read_bytes())
            return kept["states"] if (kept["group"], kept["facts"]) == (group, self.conditions) else []
        except FileNotFoundError:
            return []
        except (ValueError, TypeError, KeyError):  # copied in part, say
            warn(f"{partial} is damaged: the answers that it held are begun again")
            return []

    def close(self) -> None:
        super().close()
        self._beside.close()


def last_mark(timings: Path, key: str = "bytes") -> int | None:
    """What the last line with that key says; None if no line has it. `bytes`: the size of the answers' file
    after its last finished group."""
    mark = None
    for line in timings.read_bytes().splitlines():
        try:
            found = json.loads(line)[key]
        except (ValueError, TypeError, KeyError):
            continue
        mark = found if isinstance(found, int) else mark
    return mark
