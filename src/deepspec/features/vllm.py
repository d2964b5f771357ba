"""Features from vLLM servers that run the target, by vLLM's hidden-states connector.

T tokens of a row, L layer outputs that a server gives, d hidden. A completion of one token names a file that
holds the row's hidden states; the server holds a lock on it until it is whole. Each server is checked with a
probe (`vllm_layers`) before its first row and after each failure.

Written from the released source of vLLM 0.33.0, and not verified on a real server.
"""

from __future__ import annotations

import errno
import os
import re
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from deepspec.data.tokens import Encoded
from deepspec.errors import ServerError
from deepspec.features.batches import batch_of, padded
from deepspec.features.vllm_layers import NOTED, Probe, server_layers, vllm_command
from deepspec.http_client import Listed, NoList, Passing, Policy, Refused, Server, Servers, Unanswered
from deepspec.log import note, warn
from deepspec.maths.blocks import FeatureBatch, with_last_hidden
from deepspec.pocket import packaged
from deepspec.targets import Target

IN_FLIGHT = 16
"""Rows that are asked for at a time, over all servers."""
AHEAD = 32
"""Rows that are fetched before a step asks for them; they wait in memory."""
TIMEOUT = 120.0
"""Seconds for one request, and for its file to be written."""
FILE_GRACE = 10.0
"""Seconds for a file's lock to show up here: network file systems are late."""


def addresses(urls: str) -> list[str]:
    """The addresses of servers, written with commas between."""
    return re.split(r",\s*(?=https?://)", urls)


class VllmSource:
    """A feature source (`batches.Source`) that asks vLLM servers, started as `vllm_command` says.

    urls: one address, or several with commas between. layers: of the target, in the order of the features.
    reads: names of the `blocks.READ_RULES` of the loss. max_length: longest row in tokens. Opening it checks
    every server, and `expect` announces rows before their step. Raises ServerError for a wrong server, and
    later if a row's features cannot be fetched.
    """

    def __init__(
        self,
        urls: str,
        target: Target,
        layers: Sequence[int],
        reads: Sequence[str],
        *,
        max_length: int | None = None,
        policy: Policy | None = None,
    ) -> None:
        self.target, self.layers, self.max_length = target, tuple(layers), max_length
        self.last_hidden = with_last_hidden(reads)
        self.wanted = server_layers(layers, target.spec.num_layers, self.last_hidden)
        name, context = packaged(target.spec.name), target.spec.context_length
        self.command = vllm_command(name, self.wanted, max_length, context=context)
        self.probe = Probe(target)
        policy = policy or Policy(timeout=TIMEOUT)
        self.servers = Servers(addresses(urls), self._check, concurrency=IN_FLIGHT, policy=policy)
        for server in self.servers.servers:
            try:
                server.facts = self._check(server)
            except (Passing, Unanswered) as error:
                raise self._wrong(server, f"the server gives no features: {error}") from error
        note(
            f"features come from vLLM at {self.servers}, whose layers agree with this target's; this source "
            "is not verified on a real server"
        )
        self._threads = ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="features")
        self._expected: deque[Encoded] = deque()
        self._asked: deque[tuple[Encoded, Future[Tensor]]] = deque()

    def expect(self, rows: Sequence[Encoded]) -> None:
        """Announce the rows that calls will ask for next, in this order: servers work on them meanwhile."""
        self._expected.extend(rows)
        self._ask_ahead()

    def __call__(self, rows: Sequence[Encoded], width: int) -> FeatureBatch:
        target, count = self.target, len(self.layers) + self.last_hidden
        states = torch.zeros(len(rows), width, count, target.spec.hidden_size, dtype=target.dtype)
        try:
            for i, future in enumerate([self._asked_for(row) for row in rows]):
                states[i, : len(rows[i].ids)] = future.result()
        except BaseException:
            self.close()
            raise
        self._ask_ahead()
        states = states.to(target.device)
        hidden = target.finish(states[:, :, -1]) if self.last_hidden else None
        return batch_of(rows, padded(rows, width), states[:, :, : len(self.layers)].flatten(2), hidden)

    def close(self) -> None:
        """Ask for nothing more. Requests under way end by themselves, and their files are still removed."""
        self._expected.clear()
        self._threads.shutdown(wait=False, cancel_futures=True)
        self.servers.close()

    def _asked_for(self, row: Encoded) -> Future[Tensor]:
        if self._asked and self._asked[0][0] is row:
            return self._asked.popleft()[1]
        if not self._asked and self._expected and self._expected[0] is row:
            self._expected.popleft()
        return self._threads.submit(self._fetch, row)

    def _ask_ahead(self) -> None:
        while self._expected and len(self._asked) < AHEAD:
            row = self._expected.popleft()
            self._asked.append((row, self._threads.submit(self._fetch, row)))

    def _fetch(self, row: Encoded) -> Tensor:
        """[T, wanted, d] of one row. This and the methods below run in threads."""

        def question(server: Server) -> Tensor:
            model, columns = server.facts
            return self._read(server, model, row.ids)[:, columns]

        try:
            return self.servers.ask(question)
        except Unanswered as error:
            raise ServerError(
                f"no features of row {row.id}: {error}",
                where=str(self.servers),
                next_step="correct the server and run the same command again: it continues from the last "
                f"checkpoint. The server is started with\n{self.command}",
            ) from error

    def _check(self, server: Server) -> tuple[str, tuple[int, ...]]:
        """The server's name for its model, and which of its outputs are the wanted layers."""
        try:
            model, listed = next(iter(self.servers.models(server).items()))
        except (Refused, NoList):  # a gateway may forbid the list only; the probe tells
            model, listed = packaged(self.target.spec.name), Listed("vllm", None)
        longest = listed.max_length
        if longest is not None and self.max_length is not None and longest <= self.max_length:
            raise self._wrong(
                server,
                f"the server takes {longest} tokens, and rows have up to {self.max_length} (data.max_length) "
                "and one to generate",
            )
        theirs = self._read(server, model, self.probe.ids)
        try:
            columns, furthest = self.probe.columns(theirs, self.wanted)
        except ServerError as error:
            raise self._wrong(server, error.what) from None
        if furthest > NOTED and server.facts is None:
            warn(
                f"{server.name}: hidden states are {furthest:.1%} away from those computed here. Is what it "
                "serves quantised, or another revision?"
            )
        return model, columns

    def _read(self, server: Server, model: str, ids: Sequence[int]) -> Tensor:
        """[T, L, d] of these tokens, every layer output that a server gives.

        Raises Passing, Unanswered; ServerError if the connector is off, the file is out of reach, or it is of
        other tokens.
        """
        body = {"model": model, "prompt": list(ids), "max_tokens": 1, "temperature": 0}
        reply = self.servers.send(server, "/v1/completions", {**body, "return_token_ids": True})
        given = reply.get("kv_transfer_params")
        path = given.get("hidden_states_path") if isinstance(given, dict) else None
        if not isinstance(path, str) or not Path(path).name or "\0" in path:
            raise self._wrong(
                server, "the server answers without features: its hidden-states connector is not switched on"
            )
        tensors = self._load_when_written(server, Path(path))
        if not {"hidden_states", "token_ids"} <= tensors.keys():
            raise self._wrong(server, f"the server wrote {path} with {sorted(tensors)}")
        theirs, states = tensors["token_ids"].flatten().tolist(), tensors["hidden_states"]
        if states.dim() != 3 or not states.is_floating_point() or not bool(states.isfinite().all()):
            raise self._wrong(
                server, f"the server gave {states.dtype} of {list(states.shape)}, not [T, L, d] of numbers"
            )
        if theirs != list(ids) or len(states) != len(ids):
            raise self._wrong(
                server,
                f"the server gave {len(states)} positions of features, and {len(theirs)} token ids that are "
                f"not the {len(ids)} asked for; with prefix caching that is known to happen",
            )
        return states

    def _load_when_written(self, server: Server, file: Path) -> dict[str, Tensor]:
        """The tensors of a file that the server may still be writing; the file is then removed."""
        import fcntl  # not on Windows, and neither is vLLM

        lock, limit = Path(f"{file}.lock"), self.servers.policy.timeout
        end = time.monotonic() + limit
        handle = self._open_lock(server, file, lock)
        try:
            while True:
                try:
                    fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    break
                except BlockingIOError:  # polled: a wait inside flock would have no time-out
                    if time.monotonic() > end:
                        raise Passing(f"{file} was not written within {limit:g} s") from None
                    time.sleep(0.005)
                except OSError as error:
                    raise ServerError(
                        f"the file system of {lock} has no locks, so it is unknown when the server is done: "
                        f"{error}",
                        where=server.name,
                        next_step="put the server's shared_storage_path on one that has (local, or NFS 4)",
                    ) from error
            try:
                tensors = load(file.read_bytes())
            except (OSError, SafetensorError, KeyError) as error:  # KeyError: a number format unknown here
                # The writer let go without having written: most likely a full disk, which readers empty.
                raise Passing(f"the server did not finish {file} (is its storage full?): {error}") from error
        finally:
            os.close(handle)
        try:
            file.unlink(missing_ok=True)
            lock.unlink(missing_ok=True)
        except OSError as error:
            raise ServerError(
                f"features were read from {file}, which cannot be removed: {error.strerror}",
                where=server.name,
                next_step="train as a user who may remove what the server writes",
            ) from error
        return tensors

    def _open_lock(self, server: Server, file: Path, lock: Path) -> int:
        """Open the lock of a file, which the server makes before it answers. Raises ServerError."""
        end = time.monotonic() + FILE_GRACE
        while True:
            try:
                return os.open(lock, os.O_RDONLY)
            except OSError as error:
                if error.errno == errno.ENOENT and file.parent.is_dir() and time.monotonic() < end:
                    time.sleep(0.02)
                    continue
                if os.path.exists(file) and not os.path.exists(lock):  # Path.exists raises for some names
                    what = f"the server writes {file} without a lock, so it is unknown when it is whole"
                    raise self._wrong(server, what) from error
                raise ServerError(
                    f"the server put features into {file}, and they cannot be read here ({error.strerror})",
                    where=server.name,
                    next_step="train on the machine that serves, or give the server a shared_storage_path "
                    "that both see under the same name (`deepspec data features-server --storage FOLDER`)",
                ) from error

    def _wrong(self, server: Server, what: str) -> ServerError:
        """The error for a server that only another start puts right."""
        return ServerError(what, where=server.name, next_step=f"start it with\n{self.command}")
