"""Machines that a plan can be made for: the vendors' figures for dense arithmetic, and what a program is
assumed to reach of them.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

GB = 1e9
HOST_BANDWIDTH, HOST_LINK = 50e9, 20e9
"""Bytes per second that a host's processor reads and writes for one accelerator, and that pass between its
memory and the accelerator's: assumptions."""


class Machine(NamedTuple):
    """One accelerator and its share of a host, or a processor alone.

    memory: bytes of the accelerator, None for a processor, whose memory is the host's. host: bytes of host
    memory, None if they are not known. watts: power at full load, None if it is not known.
    """

    name: str
    bfloat16: float
    """Operations per second of dense matrix products, accumulated in float32."""
    float32: float
    bandwidth: float
    """Bytes per second between memory and processor."""
    memory: float | None
    host: float | None
    watts: float | None
    share: float = 0.4
    """Share of the peak that is reached in training and in passes over whole sequences: an assumption."""
    bandwidth_share: float = 0.6
    """Share of the bandwidth that is reached in decoding: an assumption."""
    launch: float = 0.5e-3
    """Seconds that Python and kernel launches add to each layer of a decoding step in process: an assumption.
    An inference engine with captured graphs adds next to none."""

    def numbers(self, width: float) -> dict[str, float]:
        """What seconds depend on, by name. peak: operations per second on numbers of `width` bytes."""
        peak = self.float32 if width == 4 else self.bfloat16
        shares = {"share": self.share, "bandwidth_share": self.bandwidth_share}
        return {"peak": peak, "bandwidth": self.bandwidth, "launch": self.launch} | shares


MACHINES = {
    machine.name: machine
    for machine in (
        Machine("rtx3090", 71e12, 35.6e12, 936e9, 24 * GB, 64 * GB, 350),
        Machine("rtx4090", 165e12, 82.6e12, 1008e9, 24 * GB, 64 * GB, 450),
        Machine("l40s", 362e12, 91.6e12, 864e9, 48 * GB, 128 * GB, 350),
        Machine("a100", 312e12, 19.5e12, 2039e9, 80 * GB, 128 * GB, 400),
        Machine("h100", 989e12, 67e12, 3350e9, 80 * GB, 192 * GB, 700),
        Machine("h200", 989e12, 67e12, 4800e9, 141 * GB, 192 * GB, 700),
        Machine("laptop-cpu", 0.3e12, 0.4e12, 60e9, None, 16 * GB, 45, 0.5, 0.5, 0.7e-3),
        Machine("server-cpu", 4e12, 3e12, 300e9, None, 256 * GB, 350, 0.5, 0.5, 0.7e-3),
    )
}
"""By name; accelerators from the smallest to the largest. Their hosts' memory is an assumption."""


VARIANTS = {"laptop", "ti", "super", "pcie", "nvl"}
"""Words in the names of cards whose figures are not those of the row with the same number."""


def machine_called(device: str) -> Machine | None:
    """The row of an accelerator that calls itself `device`: "NVIDIA H100 80GB HBM3" is the row h100, "NVIDIA
    GeForce RTX 4090" the row rtx4090. None for others, and for slower or faster variants of those."""
    words = device.lower().replace("rtx ", "rtx").replace("-", " ").split()
    if VARIANTS.intersection(words):
        return None
    return next((known for known in MACHINES.values() if known.memory and known.name in words), None)


def host_memory() -> float | None:
    """Bytes of memory of this machine, or of the container that we run in; None if it does not say."""
    found = []
    with suppress(AttributeError, OSError, ValueError):
        found.append(float(os.sysconf("SC_PHYS_PAGES")) * os.sysconf("SC_PAGE_SIZE"))
    with suppress(OSError, ValueError):  # "max", or no such control group
        found.append(float(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(found, default=None)
