"""A process that dies at its n-th durable operation, as if it were killed there: SIGKILL, nothing tidied up.

Durable operations are a write to a file (of which half arrives), an fsync, and a rename.
"""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from kills import in_child


class _Counted(io.FileIO):
    """An unbuffered file whose writes are durable operations."""

    before: Callable[[Callable[[], None]], None]

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")

        def half() -> None:
            io.FileIO.write(self, view[: len(view) // 2])

        self.before(half)
        done = 0
        while done < len(view):
            done += io.FileIO.write(self, view[done:]) or 0
        return done


@contextmanager
def at_operation(act: Callable[[int, Callable[[], None]], None]) -> Iterator[None]:
    """Call act(n, half) before the n-th durable operation (from 0); `half` does half of it, if a write."""
    seen = iter(range(10**9))

    def before(half: Callable[[], None] = lambda: None) -> None:
        act(next(seen), half)

    real_open, real_fsync, real_replace = io.open, os.fsync, os.replace

    def opening(file: Any, mode: str = "r", *rest: Any, **named: Any) -> Any:
        if mode != "wb":
            return real_open(file, mode, *rest, **named)
        raw = _Counted(file, "wb")
        raw.before = before  # type: ignore[method-assign]
        return raw

    def fsync(handle: int) -> None:
        before()
        real_fsync(handle)

    def replace(*names: Any) -> None:
        before()
        real_replace(*names)

    opened, synced = patch.object(io, "open", opening), patch.object(os, "fsync", fsync)
    with opened, synced, patch.object(os, "replace", replace):
        yield


def ended(child: int) -> bool:
    """Wait for a child: whether it ended well. False where it was killed; an error of its own is raised."""
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL), code
    return code == 0


def killed_at(work: Callable[[], None], operation: int) -> bool:
    """Fork, do the work, die at its n-th durable operation: whether it came that far."""

    def act(n: int, half: Callable[[], None]) -> None:
        if n == operation:
            half()
            os.kill(os.getpid(), signal.SIGKILL)

    def child() -> None:
        with at_operation(act):
            work()

    return not ended(in_child(child))


def count_operations(work: Callable[[], None]) -> int:
    """Durable operations of the whole work, done in this process."""
    seen = [0]

    def act(n: int, half: Callable[[], None]) -> None:
        seen[0] = n + 1

    with at_operation(act):
        work()
    return seen[0]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by name."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
