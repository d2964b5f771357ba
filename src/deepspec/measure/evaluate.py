"""Tasks -> results: every method on the same prompts, in turns, with intervals and the lossless check.

Methods take turns prompt by prompt, so that a machine whose speed drifts slows them all alike; speed-ups
are ratios within one run. The results file's form is in docs/results.md.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from deepspec.config import HELD_OUT_ROWS
from deepspec.data.conversations import Conversation, prompt_messages, read_conversations, tools_of
from deepspec.data.identity import row_seed
from deepspec.data.tokens import prompt_ids, require_tokenizer, system_hash, template_hash
from deepspec.decode.engine import Decoder, Generation, Request
from deepspec.drafts.base import Draft
from deepspec.drafts.lookup import PromptLookup
from deepspec.errors import DataError
from deepspec.files import ResumableLog, plain, write_json
from deepspec.log import note, progress
from deepspec.maths import acceptance
from deepspec.maths.verify import Sampling
from deepspec.measure.traces import Prompt, Taken, Trace, rounds_of, rows_of
from deepspec.report.compare import FORMAT
from deepspec.targets import Target
from deepspec.this_machine import read_joules, this_machine

WARM_UP_TOKENS = 16
"""Of each method's answer before its first measured one: what a first call costs belongs to nobody."""
FINGERPRINTED = 1024
"""Values of each tensor by which models are told apart."""
CONVENTIONS = {
    "accepted length τ": "tokens kept per verify round, bonus included, pooled over prompts (sum over sum); "
    "the first new token comes from the prefill and is in no round; a round cut at the budget or a stop "
    "token counts what was kept",
    "conditional acceptance at k": "accepted(k) / reached(k): reached when all before it were accepted",
    "survival at k": "share of rounds in which positions 1 to k were all accepted",
    "speed-up": "tokens per second against the faster of the two plain rows (ours, transformers), prefill "
    "included, methods taking turns prompt by prompt in one run",
    "mean of domains": "mean of the domains' speed-ups, each domain weighing the same",
    "intervals": "95%, bootstrap over prompts, paired where two methods are compared",
    "distinct-4, repeated-8": "share of distinct 4-grams, and of 8-grams seen before in the same answer",
}


Method = Callable[[Sequence[Prompt], int], list[Generation]]
"""Answers to a group of prompts, each of at most so many new tokens."""


def load_prompts(
    path: str | Path, target: Target, *, thinking: bool = False, limit: int | None = None
) -> list[Prompt]:
    """Prompts of a JSONL file in the target's template; `limit` takes as many, domain by domain in turns.

    Raises DataError for a broken or empty file or an id that comes twice (its prompt would count twice),
    TargetError for a target without a tokenizer.
    """
    tokenizer = require_tokenizer(target.tokenizer, target.spec.name)
    rows = list(read_conversations(path))
    if not rows:
        raise DataError("no prompts", where=str(path))
    seen: dict[str, Conversation] = {}
    for row in rows:
        if (first := seen.setdefault(row.id, row)) is not row:
            raise DataError(
                f"the id comes twice; first at {first.where}",
                where=row.where,
                next_step="keep each prompt once, or give the rows ids of their own",
            )
    return [
        Prompt(
            c.id,
            c.domain or "all",
            c.messages[-1]["content"] if c.messages else "",
            tuple(prompt_ids(tokenizer, prompt_messages(c), thinking, tools=tools_of(c), where=c.where)),
            system_hash(c.messages),
        )
        for c in spread(rows, limit)
    ]


def mode_of(target: Target, prompts: Sequence[Prompt], thinking: bool) -> dict[str, Any]:
    """Thinking, chat template and system prompt under which prompts are answered (`compare.MODE`)."""
    systems = {p.system for p in prompts}
    return {
        "thinking": thinking,
        "template_hash": template_hash(target.tokenizer) if target.tokenizer is not None else None,
        "system_prompt": systems.pop() if len(systems) == 1 else "several",
    }


def spread(rows: Sequence[Conversation], limit: int | None) -> list[Conversation]:
    """The first `limit` rows when domains take turns, so that a short run still sees them all."""
    by_domain: dict[str | None, list[Conversation]] = {}
    for row in rows:
        by_domain.setdefault(row.domain, []).append(row)
    turns = [group[i] for i in range(len(rows)) for group in by_domain.values() if i < len(group)]
    return turns[:limit] if limit else turns


def held_out_tau(
    target: Target, draft: Draft, prompts: Sequence[Prompt], max_new_tokens: int, temperature: float = 1.0
) -> float:
    """Pooled τ of a draft on prompts, decoded together: the figure that picks checkpoints."""
    decoder = Decoder(
        target,
        draft,
        max_rows=min(HELD_OUT_ROWS, len(prompts)),
    )
    sampling, stops = Sampling(temperature), target.stop_token_ids
    requests = [Request(p.ids, max_new_tokens, i, p.id, sampling, stops) for i, p in enumerate(prompts)]
    return acceptance.tau([rounds_of(g)[2] for g in decoder.run(requests)]) or 1.0


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
    out: Path | None = None,
    keep_partial: bool = False,
) -> dict[str, Any]:
    """Run plain decoding, transformers' generate, prompt lookup and the drafts; a results file as plain data.

    With `batch` > 1 prompts are decoded together in groups, and a group's time is shared out evenly;
    transformers' generate is then left out, since it cannot hold ragged rows without padding. With `out` the
    results are written there, and until then every measured group is kept in `partial_path`: the same call
    continues after a kill. `keep_partial` leaves that file to a caller that has more to do (`evaluate_at`).
    """
    sampling = sampling or Sampling()
    stops = frozenset() if ignore_eos else target.stop_token_ids
    methods: dict[str, tuple[Trace, Method]] = {}

    def ours(draft: Draft | None) -> Method:
        def run(group: Sequence[Prompt], budget: int) -> list[Generation]:
            decoder = Decoder(target, draft, max_rows=len(group))
            seeds = {p.id: row_seed(seed, p.id) for p in group}
            requests = [Request(p.ids, budget, seeds[p.id], p.id, sampling, stops) for p in group]
            found = {g.key: g for g in decoder.run(requests)}
            return [found[p.id] for p in group]

        return run

    methods["plain"] = Trace("plain", None, None), ours(None)
    if baselines:
        if batch == 1 and not sampling.top_k and sampling.top_p == 1:
            methods["transformers generate"] = (
                Trace("generate", None, None),
                _transformers(target, sampling, stops, seed),
            )
        lookup = PromptLookup(target.vocab_size)
        methods["prompt lookup"] = Trace("lookup", None, lookup.max_proposals), ours(lookup)
    for name, draft in drafts.items():
        algorithm = getattr(getattr(draft, "spec", None), "algorithm", None)
        methods[name] = Trace("draft", algorithm, draft.max_proposals), ours(draft)
    traces = {name: trace for name, (trace, _) in methods.items()}
    conditions = _conditions(target, prompts, sampling, thinking, max_new_tokens, ignore_eos, seed, batch)
    with ExitStack() as stack:
        log = None
        if out is not None:
            facts = conditions | {
                "methods": list(methods),
                "weights": {name: fingerprint(model) for name, model in {"": target.model, **drafts}.items()},
                "prompt ids": _short_hash([[p.id, p.domain] for p in prompts]),
                "machine": this_machine(),
            }
            log = stack.enter_context(ResumableLog(partial_path(out), facts, header=True))
        _take_turns(target, methods, prompts, max_new_tokens, batch, log)
        results: dict[str, Any] = plain(
            {
                "format": FORMAT,
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "conventions": CONVENTIONS,
                "conditions": conditions,
                "rows": rows_of(target, traces, prompts, sampling),
            }
        )
    if out is not None:
        write_json(out, results)
        if not keep_partial:
            partial_path(out).unlink(missing_ok=True)
    return results


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
    """One evaluation for each sampling, on the first of the prompts where `limits` says how many; options as
    for `evaluate_drafts`.

    Results go to `out`, or, where there are several, to `out` with -t<temperature> in its name. What one has
    measured is kept until the last is written, so that a kill during the last costs the first nothing.
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
    """One draft beside the baselines; options as for `evaluate_drafts`."""
    return evaluate_drafts(target, {draft.name: draft}, prompts, **options)


def partial_path(out: Path) -> Path:
    """eval.json -> eval.partial.jsonl: the conditions of an evaluation under way, then a line for each group
    of prompts with what every method wrote and took."""
    return out.with_name(f"{out.stem}.partial.jsonl")


def fingerprint(model: object) -> str | None:
    """16 hex digits that tell models apart: shape, names, and the first values of every tensor; None for
    what has no weights."""
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


def _transformers(target: Target, sampling: Sampling, stops: frozenset[int], seed: int) -> Method:
    def run(group: Sequence[Prompt], budget: int) -> list[Generation]:
        (prompt,) = group
        torch.manual_seed(row_seed(seed, prompt.id))
        tokens = target.transformers_generate(prompt.ids, budget, sampling.temperature, sorted(stops))
        return [Generation(prompt.id, tokens, from_draft=[False] * len(tokens))]

    return run


def _take_turns(
    target: Target,
    methods: Mapping[str, tuple[Trace, Method]],
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    batch: int,
    log: ResumableLog | None,
) -> None:
    """All methods on group after group of prompts; which method starts rotates. Groups that the log has
    are taken from there."""
    groups = [prompts[i : i + batch] for i in range(0, len(prompts), batch)]
    done = {} if log is None else {line["group"]: line["methods"] for _, line in log.records()}
    if done:
        note(f"{len(done)} of {len(groups)} groups of prompts were measured before; continuing with the rest")
    order = list(methods.items())
    if len(done) < len(groups):
        for _, (_, run) in order:
            run(groups[0], min(WARM_UP_TOKENS, max_new_tokens))
    with progress("evaluating", len(groups) * len(order)) as bar:
        for i, group in enumerate(groups):
            taken = {name: Taken.kept(entry) for name, entry in done.get(i, {}).items()}
            if not taken:
                for name, (_, run) in order[i % len(order) :] + order[: i % len(order)]:
                    taken[name] = _measured(target, run, group, max_new_tokens)
                    bar.update(1)
                if log is not None:
                    log.write({"group": i, "methods": {name: asdict(t) for name, t in taken.items()}})
                    log.sync()
            else:
                bar.update(len(order))
            for name, (trace, _) in order:
                trace.add(group, taken[name])


def _measured(target: Target, run: Method, group: Sequence[Prompt], budget: int) -> Taken:
    meter = read_joules(target.device)
    began = time.perf_counter()
    answers = run(group, budget)
    spent = time.perf_counter() - began
    after = read_joules(target.device)
    joules = None if meter is None or after is None else after - meter
    return Taken(answers, spent, joules)


def _conditions(
    target: Target,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    thinking: bool,
    max_new_tokens: int,
    ignore_eos: bool,
    seed: int,
    batch: int,
) -> dict[str, Any]:
    return {
        "target": target.spec.name,
        "target_hash": target.spec.config_hash,
        **mode_of(target, prompts, thinking),
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "prompts_hash": _short_hash([p.ids for p in prompts]),
        "prompts": len(prompts),
        "max_new_tokens": max_new_tokens,
        "acceptance_rule": "rejection sampling",
        "ignore_eos": ignore_eos,
        "seed": seed,
        "dtype": str(target.dtype).removeprefix("torch."),
        "device": str(target.device),
        "threads": torch.get_num_threads(),
        "batch": batch,
    }
