"""What training takes: peak memory, operations per second next to the device's most, time for features."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from deepspec.cost.machines import GB, machine_called
from deepspec.data.tokens import Encoded
from deepspec.features.batches import Source
from deepspec.maths.blocks import FeatureBatch


class Meter:
    """Reads the device of one of `world` processes. On an accelerator, the products of the first measured
    step that has some are counted, once: counting makes a step slower. A CPU's peak is not known, so it
    counts nothing. precision: of the draft, whose products are most of a step's. seconds: of steps so far."""

    def __init__(self, device: torch.device, precision: str, world: int, seconds: float = 0.0) -> None:
        self.device, self.world = device, world
        self.counts, self.peak = device.type == "cuda", None
        if self.counts and (machine := machine_called(torch.cuda.get_device_name(device))) is not None:
            self.peak = machine.float32 if precision == "float32" else machine.bfloat16
        self.per_token: float | None = None
        self.on_features, self.read_at = 0.0, seconds

    def timed(self, source: Source) -> Source:
        """The same source, whose time is counted."""

        def features(rows: Sequence[Encoded], width: int) -> FeatureBatch:
            began = time.perf_counter()
            try:
                return source(rows, width)
            finally:
                self.on_features += time.perf_counter() - began

        return features

    @contextmanager
    def counting(self, measure: bool, tokens: int) -> Iterator[None]:
        """Count this process's share of a step over `tokens`, if none was counted yet and it is measured."""
        if not (self.counts and measure and self.per_token is None):
            yield
            return
        with _Products() as products:
            yield
        self.per_token = products.flops * self.world / tokens or None

    def read(self, tokens_per_s: float, seconds: float) -> dict[str, float]:
        """`memory_gb`: the most so far. `features_share`: of the time of steps since the last reading, the
        share in which this process waited for features, or computed them. Once a step was counted, `tflops`
        per second of this device, and `mfu`, their share of its peak, if that is known. tokens_per_s: of all
        processes, over the run; seconds: of steps, over the run."""
        share = self.on_features / max(seconds - self.read_at, 1e-9)
        found = {"memory_gb": round(peak_memory(self.device) / GB, 3), "features_share": min(share, 1.0)}
        self.on_features, self.read_at = 0.0, seconds
        if self.per_token is not None:
            speed = self.per_token * tokens_per_s / self.world
            found["tflops"] = speed / 1e12
            if self.peak is not None:
                found["mfu"] = speed / self.peak
        return found


class _Products(TorchDispatchMode):
    """Adds up the operations of products and attention while it is entered. torch's own counter takes
    operations apart, which changes the last bits of what they compute, and knows no product in place."""

    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        kind = func._overloadpacket
        kind = torch.ops.aten.addmm if kind is torch.ops.aten.addmm_ else kind
        if kind in flop_registry:
            self.flops += flop_registry[kind](*(x for x in args if isinstance(x, Tensor)), out_val=out)
        return out


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors took on an accelerator, or the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
