"""An answer that was cut at its budget teaches no end of turn: the target did not write one there."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.csv
import pyarrow.parquet
import pytest

from deepspec.answers.dialogue import Dialogue
from deepspec.data.conversations import conversation_from_row, cut_turns, read_conversations
from deepspec.data.formats import REASONS
from deepspec.data.tokens import encode_turns
from deepspec.errors import DataError
from rowfiles import SHARED, good, jsonl, shared
from templates import CHATML, QWEN3
from test_pieces import TOKENIZER, supervised, talk

END = "<|im_end|>"


def logged(said: str = "one two thr", *earlier: str, **choice: Any) -> dict[str, Any]:
    """A request log; `earlier`: texts of user and assistant in turns before the question."""
    roles = ("user", "assistant") * (len(earlier) + 1)
    asked = [{"role": r, "content": t} for r, t in zip(roles, (*earlier, "Count."), strict=False)]
    message = {"role": "assistant", "content": said}
    return {
        "id": "x",
        "request": {"messages": asked},
        "response": {"choices": [{"message": message} | choice]},
    }


def ends(row: dict[str, Any]) -> list[bool]:
    """For each supervised turn, whether its end of turn is supervised: one stretch of the mask each."""
    tokenizer, found = TOKENIZER(CHATML), []
    for sequence in encode_turns(tokenizer, conversation_from_row(row), True):
        stretches = groupby(zip(sequence.loss_mask, sequence.ids, strict=True), lambda pair: pair[0])
        found += [END in tokenizer.decode([i for _, i in pairs]) for on, pairs in stretches if on]
    return found


@pytest.mark.parametrize(
    ("choice", "whole"),
    [
        ({"finish_reason": "stop"}, True),
        ({}, True),  # a log that keeps no reasons
        ({"finish_reason": "tool_calls"}, True),
        ({"finish_reason": "STOP"}, True),
        ({"finish_reason": "eos_token"}, True),
        ({"finish_reason": "end_turn"}, True),
        ({"finish_reason": "stop", "stop_reason": None}, True),  # vLLM: no stop string
        ({"finish_reason": "stop", "stop_reason": 151645}, True),  # vLLM: a stop token's id
        ({"finish_reason": "length"}, False),
        ({"finish_reason": "max_tokens"}, False),
        ({"finish_reason": "MAX_TOKENS"}, False),
        ({"finish_reason": "content_filter"}, False),
        ({"finish_reason": "abort"}, False),
        ({"finish_reason": None}, False),
        ({"finish_reason": "stop", "stop_reason": "\n\n"}, False),  # vLLM: the client's stop string
        ({"finish_reason": "stop", "matched_stop": "Observation:"}, False),  # SGLang's word for it
        ({"finish_reason": "stop_sequence"}, False),
        ({"done_reason": "stop"}, True),  # Ollama
        ({"done_reason": "length"}, False),
        ({"stop_type": "eos"}, True),  # llama.cpp
        ({"stop_type": "limit"}, False),
        ({"stop_type": "word"}, False),
    ],
)
def test_only_an_answer_that_ended_by_itself_teaches_its_end(choice: dict[str, Any], whole: bool) -> None:
    row = logged(**choice)
    assert ends(row) == [whole]
    assert conversation_from_row(row).meta["finished"] is whole
    # A row with the reason next to its messages tells the same.
    messages = [{"role": "user", "content": "Count."}, {"role": "assistant", "content": "one two thr"}]
    assert ends({"messages": messages, **choice}) == [whole]
    assert ends({"messages": messages, "meta": choice}) == [whole]


def test_exact_tokens_of_a_cut_answer_and_of_a_whole_one() -> None:
    tokenizer = TOKENIZER(CHATML)
    cut, whole = (conversation_from_row(logged("Pear", finish_reason=r)) for r in ("length", "stop"))
    assert supervised(tokenizer, cut) == [["Pear"]]
    assert supervised(tokenizer, whole) == [["Pear", END]]
    prompt = encode_turns(tokenizer, whole, True)[0].ids[:-2]
    assert encode_turns(tokenizer, cut, True)[0].ids == [*prompt, tokenizer.convert_tokens_to_ids("Pear")]


def test_the_reason_of_a_logged_answer_is_not_that_of_the_answers_before_it(tmp_path: Path) -> None:
    row = logged("one two thr", "Say one.", "one", finish_reason="length")
    assert ends(row) == [True, False]
    assert conversation_from_row(row).meta["cut_turns"] == [2]
    # So too after `data download`, which writes the row with its meta.
    good("download", jsonl(tmp_path / "log.jsonl", row), "--out", tmp_path / "rows.jsonl")
    (kept,) = read_conversations(tmp_path / "rows.jsonl")
    assert (kept.meta["finished"], kept.meta["cut_turns"]) == (False, [2])
    assert len(supervised(TOKENIZER(CHATML), kept)) == 1
    assert supervised(TOKENIZER(CHATML), kept)[0].count(END) == 1


def test_a_cut_turn_in_the_middle_is_followed_by_its_end_as_context() -> None:
    tokenizer = TOKENIZER(CHATML)
    row = talk("q", "one tw", "r", "one", finished=False, cut_turns=[1])
    (sequence,) = encode_turns(tokenizer, row, True)
    assert supervised(tokenizer, row) == [[*tokenizer.tokenize("one tw"), *tokenizer.tokenize("one"), END]]
    first = sequence.loss_mask.index(1) + len(tokenizer.tokenize("one tw"))
    assert (tokenizer.decode(sequence.ids[first]), sequence.loss_mask[first]) == (END, 0)


def test_a_row_that_does_not_tell_which_answer_was_cut_teaches_no_end() -> None:
    messages = [*talk("q", "one", "r", "one").messages]
    assert ends({"messages": messages, "finished": False}) == [False, False]
    assert ends({"messages": messages, "finished": "False"}) == [False, False], "as a CSV file gives it"
    assert ends({"messages": messages, "finished": True}) == [True, True]
    assert ends({"messages": messages, "finished": None}) == [True, True]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_tables_null_is_no_reason_and_its_json_text_is_read(tmp_path: Path, kind: str) -> None:
    """The column of reasons is there in every row, also where nobody gave one."""
    rows: list[dict[str, Any]] = [
        {"turns": None, "prompt": "q", "response": "one", "finish_reason": "length"},
        {"turns": None, "prompt": "r", "response": "one", "finish_reason": None},
        {"turns": '["s", "t"]', "prompt": None, "response": None, "finish_reason": None},
    ]
    rows[1] |= {"meta": '{"level": 3}', "answer_ids": "[7, 8]", "finished": "false", "cut_turns": "[]"}
    path = tmp_path / f"rows.{kind}"
    table = pyarrow.Table.from_pylist([dict.fromkeys(rows[1]) | row for row in rows])
    (pyarrow.csv.write_csv if kind == "csv" else pyarrow.parquet.write_table)(table, path)
    good("download", path, "--out", tmp_path / "out.jsonl")
    cut, whole, _ = read_conversations(tmp_path / "out.jsonl")
    assert [list(cut_turns(row)) for row in (cut, whole)] == [[1], []]
    assert (whole.meta["level"], whole.meta["answer_ids"]) == (3, [7, 8])


def test_text_only_answers_of_a_server_tell_which_of_them_were_cut() -> None:
    dialogue = Dialogue.begin(conversation_from_row({"id": "x", "turns": ["q", "r", "s"]}))
    for text, finished in (("one", True), ("one tw", False), ("one", True)):
        dialogue.answer(text, None, finished, 2)
    row = dialogue.row({})
    assert (row["finished"], row["cut_turns"]) == (False, [2])
    assert ends(row) == [True, False, True]
    called = [*talk("q", "f()").messages, {"role": "tool", "content": "1"}]
    kept = Dialogue.begin(conversation_from_row({"id": "x", "messages": called}))
    kept.answer("one tw", None, False, 2)
    assert kept.row({})["cut_turns"] == [2], "numbered over all assistant turns"
    # What was true of an older answer is not taken over.
    old = logged("one", finish_reason="length") | dict.fromkeys(REASONS, "length")
    again = Dialogue.begin(conversation_from_row(old))
    again.answer("one", None, True, 2)
    assert cut_turns(conversation_from_row(again.row({}))) == []


def test_ids_next_to_text_are_taken_as_they_are_whatever_the_reason() -> None:
    tokenizer = TOKENIZER(CHATML)
    ids = [tokenizer.convert_tokens_to_ids(token) for token in ("P", END)]
    assert supervised(tokenizer, talk("q", "Pear", answer_ids=ids, finished=False)) == [["P", END]]
    assert supervised(tokenizer, talk("q", "Pear", answer_ids=ids[:1], finished=True)) == [["P"]]


def test_cut_thoughts_and_text_have_no_end_and_a_cut_call_is_refused() -> None:
    tokenizer = TOKENIZER(QWEN3)
    thinking = {"role": "assistant", "content": "Pear", "reasoning_content": "hm"}
    (tokens,) = supervised(tokenizer, talk("q", thinking, finished=False))
    assert tokenizer.convert_tokens_to_string(tokens) == "<think>\nhm\n</think>\n\nPear"
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    calling = {"role": "assistant", "content": "", "tool_calls": [call]}
    assert supervised(tokenizer, talk("q", calling))[0][-1] == END
    with pytest.raises(DataError, match=r"message 2 \(assistant\): .* closes a tool call .* was cut"):
        supervised(tokenizer, talk("q", calling, finish_reason="length"))


def test_cut_answer_that_holds_the_end_of_turn_is_refused_too() -> None:
    with pytest.raises(DataError, match="contains the end-of-turn token"):
        supervised(TOKENIZER(CHATML), talk("q", f"one{END}", finished=False))


def test_the_shared_log_of_a_cut_answer() -> None:
    rows = list(read_conversations(shared(SHARED / "faults" / "cut_answer.jsonl")))
    assert [supervised(TOKENIZER(CHATML), row)[0][-1] == END for row in rows] == [False, True]
    assert json.dumps(rows[0].meta["finished"]) == "false"
