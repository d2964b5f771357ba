"""A proof on the user's own target and draft: greedy answers token for token, sampled ones by their law.

A sampled answer is right if each of its tokens follows the target's distribution given the tokens before it.
That distribution is known: one pass of the target over the whole answer gives it, without a cache, slots or a
draft. Two sums over all tokens are compared with what the law says of them, in standard deviations:

- surprise: −log p(token), whose mean is the entropy of p; it is off if the temperature or the truncation is;
- favour: f(token) with f = q / (p + q), whose mean is Σ p f, over the tokens of positions that the draft q
  proposed and that were reached; it is off if the draft's tokens are taken, or passed over, more often than
  they should be. (The likelihood ratio q / p would be the sharpest, but it has no bound.)

Both are sums of martingale differences, so their standardised values are normal.

n tokens of an answer, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from deepspec.data.identity import row_seed
from deepspec.decode.engine import Decoder, Generation, Request, Row
from deepspec.drafts.base import Draft
from deepspec.log import progress
from deepspec.maths.verify import Sampling, warp
from deepspec.measure.rows import Prompt, first_difference, rounding
from deepspec.schedule.policies import Policy
from deepspec.targets import Target

LEVEL = 0.001
"""The probability that a lossless decoder is called into question, for both sums together."""
POWER = 0.95
NORMAL = torch.distributions.Normal(0.0, 1.0)


@dataclass
class Sum:
    """A sum of differences from their conditional means, and the sum of their conditional variances."""

    total: float = 0.0
    variance: float = 0.0

    def add(self, values: Tensor, chosen: Tensor, weights: Tensor) -> None:
        """values, weights: [n, V], the weights a distribution in each row; chosen: [n] what came out."""
        mean = (weights * values).sum(-1)
        spread = (weights * values.square()).sum(-1) - mean.square()
        self.total += float((values.gather(-1, chosen[:, None]).squeeze(-1) - mean).sum())
        self.variance += float(spread.clamp_min(0).sum())

    @property
    def deviations(self) -> float:
        return self.total / math.sqrt(self.variance) if self.variance > 0 else 0.0


@dataclass
class Law:
    """What sampled answers add up to. lift: how much `favour` would rise if every token of a position that
    the draft proposed were the draft's. impossible: tokens to which the target gives no probability;
    near_ties: those that have one if logits are rounded otherwise (`at_the_cut`)."""

    surprise: Sum = field(default_factory=Sum)
    favour: Sum = field(default_factory=Sum)
    lift: float = 0.0
    tokens: int = 0
    proposed: int = 0
    impossible: int = 0
    near_ties: int = 0

    def add(self, logits: Tensor, sampling: Sampling, tokens: Tensor, q: Tensor, places: Tensor) -> None:
        """logits [n, V] and the tokens [n] of one answer; q [m, V] of the positions `places` [m] in it."""
        p = warp(logits, sampling).double()
        q = q.to(p)
        possible = p.gather(-1, tokens[:, None]).squeeze(-1) > 0
        near = at_the_cut(logits[~possible], tokens[~possible], sampling)
        self.near_ties += int(near.sum())
        self.impossible += int((~near).sum())
        self.tokens += len(tokens)
        q, places = q[possible[places]], places[possible[places]]
        # A token of no probability has no surprise to average, and never comes out.
        surprise = torch.where(p > 0, -p.clamp_min(torch.finfo(p.dtype).tiny).log(), 0.0)
        self.surprise.add(surprise[possible], tokens[possible], p[possible])
        favour = q / (p[places] + q).clamp_min(torch.finfo(p.dtype).tiny)
        self.favour.add(favour, tokens[places], p[places])
        self.lift += float(((q - p[places]) * favour).sum())
        self.proposed += len(places)

    @property
    def limit(self) -> float:
        """Standard deviations beyond which a sum is not chance."""
        return float(NORMAL.icdf(torch.tensor(1 - LEVEL / 4, dtype=torch.float64)))

    @property
    def detectable(self) -> float | None:
        """The least share of proposals that, taken unchecked, would be noticed with probability `POWER`."""
        if self.lift <= 0:
            return None
        reach = self.limit + float(NORMAL.icdf(torch.tensor(POWER, dtype=torch.float64)))
        return reach * math.sqrt(self.favour.variance) / self.lift

    @property
    def holds(self) -> bool:
        return not self.impossible and all(
            abs(each.deviations) <= self.limit for each in (self.surprise, self.favour)
        )


def at_the_cut(logits: Tensor, tokens: Tensor, sampling: Sampling) -> Tensor:
    """[n] whether top-k and top-p may keep the tokens [n] under logits [n, V] that are rounded otherwise, as
    those that the decoder drew from were: its passes have a cache, and other rows."""
    own = logits.float().gather(-1, tokens[:, None])
    slack = rounding(logits.amax(-1, keepdim=True))
    higher = logits > own + 2 * slack
    moved = torch.where(higher, logits - slack, torch.minimum(logits + slack, own + slack))
    return warp(moved, sampling).gather(-1, tokens[:, None]).squeeze(-1) > 0


class Watched(Decoder):
    """A decoder that remembers what the draft proposed from: per request, (place in the answer, q [V])."""

    seen: dict[str, list[tuple[int, Tensor]]]

    def _watch(self, row: Row, count: int, accepted: int, q: Tensor) -> None:
        start, reached = len(row.answer.token_ids), min(accepted + 1, count)
        self.seen.setdefault(row.answer.key, []).extend((start + k, q[k]) for k in range(reached))


def check_greedy(
    target: Target,
    draft: Draft,
    prompts: Sequence[Prompt],
    budget: int,
    policy: Policy | None,
    batch: int,
    *,
    temperatures: Sequence[float] | None = None,
) -> dict[str, Any]:
    """Greedy answers with the draft next to plain ones: how many are identical, and how many part where two
    logits are equal within rounding; the others are named."""
    decoders = (
        Decoder(target, None, max_rows=batch),
        Decoder(target, draft, max_rows=batch, policy=policy, temperatures=temperatures),
    )
    answers = [_answers(decoder, prompts, budget) for decoder in decoders]
    found: dict[str, Any] = {"prompts": len(prompts), "identical": 0, "near_ties": 0, "different": []}
    for prompt in prompts:
        plain, ours = (each[prompt.id].token_ids for each in answers)
        at, tie = first_difference(target, prompt, ours, plain)
        if at is None:
            found["identical"] += 1
        elif tie:
            found["near_ties"] += 1
        else:
            found["different"].append({"id": prompt.id, "token": at})
    return found


def _answers(decoder: Decoder, prompts: Sequence[Prompt], budget: int) -> dict[str, Generation]:
    stops = decoder.target.stop_token_ids
    requests = (Request(p.ids, budget, 0, p.id, Sampling(), stops) for p in prompts)
    with progress("greedy", len(prompts)) as bar:
        found = {}
        for answer in decoder.run(requests):
            found[answer.key] = answer
            bar.update(1)
    return found


def check_law(
    target: Target,
    draft: Draft,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    budget: int,
    policy: Policy | None,
    batch: int,
    *,
    repeats: int,
    seed: int,
    temperatures: Sequence[float] | None = None,
) -> Law:
    """Sampled answers with the draft, `repeats` to a prompt, against the target's own distributions."""
    law = Law()
    decoder = Watched(target, draft, max_rows=batch, policy=policy, temperatures=temperatures)
    decoder.seen = {}
    asked = {f"{p.id}#{n}": p for n in range(repeats) for p in prompts}
    stops = target.stop_token_ids
    requests = (Request(p.ids, budget, row_seed(seed, key), key, sampling, stops) for key, p in asked.items())
    with progress("sampling", len(asked)) as bar:
        for answer in decoder.run(requests):
            ids, new = list(asked[answer.key].ids), answer.token_ids
            hidden = target.read(torch.tensor([[*ids, *new[:-1]]]), ()).last_hidden[0, len(ids) - 1 :]
            logits = target.logits(hidden)
            # A round past the budget or a stop token proposed places that the answer does not have.
            kept = [(place, q) for place, q in decoder.seen.pop(answer.key, []) if place < len(new)]
            places = torch.tensor([place for place, _ in kept], dtype=torch.long, device=logits.device)
            q = torch.stack([q for _, q in kept]) if kept else logits[:0]
            law.add(logits, sampling, torch.tensor(new, device=logits.device), q, places)
            bar.update(1)
    return law


def verdict_of(greedy: dict[str, Any], law: Law) -> dict[str, Any]:
    """Both checks as plain data, with one sentence each and whether they hold."""
    caught = law.detectable
    figures = {
        name: asdict(each) | {"deviations": each.deviations}
        for name, each in (("surprise", law.surprise), ("favour", law.favour))
    }
    return {
        "lossless": not greedy["different"] and law.holds,
        "greedy": greedy,
        "sampled": {
            "tokens": law.tokens,
            "proposed": law.proposed,
            "impossible": law.impossible,
            "near_ties": law.near_ties,
            "limit": law.limit,
            "detectable": caught,
            **figures,
        },
    }


def sentences(found: dict[str, Any]) -> list[str]:
    """The verdict in words."""
    greedy, sampled = found["greedy"], found["sampled"]
    exact = f"{greedy['identical']} of {greedy['prompts']} answers are plain decoding's token for token"
    if greedy["near_ties"]:
        exact += f", differences at two logits that are equal within rounding: {greedy['near_ties']}"
    if different := greedy["different"]:
        first = different[0]
        place = f"{first['id']!r} at token {first['token']}"
        exact += f", other differences: {len(different)}, the first in {place}"
    off = ", ".join(f"{name} {sampled[name]['deviations']:+.1f}" for name in ("surprise", "favour"))
    law = (
        f"{sampled['tokens']:,} tokens are off the target's law by {off} standard deviations (chance goes "
        f"beyond ±{sampled['limit']:.1f} once in {1 / LEVEL:,.0f} runs)"
    )
    if sampled["impossible"]:
        law += f"; tokens without a probability under the target: {sampled['impossible']}"
    caught = sampled["detectable"]
    if caught is None or caught >= 1:
        power = "too few proposals were reached to notice even a decoder that takes them all unchecked"
    else:
        power = (
            f"a decoder that took {caught:.1%} of the proposals unchecked would be noticed with a "
            f"probability of {POWER:.0%}"
        )
    return [f"greedy: {exact}", f"sampled: {law}", f"power: {power}"]
