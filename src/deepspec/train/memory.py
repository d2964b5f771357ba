"""Memory of a step: kept for the next one, and what to change if it runs out, by the figure of the plan that
it was for."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from deepspec.errors import UserError, first_line

NO_MEMORY = ("can't allocate memory", "out of memory")
"""Of an error that is torch's general one: the first on a CPU, the second for pinned pages."""
MICRO_BATCH = (
    "lower optim.micro_batch_tokens or optim.micro_batch_size, then num_anchors, or set "
    "offload_optimizer=true if it is a GPU's memory"
)
SMALLER_TARGET = "set shard_target=true, or use a smaller target"
SMALLER_DRAFT = "use a smaller draft.num_layers, or more processes"
SMALLER_STATE = (
    "keep its state in the host's memory instead of the GPU's (offload_optimizer=true) or the other way "
    "round (false), or set optim.states=8bit with offload_optimizer=false, or use a smaller draft.num_layers"
)
SMALLER_SLOTS = "lower eval_prompts or eval_max_new_tokens"

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
"""Names of `mallopt`'s settings in glibc: how much may be free at the end of its memory before it gives that
back; the size from which a piece is mapped on its own, and given back when it is freed; how many such pieces
there may be."""
USUAL = {M_TRIM_THRESHOLD: 64 * 2**20, M_MMAP_THRESHOLD: 32 * 2**20, M_MMAP_MAX: 65_536}
"""What glibc comes to by itself in a process with large pieces."""


@contextmanager
def kept_memory(device: torch.device) -> Iterator[None]:
    """Have the C library keep what a step frees for the next one, inside the block. A CPU's steps otherwise
    get their large tensors page by page, each a fault of the processor: up to a tenth of a step. The process
    then stays as large as it was at most; if sizes change, what was freed may not fit what comes. Elsewhere
    than on Linux with glibc nothing changes, nor for an accelerator, whose memory torch keeps itself."""
    if device.type != "cpu" or platform.libc_ver()[0] != "glibc":
        yield
        return
    library = ctypes.CDLL(None)
    library.mallopt(M_MMAP_MAX, 0)
    library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        for setting, value in USUAL.items():
            library.mallopt(setting, value)
        library.malloc_trim(0)


@contextmanager
def memory_for(figure: str, remedy: str) -> Iterator[None]:
    """Raise UserError, naming the figure of the plan, if the memory for it does not suffice."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch's own is a RuntimeError, a bare one on a CPU
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and not any(
            words in str(error) for words in NO_MEMORY
        ):
            raise
        raise UserError(
            f"there is not enough memory for {figure}",
            where=first_line(error)[:200],
            next_step=f"{remedy}; `deepspec plan` shows how large it is, and which change makes it fit. The "
            "same command continues from the newest checkpoint",
        ) from error
