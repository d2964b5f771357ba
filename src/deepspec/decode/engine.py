"""Speculative decoding: propose -> verify -> commit, for one sequence or a changing batch of them.

R rows in flight, γ proposals per round, V vocabulary. This room owns the slots, the random numbers
and the stop tokens; what is accepted is decided in `verify`, what is proposed in `drafts`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import torch
from torch import Tensor

from deepspec.drafts.base import Draft, Proposal
from deepspec.errors import UserError
from deepspec.maths.verify import Sampling, draw, verify, warp
from deepspec.targets import Target


@dataclass(frozen=True)
class Request:
    """One sequence to continue. Its tokens depend on its seed, not on its batch."""

    input_ids: Sequence[int]
    max_new_tokens: int = 48
    seed: int = 0
    key: str = ""


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


def pieces_of(tokenizer: Any, answer: Generation) -> list[tuple[str, bool]]:
    """The answer's text in runs by who produced it: (text, whether the draft proposed it); no stop token.

    Everything is decoded from the start each time: a character may be spread over tokens of both.
    """
    ids = answer.token_ids[: -1 if answer.stopped else None]
    pieces, shown = [], ""
    for i, drafted in enumerate(answer.from_draft[: len(ids)]):
        last = i + 1 == len(ids)
        if not last and answer.from_draft[i + 1] == drafted:
            continue
        whole = tokenizer.decode(ids[: i + 1], skip_special_tokens=True)
        if not last:
            whole = whole.rstrip("\ufffd")  # the rest of that character is still to come
        if len(whole) > len(shown):
            pieces.append((whole[len(shown) :], drafted))
            shown = whole
    return pieces


class NoDraft:
    """Plain decoding in the draft's shape: proposes nothing, so every round commits one token."""

    name = "plain"
    max_proposals = 0
    feature_layers: tuple[int, ...] = ()

    def open(self, slot: int) -> None:
        pass

    def observe(
        self,
        slots: Sequence[int],
        features: Tensor | None,
        tokens: Sequence[Sequence[int]],
        next_tokens: Sequence[Sequence[int]],
    ) -> None:
        pass

    def propose(
        self, slots: Sequence[int], anchors: Sequence[int], sampling: Sampling, uniforms: Tensor
    ) -> Proposal:
        return Proposal(torch.zeros(len(slots), 0, dtype=torch.long), torch.zeros(len(slots), 0, 0), None)


@dataclass(eq=False)
class _Row:
    """A request in flight: `anchor` is its last committed token, not yet in the target's cache."""

    slot: int
    request: Request
    random: torch.Generator
    began: float
    result: Generation
    anchor: int = -1


class Decoder:
    """Continues requests in up to `max_rows` slots; a finished row's slot goes to the next request."""

    def __init__(
        self,
        target: Target,
        draft: Draft | None,
        sampling: Sampling,
        *,
        stop_token_ids: Iterable[int] = (),
        max_rows: int = 1,
    ) -> None:
        self.target, self.draft, self.sampling = target, draft or NoDraft(), sampling
        self.stops = frozenset(stop_token_ids)
        self.max_rows = max_rows
        self.rows: list[_Row] = []
        self._free = list(range(max_rows))[::-1]

    def run(self, requests: Iterable[Request]) -> Iterator[Generation]:
        """Results in the order in which they finish."""
        waiting = iter(requests)
        while True:
            while self._free and (request := next(waiting, None)) is not None:
                row = self._start(request)
                if self._finished(row):
                    yield self._close(row)
                else:
                    self.rows.append(row)
            if not self.rows:
                return
            self._round()
            for row in [r for r in self.rows if self._finished(r)]:
                self.rows.remove(row)
                yield self._close(row)

    def _start(self, request: Request) -> _Row:
        """Prefill: the target reads the prompt and gives the first new token."""
        if not request.input_ids:
            raise UserError("an empty prompt cannot be continued", next_step="give at least one token id")
        began = time.perf_counter()
        random = torch.Generator().manual_seed(request.seed)
        row = _Row(self._free.pop(), request, random, began, Generation(request.key))
        self.target.open(row.slot)
        self.draft.open(row.slot)
        prompt = list(request.input_ids)
        output = self.target.step([row.slot], [prompt], self.draft.feature_layers)
        probabilities = warp(self.target.logits(output.last_hidden[0, -1:]), self.sampling)
        row.anchor = int(draw(probabilities.cpu(), torch.rand(1, generator=random)))
        self.draft.observe([row.slot], output.features, [prompt], [[*prompt[1:], row.anchor]])
        self._commit(row, [row.anchor], drafted=0)
        return row

    def _round(self) -> None:
        """One propose-verify-commit round over all rows in flight."""
        target, draft, rows = self.target, self.draft, self.rows
        slots = [r.slot for r in rows]
        gamma = draft.max_proposals
        uniforms = torch.stack([torch.rand(2 * gamma + 1, generator=r.random) for r in rows])
        uniforms = uniforms.to(target.device)
        anchors = [r.anchor for r in rows]
        proposal = draft.propose(slots, anchors, self.sampling, uniforms[:, :gamma])
        proposed = proposal.tokens.tolist()
        before = [target.length(s) for s in slots]
        output = target.step(
            slots, [[a, *p] for a, p in zip(anchors, proposed, strict=True)], draft.feature_layers
        )
        p = warp(target.logits(output.last_hidden), self.sampling)
        q = proposal.q.to(p.device) if gamma else p[:, :0]
        lengths = torch.full((len(rows),), gamma, device=p.device)
        verdict = verify(p, q, proposal.tokens.to(p.device), lengths, uniforms[:, gamma:])
        observed, following = [], []
        for i, (row, accepted, token) in enumerate(
            zip(rows, verdict.accepted.tolist(), verdict.next_token.tolist(), strict=True)
        ):
            new = [*proposed[i][:accepted], token]
            # The cache keeps the anchor and what was accepted; the new token is the next anchor.
            target.rollback(row.slot, before[i] + accepted + 1)
            observed.append([row.anchor, *new[:-1]])
            following.append(new)
            row.anchor = token
            row.result.proposed.append(gamma)
            row.result.accepted.append(accepted)
            row.result.kept.append(self._commit(row, new, drafted=accepted))
            if proposal.confidence is not None:
                row.result.confidence.append(proposal.confidence[i].tolist())
        features = output.features
        if features is not None:
            features = features[:, : max(map(len, observed))]
        draft.observe(slots, features, observed, following)

    def _commit(self, row: _Row, tokens: list[int], drafted: int) -> int:
        """Append tokens up to the budget or a stop token; how many were kept."""
        result = row.result
        room = row.request.max_new_tokens - len(result.token_ids)
        kept = tokens[: max(room, 0)]
        stop = next((i for i, t in enumerate(kept) if t in self.stops), None)
        if stop is not None:
            kept, result.stopped = kept[: stop + 1], True
        result.token_ids.extend(kept)
        result.from_draft.extend(i < drafted for i in range(len(kept)))
        return len(kept)

    def _finished(self, row: _Row) -> bool:
        """Rounds go on while the anchor's index is below the maximum length (method.md 1), so a draft's
        round may run once the budget is exactly full; plain decoding has nothing to gain from one."""
        result = row.result
        if result.stopped or self.draft.max_proposals == 0:
            return result.stopped or len(result.token_ids) >= row.request.max_new_tokens
        return 1 + sum(result.committed_per_round) > row.request.max_new_tokens

    def _close(self, row: _Row) -> Generation:
        self.target.free(row.slot)
        self._free.append(row.slot)
        row.result.seconds = time.perf_counter() - row.began
        return row.result


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
    for i, prompt in enumerate(prompts):
        outside = [t for t in prompt if not 0 <= t < target.vocab_size]
        if outside:
            raise UserError(
                f"prompt {i} holds token {outside[0]}, outside the vocabulary of {target.vocab_size}",
                next_step="encode it with the target's own tokenizer",
            )
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    try:
        sampling = Sampling(temperature, top_k, top_p)
    except ValueError as error:
        raise UserError(str(error)) from error
    stops = () if ignore_eos else (target.stop_token_ids if stop_token_ids is None else stop_token_ids)
    decoder = Decoder(target, draft, sampling, stop_token_ids=stops, max_rows=len(prompts))
    requests = [
        Request(p, max_new_tokens, s, str(i)) for i, (p, s) in enumerate(zip(prompts, seeds, strict=True))
    ]
    results = {g.key: g for g in decoder.run(requests)}
    ordered = [results[str(i)] for i in range(len(prompts))]
    return ordered[0] if single else ordered
