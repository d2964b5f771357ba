"""docs/objectives.md from the results of benchmarks/objectives.py, which says how they were measured.

S seeds, P prompts, R resamples.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from real_page import table

PAGE = Path(__file__).parents[1] / "docs" / "objectives.md"
RESULTS = Path(__file__).with_name("objectives.json")
"""The results that the page shows."""
TITLES = {"dspark": "DSpark", "dflash": "DFlash", "eagle3": "Eagle-3"}
PUBLISHED = {"dspark": "ce + l1", "dflash": "ce", "eagle3": "ce"}
"""Each draft's published terms, which others are compared with; DSpark's in the pocket's proportion."""
RECIPES = {"dspark": "lk_alpha", "dflash": "ce", "eagle3": "ce + l1, survival"}
"""Each draft's objective in the pocket and small recipes: what beat the published one in every domain."""
LEFT_OUT = {("eagle3", "kl"), ("eagle3", "dpace")}
"""Drafts that have no such objective: Eagle-3's `ce` is its `kl`, and it learns no labels."""
SETTINGS = {
    "ce": "`loss.ce=1`",
    "ce + l1": "`loss.ce=1 loss.l1=0.9`",
    "l1": "`loss.ce=0 loss.l1=1`",
    "kl": "`loss.ce=0 loss.kl=1`",
    "reverse_kl": "`loss.ce=0 loss.reverse_kl=1`",
    "lk_alpha": "`loss.ce=0 loss.lk_alpha=1`",
    "lk_lambda": "`loss.ce=0 loss.lk_lambda=1`",
    "dpace": "`loss.ce=1 loss.positions=dpace`",
    "l1, survival": "`loss.ce=0 loss.l1=1 loss.positions=survival`",
    "ce + l1, survival": "`loss.ce=1 loss.l1=0.9 loss.positions=survival`",
}
RESAMPLES = 2000
SEEDS = 3
"""Fewest seeds on which a recipe's objective is changed."""
OPENING = """# Objectives

Which loss trains the best draft? Here every objective trains every draft on the pocket target for the same
processor time. `python benchmarks/objectives.py` did it and wrote this page; [recipes](recipes.md#the-loss)
explains the keys.
"""


class Interval(NamedTuple):
    value: float
    low: float
    high: float


class Counts:
    """Tokens kept and rounds [S, P, 2] of one draft's objectives, on the same seeds and prompts."""

    def __init__(self, results: dict[str, Any], algorithm: str) -> None:
        runs = [run for run in results["runs"] if run["algorithm"] == algorithm]
        self.seeds = sorted({run["seed"] for run in runs})
        self.prompts = [*results["domains"]]
        self.domains = [*results["domains"].values()]
        self.runs = {(run["objective"], run["seed"]): run for run in runs}
        self.objectives = [o for o in SETTINGS if (o, self.seeds[0]) in self.runs] if runs else []

    def table(self, objective: str) -> Tensor:
        counts = (self.runs[objective, seed]["counts"] for seed in self.seeds)
        return torch.tensor([[each[p] for p in self.prompts] for each in counts], dtype=torch.float64)

    def tau(self, objective: str, domain: str | None = None) -> Tensor:
        """[1 + R]: τ, and τ of every resample. Seeds and prompts are drawn with replacement, each on their
        own; all objectives see the same draws, so that differences are paired."""
        some = [i for i, name in enumerate(self.domains) if domain in (None, name)]
        random = torch.Generator().manual_seed(0)
        seeds, prompts = (_draws(size, random) for size in (len(self.seeds), len(some)))
        sums = torch.einsum("rs,spk,rp->rk", seeds, self.table(objective)[:, some], prompts)
        return sums[:, 0] / sums[:, 1]

    def difference(self, objective: str, default: str, domain: str | None = None) -> Interval:
        return interval(self.tau(objective, domain) - self.tau(default, domain))


def _draws(size: int, random: torch.Generator) -> Tensor:
    """[1 + R, size]: how often each of `size` things is drawn; the first row has each of them once."""
    drawn = torch.randint(size, (RESAMPLES, size), generator=random)
    counts = torch.zeros(RESAMPLES, size, dtype=torch.float64)
    counts.scatter_add_(1, drawn, torch.ones_like(counts))
    return torch.cat([torch.ones(1, size, dtype=torch.float64), counts])


def interval(figures: Tensor) -> Interval:
    low, high = figures[1:].quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(float(figures[0]), low, high)


def shown(found: Interval, sign: str = "") -> str:
    return f"{found.value:{sign}.2f} [{found.low:{sign}.2f}, {found.high:{sign}.2f}]".replace("-", "−")


def wrapped(text: str) -> str:
    return textwrap.fill(text, 118, break_on_hyphens=False, break_long_words=False)


def page(results: dict[str, Any]) -> str:
    """The page. Every figure is in `results`."""
    found = {algorithm: Counts(results, algorithm) for algorithm in TITLES}
    found = {algorithm: counts for algorithm, counts in found.items() if counts.objectives}
    parts = [how(results, found), overall(found), by_domain(found), verdict(found), costs(results)]
    return OPENING + "\n".join(line for part in [*parts, overtrained(results)] for line in part) + "\n"


def how(results: dict[str, Any], found: dict[str, Counts]) -> Iterator[str]:
    spent = median(run["processor_seconds"] for run in results["runs"])
    seeds = "; ".join(f"{TITLES[a]} {len(counts.seeds)}" for a, counts in found.items())
    yield ""
    yield wrapped(
        f"Each run has {results['seconds']:g} processor seconds of training, as many steps as fit in at the "
        f"measured price of its objective, on one thread (with loading and saving, the median run took "
        f"{spent:.0f}). All start from the same weights (`draft.init=target`) and learn the same cached "
        "features of 900 answers. τ (tokens per round, the target's own included) is measured at T=1 on the "
        f"{len(results['domains'])} prompts of `pocket:test`. Seeds: {seeds}. Intervals are 95% of a "
        "bootstrap over prompts and seeds; differences are paired, and a single seed has no spread of its "
        "own. These are drafts in their first minute: what leads here need not lead after ten epochs of a "
        "million answers."
    )
    yield ""
    yield wrapped(
        "`l1` is the full L1 norm, sum |p − t|, as in the published recipe, 0.9 of which is the weight of "
        "1.8 on the total variation of toolkits that take half of it: losses are not comparable between "
        "toolkits. Eagle-3's `ce` is the cross-entropy with the target's distribution, which is `kl`, and it "
        "learns no labels, so it has no `dpace`. The weight of DSpark's confidence loss is 1 throughout."
    )
    yield ""
    yield "## Accepted length"


def overall(found: dict[str, Counts]) -> Iterator[str]:
    rows = []
    for objective, setting in SETTINGS.items():
        cells = []
        for algorithm, counts in found.items():
            if objective not in counts.objectives:
                cells += ["–" if (algorithm, objective) in LEFT_OUT else "not run", "–"]
                continue
            default = objective == RECIPES[algorithm]
            each = shown(interval(counts.tau(objective)))
            cells += [f"**{each}**" if default else each]
            cells += [counts.runs[objective, counts.seeds[0]]["steps"]]
        rows.append([objective, setting, *cells])
    heads = [head for algorithm in found for head in (f"{TITLES[algorithm]}, τ", "steps")]
    yield from table(["objective", "keys", *heads], rows)
    yield "In bold: the objective of the draft's pocket and small recipes."


def by_domain(found: dict[str, Counts]) -> Iterator[str]:
    yield ""
    yield "## Against the published objective, by domain"
    for algorithm, counts in found.items():
        domains, default = sorted(set(counts.domains)), PUBLISHED[algorithm]
        yield ""
        yield f"{TITLES[algorithm]}, difference in τ to `{default}`:"
        rows = []
        for objective in counts.objectives:
            if objective != default:
                differences = [counts.difference(objective, default, d) for d in [*domains, None]]
                rows.append([objective, *(shown(each, "+") for each in differences)])
        yield from table(["objective", *domains, "all"], rows)


def verdict(found: dict[str, Counts]) -> Iterator[str]:
    yield "## Verdict"
    yield ""
    for algorithm, counts in found.items():
        default, domains = PUBLISHED[algorithm], sorted(set(counts.domains))
        lows = {o: min(counts.difference(o, default, d).low for d in domains) for o in counts.objectives}
        winners = [o for o in counts.objectives if o != default and lows[o] > 0]
        better = [o for o in counts.objectives if o != default and counts.difference(o, default).low > 0]
        worse = [o for o in counts.objectives if counts.difference(o, default).high < 0]
        best = max(counts.objectives, key=lambda o: float(counts.tau(o)[0]))
        said = f"{TITLES[algorithm]}: `{best}` has the highest τ. "
        said += (
            f"On all three domains, with intervals above zero, {_listed(winners)} "
            f"beat{'s' * (len(winners) == 1)} `{default}`."
            if winners
            else f"No objective beats `{default}` on all three domains with intervals above zero."
        )
        said += f" Over all prompts, better beyond the interval: {_listed(better)}; worse: {_listed(worse)}."
        if len(counts.seeds) < SEEDS:
            said += f" {len(counts.seeds)} of {SEEDS} seeds decide nothing."
        elif RECIPES[algorithm] in winners:
            said += f" The pocket and small recipes of {TITLES[algorithm]} train with `{RECIPES[algorithm]}`."
        yield wrapped(said)
        yield ""


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "none"


def costs(results: dict[str, Any]) -> Iterator[str]:
    yield "## What a step costs"
    yield ""
    yield wrapped(
        "Processor time of a step on a busy machine (repeated, it varies by about a tenth), relative to `ce` "
        "on the same batches. Weights by position follow from acceptance or from the label's probability, "
        "which the step has anyway; rows are scaled after their gradients are formed, so nothing as wide as "
        "the vocabulary is computed twice. With DSpark's sequential head, whose gradient adds rows up, a "
        "position of the target that several rows learn from is computed for each of them."
    )
    found = results["step_seconds"]
    rows = []
    for objective in SETTINGS:
        relative = (
            found.get(a, {}).get(objective, 0.0) / found[a]["ce"] if a in found else 0.0 for a in TITLES
        )
        rows.append([objective, *(f"{each:.2f}" if each else "–" for each in relative)])
    yield from table(["objective", *TITLES.values()], rows)


def overtrained(results: dict[str, Any]) -> Iterator[str]:
    """What held-out decoding is for: the last weights need not be the best."""
    if not results["overtrained"]:
        return
    rows, (of_best, of_last) = results["overtrained"]["rows"], results["overtrained"]["rates"]
    taus = {row["step"]: row["held_out_tau"] for row in rows if "held_out_tau" in row}
    losses = {row["step"]: row for row in rows if "loss" in row}
    best, last = max(taus, key=lambda step: taus[step]), max(taus)
    after = [tau for step, tau in taus.items() if step >= best]
    near = {step: losses[min(losses, key=lambda at: abs(at - step))] for step in taus}
    passes = max(row["epoch"] for row in losses.values()) + 1
    yield "## Training for too long"
    yield ""
    yield wrapped(
        "The pocket's own Eagle-3, trained for half an hour, is fine-tuned on "
        f"{results['overtrained']['answers']} answers, "
        f"{passes} times over. τ on the 48 prompts of `pocket:select`, by real decoding, is highest at step "
        f"{best} with {taus[best]:.2f}, as low as {min(after):.2f} afterwards, and {taus[last]:.2f} at the "
        f"end ({100 * (taus[last] / taus[best] - 1):+.1f}%). `checkpoints/best` keeps step {best}. These are "
        "single measurements, and differences of a few hundredths are within their noise; loss and estimate "
        "are those of the nearest logged batch, and vary with it."
    )
    figures = ("loss", "tau_estimate")
    cells = [[step, *(f"{near[step][f]:.2f}" for f in figures), f"{tau:.2f}"] for step, tau in taus.items()]
    yield from table(["step", "training loss", "τ estimated in training", "held-out τ"], cells)
    yield "Held-out acceptance of each step of the unroll, given that those before it were accepted:"
    heads = ["checkpoint", *(f"{k}" for k in range(1, len(of_best) + 1))]
    yield from table(
        heads,
        [
            [name, *("–" if rate is None else f"{rate:.2f}" for rate in rates)]
            for name, rates in ((f"best, step {best}", of_best), (f"last, step {last}", of_last))
        ],
    )
