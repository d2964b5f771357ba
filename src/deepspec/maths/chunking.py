"""How many rows of logits exist at a time: plain arithmetic, so that the planner can ask without torch."""

from __future__ import annotations

CHUNK_BYTES = 24 * 2**20
"""Bytes of one chunk's logits in float32. Some three to five such tensors live at once, and matrix products
of this size already run at full speed on a CPU: 1,536 rows at V = 4,096, 41 rows at V = 151,936."""


def default_chunk_rows(vocab_size: int) -> int:
    """Rows whose float32 logits over `vocab_size` tokens take about 24 MiB; at least 1."""
    return max(1, CHUNK_BYTES // (4 * max(1, vocab_size)))
