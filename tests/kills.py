"""Processes that kill themselves at a chosen durable operation, and disks that fill up in mid-line.

The operations are `os.write`, `os.fsync` and `os.replace`, through which `deepspec.files` makes things last.
A child is forked from a process that has everything imported and loaded, so it costs a fraction of a second.
"""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from deepspec.files import alone_in

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")


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


def killed_at(operation: int, work: Callable[[], object]) -> bool:
    """Do the work in a child that dies at its n-th durable operation (from 1); whether it came that far.

    A write is cut in half, so the child dies in the middle of a line; anything else isn't begun. Raises
    AssertionError where the child failed in another way.
    """

    def dying() -> None:
        kill_at(operation)
        work()

    _, status = os.waitpid(in_child(dying), 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, -signal.SIGKILL), f"the child ended with {code}"
    return code != 0


def kill_at(operation: int) -> None:
    """Have this process die at its n-th durable operation from now."""
    at_operation(operation, lambda: os.kill(os.getpid(), signal.SIGKILL))


def at_operation(number: int, act: Callable[[], object]) -> None:
    """Have this process act when it comes to its n-th durable operation: half of a write is done by then."""
    write, seen = os.write, [0]

    def due() -> bool:
        seen[0] += 1
        return seen[0] == number

    def half(handle: int, data: Any) -> int:
        if not due():
            return write(handle, data)
        done = write(handle, data[: len(data) // 2])
        act()
        return done

    def wrapped(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if due():
                act()
            return real(*arguments, **options)

        return call

    os.write = half  # type: ignore[assignment]
    os.fsync, os.replace = wrapped(os.fsync), wrapped(os.replace)  # type: ignore[assignment]


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
