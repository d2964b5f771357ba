"""Bytes: on disk, where the model is, and beside it on the host; and which of them have to fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from deepspec.config import HELD_OUT_ROWS, KEPT_CHECKPOINTS
from deepspec.cost.asked import Asked
from deepspec.cost.costs import (
    BYTES,
    ROW_BYTES,
    Figure,
    activation_bytes,
    cache_bytes,
    figure,
    head_bytes,
    passing_bytes,
    read_share,
    slot_bytes,
    state_bytes_per_parameter,
)

USABLE = 0.92
"""Of an accelerator's memory, past what its context and fragmentation take: an assumption."""
PROCESS_BYTES = 1.5e9
"""Host memory of the program itself, libraries included: an assumption."""
STEP = ("features of a micro-batch", "activations of a micro-batch", "scores in passing", "head and loss")
HELD_OUT = ("held-out slots", "held-out distributions")


@dataclass(frozen=True)
class Need:
    """Bytes wanted of one kind, and those that are there."""

    what: str
    wants: float
    has: float

    @property
    def fits(self) -> bool:
        return self.wants <= self.has

    def plain(self) -> dict[str, Any]:
        """As JSON data."""
        return {**vars(self), "fits": self.fits}


# ── disk ──────────────────────────────────────────────────────────────────────────────────────────────


def disk_figures(asked: Asked) -> dict[str, Figure]:
    """Bytes of the answers, of every source of features, and of the checkpoints."""
    recipe, size, found = asked.recipe, asked.size, {}
    if not asked.choices.answered:
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
            found[cache_name(store, positions)] = recipe_cache(asked, store, positions)
    found["checkpoints"] = figure(
        "bytes",
        "own * (kept * (width + moments) + width)",
        own=asked.own,
        kept=KEPT_CHECKPOINTS + 1,
        width=BYTES[recipe.precision],
        moments=12,
    )
    return found


def cache_name(store: str, positions: str) -> str:
    return f"cache in {store}, " + ("all positions" if positions == "all" else "what the loss reads")


def recipe_cache(asked: Asked, store: str, positions: str) -> Figure:
    """Bytes of the recipe's feature cache. Features are context, so they are kept everywhere."""
    recipe, size = asked.recipe, asked.size
    taught = recipe.loss.l1 > 0 or recipe.loss.confidence > 0
    share = read_share(recipe.algorithm, size.supervised / size.tokens, teacher=taught)
    return cache_bytes(
        size.tokens,
        asked.dims.hidden,
        len(asked.spec.target_layer_ids),
        store,
        last_share=1.0 if positions == "all" else share,
    )


# ── memory ────────────────────────────────────────────────────────────────────────────────────────────


def memory_figures(asked: Asked) -> dict[str, Figure]:
    """Bytes where the model is: while answering, in a step of training, in a held-out evaluation."""
    recipe, dims, spec, size = asked.recipe, asked.dims, asked.spec, asked.size
    micro = min(recipe.optim.micro_batch_size or recipe.optim.batch_size, recipe.optim.batch_size)
    length = size.longest
    anchors = min(recipe.num_anchors, length)
    loss_rows = micro * (length if recipe.algorithm == "eagle3" else anchors * spec.block)
    rows = min(HELD_OUT_ROWS, recipe.eval_prompts)
    context = size.prompts / size.rows + recipe.eval_max_new_tokens + spec.block + 1
    found = {
        "target weights": figure(
            "bytes", "parameters * width", parameters=dims.total, width=BYTES[dims.dtype]
        ),
        "draft, gradients, optimiser": figure(
            "bytes",
            "own * each",
            own=asked.own,
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
    step = sum(found[name].value for name in STEP)
    held_out = sum(found[name].value for name in HELD_OUT)
    weights = found["target weights"]
    found["training"] = figure(
        "bytes",
        "weights + state + max(step, held_out)",
        weights=weights,
        state=found["draft, gradients, optimiser"],
        step=step,
        held_out=held_out,
    )
    if asked.answers:
        slots = slot_bytes(dims, None, asked.choices.batch, length)
        found["answering"] = figure("bytes", "weights + slots", weights=weights, slots=slots)
    return found


def host_figures(asked: Asked, memory: dict[str, Figure]) -> dict[str, Figure]:
    """Bytes beside an accelerator, or of everything where there is none."""
    found = {
        "program": figure("bytes", "process", process=PROCESS_BYTES),
        "tokens of the rows": figure("bytes", "tokens * each", tokens=asked.size.tokens, each=ROW_BYTES),
    }
    given = {"program": PROCESS_BYTES, "rows": found["tokens of the rows"].value}
    if asked.machine.memory is not None:
        loading = memory["target weights"]
        total = figure("bytes", "program + max(rows, loading)", **given, loading=loading)
    else:
        most = max(memory[name].value for name in ("training", "answering") if name in memory)
        total = figure("bytes", "program + rows + most", **given, most=most)
    return found | {"at most at once": total}


def needs_of(
    asked: Asked, disk: dict[str, Figure], memory: dict[str, Figure], host: dict[str, Figure]
) -> tuple[Need, ...]:
    """What has to fit."""
    choices, machine = asked.choices, asked.machine
    written = [disk["checkpoints"], *([disk["answers"]] if "answers" in disk else [])]
    if choices.features == "cache":
        written.append(disk[cache_name(choices.store, choices.positions)])
    needs = []
    if choices.free_disk is not None:
        needs.append(Need("disk", sum(each.value for each in written), choices.free_disk))
    if machine.memory is not None:
        usable = USABLE * machine.memory
        verbs = [name for name in ("training", "answering") if name in memory]
        needs += [Need(f"accelerator memory, {name}", memory[name].value, usable) for name in verbs]
    if machine.host is not None:
        needs.append(Need("host memory", host["at most at once"].value, machine.host))
    return tuple(needs)
