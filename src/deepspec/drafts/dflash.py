"""DFlash: a block of mask tokens filled in parallel from the target's features (method.md 3).

B sequences, S tokens, A anchors, γ slots, N loss rows, d hidden, m captured layers, R decoding rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deepspec.drafts import LossSettings
from deepspec.drafts.attention import BLOCKS, block_attention, staircase
from deepspec.drafts.base import LossSums, NeuralDraft, Proposal, choose, log_odds, tau_sums
from deepspec.drafts.heads import confidence_loss
from deepspec.drafts.layers import DraftLayer, initialise, inverse_frequencies, rotation
from deepspec.drafts.spec import DraftSpec
from deepspec.maths.blocks import Blocks, FeatureBatch, make_blocks, sample_anchors, with_last_hidden
from deepspec.maths.calibration import binned
from deepspec.maths.host import sent
from deepspec.maths.losses import head_loss
from deepspec.maths.positions import Positions, position_weights
from deepspec.maths.slots import Ints, Ragged, Rows, SlotStore
from deepspec.maths.verify import Samplings

SHARED = 0.9
"""Largest ratio of distinct teachers to rows for which a teacher is computed once for all its rows: each row
then reads a copy."""


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
        context = self.context(batch.features)
        device = context.device
        positions, offsets = torch.arange(batch.input_ids.shape[1]), blocks.positions
        if batch.position_ids is not None:
            positions = batch.position_ids
            offsets = positions.gather(1, blocks.anchors)[..., None] + torch.arange(block)
        context_turn = rotation(sent(positions, device), self.frequencies, context.dtype)
        block_turn = rotation(sent(offsets.flatten(1), device), self.frequencies, context.dtype)
        stairs = staircase(blocks.anchors, blocks.kept, batch.segment_ids, BLOCKS)
        anchors = sent(blocks.anchors, device)
        hidden = self.embedding(sent(blocks.input_ids.flatten(1), device)).to(context.dtype)
        for layer in self.layers:
            assert isinstance(layer, DraftLayer)
            attention, normed = layer.self_attn, layer.input_layernorm(hidden)
            mixed = block_attention(
                attention.queries(normed, block_turn),
                attention.keys_values(context, context_turn),
                attention.keys_values(normed, block_turn),
                anchors,
                stairs,
                attention.scale,
            )
            hidden = layer.finish(hidden, attention.project(mixed))
        return self.norm(hidden).view(rows, count, block, -1)

    def forward(
        self, batch: FeatureBatch, loss: LossSettings, blocks: Blocks, measure: bool = True
    ) -> LossSums:
        """Loss sums over the valid slots. With `measure`, metrics come with them, and acceptance against the
        target's own distribution even where no loss term needs it, if the batch has last hidden states.

        The sums are divided by the slots' decaying weights, however `loss.positions` weights the terms: each
        block then counts alike, and the loss keeps its scale.

        Which slots count, and what they read, is known on the host: nothing here waits for the device."""
        hidden = self.backbone(batch, blocks)
        device = hidden.device
        taught = with_last_hidden(self.algorithm.reads(loss))
        assert not taught or batch.last_hidden is not None, (
            "this loss learns from last hidden states: the source has none"
        )
        place = blocks.valid.flatten().nonzero()[:, 0]
        picked = sent(place, device)
        # The older layout's slot 0 proposes nothing and is never valid: the first proposal is slot 1.
        skip = self.spec.block - self.max_proposals
        decay = position_weights(self.max_proposals, loss.decay_gamma)
        block, index = place // self.spec.block, place % self.spec.block - skip
        weights = sent(decay[index], device)
        positions = None if loss.positions == "decay" else Positions(loss.positions, block, index)
        each = weights if positions is None else torch.ones_like(weights)
        teacher = teacher_of = None
        if batch.last_hidden is not None and (measure or taught):
            rows = torch.arange(len(blocks.valid))[:, None, None] * batch.last_hidden.shape[1]
            where = (rows + blocks.teacher_index).flatten()[place]
            distinct, of = where.unique(return_inverse=True)
            if len(distinct) <= SHARED * len(where):
                where, teacher_of = distinct, of
            teacher = batch.last_hidden.flatten(0, 1).index_select(0, sent(where, device))
        # Looked up once for both heads: its gradient is as long as the vocabulary.
        embedded = self.embed_previous(sent(blocks.previous, device))
        found = head_loss(
            hidden.flatten(0, 2).index_select(0, picked),
            self.head,
            weights={name: each * weight for name, weight in loss.terms().items()},
            labels=sent(blocks.labels.flatten()[place], device),
            teacher_hidden=teacher,
            teacher_head=self.teacher_head if teacher is not None else None,
            teacher_of=teacher_of,
            markov=self.markov_rows(embedded, hidden, picked),
            positions=positions,
            accept=measure or loss.confidence > 0,
            correct=measure,
        )
        total, metrics = found.total, {f"{k}_sum": v for k, v in found.terms.items()}
        sure = self.confidences(embedded, hidden, picked) if loss.confidence else None
        if sure is not None:
            assert found.accept is not None
            confidence = confidence_loss(sure, found.accept, weights)
            total = total + loss.confidence * confidence
            metrics["confidence_sum"] = confidence.detach()
            if measure:
                metrics["confidence_bins"] = binned(sure.detach().sigmoid(), found.accept)[0]
        if measure:
            # Without the teacher, being right about the data stands in for acceptance.
            rate = found.accept if found.accept is not None else found.correct
            assert rate is not None
            valid = sent(blocks.valid, device).to(weights.dtype)
            accept = torch.zeros_like(valid).flatten().index_copy_(0, picked, rate.to(valid.dtype))
            accept, valid = accept.view_as(valid)[..., skip:], valid[..., skip:]
            metrics |= tau_sums(accept, valid)
            metrics["accept_num"], metrics["accept_den"] = accept.sum((0, 1)), valid.sum((0, 1))
        return LossSums(total, weights.sum(), metrics)

    def embed_previous(self, previous: Tensor) -> Tensor | None:
        """[..., r] W1 of the tokens [...] before the slots'; None without a sequential head."""
        return None

    def markov_rows(
        self, embedded: Tensor | None, hidden: Tensor, picked: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """(z [N, r], W2 [V, r]) of the `picked` slots [N], counted over all, if there is a sequential head;
        DFlash has none. embedded: [B, A, γ, r] from `embed_previous`; hidden: [B, A, γ, d]."""
        return None

    def confidences(self, embedded: Tensor | None, hidden: Tensor, picked: Tensor) -> Tensor | None:
        """Confidence logits [N] of the `picked` slots, from what `markov_rows` takes; DFlash has none."""
        return None

    # ── decoding ──────────────────────────────────────────────────────────────────────────────────

    def context(self, features: Tensor) -> Tensor:
        """[..., m*d] target features -> [..., d], what every layer's context keys and values read."""
        return self.hidden_norm(self.fc(features.to(self.fc.weight.dtype)))

    @torch.inference_mode()
    def observe(self, slots: Ints, features: Tensor | None, tokens: Ragged, next_tokens: Ragged) -> None:
        """Append the context keys and values of committed tokens."""
        assert features is not None
        rows = self.rows(slots, features.shape[1])
        if self.lean is not None:
            step = self.lean.plan(rows, tokens, "nothing")
            context = self.context(step.packed(features))
            for layer in self.lean.layers:
                self.lean.remember(layer, context, step)
        else:
            self._remember(self.context(features), rows)
        for slot, new in zip(slots, tokens, strict=True):
            self.lengths[slot] += len(new)

    def _remember(self, context: Tensor, rows: Rows) -> None:
        """Store the context keys and values of [R, Q, d]."""
        turn = rotation(rows.positions(context.device), self.frequencies, context.dtype)
        for layer, store in zip(self.layers, self.stores, strict=True):
            assert isinstance(layer, DraftLayer)
            store.write(*layer.self_attn.keys_values(context, turn), rows)

    @torch.inference_mode()
    def block_hidden(self, slots: Ints, anchors: Ints) -> Tensor:
        """[R, γ, d] hidden rows of one block after each slot's committed context."""
        block, mask_token_id = self.spec.block, self.spec.mask_token_id
        assert mask_token_id is not None
        tokens = [[anchor] + [mask_token_id] * (block - 1) for anchor in anchors]
        rows = self.rows(slots, block)
        if self.lean is not None:
            step = self.lean.plan(rows, tokens, "all")
            hidden = self.embedding(step.ids).to(self.dtype)
            for lean in self.lean.layers:
                hidden = self.lean.through(lean, hidden, step)
            return step.padded(self.lean.norm(hidden))
        hidden = self.embedding(sent(torch.tensor(tokens), self.device)).to(self.dtype)
        turn = rotation(rows.positions(self.device), self.frequencies, hidden.dtype)
        longest = max(rows.starts)
        mask = None
        if any(start != longest for start in rows.starts):
            seen = (
                torch.arange(longest, device=self.device)
                < sent(torch.tensor(rows.starts), self.device)[:, None]
            )
            own = torch.ones(len(slots), block, dtype=torch.bool, device=self.device)
            mask = torch.cat([seen, own], dim=-1)[:, None, None]
        for layer, store in zip(self.layers, self.stores, strict=True):
            assert isinstance(layer, DraftLayer)
            attention, normed = layer.self_attn, layer.input_layernorm(hidden)
            pairs = zip(store.read(rows.slots, longest), attention.keys_values(normed, turn), strict=True)
            keys, values = (torch.cat(pair, dim=2) for pair in pairs)
            hidden = layer.finish(
                hidden, attention.attend(attention.queries(normed, turn), keys, values, mask)
            )
        return self.norm(hidden)

    @torch.inference_mode()
    def propose(self, slots: Ints, anchors: Ints, samplings: Samplings, uniforms: Tensor) -> Proposal:
        """γ proposals after each anchor, each slot drawn on its own."""
        hidden = self.block_hidden(slots, anchors)[:, self.spec.block - self.max_proposals :]
        logits = self.head.spread(self.head.logits(hidden), self.spec.vocab_size)
        tokens, q = choose(logits, samplings, uniforms)
        return Proposal(tokens, q, log_odds(logits) if self.scored else None)
