"""Processes that are killed at a chosen durable operation, and disks that fill up in the middle of a line.

The operations are a write to a file (of which half arrives), an fsync and a rename, through which
`deepspec.files` makes things last; they count from 1. A child is forked from a process that has everything
imported and loaded, so it costs a fraction of a second.
"""

from __future__ import annotations

import errno
import io
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from deepspec.files import alone_in

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
Act = Callable[[int, Callable[[], object]], None]
"""act(n, half): called before the n-th durable operation; `half` does half of it, if it is a write."""


def in_child(work: Callable[[], object]) -> int:
    """The process id of a fork that does the work and exits 0."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return child


def ended(child: int) -> bool:
    """Wait for a child: whether it ended well. False if it was killed; an error of its own is raised."""
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL), f"the child ended with {code}"
    return code == 0


@contextmanager
def held_by_another(folder: Path, doing: str) -> Iterator[None]:
    """Inside the block another process has the folder to itself."""
    there, ready = os.pipe()
    hold, done = os.pipe()

    def work() -> None:
        os.close(done)
        with alone_in(folder, doing):
            os.write(ready, b".")
            os.read(hold, 1)

    child = in_child(work)
    os.close(ready)
    try:
        assert os.read(there, 1) == b"."
        yield
    finally:
        os.close(done)
        os.waitpid(child, 0)
        os.close(there)
        os.close(hold)


class _Counted(io.FileIO):
    """An unbuffered file whose writes are durable operations."""

    before: Callable[[Callable[[], object]], None]

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self.before(lambda: io.FileIO.write(self, view[: len(view) // 2]))
        done = 0
        while done < len(view):
            done += io.FileIO.write(self, view[done:]) or 0
        return done


@contextmanager
def at_operation(act: Act) -> Iterator[None]:
    """Call `act` before every durable operation inside the block."""
    seen = iter(range(1, 10**9))

    def before(half: Callable[[], object] = lambda: None) -> None:
        act(next(seen), half)

    real_open, real_write = io.open, os.write

    def opening(file: Any, mode: str = "r", *rest: Any, **named: Any) -> Any:
        if mode != "wb":
            return real_open(file, mode, *rest, **named)
        raw = _Counted(file, "wb")
        raw.before = before  # type: ignore[method-assign]
        return raw

    def write(handle: int, data: Any) -> int:
        before(lambda: real_write(handle, data[: len(data) // 2]))
        return real_write(handle, data)

    def wrapped(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            before()
            return real(*arguments)

        return call

    with (
        patch.object(io, "open", opening),
        patch.object(os, "write", write),
        patch.object(os, "fsync", wrapped(os.fsync)),
        patch.object(os, "replace", wrapped(os.replace)),
    ):
        yield


def killed_at(operation: int, work: Callable[[], object]) -> bool:
    """Do the work in a child that dies at its n-th durable operation; whether it came that far."""

    def act(n: int, half: Callable[[], object]) -> None:
        if n == operation:
            half()
            os.kill(os.getpid(), signal.SIGKILL)

    def child() -> None:
        with at_operation(act):
            work()

    return not ended(in_child(child))


def count_operations(work: Callable[[], object]) -> int:
    """Durable operations of the whole work, done in this process."""
    seen = [0]

    def act(n: int, half: Callable[[], object]) -> None:
        seen[0] = n

    with at_operation(act):
        work()
    return seen[0]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by name."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@contextmanager
def disk_of(size: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A disk with room for so many bytes: what does not fit raises ENOSPC, after the part that did."""
    write, left = os.write, [size]

    def cut(handle: int, data: Any) -> int:
        if left[0] <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done = write(handle, data[: left[0]])
        left[0] -= done
        return done

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", cut)
        yield
