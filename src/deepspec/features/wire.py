"""One question to one server: token ids in, the target's inner streams out, as vLLM and SGLang send them.

T tokens, L streams that a server gives, d hidden. The formats are those of vLLM 0.33.0 (hidden-states
connector: a completion names a file) and SGLang 0.5.23 (`/generate`: nested JSON lists), read in their
released source, and not verified on a real server. Nothing here tries twice: `Passing` says that it may help.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from deepspec.errors import ServerError

FILE_GRACE = 10.0
"""Seconds for a file's lock to show up here: network file systems are late."""


@dataclass(frozen=True)
class Access:
    """How servers are asked; `URL?key=value&…` sets these. Times in seconds.

    timeout: for one request, and for its file to be written. retries: of one row, after answers that may
    change (429, 5xx, no connection, time-outs). backoff: the first pause between them; it doubles.
    in_flight: requests at a time, over all servers. ahead: rows fetched before a step asks for them; they
    wait in memory. keep_files: leave vLLM's files where they are. storage: where vLLM's
    `shared_storage_path` is seen from here, if not under the same path. api_key_env: the environment variable
    with the key of a server that was started with one.
    """

    timeout: float = 120.0
    retries: int = 8
    backoff: float = 0.5
    in_flight: int = 16
    ahead: int = 32
    keep_files: bool = False
    storage: str = ""
    api_key_env: str = "OPENAI_API_KEY"


class Passing(Exception):
    """A failure that another try may not meet. after: seconds that the server asks to be left alone."""

    def __init__(self, what: str, after: float = 0.0) -> None:
        super().__init__(what)
        self.after = after


@dataclass
class Server:
    """One address. command: the line that starts it as it must be; hidden_size: d; model: vLLM's name."""

    url: str
    client: httpx.Client
    access: Access
    command: str
    hidden_size: int
    model: str = ""

    def post(self, route: str, body: dict[str, Any]) -> dict[str, Any]:
        return self._answer("POST", route, json=body)

    def get(self, route: str) -> dict[str, Any]:
        return self._answer("GET", route)

    def _answer(self, method: str, route: str, **content: Any) -> dict[str, Any]:
        """The reply's JSON object. Raises Passing, or ServerError for what will stay so."""
        try:
            reply = self.client.request(method, self.url + route, **content)
        except httpx.TransportError as error:
            raise Passing(f"{type(error).__name__}: {error}") from error
        said = f"HTTP {reply.status_code}: {reply.text[:300].strip()}"
        if reply.status_code == 429 or reply.status_code >= 500:
            raise Passing(said, _seconds(reply.headers.get("retry-after", "")))
        if reply.status_code >= 400:
            raise self.wrong(f"refuses the request with {said}")
        try:
            found = reply.json()
        except ValueError as error:
            raise Passing(f"not JSON: {reply.text[:100]!r}") from error
        if not isinstance(found, dict):
            raise Passing(f"not a JSON object: {reply.text[:100]!r}")
        return found

    def wrong(self, what: str) -> ServerError:
        """Of an answer that no other try will change, with the command line that puts the server right."""
        return ServerError(f"the server {what}", where=self.url, next_step=f"start it with\n{self.command}")


Read = Callable[[Server, Sequence[int]], Tensor]
"""(server, token ids) -> [T, L, d] every stream that it gives of them, as they came."""


def _seconds(header: str) -> float:
    """Of a Retry-After header; 0 where it is a date, or nothing."""
    try:
        return max(float(header), 0.0)
    except ValueError:
        return 0.0


# ── vLLM ──────────────────────────────────────────────────────────────────────────────────────────────


def read_vllm(server: Server, ids: Sequence[int]) -> Tensor:
    """[T, L, d] by the hidden-states connector: a completion of one token names a file that has them.

    Raises Passing; ServerError where the connector is off, the file is out of reach, or not of these tokens.
    """
    body = {"model": server.model, "prompt": list(ids), "max_tokens": 1, "temperature": 0}
    reply = server.post("/v1/completions", {**body, "return_token_ids": True})
    named = (reply.get("kv_transfer_params") or {}).get("hidden_states_path")
    if named is None:
        raise server.wrong("answers without features: its hidden-states connector is not switched on")
    file = Path(server.access.storage, Path(named).name) if server.access.storage else Path(named)
    tensors = _load_when_written(server, file)
    theirs, streams = tensors["token_ids"].tolist(), tensors["hidden_states"]
    if theirs != list(ids) or len(streams) != len(ids):
        raise server.wrong(
            f"gave {len(streams)} positions of features, and {len(theirs)} token ids that are not the "
            f"{len(ids)} asked for; with prefix caching that is known to happen"
        )
    if streams.dim() != 3 or not streams.is_floating_point() or not bool(streams.isfinite().all()):
        raise server.wrong(f"gave {streams.dtype} of shape {list(streams.shape)}, not [T, L, d] of numbers")
    return streams


def _load_when_written(server: Server, file: Path) -> dict[str, Tensor]:
    """The tensors of a file that the server may still be writing; it then goes, unless it is to be kept."""
    lock = Path(f"{file}.lock")
    with _reading(server, file, lock):
        try:
            tensors = load(file.read_bytes())
        except (OSError, SafetensorError) as error:
            # The writer let go without having written: a full disk, most likely, that readers are emptying.
            raise Passing(f"the server did not finish {file} (is its storage full?): {error}") from error
        if not {"hidden_states", "token_ids"} <= tensors.keys():
            raise server.wrong(f"wrote {file} with {sorted(tensors)}, not hidden_states and token_ids")
        if not server.access.keep_files:
            _remove(server, file, lock)
    return tensors


def _remove(server: Server, *paths: Path) -> None:
    try:
        for path in paths:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise ServerError(
            f"features are read, and cannot be removed: {error}",
            where=server.url,
            next_step="train as a user who may, or add ?keep_files=true to the URL, and empty the folder",
        ) from error


@contextmanager
def _reading(server: Server, file: Path, lock: Path) -> Iterator[None]:
    """Hold the lock of a file together with other readers: its writer holds it alone until it is done.

    Raises ServerError where the lock cannot be seen from here, Passing when the writer takes too long.
    """
    import fcntl  # not on Windows, and neither is vLLM

    end, pause = time.monotonic() + server.access.timeout, 0.001
    handle = _opened(server, file, lock)
    try:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                # Polled, as waiting inside flock would know no time-out.
                if time.monotonic() > end:
                    raise Passing(f"{file} was not written within {server.access.timeout:g} s") from None
                time.sleep(pause)
                pause = min(2 * pause, 0.05)
            except OSError as error:
                raise ServerError(
                    f"the file system of {lock} knows no locks, so nobody can tell when the server is done: "
                    f"{error}",
                    where=server.url,
                    next_step="put the server's shared_storage_path on one that does (local, or NFS 4)",
                ) from error
        yield
    finally:
        os.close(handle)


def _opened(server: Server, file: Path, lock: Path) -> int:
    """A handle of the lock, which the server makes before it answers. Raises ServerError."""
    end = time.monotonic() + min(FILE_GRACE, server.access.timeout)
    while True:
        try:
            return os.open(lock, os.O_RDONLY)
        except OSError as error:
            if file.parent.is_dir() and time.monotonic() < end:
                time.sleep(0.02)
                continue
            if file.exists() and not lock.exists():
                raise server.wrong(
                    f"writes {file} without a lock, so nobody can tell when it is whole "
                    "(use_synchronization_lock is off)"
                ) from error
            raise ServerError(
                f"the server put features into {file}, and they cannot be read here ({error.strerror})",
                where=server.url,
                next_step="train on the machine that serves, or put the server's shared_storage_path on a "
                "file system that both see; where it has another path here, add ?storage=FOLDER to the URL",
            ) from error


# ── SGLang ────────────────────────────────────────────────────────────────────────────────────────────


def read_sglang(server: Server, ids: Sequence[int]) -> Tensor:
    """[T, L, d] by /generate. Raises Passing; ServerError where features are off, or of too few tokens."""
    sampling = {"max_new_tokens": 1, "temperature": 0}
    body = {"input_ids": list(ids), "sampling_params": sampling, "return_hidden_states": True}
    states = (server.post("/generate", body).get("meta_info") or {}).get("hidden_states")
    if not states:
        raise server.wrong("answers without features: it was not started to return them")
    try:
        streams = torch.from_numpy(np.asarray(states[0], dtype=np.float32))
    except (ValueError, TypeError) as error:
        raise server.wrong(f"gave hidden states that are no table of numbers ({error})") from error
    if len(streams) < len(ids):
        raise server.wrong(
            f"gave features of {len(streams)} tokens, not of {len(ids)}: it leaves out those of a cached "
            "prefix, and of all chunks of a long prompt but the last"
        )
    if streams.dim() != 2 or len(streams) > len(ids) or not bool(streams.isfinite().all()):
        raise server.wrong(f"gave numbers of shape {list(streams.shape)} for {len(ids)} tokens")
    if streams.shape[1] % server.hidden_size:
        raise server.wrong(
            f"gave {streams.shape[1]} numbers a token, no multiple of the target's {server.hidden_size}"
        )
    return streams.view(len(ids), -1, server.hidden_size)
