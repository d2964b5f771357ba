"""What our code makes of one golden case: everything on demand, and once. The numbers to compare with, and
the comparing, are in test_golden.py.

B sequences, S tokens, A anchors, γ slots, d hidden width, r Markov rank, m captured layers, K unroll steps.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from safetensors.torch import load_file
from torch import Tensor

from deepspec.checkpoints.draft import load_draft
from deepspec.decode.engine import Decoder, Generation, Request, generate
from deepspec.drafts import LossSettings, dflash, dspark, eagle3
from deepspec.drafts.base import LossSums, NeuralDraft, Proposal
from deepspec.drafts.dflash import DFlashDraft
from deepspec.drafts.eagle3 import Eagle3Draft
from deepspec.maths.blocks import Blocks, FeatureBatch, unroll_masks, unroll_teacher_index
from deepspec.maths.losses import HeadLoss, head_loss
from deepspec.maths.verify import Sampling, verify, warp
from deepspec.targets import StepOutput, Target

ROOT = Path(__file__).parent.parent
FOLDER = Path(os.environ.get("DEEPSPEC_GOLDEN_DIR") or ROOT.parent / "shared" / "golden")
GREEDY = Sampling()
EPS = 1e-6  # what the published recipe adds to every denominator


@cache
def the_case(name: str) -> Case:
    return Case(name)


@dataclass(eq=False)
class Case:
    """One folder: what is given, and, on demand and once, what our code makes of it."""

    name: str

    @cached_property
    def golden(self) -> dict[str, Tensor]:
        return load_file(FOLDER / self.name / "golden.safetensors")

    @cached_property
    def target(self) -> Target:
        return Target.from_pretrained(FOLDER / self.name / "target", dtype="float32", device="cpu")

    @cached_property
    def draft(self) -> NeuralDraft:
        draft = load_draft(FOLDER / self.name / "draft", self.target, settled=False)
        # Loaded frozen; the golden gradients need it to train.
        return draft.requires_grad_(True)

    @cached_property
    def settled(self) -> NeuralDraft:
        """As users decode with it."""
        return load_draft(FOLDER / self.name / "draft", self.target)

    @property
    def block_draft(self) -> DFlashDraft:
        assert isinstance(self.draft, DFlashDraft)
        return self.draft

    @property
    def eagle(self) -> Eagle3Draft:
        assert isinstance(self.draft, Eagle3Draft)
        return self.draft

    @cached_property
    def arguments(self) -> dict[str, Any]:
        return json.loads((FOLDER / self.name / "train_args.json").read_text("utf-8"))

    @cached_property
    def loss(self) -> LossSettings:
        given = self.arguments
        return LossSettings(
            ce=given.get("ce_loss_alpha", 1.0),
            l1=given.get("l1_loss_alpha", 0.0),
            confidence=given.get("confidence_head_alpha", 0.0),
            decay_gamma=given.get("loss_decay_gamma") or 4.0,
        )

    @cached_property
    def batch(self) -> FeatureBatch:
        given = self.golden
        return FeatureBatch(
            input_ids=given["train.input_ids"],
            loss_mask=given["train.loss_mask"].bool(),
            features=given["train.target_hidden_states"],
            last_hidden=given["train.target_last_hidden_states"],
            lengths=given["train.attention_mask"].sum(1),
        )

    @property
    def length(self) -> int:
        return self.batch.input_ids.shape[1]

    @cached_property
    def real(self) -> Tensor:
        """[B, S] bool: not padding."""
        return self.golden["train.attention_mask"].bool()

    @cached_property
    def read(self) -> StepOutput:
        return self.target.read(self.batch.input_ids, self.draft.feature_layers)

    # Training of a block draft.

    @cached_property
    def blocks(self) -> Blocks:
        given = self.golden
        return self.block_draft.blocks(
            self.batch, given["train.anchor_positions"], given["train.block_keep_mask"]
        )

    @cached_property
    def hidden(self) -> Tensor:
        with torch.no_grad():
            return self.block_draft.backbone(self.batch, self.blocks)

    @cached_property
    def z(self) -> Tensor | None:
        """[B, A, γ, r] teacher-forced output of the sequential head."""
        head = getattr(self.draft, "markov_head", None)
        with torch.no_grad():
            return None if head is None else head(head.markov_w1(self.blocks.previous), self.hidden)

    @cached_property
    def every_slot(self) -> HeadLoss:
        """Acceptance of all slots, supervised or not, through the chunked head."""
        z = self.z
        return head_loss(
            self.hidden.flatten(0, 2),
            self.draft.head,
            weights={},
            labels=self.blocks.labels.flatten(),
            teacher_hidden=self.aligned_last_hidden.flatten(0, 2),
            teacher_head=self.draft.teacher_head,
            markov=None if z is None else (z.flatten(0, 2), self.draft.markov_head.markov_w2.weight.detach()),
        )

    @property
    def aligned_last_hidden(self) -> Tensor:
        rows = torch.arange(len(self.batch.input_ids))[:, None, None]
        return self.batch.last_hidden[rows, self.blocks.teacher_index]

    @cached_property
    def term_sums(self) -> LossSums:
        """The loss with every term on and of weight one: its metrics are the bare sums."""
        unit = LossSettings(ce=1.0, l1=1.0, confidence=1.0, decay_gamma=self.loss.decay_gamma)
        with torch.no_grad():
            return self.block_draft(self.batch, unit, self.blocks)

    # Training of Eagle-3.

    @cached_property
    def states(self) -> list[Tensor]:
        with torch.no_grad():
            return self.eagle.unroll(self.batch)

    @cached_property
    def masks(self) -> Tensor:
        return unroll_masks(self.batch.loss_mask, self.batch.lengths, self.draft.spec.block)

    @cached_property
    def correct(self) -> Tensor:
        """[B, S, K] bool: the draft's best token is the target's, on counted rows."""
        found = torch.zeros(*self.batch.input_ids.shape, self.draft.spec.block, dtype=torch.bool)
        rows = torch.arange(len(found))[:, None].expand(found.shape[:2])
        for step, (state, mask) in enumerate(zip(self.states, self.masks, strict=True)):
            where = unroll_teacher_index(self.length, step).expand(mask.shape)[mask]
            with torch.no_grad():
                loss = head_loss(
                    self.draft.norm(state[mask]),
                    self.draft.head,
                    weights={},
                    teacher_hidden=self.batch.last_hidden[rows[mask], where],
                    teacher_head=self.draft.teacher_head,
                )
            found[..., step][mask] = loss.correct
        return found

    # Both.

    @cached_property
    def sums(self) -> LossSums:
        """The loss with the recipe's weights, and gradients left in the draft's parameters."""
        self.draft.zero_grad()
        blocks = None if isinstance(self.draft, Eagle3Draft) else self.blocks
        with torch.enable_grad():
            sums: LossSums = self.draft(self.batch, self.loss, blocks)
            (sums.total / (sums.weight + EPS)).backward()
        return sums

    @cached_property
    def gradients(self) -> dict[str, Tensor]:
        assert self.sums
        return {n: p.grad for n, p in self.draft.named_parameters() if p.grad is not None}

    # Decoding.

    @property
    def prompt(self) -> list[int]:
        return self.golden["decode.prompt_ids"][0].tolist()

    @property
    def budget(self) -> int:
        return self.golden["decode.output_ids"].shape[1] - len(self.prompt)

    @cached_property
    def decoded(self) -> Decoded:
        return decode(self)

    @cached_property
    def plain(self) -> list[int]:
        found = generate(self.target, None, self.prompt, max_new_tokens=self.budget, ignore_eos=True)
        return [*self.prompt, *found.token_ids]

    @cached_property
    def thresholded(self) -> Thresholded:
        return decode_with_threshold(self, float(self.golden["decode_thr.threshold"]))


@dataclass
class Round:
    """What one round of decoding did, one row. Slots of an older layout's discarded slot 0 are left out."""

    past: int = 0
    """Committed tokens in the draft's cache when it proposed."""
    context: Tensor = field(default_factory=lambda: torch.empty(0))
    """[n, m*d] features it had taken in since the round before."""
    normed: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Inputs and outputs of the draft's final norm, in the order of its calls."""
    logits: list[Tensor] = field(default_factory=list)
    """What its tokens were chosen from."""
    proposal: Proposal | None = None
    verified: list[int] = field(default_factory=list)
    target_logits: Tensor = field(default_factory=lambda: torch.empty(0))
    following: list[int] = field(default_factory=list)
    """The tokens it committed."""


@dataclass
class Decoded:
    generation: Generation
    rounds: list[Round]


def decode(case: Case) -> Decoded:
    """Greedy decoding through the package's own decoder, watched from outside."""
    target, draft = case.target, case.settled
    prompt, budget = case.prompt, case.budget
    rounds = [Round()]
    place, name = (draft.norm, "forward") if draft.lean is None else (draft.lean, "norm")
    norm = getattr(place, name)

    def watched_norm(x: Tensor) -> Tensor:
        found = norm(x)
        # A block's rows come packed from lean layers.
        packed = draft.algorithm.parallel and draft.lean is not None
        rounds[-1].normed.append((x[None], found[None]) if packed else (x, found))
        return found

    step, observe, propose = target.step, draft.observe, draft.propose

    def watched_step(slots: Sequence[int], tokens: Sequence[Sequence[int]], layers: Sequence[int]) -> Any:
        output = step(slots, tokens, layers)
        if rounds[-1].proposal is not None:
            rounds[-1].verified = list(tokens[0])
            rounds[-1].target_logits = target.logits(output.last_hidden[0])
        return output

    def watched_observe(slots: Any, features: Any, tokens: Any, next_tokens: Any) -> None:
        if rounds[-1].proposal is not None:
            rounds[-1].following = list(next_tokens[0])
            rounds.append(Round())
        rounds[-1].context = features[0, : len(tokens[0])]
        observe(slots, features, tokens, next_tokens)

    def watched_propose(slots: Any, anchors: Any, sampling: Any, uniforms: Any) -> Proposal:
        rounds[-1].past = draft.lengths[slots[0]]
        rounds[-1].proposal = propose(slots, anchors, sampling, uniforms)
        return rounds[-1].proposal

    def watched_choose(logits: Tensor, sampling: Sampling, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        rounds[-1].logits.append(logits.flatten(0, -2))  # a whole block at once, or slot by slot
        return choose(logits, sampling, uniforms)

    choose = dflash.choose
    with (
        patch.object(place, name, watched_norm),
        patch.object(target, "step", watched_step),
        patch.object(draft, "observe", watched_observe),
        patch.object(draft, "propose", watched_propose),
        patch.object(dflash, "choose", watched_choose),
        patch.object(dspark, "choose", watched_choose),
        patch.object(eagle3, "choose", watched_choose),
    ):
        (generation,) = Decoder(target, draft).run([Request(prompt, budget, sampling=GREEDY)])
    return Decoded(generation, rounds[:-1])


class Thresholded(NamedTuple):
    tokens: list[int]
    proposed: list[int]
    accepted: list[int]
    margin: float
    """Smallest distance of a confidence from the threshold."""


def decode_with_threshold(case: Case, threshold: float) -> Thresholded:
    """Rounds whose proposals are cut before the first slot with a confidence below the threshold."""
    target, draft, slot = case.target, case.settled, [0]
    target.open(0)
    draft.open(0)
    tokens, proposed, accepted, margin = list(case.prompt), [], [], 1.0
    output = target.step(slot, [tokens], draft.feature_layers)
    anchor = int(target.logits(output.last_hidden[0, -1]).argmax())
    draft.observe(slot, output.features, [tokens], [[*tokens[1:], anchor]])
    tokens.append(anchor)
    end = len(case.prompt) + case.budget
    uniforms = torch.full((1, draft.max_proposals + 1), 0.5)
    while len(tokens) - 1 < end:
        proposal = draft.propose(slot, [tokens[-1]], GREEDY, uniforms[:, 1:])
        assert proposal.confidence is not None
        sure = torch.sigmoid(proposal.confidence[0].double())
        margin = min(margin, float((sure - threshold).abs().min()))
        lengths = (sure >= threshold).long().cumprod(0).sum()[None]
        before = target.length(0)
        output = target.step(slot, [[tokens[-1], *proposal.tokens[0].tolist()]], draft.feature_layers)
        p = warp(target.logits(output.last_hidden), GREEDY)
        verdict = verify(p, proposal.q, proposal.tokens, lengths, uniforms)
        count = int(verdict.accepted)
        new = [*proposal.tokens[0, :count].tolist(), int(verdict.next_token)]
        target.rollback(0, before + count + 1)
        draft.observe(slot, output.features[:, : count + 1], [[tokens[-1], *new[:-1]]], [new])
        tokens += new
        proposed.append(int(lengths))
        accepted.append(count)
    target.free(0)
    return Thresholded(tokens[:end], proposed, accepted, margin)
