"""A training step's forward pass written plainly: dense attention masks, whole logits, all of it by autograd.

The oracle of the drafts' `forward`, and the plain version that `benchmarks/train_step.py` measures. Weights
and layers are the draft's own modules; attention, head and losses are not. B, S, A, γ, N as in the drafts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deepspec.drafts import LossSettings
from deepspec.drafts.layers import rotation
from deepspec.maths.blocks import Blocks, FeatureBatch, unroll_ids, unroll_masks
from reference.attention import block_mask, dense_attention, unroll_mask
from reference.losses import plain_block_weights, plain_confidence_loss, plain_terms


def plain_backbone(draft: Any, batch: FeatureBatch, blocks: Blocks) -> Tensor:
    """[B, A, γ, d] hidden rows of a block draft, one mask over all keys."""
    rows, count, block = blocks.input_ids.shape
    length = batch.input_ids.shape[1]
    context = draft.context(batch.features)
    context_turn = rotation(torch.arange(length), draft.frequencies, context.dtype)
    turn = rotation(blocks.positions.flatten(1), draft.frequencies, context.dtype)
    seen = block_mask(blocks.anchors, blocks.kept, block, length, batch.segment_ids)[:, None]
    hidden = draft.embedding(blocks.input_ids.flatten(1)).to(context.dtype)
    for layer in draft.layers:
        attention, normed = layer.self_attn, layer.input_layernorm(hidden)
        own = attention.keys_values(normed, turn)
        pairs = zip(attention.keys_values(context, context_turn), own, strict=True)
        keys, values = (torch.cat(pair, dim=2) for pair in pairs)
        mixed = dense_attention(attention.queries(normed, turn), keys, values, seen, attention.scale)
        hidden = layer.finish(hidden, attention.project(mixed))
    return draft.norm(hidden).view(rows, count, block, -1)


def plain_block_loss(draft: Any, batch: FeatureBatch, loss: LossSettings, blocks: Blocks) -> Tensor:
    """The summed loss of a DFlash or DSpark draft."""
    hidden, valid = plain_backbone(draft, batch, blocks), blocks.valid
    rows = torch.arange(len(valid))[:, None, None].expand(valid.shape)[valid]
    slots = torch.arange(valid.shape[-1]).expand(valid.shape)[valid] - (
        0 if draft.spec.sample_from_anchor else 1
    )
    decay = torch.exp(-slots / loss.decay_gamma).to(hidden.dtype)
    head = getattr(draft, "markov_head", None)
    taught = draft.algorithm.reads(loss) != ("context",)
    found = plain_terms(
        hidden[valid],
        draft.head,
        labels=blocks.labels[valid],
        teacher_hidden=batch.last_hidden[rows, blocks.teacher_index[valid]] if taught else None,
        teacher_head=draft.teacher_head if taught else None,
        markov=None
        if head is None
        else (head(head.markov_w1(blocks.previous), hidden)[valid], head.markov_w2.weight),
    )
    weights = decay
    if loss.positions != "decay":
        block = torch.arange(valid[..., 0].numel()).view(valid.shape[:-1])[..., None].expand(valid.shape)
        weights = plain_block_weights(loss.positions, found, block[valid], slots)
    total = sum(weight * (weights * found[name]).sum() for name, weight in loss.terms().items())
    if loss.confidence and getattr(draft, "confidence_head", None) is not None:
        embedded = draft.embed_previous(blocks.previous[valid])
        logits = draft.confidence_logits(embedded, hidden[valid])
        total = total + loss.confidence * plain_confidence_loss(logits, found["accept"].detach(), decay)
    return total


def plain_unroll_loss(draft: Any, batch: FeatureBatch, loss: LossSettings) -> Tensor:
    """The summed loss of an Eagle-3 draft: a score for every pair of positions, a teacher for every step."""
    length, steps = batch.input_ids.shape[1], draft.spec.block
    masks = unroll_masks(batch.loss_mask, batch.lengths, steps, batch.segment_ids)
    hidden, attention = draft._project(batch.features), draft.layer.self_attn
    keys: list[Tensor] = []
    values: list[Tensor] = []
    every: list[dict[str, Tensor]] = []
    for step in range(steps):
        x = draft._attention_input(hidden, unroll_ids(batch.input_ids, step))
        turn = rotation(torch.arange(length) + step, draft.frequencies, x.dtype)
        for kept, new in zip((keys, values), attention.keys_values(x, turn), strict=True):
            kept.append(new)
        seen = unroll_mask(length, step, batch.segment_ids)
        both = (torch.cat(parts, dim=2) for parts in (keys, values))
        mixed = dense_attention(attention.queries(x, turn), *both, seen, attention.scale)
        state = draft._finish(hidden, attention.project(mixed))
        rows, places = masks[step].nonzero(as_tuple=True)
        found = plain_terms(
            draft.norm(state[rows, places]),
            draft.head,
            teacher_hidden=batch.last_hidden[rows, places + step + 1],
            teacher_head=draft.teacher_head,
        )
        places = rows * length + places
        every.append(found | {"block": places, "place": torch.full_like(places, step)})
        hidden = draft._fed_back(state)
    found = {name: torch.cat([each[name] for each in every]) for name in every[0]}
    weights = draft.spec.step_loss_decay ** found["place"]
    if loss.positions != "decay":
        weights = plain_block_weights(loss.positions, found, found["block"], found["place"])
    return sum(weight * (weights * found[name]).sum() for name, weight in loss.terms(labels=False).items())
