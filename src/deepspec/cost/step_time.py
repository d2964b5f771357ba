"""Seconds of the parts of a run: each source of seconds is one class here, chosen in `deepspec.planning`."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from deepspec.config import HELD_OUT_ROWS, LOG_EVERY, Recipe
from deepspec.cost.formulas import Figure, Names, draft_flops, figure, forward_flops, head_flops, number
from deepspec.cost.inputs import Inputs
from deepspec.cost.machines import HOST_BANDWIDTH, HOST_LINK, Machine
from deepspec.cost.sizes import USABLE
from deepspec.drafts import ALGORITHMS

ASSUMED_TAU = 2.0
"""Accepted length of a draft in training, which the time of a held-out evaluation depends on."""
QUIET = 0.7
"""A measurement that got a smaller share of a core was disturbed by other work."""


def operations(inputs: Inputs) -> dict[str, Figure]:
    """Operations of answering everything once, and of one epoch of features and of training."""
    names = inputs.names
    rows, padded, reach = names["rows"], names["tokens"] * names["padding"], names["reach"] * names["padding"]
    # An anchor is anywhere in the answer; a row of an unrolled draft meets half its sequence.
    keys = reach - names["answers"] / rows / 2 if names["parallel"] else reach / 2
    layers = draft_flops(names, rows, padded / rows, keys, names["anchors"])
    # Without a teacher in the loss, the target's head runs only in the steps whose metrics are logged.
    taught = 1.0 if inputs.taught else 1 / LOG_EVERY
    blocks, unrolled = rows * names["anchors"] * names["slots"], names["answers"] * names["block"]
    loss_rows = blocks if names["parallel"] else unrolled
    heads = head_flops(names, loss_rows, taught * min(loss_rows, names["answers"]))
    logits = names["answers"] + rows
    return {
        "regeneration": forward_flops(names, names["tokens"], names["reach"] / 2, logits=logits),
        "features, an epoch": forward_flops(names, padded, reach),
        "draft layers, an epoch": layers,
        "heads, an epoch": heads,
        "training, an epoch": figure("FLOPs", "layers + heads", layers=layers, heads=heads),
    }


@dataclass(frozen=True)
class FromRow:
    """Seconds from a machine's peaks, and from the shares of them that are assumed to be reached.

    A pass over whole sequences takes its operations over the peak reached, a decoding step the larger of
    reading weights and keys and of computing, plus what Python adds to each layer.

    answers: until all answers are written. features_step: what the target's pass adds to an optimiser step;
    draft_step: the rest of it. offloaded_step: what an optimiser on the host adds to it, if that is not in
    `draft_step`. cache: until the features of all rows are in a cache. held_out: one held-out
    evaluation. overhead: loading, setting up and checkpoints, for so many steps; None if they are not known.
    notes: what the seconds rest on, in sentences.
    """

    machine: Machine

    def notes(self, inputs: Inputs) -> list[str]:
        row = self.machine
        return [
            f"{row.name} is assumed to reach {row.share:.0%} of {number(row.bfloat16)} bfloat16 operations/s "
            f"and {row.bandwidth_share:.0%} of {number(row.bandwidth)} bytes/s, and Python to add "
            f"{row.launch * 1e3:g} ms to each layer of a decoding step in process"
        ]

    def pass_seconds(self, flops: Figure, width: float) -> Figure:
        """Seconds of passes over whole sequences, in numbers of `width` bytes."""
        return figure("s", "flops / (peak * share)", self.machine.numbers(width), flops=flops)

    def decoding_step(
        self, names: Names, sequences: float, each: float, context: float, eager: bool = True
    ) -> Figure:
        """Seconds of one decoding step of some sequences with `each` new tokens after `context` others.

        eager: with what Python adds to each layer; an inference engine has captured it away.
        """
        return figure(
            "s",
            "max((width * min(parameters, sequences * each * active + parameters - body)"
            " + sequences * context * width * layers * kv) / (bandwidth * bandwidth_share),"
            " sequences * each * 2 * (active + vocab * hidden) / (peak * share)) + layers * launch",
            names | self.machine.numbers(names["width"]) | ({} if eager else {"launch": 0.0}),
            sequences=sequences,
            each=each,
            context=context,
        )

    def answers(self, inputs: Inputs) -> Figure:
        names, batch, eager = inputs.names, inputs.names["batch"], inputs.engine == "process"
        if self.machine.memory is not None:
            # An engine holds no more answers at once than their keys and values have room for.
            each = names["length"] * names["layers"] * names["kv"] * names["width"]
            room = USABLE * self.machine.memory - names["parameters"] * names["width"]
            batch = max(1, min(batch, math.floor(room / each)))
        prompts = forward_flops(names, names["prompts"], names["length"])
        return figure(
            "s",
            "answers / batch * step + prefill + rows * layers * launch",
            names,
            batch=batch,
            step=self.decoding_step(names, batch, 1, names["length"], eager),
            prefill=self.pass_seconds(prompts, names["width"]),
            launch=self.machine.launch if eager else 0.0,
        )

    def features_step(self, inputs: Inputs) -> Figure:
        return figure("s", "epoch / steps", epoch=self.cache(inputs), steps=inputs.per_epoch)

    def draft_step(self, inputs: Inputs) -> Figure:
        epoch = self.pass_seconds(operations(inputs)["training, an epoch"], inputs.names["draft_width"])
        return figure("s", "epoch / steps", epoch=epoch, steps=inputs.per_epoch)

    def offloaded_step(self, inputs: Inputs) -> Figure | None:
        if not inputs.offloads:
            return None
        # A float32 gradient comes, and a float32 weight goes. AdamW reads both and its two moments, and
        # writes all but the gradient.
        formula = "own * (2 * 4 / link + 7 * 4 / host)"
        return figure("s", formula, inputs.names, link=HOST_LINK, host=HOST_BANDWIDTH)

    def cache(self, inputs: Inputs) -> Figure:
        return self.pass_seconds(operations(inputs)["features, an epoch"], inputs.names["width"])

    def held_out(self, inputs: Inputs) -> Figure:
        names, recipe = inputs.names, inputs.recipe
        rows, prompt = min(HELD_OUT_ROWS, recipe.eval_prompts), names["prompts"] / names["rows"]
        propose = figure(
            "s",
            "passes * (draft_width * own / (bandwidth * bandwidth_share) + draft_layers * launch)",
            names | self.machine.numbers(names["draft_width"]),
            passes=ALGORITHMS[recipe.algorithm].passes(int(names["block"])),
        )
        return figure(
            "s",
            "prompts * prefill + ceil(prompts / rows) * new_tokens / tau * (verify + propose)",
            prompts=recipe.eval_prompts,
            prefill=self.decoding_step(names, 1, prompt, prompt),
            rows=rows,
            new_tokens=recipe.eval_max_new_tokens,
            tau=ASSUMED_TAU,
            verify=self.decoding_step(names, rows, names["block"] + 1, prompt + recipe.eval_max_new_tokens),
            propose=propose,
        )

    def overhead(self, inputs: Inputs, steps: float) -> Figure | None:
        return None


@dataclass(frozen=True)
class TrainSpeed:
    """Seconds of the parts of a recipe's training. step: an optimiser step, `features` of them the target's
    pass. held_out_prompt, held_out_round: prefill and round of a held-out evaluation. setup: from the call to
    the first step."""

    step: float
    features: float
    held_out_prompt: float
    held_out_round: float
    checkpoint: float
    setup: float


@dataclass(frozen=True)
class Speeds:
    """What was measured on this machine, in seconds unless it says otherwise.

    load: loading the target. encode: one training row. cache_token: one token into a feature cache. prompt: a
    prefill. A round of plain decoding takes round_base + round_row × rows in flight. answers: token counts of
    answers sampled from training prompts, in the order of decoding. stretch: how many prompts for each row in
    flight are decoded as one. train: by `speed_key`. watts: while training, None without a meter. share: of a
    core that the measurement got; well below one, other work slowed it.
    """

    machine: str
    load: float
    encode: float
    cache_token: float
    prompt: float
    round_base: float
    round_row: float
    answers: list[int]
    stretch: int = 8
    train: dict[str, TrainSpeed] = field(default_factory=dict)
    watts: float | None = None
    share: float = 1.0


def speed_key(recipe: Recipe) -> str:
    """What a step's time depends on: the recipe without its name, data, budget and seed."""
    optim = recipe.optim
    size = f"b{optim.batch_size}x{optim.micro_batch_size or optim.batch_size}"
    draft = "-".join(str(value) for value in recipe.draft.model_dump().values() if value is not None)
    parts = [recipe.algorithm, size, recipe.num_anchors, recipe.data.max_length, recipe.precision, draft]
    parts += ["offloaded"] if recipe.offload_optimizer else []
    return "/".join(map(str, parts))


def rounds_needed(lengths: Sequence[float], slots: int) -> tuple[float, float]:
    """(rounds until all are done, rows summed over those rounds) of answers of these lengths, decoded in
    `slots` slots: a finished row's slot goes to the next. The first token comes from the prefill."""
    free = [0.0] * slots
    for length in lengths:
        heapq.heappush(free, heapq.heappop(free) + max(length - 1.0, 0.0))
    return max(free), sum(max(length - 1.0, 0.0) for length in lengths)


@dataclass(frozen=True)
class Measured:
    """The same seconds as they were measured here (`deepspec.speeds`), the recipe's steps among them."""

    speeds: Speeds

    def notes(self, inputs: Inputs) -> list[str]:
        found = [f"the speeds were measured on {self.speeds.machine}"]
        if inputs.machine.memory is None and self.speeds.share < QUIET:  # the model runs on the processor
            found.append(
                f"the machine was busy: the measurement got {self.speeds.share:.0%} of a core, so the hours "
                "are too long; run again with --measure once it is quiet"
            )
        return found

    def _train(self, inputs: Inputs) -> TrainSpeed:
        return self.speeds.train[speed_key(inputs.recipe)]

    def _lengths(self, count: int) -> list[int]:
        """`count` answer lengths spread as those of the sample are, in its order."""
        sample = self.speeds.answers
        return [sample[i * len(sample) // count] for i in range(count)]

    def answers(self, inputs: Inputs) -> Figure:
        slots, prompts = int(inputs.names["batch"]), math.ceil(inputs.names["rows"])
        lengths, count = self._lengths(prompts), math.ceil(prompts / (self.speeds.stretch * slots))
        # Prompts decide which lengths are decoded as one stretch: here, every stretch has its share of all.
        parts = [rounds_needed(lengths[i::count], slots) for i in range(count)]
        rounds, row_rounds = map(sum, zip(*parts, strict=True))
        return figure(
            "s",
            "prompts * prefill + rounds * base + row_rounds * row",
            prompts=prompts,
            prefill=self.speeds.prompt,
            rounds=rounds,
            base=self.speeds.round_base,
            row_rounds=row_rounds,
            row=self.speeds.round_row,
        )

    def features_step(self, inputs: Inputs) -> Figure:
        return figure("s", "features", features=self._train(inputs).features)

    def draft_step(self, inputs: Inputs) -> Figure:
        speed = self._train(inputs)
        return figure("s", "step - features", step=speed.step, features=speed.features)

    def offloaded_step(self, inputs: Inputs) -> Figure | None:
        return None

    def cache(self, inputs: Inputs) -> Figure:
        each = {"encode": self.speeds.encode, "cache_token": self.speeds.cache_token}
        return figure("s", "rows * encode + tokens * cache_token", inputs.names, **each)

    def held_out(self, inputs: Inputs) -> Figure:
        recipe, speed = inputs.recipe, self._train(inputs)
        most, lengths = recipe.eval_max_new_tokens, self._lengths(recipe.eval_prompts)
        rounds = [min(length, most) / ASSUMED_TAU for length in lengths]
        return figure(
            "s",
            "prompts * prefill + rounds * round",
            prompts=recipe.eval_prompts,
            prefill=speed.held_out_prompt,
            rounds=rounds_needed(rounds, min(HELD_OUT_ROWS, recipe.eval_prompts))[0],
            round=speed.held_out_round,
        )

    def overhead(self, inputs: Inputs, steps: float) -> Figure | None:
        speed, every = self._train(inputs), inputs.recipe.checkpoint_every_steps
        return figure(
            "s",
            "load + setup + rows * encode + saved * checkpoint",
            inputs.names,
            load=self.speeds.load,
            setup=speed.setup,
            # Rows that come from a cache were encoded for it.
            encode=0.0 if inputs.features == "cache" else self.speeds.encode,
            saved=math.floor(steps / every) + 2,
            checkpoint=speed.checkpoint,
        )


StepTime = FromRow | Measured
"""A source of seconds, each for a plan's inputs."""
