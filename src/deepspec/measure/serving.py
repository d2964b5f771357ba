"""An OpenAI-compatible server, measured from outside: its counters, and the time between its tokens."""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import httpx
import numpy as np

from deepspec.connections import Connection, connections, hidden
from deepspec.errors import ServerError
from deepspec.http_client import Servers
from deepspec.log import progress
from deepspec.schedule.costs import Identity, StepCosts, monotone

SWEEPS, ROWS = 3, (1, 2, 4, 8, 16)
PATIENCE = 60.0
"""Seconds without a byte after which a server counts as gone."""
WORDS = ("river", "stone", "cloud", "letter", "window", "garden", "number", "music", "table", "winter")


def metrics_of(url: str) -> str:
    """The text of a server's /metrics. Raises ServerError."""
    (way,) = connections([url])
    try:
        answer = way.client.get(f"{way.url}/metrics", timeout=PATIENCE)
        answer.raise_for_status()
    except httpx.HTTPError as error:
        raise _broken(way, f"its /metrics cannot be read: {error}") from error
    return answer.text


def profile_server(
    url: str, *, rows: tuple[int, ...] = ROWS, prompt: int = 64, answer: int = 64
) -> StepCosts:
    """Seconds of a server's decoding steps by requests in flight, and of the first token of a prompt.

    The step is the median time between two pieces of one answer while `rows` answers are streamed at once;
    the prompts differ, so that no cache has read them. A server tells nothing of wider passes or of a draft.
    Raises ServerError for what does not stream completions.
    """
    (way,) = connections([url])
    servers = Servers([url], lambda server: True)
    listed = servers.ask(servers.models)
    model, engine = next((name, facts.engine) for name, facts in listed.items())
    lengths, order = sorted({8, prompt, 4 * prompt}), random.Random(0)
    steps: dict[int, list[float]] = {count: [] for count in rows}
    first: dict[int, list[float]] = {length: [] for length in lengths}
    _streams(way, model, 1, prompt, 8, order)  # one-time costs
    with progress("measuring the server", SWEEPS * (len(rows) + len(lengths))) as bar:
        for _ in range(SWEEPS):
            for count in order.sample(rows, len(rows)):
                steps[count].append(_between(way, _streams(way, model, count, prompt, answer, order)))
                bar.update()
            for length in order.sample(lengths, len(lengths)):
                ((asked, *arrived),) = _streams(way, model, 1, length, 1, order)
                first[length].append(arrived[0] - asked)
                bar.update()
    found = monotone(np.array([np.median(steps[count]) for count in rows]))
    return StepCosts(
        np.array(rows),
        np.array([1]),
        np.array([prompt + answer // 2]),
        found[:, None, None],
        None,
        np.array(lengths),
        monotone(np.array([np.median(first[length]) for length in lengths])),
        np.zeros(len(rows)),
        Identity(way.url, "server", target=model),
        None,
        (
            f"measured through the API of {engine}: the time between pieces of a streamed answer, by "
            "requests in flight, and to the first piece, by words of the prompt; network included",
            "not measured: passes over several tokens of a row, the draft, and context in tokens, not words",
            "if the server speculates, a step here is a round of several tokens: restart it without "
            "speculation to measure plain steps",
        ),
    )


def _streams(
    way: Connection, model: str, count: int, prompt: int, answer: int, order: random.Random
) -> list[list[float]]:
    """For each of `count` requests at once: when it was asked, then when each piece of its answer came."""
    texts = [" ".join(order.choices(WORDS, k=prompt)) for _ in range(count)]

    def one(text: str) -> list[float]:
        body = {"model": model, "prompt": text, "max_tokens": answer, "temperature": 0, "stream": True}
        times = [time.perf_counter()]
        try:
            with way.client.stream(
                "POST", f"{way.url}/v1/completions", json=body | {"ignore_eos": True}, timeout=PATIENCE
            ) as response:
                if response.status_code != 200:
                    said = response.read().decode(errors="replace")[:200]
                    raise _broken(way, f"it streams no completions: HTTP {response.status_code}: {said}")
                for line in response.iter_lines():
                    if line.startswith("data:") and line[5:].strip() != "[DONE]":
                        times.append(time.perf_counter())
        except httpx.HTTPError as error:
            raise _broken(way, f"it broke off: {error}") from error
        if len(times) < 2:
            raise _broken(way, "its answer to a streamed completion has no pieces")
        return times

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, texts))


def _between(way: Connection, streams: list[list[float]]) -> float:
    """The median time between pieces while all answers are under way."""
    begin, end = max(times[1] for times in streams), min(times[-1] for times in streams)
    gaps = [b - a for times in streams for a, b in pairwise(times[1:]) if begin <= a and b <= end]
    if not gaps:
        never = f"{len(streams)} answers were never streamed at the same time, piece by piece"
        raise _broken(way, f"{never}: it may take fewer requests at once, or hold its answers back")
    return float(np.median(gaps))


def _broken(way: Connection, said: str) -> ServerError:
    return ServerError(
        f"the server cannot be measured: {hidden(said, way.secrets)}",
        where=way.url,
        next_step="give an OpenAI-compatible server's address, and fewer --rows if it takes few requests",
    )
