"""Attention with a mask over all keys and grouped heads repeated: the oracle of `deepspec.drafts.attention`.

Shapes as there. Everything is in the dtype it is given; tests give float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def dense_attention(queries: Tensor, keys: Tensor, values: Tensor, seen: Tensor, scale: float) -> Tensor:
    """[B, H, Q, D] over keys [B, G, K, D]; seen: bool, broadcast to [B, H, Q, K]."""
    group = queries.shape[1] // keys.shape[1]
    keys, values = (x.repeat_interleave(group, dim=1) for x in (keys, values))
    scores = (queries @ keys.transpose(-1, -2) * scale).masked_fill(~seen, float("-inf"))
    return torch.softmax(scores, -1) @ values


def block_mask(anchors: Tensor, kept: Tensor, block: int, length: int, segment_ids: Tensor | None) -> Tensor:
    """[B, A*γ, S + A*γ] bool: a slot sees context before its anchor, and its own block both ways; a dummy its
    own block only. With packed documents the context is the anchor's own document."""
    rows, count = anchors.shape
    context = (torch.arange(length) < anchors[..., None]) & kept[..., None]
    if segment_ids is not None:
        context = context & (segment_ids[:, None, :] == segment_ids.gather(1, anchors)[..., None])
    own = torch.eye(count, dtype=torch.bool).expand(rows, count, count)
    allowed = torch.cat([context, own.repeat_interleave(block, dim=-1)], dim=-1)
    return allowed.repeat_interleave(block, dim=1)


def unroll_mask(length: int, columns: int, segment_ids: Tensor | None) -> Tensor:
    """[B or 1, 1, S, S*(1 + columns)] bool: the first step's keys up to the row's own, and of each later
    step the one at the same place."""
    causal = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
    if segment_ids is not None:
        causal = causal & (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
    own = torch.eye(length, dtype=torch.bool).expand(*causal.shape)
    return torch.cat([causal, *[own] * columns], dim=-1)


def dense_unroll(
    queries: Tensor,
    context: tuple[Tensor, Tensor],
    columns: Sequence[tuple[Tensor, Tensor]],
    segment_ids: Tensor | None,
    scale: float,
) -> Tensor:
    keys, values = (torch.cat([x, *rest], dim=2) for x, *rest in zip(context, *columns, strict=True))
    seen = unroll_mask(queries.shape[2], len(columns), segment_ids)
    return dense_attention(queries, keys, values, seen, scale)
