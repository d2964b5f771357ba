"""Training a draft: from a recipe to the best checkpoint, one step, one visible loop.

Resuming is exact by construction: batch k is a pure function of (seed, k), and so are its anchors.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepspec.conditions import Conditions, differences
from deepspec.config import LOG_EVERY, Recipe
from deepspec.data.tokens import Encoded
from deepspec.drafts.base import NeuralDraft
from deepspec.errors import NonFiniteError
from deepspec.features.batches import Source, announced, batches_from, check_finite
from deepspec.measure.evaluate import held_out_tau, load_prompts
from deepspec.pocket import prompts_path
from deepspec.targets import Target, TargetSpec
from deepspec.train.build import build_draft, recipe_spec, vocabulary_facts
from deepspec.train.data import check_before_loading, check_target, training_data
from deepspec.train.facts import provenance
from deepspec.train.optimizer import Optimizer
from deepspec.train.run import Progress, Run, check_run, open_run


@dataclass(frozen=True)
class Outcome:
    """How a training run ended. seconds: spent in steps; evaluations and checkpoints are not counted."""

    run: Path
    best: Path
    steps: int
    held_out_tau: float | None
    seconds: float
    tokens: int
    interrupted: bool = False


def train_draft(
    recipe: Recipe,
    runs: Path | str = "runs",
    *,
    target: Target | None = None,
    answers: Path | None = None,
    fresh: bool = False,
) -> Outcome:
    """Train a recipe into runs/<name>, or continue where that run stopped.

    answers: a file to use instead of the recipe's data.train. fresh: an earlier run of that name is moved
    aside, and this one starts over. Held-out τ on the recipe's select prompts picks the best checkpoint.
    Raises UserError for unusable data, recipes or targets, and if another process trains in that folder.
    """
    check_before_loading(recipe, answers)
    known = target or TargetSpec.from_pretrained(recipe.target)
    if isinstance(known, TargetSpec):
        check_target(recipe, known)
    prompts = load_prompts(
        prompts_path(recipe.data.select), known, thinking=recipe.thinking, limit=recipe.eval_prompts
    )
    check_run(Path(runs), recipe, fresh=fresh)
    target = target or Target.from_pretrained(recipe.target)
    spec = recipe_spec(recipe, target)
    with open_run(Path(runs), recipe, fresh=fresh) as run:
        data = training_data(recipe, target, spec.target_layer_ids, run.folder, answers)
        facts = provenance(recipe, target, data.about)
        carried, wanted = Conditions.read(data.about["data"]), Conditions.read(facts)
        for sentence in differences(f"{data.name} was answered", carried, "the recipe trains", wanted):
            run.warn(sentence)
        held_out = partial(held_out_tau, target, prompts=prompts, max_new_tokens=recipe.eval_max_new_tokens)
        draft = build_draft(recipe, target, data.rows, spec)
        return train(run, draft, target, data.rows, data.source, facts, held_out)


def train(
    run: Run,
    draft: NeuralDraft,
    target: Target,
    rows: Sequence[Encoded],
    source: Source,
    facts: dict[str, Any],
    held_out: Callable[[NeuralDraft], float] | None = None,
) -> Outcome:
    """Train a draft, or continue from the run's newest checkpoint.

    source: of the rows' features; it is closed at the end. facts: where the draft comes from, kept in its
    checkpoints. held_out: measures τ; the draft with the highest one is kept as the best.
    """
    recipe = run.recipe
    facts = facts | vocabulary_facts(draft, rows)
    if "vocabulary" in facts:
        share = facts["vocabulary"]["coverage"]
        run.note(f"the draft's {recipe.draft.vocab_size} ids cover {share:.2%} of the supervised tokens")
    optimizer = Optimizer(draft, recipe.optim)
    at = run.resume(draft, optimizer, facts)
    total_steps = recipe.total_steps(len(rows))
    batches = announced(batches_from(rows, recipe.optim.batch_size, recipe.seed, at.step), source)

    def judge() -> None:
        if held_out is None or at.judged_step == at.step:
            return
        draft.eval()
        tau, at.judged_step = held_out(draft), at.step
        draft.train()
        if not math.isfinite(tau):
            raise NonFiniteError(
                "the held-out measurement", f"τ after step {at.step}", (), NonFiniteError.OF_STEP
            )
        figures = {"seconds": round(at.seconds, 3), "tokens": at.tokens}
        log({"step": at.step, "held_out_tau": tau, **figures}, finished_share(recipe, total_steps, at))
        if at.best_tau is None or not tau <= at.best_tau:
            at.best_tau, at.best_step = tau, at.step
            run.save_best(draft, at, target, facts)

    draft.train()
    with closing(batches), run.logging(at, total_steps) as log, stop_on_interrupt(run.note) as stop:
        while (done := finished_share(recipe, total_steps, at)) < 1.0 and not stop:
            began = time.perf_counter()
            epoch, picked = next(batches)
            measure = at.step % LOG_EVERY == 0
            loss, sums = train_step(draft, source, picked, recipe, at.step, measure, optimizer)
            lr, norm = optimizer.step(done, loss)
            if not math.isfinite(norm):
                raise not_finite(draft, source, picked, recipe, at.step, target)
            at.step, at.tokens = at.step + 1, at.tokens + sum(len(r.ids) for r in picked)
            at.seconds += time.perf_counter() - began
            if measure:
                row = _metrics_row(at, epoch, float(loss), sums, lr, norm)
                if not math.isfinite(row["tau_estimate"]):
                    raise not_finite(draft, source, picked, recipe, at.step - 1, target)
                log(row, finished_share(recipe, total_steps, at))
            if at.step % recipe.eval_every_steps == 0:
                judge()
            if at.step % recipe.checkpoint_every_steps == 0:
                run.save(draft, optimizer, at, target, facts)
        if not stop:
            judge()
    run.save(draft, optimizer, at, target, facts)
    if at.best_tau is None:
        # Never measured: the latest weights stand in, whatever an earlier, interrupted start left there.
        run.save_best(draft, at, target, facts)
    return Outcome(run.folder, run.best, at.step, at.best_tau, at.seconds, at.tokens, interrupted=bool(stop))


def train_step(
    draft: NeuralDraft,
    source: Source,
    rows: Sequence[Encoded],
    recipe: Recipe,
    step: int,
    measure: bool,
    optimizer: Optimizer,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Features, loss and gradients of one batch: (loss, metric sums). Anchors depend on (seed, step) only.

    `micro_batch_size` rows pass at a time. Numerators and denominators are summed before they are divided,
    and every part is as wide as the whole batch (Eagle-3 divides by padding too), so the gradients are those
    of the unsplit batch.
    """
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
    size = recipe.optim.micro_batch_size or len(rows)
    width = max(len(r.ids) for r in rows)
    total = weight = torch.zeros((), device=draft.device)
    metrics: dict[str, Tensor] = {}
    for start in range(0, len(rows), size):
        batch = source(rows[start : start + size], width)
        plan: Any = draft.plan(batch, recipe.num_anchors, generator)
        sums = draft(batch, recipe.loss, plan, measure)
        sums.total.backward()
        optimizer.collect()
        total, weight = total + sums.total.detach(), weight + sums.weight
        metrics = {name: value + metrics.get(name, 0) for name, value in sums.metrics.items()}
    optimizer.divide(weight + 1e-6)
    return total / (weight + 1e-6), metrics


def not_finite(
    draft: NeuralDraft, source: Source, rows: Sequence[Encoded], recipe: Recipe, step: int, target: Target
) -> NonFiniteError:
    """The error for a step (counted from 0) whose loss, gradients or rates are not finite: what is at fault,
    and in which rows. The batch is computed again row by row, with the anchors that it had."""
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
    who = target.spec.name if recipe.data.features == "online" else recipe.data.features
    width, weights = max(len(r.ids) for r in rows), [p for p in draft.parameters() if p.requires_grad]
    broken: list[str] = []
    for row in rows:
        batch = source([row], width)
        try:
            check_finite(batch, draft.feature_layers, who)
        except NonFiniteError as error:
            return error
        if batch.last_hidden is not None:
            for hidden in batch.last_hidden[0].split(128):
                if not draft.teacher_head.logits(hidden).amax(-1).isfinite().all():
                    return NonFiniteError(who, "its logits", [row.id])
        sums = draft(batch, recipe.loss, draft.plan(batch, recipe.num_anchors, generator), False)
        found = [sums.total.detach()]
        if sums.total.requires_grad:
            found += [g for g in torch.autograd.grad(sums.total, weights, allow_unused=True) if g is not None]
        if not all(bool(value.isfinite().all()) for value in found):
            broken.append(row.id)
    part = f"the loss or the gradients of step {step + 1}"
    return NonFiniteError("training", part, broken or [r.id for r in rows], NonFiniteError.OF_STEP)


def finished_share(recipe: Recipe, total_steps: int | None, at: Progress) -> float:
    """Finished share of the run, in [0, 1], by whichever of its limits is nearest."""
    shares = [] if total_steps is None else [at.step / total_steps]
    if recipe.optim.max_minutes is not None:
        shares.append(at.seconds / (60 * recipe.optim.max_minutes))
    return min(max(shares), 1.0)


def _metrics_row(
    at: Progress, epoch: int, loss: float, sums: dict[str, Tensor], lr: float, norm: float
) -> dict[str, Any]:
    rates = sums["accept_num"] / sums["accept_den"].clamp(min=1)
    return {
        "step": at.step,
        "epoch": epoch,
        "loss": loss,
        "tau_estimate": float(sums["tau_num"] / sums["tau_den"].clamp(min=1)),
        "accept_by_position": [round(float(r), 4) for r in rates],
        "lr": lr,
        "grad_norm": norm,
        "tokens": at.tokens,
        "seconds": round(at.seconds, 3),
        "tokens_per_s": at.tokens / max(at.seconds, 1e-9),
    }


@contextmanager
def stop_on_interrupt(note: Callable[[str], None]) -> Iterator[list[int]]:
    """A list that is not empty after Ctrl-C or SIGTERM: the loop then ends after its step and saves.

    A second signal has its usual effect.
    """
    stop: list[int] = []
    usual = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: object) -> None:
        stop.append(number)
        note("stopping after this step; run the same command again to continue")
        for s, handler in usual.items():
            signal.signal(s, handler)

    try:
        for s in usual:
            signal.signal(s, ask)
    except ValueError:
        usual = {}  # only the main thread may handle signals
    try:
        yield stop
    finally:
        for s, handler in usual.items():
            signal.signal(s, handler)
