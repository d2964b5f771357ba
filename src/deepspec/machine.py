"""What makes two measurements comparable: the machine's name in words, and how many threads are at work."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


def this_machine() -> str:
    """Processor or accelerator, threads, system and torch."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    parts = [gpu or _processor(), f"{os.cpu_count()} cores", f"{torch.get_num_threads()} threads"]
    return ", ".join([*parts, platform.system(), f"torch {torch.__version__}"])


def busy() -> float | None:
    """The last minute's load (processes that ran or waited to, on average, this user's own among them) where
    it is at least 1.5 and half of the processors; None below, and where the system does not say."""
    try:
        load = os.getloadavg()[0]
    except (OSError, AttributeError):
        return None
    return load if load >= max((os.cpu_count() or 1) / 2, 1.5) else None


@contextmanager
def one_thread() -> Iterator[None]:
    """Tensor operations on one CPU thread, for steps too small to be shared out."""
    usual = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(usual)


def _processor() -> str:
    """The processor's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration, IndexError):
        return platform.processor() or platform.machine()
