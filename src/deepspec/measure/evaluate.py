"""Evaluation: every method answers the same prompts, with intervals and the lossless check (docs/results.md).

Methods take turns prompt by prompt, so that a machine whose speed drifts slows them all alike.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from deepspec.conditions import SEVERAL, Conditions
from deepspec.config import HELD_OUT_ROWS
from deepspec.data.conversations import Conversation, read_conversations
from deepspec.data.identity import row_seed
from deepspec.data.skipping import Skipped, nothing_left, refuse
from deepspec.data.template import template_conditions, template_date
from deepspec.data.tokens import conversation_prompt, require_tokenizer, system_hash
from deepspec.decode.engine import Decoder, Generation, Request
from deepspec.drafts.base import Draft
from deepspec.drafts.lookup import PromptLookup
from deepspec.errors import DataError
from deepspec.files import ResumableLog, plain, write_json
from deepspec.log import note, progress
from deepspec.maths.verify import Sampling
from deepspec.measure.rows import Answering, Measurement, Method, Prompt, rounds_of, rows_of
from deepspec.report.results import FORMAT
from deepspec.schedule.policies import Scheduled
from deepspec.targets import Target, TargetSpec
from deepspec.this_machine import read_joules, this_machine

WARM_UP_TOKENS = 16
"""Tokens that each method generates first, unmeasured, so that one-time costs are not charged to it."""
FINGERPRINTED = 1024
"""Values of each tensor that enter a model's fingerprint."""
CONVENTIONS = {
    "accepted length τ": "tokens kept per verify round, over the rounds of all prompts together; it counts "
    "the target's own token of each round, but not an answer's first token, which comes before any round",
    "conditional acceptance at k": "of the rounds in which all guesses before k were accepted, the share in "
    "which guess k was too",
    "survival at k": "share of rounds in which guesses 1 to k were all accepted",
    "speed-up": "tokens per second against the faster row without a draft; prompts are read within that time",
    "mean of domains": "mean of the domains' speed-ups, each domain weighing the same",
    "low–high": "95% interval, from a bootstrap over prompts (paired if two methods are compared)",
    "distinct-4, repeated-8": "share of distinct 4-grams, and of 8-grams seen before in the same answer",
}


def load_prompts(
    path: str | Path,
    target: Target | TargetSpec,
    *,
    thinking: bool = False,
    limit: int | None = None,
    skipped: Skipped | None = None,
) -> list[Prompt]:
    """The prompts of a JSONL file in the target's template. limit: take so many, the domains in turns.

    Raises DataError for a broken or empty file, for an id that comes twice (its prompt would count twice),
    and for a prompt that the target could not read completely; with `skipped`, such rows are left out and
    counted there. Raises TargetError for a target without a tokenizer.
    """
    spec = target if isinstance(target, TargetSpec) else target.spec
    if isinstance(target, TargetSpec):
        known, most = target.tokenizer(), target.context_length
    else:
        known, most = target.tokenizer, target.max_length
    tokenizer = require_tokenizer(known, spec.name)
    seen: dict[str, Conversation] = {}
    for row in read_conversations(path, skipped=skipped):
        if (first := seen.setdefault(row.id, row)) is not row:
            twice = DataError(
                f"the id comes twice; first at {first.where}",
                where=row.where,
                next_step="keep each prompt once, or give the rows different ids",
            )
            refuse(twice, skipped)
    found = []
    for c in spread(list(seen.values()), limit):
        text = c.messages[-1]["content"] if c.messages else ""
        try:
            ids = conversation_prompt(tokenizer, c, thinking, spec.vocab_size)
            if most is not None and len(ids) >= most:
                raise DataError(
                    f"the prompt is {len(ids)} tokens, and {spec.name} reads at most {most}",
                    where=c.where,
                    next_step="remove the row, or use a target with a longer context",
                )
        except DataError as error:
            refuse(error, skipped)
        else:
            found.append(Prompt(c.id, c.domain or "all", text, tuple(ids), system_hash(c.messages)))
    if not found:
        raise nothing_left(skipped, str(path))
    return found


def conditions_of(target: Target, prompts: Sequence[Prompt], thinking: bool) -> Conditions:
    """The conditions under which prompts are answered, apart from the sampling."""
    systems = {p.system for p in prompts}
    system = systems.pop() if len(systems) == 1 else SEVERAL
    if target.tokenizer is None:
        return Conditions(thinking, None, system)
    return replace(template_conditions(target.tokenizer, thinking), system_prompt=system)


def spread(rows: Sequence[Conversation], limit: int | None) -> list[Conversation]:
    """The first `limit` rows when domains take turns, so that a short run still sees them all."""
    by_domain: dict[str | None, list[Conversation]] = {}
    for row in rows:
        by_domain.setdefault(row.domain, []).append(row)
    turns = [group[i] for i in range(len(rows)) for group in by_domain.values() if i < len(group)]
    return turns[:limit] if limit else turns


def held_out_rounds(
    target: Target, draft: Draft, prompts: Mapping[int, Prompt], max_new_tokens: int
) -> list[list[int]]:
    """Tokens kept in each round of a draft on each of the prompts, by seed, that are decoded together. Their
    pooled τ picks the best checkpoint."""
    if not prompts:
        return []
    decoder = Decoder(target, draft, max_rows=min(HELD_OUT_ROWS, len(prompts)))
    sampling, stops = Sampling(1.0), target.stop_token_ids
    requests = [Request(p.ids, max_new_tokens, i, p.id, sampling, stops) for i, p in prompts.items()]
    return [rounds_of(answer)[2] for answer in decoder.run(requests)]


def evaluate_drafts(
    target: Target,
    drafts: Mapping[str, Draft],
    prompts: Sequence[Prompt],
    sampling: Sampling | None = None,
    *,
    thinking: bool = False,
    max_new_tokens: int = 128,
    seed: int = 0,
    ignore_eos: bool = False,
    batch: int = 1,
    baselines: bool = True,
    policy: str = "all",
    scheduled: Mapping[str, Scheduled] | None = None,
    out: Path | None = None,
    keep_partial: bool = False,
) -> dict[str, Any]:
    """Measure plain decoding, transformers' generate, prompt lookup and the drafts; a results file's data.

    batch: prompts decoded together, whose time is shared out evenly; above 1 transformers' generate is left
    out, since it cannot hold ragged rows without padding. scheduled: of each draft, `policy` its name; a
    draft that is not in it verifies everything. out: the results are written there, and until then
    every measured group is kept in `partial_path`, so that the same call continues after a kill.
    keep_partial: leaves that file to a caller that has more to measure (`evaluate_at`).
    """
    sampling = sampling or Sampling()
    stops = frozenset() if ignore_eos else target.stop_token_ids
    methods = _methods(target, drafts, sampling, stops, seed, batch, baselines, scheduled or {})
    date = None if target.tokenizer is None else template_date(target.tokenizer)
    conditions = {
        "target": target.spec.name,
        "target_hash": target.spec.config_hash,
        **conditions_of(target, prompts, thinking).record(),
        **asdict(sampling),
        **({} if date is None else {"date": date}),
        "prompts_hash": _short_hash([p.ids for p in prompts]),
        "prompts": len(prompts),
        "max_new_tokens": max_new_tokens,
        "acceptance_rule": "rejection sampling",
        "policy": policy,
        "ignore_eos": ignore_eos,
        "seed": seed,
        "dtype": str(target.dtype).removeprefix("torch."),
        "device": str(target.device),
        "threads": torch.get_num_threads(),
        "batch": batch,
    }
    facts = conditions | {
        "methods": list(methods),
        "weights": {name: fingerprint(model) for name, model in {"": target.model, **drafts}.items()},
        "prompt ids": _short_hash([[p.id, p.domain] for p in prompts]),
        "machine": this_machine(),
    }
    with nullcontext() if out is None else ResumableLog(partial_path(out), facts, header=True) as log:
        _take_turns(target, methods, prompts, max_new_tokens, batch, log)
    found = {
        "format": FORMAT,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "conventions": CONVENTIONS,
        "conditions": conditions,
        "rows": rows_of(target, methods, prompts, sampling),
    }
    results: dict[str, Any] = plain(found)
    if out is not None:
        write_json(out, results)
        if not keep_partial:
            partial_path(out).unlink(missing_ok=True)
    return results


def _methods(
    target: Target,
    drafts: Mapping[str, Draft],
    sampling: Sampling,
    stops: frozenset[int],
    seed: int,
    batch: int,
    baselines: bool,
    scheduled: Mapping[str, Scheduled],
) -> dict[str, Method]:
    """Every method of an evaluation by its name, plain decoding first."""

    def ours(draft: Draft | None, how: Scheduled | None = None) -> Answering:
        policy, temperatures = how or Scheduled()

        def answer(group: Sequence[Prompt], budget: int) -> list[Generation]:
            decoder = Decoder(target, draft, max_rows=len(group), policy=policy, temperatures=temperatures)
            requests = [Request(p.ids, budget, row_seed(seed, p.id), p.id, sampling, stops) for p in group]
            found = {g.key: g for g in decoder.run(requests)}
            return [found[p.id] for p in group]

        return answer

    def transformers(group: Sequence[Prompt], budget: int) -> list[Generation]:
        (prompt,) = group
        torch.manual_seed(row_seed(seed, prompt.id))
        tokens = target.transformers_generate(prompt.ids, budget, sampling.temperature, sorted(stops))
        return [Generation(prompt.id, tokens, from_draft=[False] * len(tokens))]

    methods = {"plain": Method("plain", None, None, ours(None))}
    if baselines:
        if batch == 1 and not sampling.top_k and sampling.top_p == 1:
            methods["transformers generate"] = Method("generate", None, None, transformers)
        lookup = PromptLookup(target.vocab_size)
        methods["prompt lookup"] = Method("lookup", None, lookup.max_proposals, ours(lookup))
    for name, draft in drafts.items():
        algorithm = getattr(getattr(draft, "spec", None), "algorithm", None)
        methods[name] = Method("draft", algorithm, draft.max_proposals, ours(draft, scheduled.get(name)))
    return methods


def evaluate_at(
    target: Target,
    drafts: Mapping[str, Draft],
    prompts: Sequence[Prompt],
    samplings: Sequence[Sampling],
    *,
    limits: Sequence[int | None] | None = None,
    out: Path | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """One evaluation for each sampling; options as for `evaluate_drafts`.

    limits: prompts for each sampling, the first ones; None takes all. Results are written to `out` or, for
    several samplings, to `out` with -t<temperature> in its name. What an evaluation has measured is kept
    until the last is written, so that the same call after a kill measures nothing twice.
    """
    several = len(samplings) > 1
    outs = [
        out.with_name(f"{out.stem}-t{s.temperature:g}{out.suffix}") if out is not None and several else out
        for s in samplings
    ]
    found = [
        evaluate_drafts(target, drafts, prompts[:limit], sampling, out=path, keep_partial=True, **options)
        for sampling, limit, path in zip(samplings, limits or [None] * len(samplings), outs, strict=True)
    ]
    for path in filter(None, outs):
        partial_path(path).unlink(missing_ok=True)
        note(f"results: {path}")
    return found


def evaluate_draft(target: Target, draft: Draft, prompts: Sequence[Prompt], **options: Any) -> dict[str, Any]:
    """One draft next to the baselines; options as for `evaluate_drafts`."""
    return evaluate_drafts(target, {draft.name: draft}, prompts, **options)


def partial_path(out: Path) -> Path:
    """eval.json -> eval.partial.jsonl: the conditions of an evaluation under way, then a line for each group
    of prompts with what every method wrote and took."""
    return out.with_name(f"{out.stem}.partial.jsonl")


def fingerprint(model: object) -> str | None:
    """16 hex digits of a model's shape, names and first values of every tensor; None if it has no weights."""
    if not isinstance(model, torch.nn.Module):
        return None
    digest = hashlib.sha256(repr(getattr(model, "spec", None)).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        some = tensor.detach().flatten()[:FINGERPRINTED].float().cpu()
        digest.update(some.numpy().tobytes())
    return digest.hexdigest()[:16]


def _short_hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _take_turns(
    target: Target,
    methods: Mapping[str, Method],
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    batch: int,
    log: ResumableLog | None,
) -> None:
    """Have all methods answer one group of prompts after another; each time another method begins. Groups
    that the log holds are taken from there."""
    groups = [prompts[i : i + batch] for i in range(0, len(prompts), batch)]
    done = {} if log is None else {line["group"]: line["methods"] for _, line in log.records()}
    if done:
        note(f"{len(done)} of {len(groups)} groups of prompts were measured before; continuing with the rest")
    order = list(methods.items())
    if len(done) < len(groups):
        for _, method in order:
            method.answer(groups[0], min(WARM_UP_TOKENS, max_new_tokens))
    with progress("evaluating", len(groups) * len(order)) as bar:
        for i, group in enumerate(groups):
            found = {name: Measurement.read(entry) for name, entry in done.get(i, {}).items()}
            if found:
                bar.update(len(order))
            else:
                for name, method in order[i % len(order) :] + order[: i % len(order)]:
                    found[name] = _measured(target, method, group, max_new_tokens)
                    bar.update(1)
                if log is not None:
                    entry = {name: asdict(each) for name, each in found.items()}
                    log.write({"group": i, "methods": entry})
                    log.sync()
            for name, method in order:
                method.add(group, found[name])


def _measured(target: Target, method: Method, group: Sequence[Prompt], budget: int) -> Measurement:
    before, began = read_joules(target.device), time.perf_counter()
    answers = method.answer(group, budget)
    spent, after = time.perf_counter() - began, read_joules(target.device)
    return Measurement(answers, spent, None if before is None or after is None else after - before)
