"""What this machine does with a target: seconds of every part of a run, measured once in about a minute."""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter

from deepspec.answers.in_process import FLIGHTS
from deepspec.config import HELD_OUT_ROWS, LOG_EVERY, Recipe
from deepspec.cost.machines import Machine, host_memory, machine_called
from deepspec.cost.step_time import Speeds, TrainSpeed, speed_key
from deepspec.data.conversations import Conversation, Message, prompt_messages
from deepspec.data.identity import row_seed
from deepspec.data.tokens import Encoded, encode_turns, prompt_ids
from deepspec.decode.engine import Decoder, Generation, Request
from deepspec.drafts.base import Draft, NeuralDraft
from deepspec.errors import DataError
from deepspec.features.batches import batches_from, online
from deepspec.features.cache_write import batch_rows, plan_cache, shard_tensors
from deepspec.files import write_json
from deepspec.log import note, open_trackers, progress
from deepspec.maths.blocks import FeatureBatch
from deepspec.maths.fused import compiling
from deepspec.maths.verify import Sampling
from deepspec.targets import Target
from deepspec.this_machine import clock, read_joules, this_machine
from deepspec.train.build import build_draft, feature_layers, read_rules
from deepspec.train.loop import train_step
from deepspec.train.memory import kept_memory
from deepspec.train.optimizer import Optimizer
from deepspec.train.run import Progress, Run

SAMPLES, ANSWER_SECONDS = (96, 64, 48, 32, 24), 120.0
"""How many prompts are answered to learn the lengths of answers: the most that take so many seconds if none
ends by itself and rows in flight do not help each other."""
WARM_UP, STEPS, STEP_SECONDS = 2, 40, 3.0
"""Training steps before the clock starts; then at most so many, for about so many seconds, at least two."""
ROUNDS = 8
"""Rounds of decoding that are timed."""
READ_RECORD = TypeAdapter(Speeds).validate_json


def here() -> Machine:
    """This machine as a row: its memory, and the peaks of its kind, which nothing needs once measured."""
    row, memory = Machine("here", 0.3e12, 0.3e12, 30e9, None, None, None), None
    if torch.cuda.is_available():
        row = machine_called(torch.cuda.get_device_name()) or row
        memory = float(torch.cuda.get_device_properties(0).total_memory)
    return row._replace(name="here", memory=memory, host=host_memory())


def record_path(target: str) -> Path:
    """Where this machine's speeds with a target are kept: under $DEEPSPEC_CACHE, or the user's cache."""
    root = os.environ.get("DEEPSPEC_CACHE") or Path.home() / ".cache" / "deepspec"
    digest = hashlib.sha256(f"{this_machine()}\n{target}".encode()).hexdigest()[:16]
    return Path(root) / "speeds" / f"{digest}.json"


def kept_speeds(target: str) -> Speeds | None:
    """What was measured here with this target before; None if there is no such record, or not a whole one."""
    try:
        return READ_RECORD(record_path(target).read_bytes())
    except (OSError, ValueError):
        return None


def measure(recipe: Recipe, prompts: Sequence[Conversation], *, slots: int, max_new_tokens: int) -> Speeds:
    """Load the recipe's target, measure, keep the record. Some of the first prompts are answered, `slots` of
    them together, as a run would.

    Raises TargetError if the target cannot be loaded, DataError without a prompt.
    """
    if not prompts:
        raise DataError("there are no prompts to measure with", next_step="add --data FILE.jsonl")
    began, worked = time.perf_counter(), time.process_time()
    target = Target.from_pretrained(recipe.target)
    load = time.perf_counter() - began
    with progress("measuring this machine", 3) as bar:
        decoding, rows = _answers(target, prompts[: SAMPLES[0]], slots, max_new_tokens)
        bar.update()
        meter, before = read_joules(target.device), time.perf_counter()
        trained = _training(target, recipe, rows)
        spent, after = time.perf_counter() - before, read_joules(target.device)
        bar.update()
        cache_token = _caching(target, recipe, rows)
        bar.update()
    kept = kept_speeds(recipe.target)
    found = Speeds(
        **decoding,
        machine=this_machine(),
        stretch=FLIGHTS,
        load=load,
        cache_token=cache_token,
        train={**(kept.train if kept else {}), speed_key(recipe): trained},
        watts=None if meter is None or after is None else (after - meter) / spent,
        share=(time.process_time() - worked) / (time.perf_counter() - began),
    )
    write_json(record_path(recipe.target), asdict(found))
    note(f"measured this machine in {time.perf_counter() - began:.0f} s")
    return found


def _decode(
    target: Target, draft: Draft, requests: Sequence[Request], slots: int
) -> tuple[list[Generation], float]:
    """(answers, seconds)."""
    decoder = Decoder(target, draft, max_rows=min(slots, len(requests)))
    began = clock(target.device)
    found = list(decoder.run(requests))
    return found, clock(target.device) - began


def _timed(
    target: Target, requests: Sequence[Request], slots: int
) -> tuple[list[Generation], list[float], list[tuple[int, float]]]:
    """Plain decoding: (answers, seconds of each prefill, rows in flight and seconds of each round)."""
    decoder = Decoder(target, None, max_rows=min(slots, len(requests)))
    for request in requests:
        decoder.submit(request)
    answers: list[Generation] = []
    prefills: list[float] = []
    rounds: list[tuple[int, float]] = []
    while not decoder.idle:
        rows, prefill = len(decoder.rows), decoder.waiting and len(decoder.rows) < decoder.max_rows
        began = clock(target.device)
        answers += [event.answer for event in decoder.step() if event.finished]
        spent = clock(target.device) - began
        if prefill:
            prefills.append(spent)
        else:
            rounds.append((rows, spent))
    return answers, prefills, rounds


def line_through(rounds: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """(base, row) of seconds = base + row × rows in flight, by least squares; neither is below zero."""
    rows, seconds = (np.array(each, dtype=float) for each in zip(*rounds, strict=True))
    if len(set(rows)) > 1:
        row, base = np.polyfit(rows, seconds, 1)
        if row > 0 and base > 0:
            return float(base), float(row)
        if base <= 0:
            return 0.0, float(seconds.sum() / rows.sum())
    return float(seconds.mean()), 0.0


def _answers(
    target: Target, prompts: Sequence[Conversation], slots: int, max_new_tokens: int
) -> tuple[dict[str, Any], list[Encoded]]:
    """The fields of `Speeds` about decoding, and training rows of the answers.

    Some prompts are answered as a run answers them. Their prefills and rounds are timed one by one, while
    slots are full and while they run empty, so that the line through them holds for both.
    """
    assert target.tokenizer is not None
    asked = {c.id: c for c in prompts}
    ids = {c.id: prompt_ids(target.tokenizer, prompt_messages(c), False) for c in prompts}
    requests = [Request(ids[key], max_new_tokens, row_seed(0, key), key, Sampling(1.0)) for key in ids]
    _timed(target, [replace(r, max_new_tokens=2) for r in requests[:2]], 2)  # warm-up
    _, first, few = _timed(target, [replace(r, max_new_tokens=ROUNDS) for r in requests[:8]], slots)
    each_round = sum(seconds for _, seconds in few) / sum(rows for rows, _ in few)
    spent = float(np.mean(first)) + max_new_tokens * each_round
    count = next((n for n in SAMPLES if n * spent < ANSWER_SECONDS), SAMPLES[-1])
    requests = [replace(r, stop_token_ids=target.stop_token_ids) for r in requests[:count]]
    requests.sort(key=lambda r: (len(r.input_ids), r.key))
    written, prefills, rounds = _timed(target, requests, slots)
    lengths = {g.key: len(g.token_ids) for g in written}
    # Answers of a token or two have no round to be timed.
    base, row = line_through(rounds or few)
    answered = [_answered(target, asked[g.key], g) for g in written]
    began = time.perf_counter()
    rows = [row for each in answered for row in encode_turns(target.tokenizer, each, False)]
    speeds = {
        "encode": (time.perf_counter() - began) / len(rows),
        "prompt": float(np.mean(prefills)),
        "round_base": base,
        "round_row": row,
        "answers": [lengths[r.key] for r in requests],
    }
    return speeds, [row for row in rows if sum(row.loss_mask) >= 2]


def _answered(target: Target, prompt: Conversation, answer: Generation) -> Conversation:
    assert target.tokenizer is not None
    text = target.tokenizer.decode(answer.token_ids, skip_special_tokens=True).strip() or " "
    messages = (*prompt_messages(prompt), Message(role="assistant", content=text))
    return replace(prompt, messages=messages, meta={"answer_ids": answer.token_ids})


def _caching(target: Target, recipe: Recipe, rows: Sequence[Encoded]) -> float:
    """Seconds per token of the recipe's cache: computed and rounded, not yet on disk.

    The few rows of a sample share passes with rows of other lengths, so padding is counted among the tokens;
    a cache of many rows has next to none.
    """
    layers = feature_layers(recipe, target.spec.config)
    plan = plan_cache(rows, target, layers, read_rules(recipe), about={})
    began = clock(target.device)
    shard_tensors(rows, online(target, plan.facts["layers"]), plan.facts)
    spent = clock(target.device) - began
    return spent / sum(len(b) * len(rows[b[0]].ids) for b in batch_rows(rows, plan.facts["batch_tokens"]))


def _training(target: Target, recipe: Recipe, rows: Sequence[Encoded]) -> TrainSpeed:
    """A fresh draft of the recipe: steps, a held-out evaluation, a checkpoint."""
    length = recipe.data.max_length
    cut = [replace(r, ids=r.ids[:length], loss_mask=r.loss_mask[:length]) for r in rows]
    began = clock(target.device)
    draft = build_draft(recipe, target, cut)
    optimizer = Optimizer(draft, recipe.optim, recipe.offload_optimizer)
    with tempfile.TemporaryDirectory() as folder:
        open_trackers(recipe.trackers, Path(folder), recipe.name, recipe.model_dump(mode="json")).close()
        setup = clock(target.device) - began
        with compiling(recipe.compile, target.device), kept_memory(target.device):
            step, features = _steps(target, draft, optimizer, recipe, cut)
        began = clock(target.device)
        Run(Path(folder), recipe).save(draft, optimizer, Progress(1), target, {})
        checkpoint = clock(target.device) - began
    draft.eval()
    slots = min(HELD_OUT_ROWS, recipe.eval_prompts)
    asked = [Request(cut[i % len(cut)].ids[:64], 1, i, str(i), Sampling(1.0)) for i in range(slots)]
    _, few = _decode(target, draft, asked, slots)
    longer = [replace(r, max_new_tokens=1 + ROUNDS) for r in asked]
    answers, many = _decode(target, draft, longer, slots)
    held_out_round = max(many - few, 0.0) / max(max(len(g.kept) for g in answers) - 1, 1)
    # A budget of one token is full after the prefill, yet one round may still run on it.
    held_out_prompt = max(few - held_out_round, 0.0) / slots
    return TrainSpeed(step, features, held_out_prompt, held_out_round, checkpoint, setup)


def _steps(
    target: Target, draft: NeuralDraft, optimizer: Optimizer, recipe: Recipe, rows: Sequence[Encoded]
) -> tuple[float, float]:
    """(seconds of an optimiser step, of which the target's pass), with metrics as often as in a run."""
    reading = 0.0
    online_source = online(target, draft.feature_layers)

    def source(picked: Sequence[Encoded], width: int) -> FeatureBatch:
        nonlocal reading
        began = clock(target.device)
        batch = online_source(picked, width)
        reading += clock(target.device) - began
        return batch

    draft.train()
    began = clock(target.device)
    for done, (_, picked) in enumerate(batches_from(rows, recipe.optim.batch_size, recipe.seed, 0)):
        if done == WARM_UP:
            began, reading = clock(target.device), 0.0
        counted = done - WARM_UP
        if counted >= STEPS or (counted >= 2 and clock(target.device) - began >= STEP_SECONDS):
            break
        train_step(draft, source, picked, recipe, done, done % LOG_EVERY == 0, optimizer)
        optimizer.step(0.5)
    return (clock(target.device) - began) / counted, reading / counted
