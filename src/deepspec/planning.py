"""What a plan is made from: the target's dimensions, the data's lengths, and this machine's speeds."""

from __future__ import annotations

import codecs
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from deepspec.answers.in_process import PACKAGED_ROWS
from deepspec.checkpoints.inspect import parameters
from deepspec.config import Recipe, feature_source
from deepspec.cost.dimensions import PUBLISHED_TARGETS
from deepspec.cost.inputs import USUAL_BATCH, Counts, Inputs, assumed_counts, published_counts
from deepspec.cost.machines import MACHINES, Machine
from deepspec.cost.step_time import FromRow, Measured, Speeds, StepTime, speed_key
from deepspec.data.conversations import (
    Conversation,
    conversation_from_row,
    prompt_messages,
    read_conversations,
)
from deepspec.data.inspect import row_sequences
from deepspec.data.messages import last_trained
from deepspec.data.readers import line_text, parse_json
from deepspec.drafts.spec import DraftSpec
from deepspec.errors import DataError, UserError, nearest
from deepspec.log import note, warn
from deepspec.measure.evaluate import spread
from deepspec.pocket import packaged, prompts_path
from deepspec.speeds import SAMPLES, here, kept_speeds, measure
from deepspec.targets import TargetSpec
from deepspec.this_machine import busy
from deepspec.train.build import sized_spec

DEFAULT_MACHINE, ASSUMED_ROWS = "h100", 10_000
POCKET_ANSWER = 60.0
"""Mean tokens of the pocket target's answers, assumed before there are any."""
CHARACTERS = 4.0
"""Characters of a token if there is no tokenizer: an assumption."""
SAMPLED = 1000
"""Rows that are tokenised; in a longer file they are spread over it."""
IN_TURN, LONG_FILE = 8, 4 * 2**20
"""Lines that are read at each place of a long file; bytes from which a file is long."""


def prepare(
    recipe: Recipe,
    machine: str | None = None,
    *,
    again: bool = False,
    watts: float | None = None,
    share: float | None = None,
    data: Path | None = None,
    rows: int | None = None,
    prompt_tokens: float | None = None,
    answer_tokens: float | None = None,
    batch: int | None = None,
    features: str | None = None,
    **choices: Any,
) -> tuple[Inputs, StepTime]:
    """What a plan of the recipe is made from, and its source of seconds.

    machine: a row's name, or here; again: measure it even if it was measured before. watts, share: instead of
    the machine's. choices: further fields of `Inputs`. Raises UserError for an unknown machine or target, and
    for data that cannot be read.
    """
    path = data or prompts_path(recipe.data.train)
    # `train` answers the packaged prompts itself.
    packaged_rows = data is None and recipe.data.train.startswith("pocket:")
    batch = batch or (PACKAGED_ROWS if packaged_rows else None)
    row = machine_row(recipe, machine)
    if again and row.name != "here":
        raise UserError(
            f"--measure measures this machine, and the plan is for {row.name}",
            next_step="leave --measure out, or add --machine here",
        )
    row = row._replace(share=share or row.share)
    config, tokenizer, notes = target_facts(recipe.target)
    describe(recipe, config)
    there = data is not None or path.is_file()
    # Before a minute is spent on measuring: rows may be refused.
    count = count_file(path, tokenizer, thinking=recipe.thinking) if there else None
    source: StepTime = FromRow(row)
    if row.name == "here":
        speeds = measured(recipe, again, path, batch or USUAL_BATCH["process"])
        source, row = Measured(speeds), row._replace(watts=speeds.watts or row.watts)
        answer_tokens = answer_tokens or sum(speeds.answers) / len(speeds.answers)
    row = row if watts is None else row._replace(watts=watts)
    published = published_counts()
    answer = answer_tokens or (POCKET_ANSWER if recipe.target == "pocket" else published.answers[0])
    if count is not None:
        counts = count(answer)
    elif prompt_tokens is None and answer_tokens is None:
        counts = published
    else:
        counts = assumed_counts(ASSUMED_ROWS, prompt_tokens or published.prompts[0], answer)
    counts = counts if rows is None else counts.of(rows)
    hint = [] if row.name != "here" or (said := without_gpu(recipe)) is None else [said]
    counts = replace(counts, notes=(*hint, *notes, *counts.notes))
    if features is None:
        features = "cache" if feature_source(recipe.data.features)[0] == "cache" else "online"
    return Inputs(recipe, config, counts, row, describe, features, batch=batch, **choices), source


def any_target() -> str:
    """The recipes for any target that suit this machine: `dspark/` and so on come before."""
    return "generic" if torch.cuda.is_available() else "small"


def without_gpu(recipe: Recipe) -> str | None:
    """What to take on this machine instead of a recipe that was made for a GPU; None if it fits."""
    if recipe.precision != "bfloat16" or any_target() == "generic":
        return None
    return (
        f"{recipe.name} was made for a GPU, and this machine has none: {recipe.algorithm}/small has the "
        "layers, batch, number format and minutes for a small target on a CPU; for a larger one, add "
        "precision=float32"
    )


def describe(recipe: Recipe, config: Mapping[str, Any]) -> tuple[DraftSpec, int]:
    """(the recipe's draft for a target of this config, its own parameters). Raises RecipeError."""
    spec = sized_spec(recipe, dict(config))
    return spec, parameters(spec)[0]


def target_facts(name: str) -> tuple[dict[str, Any], Any, list[str]]:
    """(raw text config, tokenizer or None, notes). Published targets are known without a network.

    Raises TargetError for any other that is neither on this disk nor on the Hub.
    """
    if name in PUBLISHED_TARGETS and not Path(name).is_dir():
        return PUBLISHED_TARGETS[name], None, [f"the dimensions of {name} ship with this package"]
    spec = TargetSpec.from_pretrained(name)
    return spec.config, spec.tokenizer(), []


def machine_row(recipe: Recipe, name: str | None) -> Machine:
    """The row of that name; by default this machine if the target's weights are on its disk. Raises UserError
    for an unknown name."""
    if name is None:
        local = Path(packaged(recipe.target)).exists()
        name = "here" if local else DEFAULT_MACHINE
        if not local:
            note(f"this plan is for {name}; --machine {'|'.join(MACHINES)} plans for others, here measures")
    if name != "here" and name not in MACHINES:
        close = nearest(name, MACHINES)
        raise UserError(
            f"there is no machine {name!r}" + (f"; did you mean {close}?" if close else ""),
            next_step=f"choose one of {', '.join(MACHINES)}, or `here` to measure this one",
        )
    return here() if name == "here" else MACHINES[name]


def measured(recipe: Recipe, again: bool, prompts: Path, slots: int) -> Speeds:
    """The speeds that were measured on this machine before if they cover the recipe, else new ones."""
    kept = None if again else kept_speeds(recipe.target)
    if kept is not None and speed_key(recipe) in kept.train:
        return kept
    some = spread(list(islice(read_conversations(prompts), 4000)), SAMPLES[0])
    note("measuring this machine with this target; this takes about a minute")
    if (load := busy()) is not None:
        warn(
            f"the machine was busy in the last minute (load {load:.1f} on {os.cpu_count()} cores): if it "
            "still is, the measured times will be too long, and they are kept; --measure measures again"
        )
    return measure(recipe, some, slots=slots, max_new_tokens=256)


def count_file(path: Path, tokenizer: Any, *, thinking: bool = False) -> Callable[[float], Counts]:
    """Counts of a JSONL file, answered or not, by the tokens that a row without an answer is assumed to get.

    tokenizer: the target's, or None. Raises DataError for a file that cannot be read, an empty one, and a
    broken row among those sampled.
    """
    rows, weight = _spread_rows(path)
    if not rows:
        raise DataError(
            "the file has no rows", where=str(path), next_step="give a JSONL file, one conversation per line"
        )
    prompts, given = zip(*(_tokens(row, tokenizer, thinking) for row in rows), strict=True)
    name, notes = path.name, []
    if weight > 1:
        notes.append(f"{len(rows):,} of about {len(rows) * weight:,.0f} rows of {name} were tokenised")
    if tokenizer is None:
        notes.append(f"there is no tokenizer: a token of {name} is assumed to have {CHARACTERS:g} characters")

    def counts(answer: float) -> Counts:
        assumed = f"answers are assumed to have {answer:,.0f} tokens: {name} holds prompts only"
        answers = tuple(answer if tokens is None else tokens for tokens in given)
        whole = None not in given
        return Counts(prompts, answers, weight, whole, (*notes, *([] if whole else [assumed])))

    return counts


def _spread_rows(path: Path) -> tuple[list[Conversation], float]:
    """(some SAMPLED rows, how many each of them stands for). A long file is read at places spread over it:
    several lines after each, so that long lines are not met more often than short ones."""
    every = read_conversations(path)
    if not path.is_file() or (size := path.stat().st_size) < LONG_FILE:
        rows = list(every)
        some = rows[:: max(math.ceil(len(rows) / SAMPLED), 1)]
        return some, len(rows) / max(len(some), 1)
    next(every, None)  # it refuses a file that cannot be read at all, and a table
    lines = {}
    with path.open("rb") as stream:
        for i in range(SAMPLED // IN_TURN):
            stream.seek(size * i * IN_TURN // SAMPLED)
            if i:
                stream.readline()
            for _ in range(IN_TURN):
                at = stream.tell()
                lines[at] = stream.readline().removeprefix(codecs.BOM_UTF8)
    found = {f"{path}, byte {at}": line for at, line in lines.items() if line.strip()}
    texts = ((line_text(line, where), where) for where, line in found.items())
    rows = [conversation_from_row(parse_json(text, where), where) for text, where in texts]
    return rows, size / max(sum(map(len, found.values())), 1)


def _tokens(row: Conversation, tokenizer: Any, thinking: bool) -> tuple[float, float | None]:
    """(tokens of the prompt, of the answer or None without one)."""
    last = last_trained(row.messages)
    if tokenizer is None:
        prompt = sum(len(m["content"]) for m in prompt_messages(row)) / CHARACTERS
        return prompt, None if last is None else len(row.messages[last]["content"]) / CHARACTERS
    sequences = row_sequences(tokenizer, row, thinking)
    supervised = sum(sum(sequence.loss_mask) for sequence in sequences)
    prompt = sum(len(sequence.ids) for sequence in sequences) - supervised
    return prompt, None if last is None else supervised
