"""How much of a draft is accepted, from whatever knows it: an evaluation, a server's counters, a publication.

γ proposals per round; survival [γ]: the share of rounds in which proposals 1 to k were all accepted.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from deepspec.errors import DataError, MismatchError
from deepspec.report.results import is_number, read_results, rows_of

PUBLISHED: dict[str, Any] = yaml.safe_load(
    Path(__file__).with_name("published_acceptance.yaml").read_text(encoding="utf-8")
)
"""Published accepted lengths: their source, and by target and algorithm one for each domain."""
RESAMPLES, SEED = 2000, 22


@dataclass(frozen=True)
class Acceptance:
    """What of a draft's proposals is accepted. source: a sentence.

    low, high: the ends of the interval of accepted proposals, as shares of their mean; 1 and 1 if only sums
    are known. lost: tokens per answer that were accepted and cut off at its end.
    """

    survival: tuple[float, ...]
    source: str
    low: float = 1.0
    high: float = 1.0
    lost: float = 0.0

    def accepted(self, length: int) -> float:
        """Proposals accepted per round, on average, of the first `length`."""
        return sum(self.survival[:length])

    @property
    def tau(self) -> float:
        return 1 + self.accepted(len(self.survival))


def from_results(
    path: Path, draft: str, *, block: int, target_hash: str | None = None, temperature: float | None = None
) -> Acceptance:
    """The acceptance of a draft in a results file of `deepspec eval`.

    draft: its name there; the only one, if no row has the name. temperature: of several in one file. Raises
    DataError for a file without such a row or without rounds, MismatchError for another target or γ, or if a
    policy decided what was verified.
    """
    where, again = str(path), "give results of `deepspec eval` of this draft, or leave --results out"
    found = read_results(path)
    wanted = [r for r in found if temperature is None or r["conditions"].get("temperature") == temperature]
    if len(wanted) != 1:
        raise DataError(
            f"the file has {len(wanted)} results{'' if temperature is None else f' at T={temperature:g}'}",
            where=where,
            next_step="choose one with --temperature",
        )
    conditions = wanted[0]["conditions"]
    if target_hash is not None and conditions.get("target_hash") != target_hash:
        raise MismatchError(
            f"these results are of another target ({conditions.get('target')})", where=where, next_step=again
        )
    if (policy := conditions.get("policy", "all")) != "all":
        raise MismatchError(
            f"these results are under the policy {policy!r}: what it left unverified counts as not accepted",
            where=where,
            next_step="evaluate the draft without --policy",
        )
    drafts = [row for row in rows_of(wanted[0]) if row.get("kind") == "draft"]
    named = [row for row in drafts if row["method"] == draft] or drafts
    if len(named) != 1:
        names = ", ".join(row["method"] for row in drafts) or "none"
        raise DataError(
            f"the results are of other drafts than {draft}: {names}", where=where, next_step=again
        )
    row, overall = named[0], named[0]["overall"]
    if row["block"] != block:
        raise MismatchError(
            f"{row['method']} proposed {row['block']} tokens per round, and this draft proposes {block}",
            where=where,
            next_step=again,
        )
    survival, tau, rounds = overall.get("survival") or [], overall.get("tau") or {}, overall.get("rounds")
    if not rounds or not all(map(is_number, survival)) or not is_number(tau.get("value")):
        raise DataError("the draft has no rounds of verification in this file", where=where, next_step=again)
    kept, answers, gain = tau["value"] * rounds, overall["prompts"], tau["value"] - 1
    ends = ((tau[end] - 1) / gain if gain > 0 and is_number(tau.get(end)) else 1.0 for end in ("low", "high"))
    source = f"{row['method']} on {answers} prompts at T={conditions['temperature']:g}"
    lost = max(rounds * (1 + sum(survival)) - kept, 0.0) / answers
    return Acceptance(tuple(survival), source, next(ends), next(ends), lost)


def from_counters(text: str, where: str, block: int | None = None) -> Acceptance:
    """The acceptance that a server counted: the text of vLLM's /metrics, or SGLang's answers (JSON, or one
    per line) with their `meta_info`. Raises DataError if it has no rounds, MismatchError for another γ."""
    counted = _vllm(text) if "vllm:spec_decode" in text else _sglang(text)
    if counted is None:
        raise DataError(
            "there are no counts of speculative decoding here: neither vLLM's vllm:spec_decode_… with rounds "
            "nor SGLang's meta_info with spec_verify_ct",
            where=where,
            next_step="give the text of /metrics after some requests, or SGLang's answers to /generate",
        )
    if block is not None and len(counted.survival) != block:
        raise MismatchError(
            f"the server verified {len(counted.survival)} proposals per round, not the draft's {block}",
            where=where,
            next_step="give the counters of a server that runs this draft with all its proposals",
        )
    return counted


def _vllm(text: str) -> Acceptance | None:
    """Sums over all engines of vLLM's counters; None before their first round."""
    totals: dict[str, float] = defaultdict(float)
    positions: dict[int, float] = defaultdict(float)
    for name, labels, value in re.findall(r"^vllm:spec_decode_(\w+?)(?:_total)?(\{.*\})? (\S+)$", text, re.M):
        totals[name] += float(value)
        if name == "num_accepted_tokens_per_pos":
            at = re.search(r'position="(\d+)"', labels)
            positions[int(at[1]) if at else 0] += float(value)
    rounds = totals["num_drafts"]
    if not rounds or not positions:
        return None
    survival = tuple(positions[k] / rounds for k in range(max(positions) + 1))
    return Acceptance(survival, f"vLLM's counters over {rounds:,.0f} rounds")


def _sglang(text: str) -> Acceptance | None:
    """Each answer's histogram says how many of its rounds accepted 0, 1, … proposals."""
    histograms = []
    for piece in [text, *text.splitlines()]:
        try:
            found = json.loads(piece)
        except ValueError:
            continue
        for answer in found if isinstance(found, list) else [found]:
            info = answer.get("meta_info", answer) if isinstance(answer, dict) else {}
            histogram = info.get("spec_correct_drafts_histogram") if isinstance(info, dict) else None
            if isinstance(histogram, list) and histogram and all(map(is_number, histogram)):
                histograms.append(histogram)
        if histograms and piece is text:
            break
    if not histograms:
        return None
    block = max(map(len, histograms)) - 1
    counts = np.array([[*h, *[0] * (block + 1 - len(h))] for h in histograms], float)
    rounds = counts.sum()
    if not rounds or block < 1:
        return None
    survival = counts.sum(0)[::-1].cumsum()[::-1][1:] / rounds
    accepted = counts @ np.arange(block + 1)
    picks = np.random.default_rng(SEED).integers(0, len(counts), (RESAMPLES, len(counts)))
    means = accepted[picks].sum(1) / np.maximum(counts.sum(1)[picks].sum(1), 1)
    low, high = np.quantile(means, (0.025, 0.975)) / max(accepted.sum() / rounds, 1e-9)
    return Acceptance(
        tuple(survival.tolist()), f"SGLang's counts of {len(counts)} answers", float(low), float(high)
    )


def published(target: str, algorithm: str, domains: Sequence[str] = ()) -> Acceptance:
    """The published acceptance of an algorithm's draft for a target: the mean of domains, and as its interval
    their extremes. Only τ is published; all positions are taken to be equally likely after those before.

    Raises DataError for what is not published.
    """
    known: Mapping[str, Any] = PUBLISHED["tau"].get(target, {})
    other = [d for d in domains if d not in PUBLISHED["domains"]]
    if algorithm not in known or other:
        raise DataError(
            f"no acceptance is published for {other[0] if other else f'{algorithm} on {target}'}",
            next_step=f"measure it with `deepspec eval` and add --results; published domains: "
            f"{', '.join(PUBLISHED['domains'])}, targets: {', '.join(PUBLISHED['tau'])}",
        )
    lengths = dict(zip(PUBLISHED["domains"], known[algorithm], strict=True))
    chosen = [lengths[d] for d in domains or lengths]
    mean = sum(chosen) / len(chosen)
    of = ", ".join(domains) or f"mean of {len(lengths)} domains"
    source = f"published ({PUBLISHED['source']}, T=1, {of}), taken to be alike at all positions"
    low, high = ((end - 1) / (mean - 1) for end in (min(chosen), max(chosen)))
    return Acceptance(flat(mean, PUBLISHED["block"]), source, low, high)


def flat(tau: float, block: int) -> tuple[float, ...]:
    """Survivals c, c², … of γ = `block` positions that give the accepted length τ = 1 + Σ c^k."""
    low, high = 0.0, 1.0
    for _ in range(60):
        c = (low + high) / 2
        low, high = (c, high) if 1 + sum(c**k for k in range(1, block + 1)) < tau else (low, c)
    return tuple(low**k for k in range(1, block + 1))


def thresholds(report: Mapping[str, Any]) -> list[tuple[float, float]]:
    """(proposals verified, proposals accepted) per row and round, if those are verified whose calibrated
    survival is above a threshold, for falling thresholds; from the bins of a report of `calibrate`.

    Survival falls along a row, so a threshold cuts each row once, and the positions' bins are all it takes.
    """
    bins = np.array([position["reliability"]["after"] for position in report["positions"]], float)
    verified, accepted = (bins[..., i][:, ::-1].cumsum(1).sum(0) / report["rounds"] for i in (0, 2))
    return list(zip(verified.tolist(), accepted.tolist(), strict=True))


def read_calibration(path: Path, draft_hash: str | None, block: int) -> dict[str, Any]:
    """A report of `deepspec calibrate`. Raises DataError for another file, MismatchError for a draft of
    another hash or γ."""
    try:
        report = json.loads(path.read_text("utf-8"))
        if not report["rounds"] > 0 or not thresholds(report):
            raise ValueError
        made_for = report["conditions"]["draft_hash"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError("this is not a report of `deepspec calibrate`", where=str(path)) from error
    if report["block"] != block or (draft_hash is not None and made_for != draft_hash):
        raise MismatchError(
            f"this calibration is of another draft ({report['draft']}, {report['block']} proposals) than "
            "the step costs, or of other weights",
            where=str(path),
            next_step="run `deepspec calibrate` for this draft again",
        )
    return dict(report)
