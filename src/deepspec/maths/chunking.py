"""How many rows of logits exist at a time: plain arithmetic, so that the planner can ask without torch."""

from __future__ import annotations

CHUNK_BYTES = 128 * 2**20
"""Bytes of one chunk's logits in float32 on a CPU, unless they are too few rows."""
CPU_ROWS = 448
"""Fewest rows of a chunk on a CPU. A matrix product packs the whole head again for every chunk: a step at V =
151,936 takes 1.40, 1.18 and 1.15 of its products' time with chunks of 112, 224 and 448 rows."""
BLOCK_BYTES = 2**19
"""Bytes of the part of a chunk that a CPU's thread works on at a time, number by number: the four tensors
that this takes stay in a cache of 2 MB."""
GPU_ROWS, GPU_BYTES = 512, 256 * 2**20
"""Rows of a chunk on an accelerator, or the bytes of a smaller vocabulary's. A chunk reads the head from
memory once, so its arithmetic intensity is its number of rows; an H200 needs 184 of them."""


def default_chunk_rows(vocab_size: int, accelerated: bool = False) -> int:
    """Rows of one chunk of float32 logits over `vocab_size` tokens, for a CPU or an accelerator."""
    row = 4 * max(1, vocab_size)
    if accelerated:
        return max(GPU_ROWS, GPU_BYTES // row)
    return max(CPU_ROWS, CHUNK_BYTES // row)


def cpu_block_rows(vocab_size: int, threads: int = 1) -> int:
    """Rows of the part of a chunk that a CPU's threads work on together, number by number."""
    return threads * max(1, BLOCK_BYTES // (4 * max(1, vocab_size)))
