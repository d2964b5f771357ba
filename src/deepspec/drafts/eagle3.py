"""Eagle-3: one autoregressive layer over the target's features, trained by unrolling it (method.md 4).

B sequences, S tokens, K unroll steps, H heads, D head dim, d hidden, m captured layers, N loss rows, R rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deepspec.drafts import LossSettings
from deepspec.drafts.base import LossSums, NeuralDraft, Proposal, choose, log_odds, tau_sums
from deepspec.drafts.layers import Attention, DraftLayer, initialise, inverse_frequencies, rotation
from deepspec.drafts.spec import DraftSpec
from deepspec.maths.blocks import FeatureBatch, unroll_ids, unroll_masks, unroll_teacher_index
from deepspec.maths.losses import head_loss
from deepspec.maths.slots import Ints, Ragged, Rows, SlotStore, causal_rows_mask
from deepspec.maths.verify import Samplings


class Eagle3Draft(NeuralDraft):
    """Row i reads the features of token i and the embedding of token i+1, and predicts token i+2."""

    def __init__(self, spec: DraftSpec) -> None:
        super().__init__(spec)
        shape = spec.shape
        self.input_norm = None
        if spec.norm_before_fc:
            self.input_norm = nn.RMSNorm(shape.hidden * len(spec.target_layer_ids), shape.eps)
        self.fc = nn.Linear(shape.hidden * len(spec.target_layer_ids), shape.hidden, bias=False)
        self.layers = nn.ModuleList([DraftLayer(shape, paired=True)])
        self.norm = nn.RMSNorm(shape.hidden, shape.eps)
        self.register_buffer("frequencies", inverse_frequencies(shape), persistent=False)
        self.store = SlotStore()
        self.last_hidden: dict[int, Tensor] = {}
        initialise(self)

    @property
    def layer(self) -> DraftLayer:
        layer = self.layers[0]
        assert isinstance(layer, DraftLayer)
        return layer

    def _attention_input(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """[..., 2d]: the normed embedding of the next token, then the normed hidden state."""
        embedded = self.embedding(ids).to(hidden.dtype)
        return torch.cat([self.layer.input_layernorm(embedded), self.layer.hidden_norm(hidden)], dim=-1)

    def _project(self, features: Tensor) -> Tensor:
        """[..., m*d] target features -> [..., d]: the first hidden state of a row."""
        features = features.to(self.fc.weight.dtype)
        return self.fc(features if self.input_norm is None else self.input_norm(features))

    def _finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """The layer after its attention. The published residual is `hidden` as it came in."""
        residual = self.layer.hidden_norm(hidden) if self.spec.norm_before_residual else hidden
        return self.layer.finish(residual, attended)

    def _fed_back(self, hidden: Tensor) -> Tensor:
        """What the next step reads of a layer's output. Published: the output before the last norm."""
        return self.norm(hidden) if self.spec.norm_output else hidden

    # ── training ──────────────────────────────────────────────────────────────────────────────────

    def unroll(self, batch: FeatureBatch) -> list[Tensor]:
        """[B, S, d] hidden state after each of K steps (the layer's output, not normed)."""
        length = batch.input_ids.shape[1]
        positions = torch.arange(length, device=batch.input_ids.device)
        if batch.position_ids is not None:
            positions = batch.position_ids
        mask = torch.ones(length, length, dtype=torch.bool, device=positions.device).tril()
        if batch.segment_ids is not None:
            mask = mask & (batch.segment_ids[:, None, :, None] == batch.segment_ids[:, None, None, :])
        hidden = self._project(batch.features)
        attention = self.layer.self_attn
        keys: list[Tensor] = []
        values: list[Tensor] = []
        states = []
        for step in range(self.spec.block):
            x = self._attention_input(hidden, unroll_ids(batch.input_ids, step))
            turn = rotation(positions + step, self.frequencies, x.dtype)
            new_keys, new_values = attention.keys_values(x, turn)
            keys.append(attention.spread(new_keys))
            values.append(attention.spread(new_values))
            mixed = _attend_own_column(attention, attention.queries(x, turn), keys, values, mask)
            states.append(self._finish(hidden, attention.project(mixed)))
            hidden = self._fed_back(states[-1])
        return states

    def forward(
        self, batch: FeatureBatch, loss: LossSettings, blocks: None = None, measure: bool = True
    ) -> LossSums:
        """Soft cross-entropy of each step against the target's distribution, summed and divided by
        B*S, padding and prompt included: the published recipe's normalisation."""
        rows, length = batch.input_ids.shape
        assert batch.last_hidden is not None, "this loss learns from last hidden states: the source has none"
        masks = unroll_masks(batch.loss_mask, batch.lengths, self.spec.block, batch.segment_ids)
        device = batch.input_ids.device
        total = torch.zeros((), device=device)
        accept = torch.zeros(rows, length, self.spec.block, device=device)
        metrics: dict[str, Tensor] = {}
        for step, hidden in enumerate(self.unroll(batch)):
            mask = masks[step]
            teacher = unroll_teacher_index(length, step, device).expand(rows, length)[mask]
            where = torch.arange(rows, device=device)[:, None].expand(rows, length)[mask]
            weight = torch.full((len(where),), self.spec.step_loss_decay**step, device=device)
            found = head_loss(
                self.norm(hidden[mask]),
                self.head,
                weights={"soft_ce": weight},
                labels=None,
                teacher_hidden=batch.last_hidden[where, teacher],
                teacher_head=self.teacher_head,
            )
            total = total + found.total
            assert found.accept is not None
            accept[..., step][mask] = found.accept.to(accept.dtype)
            metrics[f"soft_ce_{step}_sum"] = found.terms["soft_ce"] / self.spec.step_loss_decay**step
            metrics[f"correct_{step}_num"] = found.correct.sum()
        valid = masks.permute(1, 2, 0).to(accept.dtype)
        metrics |= tau_sums(accept, valid)
        metrics["accept_num"], metrics["accept_den"] = (accept * valid).sum((0, 1)), valid.sum((0, 1))
        return LossSums(total, torch.tensor(float(rows * length), device=device), metrics)

    # ── decoding ──────────────────────────────────────────────────────────────────────────────────

    def free(self, slot: int) -> None:
        super().free(slot)
        self.last_hidden.pop(slot, None)

    @torch.inference_mode()
    def advance(self, rows: Rows, hidden: Tensor, ids: Tensor) -> Tensor:
        """The layer over Q new rows per slot, keys stored: [R, Q, d] hidden, [R, Q] ids -> [R, Q, d]."""
        attention = self.layer.self_attn
        x = self._attention_input(hidden, ids)
        turn = rotation(rows.positions(x.device), self.frequencies, x.dtype)
        keys, values = self.store.write(*attention.keys_values(x, turn), rows)
        alone = rows.width == 1 and len(set(rows.starts)) == 1
        mask = None if alone else causal_rows_mask(rows, x.device)
        return self._finish(hidden, attention.attend(attention.queries(x, turn), keys, values, mask))

    @torch.inference_mode()
    def observe(self, slots: Ints, features: Tensor | None, tokens: Ragged, next_tokens: Ragged) -> None:
        """Extend each slot's cache with rows made of real features, dropping the proposals' own keys."""
        assert features is not None
        ids = torch.zeros(features.shape[:2], dtype=torch.long)
        for row, following in enumerate(next_tokens):
            ids[row, : len(following)] = torch.tensor(list(following))
        rows = self.rows(slots, features.shape[1])
        hidden = self.advance(rows, self._project(features), ids.to(self.device))
        for row, slot in enumerate(slots):
            self.lengths[slot] += len(tokens[row])
            self.last_hidden[slot] = hidden[row, len(tokens[row]) - 1]

    @torch.inference_mode()
    def propose(self, slots: Ints, anchors: Ints, samplings: Samplings, uniforms: Tensor) -> Proposal:
        """γ proposals, each fed back with the hidden state that gave it."""
        hidden = torch.stack([self.last_hidden[s] for s in slots])[:, None]
        starts = [self.lengths[s] for s in slots]
        tokens, q, scores = [], [], []
        for step in range(self.spec.block):
            logits = self.head.spread(self.head.logits(self.norm(hidden[:, 0])), self.spec.vocab_size)
            chosen, distribution = choose(logits, samplings, uniforms[:, step])
            tokens.append(chosen)
            q.append(distribution)
            if self.scored:
                scores.append(log_odds(logits))
            if step + 1 < self.spec.block:
                rows = Rows(tuple(slots), tuple(start + step for start in starts), 1)
                hidden = self.advance(rows, self._fed_back(hidden), chosen[:, None])
        return Proposal(
            torch.stack(tokens, dim=1), torch.stack(q, dim=1), torch.stack(scores, dim=1) if scores else None
        )


def _attend_own_column(
    attention: Attention, queries: Tensor, keys: list[Tensor], values: list[Tensor], mask: Tensor
) -> Tensor:
    """[B, H, S, D]: row i sees step 0's keys where `mask` lets it, and of later steps only column i."""
    if len(keys) == 1:
        return nn.functional.scaled_dot_product_attention(
            queries, keys[0], values[0], attn_mask=mask, scale=attention.scale
        )
    scores = torch.matmul(queries, keys[0].transpose(-1, -2)).masked_fill(~mask, float("-inf"))
    own = torch.stack([(queries * k).sum(-1) for k in keys[1:]], dim=-1)
    share = torch.softmax(torch.cat([scores, own], dim=-1).float() * attention.scale, dim=-1).to(
        queries.dtype
    )
    length = keys[0].shape[2]
    mixed = torch.matmul(share[..., :length], values[0])
    for column, value in enumerate(values[1:]):
        mixed = mixed + share[..., length + column, None] * value
    return mixed
