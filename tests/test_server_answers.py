"""Whatever a server says, over the wire or in its JSON, ends no run but its own row's."""

from __future__ import annotations

import copy
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from deepspec.answers.file import beside
from deepspec.answers.through_servers import regenerate_served
from deepspec.data.conversations import conversation_from_row
from deepspec.errors import UserError
from deepspec.http_client import Policy
from deepspec.targets import TargetSpec
from standin import StandIn
from talking import save_talking_llama

QUICK = Policy(timeout=1.0, attempts=2, first_rest=1e-4, longest_rest=1e-3, patience=0.05)
MANY = settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
ROWS = [conversation_from_row({"id": f"r{i}", "prompt": f"What is {i}?"}) for i in range(4)]
ODD = "What is 1?"

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([2**31, 2**64, -(2**70), 1e308, float("nan"), float("inf")]),
    st.text(st.characters(), max_size=8),
    st.sampled_from(["\ud83d", "\ude00", "\0", "stop", "length", "[DONE]", "a" * 100_000]),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
MESSAGE = {"role": "assistant", "content": "fine", "tool_calls": [], "reasoning_content": None}
GOOD = {
    "id": "cmpl-1",
    "choices": [{"finish_reason": "stop", "token_ids": [5, 6], "message": MESSAGE}],
    "usage": {"completion_tokens": 2},
}


def places(tree: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value of a tree."""
    yield at
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in pairs:
        yield from places(value, (*at, key))


def replaced(at: tuple[Any, ...], value: Any, gone: bool = False) -> bytes:
    """The good answer with another value, or none, in one place."""
    tree = copy.deepcopy(GOOD)
    inner: Any = tree
    for key in at[:-1]:
        inner = inner[key]
    if not at:
        return json.dumps(value).encode()
    if gone:
        del inner[at[-1]]
    else:
        inner[at[-1]] = value
    return json.dumps(tree).encode()


odd_json = st.builds(replaced, st.sampled_from(list(places(GOOD))), values, st.booleans())
odd_bytes = st.one_of(
    st.binary(max_size=40),
    st.sampled_from(
        [
            b"",
            b"<html><body>Sign in</body></html>",
            b"[" * 100_000,
            b'{"a":' * 100_000,
            b"1" * 5000,
            b"\xff\xfe{}",
            b"\xef\xbb\xbf{}",
            json.dumps(GOOD).encode("utf-16"),
            json.dumps(GOOD).replace("fine", "f\xefne").encode("latin-1"),
            json.dumps(GOOD).replace("fine", "\ud83d").encode("utf-8", "surrogatepass"),
            json.dumps(GOOD).encode()[:-9],
            gzip.compress(b" " * 10**6),
        ]
    ),
)
statuses = st.sampled_from(
    [200, 200, 200, 204, 206, 301, 302, 307, 400, 403, 404, 408, 418, 422, 500, 502, 599, 999]
)
headers = st.sampled_from(
    [
        "",
        "content-encoding: gzip\r\n",
        "content-encoding: br, nonsense\r\n",
        "content-type: text/html; charset=hex\r\n",
        "content-type: application/json; charset=no-such\r\n",
        "location: http://[\r\n",
        "location: https://me:hush@login.example/?token=hush#hush\r\n",
        "retry-after: Wed, 21 Oct 99999 07:28:00 GMT\r\n",
        "retry-after: -1e400\r\n",
        "set-cookie: =;;=; expires=never\r\n",
    ]
)


def wire(status: int, head: str, body: bytes, framing: str) -> bytes:
    """A whole answer as it goes over the wire, or what is left of one."""
    if framing == "nothing":
        return b""
    if framing == "no status":
        return body
    if framing in ("chunked", "cut"):
        head += "transfer-encoding: chunked\r\n"
        size = len(body) + 9 * (framing == "cut")
        body = (b"%x\r\n" % size + body if body else b"") + (b"" if framing == "cut" else b"\r\n0\r\n\r\n")
    else:
        head += f"content-length: {len(body) + 9 * (framing == 'short')}\r\n"
    return f"HTTP/1.1 {status} \r\n{head}\r\n".encode() + body


framings = st.sampled_from(["whole", "whole", "whole", "chunked", "cut", "short", "nothing", "no status"])
answers = st.builds(wire, statuses, headers, odd_json | odd_json | odd_bytes, framings)


@pytest.fixture(scope="module")
def server() -> Iterator[StandIn]:
    with StandIn() as running:
        yield running


@pytest.fixture(scope="module")
def undisturbed(server: StandIn, tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """The lines of a run in which every answer is good, sorted."""
    out = tmp_path_factory.mktemp("undisturbed") / "a.jsonl"
    server.raw = lambda path, body: None
    regenerate_served([server.url], ROWS, out, policy=QUICK, concurrency=1)
    return sorted(out.read_bytes().splitlines())


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> TargetSpec:
    return TargetSpec.from_pretrained(str(save_talking_llama(tmp_path_factory.mktemp("talking"))))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []


@given(answer=answers)
@example(wire(200, "", replaced(("choices", 0, "message", "content"), ["a", "\ud83d"]), "chunked"))
@example(wire(200, "", replaced(("choices", 0, "message", "content"), 5), "whole"))
@example(wire(200, "", replaced(("choices", 0, "token_ids"), [2**64]), "whole"))
@MANY
def test_one_rows_answer_is_that_rows_matter(server, undisturbed, tmp_path_factory, answer):
    """Every other row is answered; this one is, or is listed with its reason; the next run asks it again."""
    out = tmp_path_factory.mktemp("odd") / "a.jsonl"

    def raw(path: str, body: dict[str, Any]) -> list[bytes] | None:
        return [answer] if body and body["messages"][-1]["content"] == ODD else None

    server.raw = raw
    tally = regenerate_served([server.url], ROWS, out, policy=QUICK, concurrency=1)
    failed = lines(beside(out, "failures"))
    assert (tally.new, tally.failed) in ((4, 0), (3, 1))
    assert [row["id"] for row in failed] == ["r1"] * tally.failed
    assert all(row["reason"] and "hush" not in row["reason"] for row in failed)
    assert {row["id"] for row in lines(out)} == {"r0", "r1", "r2", "r3"} - {row["id"] for row in failed}
    before = out.read_bytes()
    server.raw = lambda path, body: None
    again = regenerate_served([server.url], ROWS, out, policy=QUICK, concurrency=1)
    assert (again.new, again.there, again.failed) == (tally.failed, tally.new, 0)
    assert out.read_bytes().startswith(before)
    if failed:  # the bytes of a run that was never disturbed, but for the place of the row asked again
        assert sorted(out.read_bytes().splitlines()) == undisturbed


@given(answer=answers, probe=st.sampled_from(["/v1/models", "/tokenize"]), known=st.booleans())
@MANY
def test_an_odd_answer_to_a_probe_is_no_crash(server, tmp_path_factory, target, answer, probe, known):
    """The run ends with an error that says what to do, or is made."""
    server.raw = lambda path, body: [answer] if path == probe else None
    out, model = tmp_path_factory.mktemp("odd") / "a.jsonl", "m" if known else None
    try:
        tally = regenerate_served(
            [server.url], ROWS[:1], out, target=target, model=model, policy=QUICK, concurrency=1
        )
    except UserError as error:
        assert error.next_step is not None
        assert "hush" not in str(error)
    else:
        assert tally.new == 1
