"""Train, select and test: three sets, whatever the order, copies and spellings of the rows."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deepspec.data.conversations import (
    Conversation,
    opening_question,
    read_conversations,
    write_conversations,
)
from deepspec.data.identity import holdout_bucket, normalise
from deepspec.data.skipping import Skipped
from deepspec.data.split import set_of, split
from deepspec.errors import DataError
from rowfiles import call, good, jsonl, refused

USER = {"role": "user", "content": "2+2?"}
SETS = ("train", "select", "test")


def prompts(path: Path, count: int) -> Path:
    return jsonl(path, *({"prompt": f"question {i}"} for i in range(count)))


def openings(folder: Path) -> dict[str, list[str]]:
    """First words of every row, per set."""
    return {
        name: [row.messages[0]["content"] for row in read_conversations(folder / f"{name}.jsonl")]
        for name in SETS
    }


def test_the_three_sets_are_the_buckets_in_the_rows_order(tmp_path: Path) -> None:
    done = split([prompts(tmp_path / "in.jsonl", 500)], tmp_path / "sets", select=0.1, test=0.2)
    texts = [f"question {i}" for i in range(500)]
    expected = {
        "test": [t for t in texts if holdout_bucket(t) < 0.2],
        "select": [t for t in texts if 0.2 <= holdout_bucket(t) < 0.2 + 0.1],
        "train": [t for t in texts if holdout_bucket(t) >= 0.2 + 0.1],
    }
    assert openings(tmp_path / "sets") == expected
    assert done.rows == {name: len(rows) for name, rows in expected.items()}
    assert done.repeats == 0
    assert sorted(os.listdir(tmp_path / "sets")) == ["select.jsonl", "test.jsonl", "train.jsonl"]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_neither_order_nor_copies_nor_spelling_move_a_prompt_between_sets(tmp_path: Path, data: Any) -> None:
    texts = data.draw(st.lists(st.integers(0, 60).map(lambda i: f"What is {i}?"), min_size=1, max_size=25))
    shares = {"select": 0.25, "test": 0.25}
    split([jsonl(tmp_path / "a.jsonl", *({"prompt": t} for t in texts))], tmp_path / "a", **shares)
    spell = st.sampled_from([str, str.upper, lambda t: f"  {t}\n", lambda t: t.replace(" ", "  ")])
    copies = [
        {
            "messages": [
                *([{"role": "system", "content": "s"}] if data.draw(st.booleans()) else []),
                {"role": "user", "content": data.draw(spell)(text)},
                *([{"role": "assistant", "content": "a"}] if data.draw(st.booleans()) else []),
            ]
        }
        for text in data.draw(st.permutations(texts * 2))
    ]
    done = split([jsonl(tmp_path / "b.jsonl", *copies)], tmp_path / "b", **shares)
    assert sum(done.rows.values()) == len(copies)
    questions = [
        {normalise(opening_question(row)) for row in read_conversations(tmp_path / "b" / f"{name}.jsonl")}
        for name in SETS
    ]
    assert sum(map(len, questions)) == len(set.union(*questions)), "a question is in two sets"
    before = {text: name for name, rows in openings(tmp_path / "a").items() for text in rows}
    for name in SETS:
        for row in read_conversations(tmp_path / "b" / f"{name}.jsonl"):
            question = next(m["content"] for m in row.messages if m["role"] == "user")
            assert before[" ".join(question.split()).capitalize()] == name


def test_another_share_of_select_never_moves_a_test_row() -> None:
    rows = [Conversation(str(i), None, ({"role": "user", "content": f"q{i}"},)) for i in range(400)]
    for row in rows:
        assert (set_of(row, 0.1, 0.2) == "test") == (set_of(row, 0.3, 0.2) == "test")
        assert set_of(row, 0.1, 0.2) != "select" or set_of(row, 0.3, 0.2) == "select"


def test_conversations_that_open_alike_stay_together(tmp_path: Path) -> None:
    rows = [
        {"messages": [USER, {"role": "assistant", "content": answer}, {"role": "user", "content": more}]}
        for answer, more in (("4", "and 3+3?"), ("4", "why?"), ("four", "sure?"))
    ]
    done = split([jsonl(tmp_path / "in.jsonl", *rows)], tmp_path / "sets", select=0.3, test=0.3)
    assert sorted(done.rows.values()) == [0, 0, 3]


def test_rows_pass_unchanged_with_every_field(tmp_path: Path) -> None:
    rows = [
        Conversation(f"r{i}", "d", ({"role": "user", "content": f"é {i}"},), {"answer_ids": [i]})
        for i in range(30)
    ]
    write_conversations(tmp_path / "in.jsonl", rows)
    split([tmp_path / "in.jsonl"], tmp_path / "sets", select=0.2, test=0.2)
    lines = [
        line for name in SETS for line in (tmp_path / "sets" / f"{name}.jsonl").read_bytes().splitlines()
    ]
    assert sorted(lines) == sorted((tmp_path / "in.jsonl").read_bytes().splitlines())


def test_repeated_prompts_are_counted_and_kept_or_dropped(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "in.jsonl", *({"prompt": f"q{i % 20}"} for i in range(50)))
    kept = split([path], tmp_path / "sets", select=0.2, test=0.2)
    assert (sum(kept.rows.values()), kept.repeats) == (50, 30)
    ids = [row.id for name in SETS for row in read_conversations(tmp_path / "sets" / f"{name}.jsonl")]
    assert len(set(ids)) == 50
    dropped = split([path], tmp_path / "sets", select=0.2, test=0.2, drop_repeats=True)
    assert (sum(dropped.rows.values()), dropped.repeats) == (20, 30)


def test_an_id_that_comes_twice_is_refused_with_both_places_or_skipped(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "in.jsonl", {"id": "x", "prompt": "a"}, {"id": "x", "prompt": "b"}, "{")
    error = refused("split", path, "--out", tmp_path / "sets")
    assert f"the id comes twice; first at {path}:1" in error and f"where: {path}:2 (id x)" in error
    assert "--skip-bad" in error
    assert list((tmp_path / "sets").iterdir()) == []
    skipped = Skipped()
    assert sum(split([path], tmp_path / "sets", skipped=skipped).rows.values()) == 1
    assert skipped.count == 2


def test_a_share_of_zero_makes_no_file_and_takes_none_from_before(tmp_path: Path) -> None:
    path, out = prompts(tmp_path / "in.jsonl", 50), tmp_path / "sets"
    assert list(split([path], out, select=0, test=0.3).rows) == ["train", "test"]
    assert sorted(os.listdir(out)) == ["test.jsonl", "train.jsonl"]
    with pytest.raises(DataError, match=r"test\.jsonl exists from an earlier split"):
        split([path], out, select=0.3, test=0)
    assert sorted(os.listdir(out)) == ["test.jsonl", "train.jsonl"]


@pytest.mark.parametrize(("select", "test"), [(0.5, 0.5), (1, 0), (-0.1, 0.2), (0.2, 1.5), (float("nan"), 0)])
def test_shares_that_leave_no_training_set_are_refused(tmp_path: Path, select: float, test: float) -> None:
    path = prompts(tmp_path / "in.jsonl", 3)
    error = refused("split", path, "--out", tmp_path / "sets", "--select", select, "--test", test)
    assert "leave nothing to train on" in error


def test_the_input_is_never_written_over(tmp_path: Path) -> None:
    path = prompts(tmp_path / "train.jsonl", 30)
    assert "the split would overwrite a file that it reads" in refused("split", path, "--out", tmp_path)
    assert len(list(read_conversations(path))) == 30


def test_a_bad_row_leaves_all_three_old_files(tmp_path: Path) -> None:
    out = tmp_path / "sets"
    split([prompts(tmp_path / "in.jsonl", 200)], out)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    path = jsonl(tmp_path / "bad.jsonl", *({"prompt": f"new {i}"} for i in range(200)), {"prompt": 3})
    assert f"where: {path}:201" in refused("split", path, "--out", out)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


def test_an_empty_set_is_warned_of_and_an_empty_file_refused(tmp_path: Path) -> None:
    result = call("split", prompts(tmp_path / "a.jsonl", 2), "--out", tmp_path / "s")
    assert result.exit_code == 0 and "is empty: there are too few questions" in result.stderr
    assert "there are no rows: the source is empty" in refused(
        "split", jsonl(tmp_path / "e.jsonl"), "--out", tmp_path / "s"
    )


def test_several_files_are_divided_as_one(tmp_path: Path) -> None:
    rows = [{"prompt": f"question {i % 40}"} for i in range(60)]
    one, two = jsonl(tmp_path / "a.jsonl", *rows[:35]), jsonl(tmp_path / "b.jsonl", *rows[35:])
    whole = jsonl(tmp_path / "whole.jsonl", *rows)
    shares = ["--select", 0.2, "--test", 0.2]
    assert "rows that repeat an earlier prompt: 20" in good(
        "split", one, two, "--out", tmp_path / "s", *shares
    )
    good("split", whole, "--out", tmp_path / "w", *shares)
    for name in SETS:
        assert (tmp_path / "s" / f"{name}.jsonl").read_bytes() == (
            tmp_path / "w" / f"{name}.jsonl"
        ).read_bytes()
    train = prompts(tmp_path / "s" / "train.jsonl", 3)
    error = refused("split", one, train, "--out", tmp_path / "s")
    assert "the split would overwrite a file that it reads" in error and f"where: {train}" in error


def test_the_report_names_files_shares_and_the_next_command(tmp_path: Path) -> None:
    path, out = prompts(tmp_path / "in.jsonl", 300), tmp_path / "sets"
    words = ["split", path, "--out", out, "--test", 0.2, "--select", 0.1]
    printed = good(*words)
    counts = {name: len(rows) for name, rows in openings(out).items()}
    assert f"{out / 'train'}.jsonl: {counts['train']} rows ({counts['train'] / 300:.1%})" in printed
    assert "rows that repeat an earlier prompt: 0\n" in printed
    assert f"next: deepspec data regenerate {out / 'train.jsonl'} --out {out / 'answers.jsonl'}" in printed
    told = json.loads(good(*words, "--json"))
    assert (told["rows"], told["repeats"]) == (counts, 0)
    assert told["skipped"] == {"count": 0, "reasons": {}, "first": []}
