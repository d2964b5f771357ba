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
server. If no server can be reached, or all are busy, for `Policy.patience` seconds, `ask` raises ServerError.

Proxies are those of the environment (HTTP_PROXY, HTTPS_PROXY, NO_PROXY), as for curl. The API key comes from
one environment variable and never appears in an error.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx
from httpx_retries import Retry

from deepspec.errors import ServerError
from deepspec.log import note, warn

T = TypeVar("T")

API_KEY = "OPENAI_API_KEY"
"""The environment variable that holds the servers' key."""
CHECK_TIMEOUT = 10.0
"""Seconds for an answer that costs the server nothing, such as the list of its models."""
LONGEST_REST = 86_400.0
"""Seconds at most that a server is left alone, whatever its Retry-After asks for."""
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


class Unanswered(Exception):
    """A question that gets no answer; the message is the reason."""


class Exhausted(Unanswered):
    """Every attempt at a question failed."""


class Passing(Exception):
    """An attempt failed, and another one may not. after: seconds that the server asks to be left alone;
    costs: whether this counts as an attempt at the question."""

    def __init__(self, reason: str, *, after: float = 0.0, costs: bool = True) -> None:
        super().__init__(reason)
        self.after, self.costs = after, costs


@dataclass(eq=False)
class Server:
    """One server. url: to send requests to; name: for messages, without user and password; facts: what the
    check found, None before it; failures: in a row; rests_until: on the monotonic clock."""

    url: str
    name: str
    facts: Any = None
    under_way: int = 0
    asked: int = 0
    failures: int = 0
    rests_until: float = 0.0


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
        named = dict(map(_address, urls))
        self.servers = [Server(url, name) for url, name in named.items()]
        self.concurrency, self.policy = concurrency, policy or Policy()
        self._check, self._key_env, self._key = check, api_key_env, _key_of(api_key_env)
        self._retry = Retry(
            status_forcelist=[408, 425, 429, *range(500, 600)],
            backoff_factor=self.policy.first_rest,
            max_backoff_wait=self.policy.longest_rest,
            backoff_jitter=0.5,
        )
        self._client = httpx.Client(
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        )
        self._changed = threading.Condition()
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
                checked = True
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

        Raises Passing, Unanswered, or ServerError for a key that is refused.
        """
        limit = min(timeout, self.policy.timeout)
        try:
            response = self._client.request(
                "GET" if body is None else "POST",
                server.url + path,
                json=body,
                timeout=httpx.Timeout(limit, connect=min(10.0, limit), pool=None),
            )
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError) as error:
            raise Passing(f"no connection ({self._words(error)})", costs=False) from error
        except httpx.TimeoutException as error:
            raise Passing(f"no answer within {limit:g} s") from error
        except httpx.RequestError as error:
            raise Passing(f"the answer broke off ({self._words(error)})") from error
        self._check_status(server, response)
        try:
            found = response.json()
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise Passing(f"the answer is not a JSON object: {self._without_key(response.text)[:80]!r}")
        return found

    def models(self, server: Server) -> dict[str, dict[str, Any]]:
        """{name: entry} of the models that a server lists at /v1/models. Raises Passing and ServerError."""
        try:
            found = self.send(server, "/v1/models", timeout=CHECK_TIMEOUT).get("data")
        except Unanswered as error:
            raise ServerError(
                f"this is not an OpenAI-compatible server: /v1/models answers {error}",
                where=server.name,
                next_step="give the address that comes before /v1, such as http://127.0.0.1:8000",
            ) from error
        entries = [e for e in found if isinstance(e, dict)] if isinstance(found, list) else []
        listed = {str(e["id"]): e for e in entries if "id" in e}
        if not listed:
            raise Passing("the server lists no model at /v1/models")
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
                left = since + self.policy.patience - now
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

    def _check_status(self, server: Server, response: httpx.Response) -> None:
        """Raise what an answer other than 2xx means."""
        status, text = response.status_code, f"HTTP {response.status_code}: {self._words(response)}"
        if status in (401, 403):
            raise ServerError(
                f"the server refuses the API key ({text})",
                where=server.name,
                next_step=f"put the right key in the environment variable {self._key_env}",
            )
        if self._retry.is_retryable_status_code(status):
            asks = response.headers.get("retry-after", "")
            try:
                seconds = asks.replace(".", "", 1).isdigit()
                after = float(asks) if seconds else self._retry.parse_retry_after(asks)
            except ValueError:
                after = 0.0
            raise Passing(text, after=after, costs=not (status == 429 or (status == 503 and asks)))
        if status >= 300:
            raise Unanswered(text)

    def _words(self, said: httpx.Response | Exception) -> str:
        """An error in the server's or the system's own words, on one line, without the key."""
        text: Any = said
        if isinstance(said, httpx.Response):
            try:
                text = said.json()
                text = text.get("error", text)
                text = text.get("message") or text.get("detail") or text
            except (ValueError, AttributeError):
                text = text if isinstance(text, str) else said.text or said.reason_phrase
        return " ".join(self._without_key(str(text)).split())[:300] or type(said).__name__

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "[API key]") if self._key else text


def _address(url: str) -> tuple[str, str]:
    """(address without a trailing /v1, the same without user and password). Raises ServerError."""
    bare = url.strip().rstrip("/").removesuffix("/v1").rstrip("/")
    shown = bare.partition("?")[0].rpartition("@")[2]
    try:
        parsed = httpx.URL(bare)
    except httpx.InvalidURL:
        parsed = httpx.URL("")
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ServerError(
            f"{shown!r} is not a server's address", next_step="give one such as http://127.0.0.1:8000"
        )
    if parsed.query or parsed.fragment:
        raise ServerError(
            f"the address {shown} has a part after '?' or '#', and servers have no settings",
            next_step="give the address alone, such as http://127.0.0.1:8000",
        )
    return bare, str(parsed.copy_with(userinfo=b""))


def _key_of(variable: str) -> str:
    """The API key in an environment variable; empty if there is none. Raises ServerError."""
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ServerError(
            f"the environment variable {variable} holds characters that no API key has",
            next_step=f"export {variable}=KEY again, without line breaks",
        )
    return key
