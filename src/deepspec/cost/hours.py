"""Operations, and the seconds that they take: on a machine's row, or by its measured speeds."""

from __future__ import annotations

import math

from deepspec.config import Recipe
from deepspec.cost import phases
from deepspec.cost.asked import Asked
from deepspec.cost.costs import BYTES, Figure, draft_flops, figure, forward_flops, head_flops, number
from deepspec.cost.room import USABLE
from deepspec.train.loop import LOG_EVERY


def work_figures(asked: Asked) -> dict[str, Figure]:
    """Operations of answering everything once, and of one epoch of features and of training."""
    recipe, dims, spec, size = asked.recipe, asked.dims, asked.spec, asked.size
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


def time_figures(asked: Asked, work: dict[str, Figure]) -> tuple[Figure, dict[str, Figure]]:
    """(optimiser steps, seconds by phase). A measured step has its online features in it; from operations the
    two are shown apart."""
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
    """Training as its steps were timed, and what is around them. With a cache rows are encoded, and features
    computed, once and before."""
    assert asked.speeds is not None
    recipe, speed = asked.recipe, asked.speeds.train[phases.speed_key(asked.recipe)]
    encoding = figure("s", "rows * encode", rows=asked.size.rows, encode=asked.speeds.encode)
    cached = asked.choices.features == "cache"
    step = (
        figure("s", "step - features", step=speed.step, features=speed.features)
        if cached
        else figure("s", "step", step=speed.step)
    )
    found: dict[str, Figure] = {}
    if cached:
        found["features"] = figure(
            "s",
            "encoding + tokens * cache_token",
            encoding=encoding,
            tokens=asked.size.tokens,
            cache_token=asked.speeds.cache_token,
        )
    steps = optimiser_steps(recipe, asked.per_epoch, float(step))
    return steps, found | {
        "training": figure("s", "steps * step", steps=steps, step=step),
        "setup and checkpoints": figure(
            "s",
            "setup + encoding + saved * checkpoint",
            setup=speed.setup,
            encoding=0.0 if cached else encoding,
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
