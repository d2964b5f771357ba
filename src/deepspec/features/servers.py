"""Features from an inference server that runs the target: vLLM by its hidden-states connector, or SGLang.

T tokens of a row, L streams that a server gives, d hidden, n layers. What comes out is what `online` gives,
but the forward pass happens elsewhere, and ahead of the step that needs it. An answer does not say which
layers are in it, so each server is asked about a short probe first, and its streams are matched with those
that the target computes here: wrong layers, another model or another revision show before training.

Tested against a stand-in on the same wire formats (`feature_wire.py`), and not verified on a real server.
"""

from __future__ import annotations

import itertools
import os
import random
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import Any
from urllib.parse import parse_qsl

import httpx
import torch
from torch import Tensor

from deepspec.data.tokens import Encoded
from deepspec.errors import ServerError, nearest
from deepspec.features.batches import padded
from deepspec.features.launch import sglang_command, stream_ids, vllm_command
from deepspec.features.wire import Access, Passing, Read, Server, read_sglang, read_vllm
from deepspec.log import note, warn
from deepspec.maths.blocks import FeatureBatch, with_last_hidden
from deepspec.pocket import packaged
from deepspec.targets import Target

PROBE_TOKENS = 24
NOTED, REFUSED = 0.05, 0.25
"""Relative distances between a server's streams and the target's own from which a warning says so, and from
which they are not this target's. Chosen, not measured on a server: on the pocket target bfloat16 alone is
0.013 away at most, and the next layer 0.22 at least."""
LONGEST_PAUSE = 60.0


@dataclass
class Opened:
    """A server whose streams are known. columns: the wanted ones among them, in their order; probe: what it
    answered; doubted: it failed since, and may have come back as another."""

    server: Server
    columns: tuple[int, ...]
    probe: Tensor
    doubted: bool = False


class ServerSource:
    """A feature source (`features.Source`) that asks servers; `expect` tells it of rows before their step.

    layers: of the target, in the order of the features. Its calls raise ServerError once a row's features
    could not be had from any server.
    """

    def __init__(
        self,
        opened: Sequence[Opened],
        read: Read,
        target: Target,
        layers: Sequence[int],
        last_hidden: bool,
    ) -> None:
        self.opened, self.read, self.target = opened, read, target
        self.layers, self.last_hidden = tuple(layers), last_hidden
        self.access = opened[0].server.access
        self._turn = itertools.count()
        self._closed = threading.Event()
        self._pool = ThreadPoolExecutor(self.access.in_flight, thread_name_prefix="features")
        self._waiting: deque[Encoded] = deque()
        self._asked: deque[tuple[Encoded, Future[Tensor]]] = deque()

    def expect(self, rows: Sequence[Encoded]) -> None:
        """Rows that calls will ask for next, in this order: servers work on them meanwhile."""
        self._waiting.extend(rows)
        self._ask_ahead()

    def __call__(self, rows: Sequence[Encoded], width: int) -> FeatureBatch:
        ids, mask, lengths = padded(rows, width)
        target, count = self.target, len(self.layers) + self.last_hidden
        streams = torch.zeros(len(rows), width, count, target.spec.hidden_size, dtype=target.dtype)
        try:
            for i, future in enumerate([self._asked_for(row) for row in rows]):
                streams[i, : len(rows[i].ids)] = future.result()
        except BaseException:
            self.close()
            raise
        self._ask_ahead()
        streams = streams.to(target.device)
        return FeatureBatch(
            input_ids=ids.to(target.device),
            loss_mask=mask.to(target.device),
            features=streams[:, :, : len(self.layers)].flatten(2),
            last_hidden=target.finish(streams[:, :, -1]) if self.last_hidden else None,
            lengths=lengths.to(target.device),
            row_ids=tuple(r.id for r in rows),
        )

    def close(self) -> None:
        """Ask for nothing more. Requests under way end by themselves, and their files are still removed."""
        self._closed.set()
        self._waiting.clear()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _asked_for(self, row: Encoded) -> Future[Tensor]:
        if self._asked and self._asked[0][0] is row:
            return self._asked.popleft()[1]
        if not self._asked and self._waiting and self._waiting[0] is row:
            self._waiting.popleft()
        return self._pool.submit(self._patiently, row)

    def _ask_ahead(self) -> None:
        while self._waiting and len(self._asked) < self.access.ahead:
            row = self._waiting.popleft()
            self._asked.append((row, self._pool.submit(self._patiently, row)))

    def _patiently(self, row: Encoded) -> Tensor:
        """[T, L, d] of one row, of the wanted streams, from whichever server's turn it is. In a thread."""
        for attempt in range(self.access.retries + 1):
            opened = self.opened[next(self._turn) % len(self.opened)]
            try:
                self._settle_doubt(opened)
                return self.read(opened.server, row.ids)[:, opened.columns]
            except Passing as error:
                opened.doubted = True
                failure, pause = error, max(error.after, pause_after(attempt, self.access.backoff))
            if attempt == 2:
                warn(f"{opened.server.url}: {failure}; row {row.id} is asked for again")
            if attempt == self.access.retries or self._closed.wait(min(pause, LONGEST_PAUSE)):
                break
        raise ServerError(
            f"no features of row {row.id} after {attempt + 1} attempts; the last ended with: {failure}",
            where=", ".join(o.server.url for o in self.opened),
            next_step="look at the server; the same command then goes on from the run's last checkpoint",
        ) from failure

    def _settle_doubt(self, opened: Opened) -> None:
        """A server that failed may have been started anew with other layers: the probe's answer tells."""
        if not opened.doubted:
            return
        again = self.read(opened.server, probe_ids(self.target))
        if again.shape != opened.probe.shape or apart(again, opened.probe) > NOTED:
            raise opened.server.wrong("came back giving other features than it gave at first")
        opened.doubted = False


def pause_after(attempt: int, backoff: float) -> float:
    """Seconds to leave a server alone after a failed attempt (the first is 0): doubling, bounded, and spread
    by half either way, so that many rows do not come back at once."""
    return min(backoff * 2.0**attempt, LONGEST_PAUSE) * random.uniform(0.5, 1.5)


# ── opening ───────────────────────────────────────────────────────────────────────────────────────────


def vllm_source(
    urls: str,
    target: Target,
    layers: Sequence[int],
    reads: Sequence[str],
    *,
    max_length: int | None = None,
    access: Access | None = None,
) -> ServerSource:
    """Features from vLLM servers started as `feature_launch.vllm_command` says.

    urls: one address or several, comma separated, asked in turns; `?key=value&…` sets fields of `Access`.
    reads: names of the `blocks.READ_RULES` of the loss. max_length: longest row in tokens. Not verified on a
    real server. Raises ServerError.
    """
    last_hidden = with_last_hidden(reads)
    model, depth = packaged(target.spec.name), target.spec.num_layers
    command = vllm_command(model, layers, depth, last_hidden=last_hidden, max_length=max_length)
    servers = _servers(urls, access, command, target)
    for server in servers:
        _ask_name(server, max_length)
    return _open("vLLM", servers, read_vllm, target, layers, last_hidden)


def sglang_source(
    urls: str,
    target: Target,
    layers: Sequence[int],
    reads: Sequence[str],
    *,
    max_length: int | None = None,
    access: Access | None = None,
) -> ServerSource:
    """Features from SGLang servers started as `feature_launch.sglang_command` says.

    As `vllm_source`, but there is no last hidden state to be had: a loss that reads it is refused before
    anything is asked. Not verified on a real server. Raises ServerError.
    """
    model, last_hidden = packaged(target.spec.name), with_last_hidden(reads)
    command = sglang_command(model, layers, last_hidden=last_hidden, max_length=max_length)
    return _open("SGLang", _servers(urls, access, command, target), read_sglang, target, layers, last_hidden)


def _open(
    kind: str,
    servers: Sequence[Server],
    read: Read,
    target: Target,
    layers: Sequence[int],
    last_hidden: bool,
) -> ServerSource:
    wanted = stream_ids(layers, target.spec.num_layers, last_hidden)
    ids, opened = probe_ids(target), []
    for server in servers:
        try:
            probe = read(server, ids)
        except Passing as error:
            raise _unreachable(server, error) from error
        opened.append(Opened(server, matching_columns(server, probe, target, ids, wanted), probe))
    note(
        f"features come from {kind} at {', '.join(s.url for s in servers)}, whose layers agree with this "
        "target's. This source is tested on a stand-in, and not verified on a real server."
    )
    return ServerSource(opened, read, target, layers, last_hidden)


def _servers(urls: str, access: Access | None, command: str, target: Target) -> list[Server]:
    addresses, _, query = urls.partition("?")
    settings = _settings(access or Access(), query)
    key = os.environ.get(settings.api_key_env)
    client = httpx.Client(
        timeout=httpx.Timeout(settings.timeout, connect=min(settings.timeout, 10.0)),
        limits=httpx.Limits(max_connections=settings.in_flight + 1),
        headers={"Authorization": f"Bearer {key}"} if key else {},
    )
    servers = []
    for address in (a.strip() for a in addresses.split(",")):
        if not address.startswith(("http://", "https://")):
            raise ServerError(
                f"not the address of a server: {address!r}",
                next_step="write data.features=vllm:http://HOST:PORT (several: commas between)",
            )
        url = address.rstrip("/").removesuffix("/v1")
        servers.append(Server(url, client, settings, command, target.spec.hidden_size))
    return servers


def _settings(access: Access, query: str) -> Access:
    """`access` with the values of a query string laid over it. Raises ServerError."""
    kinds: dict[str, type] = {f.name: type(getattr(access, f.name)) for f in fields(access)}
    given: dict[str, Any] = {}
    for key, text in parse_qsl(query, keep_blank_values=True):
        if key not in kinds:
            close = nearest(key, kinds)
            raise ServerError(
                f"a feature server has no setting {key!r}" + (f"; did you mean {close!r}?" if close else ""),
                next_step=f"there are {', '.join(kinds)}",
            )
        try:
            given[key] = {"true": True, "false": False}[text] if kinds[key] is bool else kinds[key](text)
        except (KeyError, ValueError) as error:
            raise ServerError(f"{key}={text} is no {kinds[key].__name__}", where=f"?{query}") from error
    access = replace(access, **given)
    if min(access.in_flight, access.ahead) < 1 or access.retries < 0 or access.timeout <= 0:
        raise ServerError(
            "in_flight and ahead are at least 1, retries 0, and timeout above 0", where=f"?{query}"
        )
    return access


def _ask_name(server: Server, max_length: int | None) -> None:
    """Learn what vLLM calls its model, and that its context holds the longest row."""
    try:
        card = server.get("/v1/models")["data"][0]
        server.model, longest = str(card["id"]), card.get("max_model_len")
    except Passing as error:
        raise _unreachable(server, error) from error
    except (KeyError, IndexError, TypeError) as error:
        raise server.wrong("lists no model at /v1/models") from error
    if longest is not None and max_length is not None and longest <= max_length:
        raise server.wrong(
            f"takes {longest} tokens, and rows have up to {max_length} (data.max_length) and one to generate"
        )


def _unreachable(server: Server, error: Exception) -> ServerError:
    return ServerError(
        f"no features from the server: {error}",
        where=server.url,
        next_step=f"start it, and wait until it listens\n{server.command}",
    )


# ── whose streams are these ───────────────────────────────────────────────────────────────────────────


def probe_ids(target: Target) -> list[int]:
    """A few tokens from the middle of the vocabulary: special ones lie at its ends."""
    third = target.vocab_size // 3
    return [third + i * third // PROBE_TOKENS for i in range(PROBE_TOKENS)]


def matching_columns(
    server: Server, theirs: Tensor, target: Target, ids: Sequence[int], wanted: Sequence[int]
) -> tuple[int, ...]:
    """Which of a server's streams [T, L, d] are the wanted ones, numbered as `stream_ids` numbers them.

    Raises ServerError where one of them is missing, or where the streams are not this target's.
    """
    if theirs.shape[-1] != target.spec.hidden_size:
        raise server.wrong(
            f"gives streams of width {theirs.shape[-1]}, and {target.spec.name} has {target.spec.hidden_size}"
        )
    found = nearest_streams(theirs, target, ids)
    given, furthest = [stream for stream, _ in found], max(distance for _, distance in found)
    if furthest > REFUSED:
        raise server.wrong(
            f"computes other numbers than {target.spec.name} here from the same tokens (relative distance "
            f"{furthest:.2f}): another model, other weights, or not the streams between layers"
        )
    if not set(wanted) <= set(given):
        past = " (the last one past the final norm)" if target.spec.num_layers + 1 in given else ""
        raise server.wrong(
            f"gives the streams after {given} layers{past}, and those after {sorted(wanted)} are needed"
        )
    if furthest > NOTED:
        warn(
            f"{server.url}: features are {furthest:.1%} away from those computed here; is what it serves "
            "quantised, or another revision?"
        )
    return tuple(given.index(stream) for stream in wanted)


def nearest_streams(theirs: Tensor, target: Target, ids: Sequence[int]) -> list[tuple[int, float]]:
    """For each stream of [T, L, d]: after how many layers the target computes it, and how far apart they are.

    The stream after all n layers is compared past the final norm, where the target has it; n + 1 stands for
    a stream that is past it already.
    """
    depth = target.spec.num_layers
    ours = target.read(torch.tensor([list(ids)]), range(-1, depth - 1))
    assert ours.features is not None
    inner, last = ours.features[0].view(len(ids), depth, -1), ours.last_hidden[0]
    theirs = theirs.to(target.device, target.dtype)
    found = []
    for stream in theirs.unbind(1):
        distances = [apart(stream, inner[:, j]) for j in range(depth)]
        distances += [apart(target.finish(stream), last), apart(stream, last)]
        best = min(range(depth + 2), key=distances.__getitem__)
        found.append((best, distances[best]))
    return found


def apart(a: Tensor, b: Tensor) -> float:
    """|a − b| / |b| of streams [T, …, d]: the worst stream's median over tokens, because the first tokens may
    carry huge values that hide all else."""
    a, b = a.float(), b.float()
    far = (a - b).norm(dim=-1) / b.norm(dim=-1).clamp(min=1e-9)
    return float(far.median(dim=0).values.max())
