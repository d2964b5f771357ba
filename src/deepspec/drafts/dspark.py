"""DSpark: DFlash, a sequential head that ties a block's tokens together, and a confidence head (method.md 3).

γ slots, V vocabulary, r Markov rank, d hidden width, N loss rows, R decoding rows.
"""

from __future__ import annotations

from pkgutil import resolve_name

import torch
from torch import Tensor, nn

from deepspec.drafts import MARKOV_HEADS
from deepspec.drafts.base import Proposal, choose, log_odds
from deepspec.drafts.dflash import DFlashDraft
from deepspec.drafts.heads import ConfidenceHead, MarkovHead
from deepspec.drafts.spec import DraftSpec
from deepspec.maths.host import sent
from deepspec.maths.slots import Ints
from deepspec.maths.verify import Samplings


class DSparkDraft(DFlashDraft):
    """Either head may be off; with both off this is DFlash."""

    markov_head: MarkovHead | None
    confidence_head: ConfidenceHead | None

    def __init__(self, spec: DraftSpec) -> None:
        super().__init__(spec)
        width = spec.shape.hidden
        self.markov_head = self.confidence_head = None
        if spec.markov_rank:
            self.markov_head = resolve_name(MARKOV_HEADS[spec.markov_head])(
                spec.vocab_size, spec.markov_rank, width, spec.draft_vocab_size
            )
            nn.init.normal_(self.markov_head.markov_w1.weight, std=spec.markov_rank**-0.5)
            # The bias starts at zero: the first steps train the base logits that it corrects.
            nn.init.zeros_(self.markov_head.markov_w2.weight)
        if spec.confidence:
            with_markov = bool(spec.markov_rank) and spec.confidence_with_markov
            self.confidence_head = ConfidenceHead(width, spec.markov_rank, with_markov)

    # ── training ──────────────────────────────────────────────────────────────────────────────────

    def embed_previous(self, previous: Tensor) -> Tensor | None:
        return self.markov_head.markov_w1(previous) if self.markov_head is not None else None

    def markov_rows(
        self, embedded: Tensor | None, hidden: Tensor, picked: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        if self.markov_head is None:
            return None
        z = self.markov_head(embedded, hidden).flatten(0, 2)
        return z.index_select(0, picked), self.markov_head.markov_w2.weight

    def confidence_logits(self, embedded: Tensor | None, hidden: Tensor) -> Tensor | None:
        """[...] logits, from `embed_previous` [..., r] and hidden rows [..., d]; None without the head."""
        return None if self.confidence_head is None else self.confidence_head(hidden, embedded)

    def confidences(self, embedded: Tensor | None, hidden: Tensor, picked: Tensor) -> Tensor | None:
        if embedded is not None:
            embedded = embedded.flatten(0, 2).index_select(0, picked)
        return self.confidence_logits(embedded, hidden.flatten(0, 2).index_select(0, picked))

    # ── decoding ──────────────────────────────────────────────────────────────────────────────────

    @torch.inference_mode()
    def propose(self, slots: Ints, anchors: Ints, samplings: Samplings, uniforms: Tensor) -> Proposal:
        """γ proposals, left to right: each is drawn given the one before it."""
        skip = self.spec.block - self.max_proposals
        hidden = self.block_hidden(slots, anchors)
        base = self.head.logits(hidden[:, skip:])
        previous = sent(torch.tensor(list(anchors)), base.device)
        conditioned, tokens, q, scores = [], [], [], []
        state = None
        for slot in range(hidden.shape[1]):
            z, embedded = None, self.embed_previous(previous)
            if self.markov_head is not None and embedded is not None:
                if slot == 0:
                    state = self.markov_head.start(embedded)
                z, state = self.markov_head.step(embedded, hidden[:, slot], state)
            if slot < skip:
                # Proposes nothing, but a recurrent head has passed through it in training too.
                continue
            logits = base[:, slot - skip]
            if self.markov_head is not None:
                logits = logits + self.markov_head.markov_w2(z)
            logits = self.head.spread(logits, self.spec.vocab_size)
            previous, distribution = choose(logits, samplings, uniforms[:, slot - skip])
            tokens.append(previous)
            q.append(distribution)
            if self.scored:
                scores.append(log_odds(logits))
            if embedded is not None:
                conditioned.append(embedded)
        before = torch.stack(conditioned, dim=1) if conditioned else None
        confidence = self.confidence_logits(before, hidden[:, skip:])
        if confidence is None and scores:
            confidence = torch.stack(scores, dim=1)
        return Proposal(torch.stack(tokens, dim=1), torch.stack(q, dim=1), confidence)
