"""From a file's bytes to lines of text, one at a time, and what becomes of rows that cannot be used.

A line is held in memory whole, so its length is limited: a file without line ends is refused at its first
64 MiB instead of filling the machine. UTF-8 with or without a byte-order mark, lines ended by LF or CRLF.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from deepspec.errors import DataError

MAX_LINE_MB = 64.0
"""MiB of one line, unless DEEPSPEC_MAX_LINE_MB says otherwise: some 15 million tokens of text."""

_WHOLE_FILE = {  # first bytes -> (what the file is, how to mend it): no row of it can be read
    b"\xff\xfe": ("UTF-16", "iconv -f utf-16 -t utf-8 IN > OUT"),
    b"\xfe\xff": ("UTF-16", "iconv -f utf-16 -t utf-8 IN > OUT"),
    b"\x1f\x8b": ("compressed (gzip)", "gunzip -k FILE.gz"),
    b"PAR1": ("Parquet", "a name that ends in .parquet has it read as such"),
}


@dataclass
class Skipped:
    """Bad rows that were left out: how many, for which reasons, and where the first few are."""

    shown: int = 5
    """Places remembered."""
    count: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    places: list[str] = field(default_factory=list)

    def add(self, error: DataError) -> None:
        """Count a bad row instead of stopping at it."""
        self.count += 1
        # "message 2 is user after user" and "message 4 is …" are one reason. A file of rubbish must not fill
        # the memory with reasons either.
        reason = re.sub(r"(?<![\w-])\d+\b", "N", error.what)[:200]
        self.reasons[reason if reason in self.reasons or len(self.reasons) < 100 else "other reasons"] += 1
        if len(self.places) < self.shown:
            self.places.append(f"{error.where}: {error.what}" if error.where else error.what)

    def lines(self) -> list[str]:
        """The account for a person: the count, each reason with its own, the first places."""
        if not self.count:
            return []
        reasons = [f"  {count} × {reason}" for reason, count in self.reasons.most_common(10)]
        places = [f"  {place}" for place in self.places]
        return [f"skipped {self.count} bad rows:", *reasons, "the first of them:", *places]

    def as_json(self) -> dict[str, Any]:
        return {"count": self.count, "reasons": dict(self.reasons.most_common()), "first": self.places}


class SkipNothing(Skipped):
    """For commands that can skip and were not asked to: stops at the first bad row and names the option."""

    def add(self, error: DataError) -> None:
        option = "--skip-bad leaves such rows out and counts them"
        step = f"{error.next_step}; or {option}" if error.next_step else option
        raise DataError(error.what, where=error.where, next_step=step) from error.__cause__


def refuse(error: DataError, skipped: Skipped | None) -> None:
    """Count a bad row where bad rows are skipped; raise its error where they are not."""
    if skipped is None:
        raise error
    skipped.add(error)


def text_lines(
    path: Path, skipped: Skipped | None = None, *, errors: str = "strict"
) -> Iterator[tuple[str, str]]:
    """("file:line", text with its line end) of every line, blank ones too; one line in memory at a time.

    `errors`: what becomes of bytes that are not UTF-8, as in `bytes.decode`.

    Raises DataError where the file cannot be opened or is no UTF-8 text at all; for a line that is too long
    or not UTF-8, only without `skipped`, which else counts it.
    """
    try:
        stream = path.open("rb")
    except OSError as error:
        raise DataError(
            f"cannot read the conversations: {error.strerror or error}",
            where=str(path),
            next_step="give the path of a JSONL file, one conversation per line",
        ) from error
    limit, number = max_line_bytes(), 0
    with stream:
        # Lines end at b"\n" only: splitting decoded text would also cut at U+2028 inside a message.
        while raw := stream.readline(limit + 1):
            number += 1
            where = f"{path}:{number}"
            if number == 1:
                raw = _start(raw, where)
            try:
                if len(raw) > limit and not raw.endswith(b"\n"):
                    raise _too_long(limit, where)
                text = _decode(raw, where, errors)
            except DataError as error:
                refuse(error, skipped)
                _to_line_end(stream, raw)
                continue
            yield where, text


def max_line_bytes() -> int:
    """The longest line that is read, in bytes: DEEPSPEC_MAX_LINE_MB (MiB), by default 64."""
    given = os.environ.get("DEEPSPEC_MAX_LINE_MB", "")
    try:
        megabytes = float(given or MAX_LINE_MB)
        if not 0 < megabytes < 2**20:
            raise ValueError
    except ValueError:
        raise DataError(
            f"not a number of MiB above 0: {given!r}", where="DEEPSPEC_MAX_LINE_MB in the environment"
        ) from None
    return max(1, int(megabytes * 2**20))


def _start(raw: bytes, where: str) -> bytes:
    """The first line without a UTF-8 byte-order mark, which says nothing and would break the JSON."""
    for magic, (kind, remedy) in _WHOLE_FILE.items():
        if raw.startswith(magic):
            raise DataError(f"the file is {kind}, expected UTF-8 text", where=where, next_step=remedy)
    return raw.removeprefix(b"\xef\xbb\xbf")


def _decode(raw: bytes, where: str, errors: str) -> str:
    try:
        return raw.decode("utf-8", errors)
    except UnicodeDecodeError as error:
        raise DataError(
            f"not UTF-8: byte 0x{raw[error.start]:02x} at byte {error.start + 1} of the line",
            where=where,
            next_step="convert the file, for example: iconv -f latin1 -t utf-8 in.jsonl > out.jsonl",
        ) from error


def _too_long(limit: int, where: str) -> DataError:
    return DataError(
        f"the line is longer than {limit / 2**20:g} MiB",
        where=where,
        next_step="write one row per line; DEEPSPEC_MAX_LINE_MB in the environment allows longer ones",
    )


def _to_line_end(stream: BinaryIO, raw: bytes) -> None:
    """Pass over the rest of a line, keeping none of it."""
    while raw and not raw.endswith(b"\n"):
        raw = stream.readline(1 << 20)
