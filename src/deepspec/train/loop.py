"""Training a draft: from a recipe to the best checkpoint, one step, one visible loop, on any number of ranks.

Resuming is exact by construction: batch k is a pure function of (seed, k), and so are its anchors; nothing
else is drawn. (To the bit on a CPU; on a GPU, some kernels do not sum in the same order in every run.)
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

from torch import Tensor

from deepspec.conditions import Conditions, differences
from deepspec.config import LOG_EVERY, Recipe
from deepspec.data.tokens import Encoded
from deepspec.drafts.base import NeuralDraft
from deepspec.errors import NonFiniteError, UserError, some_rows
from deepspec.features.batches import Source, announced, batches_from
from deepspec.maths import acceptance
from deepspec.maths.calibration import calibration_error
from deepspec.maths.fused import compiling
from deepspec.measure.evaluate import held_out_rounds, load_prompts
from deepspec.measure.rows import Prompt
from deepspec.pocket import prompts_path
from deepspec.targets import Target, TargetSpec
from deepspec.train.build import build_draft, recipe_spec, vocabulary_facts
from deepspec.train.data import check_before_loading, check_target, training_data
from deepspec.train.dist import ALONE, Ranks, check_world, gathered, joined, shard_draft, shard_target
from deepspec.train.facts import provenance, shared_facts
from deepspec.train.memory import SMALLER_DRAFT, SMALLER_SLOTS, SMALLER_TARGET, kept_memory, memory_for
from deepspec.train.meter import Meter
from deepspec.train.optimizer import Optimizer, Stepped
from deepspec.train.run import Log, Progress, Run, check_run, open_run
from deepspec.train.step import AbandonedError, Fault, find_fault, train_step

EXPLODES = 10.0
"""A loss explodes if it is so many times the mean of those before it, and above the first."""
REMEMBERED = 0.95
"""Weight of the past in that mean, for each step."""


@dataclass(frozen=True)
class Outcome:
    """How a training run ended. held_out_tau: of the best checkpoint, which is of step `best_step`; last_tau:
    of the weights that training ended on. seconds: spent in steps; evaluations and checkpoints are not
    counted. skipped: steps that were left out. interrupted: the signal that ended the run before its end, or
    0."""

    run: Path
    best: Path
    steps: int
    held_out_tau: float | None
    seconds: float
    tokens: int
    interrupted: int = 0
    best_step: int = 0
    last_tau: float | None = None
    skipped: int = 0
    rank: int = 0


def train_draft(
    recipe: Recipe,
    runs: Path | str = "runs",
    *,
    target: Target | None = None,
    answers: Path | None = None,
    fresh: bool = False,
    force: bool = False,
) -> Outcome:
    """Train a recipe into runs/<name>, or continue where that run stopped; under torchrun, with the other
    processes of the job.

    answers: a file to use instead of the recipe's data.train. fresh: an earlier run of that name is moved
    aside, and this one starts over. force: continue a run whose recipe or data have changed. Held-out τ on
    the recipe's select prompts picks the best checkpoint. Raises UserError for unusable data, recipes or
    targets, if another process trains in that folder, and if the processes of a job do not agree.
    """
    check_world(recipe)
    with joined() as ranks:
        check_before_loading(recipe, answers)
        known = target or TargetSpec.from_pretrained(recipe.target)
        if isinstance(known, TargetSpec):
            check_target(recipe, known)
        prompts = load_prompts(
            prompts_path(recipe.data.select), known, thinking=recipe.thinking, limit=recipe.eval_prompts
        )
        if ranks.world > 1:
            ranks.check_alike(shared_facts(recipe, known, answers))
        if ranks.rank == 0:
            check_run(Path(runs), recipe, fresh=fresh, force=force)
        ranks.wait()
        if target is None:
            place = shard_target if recipe.shard_target and ranks.world > 1 else None
            with memory_for("the target weights", SMALLER_TARGET):
                target = Target.from_pretrained(recipe.target, place=place)
        spec = recipe_spec(recipe, target)
        with open_run(Path(runs), recipe, fresh=fresh, force=force, rank=ranks.rank) as run:
            ranks.wait()
            run.check_seen()
            data = training_data(recipe, target, spec.target_layer_ids, run.folder, answers, ranks)
            facts = provenance(recipe, target, data.about)
            carried, wanted = Conditions.read(data.about["data"]), Conditions.read(facts)
            for sentence in differences(f"{data.name} was answered", carried, "the recipe trains", wanted):
                run.warn(sentence)
            held_out = partial(measure_tau, target, recipe=recipe, prompts=prompts, ranks=ranks)
            draft = build_draft(recipe, target, data.rows, spec)
            if recipe.shard_draft and ranks.world > 1:
                shard_draft(draft)
            with compiling(recipe.compile, draft.device), kept_memory(draft.device):
                return train(run, draft, target, data.rows, data.source, facts, held_out, ranks)


def measure_tau(
    target: Target, draft: NeuralDraft, recipe: Recipe, prompts: Sequence[Prompt], ranks: Ranks
) -> float:
    """Held-out τ. The ranks share the prompts, since none should wait for another; but if the target is split
    over them, all decode all prompts in step. The slots' memory is given back."""
    seeds = range(len(prompts))
    together = recipe.shard_target and ranks.world > 1
    mine = seeds if together else ranks.share(seeds)
    with memory_for("the held-out slots", SMALLER_SLOTS):
        found = held_out_rounds(target, draft, {i: prompts[i] for i in mine}, recipe.eval_max_new_tokens)
    target.release()
    draft.release()
    kept = [found] if together else ranks.gather(found)
    return acceptance.tau([rounds for theirs in kept for rounds in theirs]) or 1.0


@dataclass
class _Training:
    """What the parts of the loop share."""

    run: Run
    draft: NeuralDraft
    target: Target
    source: Source
    facts: dict[str, Any]
    held_out: Callable[[NeuralDraft], float] | None
    ranks: Ranks
    optimizer: Optimizer
    at: Progress
    total_steps: int | None

    @property
    def done(self) -> float:
        return finished_share(self.run.recipe, self.total_steps, self.at)

    @property
    def stale(self) -> bool:
        """Whether held-out τ has not improved for as long as the recipe waits for it."""
        patience = self.run.recipe.early_stop
        return patience is not None and self.at.worse >= patience

    def judge(self, log: Log) -> None:
        """Measure held-out τ, unless that was done for these weights, and keep the best."""
        at, draft = self.at, self.draft
        if self.held_out is None or at.judged_step == at.step:
            return
        draft.eval()
        with memory_for("the draft, gathered from all processes", SMALLER_DRAFT), gathered(draft):
            tau = self.held_out(draft)
        draft.train()
        if not math.isfinite(tau):
            raise NonFiniteError(
                "the held-out measurement", f"τ after step {at.step}", (), NonFiniteError.OF_STEP
            )
        at.judged_step, at.last_tau = at.step, tau
        figures = {"seconds": round(at.seconds, 3), "tokens": at.tokens}
        log({"step": at.step, "held_out_tau": tau, **figures}, self.done)
        better = at.best_tau is None or not tau <= at.best_tau
        at.worse = 0 if better else at.worse + 1
        if better:
            at.best_tau, at.best_step = tau, at.step
            self.run.save_best(draft, at, self.target, self.facts)

    def blame(self, picked: Sequence[Encoded]) -> Fault:
        """What is wrong with the batch of the current step."""
        recipe = self.run.recipe
        who = self.target.spec.name if recipe.data.features == "online" else recipe.data.features
        return find_fault(self.draft, self.source, picked, recipe, self.at.step, who, self.ranks)

    def follow(self, picked: Sequence[Encoded], stepped: Stepped) -> None:
        """Count a step, or skip one that was not taken. Raises UserError, with the rows at fault, once more
        are skipped than the recipe allows."""
        at, recipe = self.at, self.run.recipe
        if not stepped.taken:
            fault = self.blame(picked)
            error: UserError = fault.error()
            if math.isfinite(stepped.loss) and math.isfinite(stepped.norm):
                error = UserError(
                    f"the loss of step {at.step + 1} explodes: it is {stepped.loss:.4g}, and those before it "
                    f"were {at.usual_loss:.4g} on average",
                    where=some_rows(fault.rows),
                    next_step=NonFiniteError.OF_STEP,
                )
            at.skipped += 1
            if at.skipped > recipe.optim.skip_steps:
                raise error
            self.run.warn(
                f"step {at.step + 1} is skipped ({at.skipped} of at most {recipe.optim.skip_steps}): "
                f"{error.what} ({error.where})"
            )
        elif stepped.norm:  # a batch without an anchor has no loss to compare others with
            before = stepped.loss if at.usual_loss is None else at.usual_loss
            at.usual_loss = REMEMBERED * before + (1 - REMEMBERED) * stepped.loss
            at.first_loss = stepped.loss if at.first_loss is None else at.first_loss
        at.step, at.tokens = at.step + 1, at.tokens + sum(len(r.ids) for r in picked)


def train(
    run: Run,
    draft: NeuralDraft,
    target: Target,
    rows: Sequence[Encoded],
    source: Source,
    facts: dict[str, Any],
    held_out: Callable[[NeuralDraft], float] | None = None,
    ranks: Ranks = ALONE,
) -> Outcome:
    """Train a draft, or continue from the run's newest checkpoint.

    source: of the rows' features; it is closed at the end. facts: where the draft comes from, kept in its
    checkpoints. held_out: measures τ, on all ranks at once; the draft with the highest is kept as the best.
    """
    recipe = run.recipe
    facts = facts | vocabulary_facts(draft, rows)
    if "vocabulary" in facts:
        share = facts["vocabulary"]["coverage"]
        run.note(f"the draft's {recipe.draft.vocab_size} ids cover {share:.2%} of the supervised tokens")
    optimizer = Optimizer(draft, recipe.optim, recipe.offload_optimizer)
    # The first rank moves damaged checkpoints aside before the others look for the newest.
    at = ranks.first(lambda: run.resume(draft, optimizer, facts))
    ranks.check_alike({"the step to continue from": at.step})
    total_steps = recipe.total_steps(len(rows))
    training = _Training(run, draft, target, source, facts, held_out, ranks, optimizer, at, total_steps)
    order = batches_from(rows, recipe.optim.batch_size, recipe.seed, at.step)
    batches = announced(order, source, ranks.share)
    meter = Meter(target.device, recipe.precision, ranks.world, at.seconds)
    timed = meter.timed(source)
    draft.train()
    with closing(batches), run.logging(at, total_steps) as log, stop_on_interrupt(run.note) as stop:
        while True:
            # One clock and one will for all ranks: each must take as many steps, at the same rates.
            at.seconds, stopping = ranks.largest(at.seconds, stop[0] if stop else 0)
            if stopping or training.done >= 1.0 or training.stale:
                break
            began, done = time.perf_counter(), training.done
            epoch, picked = next(batches)
            measure = at.step % LOG_EVERY == 0
            try:
                with meter.counting(measure, sum(len(row.ids) for row in picked)):
                    loss, sums = train_step(
                        draft, timed, picked, recipe, at.step, measure, optimizer, ranks, stop
                    )
            except AbandonedError:
                continue
            most = math.inf if at.usual_loss is None else EXPLODES * at.usual_loss
            stepped = optimizer.step(done, loss, max(most, at.first_loss or 0.0))
            if measure and stepped.taken and not all(bool(s.isfinite().all()) for s in sums.values()):
                raise training.blame(picked).error()
            training.follow(picked, stepped)
            at.seconds += time.perf_counter() - began
            if measure and stepped.taken:
                row = _metrics_row(at, epoch, stepped, sums)
                log(row | meter.read(row["tokens_per_s"], at.seconds), training.done)
            if at.step % recipe.eval_every_steps == 0:
                training.judge(log)
            if at.step % recipe.checkpoint_every_steps == 0:
                run.save(draft, optimizer, at, target, facts)
        if not stopping:
            training.judge(log)
    run.save(draft, optimizer, at, target, facts)
    if at.best_tau is None:
        # Never measured: the latest weights stand in, whatever an earlier, interrupted start left there.
        run.save_best(draft, at, target, facts)
    ranks.wait()
    return Outcome(
        run.folder,
        run.best,
        at.step,
        at.best_tau,
        at.seconds,
        at.tokens,
        interrupted=int(stopping),
        best_step=at.best_step,
        last_tau=at.last_tau if at.judged_step == at.step else None,
        skipped=at.skipped,
        rank=ranks.rank,
    )


def finished_share(recipe: Recipe, total_steps: int | None, at: Progress) -> float:
    """Finished share of the run, in [0, 1], by whichever of its limits is nearest."""
    shares = [] if total_steps is None else [at.step / total_steps]
    if recipe.optim.max_minutes is not None:
        shares.append(at.seconds / (60 * recipe.optim.max_minutes))
    return min(max(shares), 1.0)


def _metrics_row(at: Progress, epoch: int, stepped: Stepped, sums: dict[str, Tensor]) -> dict[str, Any]:
    rates = sums["accept_num"] / sums["accept_den"].clamp(min=1)
    bins = sums.get("confidence_bins")
    return {
        "step": at.step,
        "epoch": epoch,
        "loss": stepped.loss,
        "tau_estimate": float(sums["tau_num"] / sums["tau_den"].clamp(min=1)),
        "accept_by_position": [round(float(r), 4) for r in rates],
        "lr": stepped.lr,
        "grad_norm": stepped.norm,
        "tokens": at.tokens,
        "seconds": round(at.seconds, 3),
        "tokens_per_s": at.tokens / max(at.seconds, 1e-9),
    } | ({} if bins is None else {"calibration_error": float(calibration_error(bins))})


@contextmanager
def stop_on_interrupt(note: Callable[[str], None]) -> Iterator[list[int]]:
    """A list that is not empty after Ctrl-C or SIGTERM: the loop then ends after its micro-batch and saves.

    A second signal has its usual effect.
    """
    stop: list[int] = []
    usual = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: object) -> None:
        stop.append(number)
        note("stopping after this micro-batch; run the same command again to continue")
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
