"""This machine: its name in words, its threads, how busy it is, and its energy meter."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

POWERCAP = Path("/sys/class/powercap")


def this_machine() -> str:
    """Processor or accelerator, threads, system and torch."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    counts = {"core": os.cpu_count() or 1, "thread": torch.get_num_threads()}
    parts = [gpu or _processor(), *(f"{count} {what}" + "s" * (count > 1) for what, count in counts.items())]
    return ", ".join([*parts, platform.system(), f"torch {torch.__version__}"])


def clock(device: torch.device) -> float:
    """The time now in seconds, once the device has finished everything asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


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


def read_joules(device: torch.device) -> float | None:
    """A meter's reading in joules since some fixed moment; None if there is no meter to read.

    On a GPU its own consumption, on a CPU that of all packages. Only differences mean anything.
    """
    return _gpu_joules(device) if device.type == "cuda" else _package_joules()


def _package_joules() -> float | None:
    # intel-rapl:0 is a package, intel-rapl:0:1 a part of it that would count twice.
    packages = [path for path in POWERCAP.glob("intel-rapl:[0-9]*") if path.name.count(":") == 1]
    try:
        joules = [int((path / "energy_uj").read_text()) / 1e6 for path in packages]
    except (OSError, ValueError):
        return None
    return sum(joules) if joules else None


def _gpu_joules(device: torch.device) -> float | None:
    try:
        import pynvml  # type: ignore[import-not-found,import-untyped,unused-ignore]

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(device.index or 0)
        return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1000
    except Exception:  # the library may be missing, too old, or refuse this card: all mean "no meter"
        return None
