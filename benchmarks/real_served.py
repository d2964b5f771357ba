"""A GGUF target with our drafts in llama-server, next to our decoder: texts, accepted lengths, times."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import torch

import servers
from deepspec.decode.engine import Decoder, Request
from deepspec.drafts.base import NeuralDraft
from deepspec.log import progress
from deepspec.maths.acceptance import paired_bootstrap_ratio
from deepspec.measure.evaluate import load_prompts
from deepspec.measure.rows import Prompt
from deepspec.targets import Target
from real_models import held_out

PLAIN = "plain"
PROBES = 15
AGREEMENT = (100, 32)
"""Prompts whose greedy answers are compared in both engines, without drafts, and their new tokens."""
Said = Sequence[dict[str, Any]]
"""Answers as `asdict` makes them of `servers.Answer`, one for each prompt."""


def served(
    model: Path, log: Path, prompts: Sequence[Prompt], budget: int, drafts: Mapping[str, Sequence[str]]
) -> dict[str, Said]:
    """llama-server's answers with each draft (its options, none for no draft). The servers take turns prompt
    by prompt, so that what else the machine does slows all of them."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in drafts}
    with ExitStack() as stack, progress("llama-server", len(prompts) * len(drafts)) as bar:
        engine = servers.engine(servers.cache())
        clients = {
            name: stack.enter_context(servers.serving(engine, model, words, log))
            for name, words in drafts.items()
        }
        for client in clients.values():
            servers.ask(client, prompts[0], budget)  # first-call costs belong to nobody
        for prompt in prompts:
            for name, client in clients.items():
                found[name].append(asdict(servers.ask(client, prompt, budget)))
                bar.update()
    return dict(found)


def decoded(target: Target, draft: NeuralDraft | None, prompts: Sequence[Prompt], budget: int) -> Said:
    """Our own greedy answers, several prompts together, counted as the server counts (no speeds)."""
    asked = [Request(p.ids, budget, key=p.id, stop_token_ids=target.stop_token_ids) for p in prompts]
    found = {g.key: g for g in Decoder(target, draft, max_rows=8).run(asked)}
    rounds = [servers.served_rounds(found[p.id].accepted, budget) for p in prompts]
    return [
        asdict(servers.Answer(found[p.id].token_ids, sum(r), len(r), 0.0))
        for p, r in zip(prompts, rounds, strict=True)
    ]


def compared(
    target: Target, prompts: Sequence[Prompt], plain: Said, with_draft: Said, our_own: Said
) -> dict[str, Any]:
    """One draft in both engines: τ, the server's speed-up, and the texts with and without the draft."""
    alone, theirs, ours = (
        [servers.Answer(**entry) for entry in entries] for entries in (plain, with_draft, our_own)
    )
    pair = [([float(len(a.tokens)) for a in some], [a.seconds for a in some]) for some in (theirs, alone)]
    speedup = paired_bootstrap_ratio(pair[0], pair[1], servers.BOOTSTRAP_SEED)
    rounds = sum(a.rounds for a in theirs)
    return {
        **servers.compare(target, prompts, ours, theirs),
        "speedup": speedup and speedup._asdict(),
        "partings": partings(target, prompts, ours, theirs),
        "partings_from_plain": partings(target, prompts, alone, theirs),
        "per_domain": by_domain(prompts, ours, theirs),
        "round_ms": 1000 * sum(a.seconds for a in theirs) / max(rounds, 1),
        "plain_ms": 1000 / servers.rate(alone),
    }


def partings(
    target: Target,
    prompts: Sequence[Prompt],
    ours: Sequence[servers.Answer],
    theirs: Sequence[servers.Answer],
) -> list[dict[str, Any]]:
    """Where two engines' texts part: the prompt, the first token that differs, and by how much our logits
    prefer the first one's token. A text's end counts as a token, of which the server says only that it
    stopped."""
    stops = list(target.stop_token_ids)
    found = []
    for prompt, a, b in zip(prompts, ours, theirs, strict=True):
        texts = ([*(t for t in answer.tokens if t not in stops), *stops[:1]] for answer in (a, b))
        pairs = list(zip(*texts, strict=False))
        at = next((i for i, (x, y) in enumerate(pairs) if x != y), None)
        if at is not None:
            ids = torch.tensor([[*prompt.ids, *a.tokens[:at]]])
            logits = target.logits(target.read(ids, ()).last_hidden[0, -1])
            logits[stops] = logits[stops].max()
            gap = float(logits[pairs[at][0]] - logits[pairs[at][1]])
            found.append({"prompt": prompt.id, "at": at, "gap": gap})
    return found


def by_domain(prompts: Sequence[Prompt], *engines: Sequence[servers.Answer]) -> dict[str, list[float]]:
    """Pooled τ of each engine, for each domain."""
    found: dict[str, list[float]] = {}
    for domain in dict.fromkeys(p.domain for p in prompts):
        for engine in engines:
            some = [a for p, a in zip(prompts, engine, strict=True) if p.domain == domain]
            tau = sum(a.committed for a in some) / max(sum(a.rounds for a in some), 1)
            found.setdefault(domain, []).append(tau)
    return found


def agreement(target: Target, model: Path, log: Path) -> dict[str, Any]:
    """Greedy answers without drafts: the server's, from the file's quantised numbers, next to ours."""
    count, budget = AGREEMENT
    file = log.with_name("agreement.jsonl")
    held_out(file, count)
    prompts = load_prompts(file, target, limit=count)
    theirs = [servers.Answer(**a) for a in served(model, log, prompts, budget, {PLAIN: []})[PLAIN]]
    ours = [servers.Answer(**a) for a in decoded(target, None, prompts, budget)]
    return {
        "prompts": len(prompts),
        "tokens": budget,
        "partings": partings(target, prompts, ours, theirs),
        "usual_gap": usual_gap(target, prompts, ours),
    }


def usual_gap(target: Target, prompts: Sequence[Prompt], ours: Sequence[servers.Answer]) -> float:
    """The median, over all tokens of our answers, of the difference between the two best logits."""
    found = []
    for prompt, answer in zip(prompts, ours, strict=True):
        ids = torch.tensor([[*prompt.ids, *answer.tokens[:-1]]])
        logits = target.logits(target.read(ids, ()).last_hidden[0, len(prompt.ids) - 1 :])
        best = logits.topk(2).values
        found += (best[:, 0] - best[:, 1]).tolist()
    return statistics.median(found)


def passes(model: Path, log: Path, widths: Sequence[int]) -> dict[str, float]:
    """Processor milliseconds in which llama-server reads so many new tokens in one pass (medians): what it
    costs to check a draft of one token fewer."""
    port = servers.free_port()
    spent: dict[int, list[float]] = {width: [] for width in widths}
    server = servers.start(servers.engine(servers.cache()), model, port, log)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=600) as client:
            for turn in range(PROBES + 1):
                for width in widths:
                    # Other tokens in each request, so that nothing is taken from the last one's cache.
                    prompt = [1000 + 100 * turn + 10 * width + i for i in range(width)]
                    body = {"prompt": prompt, "n_predict": 1, "temperature": 0, "cache_prompt": False}
                    began = processor_seconds(server.pid)
                    client.post("/completion", json=body).raise_for_status()
                    if turn:
                        spent[width].append(1000 * (processor_seconds(server.pid) - began))
    finally:
        server.terminate()
        server.wait()
    return {str(width): statistics.median(each) for width, each in spent.items()}


def processor_seconds(pid: int) -> float:
    """What all threads of a process have computed, to the nanosecond (Linux)."""
    tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(task.read_text("utf-8").split()[0]) for task in tasks) / 1e9
