"""What must survive a kill, a full disk or a power cut: files that are written whole under another name,
fsynced and renamed, and files that only ever grow by whole lines.

Every durable write of the program goes through here, so that a test which kills the process at a chosen
`write`, `fsync` or `replace` meets them all. What to tell a user about a path that cannot be written is
decided here too (`writing`, `check_writable`).
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO, Self

from filelock import lock_descriptor

from deepspec.errors import DataError, UserError
from deepspec.log import warn

try:
    import fcntl
except ImportError:  # not POSIX: pieces cannot be claimed there
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
"""The lock file of a folder that several processes may write to."""
TAIL = 1 << 16
"""Bytes read at a time when the last line of a file is looked for from its end."""

# ── paths that cannot be written ──────────────────────────────────────────────────────────────────────

_FULL = "make room on that disk and run the same command again: what was finished is kept"
_ELSEWHERE = "name a place that you may write to"
_NO_FOLDER = "a folder on that path is a file"
UNWRITABLE = {
    errno.ENOSPC: _FULL,
    getattr(errno, "EDQUOT", errno.ENOSPC): _FULL,
    errno.EACCES: _ELSEWHERE,
    errno.EPERM: _ELSEWHERE,
    errno.EROFS: _ELSEWHERE,
    errno.EISDIR: "name a file, not a folder",
    errno.ENOTDIR: _ELSEWHERE,
    errno.EEXIST: _ELSEWHERE,
    errno.ENOENT: _ELSEWHERE,  # /proc and the like, where nothing can be made
}
"""What the system may answer to a write, and what the user does next. Any other answer is a bug of ours."""


def is_disk_full(error: OSError) -> bool:
    """Whether a write failed because the disk, or the user's quota, is full."""
    return UNWRITABLE.get(error.errno or 0) == _FULL


def cannot_write(error: OSError, path: Path | None = None) -> UserError | None:
    """The error to show for a write that the system refused; None if it is not one of `UNWRITABLE`, or is a
    missing file that was perhaps read (no path)."""
    if error.errno not in UNWRITABLE or (path is None and error.errno == errno.ENOENT):
        return None
    place = path or error.filename or "a file"
    why = _NO_FOLDER if error.errno in (errno.ENOTDIR, errno.EEXIST) else error.strerror
    return UserError(f"cannot write {place}: {why}", next_step=UNWRITABLE[error.errno])


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise UserError, with what to do next, if the system refuses a write to `path` inside the block."""
    try:
        yield
    except OSError as error:
        raise cannot_write(error, path) or error from error


def check_writable(path: Path | None, *, folder: bool = False) -> None:
    """Raise UserError if a file, or the files of a folder, could not be written, before the work whose result
    they will hold."""
    if path is None:
        return
    places = (path, *path.absolute().parents) if folder else path.absolute().parents
    nearest = next(p for p in places if p.exists())
    if path.is_dir() and not folder:
        why = "it is a folder"
    elif not nearest.is_dir():
        why = f"{nearest} is not a folder"
    elif not os.access(nearest, os.W_OK | os.X_OK):
        why = f"you may not write to {nearest}"
    else:
        try:
            # Some systems say that one may, and refuse: /proc, or a disk that is read-only or full.
            tempfile.TemporaryFile(dir=nearest).close()
            return
        except OSError as error:
            why = f"nothing can be written to {nearest} ({error.strerror})"
    kind = "name a folder" if folder else "name a file in a folder"
    raise UserError(f"{path} cannot be written: {why}", next_step=f"{kind} that you may write to")


# ── whole files and directories ───────────────────────────────────────────────────────────────────────


def fsync(path: Path) -> None:
    """Have a file's or a directory's content on the disk, not in a cache."""
    if path.is_dir() and os.name != "posix":
        return  # elsewhere directories cannot be opened
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A binary stream to write to; it becomes `path`, fsynced, only when the block ends without an error.

    Until then whatever was at `path` stays as it was, also when the process is killed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.part")
    try:
        with beside.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    fsync(path.parent)  # the rename itself must survive a power cut


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with atomic_file(path) as stream:
        stream.write(text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, whole or not at all; keys are sorted."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """A directory to fill; it takes its name, fsynced, only when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part, aside = path.with_name(f".{path.name}.part"), aside_of(path)
    if aside.exists() and not path.exists():
        aside.rename(path)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        yield part
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)  # on a full disk, its room is needed
        raise
    for file in part.iterdir():
        fsync(file)
    fsync(part)
    if path.exists():
        # A directory cannot be renamed over another: the old one steps aside first.
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
    part.rename(path)
    fsync(path.parent)
    shutil.rmtree(aside, ignore_errors=True)


def aside_of(path: Path) -> Path:
    """Where a directory steps while another takes its name; a kill between the two leaves it there."""
    return path.with_name(f".{path.name}.old")


def count_lines(path: Path | str) -> int | None:
    """Lines of a file, for a progress bar; None where that cannot be known. Reads at the disk's speed."""
    try:
        with Path(path).open("rb") as file:
            return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
    except OSError:
        return None


# ── locks ─────────────────────────────────────────────────────────────────────────────────────────────


def _locked(handle: int) -> bool:
    """Lock an open file for this process; False if another process holds it. A killed process holds nothing.

    A file system without locks (some network file systems) keeps no process out.
    """
    try:
        return lock_descriptor(handle, blocking=False)
    except OSError:
        return True


@contextmanager
def alone_in(folder: Path, doing: str) -> Iterator[None]:
    """Keep a folder, made if it is missing, to this process inside the block.

    Two processes that train in one folder would continue from each other's checkpoints. Raises UserError if
    another process is `doing` it, or if the folder cannot be written to.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if not _locked(handle):
            raise UserError(
                f"another process is {doing} in this folder",
                where=str(folder),
                next_step="wait until it is done, or give this one a folder or a name of its own",
            )
        yield
    finally:
        os.close(handle)


@contextmanager
def claimed(lock: Path, piece: int, *, wait: bool = False) -> Iterator[bool]:
    """Whether this process, of all that share the lock file, holds piece number `piece` inside the block.

    Piece n is byte n of the file, so that any number of pieces needs one lock file and a killed process
    leaves nothing behind. With `wait` the claim waits for a process that holds the piece. A system without
    such locks keeps no process out.
    """
    if fcntl is None:
        yield True
        return
    with writing(lock):
        handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, piece)
            ours = True
        except OSError as error:
            # Some network file systems refuse all locks, and that is not another process's claim.
            ours = error.errno not in (errno.EACCES, errno.EAGAIN)
        yield ours
    finally:
        os.close(handle)


# ── files that grow by whole lines ────────────────────────────────────────────────────────────────────


def plain(value: Any) -> Any:
    """`value` with every number that JSON cannot write (nan, ±inf) as None, all the way down."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def repair_last_line(path: Path) -> int:
    """Make a JSONL file end with a whole line, and return the number of bytes dropped to get there.

    A process killed while writing leaves a last line without its newline. If that line is a whole object
    after all it gets its newline; otherwise it goes. Whole lines are never touched, nor read.
    """
    if not path.exists():
        return 0
    with path.open("r+b") as file:
        end = start = file.seek(0, os.SEEK_END)
        tail = b""
        while start and b"\n" not in tail:
            step = min(TAIL, start)
            start -= step
            file.seek(start)
            tail = file.read(step) + tail
        tail = tail[tail.rfind(b"\n") + 1 :]
        if not tail:
            return 0
        try:
            whole = isinstance(json.loads(tail), dict)
        except ValueError:
            whole = False
        if whole:
            file.seek(0, os.SEEK_END)
            file.write(b"\n")
            file.flush()
        else:
            file.truncate(end - len(tail))
        os.fsync(file.fileno())
    return 0 if whole else len(tail)


class JsonlWriter:
    """Append objects to a JSONL file, one per line. Each line is handed to the system as it is written.

    A killed process loses no line it had finished, and a torn last line from an earlier run is dropped on
    opening (`dropped_bytes` is its length). `sync` puts everything so far on the disk; so does closing.
    Numbers that JSON does not know (nan, inf) are written as null. Raises UserError if the path cannot be
    written to, if the disk is full, and, with `alone`, if another process is writing to the file.
    """

    def __init__(self, path: Path | str, *, alone: bool = False) -> None:
        self.path = Path(path)
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file: BinaryIO = self.path.open("ab", buffering=0)
            # On Windows a locked file could not be read either.
            if alone and os.name == "posix" and not _locked(self._file.fileno()):
                self._file.close()
                raise UserError(
                    "another process is writing to this file",
                    where=str(self.path),
                    next_step="wait until it is done, or give this one a path of its own",
                )
            self.dropped_bytes = repair_last_line(self.path)
        if self.dropped_bytes:
            warn(f"{self.path}: dropped a torn last line of {self.dropped_bytes} bytes")

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return os.fstat(self._file.fileno()).st_size

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one object as one line. Raises TypeError for a value that is not plain JSON data."""
        text = json.dumps(plain(record), ensure_ascii=False, allow_nan=False)
        # UTF-8 has no half of a surrogate pair, and replaced by its backslash escape it is the same in JSON.
        line = text.encode(errors="backslashreplace") + b"\n"
        # One system call for text and newline together, so that another process never reads half of the pair.
        # The system may take only a part (a disk that fills up): the rest is then written, or raises, next.
        with writing(self.path):
            while line:
                line = line[os.write(self._file.fileno(), line) :]

    def sync(self) -> None:
        with writing(self.path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if not self._file.closed:
            self.sync()
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class ResumableLog(JsonlWriter):
    """Append to a JSONL file that was made under the same conditions, as its only writer.

    The conditions are either the first line (`header`) or part of every line. A file with another header is
    moved aside to NAME.old-1.jsonl, with a warning, and this one starts empty. A line that was made under
    other conditions is refused when it is read. Raises UserError as `JsonlWriter` does.
    """

    def __init__(self, path: Path, conditions: Mapping[str, Any], *, header: bool = False) -> None:
        self.conditions: dict[str, Any] = json.loads(json.dumps(plain(conditions)))
        self._header = header
        super().__init__(path, alone=True)
        if not header:
            return
        with path.open("rb") as stream:
            line, first = stream.readline(), None
        with suppress(ValueError):
            first = json.loads(line)
        first, now = first if isinstance(first, dict) else {"header": None}, self.conditions
        other = [k for k in {**first, **now} if k not in first or first[k] != now.get(k)]
        if line and other:
            aside = next(p for i in count(1) if not (p := path.with_suffix(f".old-{i}.jsonl")).exists())
            path.rename(aside)
            self.close()
            names = ", ".join(f"'{key}'" for key in other)
            warn(f"{aside} was begun with another {names}; {path.name} starts again without it")
            super().__init__(path, alone=True)
        if not self.size:
            self.write(self.conditions)

    def records(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """(offset in bytes, record) of each line but the header.

        Raises DataError at a line that is not an object, or that was made under other conditions.
        """
        at = 0
        with self.path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                try:
                    record = json.loads(line)
                except ValueError:
                    record = None
                if wrong := _wrong(record, {} if self._header else self.conditions):
                    raise DataError(
                        f"this line {wrong}", where=f"{self.path}:{number}", next_step=ANOTHER_FILE
                    )
                if number > 1 or not self._header:
                    yield at, record
                at += len(line)


ANOTHER_FILE = "write to another file, or delete this one to start again"


def check_conditions(path: Path, conditions: Mapping[str, Any]) -> None:
    """Raise DataError if the first line of a file was made under other conditions than a `ResumableLog` of it
    would be opened with. A missing file and a torn line are not."""
    now = json.loads(json.dumps(plain(conditions)))
    with suppress(OSError, ValueError):
        with path.open("rb") as stream:
            first = json.loads(stream.readline())
        if wrong := _wrong(first, now):
            raise DataError(f"this line {wrong}", where=f"{path}:1", next_step=ANOTHER_FILE)


def _wrong(record: Any, conditions: Mapping[str, Any]) -> str | None:
    """Why a line cannot be used; None if it can."""
    if not isinstance(record, dict):
        return "is not a JSON object"
    for key, now in conditions.items():
        if record.get(key) != now:
            was = f"was made with {key} {record[key]!r}" if key in record else f"has no '{key}'"
            return f"{was}, but now it is {now!r}"
    return None
