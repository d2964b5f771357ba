"""What to change if memory runs out, by the figure of the plan that it was for."""

from __future__ import annotations

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
