"""Speculative decoding: propose -> verify -> commit, for one sequence or a changing batch of them.

R rows in flight, γ proposals per round, V vocabulary. The engine owns the slots, the random numbers
and the stop tokens; what is accepted is decided in `verify`, what is proposed in `drafts`.
"""

from __future__ import annotations

import math
import time
from bisect import insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count, islice
from typing import NamedTuple, NoReturn, overload

import numpy as np
import torch
from torch import Tensor

from deepspec.decode.plain import Deferred, NoDraft
from deepspec.decode.settle import LOGITS, Fault, Settled, first_layer, settle, warped
from deepspec.drafts.base import Draft, NeuralDraft, Proposal
from deepspec.errors import NonFiniteError, UserError
from deepspec.maths.host import sent
from deepspec.maths.slots import Ints, Ragged
from deepspec.maths.verify import Sampling, defined, draw, verify, warp
from deepspec.schedule.policies import NONE, Load, Policy
from deepspec.targets import Target


@dataclass(frozen=True)
class Request:
    """One sequence to continue, and how. Its tokens depend on nothing but this: not on its batch.

    key: what the decoder calls it; empty means that the decoder finds a name. drawn: how many random numbers
    are used up; a request that continues a plain answer has used one for each of its tokens.
    """

    input_ids: Sequence[int]
    max_new_tokens: int = 48
    seed: int = 0
    key: str = ""
    sampling: Sampling = field(default_factory=Sampling)
    stop_token_ids: frozenset[int] = frozenset()
    drawn: int = 0


@dataclass(eq=False)
class Generation:
    """What decoding gave. `token_ids`: new tokens, prompt excluded; a stop token, if hit, is the last.

    Per verify round: `proposed` tokens, `accepted` of them, `kept` (accepted + 1, cut at the budget
    or a stop token; the first new token comes from the prefill and belongs to no round).
    """

    key: str = ""
    token_ids: list[int] = field(default_factory=list)
    proposed: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    from_draft: list[bool] = field(default_factory=list)
    """For each token: whether the draft proposed it (else the target drew it)."""
    confidence: list[list[float]] = field(default_factory=list)
    seconds: float = 0.0
    """From the start of its prefill to its last token; in a batch, shared with the other rows."""
    stopped: bool = False
    """Ended by a stop token rather than by the budget."""

    @property
    def committed_per_round(self) -> list[int]:
        """accepted + 1 per round, as verified: a last round is not cut at the budget."""
        return [a + 1 for a in self.accepted]


class Event(NamedTuple):
    """What one step gave one request: its new tokens (a last round may keep none), and all of its answer so
    far, which later steps extend until `finished`."""

    tokens: list[int]
    answer: Generation
    finished: bool


@dataclass(eq=False)
class Row:
    """A request in flight: `anchor` is its last committed token, not yet in the target's cache."""

    slot: int
    request: Request
    random: torch.Generator
    began: float
    answer: Generation
    anchor: int = -1

    def commit(self, tokens: list[int], drafted: int) -> list[int]:
        """Append tokens, `drafted` of them the draft's, up to the budget or a stop token; those kept."""
        answer = self.answer
        kept = tokens[: self.request.max_new_tokens - len(answer.token_ids)]
        stop = next((i for i, t in enumerate(kept) if t in self.request.stop_token_ids), None)
        if stop is not None:
            kept, answer.stopped = kept[: stop + 1], True
        answer.token_ids.extend(kept)
        answer.from_draft.extend(i < drafted for i in range(len(kept)))
        return kept


class Decoder:
    """Continues requests, each by its own sampling, in up to `max_rows` slots.

        decoder = Decoder(target, draft, max_rows=16)
        decoder.submit(Request(ids, 100, sampling=Sampling(0.8)))
        while not decoder.idle:
            for event in decoder.step():
                ...  # new tokens of one request

    Requests wait for a slot in the order in which they were submitted; a row that finishes or is cancelled
    leaves its slot to the next.

    A step raises NonFiniteError if the target or the draft gives infinities or NaN for some rows. These rows,
    which the error names by their keys, are dropped with nothing committed; the others are as they would have
    been without them, and the next `step` hands out what this one gave them.

    policy: how many of a round's proposals are verified; None verifies all. A policy that asks for none
    leaves the draft alone, which observes what it missed before it proposes again. temperatures: [γ], what
    the draft's confidence logits are divided by before the policy sees them (`deepspec calibrate`).
    """

    def __init__(
        self,
        target: Target,
        draft: Draft | None,
        *,
        max_rows: int = 1,
        policy: Policy | None = None,
        temperatures: Sequence[float] | None = None,
    ) -> None:
        assert max_rows >= 1, "a decoder needs at least one slot"
        if policy == NONE:
            draft = None  # it would only be kept ready for nothing
        self.target, self.draft = target, draft or NoDraft()
        if policy is not None and draft is not None:
            self.draft = Deferred(draft)
        self.policy, self.temperatures = policy, torch.tensor(temperatures or [1.0])
        if draft is not None and temperatures and len(temperatures) != draft.max_proposals:
            raise UserError(
                f"{len(temperatures)} temperatures for a draft that proposes {draft.max_proposals} tokens",
                next_step="use those of this draft's own calibration",
            )
        if policy is not None and isinstance(draft, NeuralDraft):
            draft.scored = True
        self.max_rows = max_rows
        self.waiting: dict[str, Request] = {}
        self.rows: list[Row] = []
        """In the order of their slots: a step over neighbouring slots copies no keys and values."""
        self._names = (f"#{n}" for n in count())
        self._held: list[Event] = []
        """Events of a step that raised, for the next one to hand out."""

    @property
    def idle(self) -> bool:
        """Whether a step would do nothing."""
        return not (self.waiting or self.rows or self._held)

    def submit(self, request: Request) -> str:
        """Put a request in line; its key. Its budget is cut to what its prompt leaves of the context.

        Raises UserError for an empty prompt or one that fills the context, tokens outside the vocabulary, a
        budget below one token, or the key of a request that has not finished.
        """
        request = replace(request, key=request.key or next(self._names))
        key, size = request.key, self.target.vocab_size
        if not request.input_ids:
            raise UserError("an empty prompt cannot be continued", next_step="give at least one token id")
        outside = next((t for t in request.input_ids if not 0 <= t < size), None)
        if outside is not None:
            raise UserError(
                f"prompt {key} holds token {outside}, outside the vocabulary of {size}",
                next_step="encode it with the target's own tokenizer",
            )
        if request.max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be at least 1, not {request.max_new_tokens}")
        budget = self.target.room(len(request.input_ids), request.max_new_tokens)
        if budget < 1:
            raise UserError(
                f"prompt {key} is {len(request.input_ids)} tokens, and {self.target.spec.name} reads at most "
                f"{self.target.max_length}, of which one must be new",
                next_step="shorten the prompt, or use a target with a longer context",
            )
        if key in self.waiting or any(row.answer.key == key for row in self.rows):
            raise UserError(
                f"a request with the key {key!r} has not finished yet",
                next_step="give each request its own key",
            )
        self.waiting[key] = replace(request, max_new_tokens=budget)
        return key

    def cancel(self, key: str) -> Generation:
        """Drop a request that has not finished, and free its slot; what it had so far. Raises UserError for
        any other key."""
        if self.waiting.pop(key, None) is not None:
            return Generation(key)
        row = next((row for row in self.rows if row.answer.key == key), None)
        if row is None:
            raise UserError(
                f"there is no request with the key {key!r}",
                next_step="cancel a request that was submitted and has not finished",
            )
        return self._close(row)

    def step(self) -> list[Event]:
        """One pass of the target: the first waiting request's prompt if a slot is free, which gives its first
        token; otherwise a round over all rows in flight. Empty if the decoder is idle.

        Raises NonFiniteError."""
        if self._held:
            held, self._held = self._held, []
            return held
        if self.waiting and len(self.rows) < self.max_rows:
            return [self._start(self.waiting.pop(next(iter(self.waiting))))]
        return self._round() if self.rows else []

    def run(self, requests: Iterable[Request]) -> Iterator[Generation]:
        """Answers in the order in which they finish. A request is drawn from `requests` once a slot is free
        for it. Raises UserError where `submit` does, and then leaves none of its requests in the decoder;
        NonFiniteError where `step` does, and another call then continues with the other rows."""
        requests, ours = iter(requests), set[str]()
        try:
            while True:
                free = self.max_rows - len(self.rows) - len(self.waiting)
                for request in islice(requests, max(free, 0)):
                    ours.add(self.submit(request))
                if self.idle:
                    return
                for _, answer, finished in self.step():
                    if finished:
                        ours.discard(answer.key)
                        yield answer
        except NonFiniteError:
            ours.clear()
            raise
        finally:
            for key in ours & {*self.waiting, *(row.answer.key for row in self.rows)}:
                self.cancel(key)

    def _start(self, request: Request) -> Event:
        """Prefill: the target reads the prompt and gives the first new token."""
        taken = {row.slot for row in self.rows}
        slot = next(s for s in range(self.max_rows) if s not in taken)
        random = torch.Generator().manual_seed(request.seed)
        torch.rand(request.drawn, generator=random)
        row = Row(slot, request, random, time.perf_counter(), Generation(request.key))
        insort(self.rows, row, key=lambda r: r.slot)
        self.target.open(slot)
        self.draft.open(slot)
        try:
            prompt = list(request.input_ids)
            layers = self.draft.feature_layers
            output = self.target.step([slot], [prompt], layers)
            p = warp(self.target.logits(output.last_hidden[0, -1:]), request.sampling).cpu()
            part = None if output.features is None else first_layer(output.features, layers)
            if part or not bool(defined(p)):
                self._refuse([(row, Fault(True, part or LOGITS))])
            row.anchor = int(draw(p, torch.rand(1, generator=random)))
            self.draft.observe([slot], output.features, [prompt], [[*prompt[1:], row.anchor]])
        except BaseException:
            if row in self.rows:
                self._close(row)
            raise
        return self._event(row, row.commit([row.anchor], drafted=0))

    def _round(self) -> list[Event]:
        """Propose, verify and commit, once for all rows in flight."""
        draft, rows, gamma = self.draft, list(self.rows), self.draft.max_proposals
        slots, anchors = [r.slot for r in rows], [r.anchor for r in rows]
        samplings = [r.request.sampling for r in rows]
        uniforms = torch.stack([torch.rand(2 * gamma + 1, generator=r.random) for r in rows])
        uniforms = sent(uniforms, self.target.device)
        held = [self.target.length(slot) for slot in slots]
        load = Load(len(rows), sum(held) / len(rows), sum(not row.answer.kept for row in rows))
        asked = draft if self.policy is None or self.policy.proposes(load) else NoDraft()
        proposal = asked.propose(slots, anchors, samplings, uniforms[:, :gamma])
        # After the anchor, the target's context may have room for fewer than γ proposals.
        wanted = zip(held, self._lengths(proposal, load), strict=True)
        counts = [max(self.target.room(each + 1, n), 0) for each, n in wanted]
        tokens = [row[:n] for row, n in zip(proposal.tokens.tolist(), counts, strict=True)]
        settled = self._settled(rows, tokens, proposal, uniforms[:, gamma:])
        decided = zip(tokens, settled.accepted, settled.next_token, strict=True)
        new = [[*row[:accepted], token] for row, accepted, token in decided]
        # The new token is the next anchor.
        observed = [[anchor, *tokens[:-1]] for anchor, tokens in zip(anchors, new, strict=True)]
        features = settled.features
        if features is not None:
            features = features[:, : max(map(len, observed))]
        draft.observe(slots, features, observed, new)
        verified, gained = np.zeros((2, len(rows)), np.int64)
        events = []
        for i, row in enumerate(rows):
            if i in settled.faults:
                continue
            accepted, answer, row.anchor = settled.accepted[i], row.answer, new[i][-1]
            self._watch(row, counts[i], accepted, proposal.q[i])
            kept = row.commit(new[i], drafted=accepted)
            verified[i], gained[i] = counts[i], max(len(kept) - 1, 0)
            answer.proposed.append(counts[i])
            answer.accepted.append(accepted)
            answer.kept.append(len(kept))
            if proposal.confidence is not None:
                answer.confidence.append(settled.confidence[i][: counts[i]])
            events.append(self._event(row, kept))
        if self.policy is not None:
            self.policy.learn(verified, gained)
        if settled.faults:
            self._held = events
            self._refuse([(rows[i], fault) for i, fault in settled.faults.items()])
        return events

    def _settled(self, rows: Sequence[Row], tokens: Ragged, proposal: Proposal, uniforms: Tensor) -> Settled:
        """What the target decides on `tokens`, the first proposals of each row; its cache then holds the
        anchors and what was accepted. uniforms: [R, γ + 1].

        NaN that a proposal gives reaches the tokens before it in the same pass: a mask makes 0 × NaN of it.
        So such a row is read again, token by token, and has a fault only if plain decoding would have it.
        """
        target, layers, width = self.target, self.draft.feature_layers, max(map(len, tokens))
        slots = [row.slot for row in rows]
        before = [target.length(slot) for slot in slots]
        output = target.step(slots, [[r.anchor, *t] for r, t in zip(rows, tokens, strict=True)], layers)
        samplings = [r.request.sampling for r in rows]
        p = warped(target.logits, output.last_hidden, [len(each) + 1 for each in tokens], samplings)
        q = proposal.q[:, :width].to(p.device) if width else p[:, :0]
        verifying, lengths = proposal.tokens[:, :width].to(p.device), [len(row) for row in tokens]
        deciding = torch.cat([uniforms[:, :width], uniforms[:, -1:]], dim=1)
        verdict = verify(p, q, verifying, sent(torch.tensor(lengths), p.device), deciding)
        settled = settle(verdict, p, q, proposal.confidence, output.features, layers)
        for i, fault in list(settled.faults.items()):
            if fault.of_target and tokens[i]:
                target.wipe(slots[i], before[i])
                settled.replace(i, self._singly(rows[i], tokens[i], q[i : i + 1], deciding[i : i + 1]))
        for i, (slot, held) in enumerate(zip(slots, before, strict=True)):
            forget = target.wipe if i in settled.unsound else target.rollback
            forget(slot, held + 1 + settled.accepted[i])
        return settled

    def _singly(self, row: Row, tokens: Ints, q: Tensor, uniforms: Tensor) -> Settled:
        """As `_settled`, for one row whose tokens are read one by one, each only if it is accepted."""
        target, layers, features = self.target, self.draft.feature_layers, []
        q, uniforms = q[:, : len(tokens)], torch.cat([uniforms[:, : len(tokens)], uniforms[:, -1:]], dim=1)
        p = q.new_full((1, len(tokens) + 1, target.vocab_size), math.nan)  # of what is not read yet
        verifying, lengths = (torch.tensor([each], device=p.device) for each in (list(tokens), len(tokens)))
        for place, token in enumerate([row.anchor, *tokens]):
            output = target.step([row.slot], [[token]], layers)
            features.append(output.features)
            p[0, place] = warp(target.logits(output.last_hidden[0, -1]), row.request.sampling)
            verdict = verify(p, q, verifying, lengths, uniforms)
            if int(verdict.accepted) == place:
                break
        read = torch.cat([f for f in features if f is not None], dim=1) if layers else None
        return settle(verdict, p, q, None, read, layers)

    def _watch(self, row: Row, count: int, accepted: int, q: Tensor) -> None:
        """Hears of each verdict before its tokens are committed. q [γ, V]: what proposals were drawn from."""

    def _lengths(self, proposal: Proposal, load: Load) -> list[int]:
        """How many proposals of each row the policy verifies."""
        rows, block = proposal.tokens.shape
        if self.policy is None or not block:
            return [block] * rows
        logits = torch.zeros(rows, block) if proposal.confidence is None else proposal.confidence.cpu()
        confidences = (logits.double() / self.temperatures).sigmoid().numpy()
        return [int(n) for n in self.policy.lengths(confidences, load)]

    def _refuse(self, broken: Sequence[tuple[Row, Fault]]) -> NoReturn:
        """Drop rows that rest on infinities or NaN, and raise NonFiniteError for the first one's reason."""
        keys = [self._close(row, wipe=True).key for row, _ in broken]
        of_target, part = broken[0][1]
        if of_target:
            raise NonFiniteError(self.target.spec.name, part, keys)
        raise NonFiniteError(f"the draft {self.draft.name}", part, keys, NonFiniteError.OF_DRAFT)

    def _event(self, row: Row, tokens: list[int]) -> Event:
        """What a row's step gave; the row is closed if that was its last."""
        answer = row.answer
        full = len(answer.token_ids) == row.request.max_new_tokens
        # Rounds continue while the anchor's index is below the maximum length (method.md 1), so a draft runs
        # one more if the last filled the budget exactly. It can keep nothing: with a policy it is left out.
        cut = bool(answer.kept) and answer.kept[-1] <= answer.accepted[-1]
        needless = cut or self.policy is not None or self.draft.max_proposals == 0
        finished = answer.stopped or (full and needless)
        if finished:
            self._close(row)
        return Event(tokens, answer, finished)

    def _close(self, row: Row, *, wipe: bool = False) -> Generation:
        self.rows.remove(row)
        if wipe:
            self.target.wipe(row.slot, 0)
        self.target.free(row.slot)
        self.draft.free(row.slot)
        row.answer.seconds = time.perf_counter() - row.began
        return row.answer


@overload
def generate(target: Target, draft: Draft | None, input_ids: list[int], **options: object) -> Generation: ...
@overload
def generate(
    target: Target, draft: Draft | None, input_ids: list[list[int]], **options: object
) -> list[Generation]: ...
def generate(  # type: ignore[misc]
    target: Target,
    draft: Draft | None,
    input_ids: list[int] | list[list[int]],
    max_new_tokens: int = 48,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    stop_token_ids: Iterable[int] | None = None,
    ignore_eos: bool = False,
    seed: int | Sequence[int] = 0,
) -> Generation | list[Generation]:
    """Continue one prompt, or a batch of them, with a draft or (None) plainly; the law is the target's.

    input_ids: token ids, or a list of such lists for a batch, decoded together in ragged rows.
    seed: one per row; an int means seed + i for row i. stop_token_ids: None means the target's own.
    Raises UserError for an empty prompt, tokens outside the vocabulary, or impossible sampling.
    """
    single = not input_ids or isinstance(input_ids[0], int)
    prompts: list[list[int]] = [input_ids] if single else input_ids  # type: ignore[assignment,list-item]
    seeds = [seed + i for i in range(len(prompts))] if isinstance(seed, int) else list(seed)
    if len(seeds) != len(prompts):
        raise UserError(
            f"{len(seeds)} seeds for {len(prompts)} prompts", next_step="give one seed per prompt"
        )
    try:
        sampling = Sampling(temperature, top_k, top_p)
    except ValueError as error:
        raise UserError(str(error)) from error
    stops = () if ignore_eos else (target.stop_token_ids if stop_token_ids is None else stop_token_ids)
    requests = [
        Request(p, max_new_tokens, s, str(i), sampling, frozenset(stops))
        for i, (p, s) in enumerate(zip(prompts, seeds, strict=True))
    ]
    answers = {g.key: g for g in Decoder(target, draft, max_rows=len(prompts)).run(requests)}
    ordered = [answers[r.key] for r in requests]
    return ordered[0] if single else ordered
