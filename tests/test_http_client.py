"""Servers that die, hang, stutter and lie: every question is answered once or given up with its reason."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from itertools import chain
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import pytest

from deepspec import http_client
from deepspec.answers.requests import read_completion
from deepspec.errors import ServerError
from deepspec.http_client import Exhausted, Passing, Policy, Server, Servers, Unanswered
from standin import PASSING, Refusal, StandIn

QUICK = Policy(timeout=0.15, attempts=3, first_rest=0.01, longest_rest=0.05, patience=20)


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests do not depend on the proxies and keys of whoever runs them."""
    for name in [n for n in os.environ if n.lower().endswith("_proxy") or n.startswith(("SSL", "OPENAI"))]:
        monkeypatch.delenv(name)


def servers_at(*standins: StandIn | str, policy: Policy = QUICK, **more: Any) -> Servers:
    """A client whose check asks for the list of models."""
    urls = [s if isinstance(s, str) else s.url for s in standins]
    servers = Servers(urls, lambda server: servers.models(server), policy=policy, **more)
    return servers


def ask(servers: Servers, *texts: str) -> list[Any]:
    """Ask everything at once; answers and exceptions in order."""

    def one(text: str) -> Any:
        def question(server: Server) -> str:
            return read_completion(servers.send(server, "/v1/completions", {"prompt": text})).text

        try:
            return servers.ask(question)
        except (Unanswered, ServerError) as error:
            return error

    with ThreadPoolExecutor(len(texts)) as threads:
        return list(threads.map(one, texts))


class FakeTime:
    """A clock that moves only when the client waits; it stands in for the module `time` and the condition."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.waits = 0.0, list[float]()
        monkeypatch.setattr(http_client, "time", self)
        monkeypatch.setattr(http_client, "threading", SimpleNamespace(Condition=lambda: self))

    def monotonic(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds

    def notify_all(self) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass


# ── one question ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("fault", [*PASSING, "408", "425"])
def test_what_passes_is_asked_again_until_it_is_answered(fault):
    with StandIn(lambda n: fault if n < 2 else None) as server:
        assert ask(servers_at(server), "a") == ["echo a"]
        assert server.met == [fault, fault, None]


def test_what_the_question_is_to_blame_for_is_not_asked_again():
    with StandIn(lambda n: "400") as server:
        (error,) = ask(servers_at(server), "a")
        assert type(error) is Unanswered
        assert str(error) == "HTTP 400: fault 400"
        assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("500", "HTTP 500: fault 500"),
        ("hang", "no answer within 0.15 s"),
        ("garbage", "not a JSON object: '<html>gateway</html>'"),
        ("no choices", "garbled answer: no 'choices'"),
        ("half", "the answer broke off"),
    ],
)
def test_a_question_that_never_works_is_given_up_with_the_last_reason(fault, reason):
    with StandIn(lambda n: fault) as server:
        (error,) = ask(servers_at(server), "a")
        assert isinstance(error, Exhausted)
        assert str(error).startswith("after 3 attempts: ")
        assert reason in str(error)
        assert len(server.asked) == 3


def test_rests_double_up_to_the_longest_and_chance_takes_off_at_most_half(monkeypatch):
    seen = []
    for _ in range(2):
        clock = FakeTime(monkeypatch)
        with StandIn(lambda n: "500") as server:
            ask(servers_at(server, policy=Policy(attempts=8, first_rest=1.0, longest_rest=10.0)), "a")
        for wait, full in zip(clock.waits, [1, 2, 4, 8, 10, 10, 10], strict=True):
            assert full / 2 <= wait <= full * (1 + 1e-9)
        seen.append(clock.waits)
    assert seen[0][:3] != seen[1][:3]


def test_too_many_requests_leaves_the_server_alone_as_long_as_it_asks_and_costs_no_attempt(monkeypatch):
    clock = FakeTime(monkeypatch)
    with StandIn(lambda n: "429" if n < 9 else None, retry_after="7") as server:
        servers = servers_at(server, policy=Policy(attempts=1, longest_rest=1, patience=100))
        assert ask(servers, "a") == ["echo a"]
        assert len(server.asked) == 10
    assert clock.waits == [7.0] * 9


@pytest.mark.parametrize(
    ("value", "expected"), [("in an hour", 3600), ("Wed, 21 Oct 2015 07:28:00 GMT", 0.01), ("soon", 0.01)]
)
def test_a_server_may_ask_for_patience_until_a_date(monkeypatch, value, expected):
    clock = FakeTime(monkeypatch)
    if value == "in an hour":
        value = format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True)
    with StandIn(lambda n: "429" if n < 1 else None, retry_after=value) as server:
        assert ask(servers_at(server, policy=Policy(first_rest=0.01, patience=10**6)), "a") == ["echo a"]
    (waited,) = clock.waits
    assert expected / 2 <= waited <= expected


# ── several servers ───────────────────────────────────────────────────────────────────────────────────


def test_never_more_than_the_agreed_number_at_once_and_all_servers_work():
    gate = threading.Barrier(6, timeout=10)

    def answer(said: str) -> tuple[str, None]:
        gate.wait()  # opens only when six questions are there at once
        return f"echo {said}", None

    with StandIn(answer=answer) as one, StandIn(answer=answer) as two:
        policy = Policy(timeout=20, attempts=1)
        servers = servers_at(one, two, one.url + "/v1", policy=policy, concurrency=3)
        assert len(servers.servers) == 2  # an address given twice is one server
        for server in servers.servers:
            server.facts = "checked"
        assert ask(servers, *"abcdef") == [f"echo {n}" for n in "abcdef"]
        assert (one.most_at_once, two.most_at_once) == (3, 3)


def test_a_server_that_keeps_failing_is_left_alone_and_its_questions_go_to_the_other(capsys):
    names = [str(i) for i in range(40)]
    with (
        StandIn(lambda n: "500") as ill,
        StandIn(answer=lambda said: (time.sleep(0.01), ("ok", None))[1]) as well,
    ):
        servers = servers_at(ill, well, policy=Policy(first_rest=0.01, longest_rest=30), concurrency=1)
        assert ask(servers, *names) == ["ok"] * 40
        assert len(well.asked) == 40
        assert 3 <= len(ill.asked) <= 12  # after rests of 10, 20, 40, … ms, less up to half
        assert servers.servers[0].failures == len(ill.asked)
    assert (
        capsys.readouterr().err.count(f"{ill.url} failed 3 times in a row, the last time with: HTTP 500") == 1
    )


def test_a_server_that_failed_gets_one_question_at_a_time_until_it_answers():
    under_way: dict[bool, set[int]] = {False: set(), True: set()}

    def question(server: Server) -> str:
        under_way[server.failures > 0].add(server.under_way)
        return read_completion(servers.send(server, "/v1/completions", {"prompt": "a"})).text

    policy = Policy(timeout=5, attempts=30, first_rest=0.001, longest_rest=0.002)
    with StandIn(
        lambda n: "500" if n < 20 else None, answer=lambda said: (time.sleep(0.02), (said, None))[1]
    ) as server:
        servers = servers_at(server, policy=policy, concurrency=8)
        with ThreadPoolExecutor(8) as threads:
            assert list(threads.map(lambda _: servers.ask(question), range(16))) == ["a"] * 16
    assert under_way[True] == {1}
    assert max(under_way[False]) == 8


def test_a_question_that_failed_goes_to_another_server_next():
    with StandIn(lambda n: "500") as ill, StandIn() as well:
        servers = servers_at(ill, well)
        assert ask(servers, "a") == ["echo a"]
        assert (len(ill.asked), len(well.asked)) == (1, 1)


def test_a_server_that_comes_back_is_checked_and_asked_again(capsys):
    with StandIn() as one:
        two = StandIn()
        servers = servers_at(one, two, concurrency=1)
        assert ask(servers, *"abcd") == [f"echo {n}" for n in "abcd"]
        assert two.greeted == 1
        two.kill()
        assert ask(servers, *"abcd") == [f"echo {n}" for n in "abcd"]
        two.start()
        before = len(two.asked)
        while len(two.asked) == before:
            time.sleep(0.01)
            ask(servers, "c", "d")
        assert two.greeted == 2
        two.kill()


def test_when_all_are_down_questions_wait_for_one_to_come_up():
    server = StandIn()
    server.kill()
    starter = threading.Timer(0.1, server.start)
    starter.start()
    assert ask(servers_at(server), *"abc") == ["echo a", "echo b", "echo c"]
    server.kill()


def test_a_failed_check_costs_a_question_no_attempt():
    """A server that is still loading its model is not ready, and no row is to blame for that."""
    checks = iter([Passing("loading"), Passing("loading"), Passing("loading"), "checked"])

    def check(server: Server) -> str:
        found = next(checks)
        if isinstance(found, Passing):
            raise found
        return found

    with StandIn() as server:
        servers = Servers([server.url], check, policy=Policy(attempts=1, first_rest=0.001))
        assert ask(servers, "a") == ["echo a"]


def test_when_all_stay_down_the_run_is_given_up_after_the_patience(monkeypatch, capsys):
    server = StandIn()
    server.kill()
    clock = FakeTime(monkeypatch)
    (error,) = ask(servers_at(server, policy=Policy(patience=300, first_patience=300)), "a")
    assert 290 <= clock.now <= 300  # the next rest would have gone past it
    assert str(error).startswith(f"no server could be asked for {clock.now:.0f} s;")
    assert f"where: {server.url}" in str(error)
    assert "run the same command again" in str(error)
    assert "waiting for up to 29" in " ".join(capsys.readouterr().err.split())


def test_a_server_that_only_ever_asks_for_patience_is_given_up_too(monkeypatch):
    clock = FakeTime(monkeypatch)
    with StandIn(lambda n: "429", retry_after="10") as server:
        (error,) = ask(servers_at(server, policy=Policy(patience=50)), "a")
    assert 40 <= clock.now <= 50
    assert isinstance(error, ServerError)
    assert "HTTP 429" in str(error)


def test_closing_ends_the_waiting():
    server = StandIn()
    server.kill()
    servers = servers_at(server, policy=Policy(first_rest=60, longest_rest=60, first_patience=100))
    threading.Timer(0.1, servers.close).start()
    (error,) = ask(servers, "a")
    assert type(error) is Unanswered


# ── addresses, keys, proxies ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("http://gpu1:8000", "http://gpu1:8000"),
        (" http://gpu1:8000/v1/", "http://gpu1:8000"),
        ("https://x.example/llm/v1", "https://x.example/llm"),
        ("http://me:secret@gpu1:8000", "http://gpu1:8000"),
    ],
)
def test_addresses_lose_their_v1_and_their_password(given, expected):
    (server,) = servers_at(given).servers
    assert server.name == expected
    assert "secret" not in repr(server)


def test_a_user_and_password_are_sent_and_not_together_with_a_key(monkeypatch):
    """The library would send the password in the place of the key, without a word."""
    with StandIn() as server:
        address = server.url.replace("//", "//me:pass%40word@")
        assert ask(servers_at(address), "a") == ["echo a"]
        assert server.headers[0]["Authorization"] == "Basic bWU6cGFzc0B3b3Jk"  # me:pass@word
        monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
        with pytest.raises(ServerError, match="has a user and password, and OPENAI_API_KEY holds an API key"):
            servers_at(address)


@pytest.mark.parametrize("secret", ["pass@word", "a\\b<c&d", "TOKEN"])
def test_a_password_that_a_server_repeats_is_not_shown(secret):
    login = quote(secret, safe="") if secret == "TOKEN" else f"me:{quote(secret, safe='')}"

    class Parrot(StandIn):
        def reply(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
            told = self.headers[-1]["Authorization"]
            raise Refusal(
                400, f"{told} is {secret} or {secret!r} or {quote(secret, safe='')} in http://{login}@x"
            )

    with Parrot() as server:
        (error,) = ask(servers_at(server.url.replace("//", f"//{login}@")), "a")
    said = str(error)
    assert said.startswith("HTTP 400: Basic [password] is [password] or '[password]' or [password]")
    for form in (secret, repr(secret)[1:-1], quote(secret, safe="")):
        assert form not in said


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("gpu1:8000", "not a server's address"),
        ("", "not a server's address"),
        ("ftp://me:secret@x", "not a server's address"),
        ("http://", "not a server's address"),
        ("http://[::1", "not a server's address"),
        ("http://x:1?api_key=secret", "servers have no settings"),
        ("http://me:se?secret@x", "not a server's address"),
        ("http://me:1?secret@x", "servers have no settings"),
        ("http://me:secret", "not a server's address"),
        ("http://me:a secret@x", "not a server's address"),
        ("http://x:99999", "not a server's address"),
        ("http://a..x", "not a server's address"),
    ],
)
def test_what_is_not_an_address_is_refused_without_its_secrets(given, reason):
    with pytest.raises(ServerError, match=reason) as caught:
        servers_at(given)
    assert "secret" not in str(caught.value)


def test_a_wrong_key_ends_the_run_and_appears_nowhere(monkeypatch):
    with StandIn(key="right") as server:
        monkeypatch.setenv("OPENAI_API_KEY", "right\n")
        assert ask(servers_at(server), "a") == ["echo a"]
        monkeypatch.setenv("MY_KEY", "not-so-right")
        errors = ask(servers_at(server, api_key_env="MY_KEY"), "a", "b")
    for error in errors:
        assert isinstance(error, ServerError)
        assert "refuses the API key (HTTP 401: wrong key: Bearer [API key])" in str(error)
        assert "MY_KEY" in str(error)
        assert "not-so-right" not in str(error)


@pytest.mark.parametrize("key", ["sk-1\nsk-2", "sk-1 sk-2", "sk-\u00a01", "\ufeffsk-1", "sk-\u0435", "sk-\0"])
def test_a_key_that_cannot_be_sent_is_refused_without_showing_it(monkeypatch, key):
    """The HTTP library would show it in its own error."""
    monkeypatch.setattr(os, "environ", {"MY_KEY": key})
    with pytest.raises(ServerError, match="MY_KEY holds characters that no API key has") as caught:
        servers_at("http://x", api_key_env="MY_KEY")
    assert "sk-" not in str(caught.value)


@pytest.mark.parametrize("given", ["sk-secret-1", "SECRET_THAT_IS_NOT_SET"])
def test_a_key_given_in_the_place_of_its_variable_is_not_shown(given):
    with pytest.raises(ServerError, match="does not name an environment variable that is set") as caught:
        servers_at("http://x", api_key_env=given)
    assert given not in str(caught.value)


def test_a_server_that_asks_for_a_key_is_told_from_one_that_refuses_it():
    with StandIn(key="right") as server:
        (error,) = ask(servers_at(server), "a")
        assert "the server asks for an API key (HTTP 401: wrong key: None)" in str(error)
        (error,) = ask(servers_at(server.url.replace("//", "//me:you@")), "a")
        assert "the server refuses the user and password (HTTP 401: wrong key: Basic [password])" in str(
            error
        )


def test_one_question_that_is_forbidden_is_not_the_key(monkeypatch):
    """A gateway may filter what is asked; 403 for all is another matter, and ends the run."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
    with StandIn(lambda n: "403" if n == 1 else None) as server:
        servers = servers_at(server)
        assert ask(servers, "a") == ["echo a"]
        (error,) = ask(servers, "b")
        assert isinstance(error, Exhausted)
        assert str(error) == "the server refuses the API key (HTTP 403: fault 403)"
        assert ask(servers, "c") == ["echo c"]


def test_a_server_that_never_answered_is_not_waited_for_as_long_as_one_that_did(monkeypatch):
    server = StandIn()
    server.kill()
    clock = FakeTime(monkeypatch)
    (error,) = ask(servers_at(server, policy=Policy()), "a")
    assert 20 <= clock.now <= 30
    assert "start the servers" in str(error)
    with StandIn(lambda n: None if n < 1 else "503") as server:
        clock = FakeTime(monkeypatch)
        servers = servers_at(server, policy=Policy(attempts=1000))
        assert ask(servers, "a") == ["echo a"]
        server.kill()
        (error,) = ask(servers, "b")
        assert 590 <= clock.now <= 600


def test_an_answer_that_never_ends_is_not_read_for_ever(monkeypatch):
    monkeypatch.setattr(http_client, "LARGEST", 1000)
    with StandIn(answer=lambda said: ("a" * 2000, None)) as server:
        (error,) = ask(servers_at(server), "a")
    assert str(error).startswith("after 3 attempts: the answer is longer than")

    head = b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n"
    with StandIn() as server:
        servers = servers_at(server, policy=Policy(timeout=0.2, attempts=1))
        assert ask(servers, "a") == ["echo a"]
        # A byte whenever the client is about to lose its patience.
        server.raw = lambda path, body: chain([head], (time.sleep(0.05) or b" " for _ in range(100)))
        began = time.monotonic()
        (error,) = ask(servers, "a")
        assert time.monotonic() - began < 2
    assert str(error) == "after 1 attempts: no whole answer within 0.2 s"


@pytest.mark.parametrize(
    ("no_proxy", "direct"),
    [
        ("*", True),
        ("gpu1.lab", True),
        ("lab", True),
        (".lab", True),
        ("*.lab", True),
        ("other, gpu1.lab:8000", True),
        ("http://gpu1.lab", True),
        ("GPU1.LAB.", False),
        ("gpu1.lab:80", False),
        ("pu1.lab", False),
        ("::1,[::1],fd00::/8,[fd00::]/8,fe80::1%eth0,[::1]:80,1.2.3.4/99,:,[,/,%", False),
    ],
)
def test_hosts_of_no_proxy_are_found_as_curl_finds_them(monkeypatch, no_proxy, direct):
    monkeypatch.setenv("NO_PROXY", no_proxy)
    monkeypatch.setenv("HTTP_PROXY", "http://proxy.lab:3128")
    (server,) = servers_at("http://gpu1.lab:8000").servers
    assert server.way.proxy == (None if direct else "HTTP_PROXY")


@pytest.mark.parametrize(
    ("address", "no_proxy"),
    [
        ("http://10.1.2.3:8000", "10.0.0.0/8"),
        ("http://[fd00::1]:8000", "::1,fd00::/8"),
        ("http://[fd00::1]:8000", "[fd00::1]"),
        ("http://[fd00::1]:8000", "[FD00:0::1]:8000"),
        ("http://localhost:8000", ""),
        ("http://api.localhost", ""),
        ("http://127.1:8000", ""),
        ("http://127.9.9.9:8000", "::1/128"),
        ("http://[::1]:8000", ""),
        ("http://[::ffff:127.0.0.1]:8000", ""),
        ("http://0.0.0.0:8000", ""),
    ],
)
def test_this_machine_and_listed_networks_are_reached_without_a_proxy(monkeypatch, address, no_proxy):
    monkeypatch.setenv("NO_PROXY", no_proxy)
    monkeypatch.setenv("ALL_PROXY", "socks://127.0.0.1:1080/")
    (server,) = servers_at(address).servers
    assert server.way.proxy is None


def test_proxies_of_the_environment_are_used_but_for_the_hosts_of_no_proxy(monkeypatch):
    with StandIn() as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url.replace("//", "//me:secret@"))
        # The stand-in does not know the whole address that a proxy is asked for.
        (error,) = ask(servers_at("http://gpu1.invalid:8000"), "a")
        assert "(/v1/models: HTTP 404: no such route)" in str(error)
        monkeypatch.setenv("NO_PROXY", "gpu1.invalid")
        (error,) = ask(servers_at("http://gpu1.invalid:8000", policy=Policy(first_patience=0)), "a")
        assert "404" not in str(error)


def test_what_is_not_an_openai_server_is_refused():
    with StandIn() as server:
        (error,) = ask(servers_at(f"{server.url}/elsewhere"), "a")
    assert "not an OpenAI-compatible server (/v1/models: HTTP 404: no such route)" in str(error)
