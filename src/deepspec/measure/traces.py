"""Traces -> rows: what each method wrote on the same prompts, and how fast, as the rows of a results file.

Speed-ups and their intervals are paired over prompts; greedy answers are compared with plain decoding's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from deepspec.decode.engine import Generation
from deepspec.decode.text import pieces_of
from deepspec.maths import acceptance
from deepspec.maths.acceptance import Interval
from deepspec.maths.verify import Sampling
from deepspec.targets import Target

BOOTSTRAP_SEED = 20
TIE = 1e-3


@dataclass(frozen=True)
class Prompt:
    """One task: token ids in the target's own template."""

    id: str
    domain: str
    text: str
    ids: tuple[int, ...]
    system: str | None = None
    """Hash of its system prompt."""


@dataclass(eq=False)
class Trace:
    """One method on all prompts: what it wrote, in how many seconds, for how many joules."""

    kind: str
    algorithm: str | None
    block: int | None
    answers: dict[str, Generation] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    joules: float | None = 0.0

    def add(self, group: Sequence[Prompt], taken: Taken) -> None:
        """Take in a group of prompts, whose time is shared out evenly."""
        for prompt, answer in zip(group, taken.answers, strict=True):
            self.answers[prompt.id] = answer
            self.seconds[prompt.id] = taken.seconds / len(group)
        if self.joules is None or taken.joules is None:
            self.joules = None
        else:
            self.joules += taken.joules


@dataclass
class Taken:
    """What a method wrote for one group of prompts, and took. Joules are None without a meter."""

    answers: list[Generation]
    seconds: float
    joules: float | None

    @classmethod
    def kept(cls, entry: Mapping[str, Any]) -> Taken:
        """The inverse of `asdict`."""
        answers = [Generation(**answer) for answer in entry["answers"]]
        return cls(answers, entry["seconds"], entry["joules"])


def rounds_of(answer: Generation) -> tuple[list[int], list[int], list[int]]:
    """(proposed, accepted, kept) of the rounds that kept something: one past a full budget did not."""
    rounds = [r for r in zip(answer.proposed, answer.accepted, answer.kept, strict=True) if r[2] > 0]
    return [r[0] for r in rounds], [r[1] for r in rounds], [r[2] for r in rounds]


def rows_of(
    target: Target, traces: Mapping[str, Trace], prompts: Sequence[Prompt], sampling: Sampling
) -> list[dict[str, Any]]:
    """A row for each method (docs/results.md), with speed-ups against the faster plain one."""
    plains = [t for t in traces.values() if t.kind in ("plain", "generate")]
    base = max(plains, key=lambda t: _rate(t, prompts))
    domains = list(dict.fromkeys(p.domain for p in prompts))
    rows = []
    for name, trace in traces.items():
        overall = _summary(trace, base, prompts)
        by_domain = {d: [p for p in prompts if p.domain == d] for d in domains}
        groups = [(_speed(trace, some), _speed(base, some)) for some in by_domain.values()]
        if trace is not base:
            mean = acceptance.mean_ratio_over_groups(groups, BOOTSTRAP_SEED)
            overall["speedup_mean_of_domains"] = _interval(mean)
        lossless = None
        if sampling.greedy and trace is not traces["plain"]:
            lossless = _lossless(target, trace, traces["plain"], prompts)
        rows.append(
            {
                "method": name,
                "kind": trace.kind,
                "algorithm": trace.algorithm,
                "block": trace.block,
                "baseline": trace is base,
                "overall": overall,
                "domains": {d: _summary(trace, base, some) for d, some in by_domain.items()},
                "lossless": lossless,
                "samples": _samples(target, trace, prompts),
                "per_prompt": [
                    {
                        "id": p.id,
                        "domain": p.domain,
                        "tokens": len(trace.answers[p.id].token_ids),
                        "rounds": len(rounds_of(trace.answers[p.id])[2]),
                        "kept": sum(rounds_of(trace.answers[p.id])[2]),
                        "seconds": trace.seconds[p.id],
                    }
                    for p in prompts
                ],
            }
        )
    return rows


def _speed(trace: Trace, prompts: Sequence[Prompt]) -> tuple[list[float], list[float]]:
    tokens = [float(len(trace.answers[p.id].token_ids)) for p in prompts]
    return tokens, [trace.seconds[p.id] for p in prompts]


def _rate(trace: Trace, prompts: Sequence[Prompt]) -> float:
    tokens, seconds = _speed(trace, prompts)
    return sum(tokens) / max(sum(seconds), 1e-9)


def _summary(trace: Trace, base: Trace, prompts: Sequence[Prompt]) -> dict[str, Any]:
    answers = [trace.answers[p.id] for p in prompts]
    rounds = [rounds_of(a) for a in answers]
    proposed, accepted, kept = ([r[i] for r in rounds] for i in range(3))
    speculative = trace.block is not None
    written = [a.token_ids for a in answers]
    tokens = sum(map(len, written))
    speedup = None
    if trace is not base:
        speedup = acceptance.paired_bootstrap_ratio(
            _speed(trace, prompts), _speed(base, prompts), BOOTSTRAP_SEED
        )
    tau = None
    if speculative:
        tau = acceptance.bootstrap_ratio(
            [float(sum(k)) for k in kept], [float(len(k)) for k in kept], BOOTSTRAP_SEED
        )
    block = trace.block or 0
    return {
        "prompts": len(prompts),
        "tokens": tokens,
        "rounds": sum(map(len, kept)) if speculative else None,
        "seconds": sum(trace.seconds[p.id] for p in prompts),
        "tau": _interval(tau),
        "tau_per_prompt": [sum(k) / len(k) if k else None for k in kept] if speculative else [],
        "survival": acceptance.survival(accepted, proposed, block) if speculative else [],
        "conditional": acceptance.conditional(accepted, proposed, block) if speculative else [],
        "verify_rate": acceptance.verify_rate(accepted, proposed) if speculative else None,
        "tokens_per_s": _rate(trace, prompts),
        "speedup": _interval(speedup),
        "distinct_4": acceptance.distinct_share(written, 4),
        "repeated_8": acceptance.repeated_share(written, 8),
        "joules_per_token": None if not trace.joules else trace.joules / max(1, _all_tokens(trace)),
    }


def _all_tokens(trace: Trace) -> int:
    return sum(len(a.token_ids) for a in trace.answers.values())


def _interval(found: Interval | None) -> dict[str, float] | None:
    return None if found is None else {"value": found.value, "low": found.low, "high": found.high}


def _lossless(target: Target, trace: Trace, plain: Trace, prompts: Sequence[Prompt]) -> dict[str, int]:
    """Prompts whose greedy answer equals plain decoding's, and those that part at a tie within rounding."""
    identical = ties = 0
    for prompt in prompts:
        ours, theirs = trace.answers[prompt.id].token_ids, plain.answers[prompt.id].token_ids
        if ours == theirs:
            identical += 1
            continue
        at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
        if at is None:
            continue
        ids = torch.tensor([[*prompt.ids, *theirs[:at]]])
        logits = target.logits(target.read(ids, ()).last_hidden[0, -1]).float()
        ties += abs(float(logits[ours[at]] - logits[theirs[at]])) < TIE
    return {"identical": identical, "prompts": len(prompts), "near_ties": ties}


def _samples(target: Target, trace: Trace, prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
    """The first prompt of each domain, its answer cut into runs of tokens by who produced them."""
    if target.tokenizer is None:
        return []
    samples = []
    for domain in dict.fromkeys(p.domain for p in prompts):
        prompt = next(p for p in prompts if p.domain == domain)
        answer = trace.answers[prompt.id]
        pieces = [
            {"text": text, "by": "draft" if drafted else "target"}
            for text, drafted in pieces_of(target.tokenizer, answer)
        ]
        samples.append({"domain": domain, "prompt": prompt.text, "pieces": pieces})
    return samples
