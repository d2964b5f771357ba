"""Memory of a step: kept for the next one, and what to change if it runs out, by the figure of the plan that
it was for."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from deepspec.errors import UserError, first_line

NO_MEMORY = "can't allocate memory"
MICRO_BATCH = (
    "lower optim.micro_batch_tokens or optim.micro_batch_size, then num_anchors, or set "
    "offload_optimizer=true if it is a GPU's memory"
)
SMALLER_TARGET = "set shard_target=true, or use a smaller target"
SMALLER_DRAFT = "use a smaller draft.num_layers, or more processes"
SMALLER_STATE = (
    "set offload_optimizer=true if it is a GPU's, or optim.states=8bit, or a smaller draft.num_layers"
)
SMALLER_SLOTS = "lower eval_prompts or eval_max_new_tokens"

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Names of `mallopt`'s settings in glibc: bytes that are free at the end of its memory before it gives them
back, and bytes of a piece from which that is memory of its own, given back when it is freed."""
USUAL_PIECE = 32 * 2**20
"""The largest piece that glibc comes to keep by itself."""


@contextmanager
def kept_memory(device: torch.device) -> Iterator[None]:
    """Have the C library keep what a step frees for the next one, inside the block. A CPU's steps otherwise
    get their large tensors page by page, each a fault of the processor: up to a tenth of a step. Elsewhere
    than on Linux with glibc nothing changes, nor for an accelerator, whose memory torch keeps itself."""
    if device.type != "cpu" or platform.libc_ver()[0] != "glibc":
        yield
        return
    library = ctypes.CDLL(None)
    for setting in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
        library.mallopt(setting, 2**31 - 1)
    try:
        yield
    finally:
        library.mallopt(M_MMAP_THRESHOLD, USUAL_PIECE)
        library.mallopt(M_TRIM_THRESHOLD, 2 * USUAL_PIECE)
        library.malloc_trim(0)


@contextmanager
def memory_for(figure: str, remedy: str) -> Iterator[None]:
    """Raise UserError, naming the figure of the plan, if the memory for it does not suffice."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch's own is a RuntimeError, a bare one on a CPU
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and NO_MEMORY not in str(error):
            raise
        raise UserError(
            f"there is not enough memory for {figure}",
            where=first_line(error)[:200],
            next_step=f"{remedy}; `deepspec plan` shows how large it is, and which change makes it fit. The "
            "same command continues from the newest checkpoint",
        ) from error
