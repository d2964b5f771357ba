"""Servers that die, hang, stutter and lie: every question is answered once or given up with its reason."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from deepspec.answers.file import Settings, beside
from deepspec.answers.in_process import row_seed
from deepspec.answers.pool import (
    Call,
    Endpoint,
    Exhausted,
    Garbled,
    Policy,
    Pool,
    Refused,
    base_url,
    retry_after,
)
from deepspec.answers.requests import Reply, completion, read_chat, read_completion, read_llama
from deepspec.answers.through_servers import HOPELESS, regenerate_served
from deepspec.cli import app
from deepspec.data.conversations import conversation_from_row
from deepspec.data.tokens import prompt_ids
from deepspec.errors import DataError, UserError
from deepspec.maths.verify import Sampling
from deepspec.targets import TargetSpec
from standin import PASSING, StandIn
from talking import save_talking_llama

QUICK = Policy(
    timeout=0.4, attempts=4, first_wait=0.01, longest_wait=0.05, unwell_after=3, patience=20, greeting=0.4
)


async def hello(pool: Pool, endpoint: Endpoint) -> None:
    """The least greeting: the server is there."""
    limit = pool.policy.greeting
    await pool.send(endpoint, Call("/v1/models", {}, lambda found: found), method="GET", timeout=limit)


def echo(text: str) -> Callable[[Endpoint], Call[str]]:
    """A question in the form of a plain completion."""
    body = {"prompt": text}
    return lambda endpoint: Call("/v1/completions", body, lambda found: read_completion(found).text)


def ask(pool: Pool, *texts: str) -> list[Any]:
    """Ask everything at once; results and exceptions in order."""

    async def run() -> list[Any]:
        async with pool:
            return await asyncio.gather(*(pool.ask(echo(t)) for t in texts), return_exceptions=True)

    return asyncio.run(asyncio.wait_for(run(), 30))


def texts_of(results: list[Any]) -> list[str]:
    return [result[0] for result in results]


class Time:
    """A clock that only moves when somebody sleeps."""

    def __init__(self) -> None:
        self.now, self.slept = 0.0, list[float]()

    def clock(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds
        await asyncio.sleep(0)


# ── one question ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("fault", PASSING)
def test_what_passes_is_asked_again_until_it_is_answered(fault):
    with StandIn(lambda n: fault if n < 2 else None) as server:
        pool = Pool([server.url], hello, policy=QUICK)
        assert texts_of(ask(pool, "a")) == ["echo a"]
        assert server.met == [fault, fault, None]


def test_what_the_question_is_to_blame_for_is_not_asked_again():
    with StandIn(lambda n: "400") as server:
        (error,) = ask(Pool([server.url], hello, policy=QUICK), "a")
        assert isinstance(error, Refused)
        assert str(error) == "HTTP 400: fault 400"
        assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("500", "HTTP 500: fault 500"),
        ("hang", "no answer within 0.4 s"),
        ("garbage", "not JSON: '<html>gateway</html>'"),
        ("half", "broke off"),
        ("close", "broke off"),
    ],
)
def test_a_question_that_never_works_is_given_up_with_the_last_reason(fault, reason):
    with StandIn(lambda n: fault) as server:
        (error,) = ask(Pool([server.url], hello, policy=QUICK), "a")
        assert isinstance(error, Exhausted)
        assert str(error).startswith("after 4 attempts: ")
        assert reason in str(error)
        assert len(server.asked) == 4


def test_an_answer_that_its_reader_cannot_make_sense_of_is_asked_again():
    def read(found: Any) -> str:
        raise Garbled("no 'text'")

    async def run(pool: Pool) -> None:
        async with pool:
            await pool.ask(lambda endpoint: Call("/v1/completions", {"prompt": "a"}, read))

    with StandIn() as server:
        with pytest.raises(Exhausted, match="garbled answer, no 'text'"):
            asyncio.run(run(Pool([server.url], hello, policy=QUICK)))
        assert len(server.asked) == 4


def test_waits_double_up_to_the_longest_and_chance_takes_off_at_most_half():
    policy = Policy(attempts=8, first_wait=1.0, longest_wait=10.0, unwell_after=99)
    waits = []
    for seed in (1, 1, 2):
        time_ = Time()
        with StandIn(lambda n: "500") as server:
            pool = Pool([server.url], hello, policy=policy, seed=seed, clock=time_.clock, sleep=time_.sleep)
            ask(pool, "a")
        waits.append([s for s in time_.slept if s])
    assert waits[0] == waits[1] != waits[2]
    for wait, full in zip(waits[0], [1, 2, 4, 8, 10, 10, 10], strict=True):
        assert full / 2 <= wait <= full


def test_too_many_requests_leaves_the_server_alone_as_long_as_it_asks_and_costs_no_attempt():
    time_ = Time()
    policy = Policy(attempts=1, patience=100)
    with StandIn(lambda n: "429" if n < 9 else None, retry_after="7") as server:
        pool = Pool([server.url], hello, policy=policy, clock=time_.clock, sleep=time_.sleep)
        assert texts_of(ask(pool, "a")) == ["echo a"]
        assert len(server.asked) == 10
    assert [s for s in time_.slept if s] == [7.0] * 9


@pytest.mark.parametrize(
    ("value", "expected"), [("7", 7.0), ("0.5", 0.5), ("-3", 0.0), ("soon", None), (None, None)]
)
def test_retry_after_in_seconds(value, expected):
    assert retry_after(value) == expected


def test_retry_after_as_a_date():
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True)
    wait = retry_after(later)
    assert wait is not None
    assert 85 < wait <= 90
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("http://gpu1:8000", "http://gpu1:8000"),
        ("http://gpu1:8000/v1/", "http://gpu1:8000"),
        ("https://x.example/llm/v1", "https://x.example/llm"),
    ],
)
def test_addresses_with_and_without_v1_are_one(given, expected):
    assert base_url(given) == expected


@pytest.mark.parametrize("given", ["gpu1:8000", "", "ftp://x", "http://", "http://[::1"])
def test_what_is_no_address_is_refused(given):
    with pytest.raises(UserError, match="not a server's address"):
        base_url(given)


# ── several servers ───────────────────────────────────────────────────────────────────────────────────


def test_never_more_than_the_agreed_number_at_once_and_all_servers_work():
    gates = {engine: threading.Barrier(3, timeout=10) for engine in ("one", "two")}

    def together(engine: str) -> Callable[[str], tuple[str, None]]:
        """Answers only when three questions are there at once."""

        def answer(said: str) -> tuple[str, None]:
            gates[engine].wait()
            return f"echo {said}", None

        return answer

    policy = Policy(timeout=20, attempts=1)
    with StandIn(answer=together("one")) as one, StandIn(answer=together("two")) as two:
        pool = Pool([one.url, two.url, one.url + "/v1"], hello, concurrency=3, policy=policy)
        assert pool.room == 6  # an address given twice is one server
        assert texts_of(ask(pool, *"abcdef")) == [f"echo {n}" for n in "abcdef"]
        assert (one.most_at_once, two.most_at_once) == (3, 3)
    with StandIn(answer=lambda said: (time.sleep(0.02), (said, None))[1]) as server:
        ask(Pool([server.url], hello, concurrency=2, policy=QUICK), *map(str, range(20)))
        assert server.most_at_once <= 2


def test_a_server_that_keeps_failing_rests_and_its_questions_go_to_the_other():
    names = [str(i) for i in range(60)]
    policy = Policy(attempts=12, first_wait=0.004, longest_wait=30, unwell_after=3)
    with StandIn(lambda n: "500") as ill, StandIn() as well:
        pool = Pool([ill.url, well.url], hello, concurrency=1, policy=policy)
        assert texts_of(ask(pool, *names)) == [f"echo {n}" for n in names]
        assert len(well.asked) == 60
        # Three failures, a rest, one more, a rest twice as long, one more, …
        assert 3 <= len(ill.asked) <= 15
        assert pool.endpoints[0].failed == len(ill.asked)


def test_a_server_back_from_bad_answers_is_tried_with_one_question_at_a_time():
    under_way: dict[bool, set[int]] = {False: set(), True: set()}

    def counted(endpoint: Endpoint) -> Call[str]:
        under_way[endpoint.on_trial].add(endpoint.in_flight)
        return echo("a")(endpoint)

    async def run(pool: Pool) -> None:
        async with pool:
            await asyncio.gather(*(pool.ask(counted) for _ in range(8)))

    policy = Policy(timeout=5, attempts=20, first_wait=0.004, longest_wait=0.01, unwell_after=3)
    with StandIn(lambda n: "500" if n < 30 else None) as server:
        asyncio.run(asyncio.wait_for(run(Pool([server.url], hello, concurrency=8, policy=policy)), 30))
    assert under_way[True] == {1}
    assert max(under_way[False]) == 8


def test_a_question_that_failed_goes_to_another_server_next():
    with StandIn(lambda n: "500") as ill, StandIn() as well:

        async def ill_first(pool: Pool, endpoint: Endpoint) -> None:
            while endpoint.url == well.url and not ill.asked:
                await asyncio.sleep(0.005)

        pool = Pool(
            [ill.url, well.url], ill_first, policy=Policy(attempts=5, first_wait=0.4, unwell_after=99)
        )
        assert texts_of(ask(pool, "a")) == ["echo a"]
        assert (len(ill.asked), len(well.asked)) == (1, 1)


def test_a_server_that_comes_back_is_greeted_and_asked_again():
    greeted: list[str] = []

    async def greet(pool: Pool, endpoint: Endpoint) -> None:
        await hello(pool, endpoint)
        greeted.append(endpoint.url)

    with StandIn() as one:
        two = StandIn()
        pool = Pool([one.url, two.url], greet, concurrency=1, policy=QUICK)

        async def run() -> None:
            async with pool:
                await asyncio.gather(*(pool.ask(echo("a")) for _ in range(8)))
                two.kill()
                await asyncio.gather(*(pool.ask(echo("b")) for _ in range(8)))
                two.start()
                before = len(two.asked)
                while greeted.count(two.url) < 2:
                    await asyncio.sleep(0.01)
                await asyncio.gather(*(pool.ask(echo("c")) for _ in range(8)))
                assert len(two.asked) > before

        asyncio.run(asyncio.wait_for(run(), 20))
        two.kill()


def test_when_all_are_down_questions_wait_for_one_to_come_up():
    server = StandIn()
    server.kill()
    pool = Pool([server.url], hello, policy=QUICK)

    async def run() -> None:
        async with pool:
            waiting = asyncio.gather(*(pool.ask(echo("a")) for _ in range(5)))
            await asyncio.sleep(0.15)
            assert not waiting.done()
            server.start()
            assert [r[0] for r in await waiting] == ["echo a"] * 5

    asyncio.run(asyncio.wait_for(run(), 20))
    server.kill()


def test_when_all_stay_down_the_run_is_given_up_after_the_patience(capsys):
    server = StandIn()
    server.kill()
    time_ = Time()
    pool = Pool([server.url], hello, policy=Policy(patience=300), clock=time_.clock, sleep=time_.sleep)
    results = ask(pool, "a", "b")
    assert all(isinstance(r, UserError) for r in results)
    assert 240 <= time_.now <= 300  # the next rest would have gone past it
    assert "no server has been well for" in str(results[0])
    assert "run the same command again" in str(results[0])
    assert "waiting up to 300 s more" in " ".join(capsys.readouterr().err.split())


def test_a_server_that_only_ever_asks_for_patience_is_given_up_too():
    time_ = Time()
    with StandIn(lambda n: "429", retry_after="10") as server:
        policy = Policy(patience=50)
        pool = Pool([server.url], hello, policy=policy, clock=time_.clock, sleep=time_.sleep)
        (error,) = ask(pool, "a")
    assert 40 <= time_.now <= 50
    assert isinstance(error, UserError)
    assert "HTTP 429" in str(error)


def test_a_wrong_key_ends_the_run_instead_of_failing_every_row():
    with StandIn(key="right") as server:
        assert texts_of(ask(Pool([server.url], hello, policy=QUICK, api_key="right"), "a"))
        results = ask(Pool([server.url], hello, policy=QUICK, api_key="wrong"), "a", "b")
    assert all(isinstance(r, UserError) and "refuses the API key" in str(r) for r in results)


# ── how it is said, and read ──────────────────────────────────────────────────────────────────────────

NOW = Settings("t", None, True, Sampling(0.7, 20, 0.8), 100, 3)
OFF = Settings("t", None, False, Sampling(1.0), 100, 3)


def endpoint(engine: str) -> Endpoint:
    return Endpoint("http://x", {"engine": engine, "model": "m"})


def test_ids_go_to_the_route_that_takes_them():
    call = completion(endpoint("vllm"), NOW, 2**40 + 5, [], [1, 2])
    assert call.path == "/v1/completions"
    assert call.body == {
        "model": "m",
        "prompt": [1, 2],
        "max_tokens": 100,
        "temperature": 0.7,
        "top_p": 0.8,
        "top_k": 20,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "seed": 5,
        "return_token_ids": True,
        "add_special_tokens": False,
    }
    call = completion(endpoint("llamacpp"), OFF, 5, [], [1, 2])
    assert call.path == "/completion"
    assert call.body == {
        "model": "m",
        "prompt": [1, 2],
        "n_predict": 100,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "samplers": ["temperature", "top_k", "top_p"],  # our order, not the server's
        "seed": 5,
        "return_tokens": True,
    }


def test_the_budget_is_cut_to_what_the_server_takes():
    vllm = Endpoint("http://x", {"engine": "vllm", "model": "m", "max_length": 50})
    assert completion(vllm, NOW, 5, [], [1] * 30).body["max_tokens"] == 20
    with pytest.raises(Refused, match="the prompt is 50 tokens, and the server takes 50"):
        completion(vllm, NOW, 5, [], [1] * 50)
    assert completion(vllm, NOW, 5, [], None).body["max_tokens"] == 100  # nobody here knows its length


def test_messages_go_to_chat_with_thinking_said_either_way():
    messages = [{"role": "user", "content": "hi"}]
    call = completion(endpoint("sglang"), NOW, 5, messages, None, [{"type": "function"}])
    assert call.path == "/v1/chat/completions"
    assert call.body["messages"] == messages
    assert call.body["chat_template_kwargs"] == {"enable_thinking": True}
    assert call.body["tools"] == [{"type": "function"}]
    call = completion(endpoint("vllm"), OFF, 5, messages, None)
    assert call.body["chat_template_kwargs"] == {"enable_thinking": False}
    assert call.body["top_k"] == -1  # off, said so: 0 is an error to some, and left out it may not be off
    assert "tools" not in call.body


def test_answers_are_read_with_their_ids_and_how_they_ended():
    found = {"content": "hi", "tokens": [4, 2], "stop_type": "eos"}
    assert read_llama(found) == Reply("hi", [4, 2], True, 2)
    assert read_llama(found | {"stop_type": "limit"}) == Reply("hi", [4, 2], False, 2)
    choice = {"text": "hi", "finish_reason": "length", "token_ids": [4]}
    assert read_completion({"choices": [choice]}) == Reply("hi", [4], False, 1)
    chat = {"message": {"content": "hi"}, "finish_reason": "stop"}
    assert read_chat({"choices": [chat], "usage": {"completion_tokens": 7}}) == Reply("hi", None, True, 7)
    assert read_chat({"choices": [chat | {"message": {"content": None}}]}) == Reply("", None, True, 0)


@pytest.mark.parametrize(
    "found",
    [
        None,
        [],
        {},
        {"choices": []},
        {"choices": [None]},
        {"choices": [{"text": None, "finish_reason": "stop"}]},
        {"choices": [{"text": "a", "finish_reason": "abort"}]},
        {"choices": [{"text": "a", "finish_reason": "stop", "token_ids": ["a"]}]},
    ],
)
def test_what_is_no_answer_is_garbled_and_not_a_crash(found):
    with pytest.raises(Garbled):
        read_completion(found)


def test_an_answer_that_the_server_took_apart_is_not_put_together_by_guess():
    message = {"content": "4", "reasoning_content": "2 and 2"}
    choice = {"message": message, "finish_reason": "stop"}
    with pytest.raises(UserError, match="takes answers apart"):
        read_chat({"choices": [choice]})
    assert read_chat({"choices": [choice | {"token_ids": [1]}]}).ids == [1]  # the ids say it exactly


# ── whole runs ────────────────────────────────────────────────────────────────────────────────────────


def prompts(count: int) -> list[Any]:
    return [conversation_from_row({"id": f"r{i}", "prompt": f"What is {i}?"}) for i in range(count)]


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def each_once(out: Path, count: int) -> None:
    answered = Counter(row["id"] for row in rows_of(out))
    failed = beside(out, "failures")
    listed = Counter(row["id"] for row in rows_of(failed)) if failed.exists() else Counter()
    assert answered + listed == Counter(f"r{i}" for i in range(count))


def test_every_prompt_once_through_every_fault_and_a_death(tmp_path):
    def fault(n: int) -> str | None:
        """Every third question, each fault in turn."""
        return PASSING[n // 3 % len(PASSING)] if n % 3 == 1 else None

    out = tmp_path / "a.jsonl"
    policy = Policy(0.3, 12, 0.01, 0.05, 3, 20, 0.3)
    two = StandIn(fault)
    killer = threading.Timer(0.3, two.kill)
    reviver = threading.Timer(0.6, two.start)
    with StandIn(fault) as one:
        killer.start()
        reviver.start()
        tally = regenerate_served([one.url, two.url], prompts(100), out, concurrency=4, policy=policy, seed=1)
        reviver.join()
    two.kill()
    assert (tally.new, tally.failed) == (100, 0)
    each_once(out, 100)
    for row in rows_of(out):
        question, answer = row["messages"]
        assert answer["content"] == f"echo {question['content']}"
    assert set(one.met) == {*PASSING, None}
    assert two.asked


def test_rows_that_cannot_be_answered_are_listed_and_tried_again(tmp_path):
    bad = {"What is 3?": "400", "What is 5?": "empty", "What is 7?": "500"}
    out = tmp_path / "a.jsonl"
    server = StandIn()
    server.enter = lambda path, body: bad.get(body["messages"][-1]["content"])  # type: ignore[method-assign]
    tally = regenerate_served([server.url], prompts(10), out, policy=QUICK)
    assert (tally.new, tally.failed) == (7, 3)
    each_once(out, 10)
    reasons = {row["id"]: row["reason"] for row in rows_of(beside(out, "failures"))}
    assert reasons["r3"] == "HTTP 400: fault 400"
    assert reasons["r5"] == "the server gave an empty answer"
    assert reasons["r7"] == "after 4 attempts: HTTP 500: fault 500"
    bad.clear()
    tally = regenerate_served([server.url], prompts(10), out, policy=QUICK)
    assert (tally.new, tally.there, tally.failed) == (3, 7, 0)
    each_once(out, 10)
    assert not beside(out, "failures").exists()
    server.kill()


def test_a_setting_that_no_row_survives_ends_the_run_early(tmp_path):
    with StandIn(lambda n: "400") as server:
        with pytest.raises(UserError, match="first 32 rows failed, the last one so: HTTP 400"):
            regenerate_served([server.url], prompts(500), tmp_path / "a.jsonl", policy=QUICK)
        assert len(server.asked) < 3 * HOPELESS


def test_servers_that_go_away_leave_what_was_answered(tmp_path):
    out = tmp_path / "a.jsonl"
    server = StandIn()
    policy = Policy(0.3, 4, 0.01, 0.05, 3, 0.3, 0.3)
    enter = server.enter

    def dying(path: str, body: dict[str, Any]) -> str | None:
        if len(server.asked) == 30:
            threading.Thread(target=server.kill).start()
            return "hang"
        return enter(path, body)

    server.enter = dying  # type: ignore[method-assign]
    with pytest.raises(UserError, match="no server has been well"):
        regenerate_served([server.url], prompts(100), out, concurrency=2, policy=policy)
    before = rows_of(out)
    assert 25 <= len(before) <= 31
    server.enter = enter  # type: ignore[method-assign]
    server.start()
    tally = regenerate_served([server.url], prompts(100), out, policy=QUICK)
    server.kill()
    assert tally.there == len(before)
    each_once(out, 100)
    assert rows_of(out)[: len(before)] == before


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> TargetSpec:
    return TargetSpec.from_pretrained(str(save_talking_llama(tmp_path_factory.mktemp("talking"))))


def test_with_a_target_prompts_are_its_template_and_answers_its_tokens(target, tmp_path):
    tokenizer = target.tokenizer()
    split: Callable[[str], list[int]] = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    ids = [*split("fine"), tokenizer.eos_token_id]
    out = tmp_path / "a.jsonl"
    row = conversation_from_row({"id": "x", "turns": ["How are you?", "And now?"], "domain": "chat"})
    with StandIn(engine="llamacpp", answer=lambda said: ("fine", ids), tokenize=split) as server:
        regenerate_served([server.url], [row], out, target=target, thinking=True, seed=4, policy=QUICK)
    (found,) = rows_of(out)
    history = [{"role": "user", "content": "How are you?"}, {"role": "assistant", "content": "fine"}]
    history += [{"role": "user", "content": "And now?"}, {"role": "assistant", "content": "fine"}]
    assert found["messages"] == history
    assert found["answer_ids"] == [ids, ids]
    assert (found["target"], found["engine"], found["thinking"]) == (target.name, "llamacpp", True)
    assert [path for path, _ in server.asked] == ["/completion"] * 2
    assert (
        [body["prompt"] for _, body in server.asked]
        == [
            prompt_ids(tokenizer, history[:1], True),  # type: ignore[arg-type]
            prompt_ids(tokenizer, history[:3], True),  # type: ignore[arg-type]
        ]
    )
    assert [body["seed"] for _, body in server.asked] == [row_seed(4, "x", t) % 2**31 for t in (0, 1)]


def test_a_server_of_another_model_is_found_out_before_it_is_asked(target, tmp_path):
    with StandIn(tokenize=lambda text: [1, 2, 3]) as server:
        with pytest.raises(UserError, match="splits text into other tokens"):
            regenerate_served([server.url], prompts(3), tmp_path / "a.jsonl", target=target, policy=QUICK)
        assert not server.asked
    assert not (tmp_path / "a.jsonl").exists()


def test_a_model_that_is_not_served_is_refused_with_the_names_that_are(tmp_path):
    with StandIn(model="qwen3-4b") as server, pytest.raises(UserError) as caught:
        regenerate_served([server.url], prompts(3), tmp_path / "a.jsonl", model="qwen3-8b", policy=QUICK)
    assert "'qwen3-8b' is not served here, but 'qwen3-4b'" in str(caught.value)
    assert "--model qwen3-4b" in str(caught.value)


def test_two_servers_of_different_models_are_not_mixed(tmp_path):
    with (
        StandIn(model="a") as one,
        StandIn(model="b") as two,
        pytest.raises(UserError, match="not served here"),
    ):
        regenerate_served([one.url, two.url], prompts(200), tmp_path / "o.jsonl", policy=QUICK)


def test_answers_of_another_model_are_not_taken_for_this_ones(tmp_path):
    out = tmp_path / "a.jsonl"
    with StandIn(model="a") as server:
        regenerate_served([server.url], prompts(2), out, policy=QUICK)
    with (
        StandIn(model="b") as server,
        pytest.raises(DataError, match="made with target 'a', but now it is 'b'"),
    ):
        regenerate_served([server.url], prompts(3), out, policy=QUICK)


def test_command_through_servers(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "right")
    file, out = tmp_path / "p.jsonl", tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"id": f"r{i}", "prompt": f"What is {i}?"}) + "\n" for i in range(9)))
    with StandIn(key="right") as one, StandIn(key="right") as two:
        words = ["data", "regenerate", file, "--out", out, "--server", one.url, "--server", f"{two.url}/v1"]
        words += ["--api-key-env", "MY_KEY", "--concurrency", 2]
        result = CliRunner().invoke(app, [str(w) for w in words])
    assert result.exit_code == 0, result.output
    assert "9 new answers" in result.stdout
    assert "deepspec data inspect" in result.stdout
    each_once(out, 9)
    assert one.asked and two.asked
