from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deepspec.answers import in_process
from deepspec.data import readers
from deepspec.data.conversations import (
    Conversation,
    answer_ids_by_turn,
    content_hash,
    conversation_from_row,
    last_answer,
    opening_question,
    prompt_messages,
    read_conversations,
    tools_of,
    write_conversations,
)
from deepspec.data.identity import holdout_bucket, normalise, row_seed
from deepspec.data.messages import MAY_FOLLOW
from deepspec.data.skipping import Skipped
from deepspec.errors import DataError
from deepspec.measure import evaluate

EVAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "eval"
USER = {"role": "user", "content": "2+2?"}
ANSWER = {"role": "assistant", "content": "4"}


def file_of(folder: Path, *rows: object) -> Path:
    """A JSONL file; strings and bytes are lines as they stand."""
    path = folder / "rows.jsonl"
    lines = [
        row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode()
        for row in rows
    ]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def read_one(folder: Path, row: object) -> Conversation:
    (conversation,) = read_conversations(file_of(folder, row))
    return conversation


def error_of(path: Path, **options: bool) -> str:
    with pytest.raises(DataError) as caught:
        list(read_conversations(path, **options))
    return str(caught.value)


# -- accepted forms ----------------------------------------------------------------------------------------


def test_canonical_row_keeps_id_domain_messages_and_meta(tmp_path: Path) -> None:
    row = {
        "id": "a",
        "domain": "math",
        "messages": [USER, ANSWER],
        "meta": {"answer_ids": [5, 6]},
        "from": "x",
    }
    got = read_one(tmp_path, row)
    assert got == Conversation("a", "math", (USER, ANSWER), {"answer_ids": [5, 6], "from": "x"})
    assert got.source == f"{tmp_path / 'rows.jsonl'}:1"


def test_every_role_order_of_a_tool_conversation_is_accepted(tmp_path: Path) -> None:
    roles = ["system", "user", "assistant", "tool", "tool", "assistant", "user"]
    messages = [{"role": role, "content": role} for role in roles]
    assert [m["role"] for m in read_one(tmp_path, {"messages": messages}).messages] == roles


def test_sharegpt_names_become_roles(tmp_path: Path) -> None:
    row = {
        "conversations": [
            {"from": "system", "value": "be brief"},
            {"from": "human", "value": "2+2?", "weight": None},
            {"from": "gpt", "value": "4"},
        ]
    }
    assert read_one(tmp_path, row).messages == ({"role": "system", "content": "be brief"}, USER, ANSWER)


@pytest.mark.parametrize("key", ["messages", "conversations"])
@pytest.mark.parametrize(("role", "text"), [("role", "content"), ("from", "value")])
def test_every_format_knows_the_same_names(tmp_path: Path, key: str, role: str, text: str) -> None:
    for user in ("user", "human", "prompter"):
        for assistant in ("assistant", "gpt", "chatgpt", "bard", "bing", "bot", "model", "ai", "ASSISTANT"):
            row = {key: [{role: user, text: "2+2?"}, {role: assistant, text: "4", "weight": 1}]}
            assert conversation_from_row(row).messages == (USER, {**ANSWER, "weight": 1})
    called = {"name": "add", "arguments": {"a": None}}
    for name, answers in (
        ("function_call", "observation"),
        ("tool_call", "tool"),
        ("Tool-Call", "function-response"),
    ):
        for said in (json.dumps(called), json.dumps([called]), called, [called]):
            row = {key: [{role: "human", text: "2+2?"}, {role: name, text: said}, {role: answers, text: "4"}]}
            assert conversation_from_row(row).messages == (
                USER,
                {**ANSWER, "content": "", "tool_calls": [{"type": "function", "function": called}]},
                {"role": "tool", "content": "4"},
            )


def test_names_of_two_formats_that_a_table_merged_are_told_apart_by_their_nulls() -> None:
    one = {"from": "human", "value": "2+2?", "role": None, "content": None}
    other = {"from": None, "value": None, "role": "assistant", "content": "4"}
    assert conversation_from_row({"messages": [one, other]}).messages == (USER, ANSWER)
    both = {"from": "human", "value": "2+2?", "role": "user", "content": "3+3?"}
    with pytest.raises(DataError, match=r"message 1 \(user\): unknown key 'from'"):
        conversation_from_row({"messages": [both]})


def test_the_older_function_call_of_openai_is_a_tool_call() -> None:
    call = {"name": "add", "arguments": '{"a": null}'}
    asked = {"role": "assistant", "content": None, "function_call": call}
    row = {"messages": [USER, asked, {"role": "function", "name": "add", "content": "4"}]}
    assert conversation_from_row(row).messages[1:] == (
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]},
        {"role": "tool", "name": "add", "content": "4"},
    )
    # Tables hold calls as JSON text, since each has other arguments.
    for text in (json.dumps(call), json.dumps([{"type": "function", "function": call}])):
        asked = {"role": "assistant", "content": None, "tool_calls": text}
        said = {"role": "assistant", "content": "4", "tool_calls": "[]"}
        assert conversation_from_row({"messages": [USER, asked, row["messages"][2], said]}).messages == (
            *conversation_from_row(row).messages,
            ANSWER,
        )


def test_turns_keep_follow_ups_out_of_the_messages_because_no_answer_stands_between(tmp_path: Path) -> None:
    got = read_one(tmp_path, {"turns": ["2+2?", "and 3+3?"]})
    assert (got.messages, got.meta) == ((USER,), {"follow_ups": ["and 3+3?"]})
    assert read_one(tmp_path, {"turns": ["2+2?"]}).meta == {}


def test_prompt_and_response_with_and_without_the_response(tmp_path: Path) -> None:
    assert read_one(tmp_path, {"prompt": "2+2?", "response": "4"}).messages == (USER, ANSWER)
    assert read_one(tmp_path, {"prompt": "2+2?", "response": None}).messages == (USER,)


def test_messages_win_over_prompt_and_the_prompt_is_kept_as_meta(tmp_path: Path) -> None:
    got = read_one(tmp_path, {"prompt": "2+2?", "messages": [USER, ANSWER]})
    assert (got.messages, got.meta) == ((USER, ANSWER), {"prompt": "2+2?"})


def test_blank_lines_are_skipped_but_counted(tmp_path: Path) -> None:
    path = file_of(tmp_path, "", {"prompt": "a"}, "  ", {"prompt": 1})
    rows = read_conversations(path)
    assert next(iter(rows)).source == f"{path}:2"
    with pytest.raises(DataError, match=r"rows\.jsonl:4"):
        next(iter(rows))


def test_line_separator_inside_a_text_does_not_end_the_row(tmp_path: Path) -> None:
    row = json.dumps({"prompt": "a\u2028b\x85c"}, ensure_ascii=False)
    assert read_one(tmp_path, row).messages[0]["content"] == "a\u2028b\x85c"


def test_reading_streams(tmp_path: Path) -> None:
    rows = iter(read_conversations(file_of(tmp_path, {"prompt": "a"}, "{broken")))
    assert next(rows).messages[0]["content"] == "a"


@pytest.mark.skipif(not EVAL.exists(), reason="the optional folder of evaluation prompts is not here")
def test_published_evaluation_prompts_are_readable() -> None:
    counts = {path.stem: sum(1 for _ in read_conversations(path)) for path in sorted(EVAL.glob("*.jsonl"))}
    lines = {path.stem: path.read_bytes().count(b"\n") for path in sorted(EVAL.glob("*.jsonl"))}
    assert counts == lines and counts


def test_tool_calls_thoughts_names_and_tools_are_kept(tmp_path: Path) -> None:
    tool = {"role": "tool", "content": "4", "tool_call_id": "c", "name": "add"}
    messages = [{**USER, "name": "ada"}, {**calls(), "reasoning_content": "2 and 2"}, tool, ANSWER]
    got = read_one(tmp_path, {"messages": messages, "tools": [{"name": "add"}]})
    assert got.messages == (messages[0], {**messages[1], "content": ""}, tool, ANSWER)
    assert got.meta == {"tools": [{"name": "add"}]} and tools_of(got) == [{"name": "add"}]
    assert tools_of(read_one(tmp_path, {"prompt": "a", "tools": []})) is None


@pytest.mark.parametrize("arguments", ['{"a": 2}', "", {}])
def test_arguments_may_be_the_json_text_of_an_object(tmp_path: Path, arguments: object) -> None:
    got = read_one(tmp_path, {"messages": [USER, calls(arguments=arguments)]})
    assert got.messages[1]["tool_calls"][0]["function"]["arguments"] == arguments


def test_empty_fields_of_server_logs_say_nothing_and_go(tmp_path: Path) -> None:
    empty = {"refusal": None, "annotations": [], "tool_calls": [], "reasoning_content": "", "audio": {}}
    assert read_one(tmp_path, {"messages": [USER, {**ANSWER, **empty}]}).messages == (USER, ANSWER)


def test_text_parts_become_one_text(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}]
    for row in (
        {"messages": [{"role": "user", "content": parts}]},
        {"conversations": [{"from": "human", "value": parts}]},
    ):
        assert read_one(tmp_path, row).messages == (USER,)


def test_a_message_of_tool_calls_needs_no_content(tmp_path: Path) -> None:
    bare = {"role": "assistant", "tool_calls": calls()["tool_calls"]}
    assert read_one(tmp_path, {"messages": [USER, bare]}).messages[1] == {**bare, "content": ""}


def test_answer_ids_are_for_the_last_turn_or_for_each(tmp_path: Path) -> None:
    def by_turn(ids: object) -> object:
        row = read_one(tmp_path, {"messages": [USER, ANSWER, USER, ANSWER, USER], "answer_ids": ids})
        return answer_ids_by_turn(row)

    assert by_turn(None) == [None, None]
    assert by_turn([5, 6]) == [None, [5, 6]]
    assert by_turn([]) == [None, []]
    assert by_turn([[5], None]) == [[5], None]
    assert by_turn([None, [6]]) == [None, [6]]
    assert answer_ids_by_turn(Conversation("a", None, (USER,), {"answer_ids": [5]})) == []


# -- refused input: where, what was found, what was expected -----------------------------------------------


def calls(**facts: Any) -> dict[str, Any]:
    """An assistant message with one tool call; `facts` replace or add keys of the call or its function."""
    function = {"name": "add", "arguments": facts.pop("arguments", {"a": 2})}
    call = {"id": "c", "type": "function", "function": function, **facts}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


BAD_ROWS: list[tuple[object, str]] = [
    ('{"messages": [', "malformed JSON: EOF while parsing a list at the end of the line"),
    ('{"prompt": NaN}', "malformed JSON: expected value at column 12"),
    ("[" * 100_000, "malformed JSON: "),
    ([USER], "expected a JSON object, found an array"),
    ("3", "expected a JSON object, found a number"),
    ({}, "(nor 'conversations', 'turns', 'prompt', 'instruction', 'request'); found an empty object"),
    ({"mesages": [USER]}, "found 'mesages': did you mean 'messages'?"),
    ({"xyz": 1}, "found 'xyz'"),
    ({"messages": []}, "'messages' is empty, expected at least one message"),
    ({"messages": "hi"}, "'messages' must be a list, found a string"),
    ({"messages": ["hi"]}, "message 1 must be an object, found a string"),
    ({"messages": [{"role": "user"}]}, "message 1 (user): no 'content'; found 'role'"),
    ({"messages": [{"role": "users", "content": ""}]}, "unknown role 'users', expected one of system, user"),
    ({"messages": [{"role": "users", "content": ""}]}, "next: did you mean 'user'?"),
    ({"messages": [{"role": ["user"], "content": ""}]}, "message 1: 'role' must be a string, found an array"),
    (
        {"messages": [{"role": "user", "content": None}]},
        "message 1 (user): 'content' must be a string, found null",
    ),
    (
        {"messages": [USER, {**ANSWER, "reasoning": "2, 3, 4"}]},
        "2 (assistant): unknown key 'reasoning'",
    ),
    (
        {"messages": [ANSWER]},
        "roles out of order: message 1 is assistant at the start, expected system or user",
    ),
    ({"messages": [USER, USER]}, "message 2 is user after user, expected assistant"),
    ({"messages": [USER, ANSWER, ANSWER]}, "message 3 is assistant after assistant, expected user or tool"),
    ({"messages": [USER, {"role": "system", "content": ""}]}, "message 2 is system after user"),
    ({"messages": [{"role": "system", "content": ""}]}, "a system message alone"),
    ({"conversations": [{"from": "humans", "value": ""}]}, "next: did you mean 'human'?"),
    ({"turns": []}, "'turns' is empty"),
    ({"turns": ["a", 2]}, "turn 2 must be a string, found a number"),
    ({"prompt": [USER]}, "'prompt' must be a string, found an array"),
    ({"prompt": "a", "response": False}, "'response' must be a string, found a boolean"),
    ({"prompt": "a", "id": 7}, "'id' must be a string, found a number"),
    ({"prompt": "a", "domain": 7}, "'domain' must be a string, found a number"),
    ({"prompt": "a", "meta": []}, "'meta' must be an object, found an array"),
    ({"prompt": "a", "meta": {"k": 1}, "k": 2}, "'k' is both inside 'meta' and outside it"),
    ({"prompt": "a", "answer_ids": [1, "2"]}, "'answer_ids' must be a list of non-negative integers"),
    ({"prompt": "a", "answer_ids": [1, -2]}, "'answer_ids' must be a list of non-negative integers"),
    ({"prompt": "a\ud800"}, "malformed JSON: half a surrogate pair ("),
    (
        {"messages": [{**USER, "weight": 1}]},
        "unknown key 'weight', a user message may have 'role', ",
    ),
    ({"messages": [{**USER, "content": []}]}, "message 1 (user): the content is an empty list"),
    (
        {"messages": [{**USER, "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}]},
        "part 2 of the content must have 'type': 'text' and a 'text', and nothing else",
    ),
    (
        {"messages": [{**USER, "content": [{"type": "text", "text": None}]}]},
        "message 1 (user): the text of part 1 of the content must be a string",
    ),
    ({"messages": [USER, {"role": "assistant", "content": None}]}, "'content' must be a string, found null"),
    (
        {"messages": [USER, {**ANSWER, "reasoning_content": 7}]},
        "'reasoning_content' must be a string, found a",
    ),
    (
        {"messages": [USER, {**ANSWER, "tool_calls": {"name": "f"}}]},
        "'tool_calls' must be a list, found an obj",
    ),
    ({"messages": [USER, {**ANSWER, "weight": 0.5}]}, "'weight' must be 0 or 1, found 0.5"),
    ({"messages": [USER, {**ANSWER, "weight": True}]}, "'weight' must be 0 or 1, found True"),
    (
        {"messages": [{**USER, "tool_calls": calls()["tool_calls"]}]},
        "1 (user): unknown key 'tool_calls'",
    ),
    ({"conversations": [{"from": "human"}]}, "message 1 (user): no 'value'; found 'from'"),
    (
        {"conversations": [{"from": "human", "value": "a", "weight": 1}]},
        "message 1 (user): unknown key 'weight'",
    ),
    (
        {"messages": [USER, {**ANSWER, "tool_calls": [{"name": "f"}]}]},
        "tool call 1: no 'function'; found 'name'",
    ),
    ({"messages": [USER, calls(weight=1)]}, "tool call 1: unknown key 'weight'\n"),
    ({"messages": [USER, calls(type="custom")]}, "tool call 1: 'type': Input should be 'function'"),
    ({"messages": [USER, calls(arguments="{")]}, "tool call 1: 'arguments' is not JSON: "),
    ({"messages": [USER, calls(arguments="[1]")]}, "'arguments' must be an object, or the JSON text of one"),
    ({"messages": [USER, calls(arguments=None)]}, "'arguments' must be an object, or the JSON text of one"),
    (
        {"messages": [USER, calls(), {"role": "tool", "content": "4", "tool_call_id": "d"}]},
        "message 3 (tool): the assistant before it made no call with the id 'd'",
    ),
    ({"prompt": "a", "tools": "add"}, "'tools' must be a list of JSON schemas"),
    ({"prompt": "a", "tools": [1]}, "'tools' must be a list of JSON schemas"),
    (
        {"messages": [USER, ANSWER], "answer_ids": [[1], 2]},
        "'answer_ids' must be a list of non-negative integers, or one such list or null for each turn",
    ),
    (
        {"messages": [USER, ANSWER], "answer_ids": [[1], None]},
        "has 2 entries, but there are 1 assistant turns",
    ),
    ('{"prompt": "a", "meta": {"x": [1e999]}}', "malformed JSON: a number is too large"),
    ('{"prompt": "a", "meta": {"x": -' + "9" * 250 + "e99}}", "malformed JSON: a number is too large"),
    ({"messages": [USER, calls(arguments='{"a": 1e999}')]}, "'arguments' is not JSON: a number is too large"),
    ({"conversations": [{"from": "human", "value": None}]}, "1 (user): 'value' must be a string, found null"),
    (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "add(2)"}]},
        "message 2 (assistant): the text of a function_call is not JSON",
    ),
    (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "tool_call", "value": '{"name": "f"}'}]},
        "message 2 (assistant), tool call 1: no 'arguments'; found 'name'",
    ),
    ({"conversations": [USER, {"from": "gtp", "value": "4"}]}, "message 2: unknown role 'gtp', expected one"),
    (b'{"prompt": "caf\xe9"}', "not UTF-8: byte 0xe9 at byte 16 of the line"),
]


@pytest.mark.parametrize(("row", "expected"), BAD_ROWS, ids=range(len(BAD_ROWS)))
def test_bad_row_is_refused_with_its_line_and_what_was_expected(
    tmp_path: Path, row: object, expected: str
) -> None:
    path = file_of(tmp_path, {"prompt": "fine"}, row)
    message = error_of(path)
    assert expected in message
    assert f"where: {path}:2" in message


def test_a_byte_order_mark_and_dos_line_ends_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a\\r\\n"}\r\n\r\n{"prompt": "b"}\r\n')
    assert [row.messages[0]["content"] for row in read_conversations(path)] == ["a\r\n", "b"]


@pytest.mark.parametrize(
    ("start", "kind"),
    [
        ('{"prompt": "a"}'.encode("utf-16"), "the file is UTF-16, expected UTF-8 text"),
        (b"\x1f\x8b\x08\x00", "the file is compressed (gzip)"),
        (b"PAR1\x15\x04", "the file is Parquet"),
    ],
)
def test_a_file_of_another_kind_is_named_and_no_row_of_it_is_skipped(
    tmp_path: Path, start: bytes, kind: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(start + b"\n")
    message = error_of(path)
    assert kind in message and f"where: {path}:1" in message
    with pytest.raises(DataError, match=re.escape(kind)):
        list(read_conversations(path, skipped=Skipped()))


@pytest.mark.parametrize("ending", ["csv", "tsv", "parquet"])
def test_a_table_in_place_of_a_jsonl_file_is_named_with_the_command_that_converts_it(
    tmp_path: Path, ending: str
) -> None:
    path = tmp_path / f"rows.{ending}"
    path.write_bytes(b"PAR1")
    assert f"deepspec data download {path} --out {tmp_path / 'rows.jsonl'}" in error_of(path)


def test_large_numbers_that_are_finite_are_read(tmp_path: Path) -> None:
    meta = {"x": 1e308, "y": 10**300, "z": [-1e-320]}
    assert read_one(tmp_path, {"prompt": "a", "meta": meta}).meta == meta


def test_one_array_of_all_rows_is_told_how_to_become_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"prompt": "a"}]))
    assert "jq -c '.[]'" in error_of(path)
    path.write_text(json.dumps([{"prompt": "a"}], indent=1))
    assert "jq -c '.[]'" in error_of(path)


def test_a_line_without_end_is_refused_before_it_fills_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "MAX_LINE", 1 << 20)
    path = tmp_path / "rows.jsonl"
    with path.open("wb") as file:
        file.write(b'{"prompt": "a"}\n')
        file.write(b"x" * (30 << 20))
        file.write(b'\n{"prompt": "b"}\n')
    tracemalloc.start()
    message = error_of(path)
    skipped = Skipped()
    rows = [row.messages[0]["content"] for row in read_conversations(path, skipped=skipped)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "the line is longer than 1 MiB" in message and f"where: {path}:2" in message
    assert (rows, skipped.places) == (["a", "b"], [f"{path}:2: the line is longer than 1 MiB"])
    assert peak < 8 << 20


def test_a_line_of_exactly_the_limit_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_LINE", 32)
    path = tmp_path / "rows.jsonl"
    for length, end in ((32, b""), (32, b"\n"), (31, b"\r\n")):
        path.write_bytes(json.dumps({"prompt": "x" * (length - 14)}).encode() + end)
        assert len(list(read_conversations(path))) == 1
    path.write_bytes(json.dumps({"prompt": "x" * (33 - 14)}).encode() + b"\n")
    assert "the line is longer than" in error_of(path)


def test_skipped_rows_are_counted_by_reason_with_the_first_places(tmp_path: Path) -> None:
    user = [USER, ANSWER, USER]
    bad = [
        {"messages": [*user, USER]},
        b'{"prompt": "caf\xe9"}',
        {"messages": [USER, USER]},
        "{",
        {"messages": [{"role": "user", "content": None}]},
    ]
    path = file_of(tmp_path, {"prompt": "first"}, *bad, {"prompt": "last"})
    skipped = Skipped(shown=2)
    rows = list(read_conversations(path, skipped=skipped))
    assert [row.messages[0]["content"] for row in rows] == ["first", "last"]
    assert skipped.count == 5
    assert skipped.reasons == {
        "roles out of order: message N is user after user, expected assistant": 2,
        "not UTF-8: byte 0xe9 at byte N of the line": 1,
        "malformed JSON: EOF while parsing an object at the end of the line": 1,
        "message N (user): 'content' must be a string, found null": 1,
    }
    assert skipped.places == [
        f"{path}:2: roles out of order: message 4 is user after user, expected assistant",
        f"{path}:3: not UTF-8: byte 0xe9 at byte 16 of the line",
    ]
    assert skipped.lines()[0] == "skipped 5 bad rows:"


def test_rows_without_an_answer_are_skipped_where_answers_are_needed(tmp_path: Path) -> None:
    path, skipped = file_of(tmp_path, {"messages": [USER]}, {"messages": [USER, ANSWER]}), Skipped()
    assert len(list(read_conversations(path, require_answer=True, skipped=skipped))) == 1
    assert dict(skipped.reasons) == {"conversation without an assistant turn": 1}


def test_a_file_of_rubbish_does_not_fill_the_memory_with_reasons(tmp_path: Path) -> None:
    roles = ["".join(word) for word in itertools.product("abcdefgh", repeat=3)]
    rows = [{"messages": [{"role": role, "content": ""}]} for role in roles]
    skipped = Skipped()
    assert list(read_conversations(file_of(tmp_path, *rows), skipped=skipped)) == []
    assert (len(skipped.reasons), sum(skipped.reasons.values())) == (101, 512)
    assert skipped.reasons["other reasons"] == 412


def test_a_fault_of_ours_is_never_skipped(tmp_path: Path) -> None:
    rows = read_conversations(file_of(tmp_path, {"prompt": "a"}, {"prompt": "b"}), skipped=Skipped())
    next(rows)
    with pytest.raises(ValueError, match="ours"):
        rows.throw(ValueError("ours"))


# -- request logs ------------------------------------------------------------------------------------------

CHOICE = {"index": 0, "finish_reason": "stop", "message": {**ANSWER, "tool_calls": [], "refusal": None}}
LOG = {
    "request": {"model": "m", "messages": [USER], "temperature": 0.5},
    "response": {"id": "chatcmpl-7", "choices": [CHOICE], "usage": {"total_tokens": 9}},
}


def test_a_logged_request_and_its_response_become_one_conversation(tmp_path: Path) -> None:
    got = read_one(tmp_path, {**LOG, "domain": "support", "latency": 0.2})
    assert got == Conversation(
        "chatcmpl-7",
        "support",
        (USER, ANSWER),
        {
            "request": {"model": "m", "temperature": 0.5},
            "response": {"id": "chatcmpl-7", "usage": {"total_tokens": 9}},
            "finished": True,
            "latency": 0.2,
        },
    )


def test_a_batch_files_wrapped_request_and_response_are_found(tmp_path: Path) -> None:
    row = {
        "custom_id": "row-3",
        "body": {"messages": [{"role": "developer", "content": "be brief"}, USER]},
        "response": {"status_code": "200", "body": {"choices": [{**CHOICE, "finish_reason": "length"}]}},
        "error": None,
    }
    got = read_one(tmp_path, row)
    assert got.id == "row-3"
    assert got.messages == ({"role": "system", "content": "be brief"}, USER, ANSWER)
    assert got.meta == {"request": {}, "finished": False}


@pytest.mark.parametrize(
    "response",
    [
        None,
        {},
        {"status_code": 500, "body": {"error": "overloaded"}},
        {"status_code": 429, "body": {"detail": "slow down"}},
        {"error": {"message": "too long"}},
        {"choices": [{"message": {"role": "assistant", "content": None}}]},
    ],
)
def test_a_request_that_got_no_answer_is_still_a_prompt(tmp_path: Path, response: object) -> None:
    assert read_one(tmp_path, {"request": LOG["request"], "response": response}).messages == (USER,)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"request": {"prompt": "<|im_start|>"}}, "its 'prompt' is a text completion's"),
        ({"request": {"model": "m"}}, "'request' has no list of 'messages'"),
        ({"body": {"model": "m"}}, "'body' has no list of 'messages'"),
        ({**LOG, "response": [{"choices": []}]}, "'response' must be an object with 'choices'"),
        ({**LOG, "response": {"choices": []}}, "'response' has no 'choices' with a 'message'"),
        ({**LOG, "response": {"choices": [{"delta": {}}]}}, "'response' has no 'choices' with a 'message'"),
        ({**LOG, "meta": 3}, "'meta' must be an object, found a number"),
        ({"request": "text"}, "no 'messages'"),
        ({"request": None}, "'request' is null"),
        ({"prompt": None}, "'prompt' is null"),
    ],
)
def test_a_log_line_of_another_kind_is_refused_with_its_place(
    tmp_path: Path, row: object, expected: str
) -> None:
    path = file_of(tmp_path, row)
    message = error_of(path)
    assert expected in message and f"where: {path}:1" in message


def test_file_cut_in_the_middle_of_a_row_says_so(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b')
    message = error_of(path)
    assert "was the file cut while it was written?" in message and f"{path}:2" in message


def test_missing_file_is_a_data_error_with_its_path(tmp_path: Path) -> None:
    assert f"where: {tmp_path / 'none.jsonl'}" in error_of(tmp_path / "none.jsonl")
    assert "cannot read the conversations" in error_of(tmp_path)


def test_require_answer_refuses_a_prompt_and_accepts_an_answer(tmp_path: Path) -> None:
    path = file_of(tmp_path, {"messages": [USER, ANSWER]}, {"messages": [USER]})
    message = error_of(path, require_answer=True)
    assert "conversation without an assistant turn" in message and f"where: {path}:2" in message
    assert len(list(read_conversations(path))) == 2


# -- writing -----------------------------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)


@st.composite
def any_conversation(draw: Any) -> Conversation:
    roles = [*draw(st.sampled_from([[], ["system"]])), "user"]
    for _ in range(draw(st.integers(0, 4))):
        roles.append(draw(st.sampled_from(MAY_FOLLOW[roles[-1]])))
    messages = tuple({"role": role, "content": draw(TEXT)} for role in roles)
    for message in messages:
        if message["role"] == "assistant" and draw(st.booleans()):
            message["reasoning_content"] = draw(TEXT.filter(bool))
            function = {"name": draw(TEXT), "arguments": draw(st.dictionaries(TEXT, JSON, max_size=2))}
            message["tool_calls"] = [{"type": "function", "function": function}]
    checked = ("answer_ids", "tools")
    meta = draw(st.dictionaries(TEXT.filter(lambda key: key not in checked), JSON, max_size=3))
    return Conversation(draw(TEXT), draw(st.none() | TEXT), messages, meta)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(any_conversation(), max_size=4))
def test_what_is_written_is_read_back_unchanged(tmp_path: Path, rows: list[Conversation]) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    assert write_conversations(path, iter(rows)) == len(rows)
    again = list(read_conversations(path))
    assert again == rows
    assert content_hash(again) == content_hash(rows)
    assert os.listdir(path.parent) == ["rows.jsonl"]


def test_failing_generator_leaves_the_old_file_and_no_rubbish(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_conversations(path, [Conversation("old", None, (USER,))])

    def rows() -> Iterator[Conversation]:
        yield Conversation("new", None, (USER,))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_conversations(path, rows())
    assert [row.id for row in read_conversations(path)] == ["old"]
    assert os.listdir(tmp_path) == ["rows.jsonl"]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (Conversation("bad", None, (USER, USER)), "roles out of order"),
        (Conversation("bad", None, (USER,), {"x": float("nan")}), "cannot be written as JSON"),
        (Conversation("bad", None, (USER,), {"x": {1}}), "cannot be written as JSON"),
        (Conversation("bad", None, ({"role": "user", "content": "a\ud800"},)), "cannot be written as JSON"),
    ],
)
def test_a_row_that_could_not_be_read_back_is_not_written(
    tmp_path: Path, row: Conversation, expected: str
) -> None:
    with pytest.raises(DataError, match=re.escape(expected)) as caught:
        write_conversations(tmp_path / "rows.jsonl", [row])
    assert "conversation bad" in str(caught.value)
    assert os.listdir(tmp_path) == []


# -- prompts, ids, hashes ----------------------------------------------------------------------------------


def test_turn_of_weight_0_is_part_of_the_prompt_and_of_its_id() -> None:
    foreign = {**ANSWER, "weight": 0}
    asked = conversation_from_row({"messages": [USER, foreign, USER]})
    assert prompt_messages(asked) == (USER, foreign, USER)
    answered = conversation_from_row({"messages": [USER, foreign, USER, ANSWER]})
    assert prompt_messages(answered) == (USER, foreign, USER)
    assert asked.id == answered.id
    with pytest.raises(DataError, match="every assistant turn has weight 0"):
        last_answer(asked)


def test_prompt_messages_stop_before_the_last_answer_only() -> None:
    more = {"role": "user", "content": "3+3?"}
    assert prompt_messages(Conversation("a", None, (USER,))) == (USER,)
    assert prompt_messages(Conversation("a", None, (USER, ANSWER))) == (USER,)
    assert prompt_messages(Conversation("a", None, (USER, ANSWER, more, ANSWER))) == (USER, ANSWER, more)
    assert prompt_messages(Conversation("a", None, (USER, ANSWER, more))) == (USER,)


def test_default_id_is_the_prompts_hash_and_survives_answering(tmp_path: Path) -> None:
    expected = hashlib.sha256(b"what is \xc3\xa9?").hexdigest()[:16]
    for row in (
        {"prompt": "What  is\n\u00e9? "},
        {"prompt": "what is e\u0301?", "response": "a letter"},
        {"turns": ["What is \u00c9?", "and f?"]},
    ):
        assert read_one(tmp_path, row).id == expected
    assert read_one(tmp_path, {"prompt": "what is f?"}).id != expected


def test_default_id_tells_system_prompts_and_message_boundaries_apart(tmp_path: Path) -> None:
    def row(system: str, user: str) -> dict[str, Any]:
        return {"messages": [{"role": "system", "content": system}, {"role": "user", "content": user}]}

    rows = [row("a", "b c"), row("a b", "c"), row("x", "b c"), {"prompt": "a b c"}]
    # Nor are two prompts one that differ in the tools offered, or in a call that was made before.
    rows += [{"prompt": "a b c", "tools": [{"name": name}]} for name in ("add", "sub")]
    loops = [[USER, calls(arguments={"a": n}), {"role": "tool", "content": "4"}, ANSWER] for n in (1, 2)]
    rows += [{"messages": loop} for loop in loops]
    assert len({read_one(tmp_path, r).id for r in rows}) == 8


def test_opening_question_ignores_what_surrounds_it(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "s"}, USER, ANSWER, {"role": "user", "content": "more"}]
    assert opening_question(read_one(tmp_path, {"messages": messages})) == "2+2?"


@given(text=TEXT)
def test_bucket_is_in_range_and_the_same_for_every_spelling(text: str) -> None:
    value = holdout_bucket(text)
    assert 0.0 <= value < 1.0
    assert holdout_bucket(f"  {text}\n") == value == holdout_bucket(normalise(text))


def test_bucket_value_never_changes_between_releases() -> None:
    assert holdout_bucket("What is 2+2?") == holdout_bucket("what  is 2+2?") == 0.9195642326748383


def test_bucket_spreads_evenly() -> None:
    held = sum(holdout_bucket(f"question {i}") < 0.1 for i in range(5000))
    assert 420 < held < 580  # 500 ± 3.8 standard deviations


def test_a_rows_seed_never_changes_between_releases() -> None:
    """Answers on disk resume with it, and evaluations use the same."""
    assert evaluate.row_seed is in_process.row_seed is row_seed
    seeds = [row_seed(0, "a"), row_seed(0, "a", 1), row_seed(5, "a")]
    assert seeds == [44459602984103823, 7621350981828360, 48803348171836419]


def test_content_hash_sees_text_order_and_meta_but_not_source() -> None:
    a, b = Conversation("a", None, (USER,)), Conversation("b", None, (ANSWER,))
    assert content_hash([a]) == content_hash([Conversation("a", None, (USER,), source="x:1")])
    others = [
        [b, a],
        [a],
        [Conversation("a", "math", (USER,)), b],
        [Conversation("a", None, (USER,), {"x": 1}), b],
    ]
    assert content_hash([a, b]) not in [content_hash(rows) for rows in others]
