"""Answers through servers: how they are asked for and read, and whole runs through servers that fail."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from deepspec.answers.file import Settings, beside
from deepspec.answers.requests import Reply, Served, completion, read_chat, read_completion, read_llama
from deepspec.answers.through_servers import HOPELESS, regenerate_served
from deepspec.cli import app
from deepspec.data.conversations import conversation_from_row
from deepspec.data.identity import row_seed
from deepspec.data.tokens import prompt_ids
from deepspec.errors import DataError, UserError
from deepspec.http_client import Passing, Policy, Unanswered
from deepspec.maths.verify import Sampling
from deepspec.targets import TargetSpec
from standin import PASSING, StandIn
from talking import save_talking_llama

QUICK = Policy(timeout=0.4, attempts=4, first_rest=0.01, longest_rest=0.05, patience=20)

# ── how it is said, and read ──────────────────────────────────────────────────────────────────────────

NOW = Settings("t", None, True, Sampling(0.7, 20, 0.8), 100, 3)
OFF = Settings("t", None, False, Sampling(1.0), 100, 3)


VLLM, LLAMA = Served("m", "vllm"), Served("m", "llamacpp")


def test_ids_go_to_the_route_that_takes_them():
    call = completion(VLLM, NOW, 2**40 + 5, [], [1, 2])
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
    call = completion(LLAMA, OFF, 5, [], [1, 2])
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
    vllm = Served("m", "vllm", 50)
    assert completion(vllm, NOW, 5, [], [1] * 30).body["max_tokens"] == 20
    with pytest.raises(Unanswered, match="the prompt is 50 tokens, and the server takes 50"):
        completion(vllm, NOW, 5, [], [1] * 50)
    assert completion(vllm, NOW, 5, [], None).body["max_tokens"] == 100  # nobody here knows its length


def test_messages_go_to_chat_with_thinking_said_either_way():
    messages = [{"role": "user", "content": "hi"}]
    call = completion(Served("m", "sglang"), NOW, 5, messages, None, [{"type": "function"}])
    assert call.path == "/v1/chat/completions"
    assert call.body["messages"] == messages
    names = ("enable_thinking", "thinking", "reasoning", "enable_reasoning")
    assert call.body["chat_template_kwargs"] == dict.fromkeys(names, True)
    assert call.body["tools"] == [{"type": "function"}]
    call = completion(VLLM, OFF, 5, messages, None)
    assert call.body["chat_template_kwargs"] == dict.fromkeys(names, False)
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
    ("content", "text"),
    [
        ([{"type": "text", "text": "Pe"}, {"type": "text", "text": "ar."}], "Pear."),
        (["Pe", {"text": "ar."}, {"type": "output_text", "text": ""}], "Pear."),
        ("a \ud83d\ude00", "a 😀"),
        ([{"type": "text", "text": "a \ud83d"}, {"type": "text", "text": "\ude00"}], "a 😀"),
        ("\ufeffa", "\ufeffa"),
        ([], ""),
    ],
)
def test_the_parts_of_an_answer_are_joined(content, text):
    choice = {"message": {"content": content}, "finish_reason": "stop"}
    assert read_chat({"choices": [choice]}).text == text
    if content:
        assert read_completion({"choices": [{"text": content, "finish_reason": "stop"}]}).text == text
        assert read_llama({"content": content, "tokens": [1], "stop_type": "eos"}).text == text


@pytest.mark.parametrize("content", [5, {"text": 5}, [5], [{"type": "text", "text": 5}], [["a"]], True])
def test_content_that_is_no_text_is_garbled(content):
    with pytest.raises(Passing, match="garbled answer: no text"):
        read_chat({"choices": [{"message": {"content": content}, "finish_reason": "stop"}]})


@pytest.mark.parametrize(
    "found",
    [
        {},
        {"choices": []},
        {"choices": [None]},
        {"choices": [{"text": None, "finish_reason": "stop"}]},
        {"choices": [{"text": "a", "finish_reason": "abort"}]},
        {"choices": [{"text": "a", "finish_reason": ["stop"]}]},
        {"choices": [{"text": "a", "finish_reason": "stop", "token_ids": ["a"]}]},
        {"choices": [{"text": "a", "finish_reason": "stop", "token_ids": [True]}]},
        {"choices": [{"text": "a", "finish_reason": "stop", "token_ids": [2**64]}]},
    ],
)
def test_what_is_no_answer_is_garbled_and_not_a_crash(found):
    with pytest.raises(Passing, match="garbled answer"):
        read_completion(found)


def test_an_answer_that_the_server_took_apart_is_not_put_together_by_guess():
    message = {"content": "4", "reasoning_content": "2 and 2"}
    choice = {"message": message, "finish_reason": "stop"}
    with pytest.raises(Unanswered, match=r"takes answers apart \(reasoning_content next to the content\)"):
        read_chat({"choices": [choice]})
    parts = [{"type": "thinking", "thinking": [{"type": "text", "text": "2 and 2"}]}, {"text": "4"}]
    with pytest.raises(Unanswered, match=r"takes answers apart \(a part of type 'thinking'"):
        read_chat({"choices": [choice | {"message": {"content": parts}}]})
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
    policy = Policy(0.3, 12, 0.01, 0.05, 20)
    two = StandIn(fault)
    killer = threading.Timer(0.3, two.kill)
    reviver = threading.Timer(0.6, two.start)
    with StandIn(fault) as one:
        killer.start()
        reviver.start()
        tally = regenerate_served([one.url, two.url], prompts(100), out, concurrency=4, policy=policy)
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


def answering(replies: dict[str, dict[str, Any]]) -> StandIn:
    """A server whose choice for some questions has other keys."""

    class Server(StandIn):
        def reply(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
            good = super().reply(path, body)
            good["choices"][0] |= replies.get(body["messages"][-1]["content"], {})
            return good

    return Server()


def test_an_answer_that_is_no_text_or_taken_apart_is_that_rows_failure(tmp_path):
    odd = {
        "What is 1?": {"message": {"content": [{"type": "text", "text": "Pe"}, {"text": "ar."}]}},
        "What is 2?": {"message": {"content": "a smile: \ud83d"}, "finish_reason": "length"},
        "What is 3?": {"message": {"content": "\ude00"}, "token_ids": [5, 6]},
        "What is 4?": {"message": {"content": None, "tool_calls": [{"id": "x"}]}},
    }
    out = tmp_path / "a.jsonl"
    with answering(odd) as server:
        tally = regenerate_served([server.url], prompts(6), out, policy=QUICK)
        assert (tally.new, tally.failed) == (3, 3)
        assert {row["id"]: row["messages"][-1]["content"] for row in rows_of(out)} == {
            "r0": "echo What is 0?",
            "r1": "Pear.",
            "r5": "echo What is 5?",
        }
        reasons = {row["id"]: row["reason"] for row in rows_of(beside(out, "failures"))}
        half = "the server's answer holds half of a surrogate pair, which is not text"
        assert (reasons["r2"], reasons["r3"]) == (half, half)
        assert reasons["r4"].startswith("the server takes answers apart (tool_calls next to the content)")
        before = out.read_bytes()
        odd.clear()
        tally = regenerate_served([server.url], prompts(6), out, policy=QUICK)
        assert (tally.new, tally.there, tally.failed) == (3, 3, 0)
        assert out.read_bytes().startswith(before)
        each_once(out, 6)


def test_half_a_pair_in_the_text_does_not_matter_where_the_ids_say_what_was_written(target, tmp_path):
    tokenizer = target.tokenizer()
    split: Callable[[str], list[int]] = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    ids, out = [*split("fine"), tokenizer.eos_token_id], tmp_path / "a.jsonl"
    with StandIn(answer=lambda said: ("\ud83d", ids), tokenize=split) as server:
        regenerate_served([server.url], prompts(1), out, target=target, policy=QUICK)
    assert rows_of(out)[0]["messages"][-1]["content"] == "fine"
    assert rows_of(out)[0]["answer_ids"] == ids


def test_a_question_that_is_no_json_is_that_rows_failure(tmp_path):
    """JSON has no infinity, and the library that sends it raises."""
    out, rows = tmp_path / "a.jsonl", prompts(3)
    tool = {"type": "function", "function": {"name": "f", "parameters": {"maximum": float("inf")}}}
    rows[1] = conversation_from_row({"id": "r1", "prompt": "What is 1?", "tools": [tool]})
    with StandIn() as server:
        tally = regenerate_served([server.url], rows, out, policy=QUICK)
    assert (tally.new, tally.failed) == (2, 1)
    assert "the question cannot be sent as JSON" in rows_of(beside(out, "failures"))[0]["reason"]


def http(status: int, body: bytes = b"{}", *headers: str) -> list[bytes]:
    """An answer over the wire."""
    head = [f"HTTP/1.1 {status} x", "connection: close", *headers, f"content-length: {len(body)}", "", ""]
    return ["\r\n".join(head).encode() + body]


CLOSED = {
    "401": http(401),
    "403": http(403, b"<html>not for you</html>"),
    "404": http(404),
    "405": http(405),
    "302": http(302, b"", "location: https://login.example/?token=secret"),
    "500": http(500),
    "html": http(200, b"<html>welcome</html>"),
    "no tokens": http(200),
    "garbled": http(200, b'{"tokens": [{"id": 1}]}'),
    "nothing": [b""],
}


@pytest.mark.parametrize("closed", CLOSED)
def test_a_gateway_that_forbids_tokenize_gives_a_warning(target, tmp_path, capsys, closed):
    with StandIn(answer=lambda said: ("fine", [1, 2])) as server:
        server.raw = lambda path, body: CLOSED[closed] if path == "/tokenize" else None
        tally = regenerate_served(
            [server.url], prompts(3), tmp_path / "a.jsonl", target=target, policy=QUICK, concurrency=1
        )
    assert tally.new == 3
    said = capsys.readouterr().err
    assert said.count("its tokenizer could not be compared with the target's (") == 1
    assert "secret" not in said


@pytest.mark.parametrize("closed", ["401", "403", "404", "405"])
def test_a_gateway_that_forbids_its_list_of_models_is_asked_for_the_one_given(tmp_path, capsys, closed):
    out = tmp_path / "a.jsonl"
    with StandIn() as server:
        server.raw = lambda path, body: CLOSED[closed] if path == "/v1/models" else None
        with pytest.raises(UserError, match="give --model NAME"):
            regenerate_served([server.url], prompts(3), out, policy=QUICK)
        assert regenerate_served([server.url], prompts(3), out, model="m", policy=QUICK).new == 3
        assert [body["model"] for _, body in server.asked] == ["m"] * 3
        assert capsys.readouterr().err.count("does not list its models") == 1
    assert rows_of(out)[0]["engine"] == "unknown"


def test_a_key_that_is_refused_ends_the_run_although_the_probes_were_forbidden(target, tmp_path):
    with StandIn(key="right") as server:
        with pytest.raises(UserError, match="the server asks for an API key"):
            regenerate_served(
                [server.url], prompts(9), tmp_path / "a.jsonl", model="m", target=target, policy=QUICK
            )
        assert not server.asked


@pytest.mark.parametrize("length", ["256", 1.5, -1, 0, True, [], {}, None])
def test_a_length_that_is_none_is_not_known(target, tmp_path, length):
    with StandIn(answer=lambda said: ("fine", None)) as server:
        listed = {"id": "m", "owned_by": None, "max_model_len": length}
        server.models = lambda: {"data": [5, {"id": 5}, {"id": ""}, listed]}  # type: ignore[method-assign]
        out = tmp_path / "a.jsonl"
        assert regenerate_served([server.url], prompts(1), out, target=target, policy=QUICK).new == 1


def test_a_setting_that_no_row_survives_ends_the_run_early(tmp_path):
    with StandIn(lambda n: "400") as server:
        with pytest.raises(UserError, match=r"32 rows failed and none .* reason: HTTP 400"):
            regenerate_served([server.url], prompts(500), tmp_path / "a.jsonl", policy=QUICK)
        assert len(server.asked) < 3 * HOPELESS


def test_servers_that_go_away_leave_what_was_answered(tmp_path):
    out = tmp_path / "a.jsonl"
    server = StandIn()
    policy = Policy(0.3, 4, 0.01, 0.05, 0.3)
    enter = server.enter

    def dying(path: str, body: dict[str, Any]) -> str | None:
        if len(server.asked) == 30:
            threading.Thread(target=server.kill).start()
            return "hang"
        return enter(path, body)

    server.enter = dying  # type: ignore[method-assign]
    with pytest.raises(UserError, match="no server could be asked"):
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
    assert "'qwen3-8b' is not served here; this server has 'qwen3-4b'" in str(caught.value)
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


def test_thinking_by_a_servers_own_template_is_said_to_be_unchecked(tmp_path, capsys):
    with StandIn() as server:
        for thinking in (False, True):
            out = tmp_path / f"{thinking}.jsonl"
            assert regenerate_served([server.url], prompts(2), out, thinking=thinking, policy=QUICK).new == 2
            said = " ".join(capsys.readouterr().err.split())
            assert ("whether it has a switch for thinking is not known here" in said) is thinking
