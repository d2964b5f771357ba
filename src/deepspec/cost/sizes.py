"""Bytes: on disk, where the model is, and in the host's memory; and which of them have to fit."""

from __future__ import annotations

from typing import NamedTuple

from deepspec.config import HELD_OUT_ROWS, KEPT_CHECKPOINTS, Recipe
from deepspec.cost import formulas
from deepspec.cost.formulas import Figure, figure
from deepspec.cost.inputs import Inputs
from deepspec.features.formats import STORED_BYTES, TOKEN_BYTES

USABLE = 0.92
"""Share of an accelerator's memory that is left by its context and by fragmentation: an assumption."""
PROCESS_BYTES = 1.5e9
"""Host memory of the program itself, libraries included: an assumption."""


class Need(NamedTuple):
    """Bytes wanted of one kind of storage, and the bytes that it has."""

    what: str
    wants: float
    has: float

    @property
    def fits(self) -> bool:
        return self.wants <= self.has


def disk_figures(inputs: Inputs) -> dict[str, Figure]:
    """Bytes of the answers, of the features from every source, and of the checkpoints."""
    names, recipe, found = inputs.names, inputs.recipe, {}
    if not inputs.counts.answered:
        formula = "prompts * text + answers * (text + id) + rows * line"
        found["answers"] = figure("bytes", formula, names, text=4, id=7, line=700)
    found["features online"] = figure("bytes", "nothing", nothing=0)
    # Features are context, read almost everywhere; a teacher is read at as many positions as are supervised.
    share = names["answers"] / names["tokens"] if inputs.taught else 0.0
    hidden, layers = int(names["hidden"]), int(names["feature_layers"])
    for store in STORED_BYTES:
        each = formulas.cache_bytes_per_token(hidden, layers, store, last_share=share)
        found[f"cache in {store}"] = figure("bytes", "tokens * bytes_per_token", names, bytes_per_token=each)
    # One more is written before the oldest goes; the best one has no optimiser.
    formula = "own * (kept * (draft_width + master + moments) + draft_width) + matrices * kept * momentum"
    kept, moments = KEPT_CHECKPOINTS + 1, formulas.moment_bytes(recipe.optim.states)
    found["checkpoints"] = figure(
        "bytes", formula, names, kept=kept, master=4, moments=moments, momentum=momentum(recipe)
    )
    return found


def momentum(recipe: Recipe) -> float:
    """Bytes that a parameter takes more if Muon steps it in AdamW's place."""
    if recipe.optim.matrices == "adamw":
        return 0
    return formulas.MOMENTUM_BYTES - formulas.moment_bytes(recipe.optim.states)


def memory_figures(inputs: Inputs) -> dict[str, Figure]:
    """Bytes where the model is: while answering, in a step of training, in a held-out evaluation."""
    recipe, names = inputs.recipe, inputs.names
    micro, length = micro_rows(inputs), names["longest"]
    anchors = min(recipe.num_anchors, length)
    loss_rows = micro * names["block"] * (anchors if names["parallel"] else length)
    rows = min(HELD_OUT_ROWS, recipe.eval_prompts)
    context = names["prompts"] / names["rows"] + recipe.eval_max_new_tokens + names["block"] + 1
    base = {"target weights": target_bytes(inputs), "draft, gradients, optimiser": draft_bytes(inputs)}
    features = "sequences * length * width * hidden * (2 * feature_layers + 1)"
    step = {
        "features of a micro-batch": figure("bytes", features, names, sequences=micro, length=length),
        "activations of a micro-batch": formulas.activation_bytes(
            names, micro, length, anchors, inputs.fused
        ),
        "head and loss": formulas.head_bytes(
            names, loss_rows, min(loss_rows, micro * length), inputs.machine.memory is not None, inputs.fused
        ),
    }
    laws = "sequences * (2 * block + 1) * vocab * 4 * copies"
    held_out = {
        "held-out slots": formulas.slot_bytes(names, rows, context),
        "held-out distributions": figure("bytes", laws, names, sequences=rows, copies=3),
    }
    weights, state = base.values()
    found = base | step | held_out
    found["training"] = figure(
        "bytes",
        "weights + state + max(step, held_out)",
        weights=weights,
        state=state,
        step=sum(map(float, step.values())),
        held_out=sum(map(float, held_out.values())),
    )
    if inputs.answers_here:
        slots = formulas.slot_bytes(names | {"draft_layers": 0}, names["batch"], length)
        # One device writes the answers, alone: a target that is split for training is whole there.
        whole = figure("bytes", "parameters * width", names)
        found["answering"] = figure("bytes", "weights + slots", weights=whole, slots=slots)
    return found


def target_bytes(inputs: Inputs) -> Figure:
    """Bytes of the target's weights on each device; the layers' may be split over them."""
    if inputs.gpus == 1 or not inputs.recipe.shard_target:
        return figure("bytes", "parameters * width", inputs.names)
    formula = "width * (parameters - body * (gpus - 1) / gpus)"
    return figure("bytes", formula, inputs.names, gpus=inputs.gpus)


def micro_rows(inputs: Inputs) -> int:
    """Rows of the longest kind that pass the models together on each device."""
    optim, longest = inputs.recipe.optim, int(inputs.names["longest"])
    limits = [optim.batch_size // inputs.gpus]
    limits += [optim.micro_batch_size] if optim.micro_batch_size else []
    limits += [max(optim.micro_batch_tokens // longest, 1)] if optim.micro_batch_tokens else []
    return min(limits)


def draft_bytes(inputs: Inputs) -> Figure:
    """Bytes of the draft in training on each device. If it is split over them, each holds its part of the
    float32 weights, gradients and moments, and in a pass the gathered weights, their gradients, and these
    again in float32 while they are summed."""
    recipe, names = inputs.recipe, inputs.names
    if inputs.gpus > 1 and recipe.shard_draft:
        formula = "own * (2 * draft_width + 4 + 16 / gpus)"
        return figure("bytes", formula, names, gpus=inputs.gpus)
    each = formulas.state_bytes_per_parameter(recipe.precision, recipe.optim.states, inputs.offloads)
    formula = "own * each + matrices * momentum"
    return figure("bytes", formula, names, each=each, momentum=momentum(recipe))


def host_figures(inputs: Inputs, memory: dict[str, Figure]) -> dict[str, Figure]:
    """Bytes of host memory: besides an accelerator's, or everything if there is none."""
    rows = figure("bytes", "tokens * token", inputs.names, token=TOKEN_BYTES)
    given: dict[str, float | Figure] = {"program": PROCESS_BYTES, "rows": rows}
    if inputs.machine.memory is not None:
        loading = figure("bytes", "parameters * width", inputs.names)
        formula = "program + max(rows, loading)"
        if inputs.offloads:
            formula += " + own * offloaded"
            given |= {"own": inputs.names["own"], "offloaded": formulas.OFFLOADED_BYTES}
        if inputs.gpus > 1:  # each process loads the target, and keeps rows of its own
            formula, given = f"gpus * ({formula})", given | {"gpus": inputs.gpus}
        total = figure("bytes", formula, **given, loading=loading)
    else:
        most = max(float(memory[verb]) for verb in ("training", "answering") if verb in memory)
        total = figure("bytes", "program + rows + most", **given, most=most)
    return {
        "program": figure("bytes", "program", program=PROCESS_BYTES),
        "tokens of the rows": rows,
        "at most at once": total,
    }


def needs_of(inputs: Inputs) -> tuple[Need, ...]:
    """What has to fit. Raises RecipeError and DataError as `Inputs.names` does."""
    disk, memory, machine = disk_figures(inputs), memory_figures(inputs), inputs.machine
    needs = []
    if inputs.free_disk is not None:
        written = ["checkpoints", "answers"] + [f"cache in {inputs.store}"] * (inputs.features == "cache")
        wants = sum(float(disk[name]) for name in written if name in disk)
        needs.append(Need("disk", wants, inputs.free_disk))
    if machine.memory is not None:
        verbs = [verb for verb in ("training", "answering") if verb in memory]
        usable = USABLE * machine.memory
        needs += [Need(f"accelerator memory, {verb}", float(memory[verb]), usable) for verb in verbs]
    if machine.host is not None:
        wants = float(host_figures(inputs, memory)["at most at once"])
        needs.append(Need("host memory", wants, machine.host))
    return tuple(needs)
