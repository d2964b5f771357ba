"""What each method wrote on the same prompts, and how fast, as the rows of a results file.

Speed-ups and their intervals are paired over prompts; greedy answers are compared with plain decoding's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from deepspec.decode.engine import Generation
from deepspec.decode.text import pieces_of
from deepspec.maths import acceptance
from deepspec.maths.verify import Sampling
from deepspec.targets import Target

BOOTSTRAP_SEED = 20


@dataclass(frozen=True)
class Prompt:
    """One task: token ids in the target's own template. system: hash of its system prompt, or None."""

    id: str
    domain: str
    text: str
    ids: tuple[int, ...]
    system: str | None = None


Answering = Callable[[Sequence[Prompt], int], list[Generation]]
"""(prompts, budget of new tokens for each) -> their answers, in the same order."""


@dataclass
class Measurement:
    """One method's answers to a group of prompts, and the time and energy for them. joules: None if there is
    no meter."""

    answers: list[Generation]
    seconds: float
    joules: float | None

    @classmethod
    def read(cls, entry: Mapping[str, Any]) -> Measurement:
        """Read what `asdict` made of a measurement."""
        answers = [Generation(**answer) for answer in entry["answers"]]
        return cls(answers, entry["seconds"], entry["joules"])


@dataclass(eq=False)
class Method:
    """One way to answer prompts, and its answers so far, with the seconds and joules that they took."""

    kind: str
    algorithm: str | None
    block: int | None
    answer: Answering
    answers: dict[str, Generation] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    joules: float | None = 0.0

    def add(self, group: Sequence[Prompt], found: Measurement) -> None:
        """Add a group of prompts, whose time is shared out evenly."""
        for prompt, answer in zip(group, found.answers, strict=True):
            self.answers[prompt.id] = answer
            self.seconds[prompt.id] = found.seconds / len(group)
        known = self.joules is not None and found.joules is not None
        self.joules = self.joules + found.joules if known else None  # type: ignore[operator]


def rounds_of(answer: Generation) -> tuple[list[int], list[int], list[int]]:
    """(proposed, accepted, kept) of the rounds that kept something: one past a full budget did not."""
    rounds = [r for r in zip(answer.proposed, answer.accepted, answer.kept, strict=True) if r[2] > 0]
    return [r[0] for r in rounds], [r[1] for r in rounds], [r[2] for r in rounds]


def rows_of(
    target: Target, methods: Mapping[str, Method], prompts: Sequence[Prompt], sampling: Sampling
) -> list[dict[str, Any]]:
    """A row for each method (docs/results.md), with speed-ups against the faster plain one."""
    plain = [m for m in methods.values() if m.kind in ("plain", "generate")]
    base = max(plain, key=lambda m: _rate(m, prompts))
    by_domain = {d: [p for p in prompts if p.domain == d] for d in dict.fromkeys(p.domain for p in prompts)}
    rows = []
    for name, method in methods.items():
        overall = _summary(method, base, prompts)
        if method is not base:
            groups = [(_speed(method, some), _speed(base, some)) for some in by_domain.values()]
            mean = acceptance.mean_ratio_over_groups(groups, BOOTSTRAP_SEED)
            overall["speedup_mean_of_domains"] = mean and mean._asdict()
        compared = sampling.greedy and name != "plain"
        rows.append(
            {
                "method": name,
                "kind": method.kind,
                "algorithm": method.algorithm,
                "block": method.block,
                "baseline": method is base,
                "overall": overall,
                "domains": {d: _summary(method, base, some) for d, some in by_domain.items()},
                "lossless": _lossless(target, method, methods["plain"], prompts) if compared else None,
                "samples": _samples(target, method, prompts),
                "per_prompt": [_counts(method, prompt) for prompt in prompts],
            }
        )
    return rows


def _counts(method: Method, prompt: Prompt) -> dict[str, Any]:
    answer = method.answers[prompt.id]
    kept = rounds_of(answer)[2]
    return {
        "id": prompt.id,
        "domain": prompt.domain,
        "tokens": len(answer.token_ids),
        "rounds": len(kept),
        "kept": sum(kept),
        "seconds": method.seconds[prompt.id],
    }


def _speed(method: Method, prompts: Sequence[Prompt]) -> tuple[list[float], list[float]]:
    """(tokens, seconds) of each prompt."""
    tokens = [float(len(method.answers[p.id].token_ids)) for p in prompts]
    return tokens, [method.seconds[p.id] for p in prompts]


def _rate(method: Method, prompts: Sequence[Prompt]) -> float:
    """Tokens per second."""
    tokens, seconds = _speed(method, prompts)
    return sum(tokens) / max(sum(seconds), 1e-9)


def _summary(method: Method, base: Method, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """The figures of a method on some of the prompts."""
    written = [method.answers[p.id].token_ids for p in prompts]
    rounds = [rounds_of(method.answers[p.id]) for p in prompts]
    proposed, accepted, kept = ([r[i] for r in rounds] for i in range(3))
    speculative, block = method.block is not None, method.block or 0
    speedup = tau = None
    if method is not base:
        both = _speed(method, prompts), _speed(base, prompts)
        speedup = acceptance.paired_bootstrap_ratio(*both, BOOTSTRAP_SEED)
    if speculative:
        tau = acceptance.bootstrap_ratio([*map(sum, kept)], [*map(len, kept)], BOOTSTRAP_SEED)
    all_tokens = sum(len(a.token_ids) for a in method.answers.values())
    return {
        "prompts": len(prompts),
        "tokens": sum(map(len, written)),
        "rounds": sum(map(len, kept)) if speculative else None,
        "seconds": sum(method.seconds[p.id] for p in prompts),
        "tau": tau and tau._asdict(),
        "tau_per_prompt": [sum(k) / len(k) if k else None for k in kept] if speculative else [],
        "survival": acceptance.survival(accepted, proposed, block) if speculative else [],
        "conditional": acceptance.conditional(accepted, proposed, block) if speculative else [],
        "verify_rate": acceptance.verify_rate(accepted, proposed) if speculative else None,
        "tokens_per_s": _rate(method, prompts),
        "speedup": speedup and speedup._asdict(),
        "distinct_4": acceptance.distinct_share(written, 4),
        "repeated_8": acceptance.repeated_share(written, 8),
        "joules_per_token": method.joules / max(1, all_tokens) if method.joules else None,
    }


def _lossless(target: Target, method: Method, plain: Method, prompts: Sequence[Prompt]) -> dict[str, int]:
    """How many greedy answers equal plain decoding's, and how many differ first at a tie within rounding."""
    identical = ties = 0
    for prompt in prompts:
        ours, theirs = method.answers[prompt.id].token_ids, plain.answers[prompt.id].token_ids
        at, tie = first_difference(target, prompt, ours, theirs)
        identical, ties = identical + (at is None), ties + tie
    return {"identical": identical, "prompts": len(prompts), "near_ties": ties}


def first_difference(
    target: Target, prompt: Prompt, ours: Sequence[int], theirs: Sequence[int]
) -> tuple[int | None, bool]:
    """(the first token in which two greedy answers differ, whether their logits there are equal within the
    rounding of the target's number format); the first is None if the answers are the same."""
    if list(ours) == list(theirs):
        return None, False
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
    if at is None:  # one of them ends early
        return min(len(ours), len(theirs)), False
    ids = torch.tensor([[*prompt.ids, *theirs[:at]]])
    logits = target.logits(target.read(ids, ()).last_hidden[0, -1])
    one, other = logits[ours[at]], logits[theirs[at]]
    return at, bool((one - other).abs() <= rounding(one))


def rounding(logits: Tensor) -> Tensor:
    """By how much the same logits of two passes, of which one may have a cache or other rows, may differ."""
    return (4 * torch.finfo(logits.dtype).eps * logits.abs().float()).clamp_min(1e-3)


def _samples(target: Target, method: Method, prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
    """The first prompt of each domain, its answer cut into runs of tokens by who produced them."""
    if target.tokenizer is None:
        return []
    first = {prompt.domain: prompt for prompt in reversed(prompts)}
    samples = []
    for domain in dict.fromkeys(prompt.domain for prompt in prompts):
        runs = pieces_of(target.tokenizer, method.answers[first[domain].id])
        pieces = [{"text": text, "by": "draft" if drafted else "target"} for text, drafted in runs]
        samples.append({"domain": domain, "prompt": first[domain].text, "pieces": pieces})
    return samples
