"""Many HTTP servers as one: bounded concurrency, retries, rest for the ill, patience when all are down.

This room knows nothing of prompts and answers. It is given questions, a path and a JSON body each, finds a
server that is free and well, and hands back what the question's own reader made of the JSON that came back.

What goes wrong is told apart by whose fault it is:

* the question's: a 4xx other than 408, 425 and 429 (`Refused`). Not asked again.
* the moment's: 5xx, time-outs, torn or garbled bodies. Asked again, elsewhere if there is an elsewhere, after
  a wait that doubles and is spread by chance; `Policy.attempts` times in all (`Exhausted`).
* the server's: refused connections, or `Policy.unwell_after` failures in a row. It rests, its questions go to
  the others, and it is greeted again after a rest that doubles each time. One that had answered badly is then
  asked one question, before it gets its share again.
* too much asked: 429. The server is left alone as long as `Retry-After` says. Costs a question no attempt.
* everybody's: nobody well for `Policy.patience` seconds, or a server that wants another key (`UserError`).
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any, Generic, NamedTuple, TypeVar

import httpx

from deepspec.errors import UserError
from deepspec.log import note, warn

T = TypeVar("T")
Sleep = Callable[[float], Awaitable[None]]


@dataclass(frozen=True)
class Policy:
    """How patient to be. Times in seconds."""

    timeout: float = 600.0
    """Until an answer is whole: a long one takes minutes."""
    attempts: int = 5
    """Times that one question is asked before it is given up."""
    first_wait: float = 0.5
    longest_wait: float = 60.0
    """Waits, between a question's attempts and for a server's rest, double from the one to the other."""
    unwell_after: int = 3
    """Failures in a row after which a server rests."""
    patience: float = 600.0
    """How long nobody may be well before the run is given up."""
    greeting: float = 10.0
    """Until a server has answered a greeting, which costs it nothing."""


class Refused(Exception):
    """The server says that this question cannot be answered; asking again would not help."""


class Exhausted(Exception):
    """Every attempt at a question failed; the message is the last one's reason."""


class Garbled(Exception):
    """A reader could not make sense of what came back. Raised by readers; the question is asked again."""


class Call(NamedTuple, Generic[T]):
    """One HTTP request: POST `body` as JSON to `path`; `read` makes the result of the parsed answer."""

    path: str
    body: dict[str, Any]
    read: Callable[[Any], T]


@dataclass(eq=False)
class Endpoint:
    """A server and how it is doing. `facts`: what the greeter found out about it."""

    url: str
    facts: dict[str, Any] = field(default_factory=dict)
    in_flight: int = 0
    answered: int = 0
    failed: int = 0
    failures_in_row: int = 0
    rests: int = 0
    """In a row, since its last answer."""
    well: bool = False
    on_trial: bool = False
    """Back from a rest that bad answers had sent it to: asked one question, until it has answered it well."""


class _Trouble(Exception):
    """What one attempt met. wait: what the server asked for, in seconds; unreachable: nobody was there."""

    def __init__(
        self, reason: str, *, wait: float | None = None, busy: bool = False, unreachable: bool = False
    ) -> None:
        super().__init__(reason)
        self.wait, self.busy = wait, busy
        self.servers_own = busy or unreachable
        """Whether one such failure is enough to leave the server alone for a while."""


Greeter = Callable[["Pool", Endpoint], Awaitable[None]]


class Pool:
    """Servers to ask, as an asynchronous context. At most `concurrency` questions are with each at a time.

    `greet` is awaited before a server's first question and after each of its rests: it may ask (`send`), note
    facts, and raise UserError for a server that can never do. The clock, the sleep and the random numbers are
    arguments, so that a test needs no real time.
    """

    def __init__(
        self,
        urls: Sequence[str],
        greet: Greeter,
        *,
        concurrency: int = 32,
        api_key: str | None = None,
        policy: Policy | None = None,
        seed: int = 0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        self.endpoints = [Endpoint(url) for url in dict.fromkeys(map(base_url, urls))]
        self.concurrency, self.policy, self._greet = concurrency, policy or Policy(), greet
        self._clock, self._sleep, self._random = clock, sleep, random.Random(seed)
        self._client = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=httpx.Timeout(self.policy.timeout, connect=min(10.0, self.policy.timeout), pool=None),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        )
        self._changed = asyncio.Condition()
        self._nurses: set[asyncio.Task[None]] = set()
        self._nobody_since: float | None = None
        self._lost: BaseException | None = None

    @property
    def room(self) -> int:
        """Questions that can be under way at once."""
        return self.concurrency * len(self.endpoints)

    async def __aenter__(self) -> Pool:
        self._nobody_since = self._clock()
        for endpoint in self.endpoints:
            self._nurse(endpoint, 0.0)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        nurses = list(self._nurses)
        for nurse in nurses:
            nurse.cancel()
        await asyncio.gather(*nurses, return_exceptions=True)
        await self._client.aclose()

    async def ask(self, question: Callable[[Endpoint], Call[T]]) -> tuple[T, Endpoint]:
        """The answer to a question, and who gave it. The question is put in the words of the server asked.

        Raises Refused or Exhausted for this question, UserError when there is nobody left to ask.
        """
        avoid: Endpoint | None = None
        attempts = 0
        while True:
            endpoint = await self._take(avoid)
            try:
                result = await self.send(endpoint, question(endpoint))
            except _Trouble as met:
                trouble = met
                await self._fell_ill(endpoint, trouble)
            except Refused:
                self._heard_from(endpoint)
                raise
            except UserError as error:
                await self._give_up(error)
                raise
            else:
                endpoint.answered += 1
                self._heard_from(endpoint)
                return result, endpoint
            finally:
                await self._give_back(endpoint)
            avoid = endpoint
            if trouble.servers_own:
                continue  # whoever is taken next is well, or has rested
            attempts += 1
            if attempts >= self.policy.attempts:
                raise Exhausted(f"after {attempts} attempts: {trouble}") from trouble
            await self._sleep(self._wait(attempts - 1))

    async def send(
        self, endpoint: Endpoint, call: Call[T], *, method: str = "POST", timeout: float | None = None
    ) -> T:
        """One request to one server, without a second try; for greeters, whose time-out is shorter."""
        url, body = endpoint.url + call.path, call.body if method == "POST" else None
        limit = self._client.timeout if timeout is None else httpx.Timeout(timeout, pool=None)
        try:
            response = await self._client.request(method, url, json=body, timeout=limit)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise _Trouble(f"no connection ({_said_by(error)})", unreachable=True) from error
        except httpx.TimeoutException as error:
            raise _Trouble(f"no answer within {timeout or self.policy.timeout:g} s") from error
        except httpx.HTTPError as error:
            raise _Trouble(f"the answer broke off ({_said_by(error)})") from error
        _check_status(endpoint, response)
        try:
            return call.read(response.json())
        except Garbled as error:
            raise _Trouble(f"garbled answer, {error}: {response.text[:80]!r}") from error
        except ValueError as error:
            raise _Trouble(f"garbled answer, not JSON: {response.text[:80]!r}") from error

    async def first(self) -> Endpoint:
        """Some server that has been greeted, as soon as there is one. Raises UserError as `ask` does."""
        endpoint = await self._take(None)
        await self._give_back(endpoint)
        return endpoint

    # ── who is free and well ──────────────────────────────────────────────────────────────────────

    async def _take(self, avoid: Endpoint | None) -> Endpoint:
        """A server that is well and has room, the least busy first, and not the one to avoid if possible."""
        async with self._changed:
            while True:
                if self._lost is not None:
                    raise self._lost
                free = [
                    e
                    for e in self.endpoints
                    if e.well and e.in_flight < (1 if e.on_trial else self.concurrency)
                ]
                if free:
                    chosen = min(free, key=lambda e: (e is avoid, e.in_flight))
                    chosen.in_flight += 1
                    return chosen
                await self._changed.wait()

    async def _give_back(self, endpoint: Endpoint) -> None:
        async with self._changed:
            endpoint.in_flight -= 1
            self._changed.notify_all()  # a trial that was passed makes room for many

    def _heard_from(self, endpoint: Endpoint) -> None:
        endpoint.failures_in_row = endpoint.rests = 0
        endpoint.on_trial = False
        self._nobody_since = None

    async def _give_up(self, error: BaseException) -> None:
        async with self._changed:
            self._lost = self._lost or error
            self._changed.notify_all()

    # ── rest and recovery ─────────────────────────────────────────────────────────────────────────

    async def _fell_ill(self, endpoint: Endpoint, trouble: _Trouble) -> None:
        """Count a failure, and have the server rest if it is due."""
        endpoint.failed += 1
        endpoint.failures_in_row += not trouble.busy
        failing = endpoint.on_trial or endpoint.failures_in_row >= self.policy.unwell_after
        if not endpoint.well or not (failing or trouble.servers_own):
            return
        endpoint.on_trial = not trouble.servers_own
        rest = self._wait(endpoint.rests) if trouble.wait is None else trouble.wait
        endpoint.well, endpoint.failures_in_row = False, 0
        endpoint.rests += 1
        if any(e.well for e in self.endpoints):
            warn(f"{endpoint.url} rests for {rest:.1f} s, the others go on: {trouble}")
        else:
            await self._nobody(endpoint, trouble, rest)
        self._nurse(endpoint, rest, greet=not trouble.busy)

    async def _nobody(self, endpoint: Endpoint, trouble: Exception, rest: float) -> None:
        """Nobody is well: say so and wait, or give up where that has lasted, or will last, too long."""
        now = self._clock()
        if self._nobody_since is None:
            self._nobody_since = now
        left = self._nobody_since + self.policy.patience - now
        if rest <= left:
            warn(f"{endpoint.url}: {trouble}; no server is well, waiting up to {left:.0f} s more")
            return
        await self._give_up(
            UserError(
                f"no server has been well for {now - self._nobody_since:.0f} s; the last trouble: {trouble}",
                where=", ".join(e.url for e in self.endpoints),
                next_step="start the servers and run the same command again: what is answered is kept",
            )
        )

    def _nurse(self, endpoint: Endpoint, rest: float, greet: bool = True) -> None:
        task = asyncio.ensure_future(self._recover(endpoint, rest, greet))
        self._nurses.add(task)
        task.add_done_callback(self._nurses.discard)

    async def _recover(self, endpoint: Endpoint, rest: float, greet: bool) -> None:
        """Let a server rest, then greet it until it greets back."""
        while self._lost is None:
            await self._sleep(rest)
            try:
                if greet:
                    await self._greet(self, endpoint)
            except (_Trouble, Refused) as trouble:
                rest = self._wait(endpoint.rests)
                endpoint.rests += 1
                if not any(e.well for e in self.endpoints):
                    await self._nobody(endpoint, trouble, rest)
                continue
            except UserError as error:
                await self._give_up(error)
                return
            if greet:
                self._nobody_since = None  # a server that only asked for patience has yet to show itself
                if endpoint.rests:
                    note(f"{endpoint.url} is well again")
            async with self._changed:
                endpoint.well = True
                self._changed.notify_all()
            return

    def _wait(self, before: int) -> float:
        """Seconds to wait after so many waits: doubling, up to half of it taken off by chance."""
        longest = min(self.policy.first_wait * 2.0 ** min(before, 30), self.policy.longest_wait)
        return longest * (0.5 + 0.5 * self._random.random())


def _check_status(endpoint: Endpoint, response: httpx.Response) -> None:
    """Sort an answer that is not a good one by whose fault it is."""
    status, text = response.status_code, f"HTTP {response.status_code}: {_words_of(response)}"
    asked_to_wait = retry_after(response.headers.get("retry-after"))
    if status in (401, 403):
        raise UserError(
            f"the server refuses the API key ({text})",
            where=endpoint.url,
            next_step="put the right key in OPENAI_API_KEY, or name its variable with --api-key-env",
        )
    if status == 429 or (status == 503 and asked_to_wait is not None):
        raise _Trouble(text, wait=asked_to_wait, busy=True)
    if status >= 500 or status in (408, 425):
        raise _Trouble(text)
    if status >= 300:
        raise Refused(text)


def base_url(url: str) -> str:
    """A server's address without the trailing /v1 that some like to write. UserError for no address."""
    bare = url.rstrip("/").removesuffix("/v1").rstrip("/")
    try:
        parsed = httpx.URL(bare)
    except httpx.InvalidURL:
        parsed = httpx.URL("")
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise UserError(
            f"{url!r} is not a server's address", next_step="give one such as http://127.0.0.1:8000"
        )
    return bare


def retry_after(value: str | None) -> float | None:
    """Seconds that a Retry-After header asks for (a number, or a date); None where it says nothing usable."""
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        moment = parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(0.0, (moment.replace(tzinfo=moment.tzinfo or UTC) - datetime.now(UTC)).total_seconds())


def _words_of(response: httpx.Response) -> str:
    """What a server says about an error, in its own words, on one line."""
    try:
        found = response.json()
        inner = found.get("error", found)
        text = inner if isinstance(inner, str) else inner.get("message") or inner.get("detail") or str(inner)
    except (ValueError, AttributeError):
        text = response.text
    return " ".join(str(text).split())[:300] or response.reason_phrase


def _said_by(error: Exception) -> str:
    return str(error) or type(error).__name__
