"""Functions that a compiler turns into one pass over memory, if it is asked to.

Apart from its matrix products, a step on a GPU is passes over wide tensors, one or more for each operation.
`torch.compile` makes one kernel of a function that works number by number or row by row, and one of its
gradient, which computes again what it can instead of keeping it. Numbers then stay in float32 between the
operations, where the operations by themselves round each to the tensors' own dtype.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])
ONE_PASS: dict[str, Any] = {
    "realize_reads_threshold": 64,
    "realize_opcount_threshold": 512,
    "realize_acc_reads_threshold": 64,
}
"""The compiler's limits on how often it computes a wide tensor again before it would rather store it. Memory
is what costs here, not arithmetic."""
LEAST = 2**20
"""Numbers in a tensor below which a pass over it takes no longer than asking a compiled function for it."""
_wanted = False
_compiled: dict[Callable[..., Any], Callable[..., Any]] = {}


@contextmanager
def compiling(wanted: bool | None, device: torch.device | str = "cpu") -> Iterator[None]:
    """Compile what is `fused` until the context ends; outside of any, nothing is compiled. wanted: None
    compiles if the device is a GPU that Triton supports. On a CPU the products take most of the time, and the
    passes stay in its cache."""
    from torch._functorch import config
    from torch.utils._triton import has_triton

    global _wanted
    if wanted is None:
        wanted = torch.device(device).type == "cuda" and bool(has_triton())
    before, _wanted = _wanted, wanted
    try:
        # A gradient that cannot be compiled then fails with its function, which still runs as it is written.
        with config.patch(force_non_lazy_backward_lowering=wanted):
            yield
    finally:
        _wanted = before
        if _compiled:
            _compiled.clear()
            torch.compiler.reset()  # or compilations of one run after the other would add up to torch's limit


def compiles(x: Tensor) -> bool:
    """Whether what is `fused` is compiled for tensors like x. Decoding, which runs in inference mode, is not:
    its tensors are small, and each kind of them would be a compilation."""
    return _wanted and x.numel() >= LEAST and not torch.is_inference_mode_enabled()


def fused(function: Function) -> Function:
    """Decorates a function whose first argument is a tensor. Any sizes share one compilation. If it fails,
    the function runs as it is written from then on, after a warning; what it changes in place is expected to
    be as it was, since compiling is what fails."""

    @wraps(function)
    def run(first: Tensor, *others: Any) -> Any:
        if not _wanted or not compiles(first):
            return function(first, *others)
        try:
            if function not in _compiled:
                _compiled[function] = torch.compile(function, dynamic=True, options=ONE_PASS)
            return _compiled[function](first, *others)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a compiler, its cache or its driver may raise anything
            found = function(first, *others)  # raises what is wrong with the call itself
            reason = " ".join(str(error).split("\n")[:2])
            warnings.warn(
                f"{function.__name__} runs uncompiled, which is slower, as with compile=false: {reason}",
                stacklevel=2,
            )
            _compiled[function] = function
            return found

    return cast(Function, run)


@fused
def gated(gate: Tensor, up: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """The inner values of an MLP whose gate goes through an activation."""
    return activation(gate) * up


@fused
def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., D] at its rotary positions, rotate-half form. cos, sin: broadcast to x; the first half of the
    sine is negative, so that turning is x cos + (x with its halves swapped) sin."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


@fused
def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., n] over its root mean square and then times `weight`, as Llama's norm does it."""
    return F.rms_norm(x, x.shape[-1:], None, eps) * weight
