"""Profiling: what the target's passes and the draft's proposals take here, as a table of step costs.

R rows, w new tokens per row, C tokens held per row. Every sweep measures each point of the grid once, in an
order of its own, so that a machine whose speed drifts slows them all alike; the table has the medians.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from deepspec.decode.engine import Decoder, Request
from deepspec.drafts.base import Draft, NeuralDraft
from deepspec.errors import DataError
from deepspec.files import ResumableLog
from deepspec.log import note, progress
from deepspec.maths.verify import Sampling
from deepspec.measure.evaluate import fingerprint, partial_path
from deepspec.schedule.costs import Identity, StepCosts, monotone, write_costs
from deepspec.targets import Target
from deepspec.this_machine import clock, read_joules, this_machine

ROWS, WIDTHS, CONTEXTS = (1, 2, 4, 8, 16, 32), (1, 2, 4, 8), (64, 256)
"""The usual grid; a draft's whole block, with its anchor, replaces what is wider."""
SHORT_PROMPT = 8
"""Tokens of the shortest prompt whose reading is timed."""
ROUNDS = 3
"""Whole rounds of the decoder, at each number of rows of a sweep, whose rest is timed."""


@dataclass(frozen=True)
class Grid:
    """The points to measure: rows in flight, new tokens per row, tokens held per row; each rises."""

    rows: tuple[int, ...] = ROWS
    widths: tuple[int, ...] = WIDTHS
    contexts: tuple[int, ...] = CONTEXTS

    def fitted(self, target: Target, block: int | None) -> Grid:
        """The grid for a draft of γ = `block`, within the target's context.

        Raises DataError for an axis that does not rise from 1, and for tokens that the target cannot hold.
        """
        widths = self.widths if block is None else tuple(w for w in self.widths if w <= block)
        found = Grid(self.rows, widths if block is None else (*widths, block + 1), self.contexts)
        for name, axis in asdict(found).items():
            if not axis or axis[0] < 1 or list(axis) != sorted(set(axis)):
                raise DataError(f"the {name} of the grid are {list(axis)}, and have to rise from 1 or more")
        if found.widths[0] != 1:
            raise DataError("the grid has no pass of one new token per row, which plain decoding takes")
        longest = found.contexts[-1] + found.widths[-1] + ROUNDS
        if target.room(longest, 1) < 1:
            raise DataError(
                f"a context of {found.contexts[-1]} tokens and a round fill {longest} of the "
                f"{target.max_length} tokens that {target.spec.name} reads",
                next_step="give shorter --contexts",
            )
        return found


def identity_of(target: Target, draft: NeuralDraft | None) -> Identity:
    """What a table of this target and draft, measured here, belongs to."""
    return Identity(
        this_machine(),
        device=str(target.device),
        dtype=str(target.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        target=target.spec.name,
        target_hash=target.spec.config_hash,
        draft=draft.name if draft else None,
        draft_hash=fingerprint(draft),
        block=draft.max_proposals if draft else None,
    )


def profile(
    target: Target,
    draft: NeuralDraft | None,
    grid: Grid | None = None,
    *,
    sampling: Sampling | None = None,
    sweeps: int = 7,
    seconds: float = 60.0,
    out: Path | None = None,
) -> StepCosts:
    """Measure the step costs of a target, and of a draft if there is one.

    At least three sweeps are made, and up to `sweeps` while `seconds` last. out: the table is written there;
    finished sweeps are kept until then, so that the same call continues after a kill. sampling: of the rounds
    from which `rest` is taken. Raises DataError as `Grid.fitted` does.
    """
    grid = (grid or Grid()).fitted(target, draft.max_proposals if draft else None)
    sampling, began = sampling or Sampling(1.0), time.perf_counter()
    facts = asdict(identity_of(target, draft)) | asdict(grid) | asdict(sampling)
    with nullcontext() if out is None else ResumableLog(partial_path(out), facts, header=True) as log:
        kept = [] if log is None else [line for _, line in log.records()]
        if kept:
            note(f"{len(kept)} sweeps were measured before; continuing with the rest")
        bench, spent = None, 0.0
        meter = read_joules(target.device)
        with progress("profiling", max(sweeps, len(kept))) as bar:
            bar.update(len(kept))
            while len(kept) < max(3, sweeps) and (len(kept) < 3 or time.perf_counter() - began < seconds):
                bench = bench or _Bench(target, draft, grid, sampling)
                start = clock(target.device)
                kept.append(bench.sweep(len(kept)))
                spent += clock(target.device) - start
                bar.update()
                if log is not None:
                    log.write(kept[-1])
                    log.sync()
        after = read_joules(target.device)
    if bench is not None:
        bench.close()
    watts = (after - meter) / spent if meter is not None and after is not None and spent else None
    costs = _table(kept, grid, identity_of(target, draft), watts)
    if out is not None:
        write_costs(out, costs)
        partial_path(out).unlink(missing_ok=True)
    return costs


def _table(
    sweeps: Sequence[dict[str, Any]], grid: Grid, identity: Identity, watts: float | None
) -> StepCosts:
    """The medians of all sweeps, made monotone. What a draft adds to the rest of a round is its own."""
    target, propose, prefill, rest, drafted = (
        np.median([sweep[name] for sweep in sweeps], axis=0)
        for name in ("target", "propose", "prefill", "rest", "drafted")
    )
    return StepCosts(
        np.array(grid.rows),
        np.array(grid.widths),
        np.array(grid.contexts),
        monotone(target),
        None if identity.draft is None else monotone(propose + np.maximum(drafted - rest, 0.0)[:, None]),
        np.array(_prompts(grid)),
        monotone(prefill),
        monotone(rest),
        identity,
        watts,
    )


def _prompts(grid: Grid) -> list[int]:
    """Lengths of the prompts whose reading is timed."""
    return sorted({min(SHORT_PROMPT, grid.contexts[0]), *grid.contexts})


class _Bench:
    """Slots that hold the grid's contexts, as many rows of each as the grid has, and one for prompts.

    They are filled once: a pass that was timed is rolled back.
    """

    def __init__(self, target: Target, draft: NeuralDraft | None, grid: Grid, sampling: Sampling) -> None:
        self.target, self.draft, self.grid, self.sampling = target, draft, grid, sampling
        self.layers = draft.feature_layers if draft else ()
        self.random = torch.Generator().manual_seed(0)
        most = grid.rows[-1]
        # The first slots are the decoder's.
        self.slots = {c: range(i * most, (i + 1) * most) for i, c in enumerate(grid.contexts, start=1)}
        with progress("filling contexts", len(self.slots)) as bar:
            for context, slots in self.slots.items():
                for slot in slots:
                    self._open(slot, context)
                bar.update()
        self.sweep(-1)  # one-time costs belong to no sweep

    def close(self) -> None:
        for slot in (slot for slots in self.slots.values() for slot in slots):
            self._free(slot)

    def _free(self, slot: int) -> None:
        self.target.free(slot)
        if self.draft:
            self.draft.free(slot)

    def _tokens(self, count: int) -> list[int]:
        return torch.randint(0, self.target.vocab_size, (count,), generator=self.random).tolist()

    def _open(self, slot: int, context: int) -> float:
        """Read a prompt into a slot; seconds until its first new token is known."""
        prompt, began = self._tokens(context), clock(self.target.device)
        self.target.open(slot)
        output = self.target.step([slot], [prompt], self.layers)
        int(self.target.logits(output.last_hidden[0, -1:]).argmax())
        if self.draft:
            self.draft.open(slot)
            self.draft.observe([slot], output.features, [prompt], [[*prompt[1:], 0]])
        return clock(self.target.device) - began

    def sweep(self, number: int) -> dict[str, Any]:
        """Seconds of every point once, in an order that `number` decides."""
        grid, order = self.grid, random.Random(number)
        places: list[Any] = list(product(*(range(len(axis)) for axis in asdict(grid).values())))
        order.shuffle(places)
        target = np.zeros(tuple(map(len, asdict(grid).values())))
        propose = np.zeros((len(grid.rows), len(grid.contexts)))
        for a, b, c in places:
            target[a, b, c] = self._pass(grid.rows[a], grid.widths[b], grid.contexts[c])
            if self.draft is not None and b == 0:
                propose[a, c] = self._proposals(self.draft, grid.rows[a], grid.contexts[c])
        prefill = []
        for length in _prompts(grid):
            prefill.append(self._open(0, length))
            self._free(0)
        plain = self._rests(None)
        return {
            "target": target.tolist(),
            "propose": propose.tolist(),
            "prefill": prefill,
            "rest": plain,
            "drafted": self._rests(self.draft) if self.draft else plain,
        }

    def _pass(self, rows: int, width: int, context: int) -> float:
        slots = self.slots[context][:rows]
        tokens = [self._tokens(width) for _ in slots]
        began = clock(self.target.device)
        output = self.target.step(slots, tokens, self.layers)
        self.target.logits(output.last_hidden)
        spent = clock(self.target.device) - began
        for slot in slots:
            self.target.rollback(slot, context)
        return spent

    def _proposals(self, draft: NeuralDraft, rows: int, context: int) -> float:
        """One `propose`, and one `observe` of half a block, as a round has them."""
        slots, block = self.slots[context][:rows], draft.max_proposals
        accepted = block // 2 + 1
        tokens = [self._tokens(accepted) for _ in slots]
        output = self.target.step(slots, tokens, self.layers)
        for slot in slots:
            self.target.rollback(slot, context)
        uniforms = torch.rand(rows, block, generator=self.random).to(self.target.device)
        began = clock(self.target.device)
        draft.propose(slots, [row[0] for row in tokens], [self.sampling] * rows, uniforms)
        draft.observe(slots, output.features, tokens, [[*row[1:], 0] for row in tokens])
        spent = clock(self.target.device) - began
        for slot in slots:
            draft.lengths[slot] = context
        return spent

    def _rests(self, draft: NeuralDraft | None) -> list[float]:
        """What a round of the decoder takes beyond the pass and the proposals, by rows."""
        watched = [_Watched(self.target, ("step", "logits"))]
        if draft is not None:
            watched.append(_Watched(draft, ("propose", "observe")))
        target, proposer = cast(Target, watched[0]), cast(Draft, watched[1]) if draft else None
        decoder = Decoder(target, proposer, max_rows=self.grid.rows[-1])
        rounds = (ROUNDS + 1) * len(self.grid.rows)
        for _ in range(decoder.max_rows):
            prompt = self._tokens(_prompts(self.grid)[0])
            decoder.submit(Request(prompt, rounds * (self.grid.widths[-1] + 1), sampling=self.sampling))
        while decoder.waiting:
            decoder.step()
        rests = []
        for rows in reversed(self.grid.rows):
            while len(decoder.rows) > rows:
                decoder.cancel(decoder.rows[-1].answer.key)
            found = []
            for _ in range(ROUNDS if decoder.rows else 0):
                before, began = sum(each.spent for each in watched), clock(self.target.device)
                decoder.step()
                whole = clock(self.target.device) - began
                found.append(whole - (sum(each.spent for each in watched) - before))
            rests.append(float(np.median(found)))
        while decoder.rows:
            decoder.cancel(decoder.rows[-1].answer.key)
        return rests[::-1]


class _Watched:
    """A target or a draft: everything as it is, and the time that some of its calls take."""

    def __init__(self, inner: Target | NeuralDraft, names: Sequence[str]) -> None:
        self._inner, self._names, self.spent = inner, names, 0.0

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if name not in self._names:
            return found

        def timed(*given: Any) -> Any:
            began = clock(self._inner.device)
            answer = found(*given)
            self.spent += clock(self._inner.device) - began
            return answer

        return timed
