"""Calibration: how sure a draft is next to how often its tokens are accepted, and temperatures that mend it.

N rounds, γ positions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepspec.data.identity import row_seed
from deepspec.decode.engine import Decoder, Generation, Request
from deepspec.drafts.base import NeuralDraft
from deepspec.errors import DataError, MismatchError
from deepspec.files import ResumableLog, plain, write_json
from deepspec.log import note, progress
from deepspec.maths import calibration as maths
from deepspec.maths.verify import Sampling
from deepspec.measure.evaluate import conditions_of, fingerprint, partial_path
from deepspec.measure.rows import Prompt
from deepspec.measure.traces import Tracing, traced
from deepspec.report.results import number
from deepspec.schedule.traces import write_traces
from deepspec.targets import Target

FORMAT = 1
LEAST_ROUNDS = 100
"""Temperatures cannot be fitted to fewer rounds."""
DEPTHS = (32, 128)
"""New tokens already in the answer, from which a round counts as deeper."""
INTERVAL_SEED = 21
CALIBRATE_AGAIN = "run `deepspec calibrate` for this draft again, or move the file away"


@dataclass(frozen=True, eq=False)
class Rounds:
    """Rounds of verification. logits: [N, γ] of confidences. accepted: [N] tokens. prompt: [N], the number of
    each round's prompt. depth: [N] new tokens in the answer before the round. domains: of each prompt."""

    logits: Tensor
    accepted: Tensor
    prompt: Tensor
    depth: Tensor
    domains: Sequence[str]

    def where(self, chosen: Tensor) -> Rounds:
        """The rounds for which `chosen` [N] is true."""
        logits, accepted = self.logits[chosen], self.accepted[chosen]
        return Rounds(logits, accepted, self.prompt[chosen], self.depth[chosen], self.domains)


def calibrate(
    target: Target,
    draft: NeuralDraft,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    thinking: bool = False,
    max_new_tokens: int = 128,
    seed: int = 0,
    batch: int = 8,
    out: Path | None = None,
    traces: Path | None = None,
) -> dict[str, Any]:
    """Decode the prompts with the draft, fit a temperature per position, and report errors before and after.

    The errors after scaling are those of temperatures fitted without the domain that they are reported for
    or, with a single domain, without that half of its prompts. out: the report is written there, and every
    batch of prompts is kept until then, so that the same call continues after a kill. traces: rounds are made
    at every position of the answers, and are written there, too. Raises DataError if the prompts give fewer
    than `LEAST_ROUNDS` rounds.
    """
    draft.scored = True
    stops = target.stop_token_ids
    requests = [Request(p.ids, max_new_tokens, row_seed(seed, p.id), p.id, sampling, stops) for p in prompts]
    conditions = {
        "target": target.spec.name,
        "target_hash": target.spec.config_hash,
        "draft_hash": fingerprint(draft),
        **conditions_of(target, prompts, thinking).record(),
        **asdict(sampling),
        "prompts": len(prompts),
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        "batch": batch,
    }
    if traces is not None:
        conditions["rounds"] = "at every position"
    facts = conditions | {"prompt ids": [p.id for p in prompts], "dtype": str(target.dtype)}
    with nullcontext() if out is None else ResumableLog(partial_path(out), facts, header=True) as log:
        kind = Decoder if traces is None else Tracing
        answers = _decoded(lambda rows: kind(target, draft, max_rows=rows), requests, batch, log)
    if traces is not None:
        known = {"block": draft.max_proposals, "context_length": target.max_length}
        write_traces(traces, conditions | known, traced(answers, prompts, draft.max_proposals))
    rounds = rounds_of(answers, prompts, draft.max_proposals)
    if len(rounds.accepted) < LEAST_ROUNDS:
        raise DataError(
            f"{len(prompts)} prompts give {len(rounds.accepted)} rounds of verification, too few to fit "
            f"temperatures to",
            next_step=f"give more prompts or a larger --max-new-tokens, for at least {LEAST_ROUNDS} rounds",
        )
    if len(rounds.prompt.unique()) == 1:
        raise DataError(
            "all rounds are of one prompt, so that temperatures cannot be tested on another",
            next_step="give more prompts",
        )
    report: dict[str, Any] = plain(
        {
            "format": FORMAT,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "draft": draft.name,
            "score": "confidence head" if draft.spec.confidence else "log-odds of the likeliest token",
            "conditions": conditions,
            **report_of(rounds),
        }
    )
    if out is not None:
        write_json(out, report)
        partial_path(out).unlink(missing_ok=True)
    return report


def _decoded(
    decoder: Callable[[int], Decoder], requests: Sequence[Request], batch: int, log: ResumableLog | None
) -> list[Generation]:
    """The answer to each prompt, group by group, so that who shares a batch does not depend on a kill."""
    groups = [requests[i : i + batch] for i in range(0, len(requests), batch)]
    done = {} if log is None else {line["group"]: line["answers"] for _, line in log.records()}
    if done:
        note(f"{len(done)} of {len(groups)} groups of prompts were answered before; continuing with the rest")
    answers = []
    with progress("calibrating", len(requests)) as bar:
        for i, group in enumerate(groups):
            found = {answer["key"]: Generation(**answer) for answer in done.get(i, [])}
            if not found:
                found = {answer.key: answer for answer in decoder(len(group)).run(group)}
                if log is not None:
                    log.write({"group": i, "answers": [asdict(answer) for answer in found.values()]})
                    log.sync()
            answers += [found[request.key] for request in group]
            bar.update(len(group))
    return answers


def rounds_of(answers: Sequence[Generation], prompts: Sequence[Prompt], block: int) -> Rounds:
    """Every round that kept something, in the order of the prompts."""
    logits, accepted, prompt, depth = [], [], [], []
    for number_, answer in enumerate(answers):
        length = 1  # the first new token comes from the prefill
        for confidence, count, kept in zip(answer.confidence, answer.accepted, answer.kept, strict=True):
            if kept and len(confidence) == block:  # not cut where the target's context ends
                logits.append(confidence)
                accepted.append(count)
                prompt.append(number_)
                depth.append(length)
            length += kept
    return Rounds(
        torch.tensor(logits, dtype=torch.float64).view(-1, block),
        torch.tensor(accepted, dtype=torch.long),
        torch.tensor(prompt, dtype=torch.long),
        torch.tensor(depth, dtype=torch.long),
        [p.domain for p in prompts],
    )


def report_of(rounds: Rounds) -> dict[str, Any]:
    """Temperatures of all rounds, and errors by position, held-out domain and depth, before and after.

    Each part is fitted on what it is not measured on. The error is that of the survival (ECE).
    """
    parts = _parts(rounds)
    held_out = {}
    unseen = torch.zeros_like(rounds.logits)
    for name, chosen in parts.items():
        temperatures = maths.fit_temperatures(rounds.logits[~chosen], rounds.accepted[~chosen])
        unseen[chosen] = rounds.logits[chosen] / temperatures
        held_out[name] = _errors(rounds.where(chosen), unseen[chosen])
    deeper = torch.bucketize(rounds.depth, torch.tensor(DEPTHS), right=True)
    names = [f"below {DEPTHS[0]} tokens", f"{DEPTHS[0]} to {DEPTHS[1] - 1}", f"{DEPTHS[1]} and more"]
    depths = {
        name: _errors(rounds.where(deeper == i), unseen[deeper == i])
        for i, name in enumerate(names)
        if bool((deeper == i).any())
    }
    block = rounds.logits.shape[1]
    outcomes = maths.survived(rounds.accepted, block)
    before, after = maths.survivals(rounds.logits), maths.survivals(unseen)
    positions = []
    for k in range(block):
        reached = rounds.accepted >= k
        both = {"before": before[:, k], "after": after[:, k]}
        positions.append(
            {
                "position": k + 1,
                "reached": int(reached.sum()),
                "accepted": float(outcomes[reached, k].double().mean()) if bool(reached.any()) else None,
                "ece": {name: float(_sums(p, outcomes[:, k]).squeeze()) for name, p in both.items()},
                "brier": {name: maths.brier(p, outcomes[:, k]) for name, p in both.items()},
                "auc": maths.auc(rounds.logits[reached, k], outcomes[reached, k]),
                "reliability": {
                    name: maths.binned(p, outcomes[:, k])[0].tolist() for name, p in both.items()
                },
            }
        )
    return {
        "block": block,
        "rounds": len(rounds.accepted),
        "temperatures": maths.fit_temperatures(rounds.logits, rounds.accepted).tolist(),
        "overall": _errors(rounds, unseen),
        "positions": positions,
        "held_out": held_out,
        "depth": depths,
    }


def _sums(probabilities: Tensor, outcomes: Tensor) -> Tensor:
    return maths.calibration_error(maths.binned(probabilities, outcomes))


def _parts(rounds: Rounds) -> dict[str, Tensor]:
    """[N] masks of the parts that are held out in turn: the domains, or halves of a single one."""
    domains = [rounds.domains[i] for i in rounds.prompt.tolist()]
    names = list(dict.fromkeys(domains))
    if len(names) > 1:
        return {name: torch.tensor([domain == name for domain in domains]) for name in names}
    order = rounds.prompt.unique(return_inverse=True)[1]  # some prompts may have no rounds
    return {f"{names[0]}, half {half + 1}": order % 2 == half for half in range(2)}


def _errors(rounds: Rounds, scaled: Tensor) -> dict[str, Any]:
    """Mean calibration error over the positions, before and after, each with its interval over prompts.

    `noise`: the error that rounds as few as these would show if the scaled confidences were the truth.
    """
    found: dict[str, Any] = {"rounds": len(rounds.accepted), "noise": maths.noise(scaled, INTERVAL_SEED)}
    outcomes = maths.survived(rounds.accepted, rounds.logits.shape[1])
    prompts = rounds.prompt.unique(return_inverse=True)[1]
    for name, logits in (("before", rounds.logits), ("after", scaled)):
        columns = zip(maths.survivals(logits).unbind(1), outcomes.unbind(1), strict=True)
        sums = torch.stack([maths.binned(p, y, prompts) for p, y in columns], dim=1)
        low, high = maths.bootstrapped_error(sums, INTERVAL_SEED)
        value = float(maths.calibration_error(sums.sum(0)).mean())
        found[name] = {"value": value, "low": low, "high": high}
    return found


def temperatures_of(path: Path, draft: NeuralDraft) -> list[float]:
    """The temperatures in a report of `calibrate`. Raises DataError for another file, MismatchError if they
    were fitted to other weights."""
    return temperatures_for(path, fingerprint(draft), draft.max_proposals, draft.name)


def temperatures_for(path: Path, draft_hash: str | None, block: int, name: str) -> list[float]:
    """As `temperatures_of`, for a draft of which the hash and γ are known."""
    try:
        report = json.loads(path.read_text("utf-8"))
        found, made_for = [float(t) for t in report["temperatures"]], report["conditions"]["draft_hash"]
        if report["format"] != FORMAT or not all(0 < t < math.inf for t in found):
            raise ValueError
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(
            "this is not a report of `deepspec calibrate`", where=str(path), next_step=CALIBRATE_AGAIN
        ) from error
    if made_for != draft_hash or len(found) != block:
        raise MismatchError(
            f"these temperatures are not for {name} as it is now: its weights or its number format "
            "(--dtype) have changed",
            where=str(path),
            next_step=CALIBRATE_AGAIN,
        )
    return found


def sglang_table(report: Mapping[str, Any], dataset: str) -> dict[str, Any]:
    """The report's temperatures as the file that SGLang reads (--speculative-dspark-confidence-sts-path)."""
    return {
        "temperatures": report["temperatures"],
        "dataset": dataset,
        "num_samples": report["rounds"],
        "ece_before": [row["ece"]["before"] for row in report["positions"]],
        "ece_after": [row["ece"]["after"] for row in report["positions"]],
    }


def interval(figures: Mapping[str, float]) -> str:
    """Such as "3.1% (2.4–4.0)"."""
    value, low, high = (number(100 * figures[name], 1) for name in ("value", "low", "high"))
    return f"{value}% ({low}–{high})"
