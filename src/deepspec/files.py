"""What must survive a kill, a full disk or a power cut: files written beside, fsynced and renamed, and files
that only ever grow by whole lines.

Every durable write of the program goes through here, so that a test which kills the process at a chosen
`write`, `fsync` or `replace` meets them all.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from deepspec.errors import UserError
from deepspec.log import warn

try:
    import fcntl
except ImportError:  # not POSIX: files cannot be claimed there
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
"""In a folder that several processes may write to: what they claim is a byte of it."""
TAIL = 1 << 16
"""Bytes read at a time when the last line of a file is looked for from its end."""


def is_disk_full(error: OSError) -> bool:
    """Whether a write failed for want of space, or of the user's share of it."""
    return error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what a disk refuses inside the block into an error that says what to do about it."""
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            todo = "make room there and run the same command again: what was finished is kept"
        elif error.errno in (
            errno.EACCES,
            errno.EPERM,
            errno.EROFS,
            errno.EISDIR,
            errno.ENOTDIR,
            errno.EEXIST,
        ):
            todo = "give a path that can be written to"
        else:
            raise
        raise UserError(f"cannot write: {error.strerror}", where=str(path), next_step=todo) from error


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
    yield part
    for file in part.iterdir():
        fsync(file)
    fsync(part)
    if path.exists():
        # A directory cannot be renamed over another: the old one steps aside first.
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        part.rename(path)
    else:
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


# ── one writer for a piece of work ────────────────────────────────────────────────────────────────────


@contextmanager
def claimed(lock: Path, piece: int, *, wait: bool = False) -> Iterator[bool]:
    """Whether this process, of all that share the lock file, holds piece number `piece` inside the block.

    Piece n is byte n of the file, locked by the system, so that a killed process holds nothing. Without
    `wait` a piece that another process holds is given up at once. Where the system has no such locks, nobody
    is kept out.
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
            # Some network file systems refuse all locks, and that is not somebody else's claim.
            ours = error.errno not in (errno.EACCES, errno.EAGAIN)
        yield ours
    finally:
        os.close(handle)


@contextmanager
def alone_in(folder: Path, doing: str) -> Iterator[None]:
    """Keep a folder to this process inside the block; it is made where it is not there.

    Two that train in one folder would go on from each other's checkpoints. Raises UserError where another
    process is `doing` it, or where the folder cannot be written to. Nobody is kept out where the system has
    no locks (`claimed`).
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with claimed(folder / LOCK, 0) as ours:
        if not ours:
            raise UserError(
                f"another process is {doing} in this folder",
                where=str(folder),
                next_step="wait until it is done, or give this one a folder or a name of its own",
            )
        yield


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
    """Append objects to a JSONL file, one a line, each handed to the system as it is written.

    A killed process loses no line it had finished, and a torn last line from an earlier run is repaired on
    opening (`dropped_bytes` says how much of it went). `sync` has everything so far on the disk, as closing
    does. Numbers that JSON does not know (nan, inf) are written as null. Raises UserError where the path
    cannot be written to, where the disk is full, and, with `alone`, where another process is writing to the
    file.
    """

    def __init__(self, path: Path | str, *, alone: bool = False) -> None:
        self.path = Path(path)
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file: BinaryIO = self.path.open("ab", buffering=0)
            if alone:
                self._claim()
            self.dropped_bytes = repair_last_line(self.path)
        if self.dropped_bytes:
            warn(f"{self.path}: dropped a torn last line of {self.dropped_bytes} bytes")

    def _claim(self) -> None:
        """Keep the file to this process until it is closed. Two would write every row twice."""
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise UserError(
                "another process is writing to this file",
                where=str(self.path),
                next_step="wait until it is done, or give this one a path of its own",
            ) from None
        except OSError:
            pass  # a file system without locks

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return os.fstat(self._file.fileno()).st_size

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one object as one line. Raises TypeError on a value that is not plain JSON data."""
        line = json.dumps(plain(record), ensure_ascii=False, allow_nan=False).encode() + b"\n"
        # One system call for text and newline together: a reader beside us never sees half of the pair. The
        # system may take less than all of it (a disk that fills up): the rest then goes, or raises, next.
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

    def __enter__(self) -> JsonlWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
