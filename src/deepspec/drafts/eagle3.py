"""Eagle-3: one autoregressive layer over the target's features, trained by unrolling it (method.md 4).

B sequences, S tokens, K unroll steps, H heads, D head dim, d hidden, m captured layers, N loss rows, R rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from deepspec.drafts import LossSettings
from deepspec.drafts.attention import spans_of, unroll_attention
from deepspec.drafts.base import LossSums, NeuralDraft, Proposal, choose, log_odds, tau_sums
from deepspec.drafts.layers import DraftLayer, initialise, inverse_frequencies, rotation
from deepspec.drafts.spec import DraftSpec
from deepspec.maths.blocks import FeatureBatch, unroll_ids, unroll_masks
from deepspec.maths.host import sent
from deepspec.maths.lean import Norm
from deepspec.maths.losses import head_loss
from deepspec.maths.positions import Positions
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
        self.stores = [SlotStore()]
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
        hidden = self._project(batch.features)
        ids = sent(batch.input_ids, hidden.device)
        positions = torch.arange(ids.shape[1]) if batch.position_ids is None else batch.position_ids
        positions, spans = sent(positions, hidden.device), spans_of(batch.segment_ids)
        attention = self.layer.self_attn
        columns: list[tuple[Tensor, Tensor]] = []
        states = []
        for step in range(self.spec.block):
            x = self._attention_input(hidden, unroll_ids(ids, step))
            turn = rotation(positions + step, self.frequencies, x.dtype)
            columns.append(attention.keys_values(x, turn))
            queries = attention.queries(x, turn)
            mixed = unroll_attention(queries, columns[0], columns[1:], spans, attention.scale)
            states.append(self._finish(hidden, attention.project(mixed)))
            hidden = self._fed_back(states[-1])
        return states

    def forward(
        self, batch: FeatureBatch, loss: LossSettings, blocks: None = None, measure: bool = True
    ) -> LossSums:
        """The terms of each step against the target's distribution (published: the soft cross-entropy, `ce`),
        summed and divided by B*S, padding and prompt included: the published recipe's normalisation. Metrics
        come with `measure`.

        The steps' rows pass the head together, so that the distribution after a position, which every step
        learns once, is computed once."""
        rows, length = batch.input_ids.shape
        assert batch.last_hidden is not None, "this loss learns from last hidden states: the source has none"
        masks = unroll_masks(batch.loss_mask, batch.lengths, self.spec.block, batch.segment_ids)
        device = batch.last_hidden.device
        places = [mask.flatten().nonzero()[:, 0] for mask in masks]
        # A row that counts is followed by the position it learns from: no sequence ends in between.
        taught, teacher_of = torch.cat([p + s + 1 for s, p in enumerate(places)]).unique(return_inverse=True)
        sizes = [len(p) for p in places]
        picked = sent(torch.cat(places), device).split(sizes)
        states = zip(self.unroll(batch), picked, strict=True)
        hidden = torch.cat([state.flatten(0, 1).index_select(0, p) for state, p in states])
        index = torch.arange(self.spec.block).repeat_interleave(torch.tensor(sizes))
        weights, positions = self.spec.step_loss_decay**index, None
        if loss.positions != "decay":
            weights, positions = torch.ones_like(weights), Positions(loss.positions, torch.cat(places), index)
        weights = sent(weights, device)
        found = head_loss(
            self.norm(hidden),
            self.head,
            weights={name: weights * weight for name, weight in loss.terms(labels=False).items()},
            teacher_hidden=batch.last_hidden.flatten(0, 1).index_select(0, sent(taught, device)),
            teacher_head=self.teacher_head,
            teacher_of=teacher_of,
            positions=positions,
            accept=measure,
            correct=measure,
        )
        metrics: dict[str, Tensor] = {}
        if measure:
            assert found.accept is not None and found.correct is not None
            accept = torch.zeros(self.spec.block, rows * length, dtype=found.accept.dtype, device=device)
            for step, (rate, right) in enumerate(
                zip(found.accept.split(sizes), found.correct.split(sizes), strict=True)
            ):
                accept[step].index_copy_(0, picked[step], rate)
                metrics[f"correct_{step}_num"] = right.sum()
            for name, rows_of_term in found.rows.items():
                for step, part in enumerate(rows_of_term.split(sizes)):
                    metrics[f"{name}_{step}_sum"] = part.sum()
            accept = accept.view(-1, rows, length).permute(1, 2, 0)
            valid = sent(masks, device).permute(1, 2, 0).to(accept.dtype)
            metrics |= tau_sums(accept, valid)
            metrics["accept_num"], metrics["accept_den"] = (accept * valid).sum((0, 1)), valid.sum((0, 1))
        return LossSums(found.total, torch.full((), float(rows * length), device=device), metrics)

    # ── decoding ──────────────────────────────────────────────────────────────────────────────────

    def settle(self) -> None:
        if any(
            getattr(type(self), n) is not getattr(Eagle3Draft, n) for n in ("_attention_input", "_finish")
        ):
            return  # `advance` would leave out what a subclass computes there
        super().settle()
        self.embedding_norm = Norm(self.layer.input_layernorm.weight.detach(), self.spec.shape.eps)

    def free(self, slot: int) -> None:
        super().free(slot)
        self.last_hidden.pop(slot, None)

    @torch.inference_mode()
    def advance(self, rows: Rows, hidden: Tensor, ids: Tensor) -> Tensor:
        """The layer over Q new rows per slot, keys stored: [R, Q, d] hidden, [R, Q] ids -> [R, Q, d]."""
        if self.lean is not None:
            step, (layer,) = self.lean.plan(rows, None), self.lean.layers
            stream, embedded = hidden.flatten(0, 1), self.embedding(ids.flatten()).to(hidden.dtype)
            normed = layer.norm(stream)
            x = torch.cat([self.embedding_norm(embedded), normed], dim=-1)
            stream = normed if self.spec.norm_before_residual else stream
            return self.lean.finish(layer, stream, self.lean.mix(layer, x, step)).view_as(hidden)
        attention = self.layer.self_attn
        x = self._attention_input(hidden, ids)
        turn = rotation(rows.positions(x.device), self.frequencies, x.dtype)
        keys, values = self.stores[0].write(*attention.keys_values(x, turn), rows)
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
        hidden = self.advance(rows, self._project(features), sent(ids, self.device))
        for row, slot in enumerate(slots):
            self.lengths[slot] += len(tokens[row])
            self.last_hidden[slot] = hidden[row, len(tokens[row]) - 1]

    @torch.inference_mode()
    def propose(self, slots: Ints, anchors: Ints, samplings: Samplings, uniforms: Tensor) -> Proposal:
        """γ proposals, each fed back with the hidden state that gave it."""
        norm: Callable[[Tensor], Tensor] = self.norm if self.lean is None else self.lean.norm
        hidden = torch.stack([self.last_hidden[s] for s in slots])[:, None]
        starts = [self.lengths[s] for s in slots]
        tokens, q, scores = [], [], []
        for step in range(self.spec.block):
            logits = self.head.spread(self.head.logits(norm(hidden[:, 0])), self.spec.vocab_size)
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
