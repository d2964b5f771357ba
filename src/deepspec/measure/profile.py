"""Profiling: what the parts of the decoder's rounds take on this machine, as a table of step costs.

A pass that is timed alone finds its weights in the caches, and one that follows other shapes finds nothing
there; so whole rounds are run, and the calls in them are timed. Every sweep measures each point of the grid,
and the table has means: some rounds take longer, a machine may be a quarter slower for seconds at a time,
and what it serves then takes as long as it takes.
"""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from deepspec.decode.engine import Decoder, Request
from deepspec.decode.plain import NoDraft
from deepspec.drafts.base import Draft, NeuralDraft, Proposal
from deepspec.errors import DataError
from deepspec.files import ResumableLog
from deepspec.log import note, progress
from deepspec.maths.slots import Ints
from deepspec.maths.verify import Sampling, Samplings
from deepspec.measure.evaluate import fingerprint, partial_path
from deepspec.schedule.costs import Identity, StepCosts, monotone, write_costs
from deepspec.schedule.policies import Fixed, Floats, Lengths, Load, Policy
from deepspec.targets import Target
from deepspec.this_machine import clock, read_joules, this_machine

ROWS, WIDTHS, CONTEXTS = (1, 2, 4, 8, 16, 32), (1, 2, 4, 8), (64, 256)
"""The usual grid; a draft's whole block, with its anchor, replaces what is wider."""
SHORT_PROMPT, SHORT_PROMPTS = 8, 4
"""Tokens of the shortest prompts whose reading is timed, and how many there are in each sweep and context."""
UNEVEN = (0, 2, -2, 4, -4, 6, -6, 1, -1, 3, -3, 5, -5, 7, -7, 8)
"""Sixteenths of the context that rows hold more than it, in turn. As in a server, they do not hold equally
many tokens; but those of any number of first rows are nearly the context on average."""
ROUNDS = 3
"""Rounds at each point of a sweep."""
HICCUP = 3.0
"""How many times the median a measurement may count at most."""


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
        longest = int(1.5 * found.contexts[-1])
        if target.room(longest, found.budget) < found.budget:
            raise DataError(
                f"rows of {found.contexts[-1]} tokens on average and the rounds after them may fill "
                f"{longest + found.budget}, and {target.spec.name} reads {target.max_length}",
                next_step="give shorter --contexts",
            )
        return found

    @property
    def budget(self) -> int:
        """New tokens that a row may get while it is measured."""
        return (ROUNDS * len(self.rows) * len(self.widths) + 1) * self.widths[-1]


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
        spent, meter = 0.0, read_joules(target.device)
        with progress("profiling", max(sweeps, len(kept))) as bar:
            bar.update(len(kept))
            if len(kept) < max(3, sweeps):
                sweep(target, draft, replace(grid, contexts=grid.contexts[:1]), sampling, 0)  # one-time costs
            while len(kept) < max(3, sweeps) and (len(kept) < 3 or time.perf_counter() - began < seconds):
                start = clock(target.device)
                kept.append(sweep(target, draft, grid, sampling, len(kept)))
                spent += clock(target.device) - start
                bar.update()
                if log is not None:
                    log.write(kept[-1])
                    log.sync()
        after = read_joules(target.device)
    watts = (after - meter) / spent if meter is not None and after is not None and spent else None
    costs = table_of(kept, grid, identity_of(target, draft), watts)
    if out is not None:
        write_costs(out, costs)
        partial_path(out).unlink(missing_ok=True)
    return costs


def table_of(
    sweeps: Sequence[dict[str, Any]], grid: Grid, identity: Identity, watts: float | None
) -> StepCosts:
    """The means of all sweeps, made monotone. What a draft adds to the rest of a round is its own."""
    target, propose, prefill, observe, rest, drafted = (
        np.mean([sweep[name] for sweep in sweeps], axis=0)
        for name in ("target", "propose", "prefill", "observe", "rest", "drafted")
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
        observe=None if identity.draft is None else monotone(observe),
        ragged=float(np.clip(np.median([sweep.get("ragged", 0.0) for sweep in sweeps]), 0.0, 1.0)),
    )


def _prompts(grid: Grid) -> list[int]:
    """Lengths of the prompts whose reading is timed."""
    return sorted({min(SHORT_PROMPT, grid.contexts[0]), *grid.contexts})


def sweep(
    target: Target, draft: NeuralDraft | None, grid: Grid, sampling: Sampling, number: int
) -> dict[str, Any]:
    """Seconds of every point of a fitted grid once, in an order that `number` decides, as lists by name.

    Plain rounds give the passes of one token per row, rounds with proposals the wider ones.
    """
    order, most = random.Random(number), grid.widths[-1] - 1
    proposer = draft or _Guesses(most, target.vocab_size)
    shape = (len(grid.rows), len(grid.widths), len(grid.contexts))
    passes, proposals = np.zeros(shape), np.zeros((shape[0], shape[2]))
    rests: dict[bool, list[list[float]]] = {True: [[] for _ in grid.rows], False: [[] for _ in grid.rows]}
    uneven: list[float] = []
    reads: dict[bool, dict[int, list[float]]] = {True: defaultdict(list), False: defaultdict(list)}
    for c in order.sample(range(shape[2]), shape[2]):
        for drafted in (False, True)[: 2 if most else 1]:
            stage = _Stage(target, proposer if drafted else None, grid, sampling, order)
            reads[drafted][_prompts(grid)[0]] += stage.fill(_prompts(grid)[0], SHORT_PROMPTS)
            stage.shrink(0)
            reads[drafted][grid.contexts[c]] += stage.fill(grid.contexts[c], grid.rows[-1])
            for a in reversed(range(shape[0])):
                stage.shrink(grid.rows[a])
                found = []
                for b in order.sample(range(1, shape[1]), shape[1] - 1) if drafted else [0]:
                    passes[a, b, c], propose, rest = stage.rounds(Fixed(grid.widths[b] - 1))
                    found.append(propose)
                    rests[drafted][a].append(rest)
                proposals[a, c] = np.mean(found)
                if drafted and grid.rows[a] > 1 and grid.rows[a] % 2 == 0:
                    uneven.append(_ragged(stage.rounds(_Uneven())[0], grid.widths, passes[a, :, c]))
            stage.shrink(0)
    prefill, observed = ([float(_mean(reads[kind][n])) for n in _prompts(grid)] if reads[kind] else [0.0]
                         for kind in (False, True))  # fmt: skip
    plain, drafted_rest = ([float(np.mean(each)) if each else 0.0 for each in rests[kind]]
                           for kind in (False, True))  # fmt: skip
    return {
        "target": passes.tolist(),
        "propose": proposals.tolist(),
        "prefill": prefill,
        "observe": np.maximum(np.subtract(observed, prefill), 0.0).tolist(),
        "rest": plain,
        "drafted": drafted_rest,
        "ragged": float(np.median(uneven)) if uneven else 0.0,
    }


def _mean(times: Sequence[Any]) -> Any:
    """The mean over the first axis; one that a pause of the machine made long counts as `HICCUP` medians."""
    return np.minimum(times, HICCUP * np.median(times, axis=0)).mean(axis=0)


class _Uneven(Policy):
    """Verifies all proposals of every second row, and none of the others."""

    def lengths(self, confidences: Floats, load: Load) -> Lengths:
        return np.arange(len(confidences)) % 2 * confidences.shape[1]


def _ragged(seconds: float, widths: Sequence[int], line: Floats) -> float:
    """Where a pass over `_Uneven` rows lies between the one with as many tokens in equal shares, and the one
    in which all rows have the largest share. line: seconds of equal shares of these widths."""
    even = float(np.interp((1 + widths[-1]) / 2, widths, line))
    return (seconds - even) / max(float(line[-1]) - even, 1e-9)


class _Guesses(NoDraft):
    """Proposes token 0 again and again, for passes of any width without a draft."""

    def __init__(self, block: int, vocabulary: int) -> None:
        self.max_proposals, self.vocabulary = block, vocabulary

    def propose(self, slots: Ints, anchors: Ints, samplings: Samplings, uniforms: Tensor) -> Proposal:
        q = torch.zeros(*uniforms.shape, self.vocabulary, device=uniforms.device)
        q[..., 0] = 1.0
        return Proposal(torch.zeros(uniforms.shape, dtype=torch.long, device=uniforms.device), q, None)


class _Stage:
    """A decoder whose rows hold random prompts, and whose rounds are timed."""

    def __init__(
        self, target: Target, draft: Draft | None, grid: Grid, sampling: Sampling, order: random.Random
    ) -> None:
        self.device, self.vocabulary, self.order = target.device, target.vocab_size, order
        self.grid, self.sampling = grid, sampling
        self.target = _Watched(target, ("step", "logits"), self.device)
        self.draft = None if draft is None else _Watched(draft, ("propose", "observe"), self.device)
        self.decoder = Decoder(cast(Target, self.target), cast(Draft, self.draft), max_rows=grid.rows[-1])

    def fill(self, context: int, rows: int) -> list[float]:
        """Fill rows, at most all, with prompts of `context` tokens on average; the seconds of each. Rounds of
        equal rows would be quicker."""
        found = []
        for i in range(min(rows, self.decoder.max_rows)):
            length = max(round(context * (1 + UNEVEN[i % len(UNEVEN)] / 16)), 1)
            prompt = self.order.choices(range(self.vocabulary), k=length)
            self.decoder.submit(Request(prompt, self.grid.budget, sampling=self.sampling))
            began = clock(self.device)
            self.decoder.step()
            found.append(clock(self.device) - began)
        return found

    def shrink(self, rows: int) -> None:
        while len(self.decoder.rows) > rows:
            self.decoder.cancel(self.decoder.rows[-1].answer.key)

    def rounds(self, policy: Policy) -> tuple[float, float, float]:
        """Means of (pass, proposals, rest) in rounds under a policy."""
        found = []
        self.decoder.policy = policy if self.draft else None
        for _ in range(ROUNDS):
            self.target.spent, began = 0.0, clock(self.device)
            if self.draft:
                self.draft.spent = 0.0
            self.decoder.step()
            parts = (self.target.spent, self.draft.spent if self.draft else 0.0)
            found.append((*parts, clock(self.device) - began - sum(parts)))
        pass_, propose, rest = _mean(found).tolist()
        return pass_, propose, rest


class _Watched:
    """A target or a draft: everything as it is, and the time that some of its calls take."""

    def __init__(self, inner: Target | Draft, names: Sequence[str], device: torch.device) -> None:
        self._inner, self._names, self._device, self.spent = inner, names, device, 0.0

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if name not in self._names:
            return found

        def timed(*given: Any) -> Any:
            began = clock(self._device)
            answer = found(*given)
            self.spent += clock(self._device) - began
            return answer

        return timed
