"""What `deepspec data regenerate` costs next to the engine that answers, and what it survives.

    python benchmarks/regenerate_share.py                    both shares, as a Markdown table
    python benchmarks/regenerate_share.py --prompts 60       less of it

*In process*: `regenerate` next to the decoder alone on the same requests, all of them in one run, ready as
token ids, the answers thrown away. What it pays for is files, templates, tokenising, and the end of each
stretch, where fewer rows are in flight. *Through llama-server*: next to the least client that keeps the same
number of requests under way. Both take turns within one run, and the ratio of the medians is what counts: by
processor time, the server's included, which other programs on the machine disturb less than the clock.

`with_a_death` is the check behind `make test-servers`: two llama-servers, one of them killed and started
again in the middle of the run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import torch

import servers
from deepspec.answers.dialogue import turns_of
from deepspec.answers.in_process import regenerate
from deepspec.answers.through_servers import regenerate_served
from deepspec.data.conversations import Conversation, conversation_from_row, read_conversations
from deepspec.data.identity import row_seed
from deepspec.data.tokens import prompt_ids
from deepspec.decode.engine import Decoder, Request
from deepspec.http_client import Policy
from deepspec.maths.verify import Sampling
from deepspec.pocket import prompts_path
from deepspec.targets import Target

BUDGET = 96
ROWS = 16
"""In flight, in process."""
SLOTS = 4
"""Of each llama-server, and requests under way with it."""
REPEATS = 3


def pocket_prompts(limit: int) -> list[Conversation]:
    return list(read_conversations(prompts_path("pocket:train")))[:limit]


# ── shares ────────────────────────────────────────────────────────────────────────────────────────────


def in_turns(
    one: Callable[[], int], other: Callable[[], int], repeats: int, clock: Callable[[], float]
) -> dict[str, Any]:
    """Tokens per second of two ways of doing the same, taking turns: medians, and their ratio."""
    rates: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for way, found in zip((one, other), rates, strict=True):
            began = clock()
            tokens = way()
            found.append(tokens / (clock() - began))
    ours, alone = map(statistics.median, rates)
    spread = sorted(a / b for a, b in zip(*rates, strict=True))
    return {"ours": ours, "alone": alone, "share": ours / alone, "low": spread[0], "high": spread[-1]}


def in_process(target: Target, rows: Sequence[Conversation], folder: Path, repeats: int) -> dict[str, Any]:
    """`regenerate` next to the decoder alone, at temperature 1."""
    sampling, counter = Sampling(1.0), iter(range(10**6))
    requests = [
        Request(
            prompt_ids(target.tokenizer, row.messages, False),
            BUDGET,
            row_seed(0, row.id),
            row.id,
            sampling,
            target.stop_token_ids,
        )
        for row in rows
    ]
    requests.sort(key=lambda r: len(r.input_ids))

    def ours() -> int:
        out = folder / f"process-{next(counter)}.jsonl"
        return regenerate(target, rows, out, sampling=sampling, max_new_tokens=BUDGET, max_rows=ROWS).tokens

    def alone() -> int:
        decoder = Decoder(target, None, max_rows=ROWS)
        return sum(len(answer.token_ids) for answer in decoder.run(requests))

    shares = in_turns(ours, alone, repeats, time.process_time)
    return shares | {"rounds": rounds_of(ours, target), "rounds_alone": rounds_of(alone, target)}


def rounds_of(way: Callable[[], int], target: Target) -> int:
    """Decode steps that a way takes, without prefills: what counts where a step's cost hangs on no rows."""
    step, taken = target.step, [0]

    def counted(slots: Sequence[int], tokens: Sequence[Sequence[int]], *rest: Any) -> Any:
        taken[0] += len(tokens[0]) == 1
        return step(slots, tokens, *rest)

    target.step = counted  # type: ignore[method-assign]
    try:
        way()
    finally:
        del target.step
    return taken[0]


def processor_time(server: int) -> float:
    """Seconds that this process and a server's have computed so far; the clock's where that is not told."""
    stat = Path(f"/proc/{server}/stat")
    if not stat.exists():
        return time.perf_counter()
    user, system = stat.read_text().rpartition(")")[2].split()[11:13]
    return time.process_time() + (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def through_servers(
    target: Target, rows: Sequence[Conversation], url: str, server: int, folder: Path, repeats: int
) -> dict[str, Any]:
    """`regenerate --server` next to a client that does nothing but ask, greedily."""
    counter = iter(range(10**6))
    bodies = [
        {
            "prompt": prompt_ids(target.tokenizer, row.messages, False),
            "n_predict": BUDGET,
            "temperature": 0,
            "return_tokens": True,
        }
        for row in rows
    ]

    def ours() -> int:
        out = folder / f"served-{next(counter)}.jsonl"
        return regenerate_served(
            [url],
            rows,
            out,
            target=target.spec,
            sampling=Sampling(),
            max_new_tokens=BUDGET,
            concurrency=SLOTS,
        ).tokens

    async def least() -> int:
        waiting, tokens = iter(bodies), 0

        async def work(client: httpx.AsyncClient) -> None:
            nonlocal tokens
            for body in waiting:
                found = await client.post(f"{url}/completion", json=body)
                tokens += len(found.json()["tokens"])

        async with httpx.AsyncClient(timeout=600) as client:
            await asyncio.gather(*(work(client) for _ in range(SLOTS)))
        return tokens

    return in_turns(ours, lambda: asyncio.run(least()), repeats, lambda: processor_time(server))


def measure(limit: int, repeats: int) -> dict[str, Any]:
    rows = pocket_prompts(limit)
    target = Target.from_pretrained("pocket", dtype="float32", device="cpu")
    found = servers.engine(servers.cache())
    work = servers.cache() / "pocket"
    _, gguf = servers.served_target(found, work)
    with tempfile.TemporaryDirectory() as folder:
        process = in_process(target, rows, Path(folder), repeats)
        port = servers.free_port()
        with servers.start(found, gguf, port, work / "share.log", parallel=SLOTS) as server:
            try:
                url = f"http://127.0.0.1:{port}"
                served = through_servers(target, rows, url, server.pid, Path(folder), repeats)
            finally:
                server.terminate()
    return {"prompts": len(rows), "repeats": repeats, "in process": process, "through llama-server": served}


def table(results: dict[str, Any]) -> str:
    lines = ["| | regenerate, tokens per processor second | the engine alone | share |", "|---|---|---|---|"]
    for way in ("in process", "through llama-server"):
        row = results[way]
        lines.append(
            f"| {way} | {row['ours']:.0f} | {row['alone']:.0f} | "
            f"{row['share']:.1%} [{row['low']:.1%}, {row['high']:.1%}] |"
        )
    process = results["in process"]
    share = process["rounds_alone"] / process["rounds"]
    lines += [
        "",
        f"{results['prompts']} prompts, at most {BUDGET} new tokens, {results['repeats']} repeats: medians, "
        f"and the range of the ratio. Decode steps in process: {process['rounds']}, beside "
        f"{process['rounds_alone']} of the decoder alone ({share:.1%}).",
    ]
    return "\n".join(lines)


# ── a death in the middle ─────────────────────────────────────────────────────────────────────────────


def with_a_death(limit: int = 120) -> dict[str, Any]:
    """Two llama-servers answer the pocket prompts greedily; one is killed at a quarter and back at a half.

    Every fifth prompt has a follow-up. Answers are compared with those made in process, up to the first turn
    that differs: the next one answers another history.
    """
    target = Target.from_pretrained("pocket", dtype="float32", device="cpu")
    questions = [row.messages[0]["content"] for row in pocket_prompts(limit)]
    rows = [
        conversation_from_row({"id": f"r{i}", "turns": [q, *([questions[i - 1]] if i % 5 == 0 else [])]})
        for i, q in enumerate(questions)
    ]
    found = servers.engine(servers.cache())
    work = servers.cache() / "pocket"
    _, gguf = servers.served_target(found, work)
    ports = [servers.free_port(), servers.free_port()]
    settings: dict[str, Any] = {"sampling": Sampling(), "max_new_tokens": BUDGET}
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = Path(folder) / "ours.jsonl", Path(folder) / "theirs.jsonl"
        alive = [_start(found, gguf, port, work) for port in ports]
        try:
            watcher = threading.Thread(
                target=_kill_and_restart, args=(theirs, limit, alive, found, gguf, ports[1], work)
            )
            watcher.start()
            tally = regenerate_served(
                [f"http://127.0.0.1:{port}" for port in ports],
                rows,
                theirs,
                target=target.spec,
                concurrency=SLOTS,
                policy=Policy(first_rest=0.2),
                **settings,
            )
            watcher.join()
            metrics = httpx.get(f"http://127.0.0.1:{ports[1]}/metrics").text
        finally:
            for server in alive:
                server.terminate()
                server.wait()
        regenerate(target, rows, ours, max_rows=ROWS, **settings)
        answered = [
            [json.loads(line) for line in file.read_text("utf-8").splitlines()] for file in (ours, theirs)
        ]
    verdicts = compare(target, rows, *answered)
    return {
        "prompts": len(rows),
        "ids": sorted(row["id"] for row in answered[1]),
        "expected_ids": sorted(row.id for row in rows),
        "failed": tally.failed,
        "after_restart": _counter(metrics, "llamacpp:tokens_predicted_total"),
        **{kind: verdicts.count(kind) for kind in ("identical", "near tie", "different")},
    }


def compare(
    target: Target, rows: Sequence[Conversation], ours: Sequence[Any], theirs: Sequence[Any]
) -> list[str]:
    """One verdict per conversation, from the first turn that differs."""
    by_id = {row["id"]: row for row in theirs}
    verdicts = []
    for one in ours:
        other, verdict = by_id[one["id"]], "identical"
        pairs = zip(_turn_ids(one), _turn_ids(other), strict=True)
        for turn, (a, b) in enumerate(pairs):
            prompt = prompt_ids(target.tokenizer, one["messages"][: 2 * turn + 1], False)
            verdict = servers.parting(target, prompt, a, b)
            if verdict != "identical":
                break
        verdicts.append(verdict)
    assert {row.id for row in rows} == {row["id"] for row in ours}
    assert all(len(turns_of(row)) == len(_turn_ids(by_id[row.id])) for row in rows)
    return verdicts


def _turn_ids(row: dict[str, Any]) -> list[list[int]]:
    ids = row["answer_ids"]
    return [ids] if isinstance(ids[0], int) else ids


def _start(found: servers.Engine, gguf: Path, port: int, work: Path) -> subprocess.Popen[bytes]:
    return servers.start(found, gguf, port, work / f"regenerate-{port}.log", parallel=SLOTS)


def _kill_and_restart(
    out: Path,
    limit: int,
    alive: list[subprocess.Popen[bytes]],
    found: servers.Engine,
    gguf: Path,
    port: int,
    work: Path,
) -> None:
    """Kill the second server when a quarter is answered, and start it again when half is."""
    _until(lambda: _lines(out) >= limit / 4)
    alive[1].send_signal(signal.SIGKILL)
    alive[1].wait()
    _until(lambda: _lines(out) >= limit / 2)
    alive[1] = _start(found, gguf, port, work)


def _until(done: Callable[[], bool]) -> None:
    end = time.monotonic() + 600
    while not done() and time.monotonic() < end:
        time.sleep(0.02)


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _counter(metrics: str, name: str) -> float:
    line = next(line for line in metrics.splitlines() if line.startswith(name + " "))
    return float(line.split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(table(measure(given.prompts, given.repeats)))


if __name__ == "__main__":
    main()
