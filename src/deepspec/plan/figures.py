"""What a recipe takes before anything runs: rows, bytes, memory, operations, hours and energy, each with its
formula, and whether it fits.

Pure: dimensions, recipe, counts and machine in, figures out. Nothing is loaded and nothing is measured here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from deepspec.build import draft_spec
from deepspec.checkpoint import draft_shapes
from deepspec.config import Recipe
from deepspec.drafts.base import DraftSpec
from deepspec.plan import phases
from deepspec.plan.costs import (
    BYTES,
    ROW_BYTES,
    Dimensions,
    Figure,
    activation_bytes,
    body_weights,
    cache_bytes,
    dimensions,
    draft_flops,
    draft_parameters,
    figure,
    forward_flops,
    head_bytes,
    head_flops,
    number,
    passing_bytes,
    read_share,
    slot_bytes,
    state_bytes_per_parameter,
    target_parameters,
)
from deepspec.plan.counts import Counts, Totals, totals
from deepspec.plan.machines import Machine
from deepspec.plan.phases import Speeds
from deepspec.train import KEPT_CHECKPOINTS, LOG_EVERY

ENGINES = {"process": 16, "server": 256}
"""What answers, and how many answers it decodes together where nothing else is said."""
USABLE = 0.92
"""Of an accelerator's memory, past what its context and fragmentation take: an assumption."""
PROCESS_BYTES = 1.5e9
"""Host memory of the program itself, libraries included: an assumption."""


@dataclass(frozen=True)
class Choices:
    """What a recipe leaves open. features: online, or cache. store: a cache's number format. positions: those
    that the loss reads, as `deepspec data cache` stores them, or all, as the published caches do. engine:
    process, or server. batch: answers decoded together."""

    features: str = "online"
    store: str = "bf16"
    positions: str = "read"
    engine: str = "process"
    batch: int = 16
    free_disk: float | None = None
    answered: bool = False
    """The answers are there already."""

    @classmethod
    def answering(cls, engine: str, batch: int | None = None, **rest: Any) -> Choices:
        """With as many answers decoded together as is usual: 16 in process, 256 in a server."""
        return cls(engine=engine, batch=batch or ENGINES[engine], **rest)


@dataclass(frozen=True)
class Need:
    """Bytes wanted of one kind, and those that are there."""

    what: str
    wants: float
    has: float

    @property
    def fits(self) -> bool:
        return self.wants <= self.has


@dataclass(frozen=True)
class Plan:
    """Figures by section and name; what has to fit; what was assumed."""

    recipe: Recipe
    machine: Machine
    choices: Choices
    sections: dict[str, dict[str, Figure]]
    needs: tuple[Need, ...]
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return all(need.fits for need in self.needs)

    def plain(self) -> dict[str, Any]:
        """As JSON data."""
        return {
            "recipe": self.recipe.name,
            "target": self.recipe.target,
            "machine": self.machine._asdict(),
            "features": self.choices.features,
            "sections": {
                title: {name: one.plain() for name, one in figures.items()}
                for title, figures in self.sections.items()
            },
            "needs": [{**vars(need), "fits": need.fits} for need in self.needs],
            "fits": self.fits,
            "notes": list(self.notes),
        }


def make_plan(
    recipe: Recipe,
    config: dict[str, Any],
    counts: Counts,
    machine: Machine,
    choices: Choices | None = None,
    speeds: Speeds | None = None,
    tau: float = phases.ASSUMED_TAU,
) -> Plan:
    """config: the target's raw text config. speeds: of this machine, where it was measured.
    tau: what held-out evaluations are taken to accept.

    Raises RecipeError where the recipe describes no draft for that target, DataError where no row is left.
    """
    choices = choices or Choices()
    dims = dimensions(config)
    # A block draft's mask token is chosen from the target's vocabulary; it does not change any size.
    mask = None if recipe.algorithm == "eagle3" else recipe.draft.mask_token_id or 0
    spec = draft_spec(recipe, config, mask)
    size, own = totals(recipe, counts), own_parameters(spec)
    disk = disk_figures(recipe, dims, spec, own, size, choices)
    memory, host = memory_figures(recipe, dims, spec, own, size, machine)
    work = work_figures(recipe, dims, spec, size, choices)
    asked = Asked(recipe, dims, spec, own, size, machine, choices, speeds, tau)
    steps, seconds = time_figures(asked, work)
    sections = {
        "parameters": {
            "target": target_parameters(dims),
            "of them, passed by a token": body_weights(dims, dims.chosen),
            "draft's own": draft_parameters(spec, own),
        },
        "data": _data_figures(recipe, size) | {"optimiser steps": steps},
        "disk": disk,
        "memory of the accelerator" if machine.memory else "memory for training": memory,
        "memory of the host": host,
        "operations": work,
        "time": seconds,
    }
    watts = machine.watts if speeds is None else speeds.watts or machine.watts
    notes = [*counts.notes, *_machine_notes(machine, speeds), f"held-out evaluations at τ {tau:g} (assumed)"]
    if watts:
        sections["energy"] = {name: phases.energy(spent, watts) for name, spent in seconds.items()}
    else:
        notes.append("no energy: there is no meter here, and no --watts")
    return Plan(
        recipe, machine, choices, sections, _needs(choices, disk, memory, host, machine), tuple(notes)
    )


def own_parameters(spec: DraftSpec) -> int:
    """Of the draft itself; embedding and head are the target's."""
    return _own_parameters(spec)


@lru_cache(maxsize=64)
def _own_parameters(spec: DraftSpec) -> int:
    return sum(math.prod(shape) for shape in draft_shapes(spec).values())


def _machine_notes(machine: Machine, speeds: Speeds | None) -> Iterator[str]:
    if speeds is not None:
        yield f"speeds measured on {speeds.machine}"
        if machine.memory is None and speeds.share < phases.QUIET:
            yield (
                f"it was busy: the measurement got {speeds.share:.0%} of a core, so the hours are "
                "a busy machine's; --measure again once it is quiet"
            )
        return
    yield (
        f"{machine.name}: {number(machine.bfloat16)} bfloat16 operations/s, of which {machine.share:.0%} "
        f"reached (assumed); {number(machine.bandwidth)} bytes/s, {machine.bandwidth_share:.0%} reached "
        "(assumed); "
        f"{machine.launch * 1e3:g} ms of Python per layer and decoding step in process (assumed)"
        + (f"; {machine.watts:g} W" if machine.watts else "")
    )


def _data_figures(recipe: Recipe, size: Totals) -> dict[str, Figure]:
    return {
        "rows": figure("rows", "rows", rows=size.rows),
        "tokens": figure("tokens", "prompts + answers", prompts=size.prompts, answers=size.supervised),
        "prompt tokens": figure("tokens", "prompts", prompts=size.prompts),
        "answer tokens": figure("tokens", "answers", answers=size.supervised),
        "supervised share": figure("", "answers / tokens", answers=size.supervised, tokens=size.tokens),
        "tokens computed per token": figure("", "padded", padded=size.padded),
    }


# ── disk ──────────────────────────────────────────────────────────────────────────────────────────────


def disk_figures(
    recipe: Recipe, dims: Dimensions, spec: DraftSpec, own: int, size: Totals, choices: Choices
) -> dict[str, Figure]:
    """Bytes of the answers, of every source of features, and of the checkpoints."""
    found = {}
    if not choices.answered:
        found["answers"] = figure(
            "bytes",
            "prompts * text + answers * (text + id) + rows * line",
            prompts=size.prompts,
            answers=size.supervised,
            text=4,
            id=7,
            rows=size.rows,
            line=700,
        )
    found["features online"] = figure("bytes", "nothing", nothing=0)
    for positions in ("all", "read"):
        for store in ("bf16", "fp8", "int8"):
            found[cache_name(store, positions)] = recipe_cache(recipe, dims, spec, size, store, positions)
    found["checkpoints"] = figure(
        "bytes",
        "own * (kept * (width + moments) + width)",
        own=own,
        kept=KEPT_CHECKPOINTS + 1,
        width=BYTES[recipe.precision],
        moments=12,
    )
    return found


def cache_name(store: str, positions: str) -> str:
    return f"cache in {store}, " + ("all positions" if positions == "all" else "what the loss reads")


def recipe_cache(
    recipe: Recipe, dims: Dimensions, spec: DraftSpec, size: Totals, store: str, positions: str
) -> Figure:
    """Bytes of a recipe's feature cache. Features are context, so they are kept everywhere."""
    taught = recipe.loss.l1 > 0 or recipe.loss.confidence > 0
    share = read_share(recipe.algorithm, size.supervised / size.tokens, teacher=taught)
    return cache_bytes(
        size.tokens,
        dims.hidden,
        len(spec.target_layer_ids),
        store,
        last_share=1.0 if positions == "all" else share,
    )


# ── memory ────────────────────────────────────────────────────────────────────────────────────────────


def memory_figures(
    recipe: Recipe, dims: Dimensions, spec: DraftSpec, own: int, size: Totals, machine: Machine
) -> tuple[dict[str, Figure], dict[str, Figure]]:
    """(where the model is, beside it on the host): bytes while training."""
    micro = min(recipe.optim.micro_batch_size or recipe.optim.batch_size, recipe.optim.batch_size)
    length = size.longest
    anchors = min(recipe.num_anchors, length)
    loss_rows = micro * (length if recipe.algorithm == "eagle3" else anchors * spec.block)
    rows = min(phases.HELD_OUT_ROWS, recipe.eval_prompts)
    context = size.prompts / size.rows + recipe.eval_max_new_tokens + spec.block + 1
    found = {
        "target weights": figure(
            "bytes", "parameters * width", parameters=dims.total, width=BYTES[dims.dtype]
        ),
        "draft, gradients, optimiser": figure(
            "bytes",
            "own * each",
            own=own,
            each=state_bytes_per_parameter(recipe.precision, recipe.optim.states),
        ),
        "features of a micro-batch": figure(
            "bytes",
            "sequences * length * width * hidden * (2 * layers + 1)",
            sequences=micro,
            length=length,
            width=BYTES[dims.dtype],
            hidden=dims.hidden,
            layers=len(spec.target_layer_ids),
        ),
        "activations of a micro-batch": activation_bytes(spec, recipe.precision, micro, length, anchors),
        "scores in passing": passing_bytes(spec, recipe.precision, micro, length),
        "head and loss": head_bytes(spec, loss_rows),
        "held-out slots": slot_bytes(dims, spec, rows, context),
        "held-out distributions": figure(
            "bytes",
            "rows * (2 * slots + 1) * vocab * 4 * copies",
            rows=rows,
            slots=spec.block,
            vocab=dims.vocab,
            copies=3,
        ),
    }
    held_out = ("held-out slots", "held-out distributions")
    step = ("features of a micro-batch", "activations of a micro-batch", "scores in passing", "head and loss")
    found["at most at once"] = figure(
        "bytes",
        "weights + state + max(step, held_out)",
        weights=found["target weights"],
        state=found["draft, gradients, optimiser"],
        step=sum(float(found[name]) for name in step),
        held_out=sum(float(found[name]) for name in held_out),
    )
    host = {
        "program": figure("bytes", "process", process=PROCESS_BYTES),
        "tokens of the rows": figure("bytes", "tokens * each", tokens=size.tokens, each=ROW_BYTES),
    }
    elsewhere = machine.memory is not None
    host["at most at once"] = figure(
        "bytes",
        "program + max(rows, loading)" if elsewhere else "program + rows + training",
        program=PROCESS_BYTES,
        rows=host["tokens of the rows"],
        loading=found["target weights"],
        training=found["at most at once"],
    )
    return found, host


def _needs(
    choices: Choices,
    disk: dict[str, Figure],
    memory: dict[str, Figure],
    host: dict[str, Figure],
    machine: Machine,
) -> tuple[Need, ...]:
    written = [disk["checkpoints"], *([disk["answers"]] if "answers" in disk else [])]
    if choices.features == "cache":
        written.append(disk[cache_name(choices.store, choices.positions)])
    needs = []
    if choices.free_disk is not None:
        needs.append(Need("disk", sum(map(float, written)), choices.free_disk))
    if machine.memory is not None:
        needs.append(Need("accelerator memory", float(memory["at most at once"]), USABLE * machine.memory))
    if machine.host is not None:
        needs.append(Need("host memory", float(host["at most at once"]), machine.host))
    return tuple(needs)


# ── operations and time ───────────────────────────────────────────────────────────────────────────────


def work_figures(
    recipe: Recipe, dims: Dimensions, spec: DraftSpec, size: Totals, choices: Choices
) -> dict[str, Figure]:
    """Operations of answering everything once, and of one epoch of features and of training."""
    eagle3 = recipe.algorithm == "eagle3"
    padded = size.tokens * size.padded
    reach = size.reach * size.padded
    layers = draft_flops(spec, size.rows, padded / size.rows, reach, size.anchors)
    taught = 1.0 if eagle3 or recipe.loss.l1 or recipe.loss.confidence else 1 / LOG_EVERY
    rows = size.supervised * spec.block if eagle3 else size.rows * size.anchors * size.slots
    head = head_flops(spec, rows, taught)
    answers = size.supervised + size.rows
    return {
        "regeneration": forward_flops(dims, size.tokens, size.reach / 2, logits=answers),
        "features, an epoch": forward_flops(dims, padded, reach),
        "draft layers, an epoch": layers,
        "heads, an epoch": head,
        "training, an epoch": figure("FLOPs", "layers + heads", layers=layers, heads=head),
    }


@dataclass(frozen=True)
class Asked:
    """What the time of a plan depends on."""

    recipe: Recipe
    dims: Dimensions
    spec: DraftSpec
    own: int
    size: Totals
    machine: Machine
    choices: Choices
    speeds: Speeds | None
    tau: float

    @property
    def per_epoch(self) -> int:
        return max(math.ceil(self.size.rows / self.recipe.optim.batch_size), 1)


def time_figures(asked: Asked, work: dict[str, Figure]) -> tuple[Figure, dict[str, Figure]]:
    """(optimiser steps, seconds by phase). Measured steps have their online features in them; from operations
    the two are shown apart."""
    found: dict[str, Figure] = {}
    if asked.speeds is not None:
        found["loading"] = figure("s", "load", load=asked.speeds.load)
    if not asked.choices.answered:
        found["regeneration"] = _regeneration(asked)
    steps, passes = (_computed_steps if asked.speeds is None else _measured_steps)(asked, work)
    found |= passes
    found["held-out evaluation"] = _held_out(asked, steps.value)
    total, parts = sum(each.value for each in found.values()), [number(f.value) for f in found.values()]
    found["all"] = Figure(total, "s", " + ".join(found), " + ".join(parts))
    return steps, found


def _computed_steps(asked: Asked, work: dict[str, Figure]) -> tuple[Figure, dict[str, Figure]]:
    """Features and training from their operations."""
    recipe, machine, dtype = asked.recipe, asked.machine, asked.dims.dtype
    features = phases.computed(machine, work["features, an epoch"], dtype)
    training = phases.computed(machine, work["training, an epoch"], recipe.precision)
    online = asked.choices.features == "online"
    step = (float(training) + float(features) * online) / asked.per_epoch
    steps = optimiser_steps(recipe, asked.per_epoch, step)
    epochs = steps.value / asked.per_epoch
    return steps, {
        "features": figure("s", "passes * epoch", passes=epochs if online else 1, epoch=features),
        "training": figure("s", "epochs * epoch", epochs=epochs, epoch=training),
    }


def _measured_steps(asked: Asked, work: dict[str, Figure]) -> tuple[Figure, dict[str, Figure]]:
    """Training as its steps were timed, and what is around them."""
    assert asked.speeds is not None
    recipe, speed = asked.recipe, asked.speeds.train[phases.speed_key(asked.recipe)]
    steps = optimiser_steps(recipe, asked.per_epoch, speed.step)
    return steps, {
        "training": figure("s", "steps * step", steps=steps, step=speed.step),
        "setup and checkpoints": figure(
            "s",
            "setup + rows * encode + saved * checkpoint",
            setup=speed.setup,
            rows=asked.size.rows,
            encode=asked.speeds.encode,
            saved=math.floor(steps.value / recipe.checkpoint_every_steps) + 2,
            checkpoint=speed.checkpoint,
        ),
    }


def optimiser_steps(recipe: Recipe, per_epoch: int, step: float) -> Figure:
    """Steps until the first of the recipe's limits; `step` is one's seconds."""
    optim = recipe.optim
    limits: list[Figure] = []
    if optim.max_steps is not None:
        limits.append(figure("steps", "max_steps", max_steps=optim.max_steps))
    if optim.epochs is not None:
        limits.append(figure("steps", "ceil(epochs * per_epoch)", epochs=optim.epochs, per_epoch=per_epoch))
    if optim.max_minutes is not None:
        limits.append(figure("steps", "ceil(60 * minutes / step)", minutes=optim.max_minutes, step=step))
    return min(limits, key=float)


def _regeneration(asked: Asked) -> Figure:
    size, dims, machine, batch = asked.size, asked.dims, asked.machine, asked.choices.batch
    if asked.speeds is not None:
        return phases.measured_answers(asked.speeds, math.ceil(size.rows), batch)
    if machine.memory is not None:
        # An engine holds no more answers at once than their keys and values have room for.
        each = size.length * dims.layers * dims.kv * BYTES[dims.dtype]
        room = (USABLE * machine.memory - dims.total * BYTES[dims.dtype]) / each
        batch = max(1, min(batch, math.floor(room)))
    eager = asked.choices.engine == "process"
    step = phases.decoding_step(machine, dims, batch, 1, size.length, eager=eager)
    prefill = phases.computed(machine, forward_flops(dims, size.prompts, size.length), dims.dtype)
    return figure(
        "s",
        "answers / batch * step + prefill + rows * layers * launch",
        answers=size.supervised,
        batch=batch,
        step=step,
        prefill=prefill,
        rows=size.rows,
        layers=dims.layers,
        launch=machine.launch if eager else 0.0,
    )


def _held_out(asked: Asked, steps: float) -> Figure:
    recipe, dims, spec, machine = asked.recipe, asked.dims, asked.spec, asked.machine
    if asked.speeds is not None:
        one = phases.measured_held_out(asked.speeds, recipe, asked.tau)
    else:
        rows = min(phases.HELD_OUT_ROWS, recipe.eval_prompts)
        prompt = asked.size.prompts / asked.size.rows
        context = prompt + recipe.eval_max_new_tokens
        one = figure(
            "s",
            "prompts * prefill + ceil(prompts / rows) * new_tokens / tau * (verify + propose)",
            prompts=recipe.eval_prompts,
            prefill=phases.decoding_step(machine, dims, 1, prompt, prompt),
            rows=rows,
            new_tokens=recipe.eval_max_new_tokens,
            tau=asked.tau,
            verify=phases.decoding_step(machine, dims, rows, spec.block + 1, context),
            propose=phases.draft_step(machine, spec, asked.own, recipe.precision),
        )
    return figure("s", "times * one", times=math.ceil(steps / recipe.eval_every_steps), one=one)
