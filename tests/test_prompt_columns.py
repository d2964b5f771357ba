"""Columns next to the messages that change the prompt are read into it, or refused by name."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from deepspec.conditions import SWITCHES
from deepspec.data.conversations import Conversation, conversation_from_row, tools_of
from deepspec.data.prompt_columns import SYSTEM
from deepspec.errors import DataError
from rowfiles import call, good, jsonl, lines_of, refused

BRIEF = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "2+2?"}
ANSWER = {"role": "assistant", "content": "4"}
ADD = {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}
PLAIN_ID = "30ad205245cd2523"
"""SHA-256 of "2+2?": the id of rows with this prompt alone, in every release."""
FORMS: dict[str, dict[str, Any]] = {
    "messages": {"messages": [USER, ANSWER]},
    "conversations": {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
    "turns": {"turns": ["2+2?"]},
    "prompt": {"prompt": "2+2?", "response": "4"},
    "instruction": {"instruction": "2+2?", "input": "", "output": "4"},
}


def read(row: dict[str, Any]) -> Conversation:
    return conversation_from_row(row, "rows.jsonl:1")


def error_of(row: dict[str, Any]) -> str:
    with pytest.raises(DataError) as caught:
        read(row)
    return str(caught.value)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("column", SYSTEM)
def test_a_system_column_is_the_first_message_and_part_of_the_id(form: str, column: str) -> None:
    plain, got = read(FORMS[form]), read({**FORMS[form], column: "Be brief."})
    assert got.messages == (BRIEF, *plain.messages)
    assert column not in got.meta
    assert got.id == read({"messages": [BRIEF, *plain.messages]}).id != plain.id


@pytest.mark.parametrize("empty", [None, "", "  "])
def test_an_empty_system_column_changes_neither_prompt_nor_meta_nor_id(empty: str | None) -> None:
    got = read({**FORMS["prompt"], "system": empty})
    assert (got.messages, got.meta) == ((USER, ANSWER), {"system": empty})
    assert got.id == PLAIN_ID


def test_a_system_prompt_that_is_given_twice_must_be_the_same() -> None:
    whole = {"messages": [BRIEF, USER]}
    assert read({**whole, "system": "Be brief.\n"}).messages == (BRIEF, USER)
    assert read({"prompt": "2+2?", "system": "Be brief.", "system_prompt": "Be brief."}).messages[0] == BRIEF
    assert "two system prompts that differ: the first message and 'system'" in error_of(
        {**whole, "system": "Rhyme."}
    )
    assert "two system prompts that differ: 'system' and 'system_prompt'" in error_of(
        {"prompt": "2+2?", "system": "Rhyme.", "system_prompt": "Be brief."}
    )


def test_what_a_row_keeps_in_its_meta_stays_metadata() -> None:
    meta = {"system": "Be brief.", "functions": ["add"], "documents": ["d"], "instruction": "x"}
    got = read({"prompt": "2+2?", "meta": meta})
    assert (got.messages, got.meta, got.id) == ((USER,), meta, PLAIN_ID)


@pytest.mark.parametrize(
    ("column", "value", "expected"),
    [
        ("system", 5, "'system' must be a string, found a number"),
        ("system", [{"type": "image_url"}], "'system': part 1 of the content must have"),
        ("instruction", "Add.", "'instruction' may change the prompt, but is in none of the row's messages"),
        ("documents", [{"text": "d"}], "'documents' may change the prompt"),
        ("chat_template", "{{ x }}", "'chat_template' may change the prompt"),
        (
            "chat_template_kwargs",
            {"builtin_tools": ["search"]},
            "'chat_template_kwargs' may change the prompt",
        ),
        ("functions", ["add"], "'functions' must be a list of JSON schemas"),
        ("tools", "add", "'tools' must be a list of JSON schemas"),
        ("tools", "{", "'tools' must be a list of JSON schemas"),
        ("tools", [{"type": "function", "function": "add"}], "'tools' must be a list of JSON schemas"),
        ("functions", [{"function": None}], "'functions' must be a list of JSON schemas"),
    ],
)
def test_a_column_that_cannot_be_read_into_the_prompt_is_refused_by_name(
    column: str, value: object, expected: str
) -> None:
    message = error_of({"prompt": "2+2?", column: value})
    assert expected in message and "where: rows.jsonl:1" in message and "next: " in message


def test_an_instruction_that_the_messages_contain_is_metadata() -> None:
    got = read({**FORMS["messages"], "instruction": " 2+2? "})
    assert (got.messages, got.meta) == ((USER, ANSWER), {"instruction": " 2+2? "})


def test_tools_may_be_json_text_and_functions_are_their_older_name() -> None:
    tool = {"type": "function", "function": ADD}
    rows = [
        {"tools": [tool]},
        {"tools": json.dumps([tool])},
        {"tools": [json.dumps(tool)]},
        {"functions": [ADD]},
        {"functions": json.dumps([ADD])},
        {"functions": [ADD], "tools": [tool]},
        {"meta": {"tools": json.dumps([tool])}},
    ]
    found = [read({"prompt": "2+2?", **row}) for row in rows]
    assert [row.meta for row in found] == [{"tools": [tool]}] * len(rows)
    assert {row.id for row in found} != {read({"prompt": "2+2?"}).id} and len({row.id for row in found}) == 1
    for empty in ("", "[]", None, []):
        assert read({"prompt": "2+2?", "tools": empty}).id == PLAIN_ID
    assert "'functions' and 'tools' differ" in error_of({"prompt": "a", "functions": [ADD], "tools": [ADD]})


def test_a_table_written_as_json_lines_shows_by_its_schemas_that_nulls_are_filling() -> None:
    def row(properties: dict[str, Any], arguments: object) -> Conversation:
        call = {"type": "function", "function": {"name": "add", "arguments": arguments}}
        tool = {"type": "function", "function": {**ADD, "parameters": {"properties": properties}}}
        return read(
            {
                "messages": [USER, {"role": "assistant", "content": None, "tool_calls": [call]}],
                "tools": [tool],
            }
        )

    def arguments_of(conversation: Conversation) -> Any:
        return conversation.messages[1]["tool_calls"][0]["function"]["arguments"]

    number = {"type": "integer"}
    filled = row({"a": number, "city": None}, {"a": 2, "city": None})
    assert filled == row({"a": number}, {"a": 2}) and arguments_of(filled) == {"a": 2}
    assert arguments_of(row({"a": number, "city": None}, '{"a": null}')) == '{"a": null}'
    given = row({"a": number, "city": {"type": "null", "default": None}}, {"a": 2, "city": None})
    assert arguments_of(given) == {"a": 2, "city": None}
    assert tools_of(given)[0]["function"]["parameters"]["properties"]["city"]["default"] is None


def test_alpaca_rows_are_read_as_the_named_set_words_them() -> None:
    row = {"instruction": "Sort.", "input": "3 1", "output": "1 3", "text": "rendered"}
    got = read(row)
    assert [m["content"] for m in got.messages] == ["Sort.\n\nInput:\n3 1", "1 3"]
    assert got.meta == {"text": "rendered"}
    assert [m["content"] for m in read({"instruction": "Sort.", "response": "1"}).messages] == ["Sort.", "1"]
    assert "'context' may change" in error_of({"instruction": "Sort.", "context": "3 1", "response": "1"})
    assert "'history' may change" in error_of({"instruction": "Sort.", "history": [["a", "b"]]})


def test_a_logged_request_is_what_the_server_was_given() -> None:
    request = {"messages": [USER], "temperature": 1, "system": "Be brief.", "functions": [ADD]}
    got = read({"request": request, "response": {"choices": [{"message": ANSWER}]}})
    assert got.messages == (BRIEF, USER, ANSWER)
    assert got.meta["tools"] == [{"type": "function", "function": ADD}]
    assert got.meta["request"] == {"temperature": 1}
    assert read({"request": {"messages": [BRIEF, USER]}, "system": "Be brief."}).meta["system"] == "Be brief."
    assert "'system' may change" in error_of({"request": {"messages": [USER]}, "system": "Be brief."})
    documents = {"messages": [USER], "documents": [{"text": "d"}]}
    assert "'documents' may change" in error_of({"request": documents})
    assert read({"request": {"messages": [USER]}, "instruction": "x"}).messages == (USER,)
    # The choice of thinking, as `data regenerate` itself asks servers, is the command line's.
    asked = {"messages": [USER], "chat_template_kwargs": dict.fromkeys(SWITCHES, False)}
    assert read({"request": asked}).id == PLAIN_ID
    asked["chat_template_kwargs"]["reasoning_effort"] = "high"
    assert "'chat_template_kwargs' may change" in error_of({"request": asked})


# -- downloads ---------------------------------------------------------------------------------------------


def test_a_column_map_fills_system_and_tools_from_a_table(tmp_path: Path) -> None:
    table = tmp_path / "rows.csv"
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([["s", "q", "t"], ["Be brief.", "2+2?", json.dumps([ADD])], ["", "a", ""]])
    out = tmp_path / "out.jsonl"
    good("download", table, "--map", "prompt=q", "--map", "system=s", "--map", "tools=t", "--out", out)
    first, second = lines_of(out)
    assert first["messages"] == [BRIEF, USER] and first["meta"]["tools"] == [ADD]
    assert second["messages"] == [{"role": "user", "content": "a"}]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_map_that_leaves_out_a_column_of_the_prompt_says_so_once(tmp_path: Path, kind: str) -> None:
    rows = [{"q": f"q{i}", "system_prompt": "Be brief.", "input": "x", "tools": None} for i in range(3)]
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        jsonl(path, *rows)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    result = call("download", path, "--map", "prompt=q", "--out", tmp_path / "out.jsonl")
    said = " ".join(result.stderr.split())
    assert result.exit_code == 0
    for column in ("system_prompt", "input"):
        assert said.count(f"--map leaves out the column '{column}'") == 1
    assert "'tools'" not in said
    quiet = call(
        "download", path, "--map", "prompt=q", "--map", "system=system_prompt", "--out", tmp_path / "o.jsonl"
    )
    assert "'system_prompt'" not in quiet.stderr


def test_an_unreadable_column_is_counted_with_skip_bad(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "in.jsonl", {"prompt": "a"}, {"prompt": "b", "documents": ["d"]})
    assert f"where: {path}:2" in refused("download", path, "--out", tmp_path / "out.jsonl")
    result = call("download", path, "--out", tmp_path / "out.jsonl", "--skip-bad")
    assert result.exit_code == 0 and "1 × 'documents' may change the prompt" in result.stderr
