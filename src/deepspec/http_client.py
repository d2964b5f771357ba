"""A client for several HTTP servers that do the same work, such as OpenAI-compatible servers of one model.

A question goes to the server with the fewest questions under way. What happens to one that fails:

* no connection, a failed check, or the server says that it is busy (429, or 503 with Retry-After): the
  question goes to the next free server, and this costs it no attempt;
* 408, 425, 5xx, a time-out, or an answer that cannot be read: the question is asked again, at another server
  if there is one, up to `Policy.attempts` times in all (`Unanswered`);
* any other 4xx: the question itself is refused, and is not asked again (`Unanswered`).

A server that failed is left alone: as long as its Retry-After asks for, or else for `Policy.first_rest`
seconds, doubling with each failure in a row up to `Policy.longest_rest`, less up to half by chance. Until it
answers again it gets one question at a time, each after a check, because it may have come back as another
server. If no server can be reached, or all are busy, for `Policy.patience` seconds (`Policy.first_patience`
if none has ever answered), `ask` raises ServerError; what waiting does not change (a key, a certificate, a
proxy, a name: `connections`) raises it at once.
"""

from __future__ import annotations

import json
import math
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import httpx
from httpx_retries import Retry

from deepspec.connections import API_KEY, Connection, connections, hidden, lasting, proxy_refuses
from deepspec.errors import ServerError, without_logins
from deepspec.log import note, warn

T = TypeVar("T")

CHECK_TIMEOUT = 10.0
"""Seconds for an answer that costs the server nothing, such as the list of its models."""
LONGEST_REST = 86_400.0
"""Seconds at most that a server is left alone, whatever its Retry-After asks for."""
LARGEST = 1 << 28
"""Bytes of an answer at most; a longer one is not read to its end."""
ADDRESS = "give the address that comes before /v1, such as http://127.0.0.1:8000"
TOLD_AFTER = 3
"""Failures in a row after which the user is told about a server."""


@dataclass(frozen=True)
class Policy:
    """How patient a client is; the module's docstring explains each setting. Times are in seconds."""

    timeout: float = 600.0
    attempts: int = 5
    first_rest: float = 0.5
    longest_rest: float = 8.0
    patience: float = 600.0
    first_patience: float = 30.0


class Unanswered(Exception):
    """A question that gets no answer; the message is the reason."""


class Redirected(Unanswered):
    """The server's answer is another address."""


class Exhausted(Unanswered):
    """Every attempt at a question failed, or a server that takes the key forbids it."""


class Passing(Exception):
    """An attempt failed, and another one may not. after: seconds that the server asks to be left alone;
    costs: whether this counts as an attempt at the question."""

    def __init__(self, reason: str, *, after: float = 0.0, costs: bool = True) -> None:
        super().__init__(reason)
        self.after, self.costs = after, costs


class Unreadable(Passing):
    """An answer that is not a JSON object."""


class Refused(ServerError):
    """The server refuses the key, or this route to everybody."""


class NoList(ServerError):
    """The server has no list of its models."""


class Listed(NamedTuple):
    """A model in a server's list. engine: the server's name for itself; max_length: of a sequence in tokens,
    if it tells."""

    engine: str
    max_length: int | None


@dataclass(eq=False)
class Server:
    """One server. facts: what the check found, None before it; useful: it has answered a question; failures:
    in a row; rests_until: on the monotonic clock."""

    way: Connection
    facts: Any = None
    useful: bool = False
    under_way: int = 0
    asked: int = 0
    failures: int = 0
    rests_until: float = 0.0

    @property
    def name(self) -> str:
        return self.way.url


class Servers:
    """The servers, for any number of threads; at most `concurrency` questions are with each at a time.

    check: finds out about a server before its first question and after a failure, and returns the facts; it
    may raise what `send` raises, and ServerError for a server that is the wrong one. Raises ServerError for
    an address or a key that cannot be used.
    """

    def __init__(
        self,
        urls: Sequence[str],
        check: Callable[[Server], Any],
        *,
        concurrency: int = 32,
        policy: Policy | None = None,
        api_key_env: str = API_KEY,
    ) -> None:
        self.servers = [Server(way) for way in connections(urls, api_key_env)]
        self._check, self.concurrency, self.policy = check, concurrency, policy or Policy()
        self._retry = Retry(
            status_forcelist=[408, 425, 429, *range(500, 600)],
            backoff_factor=self.policy.first_rest,
            max_backoff_wait=self.policy.longest_rest,
            backoff_jitter=0.5,
        )
        self._changed = threading.Condition()
        self._heard = False  # a server has answered, or said that it is busy
        self._lost_since: float | None = None
        self._closed = False

    def __str__(self) -> str:
        return ", ".join(server.name for server in self.servers)

    def ask(self, question: Callable[[Server], T]) -> T:
        """What `question` makes of the server that it is given: it sends requests, and may be called again.

        Raises Unanswered for this question, ServerError if there is no server left to ask.
        """
        failed_at: Server | None = None
        attempts = 0
        while True:
            server = self._take(failed_at)
            checked = False
            try:
                if server.facts is None or server.failures:
                    server.facts = self._check(server)
                checked = self._heard = True
                answer = question(server)
            except Passing as trouble:
                costs = checked and trouble.costs
                self._failed(server, trouble, costs)
                attempts += costs
                if attempts >= self.policy.attempts:
                    raise Exhausted(f"after {attempts} attempts: {trouble}") from trouble
            except Unanswered:
                self._answered(server)
                raise
            except Refused as error:
                if not (checked and server.useful):
                    raise
                self._answered(server)  # it takes the key, and forbids this question
                raise Exhausted(error.what) from error
            else:
                self._answered(server)
                return answer
            finally:
                with self._changed:
                    server.under_way -= 1
                    self._changed.notify_all()
            failed_at = server

    def send(
        self, server: Server, path: str, body: dict[str, Any] | None = None, timeout: float = math.inf
    ) -> dict[str, Any]:
        """The JSON object with which a server answers one request: POST with a body, GET without.

        Raises Passing, Unanswered, Refused for a key, and ServerError for what waiting does not change.
        """
        way, limit = server.way, min(timeout, self.policy.timeout)
        headers, end, content = {"Content-Type": "application/json"}, time.monotonic() + limit, bytearray()
        try:
            asked = None if body is None else json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise Unanswered(f"the question cannot be sent as JSON: {error}") from error
        try:
            with way.client.stream(
                "GET" if body is None else "POST",
                way.url + path,
                content=asked,
                headers=None if body is None else headers,
                timeout=httpx.Timeout(limit, connect=min(10.0, limit), pool=None),
            ) as response:
                for piece in response.iter_bytes():
                    content += piece
                    if len(content) > LARGEST:
                        raise Passing(f"the answer is longer than {LARGEST >> 20} MiB")
                    if time.monotonic() > end:
                        raise Passing(f"no whole answer within {limit:g} s")
        except httpx.RequestError as error:
            raise self._trouble(server, error, limit) from error
        text = content.decode(errors="replace")
        self._check_status(server, response, text)
        found = _parsed(content)
        if not isinstance(found, dict):
            raise Unreadable(f"the answer is not a JSON object: {hidden(text, way.secrets)[:80]!r}")
        server.useful |= server.facts is not None  # more than the first check
        return found

    def models(self, server: Server) -> dict[str, Listed]:
        """The models that a server lists at /v1/models, by name.

        Raises Passing, Refused, NoList, and ServerError for what is not a server of this kind.
        """
        try:
            found = self.send(server, "/v1/models", timeout=CHECK_TIMEOUT).get("data")
        except (Unanswered, Unreadable) as error:
            if isinstance(error, Unreadable) and server.facts is not None:
                raise  # it was one before
            final = isinstance(error, Redirected | Unreadable)
            raise (ServerError if final else NoList)(
                f"this is not an OpenAI-compatible server (/v1/models: {error})",
                where=server.name,
                next_step=ADDRESS,
            ) from error
        entries = [e for e in found if isinstance(e, dict)] if isinstance(found, list) else []
        listed = {}
        for entry in entries:
            name, longest = entry.get("id"), entry.get("max_model_len")
            if isinstance(name, str) and name:
                known = type(longest) is int and longest > 0
                listed[name] = Listed(str(entry.get("owned_by")), longest if known else None)
        if not listed and server.facts is None:
            raise NoList("the server lists no model at /v1/models", where=server.name, next_step=ADDRESS)
        if not listed:
            raise Passing("the server no longer lists a model at /v1/models")
        return listed

    def close(self) -> None:
        """Ask nothing more: threads that wait for a server raise Unanswered. Requests under way end later."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    # ── which server is asked ─────────────────────────────────────────────────────────────────────

    def _take(self, failed_at: Server | None) -> Server:
        """Wait for a server that is free, and count the question as under way there."""
        with self._changed:
            while not self._closed:
                now = time.monotonic()
                rests = [s.rests_until - now for s in self.servers if s.rests_until > now]
                free = [s for s in self.servers if s.rests_until <= now and s.under_way < self._room(s)]
                if free:
                    chosen = min(free, key=lambda s: (s is failed_at, s.under_way, s.asked))
                    chosen.under_way += 1
                    chosen.asked += 1
                    return chosen
                self._changed.wait(min(rests, default=None))
        raise Unanswered("the run ended before this was asked")

    def _room(self, server: Server) -> int:
        return 1 if server.facts is None or server.failures else self.concurrency

    def _answered(self, server: Server) -> None:
        with self._changed:
            if server.failures >= TOLD_AFTER:
                note(f"{server.name} answers again")
            server.failures, self._lost_since = 0, None  # a rest that it asked for still holds

    def _failed(self, server: Server, trouble: Passing, costs: bool) -> None:
        """Leave a server alone for a while. Raises ServerError if none could be asked for too long."""
        with self._changed:
            now = time.monotonic()
            doubled = self._retry.copy_with(attempts_made=min(server.failures, 30)).backoff_strategy()
            rest = max(min(trouble.after, LONGEST_REST), doubled)
            server.rests_until = max(server.rests_until, now + rest)
            server.failures += 1
            told = f"{server.name} failed {TOLD_AFTER} times in a row, the last time with: {trouble}"
            if all(s.failures for s in self.servers) and not costs:
                self._lost_since = since = now if self._lost_since is None else self._lost_since
                first = self.policy.patience if self._heard else self.policy.first_patience
                left = since + min(self.policy.patience, first) - now
                if rest > left:
                    raise ServerError(
                        f"no server could be asked for {now - since:.0f} s; the last failure: {trouble}",
                        where=str(self),
                        next_step="start the servers and run the same command again: it continues where it "
                        "stopped",
                    )
                told += f"; no server answers, waiting for up to {left:.0f} s more"
            if server.failures == TOLD_AFTER:
                warn(told)

    # ── what a server says ────────────────────────────────────────────────────────────────────────

    def _trouble(self, server: Server, error: httpx.RequestError, limit: float) -> Exception:
        """What a request that failed means: Passing, or ServerError if waiting does not change it."""
        way, words = server.way, _one_line(str(error), server.way) or type(error).__name__
        if found := lasting(error, way, first=server.facts is None):
            return found
        if isinstance(error, httpx.LocalProtocolError | httpx.UnsupportedProtocol):
            return ServerError(f"no request can be sent: {words}", where=way.url)
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.ProxyError):
            return Passing(f"no connection{way.via} ({words})", costs=False)
        if isinstance(error, httpx.TimeoutException):
            return Passing(f"no answer within {limit:g} s")
        return Passing(f"the answer broke off ({words})")

    def _check_status(self, server: Server, response: httpx.Response, body: str) -> None:
        """Raise what an answer other than 2xx means."""
        status, way = response.status_code, server.way
        text = f"HTTP {status}: {_one_line(_words(body), way) or _one_line(response.reason_phrase, way)}"
        if status == 407 and way.proxy:
            raise proxy_refuses(way, text)
        if status in (401, 403):
            what = "refuses the" if way.login or way.keyed else "asks for an"
            kind, step = "API key", f"put the right key in the environment variable {way.key_variable}"
            if way.login:
                kind, step = "user and password", "correct them in the server's address"
            step += f", or list the server in NO_PROXY if {way.proxy} is to blame" if way.proxy else ""
            raise Refused(f"the server {what} {kind} ({text})", where=server.name, next_step=step)
        if self._retry.is_retryable_status_code(status):
            asks = response.headers.get("retry-after", "")
            try:
                seconds = asks.replace(".", "", 1).isdigit()
                after = float(asks) if seconds else self._retry.parse_retry_after(asks)
            except (ValueError, OverflowError):
                after = 0.0
            busy = status == 429 or (status == 503 and bool(asks))
            self._heard |= status in (429, 503)
            raise Passing(text, after=after, costs=not busy)
        if 300 <= status < 400:
            where = re.split("[?#]", response.headers.get("location", ""))[0]
            raise Redirected(f"HTTP {status}, a redirect to {_one_line(without_logins(where), way)!r}")
        if not 200 <= status < 300:
            raise Unanswered(text)


def _parsed(text: str | bytearray) -> Any:
    """The data of JSON text; None if the text is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _words(body: str) -> str:
    """What a server says in an answer that is an error, in its own words."""
    found = _parsed(body)
    found = found.get("error", found) if isinstance(found, dict) else found
    if isinstance(found, dict):
        found = found.get("message") or found.get("detail") or body
    return found if isinstance(found, str) else body


def _one_line(text: str, way: Connection) -> str:
    """Somebody else's text on one line, without secrets and what cannot be written."""
    return " ".join(hidden(text, way.secrets).encode(errors="replace").decode().split())[:300]
