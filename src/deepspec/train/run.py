"""One run of training: its folder and all that is written there. Every rank but 0 writes and prints nothing.

runs/NAME/recipe.yaml               the resolved recipe
runs/NAME/metrics.jsonl             a row every few steps, and one for each held-out measurement
runs/NAME/trackers/                 files of TensorBoard and others
runs/NAME/checkpoints/step_<n>/     the draft, `optimizer.pt`, `progress.json`, and `manifest.json` with the
                                    SHA-256 of the others; the latest few are kept
runs/NAME/checkpoints/best/         the draft with the highest held-out τ
runs/NAME/.lock                     held while a process trains here
"""

from __future__ import annotations

import errno
import json
import math
import os
import pickle
import re
import shutil
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError

from deepspec.checkpoints.draft import save_draft
from deepspec.checkpoints.read import load_provenance, load_spec, read_parts
from deepspec.config import KEPT_CHECKPOINTS, Recipe, dump_recipe, load_recipe
from deepspec.drafts.base import NeuralDraft
from deepspec.errors import CheckpointError, RecipeError, UserError, first_line
from deepspec.files import JsonlWriter, alone_in, aside_of, atomic_file, check_writable, write_json
from deepspec.log import flatten, note, open_trackers, progress, warn
from deepspec.targets import Target
from deepspec.train.dist import whole
from deepspec.train.facts import file_hash
from deepspec.train.optimizer import Optimizer

SHOWN = {"loss": "loss", "tau_estimate": "τ≈", "held_out_tau": "held-out τ", "tokens_per_s": "tokens/s"}
"""The metrics next to the progress bar, and their names there."""
Log = Callable[[dict[str, Any], float], None]
"""(row of metrics, finished share of the run in [0, 1], for the progress bar)."""
FREE = (
    "trackers",
    "optim.micro_batch_size",
    "optim.micro_batch_tokens",
    "compile",
    "shard_target",
    "shard_draft",
    "offload_optimizer",
    "checkpoint_every_steps",
)
"""Keys of the recipe that may change between a run's start and its end: figures change by rounding only."""
MANIFEST = "manifest.json"
NO_ROOM = 1 << 20
"""Free bytes below which a disk counts as full."""
FORCE = "give the recipe and data that it was started with, or continue all the same with --force"
FRESH = "choose another name (name=NAME), or start over with `deepspec train --fresh`"


@dataclass(eq=False)
class Progress:
    """How far a run has come; saved with every checkpoint. seconds: spent in training steps only."""

    step: int = 0
    seconds: float = 0.0
    tokens: int = 0
    best_tau: float | None = None
    best_step: int = 0
    judged_step: int = 0
    last_tau: float | None = None
    """Of the step that was judged last."""
    worse: int = 0
    """Held-out evaluations since the best one."""
    skipped: int = 0
    first_loss: float | None = None
    usual_loss: float | None = None
    """A running mean of the losses so far."""


READ_PROGRESS = TypeAdapter(Progress).validate_json
UNREADABLE = (
    *(OSError, EOFError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError),
    *(pickle.UnpicklingError, struct.error, SafetensorError),
)
"""What reading a torn file as JSON, as safetensors or with `torch.load` may raise."""


class Run:
    """The folder of a run, and the only writer to it. rank: this process among those that train together.
    force: continue although the recipe or the data changed."""

    def __init__(self, folder: Path, recipe: Recipe, rank: int = 0, force: bool = False) -> None:
        self.folder, self.recipe, self.rank, self.force = folder, recipe, rank, force
        self.checkpoints, self.metrics = folder / "checkpoints", folder / "metrics.jsonl"
        self.best = self.checkpoints / "best"
        self.dtype = getattr(torch, recipe.precision)

    def note(self, text: str) -> None:
        if self.rank == 0:
            note(text)

    def warn(self, text: str) -> None:
        if self.rank == 0:
            warn(text)

    def move_aside(self) -> None:
        """Rename an earlier run of this name. Raises UserError while another process trains there."""
        names = (self.folder.with_name(f"{self.folder.name}.old-{n}") for n in range(1, 10**6))
        aside = next(path for path in names if not path.exists())
        with alone_in(self.folder, "training"):
            self.folder.rename(aside)
        self.note(f"the earlier run is kept as {aside}")

    def keep_recipe(self, *, write: bool = True) -> None:
        """Write the resolved recipe into the folder; or only check that this could be done.

        Raises RecipeError, and leaves the run's own recipe as it is, if that trains another kind of draft,
        began from another one, or keeps other optimiser states: nothing could continue it. Any other key that
        differs is an error without `force`.
        """
        path, before = self.folder / "recipe.yaml", self.recipe
        if path.exists() and self.latest() is not None:
            try:
                before = load_recipe(path)
            except RecipeError as error:
                if write:
                    self._set_aside(path, error.what, "the run continues with the recipe given now")
        if other := _differences(before, self.recipe):
            raise RecipeError(
                f"{self.folder} cannot continue with this recipe: {'; '.join(other)}", next_step=FRESH
            )
        if changed := _changed_keys(before, self.recipe):
            said = f"{self.folder} was started with another recipe: {'; '.join(changed)}"
            if not self.force:
                raise RecipeError(said, next_step=f"{FORCE}; or {FRESH}")
            if write:
                self.note(f"{said}; it continues with this one")
        if write:
            dump_recipe(self.recipe, path)

    @contextmanager
    def logging(self, at: Progress, total_steps: int | None) -> Iterator[Log]:
        """What writes rows of metrics, inside the block. Metrics of steps after `at` are dropped: a kill lost
        those steps, and they will be trained again."""
        if self.rank:
            yield lambda row, done: None
            return
        forget_after(self.metrics, at.step)
        recipe, total = self.recipe, float(total_steps or 1)
        settings = recipe.model_dump(mode="json")  # without passwords
        trackers = open_trackers(recipe.trackers, self.folder / "trackers", recipe.name, settings)
        with (
            closing(trackers) as tracker,
            JsonlWriter(self.metrics) as metrics,
            progress(f"training {recipe.name}", total, count=total_steps is not None) as bar,
        ):

            def log(row: dict[str, Any], done: float) -> None:
                metrics.write(row)
                tracker.log({k: float(v) for k, v in row.items() if isinstance(v, int | float)}, row["step"])
                bar.update(completed=done * total, **{SHOWN[k]: v for k, v in row.items() if k in SHOWN})

            yield log

    def _steps(self) -> list[tuple[int, Path]]:
        """(step, folder) of the checkpoints, oldest first. Each was whole when it was written."""
        found = [(re.fullmatch(r"step_(\d+)", p.name), p) for p in self.checkpoints.glob("step_*")]
        return sorted((int(m.group(1)), p) for m, p in found if m is not None)

    def latest(self) -> Path | None:
        """The newest checkpoint; None before the first."""
        steps = self._steps()
        return steps[-1][1] if steps else None

    def save(
        self, draft: NeuralDraft, optimizer: Optimizer, at: Progress, target: Target, facts: dict[str, Any]
    ) -> None:
        """Write checkpoints/step_<n>, whole or not at all, and remove older ones.

        facts: where the draft comes from, for its `deepspec.json`. All ranks must call this, and `save_best`.
        """
        state = optimizer.state()
        if self.rank:
            return
        # The masters, which are whole here: the draft itself may have parts of them only.
        weights = draft.state_dict() | dict(zip(optimizer.names, state["masters"], strict=True))
        path = self.checkpoints / f"step_{at.step}"

        def resumable(part: Path) -> None:
            with _disk_of(path):
                torch.save(state, part / "optimizer.pt")
            write_json(part / "progress.json", vars(at))
            hashes = {p.name: file_hash(p) for p in part.iterdir() if p.name != "progress.json"}
            write_json(part / MANIFEST, hashes)

        if path.exists():
            # The weights are the same; a last held-out measurement may have come after they were saved.
            write_json(path / "progress.json", vars(at))
        else:
            facts = {**facts, "step": at.step, "tokens": at.tokens}
            with _disk_of(path):
                save_draft(draft, path, target, facts, weights=weights, dtype=self.dtype, beside=resumable)
        for _, old in self._steps()[:-KEPT_CHECKPOINTS]:
            shutil.rmtree(old)

    def save_best(self, draft: NeuralDraft, at: Progress, target: Target, facts: dict[str, Any]) -> None:
        """Write checkpoints/best: what a run's folder stands for wherever a draft is asked for."""
        weights = whole(draft.state_dict())
        if self.rank == 0:
            facts = {**facts, "step": at.step, "held_out_tau": at.best_tau, "tokens": at.tokens}
            save_draft(draft, self.best, target, facts, weights=weights, dtype=self.dtype)

    def resume(self, draft: NeuralDraft, optimizer: Optimizer, facts: dict[str, Any]) -> Progress:
        """Load the newest whole checkpoint into draft and optimizer, if there is one.

        Newer ones that are damaged are moved aside, with a warning. Raises CheckpointError if there are
        checkpoints and none is whole, or if the whole ones are of a draft of another shape, as after a change
        of the target, or of a vocabulary that was counted in other data than `facts` says.
        """
        refused: list[tuple[Path, CheckpointError]] = []
        for step, path in reversed(self._steps()):
            try:
                at = _load_step(path, step, draft, optimizer, facts, self.force)
                break
            except CheckpointError as error:
                refused.append((path, error))
        else:
            return self._nothing_to_resume([error for _, error in refused])
        for newer, damage in refused:
            self._set_aside(newer, damage.what, f"the run resumes from step {at.step}")
        try:
            if at.best_tau is not None:
                best = self.best if (self.best / "config.json").is_file() else aside_of(self.best)
                with _damage(best):
                    read_parts(best, load_spec(best, draft.spec.num_target_layers))
        except _DamagedError as error:
            self._set_aside(self.best, error.what, "the next held-out measurement decides the best one again")
            at.best_tau, at.judged_step, at.worse = None, 0, 0
        self.note(f"resuming {self.folder} from step {at.step} ({at.seconds:.0f} s trained)")
        return at

    def _nothing_to_resume(self, errors: Sequence[CheckpointError]) -> Progress:
        """The beginning of a run without checkpoints. Raises CheckpointError if it has some: for the first
        that another recipe would be needed for, or else because none is whole."""
        if not errors:
            return Progress()
        for error in errors:
            if not isinstance(error, _DamagedError):
                raise error
        raise CheckpointError(
            f"no checkpoint of this run is whole; of the newest, {errors[0].what}",
            where=errors[0].where,
            next_step=f"copy the run's folder again; or {FRESH}, which keeps this folder as it is",
        ) from errors[0]

    def _set_aside(self, path: Path, why: str, instead: str) -> None:
        """Rename what is damaged, so that nothing is written over it, and say so."""
        names = (path.with_name(f"{path.name}.damaged{n or ''}") for n in count())
        aside, there = next(name for name in names if not name.exists()), path.exists()
        if there and self.rank == 0:
            path.rename(aside)
        kept = f" (it is kept as {aside.name})" if there else ""
        self.warn(f"{path} is not whole{kept}: {why}; {instead}")

    def check_seen(self) -> None:
        """Raise UserError on a rank that does not see what the first one wrote."""
        if not (self.folder / "recipe.yaml").is_file():
            raise UserError(
                f"{self.folder} is not there on this node, although rank 0 has written it",
                next_step="put --runs on storage that all nodes share",
            )


@contextmanager
def _disk_of(path: Path) -> Iterator[None]:
    """Raise the system's error for a full disk: what torch and safetensors raise instead hides it."""
    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        if shutil.disk_usage(path.parent).free > NO_ROOM and os.strerror(errno.ENOSPC) not in str(error):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error


class _DamagedError(CheckpointError):
    """A file of a checkpoint is missing, torn, or does not belong to the others: no recipe can use it."""


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Raise _DamagedError for whatever reading and checking a damaged checkpoint raises."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except CheckpointError as error:
        raise _DamagedError(error.what, where=error.where) from error
    except UNREADABLE as error:
        said = f"a file cannot be used ({type(error).__name__}: {first_line(error)})"
        raise _DamagedError(said, where=str(path)) from error


def _load_step(
    path: Path, step: int, draft: NeuralDraft, optimizer: Optimizer, facts: dict[str, Any], force: bool
) -> Progress:
    """Load checkpoints/step_<step> into draft and optimizer, if all its files are whole and fit each other.

    Raises _DamagedError if they do not, CheckpointError if nothing could continue from it with this recipe.
    """
    with _damage(path):
        if (path / MANIFEST).exists():  # checkpoints from before there were manifests have none
            for name, digest in json.loads((path / MANIFEST).read_bytes()).items():
                if file_hash(path / name) != digest:
                    raise ValueError(f"{name} is not as it was written")
        at = READ_PROGRESS((path / "progress.json").read_bytes())
        if at.step != step or not math.isfinite(at.seconds):
            raise ValueError(f"progress.json tells of step {at.step} and {at.seconds} s")
        weights, _ = read_parts(path, load_spec(path, draft.spec.num_target_layers))
        if not (origin := load_provenance(path)):
            raise ValueError("deepspec.json is missing")
        before, now = (found.get("vocabulary") or {} for found in (origin, facts))
        # Into host memory: on the device it would take memory next to the fresh masters.
        saved = torch.load(path / "optimizer.pt", weights_only=True, map_location="cpu")
        masters = saved["masters"]
        shapes = [m.shape for m in masters]
    why = None
    if shapes != [m.shape for m in optimizer.masters]:
        why = "trains a draft of another shape"
    elif before.get("ids_hash") != now.get("ids_hash"):
        why = "has a draft vocabulary that was counted in other data"
    data = [found.get("data_hash") for found in (origin, facts)]
    if why is None and not force and None not in data and data[0] != data[1]:
        said = "the run was trained on other data so far (data_hash {}, and now {})".format(*data)
        raise CheckpointError(said, where=str(path), next_step=f"{FORCE}; or {FRESH}")
    if why:
        said = f"the run cannot continue with this recipe: it {why}"
        raise CheckpointError(said, where=str(path), next_step=FRESH)
    with _damage(path):
        for name, master in zip(optimizer.names, masters, strict=True):
            if not torch.equal(weights[name], master.to(weights[name].dtype)):
                raise ValueError(f"optimizer.pt and model.safetensors differ in {name}")
        optimizer.load(saved)
    return at


def check_run(runs: Path, recipe: Recipe, *, fresh: bool = False, force: bool = False) -> None:
    """Raise what `open_run` would raise, before the target is loaded, and write nothing."""
    run = Run(runs / recipe.name, recipe, force=force)
    check_writable(run.folder, folder=True)
    if run.folder.is_dir():
        with alone_in(run.folder, "training"):
            if not fresh:
                run.keep_recipe(write=False)


@contextmanager
def open_run(
    runs: Path, recipe: Recipe, *, fresh: bool = False, force: bool = False, rank: int = 0
) -> Iterator[Run]:
    """The run runs/<recipe's name>, kept to this process until the block ends; its recipe is written.

    fresh: an earlier run of that name is moved aside first. force: its recipe may have changed. Raises
    UserError if another process trains there, and RecipeError if the run there cannot continue.
    """
    run = Run(runs / recipe.name, recipe, rank, force)
    if rank:
        yield run
        return
    if fresh and run.folder.exists():
        run.move_aside()
    with alone_in(run.folder, "training"):
        if not run.checkpoints.is_dir():
            run.note(f"starting a new run in {run.folder}")
        run.keep_recipe()
        yield run


def _differences(before: Recipe, now: Recipe) -> list[str]:
    """What keeps a run of one recipe from continuing with the other, even if all weights have one shape."""
    have, want = (
        {
            "algorithm": r.algorithm,
            "optim.states": r.optim.states,
            "optim.matrices": r.optim.matrices,
            "start_from": r.start_from,
        }
        | {f"draft.{k}": v for k, v in r.draft.model_dump(exclude={"step_loss_decay"}).items()}
        for r in (before, now)
    )
    other = ((key, *("not set" if side[key] is None else side[key] for side in (have, want))) for key in have)
    return [f"its {key} is {one}, the recipe's is {two}" for key, one, two in other if one != two]


def _changed_keys(before: Recipe, now: Recipe) -> list[str]:
    """The keys that differ between a run's recipe and the one given now, with both values, except `FREE`."""
    have, want = (flatten(recipe.model_dump(mode="json")) for recipe in (before, now))
    return [f"{k} was {have[k]} and is {want[k]}" for k in have if have[k] != want[k] and k not in FREE]


def forget_after(path: Path, step: int) -> None:
    """Drop the metrics of later steps, and broken lines: a log must not keep a run from resuming."""

    def kept(line: bytes) -> bool:
        try:
            return bool(json.loads(line)["step"] <= step)
        except (ValueError, KeyError, TypeError):
            return False

    if path.exists():
        with atomic_file(path) as stream:
            stream.writelines(line for line in path.read_bytes().splitlines(keepends=True) if kept(line))
