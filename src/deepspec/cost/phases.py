"""Seconds of every phase between prompts and a trained draft, from a machine's row or from measured speeds.

A row gives peaks and assumed shares: a pass over whole sequences takes its operations over the peak reached,
a decoding step the larger of reading weights and keys and of computing, plus what Python adds to each layer.
Measured speeds (`profile.py`) are seconds per step, round and prompt of this machine with this target.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from deepspec.answers.in_process import FLIGHTS
from deepspec.config import HELD_OUT_ROWS, Recipe
from deepspec.cost.costs import BYTES, Dimensions, Figure, figure
from deepspec.cost.machines import Machine
from deepspec.drafts.spec import DraftSpec

QUIET = 0.7
"""A measurement on processors that got less of a core was disturbed."""
ASSUMED_TAU = 2.0
"""Accepted length of a draft in training: what an evaluation takes depends on it."""


# ── measured speeds ───────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class TrainSpeed:
    """Seconds of one algorithm's parts. step: an optimiser step of `tokens` tokens, of which the target's own
    pass over them takes `features`. held_out_prompt, held_out_round: of a held-out evaluation. setup: from
    the call to the first step."""

    step: float
    features: float
    tokens: float
    held_out_prompt: float
    held_out_round: float
    checkpoint: float
    setup: float


@dataclass(frozen=True)
class Speeds:
    """What was measured on this machine. Seconds, unless said otherwise.

    load: of the target. encode: a training row. cache_token: a token into a feature cache. prompt: a prefill.
    A round of plain decoding takes round_base + round_row × rows in flight. answers, prompts: token counts of
    answers sampled from training prompts, in the order of decoding. methods: a round of one prompt decoded
    alone, by method. watts: while training, None without a meter. share: of a core that the measurement got;
    well below one, other work was in its way.
    """

    machine: str
    load: float
    encode: float
    cache_token: float
    prompt: float
    round_base: float
    round_row: float
    prompts: list[int]
    answers: list[int]
    train: dict[str, TrainSpeed] = field(default_factory=dict)
    methods: dict[str, float] = field(default_factory=dict)
    watts: float | None = None
    share: float = 1.0

    def plain(self) -> dict[str, Any]:
        return asdict(self)


def speeds_from(record: dict[str, Any]) -> Speeds:
    """The inverse of `Speeds.plain`. Raises TypeError for a record of another form."""
    train = {name: TrainSpeed(**each) for name, each in record["train"].items()}
    return Speeds(**{**record, "train": train})


def rounds_needed(lengths: Sequence[float], slots: int) -> tuple[float, float]:
    """(rounds until all are done, rows summed over those rounds) of answers of these lengths, decoded in
    `slots` slots: a finished row's slot goes to the next. The first token comes from the prefill."""
    free = [0.0] * slots
    for length in lengths:
        heapq.heappush(free, heapq.heappop(free) + max(length - 1.0, 0.0))
    return max(free), sum(max(length - 1.0, 0.0) for length in lengths)


def stretched(sample: Sequence[int], count: int) -> list[int]:
    """`count` lengths spread as the sample's are, in its order."""
    return [sample[i * len(sample) // count] for i in range(count)]


# ── phases on measured speeds ─────────────────────────────────────────────────────────────────────────


def measured_answers(speeds: Speeds, prompts: int, slots: int) -> Figure:
    """Seconds that `prompts` answers take in process, in stretches as `data regenerate` cuts them."""
    lengths, size = stretched(speeds.answers, prompts), FLIGHTS * slots
    # Which lengths share a stretch is decided by the prompts: here, every stretch has its share of all.
    count = math.ceil(prompts / size)
    parts = [rounds_needed(lengths[i::count], slots) for i in range(count)]
    rounds, row_rounds = (sum(part[k] for part in parts) for k in (0, 1))
    return figure(
        "s",
        "prompts * prefill + rounds * base + row_rounds * row",
        prompts=prompts,
        prefill=speeds.prompt,
        rounds=rounds,
        base=speeds.round_base,
        row_rounds=row_rounds,
        row=speeds.round_row,
    )


def measured_held_out(speeds: Speeds, recipe: Recipe, tau: float = ASSUMED_TAU) -> Figure:
    """Seconds of one held-out evaluation."""
    speed = speeds.train[speed_key(recipe)]
    lengths = stretched(speeds.answers, recipe.eval_prompts)
    cut = [min(length, recipe.eval_max_new_tokens) / tau for length in lengths]
    rounds, _ = rounds_needed(cut, min(HELD_OUT_ROWS, recipe.eval_prompts))
    return figure(
        "s",
        "prompts * prefill + rounds * round",
        prompts=recipe.eval_prompts,
        prefill=speed.held_out_prompt,
        rounds=rounds,
        round=speed.held_out_round,
    )


def speed_key(recipe: Recipe) -> str:
    """What a step's time depends on: the recipe without its name, data, budget and seed."""
    optim = recipe.optim
    size = f"b{optim.batch_size}x{optim.micro_batch_size or optim.batch_size}"
    draft = "-".join(str(value) for value in recipe.draft.model_dump().values() if value is not None)
    parts = (recipe.algorithm, size, recipe.num_anchors, recipe.data.max_length, recipe.precision, draft)
    return "/".join(map(str, parts))


# ── phases on a machine's row ─────────────────────────────────────────────────────────────────────────


def computed(machine: Machine, flops: float | Figure, precision: str) -> Figure:
    """Seconds of passes over whole sequences."""
    return figure(
        "s", "flops / (peak * share)", flops=flops, peak=machine.peak(precision), share=machine.share
    )


def decoding_step(
    machine: Machine, dims: Dimensions, rows: float, each: float, length: float, *, eager: bool = True
) -> Figure:
    """Seconds of one decoding step of `rows` rows with `each` new tokens at a context of `length`.

    eager: with what Python adds to each layer; an inference engine has captured it away.
    """
    return figure(
        "s",
        "max((width * min(total, rows * each * active + copies) + rows * length * width * layers * kv)"
        " / (bandwidth * bandwidth_share), rows * each * 2 * (active + vocab * hidden) / (peak * share))"
        " + layers * launch",
        width=BYTES[dims.dtype],
        total=dims.total,
        rows=rows,
        each=each,
        active=dims.active,
        copies=dims.total - dims.body,
        length=length,
        layers=dims.layers,
        kv=dims.kv,
        bandwidth=machine.bandwidth,
        bandwidth_share=machine.bandwidth_share,
        vocab=dims.vocab,
        hidden=dims.hidden,
        peak=machine.peak(dims.dtype),
        share=machine.share,
        launch=machine.launch if eager else 0.0,
    )


def draft_step(machine: Machine, spec: DraftSpec, own: int, precision: str) -> Figure:
    """Seconds of one proposal: the draft's weights read once (Eagle-3: once for each token)."""
    return figure(
        "s",
        "passes * (width * own / (bandwidth * bandwidth_share) + layers * launch)",
        passes=spec.block if spec.algorithm == "eagle3" else 1,
        width=BYTES[precision],
        own=own,
        bandwidth=machine.bandwidth,
        bandwidth_share=machine.bandwidth_share,
        layers=spec.num_layers,
        launch=machine.launch,
    )


def energy(seconds: float | Figure, watts: float) -> Figure:
    """Kilowatt-hours at full load."""
    return figure("kWh", "seconds * watts / 3600000", seconds=seconds, watts=watts)
