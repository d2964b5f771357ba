"""One optimiser step: a batch in micro-batches and over the ranks, and what may be wrong with it.

Batches, anchors and sums do not depend on how a batch is cut: every row draws its anchors from a generator of
its own, and numerators and weights are summed before they are divided.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepspec.config import OptimConfig, Recipe
from deepspec.data.tokens import Encoded
from deepspec.drafts.base import NeuralDraft
from deepspec.errors import NonFiniteError
from deepspec.features.batches import Source, check_finite
from deepspec.maths.blocks import FeatureBatch
from deepspec.train.dist import ALONE, Ranks, gathered
from deepspec.train.memory import MICRO_BATCH, memory_for
from deepspec.train.optimizer import Optimizer

TEACHER_ROWS = 128
"""Rows whose teacher logits are looked at together."""


class AbandonedError(Exception):
    """A step that was given up because the run is to stop. No weight has changed; it is trained again."""


def row_generators(recipe: Recipe, step: int, count: int) -> list[torch.Generator]:
    """One generator for each row of a batch, a function of (seed, step, row), so that a row's anchors depend
    neither on padding nor on the rows that share its micro-batch or its rank."""
    whole = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
    seeds = torch.randint(2**62, (count,), generator=whole).tolist()
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def micro_batches(rows: Sequence[Encoded], picked: Sequence[int], optim: OptimConfig) -> list[list[int]]:
    """The picked row numbers in runs that pass the models together: at most `micro_batch_size` rows and
    `micro_batch_tokens` tokens, padding included. A row that is longer than that passes alone."""
    size, most = optim.micro_batch_size or len(rows), optim.micro_batch_tokens or float("inf")
    found: list[list[int]] = []
    width = 0
    for i in picked:
        width = max(width, len(rows[i].ids))
        if not found or len(found[-1]) == size or width * (len(found[-1]) + 1) > most:
            found.append([])
            width = len(rows[i].ids)
        found[-1].append(i)
    return found


def features_of(source: Source, rows: Sequence[Encoded], picked: Sequence[int]) -> FeatureBatch:
    """The features of some rows of a batch, padded to the longest of them."""
    some = [rows[i] for i in picked]
    return source(some, max(len(row.ids) for row in some))


def train_step(
    draft: NeuralDraft,
    source: Source,
    rows: Sequence[Encoded],
    recipe: Recipe,
    step: int,
    measure: bool,
    optimizer: Optimizer,
    ranks: Ranks = ALONE,
    stop: Collection[int] = (),
) -> tuple[Tensor, dict[str, Tensor]]:
    """Features, loss and gradients of one batch: (loss, metric sums), both of all ranks.

    This rank takes its share of the batch, a micro-batch at a time. stop: not empty once the run is to stop;
    that is looked at between micro-batches, and raises AbandonedError on all ranks. Raises UserError if the
    device's memory does not suffice.
    """
    generators = row_generators(recipe, step, len(rows))
    total = weight = torch.zeros((), device=draft.device)
    metrics: dict[str, Tensor] = {}
    together = recipe.splits and ranks.world > 1
    abandoned = False
    for number, picked in enumerate(_in_step(rows, recipe, ranks)):
        if number and (ranks.largest(bool(stop))[0] if together else stop):
            abandoned = True
            break
        with memory_for("a micro-batch", MICRO_BATCH):
            batch = features_of(source, rows, picked or [0])
            if not picked and not recipe.shard_draft:
                continue
            plan: Any = draft.plan(batch, recipe.num_anchors, _each(generators, picked or [0]))
            sums = draft(batch, recipe.loss, plan, measure)
            (sums.total if picked else 0 * sums.total).backward()
        if not picked:
            continue
        total, weight = total + sums.total.detach(), weight + sums.weight
        metrics = {name: value + metrics.get(name, 0) for name, value in sums.metrics.items()}
    if ranks.largest(abandoned)[0]:
        optimizer.clear()
        raise AbandonedError
    both = torch.stack([total.float(), weight.float()])
    ranks.add(both)
    ranks.add_gradients(optimizer.parameters)
    total, weight = both
    if not draft.algorithm.parallel:
        # Eagle-3 divides by all positions of the padded batch, however it was cut.
        weight = torch.full_like(weight, len(rows) * max(len(row.ids) for row in rows))
    optimizer.divide(weight + 1e-6)
    return total / (weight + 1e-6), _metrics(metrics, ranks) if measure else metrics


def _each(generators: Sequence[torch.Generator], picked: Sequence[int]) -> Any:
    return [generators[i] for i in picked]


def _in_step(rows: Sequence[Encoded], recipe: Recipe, ranks: Ranks, alone: bool = False) -> list[list[int]]:
    """The micro-batches of this rank's share of a batch, or its rows one by one (`alone`). Ranks that share a
    model which is split over them must pass it equally often: those with fewer get empty ones, for which they
    pass any row and learn nothing."""
    optim = recipe.optim.model_copy(update={"micro_batch_size": 1}) if alone else recipe.optim
    shares = [range(len(rows))[rank :: ranks.world] for rank in range(ranks.world)]
    if not recipe.splits:
        return micro_batches(rows, shares[ranks.rank], optim)
    cut = [micro_batches(rows, share, optim) for share in shares]
    mine = cut[ranks.rank]
    return mine + [[]] * (max(map(len, cut)) - len(mine))


def _metrics(mine: dict[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """The sums of all ranks; one without rows knows no names."""
    if ranks.world == 1:
        return mine
    found: dict[str, Tensor] = {}
    for theirs in ranks.gather({name: value.detach().cpu() for name, value in mine.items()}):
        found = found | {name: value + found.get(name, 0) for name, value in theirs.items()}
    return found


# ── what may be wrong with a step ─────────────────────────────────────────────────────────────────────


class Fault(NamedTuple):
    """What is wrong with a step: whose numbers, which of them, in which rows. of_step: the draft's and not
    the target's."""

    who: str
    part: str
    rows: tuple[str, ...]
    of_step: bool

    def error(self) -> NonFiniteError:
        if not self.of_step:
            return NonFiniteError(self.who, self.part, self.rows)
        return NonFiniteError(self.who, self.part, self.rows, NonFiniteError.OF_STEP)


def find_fault(
    draft: NeuralDraft,
    source: Source,
    rows: Sequence[Encoded],
    recipe: Recipe,
    step: int,
    who: str,
    ranks: Ranks = ALONE,
) -> Fault:
    """What is at fault if a step (counted from 0) has a loss or gradients that are not finite, or far too
    large, and in which of all ranks' rows. Its batch is computed again row by row, with the same anchors."""
    generators, found = row_generators(recipe, step, len(rows)), None
    losses: dict[str, float] = {}
    with gathered(draft):
        for picked in _in_step(rows, recipe, ranks, alone=True):
            batch = features_of(source, rows, picked or [0])
            if picked and found is None:
                found = _wrong_outputs(draft, batch, who)
            if picked and found is None:
                plan: Any = draft.plan(batch, recipe.num_anchors, _each(generators, picked))
                losses[rows[picked[0]].id] = _row_loss(draft, batch, recipe, plan)
    everyone = ranks.gather((found, losses))
    for fault, _ in everyone:
        if fault is not None:
            return fault
    every = {name: loss for _, theirs in everyone for name, loss in theirs.items()}
    broken = [row.id for row in rows if not math.isfinite(every[row.id])]
    largest = max(every, key=every.__getitem__)
    return Fault(
        "training", f"the loss or the gradients of step {step + 1}", tuple(broken or [largest]), True
    )


def _wrong_outputs(draft: NeuralDraft, batch: FeatureBatch, who: str) -> Fault | None:
    """What is not finite among the target's outputs on one row."""
    try:
        check_finite(batch, draft.feature_layers, who)
    except NonFiniteError as error:
        return Fault(who, error.part, error.rows, False)
    if batch.last_hidden is not None:
        for hidden in batch.last_hidden[0].split(TEACHER_ROWS):
            if not draft.teacher_head.logits(hidden).amax(-1).isfinite().all():
                return Fault(who, "its logits", batch.row_ids, False)
    return None


def _row_loss(draft: NeuralDraft, batch: FeatureBatch, recipe: Recipe, plan: Any) -> float:
    """The loss of one row; infinite if the loss or one of its gradients is not finite."""
    weights = [p for p in draft.parameters() if p.requires_grad]
    sums = draft.forward(batch, recipe.loss, plan, False)  # a call would gather and split the weights again
    found = [sums.total.detach()]
    if sums.total.requires_grad:
        found += [g for g in torch.autograd.grad(sums.total, weights, allow_unused=True) if g is not None]
    if not all(bool(value.isfinite().all()) for value in found):
        return math.inf
    return float(sums.total.detach() / (sums.weight + 1e-6))
