"""What training takes of its device: peak memory, and operations per second next to the device's most."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils.flop_counter import FlopCounterMode

from deepspec.cost.machines import GB, MACHINES


class Meter:
    """Reads the device of one of `world` processes. On an accelerator, the products of the first measured
    step are counted, once: counting makes a step slower. A CPU's peak is not known, so it counts nothing."""

    def __init__(self, device: torch.device, dtype: torch.dtype, world: int) -> None:
        self.device, self.world = device, world
        self.counts = device.type == "cuda"
        self.peak = peak_of(torch.cuda.get_device_name(device), dtype) if self.counts else None
        self.per_token: float | None = None

    @contextmanager
    def counting(self, measure: bool, tokens: int) -> Iterator[None]:
        """Count this process's share of a step over `tokens`, if none was counted yet and it is measured."""
        if not (self.counts and measure and self.per_token is None):
            yield
            return
        with FlopCounterMode(display=False) as counter:
            yield
        self.per_token = counter.get_total_flops() * self.world / tokens

    def read(self, tokens_per_s: float) -> dict[str, float]:
        """`memory_gb`: the most so far. Once a step was counted, `tflops` per second of this device, and
        `mfu`, their share of its peak, if that is known. tokens_per_s: of all processes."""
        found = {"memory_gb": round(peak_memory(self.device) / GB, 3)}
        if self.per_token is not None:
            speed = self.per_token * tokens_per_s / self.world
            found["tflops"] = speed / 1e12
            if self.peak is not None:
                found["mfu"] = speed / self.peak
        return found


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors took on an accelerator, or the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_of(name: str, dtype: torch.dtype) -> float | None:
    """Operations per second of the accelerator that calls itself `name`, at most; None if it is not one of
    `MACHINES`."""
    letters = "".join(name.lower().split())
    known = (machine for key, machine in MACHINES.items() if machine.memory is not None and key in letters)
    return next((machine.numbers(dtype.itemsize)["peak"] for machine in known), None)
