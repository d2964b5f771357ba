"""Training a draft: step, one visible loop, checkpoints.

Resume is exact by construction: batch k is a pure function of (seed, k), and so are its anchors.
A checkpoint is a whole directory or none. The target is frozen; only the draft's own parameters train.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepspec.checkpoints.draft import load_provenance, save_draft
from deepspec.config import KEPT_CHECKPOINTS, LOG_EVERY, OptimConfig, Recipe
from deepspec.data.tokens import Encoded
from deepspec.drafts.base import NeuralDraft
from deepspec.errors import CheckpointError, RecipeError
from deepspec.features.batches import Source, announced, batches_from
from deepspec.features.open import open_features
from deepspec.files import JsonlWriter, write_json, write_text
from deepspec.log import note, open_trackers, progress
from deepspec.targets import Target
from deepspec.train.build import build_draft, loss_settings, read_rules, vocabulary_facts


@dataclass(frozen=True)
class Outcome:
    """How a training run ended. seconds: spent in steps, evaluations and checkpoints left out."""

    run: Path
    best: Path
    steps: int
    held_out_tau: float | None
    seconds: float
    tokens: int
    interrupted: bool = False


class Optimizer:
    """AdamW with warm-up and cosine decay; float32 masters when the draft itself is narrower. Raises
    RecipeError where `optim.states` asks for a package that is not there."""

    def __init__(self, draft: NeuralDraft, recipe: Recipe) -> None:
        self.recipe = recipe
        self.parameters = [p for p in draft.parameters() if p.requires_grad]
        self.masters = [
            p if p.dtype == torch.float32 else p.detach().float().requires_grad_() for p in self.parameters
        ]
        self.adamw = adamw(self.masters, recipe.optim)

    def collect(self) -> None:
        """Add the draft's gradients to the masters' and clear them, so that a sum over many passes is a
        float32 sum: in bfloat16 the later ones would be lost against it."""
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if master is not parameter and parameter.grad is not None:
                new = parameter.grad.float()
                master.grad = new if master.grad is None else master.grad.add_(new)
                parameter.grad = None

    def divide(self, weight: Tensor) -> None:
        """Divide the gradients collected so far."""
        for master in self.masters:
            if master.grad is not None:
                master.grad.div_(weight)

    def step(self, done: float) -> tuple[float, float]:
        """Clip, step and clear gradients; `done` is the finished share of the run. (lr, gradient norm)."""
        lr = self.recipe.optim.lr * schedule(done, self.recipe.optim.warmup)
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.collect()
        norm = torch.nn.utils.clip_grad_norm_(self.masters, self.recipe.optim.grad_clip)
        self.adamw.step()
        self.adamw.zero_grad()
        with torch.no_grad():
            for parameter, master in zip(self.parameters, self.masters, strict=True):
                if master is not parameter:
                    parameter.copy_(master)
        return lr, float(norm)

    def state(self) -> dict[str, Any]:
        masters = [m.detach() for m in self.masters]
        return {"adamw": self.adamw.state_dict(), "masters": masters, "states": self.recipe.optim.states}

    def load(self, state: dict[str, Any]) -> None:
        self.adamw.load_state_dict(state["adamw"])
        with torch.no_grad():
            for master, parameter, saved in zip(self.masters, self.parameters, state["masters"], strict=True):
                master.copy_(saved)
                parameter.copy_(saved)


def adamw(parameters: list[Tensor], optim: OptimConfig) -> torch.optim.Optimizer:
    """AdamW with its two moments in float32, or in 8 bits where a parameter has 4,096 values or more.

    8 bits: block-wise dynamic quantisation (Dettmers 2022), 256 values to a scale. Raises RecipeError.
    """
    if optim.states == "float32":
        return torch.optim.AdamW(
            parameters, lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay, fused=True
        )
    return eight_bit_adamw()(parameters, lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay)


def eight_bit_adamw() -> Any:
    """The class behind `optim.states: 8bit`. Raises RecipeError where its package is not installed."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise RecipeError(
            f"optim.states=8bit needs the bitsandbytes package ({error})",
            next_step="pip install 'bitsandbytes>=0.50', or train with optim.states=float32 (20 bytes a "
            "parameter, not 14: a smaller draft.num_layers may be needed)",
        ) from error
    return AdamW8bit


def schedule(done: float, warmup: float) -> float:
    """Learning-rate factor at a finished share of the run: linear warm-up, then a half cosine to zero."""
    if done < warmup:
        return max(done / warmup, 1e-3)
    return 0.5 * (1 + math.cos(math.pi * min((done - warmup) / (1 - warmup), 1.0)))


def train_step(
    draft: NeuralDraft,
    source: Source,
    rows: Sequence[Encoded],
    recipe: Recipe,
    step: int,
    *,
    measure: bool,
    optimizer: Optimizer,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Features, loss, gradients of one batch: (loss, metric sums). Anchors depend on (seed, step) only.

    The batch passes `micro_batch_size` rows at a time. Numerators and denominators are summed before they
    are divided, and every part is as wide as the whole batch (Eagle-3 divides by padding too), so the
    gradients are those of the unsplit batch.
    """
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
    size = recipe.optim.micro_batch_size or len(rows)
    width = max(len(r.ids) for r in rows)
    total = weight = torch.zeros((), device=draft.device)
    metrics: dict[str, Tensor] = {}
    for start in range(0, len(rows), size):
        batch = source(rows[start : start + size], width)
        plan: Any = draft.plan(batch, recipe.num_anchors, generator)
        sums = draft(batch, loss_settings(recipe), plan, measure)
        sums.total.backward()
        optimizer.collect()
        total, weight = total + sums.total.detach(), weight + sums.weight
        metrics = {name: value + metrics.get(name, 0) for name, value in sums.metrics.items()}
    optimizer.divide(weight + 1e-6)
    return total / (weight + 1e-6), metrics


@dataclass(eq=False)
class Progress:
    """Where a run stands; saved with every checkpoint."""

    step: int = 0
    seconds: float = 0.0
    tokens: int = 0
    best_tau: float | None = None
    best_step: int = 0
    judged_step: int = 0


def train(
    recipe: Recipe,
    target: Target,
    rows: Sequence[Encoded],
    run: Path,
    provenance: dict[str, Any],
    held_out: Callable[[NeuralDraft], float] | None = None,
    source: Source | None = None,
) -> Outcome:
    """Train (or go on training) a draft in `run`; keeps the last checkpoints and the best by held-out τ.

    source: of the rows' features, where it is open already; else the recipe's `data.features` is opened.
    """
    draft = build_draft(recipe, target, rows)
    provenance = {**provenance, **vocabulary_facts(draft, rows)}
    if "vocabulary" in provenance:
        share = provenance["vocabulary"]["coverage"]
        note(f"the draft's {recipe.draft.vocab_size} ids cover {share:.2%} of the supervised tokens")
    if source is None:
        source = open_features(recipe.data.features, target, draft.feature_layers, read_rules(recipe))
    optimizer = Optimizer(draft, recipe)
    at = Progress()
    found = latest_checkpoint(run)
    if found is not None:
        _load_state(found, draft, optimizer, at, provenance)
        note(f"resuming {run} from step {at.step} ({at.seconds:.0f} s trained)")
    total_steps = recipe.total_steps(len(rows))
    metrics_path = run / "metrics.jsonl"
    _forget_after(metrics_path, at.step)
    tracker = open_trackers(recipe.trackers, run / "trackers", recipe.name, recipe.model_dump())
    batches = announced(batches_from(rows, recipe.optim.batch_size, recipe.seed, at.step), source)
    draft.train()
    total = 1.0 if total_steps is None else float(total_steps)
    with (
        closing(tracker),
        closing(batches),
        _stop_on_interrupt() as stop,
        JsonlWriter(metrics_path) as metrics,
        progress(f"training {recipe.name}", total, count=total_steps is not None) as bar,
    ):
        while (done := finished_share(recipe, total_steps, at)) < 1.0 and not stop:
            began = time.perf_counter()
            epoch, picked = next(batches)
            measure = at.step % LOG_EVERY == 0
            loss, sums = train_step(
                draft, source, picked, recipe, at.step, measure=measure, optimizer=optimizer
            )
            lr, norm = optimizer.step(done)
            at.step, at.tokens = at.step + 1, at.tokens + sum(len(r.ids) for r in picked)
            at.seconds += time.perf_counter() - began
            if measure:
                row = _metrics_row(at, epoch, float(loss), sums, lr, norm)
                metrics.write(row)
                tracker.log({k: float(v) for k, v in row.items() if isinstance(v, int | float)}, at.step)
                bar.update(completed=finished_share(recipe, total_steps, at) * total, **_shown(row))
            if held_out is not None and at.step % recipe.eval_every_steps == 0:
                _judge(draft, held_out, at, run, target, provenance, metrics)
            if at.step % recipe.checkpoint_every_steps == 0:
                save_checkpoint(recipe, run, draft, optimizer, at, target, provenance)
        if held_out is not None and not stop and at.judged_step != at.step:
            _judge(draft, held_out, at, run, target, provenance, metrics)
    save_checkpoint(recipe, run, draft, optimizer, at, target, provenance)
    best = run / "checkpoints" / "best"
    if at.best_tau is None:
        # Never measured: the latest weights stand in, whatever an earlier, interrupted start left there.
        save_draft(draft, best, target, {**provenance, "step": at.step, "held_out_tau": None})
    return Outcome(run, best, at.step, at.best_tau, at.seconds, at.tokens, interrupted=bool(stop))


def finished_share(recipe: Recipe, total_steps: int | None, at: Progress) -> float:
    """Done share of the run, in [0, 1]: the furthest of its limits."""
    shares = []
    if total_steps is not None:
        shares.append(at.step / total_steps)
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


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    return {"loss": row["loss"], "τ≈": row["tau_estimate"], "tokens/s": row["tokens_per_s"]}


def _judge(
    draft: NeuralDraft,
    held_out: Callable[[NeuralDraft], float],
    at: Progress,
    run: Path,
    target: Target,
    provenance: dict[str, Any],
    metrics: JsonlWriter,
) -> None:
    """Measure held-out τ, and keep the draft as best where it beats what was."""
    draft.eval()
    tau = held_out(draft)
    draft.train()
    metrics.write(
        {"step": at.step, "held_out_tau": tau, "seconds": round(at.seconds, 3), "tokens": at.tokens}
    )
    at.judged_step = at.step
    if at.best_tau is None or tau > at.best_tau:
        at.best_tau, at.best_step = tau, at.step
        facts = {**provenance, "step": at.step, "held_out_tau": tau, "tokens": at.tokens}
        save_draft(draft, run / "checkpoints" / "best", target, facts)


# ── checkpoints ───────────────────────────────────────────────────────────────────────────────────────


def save_checkpoint(
    recipe: Recipe,
    run: Path,
    draft: NeuralDraft,
    optimizer: Optimizer,
    at: Progress,
    target: Target,
    provenance: dict[str, Any],
) -> None:
    """checkpoints/step_<n>: the draft in the released layout, and what resuming needs; older ones go."""
    path = run / "checkpoints" / f"step_{at.step}"

    def beside(part: Path) -> None:
        torch.save(optimizer.state(), part / "optimizer.pt")
        write_json(part / "progress.json", vars(at))

    if path.exists():
        # The weights are those; a last held-out measurement may have come after them.
        write_json(path / "progress.json", vars(at))
    else:
        facts = {**provenance, "step": at.step, "tokens": at.tokens}
        save_draft(draft, path, target, facts, step_decay=recipe.draft.step_loss_decay, beside=beside)
    for _, old in _step_directories(run)[:-KEPT_CHECKPOINTS]:
        shutil.rmtree(old)


def _step_directories(run: Path) -> list[tuple[int, Path]]:
    found = [(re.fullmatch(r"step_(\d+)", p.name), p) for p in (run / "checkpoints").glob("step_*")]
    return sorted((int(m.group(1)), p) for m, p in found if m is not None)


def latest_checkpoint(run: Path) -> Path | None:
    """The newest whole checkpoint of a run; None before the first."""
    steps = _step_directories(run)
    return steps[-1][1] if steps else None


def _load_state(
    path: Path, draft: NeuralDraft, optimizer: Optimizer, at: Progress, provenance: dict[str, Any]
) -> None:
    saved = torch.load(path / "optimizer.pt", weights_only=True, map_location=draft.device)
    if [m.shape for m in saved["masters"]] != [m.shape for m in optimizer.masters]:
        raise CheckpointError(
            "the run that is there trains a draft of another shape, so it cannot go on with this recipe",
            where=str(path),
            next_step="give the recipe another `name`, or start anew with `deepspec train --fresh`",
        )
    if (states := saved.get("states", "float32")) != optimizer.recipe.optim.states:
        raise CheckpointError(
            f"the run that is there keeps its optimiser states in {states}, so it cannot go on with "
            f"optim.states={optimizer.recipe.optim.states}",
            where=str(path),
            next_step=f"add optim.states={states}, or start anew with `deepspec train --fresh`",
        )
    before, now = (facts.get("vocabulary") or {} for facts in (load_provenance(path), provenance))
    if before.get("ids_hash") != now.get("ids_hash"):
        raise CheckpointError(
            "the draft vocabulary of the run that is there was counted in other data, so it cannot go on",
            where=str(path),
            next_step="give the recipe another `name`, or start anew with `deepspec train --fresh`",
        )
    optimizer.load(saved)
    for name, value in json.loads((path / "progress.json").read_text("utf-8")).items():
        setattr(at, name, value)


def _forget_after(path: Path, step: int) -> None:
    """Drop metric lines of steps that a kill lost: they will be trained, and written, again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text("utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if row["step"] <= step:
            kept.append(line)
    write_text(path, "".join(line + "\n" for line in kept))


@contextmanager
def _stop_on_interrupt() -> Iterator[list[int]]:
    """A list that is non-empty once Ctrl-C (or SIGTERM) came: the loop then ends after its step, saved.

    A second signal gets its usual effect.
    """
    stop: list[int] = []
    usual = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: object) -> None:
        stop.append(number)
        note("stopping after this step; run the same command again to go on")
        for s, handler in usual.items():
            signal.signal(s, handler)

    try:
        for s in usual:
            signal.signal(s, ask)
    except ValueError:
        # Not the main thread: Ctrl-C is somebody else's business there.
        usual = {}
    try:
        yield stop
    finally:
        for s, handler in usual.items():
            signal.signal(s, handler)
