"""Joules, where the machine can tell: the processor's own counters on Linux, a GPU's through NVML."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

POWERCAP = Path("/sys/class/powercap")


def read_joules(device: torch.device) -> float | None:
    """A meter's reading in joules since some fixed moment; None where there is no meter to read.

    On a GPU its own consumption, on a CPU that of all packages. Only differences mean anything.
    """
    return _gpu_joules(device) if device.type == "cuda" else _package_joules()


def _package_joules() -> float | None:
    if sys.platform != "linux":
        return None
    total, found = 0.0, False
    for meter in POWERCAP.glob("intel-rapl:[0-9]*"):
        # intel-rapl:0 is a package, intel-rapl:0:1 a part of it that would count twice.
        if meter.name.count(":") != 1:
            continue
        try:
            total += int((meter / "energy_uj").read_text()) / 1e6
            found = True
        except (OSError, ValueError):
            return None
    return total if found else None


def _gpu_joules(device: torch.device) -> float | None:
    try:
        import pynvml  # type: ignore[import-not-found,import-untyped,unused-ignore]

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(device.index or 0)
        return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1000
    except Exception:  # the library may be missing, too old, or refuse this card: all mean "no meter"
        return None
