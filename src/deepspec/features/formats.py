"""Bytes of every number format, and of a token's id and mask. No torch: the planner reads it too."""

from __future__ import annotations

NUMBER_BYTES = {
    **{"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2},
    **{"F64": 8, "F32": 4, "BF16": 2, "F16": 2},
}
"""Bytes of one weight, by the names that config files (first line) and safetensors files use."""
STORED_BYTES = {"bf16": 2, "fp8": 1, "int8": 1}
"""Bytes of one number of a stored feature vector, by the format's name."""
TOKEN_BYTES = 5
"""A token's id (int32) and its loss mask (uint8): both in a feature cache and in the training rows, which
`data/rows.py` keeps in memory as two flat arrays."""


def scale_bytes(store: str) -> int:
    """Bytes of the float32 scale that each vector in fp8 or int8 has; 0 for bf16."""
    return 0 if store == "bf16" else 4


def vector_bytes(width: int, store: str) -> int:
    """Bytes of one stored vector of `width` numbers, its scale included."""
    return width * STORED_BYTES[store] + scale_bytes(store)
