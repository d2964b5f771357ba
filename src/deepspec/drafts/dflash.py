"""DFlash: a block of mask tokens filled in parallel from the target's features (method.md 3).

B sequences, S tokens, A anchors, γ slots, N loss rows, d hidden, m captured layers, R decoding rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deepspec.drafts import LossSettings
from deepspec.drafts.base import LossSums, NeuralDraft, Proposal, choose, log_odds, tau_sums
from deepspec.drafts.layers import DraftLayer, Rotation, initialise, inverse_frequencies, rotation
from deepspec.drafts.spec import DraftSpec
from deepspec.maths.blocks import (
    Blocks,
    FeatureBatch,
    block_attention_mask,
    make_blocks,
    sample_anchors,
    with_last_hidden,
)
from deepspec.maths.losses import head_loss, position_weights
from deepspec.maths.slots import Ints, Ragged, SlotStore
from deepspec.maths.terms import TERMS
from deepspec.maths.verify import Samplings


class DFlashDraft(NeuralDraft):
    """Layers over [context ; block]; every layer reads the same normed projection of the features as
    context keys and values, and the block attends to itself both ways."""

    def __init__(self, spec: DraftSpec) -> None:
        super().__init__(spec)
        shape = spec.shape
        self.fc = nn.Linear(shape.hidden * len(spec.target_layer_ids), shape.hidden, bias=False)
        self.hidden_norm = nn.RMSNorm(shape.hidden, shape.eps)
        self.layers = nn.ModuleList(DraftLayer(shape) for _ in range(spec.num_layers))
        self.norm = nn.RMSNorm(shape.hidden, shape.eps)
        self.register_buffer("frequencies", inverse_frequencies(shape), persistent=False)
        self.stores = [SlotStore() for _ in range(spec.num_layers)]
        initialise(self)

    # ── training ──────────────────────────────────────────────────────────────────────────────────

    def plan(self, batch: FeatureBatch, num_anchors: int, generator: torch.Generator | None) -> Blocks:
        """Draw anchors and lay out their blocks."""
        anchors, kept = sample_anchors(batch.loss_mask, num_anchors, generator, batch.segment_ids)
        return self.blocks(batch, anchors, kept)

    def blocks(self, batch: FeatureBatch, anchors: Tensor, kept: Tensor) -> Blocks:
        """Blocks at given anchors [B, A]."""
        spec = self.spec
        assert spec.mask_token_id is not None
        return make_blocks(
            batch.input_ids,
            batch.loss_mask,
            anchors,
            kept,
            block=spec.block,
            mask_token_id=spec.mask_token_id,
            sample_from_anchor=spec.sample_from_anchor,
            segment_ids=batch.segment_ids,
        )

    def backbone(self, batch: FeatureBatch, blocks: Blocks) -> Tensor:
        """[B, A, γ, d] hidden rows after the final norm."""
        rows, count, block = blocks.input_ids.shape
        length = batch.input_ids.shape[1]
        context = self.context(batch.features)
        positions = torch.arange(length, device=context.device)
        offsets = blocks.positions
        if batch.position_ids is not None:
            positions = batch.position_ids
            first = batch.position_ids.gather(1, blocks.anchors)[..., None]
            offsets = first + torch.arange(block, device=context.device)
        context_turn = rotation(positions, self.frequencies, context.dtype)
        block_turn = rotation(offsets.flatten(1), self.frequencies, context.dtype)
        mask = block_attention_mask(blocks, length, batch.segment_ids)[:, None]
        hidden = self.embedding(blocks.input_ids.flatten(1)).to(context.dtype)
        for layer in self.layers:
            assert isinstance(layer, DraftLayer)
            keys, values = layer.self_attn.keys_values(context, context_turn)
            hidden = self._layer(layer, hidden, keys, values, block_turn, mask)
        return self.norm(hidden).view(rows, count, block, -1)

    def forward(
        self, batch: FeatureBatch, loss: LossSettings, blocks: Blocks, measure: bool = True
    ) -> LossSums:
        """Loss sums over the valid slots. With `measure`, acceptance against the target's own
        distribution is computed even where no loss term needs it, if the batch has last hidden states."""
        hidden = self.backbone(batch, blocks)
        # The older layout's slot 0 proposes nothing and is never valid: the first proposal is slot 1.
        valid = blocks.valid[..., self.spec.block - self.max_proposals :]
        decay = position_weights(self.max_proposals, loss.decay_gamma).to(hidden.device)
        weights = decay.expand(valid.shape)[valid]
        taught = with_last_hidden(self.algorithm.reads(loss))
        assert not taught or batch.last_hidden is not None, (
            "this loss learns from last hidden states: the source has none"
        )
        teacher = None
        if batch.last_hidden is not None and (measure or taught):
            where = torch.arange(len(valid), device=valid.device)[:, None, None].expand(blocks.valid.shape)
            teacher = batch.last_hidden[where[blocks.valid], blocks.teacher_index[blocks.valid]]
        found = head_loss(
            hidden[blocks.valid],
            self.head,
            weights={name: weights * a for name in TERMS if (a := getattr(loss, name, 0.0))},
            labels=blocks.labels[blocks.valid],
            teacher_hidden=teacher,
            teacher_head=self.teacher_head if teacher is not None else None,
            markov=self.markov_rows(blocks, hidden),
        )
        total, metrics = found.total, {f"{k}_sum": v for k, v in found.terms.items()}
        confidence = self.confidence_term(loss, blocks, hidden, found.accept, weights)
        if confidence is not None:
            total = total + loss.confidence * confidence
            metrics["confidence_sum"] = confidence.detach()
        # Without the teacher, being right about the data stands in for acceptance.
        rate = found.accept if found.accept is not None else found.correct.float()
        accept = torch.zeros(valid.shape, dtype=rate.dtype, device=rate.device)
        accept[valid] = rate
        metrics |= tau_sums(accept, valid.to(rate.dtype))
        metrics["accept_num"] = accept.sum((0, 1))
        metrics["accept_den"] = valid.sum((0, 1))
        return LossSums(total, weights.sum(), metrics)

    def markov_rows(self, blocks: Blocks, hidden: Tensor) -> tuple[Tensor, Tensor] | None:
        """(z [N, r], W2 [V, r]) of the valid slots if there is a sequential head; DFlash has none."""
        return None

    def confidence_term(
        self, loss: LossSettings, blocks: Blocks, hidden: Tensor, accept: Tensor | None, weights: Tensor
    ) -> Tensor | None:
        """Weighted sum of the confidence loss; DFlash has no such head."""
        return None

    # ── decoding ──────────────────────────────────────────────────────────────────────────────────

    def context(self, features: Tensor) -> Tensor:
        """[..., m*d] target features -> [..., d], what every layer's context keys and values read."""
        return self.hidden_norm(self.fc(features.to(self.fc.weight.dtype)))

    @torch.inference_mode()
    def observe(self, slots: Ints, features: Tensor | None, tokens: Ragged, next_tokens: Ragged) -> None:
        """Append the context keys and values of committed tokens."""
        assert features is not None
        context = self.context(features)
        rows = self.rows(slots, features.shape[1])
        turn = rotation(rows.positions(context.device), self.frequencies, context.dtype)
        for layer, store in zip(self.layers, self.stores, strict=True):
            assert isinstance(layer, DraftLayer)
            store.write(*layer.self_attn.keys_values(context, turn), rows)
        for slot, new in zip(slots, tokens, strict=True):
            self.lengths[slot] += len(new)

    def block_hidden(self, slots: Ints, anchors: Ints) -> Tensor:
        """[R, γ, d] hidden rows of one block after each slot's committed context."""
        block, mask_token_id = self.spec.block, self.spec.mask_token_id
        assert mask_token_id is not None
        ids = torch.full((len(slots), block), mask_token_id, device=self.device)
        ids[:, 0] = torch.tensor(list(anchors), device=self.device)
        rows = self.rows(slots, block)
        hidden = self.embedding(ids).to(self.dtype)
        turn = rotation(rows.positions(self.device), self.frequencies, hidden.dtype)
        longest = max(rows.starts)
        mask = None
        if any(start != longest for start in rows.starts):
            seen = (
                torch.arange(longest, device=self.device)
                < torch.tensor(rows.starts, device=self.device)[:, None]
            )
            own = torch.ones(len(slots), block, dtype=torch.bool, device=self.device)
            mask = torch.cat([seen, own], dim=-1)[:, None, None]
        for layer, store in zip(self.layers, self.stores, strict=True):
            assert isinstance(layer, DraftLayer)
            keys, values = store.read(rows.slots, longest)
            hidden = self._layer(layer, hidden, keys, values, turn, mask)
        return self.norm(hidden)

    def _layer(
        self,
        layer: DraftLayer,
        hidden: Tensor,
        keys: Tensor,
        values: Tensor,
        turn: Rotation,
        mask: Tensor | None,
    ) -> Tensor:
        """One layer: block rows over the given context keys and values and over themselves."""
        normed = layer.input_layernorm(hidden)
        attention = layer.self_attn
        own_keys, own_values = attention.keys_values(normed, turn)
        attended = attention.attend(
            attention.queries(normed, turn),
            torch.cat([keys, own_keys], dim=2),
            torch.cat([values, own_values], dim=2),
            mask,
        )
        return layer.finish(hidden, attended)

    @torch.inference_mode()
    def propose(self, slots: Ints, anchors: Ints, samplings: Samplings, uniforms: Tensor) -> Proposal:
        """γ proposals after each anchor, each slot drawn on its own."""
        hidden = self.block_hidden(slots, anchors)[:, self.spec.block - self.max_proposals :]
        logits = self.head.spread(self.head.logits(hidden), self.spec.vocab_size)
        tokens, q = choose(logits, samplings, uniforms)
        return Proposal(tokens, q, log_odds(logits) if self.scored else None)
