"""Sources of conversations: the Hub (the real `datasets` on local files), files, column maps, ids, cuts."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import sys
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepspec.data.conversations import Conversation, conversation_from_row, read_conversations
from deepspec.data.csv_rows import csv_rows
from deepspec.data.download import cut, download
from deepspec.data.readers import file_rows, hub_rows
from deepspec.data.repeats import UniqueIds
from deepspec.data.skipping import Skipped
from deepspec.data.sources import Wanted, mapped, open_source
from deepspec.errors import DataError
from rowfiles import EVAL, call, good, jsonl, lines_of, questions, refused, shared

STEPS = "\nPlease reason step by step, and put your final answer within \\boxed{}."


def asked(texts: list[str]) -> list[Conversation]:
    """Questions as rows without ids of their own."""
    return [conversation_from_row({"prompt": text}, f"file:{i}") for i, text in enumerate(texts, start=1)]


# -- the Hub through the real library ----------------------------------------------------------------------


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A data set's repository as on the Hub: two configs, two shards, a column that is not wanted."""
    folder = tmp_path / "OWNER" / "NAME"
    folder.mkdir(parents=True)
    for i in range(2):
        rows = [{"question": f"q{2 * i + j}", "answer": "a", "extra": [{"a": 1}]} for j in range(2)]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"test-{i}.parquet")
    other = [{"messages": [{"role": "user", "content": "m", "weight": None}], "prompt_id": "p"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(other), folder / "other.parquet")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files:\n  - split: test\n    path: test-*.parquet\n"
        "- config_name: other\n  data_files:\n  - split: train\n    path: other.parquet\n---\n"
    )
    return folder


def test_a_hub_data_set_is_streamed_with_a_column_map(repository: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    options = ["--config", "main", "--split", "test", "--map", "prompt=question", "--map", "response=answer"]
    printed = good("download", repository, *options, "--out", out)
    assert questions(out) == ["q0", "q1", "q2", "q3"]
    assert "4 rows, 4 of them with an answer" in printed
    assert all("meta" not in row for row in lines_of(out))


def test_a_hub_data_set_in_an_accepted_form_needs_no_map(repository: Path, tmp_path: Path) -> None:
    good("download", repository, "--config", "other", "--out", tmp_path / "out.jsonl")
    assert questions(tmp_path / "out.jsonl") == ["m"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--config", "mian"], "Available: ['main', 'other']"),
        (["--config", "main", "--split", "train"], "Available splits: ['test']"),
        (["--config", "main", "--split", "test", "--map", "prompt=qestion"], "did you mean 'question'?"),
    ],
)
def test_a_config_split_or_column_that_is_not_there_is_told_what_is(
    repository: Path, tmp_path: Path, options: list[str], expected: str
) -> None:
    error = refused("download", repository, *options, "--out", tmp_path / "out.jsonl")
    assert expected in error
    assert "--map" in options or "next: choose from what there is with --config, --split and --map" in error
    assert not (tmp_path / "out.jsonl").exists()


def test_a_named_sets_folder_is_read_as_the_hub_would(repository: Path, tmp_path: Path) -> None:
    good("download", "gsm8k", "--from", repository, "--out", tmp_path / "out.jsonl")
    assert questions(tmp_path / "out.jsonl") == [f"q{i}{STEPS}" for i in range(4)]


def test_without_a_network_the_way_by_local_files_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_dataset(*args: Any, **options: Any) -> None:
        raise ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    error = refused("download", "gsm8k", "--out", tmp_path / "out.jsonl")
    assert "cannot read openai/gsm8k: Couldn't reach" in error
    assert "where: main, test" in error
    assert "deepspec data download NAME --from FILE" in error


def test_a_connection_lost_on_the_way_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rows() -> Iterator[dict[str, str]]:
        yield {"question": "q"}
        raise OSError("connection reset")

    class Broken:
        column_names = None

        def __iter__(self) -> Iterator[dict[str, str]]:
            return rows()

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: Broken())
    out = jsonl(tmp_path / "out.jsonl", {"prompt": "old"})
    assert "cannot read openai/gsm8k after 1 rows: connection reset" in refused(
        "download", "gsm8k", "--out", out
    )
    assert questions(out) == ["old"]
    assert os.listdir(tmp_path) == ["out.jsonl"]


@pytest.mark.parametrize("words", [["gsm8k"], ["OWNER/NAME"]])
def test_without_the_extra_the_command_that_installs_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    error = refused("download", *words, "--out", tmp_path / "out.jsonl")
    assert "'datasets' is not installed" in error and "pip install 'deepspec[data]'" in error


# -- local files -------------------------------------------------------------------------------------------


def csv_file(path: Path, *rows: list[str], delimiter: str = ",") -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    return path


def test_csv_and_jsonl_need_no_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("datasets", "pyarrow", "pandas"):
        monkeypatch.setitem(sys.modules, package, None)
    table = csv_file(tmp_path / "a.csv", ["no", "ask", "say"], ["1", 'a "b",\nc', "x"], ["2", "d", ""])
    lines = jsonl(tmp_path / "b.jsonl", {"no": 3, "ask": "e", "say": None})
    out = tmp_path / "out.jsonl"
    options = ["--id", "no", "--map", "prompt=ask", "--map", "response=say", "--domain", "d"]
    good("download", table, lines, *options, "--out", out)
    assert lines_of(out) == [
        {
            "id": "1",
            "domain": "d",
            "messages": [{"role": "user", "content": 'a "b",\nc'}, {"role": "assistant", "content": "x"}],
        },
        {"id": "2", "domain": "d", "messages": [{"role": "user", "content": "d"}]},
        {"id": "3", "domain": "d", "messages": [{"role": "user", "content": "e"}]},
    ]


def test_a_table_holds_lists_as_json_text(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    log = {"messages": messages[:1]}, {"choices": [{"message": messages[1]}]}
    table = csv_file(
        tmp_path / "a.tsv",
        ["messages", "request", "response"],
        [json.dumps(messages), "", ""],
        ["", json.dumps(log[0]), json.dumps(log[1])],
        delimiter="\t",
    )
    rows = list(open_source(Wanted([str(table)], {})))
    assert [list(row.messages) for row in rows] == [messages, messages]
    broken = csv_file(tmp_path / "b.csv", ["turns"], ['["a", '])
    with pytest.raises(DataError, match="'turns' is malformed JSON") as caught:
        list(open_source(Wanted([str(broken)], {})))
    assert caught.value.where == f"{broken}:2"


@pytest.mark.parametrize(
    ("content", "expected", "line"),
    [
        (b"prompt,id\na,1\nb\n", "1 cells, but the first row names 2 columns", 3),
        (b'prompt,id\n"a\nb",1\nc,2,3\n', "3 cells, but the first row names 2 columns", 4),
        (b'prompt,id\n"a\ncaf\xe9",1\n', "not UTF-8: byte 0xe9 at byte 4 of the line", 3),
        (b'prompt,id\n"a"b,1\n', "malformed CSV: ',' expected after '\"'", 2),
        (b'prompt,id\na,1\n"b,2\nc,3\n', "malformed CSV: unexpected end of data", 3),
        (b"prompt,prompt\na,b\n", "two columns are named 'prompt'", 1),
        (b"prompt,id\n,1\n", "'prompt' is null", 2),
    ],
)
def test_a_bad_csv_row_is_refused_with_the_line_it_starts_on(
    tmp_path: Path, content: bytes, expected: str, line: int
) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(content)
    error = refused("download", path, "--out", tmp_path / "out.jsonl")
    assert expected in error and f"where: {path}:{line}\n" in error


def test_bad_csv_rows_are_skipped_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b'\xef\xbb\xbfprompt,id\r\na,1\r\nb\r\n"x"y,2\r\n\r\nc,4\r\n')
    skipped = Skipped()
    assert [row.id for row in open_source(Wanted([str(path)], {}), skipped)] == ["1", "4"]
    assert [place.split(": ")[0] for place in skipped.places] == [f"{path}:{n}" for n in (3, 4)]


HEAD = "question,answer\nfirst,1\n"


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize(
    ("broken", "lines"),
    [
        ('"Tell me: \\"why\\"\nSecond line of the same cell",Because.\n', "3 to 4"),
        ('"a \\"b\\"\nplain line, with comma\nend",Because.\n', "3 to 5"),
        ('"a \\"b\\"\nend","more \\"c\\"\nstuff"\n', "3 to 5"),
        ('"He said "hi" to me\nand ""left"", twice","ok\nok"\n', "3 to 5"),
        ('"Tell: \\", he, said\nsecond line",Because.\n', "3 to 4"),
        ('"a"b\n\n",x\n', "3 to 5"),
        ('"x"y,2\n', None),
        ('"x"y,"2 ""3"", 4"\n', None),
    ],
)
@pytest.mark.parametrize("delimiter", [",", "\t"])
def test_no_row_is_made_from_the_tail_of_a_broken_one(
    tmp_path: Path, broken: str, lines: str | None, end: str, delimiter: str
) -> None:
    last = 'second,"2\n2"\n"third ""3""",3\n'
    path = tmp_path / ("rows.csv" if delimiter == "," else "rows.tsv")
    path.write_bytes((HEAD + broken + last).replace("\n", end).replace(",", delimiter).encode())
    skipped = Skipped()
    rows = [row for _, row in file_rows(path, skipped)]
    assert [list(row.values()) for row in rows] == [
        ["first", "1"],
        ["second", f"2{end}2"],
        ['third "3"', "3"],
    ]
    assert skipped.count == 1 and skipped.places[0].startswith(f"{path}:3: ")
    assert f"(lines {lines})" in skipped.places[0] if lines else "(lines" not in skipped.places[0]


@pytest.mark.parametrize(
    ("tail", "kept", "lines"),
    [
        ('"b,2\n', [], ""),
        ('"b,2\nc,3\n', [], " (lines 3 to 4)"),  # as likely a cell that was cut as a row
        ('"b,2\nc,3\nd,4\ne,5\n', ["c", "d", "e"], ""),
        ('"b,2\nc,3\n\nd and e\nmore, and more,\n', [], " (lines 3 to 7)"),
    ],
)
def test_a_quote_that_nothing_closes_takes_along_only_what_is_not_plainly_rows(
    tmp_path: Path, tail: str, kept: list[str], lines: str
) -> None:
    path, skipped = tmp_path / "rows.csv", Skipped()
    path.write_text(HEAD + tail)
    assert [row["question"] for _, row in file_rows(path, skipped)] == ["first", *kept]
    assert skipped.places == [f"{path}:3: malformed CSV: unexpected end of data{lines}"]


@given(
    st.lists(st.lists(st.text('a",\n\\ ', max_size=6), min_size=2, max_size=2), max_size=4),
    st.text('a",\n\\ ', max_size=12),
)
def test_any_broken_text_ends_and_well_formed_rows_before_it_are_read(
    rows: list[list[str]], tail: str
) -> None:
    text = io.StringIO(newline="")
    csv.writer(text).writerows([["q", "a"], *rows])
    lines = [(f"f:{i}", line) for i, line in enumerate(io.StringIO(text.getvalue() + tail, newline="\n"), 1)]
    got = [list(row.values()) for _, row in csv_rows(iter(lines), ",", Skipped())]
    assert got[: len(rows)] == [[cell or None for cell in row] for row in rows]


def test_the_keys_that_a_table_fills_with_null_were_never_there(tmp_path: Path) -> None:
    def row(name: str, **arguments: Any) -> dict[str, Any]:
        tool = {"name": name, "parameters": {"properties": {key: {"type": "string"} for key in arguments}}}
        calls = [{"type": "function", "function": {"name": name, "arguments": arguments}}]
        asked = [{"role": "user", "content": name}, {"role": "assistant", "content": "", "tool_calls": calls}]
        return {"messages": asked, "tools": [{"type": "function", "function": tool}]}

    rows = [row("weather", city="Bern"), row("add", a=2, b=[1, None], c={"d": "x"}), row("now")]
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    from_table = list(open_source(Wanted([str(path)], {})))
    assert from_table == [conversation_from_row(row) for row in rows]


def test_nulls_that_were_given_are_kept(tmp_path: Path) -> None:
    arguments, path = {"city": "Bern", "unit": None}, tmp_path / "rows.parquet"
    types = {
        "text": pyarrow.string(),
        "map": pyarrow.map_(pyarrow.string(), pyarrow.string()),
        "json": pyarrow.json_(),
    }
    values = {"text": json.dumps(arguments), "map": list(arguments.items()), "json": json.dumps(arguments)}
    for name, kind in types.items():
        column = pyarrow.array([values[name]], kind.storage_type if name == "json" else kind)
        if name == "json":
            column = pyarrow.ExtensionArray.from_storage(kind, column)
        call = pyarrow.StructArray.from_arrays([pyarrow.array(["f"]), column], ["name", "arguments"])
        pyarrow.parquet.write_table(pyarrow.table({"call": call}), path)
        ((_, row),) = file_rows(path)
        assert row["call"]["arguments"] == (values["text"] if name == "text" else arguments)
    empty = pyarrow.array([[], None], types["map"])
    pyarrow.parquet.write_table(pyarrow.table({"m": empty}), path)
    assert [row for _, row in file_rows(path)] == [{"m": {}}, {"m": None}]


def test_the_hub_fills_no_keys_and_loses_no_null(tmp_path: Path) -> None:
    folder = tmp_path / "OWNER" / "NAME"
    folder.mkdir(parents=True)
    rows = [{"x": [{"a": 1}, {"b": [None, {"c": 2}]}]}, {"x": [{"c": {"d": "e"}}]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "train.parquet")
    assert [row for _, row in hub_rows(str(folder))] == rows
    (folder / "train.parquet").unlink()
    rows = [{"x": [{"a": 1, "b": None}]}, {"x": [{"a": {"c": None}}]}]  # no struct holds both
    jsonl(folder / "train.jsonl", *rows)
    assert [row for _, row in hub_rows(str(folder))] == rows


def test_parquet_is_read_in_batches_with_its_odd_values_as_text(tmp_path: Path) -> None:
    import datetime

    when = datetime.datetime(2026, 1, 2, 3, 4, 5)
    rows = [
        {"id": i, "prompt": f"q{i}", "at": when, "score": float("nan"), "blob": b"ab"} for i in range(600)
    ]
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    got = list(open_source(Wanted([str(path)], {})))
    assert [row.id for row in got] == [str(i) for i in range(600)]
    assert got[599].meta == {"at": "2026-01-02 03:04:05", "score": None, "blob": "<2 bytes>"}
    assert got[599].source == f"{path} row 600"
    only = list(open_source(Wanted([str(path)], {"prompt": "prompt"})))
    assert only[0].meta == {} and only[0].id != "0"
    assert list(next(file_rows(path, columns=["prompt"]))[1]) == ["prompt"]
    assert list(next(file_rows(path, columns=["id.x", "prompt"]))[1]) == ["id", "prompt"]


def test_a_file_that_is_no_parquet_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    path.write_text("nonsense")
    error = refused("download", path, "--out", tmp_path / "out.jsonl")
    assert "cannot read the Parquet file" in error and f"where: {path}" in error


def test_a_pipe_is_read_like_a_file(tmp_path: Path) -> None:
    import threading

    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_text('{"prompt": "a"}\n'))
    writer.start()
    good("download", pipe, "--out", tmp_path / "out.jsonl")
    writer.join()
    assert questions(tmp_path / "out.jsonl") == ["a"]


# -- the command's words -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["gsm8kk"], "no data set 'gsm8kk', did you mean 'gsm8k'?"),
        (["none.jsonl"], "no such file"),
        (["gsm8k", "math500"], "gsm8k cannot be mixed with other sources"),
        (["gsm8k", "--map", "prompt=x"], "gsm8k has fixed columns"),
        (["a.jsonl", "--split", "test"], "--config and --split are for data sets of the Hub"),
        (["a.jsonl", "--from", "b.jsonl"], "--from is only for the local files of a set known by name"),
        (["a.jsonl", "--map", "prompt"], "--map 'prompt' is not FIELD=COLUMN"),
        (["a.jsonl", "--map", "promt=x"], "no field 'promt' to map a column to, did you mean 'prompt'?"),
        (["a.jsonl", "--map", "id=x", "--id", "y"], "--map fills 'id' from both 'x' and 'y'"),
    ],
)
def test_words_that_do_not_fit_together_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "a.jsonl", {"prompt": "a"})
    assert expected in refused("download", *words, "--out", "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_a_map_reaches_into_objects(tmp_path: Path) -> None:
    row = {"input": {"text": "q"}, "a.b": "literal"}
    assert mapped(row, {"prompt": "input.text", "id": "a.b"}, "") == {"prompt": "q", "id": "literal"}
    with pytest.raises(DataError, match=re.escape("no column 'input.txt'; found 'input', 'a.b'")):
        mapped(row, {"prompt": "input.txt"}, "x:1")


def test_skip_bad_goes_on_and_says_what_was_left_out(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "in.jsonl", {"prompt": "a"}, "{", {"prompt": 3}, {"prompt": "b"})
    out = tmp_path / "out.jsonl"
    error = refused("download", path, "--out", out)
    assert f"where: {path}:2" in error and "--skip-bad leaves such rows out" in error
    assert not out.exists()
    result = call("download", path, "--out", out, "--skip-bad")
    assert result.exit_code == 0 and questions(out) == ["a", "b"]
    assert "skipped 2 bad rows:" in result.stderr
    assert f"{path}:3: 'prompt' must be a string, found a number" in result.stderr
    told = json.loads(good("download", path, "--out", out, "--skip-bad", "--json"))
    assert told["skipped"]["count"] == 2 and told["rows"] == told["read"] == 2
    assert told["skipped"]["reasons"]["'prompt' must be a string, found a number"] == 1


def test_a_source_of_bad_rows_only_is_an_error_and_leaves_the_old_file(tmp_path: Path) -> None:
    out = jsonl(tmp_path / "out.jsonl", {"prompt": "old"})
    path = jsonl(tmp_path / "in.jsonl", {"question": "a"}, {"question": "b"})
    error = refused("download", path, "--out", out, "--skip-bad")
    assert "no rows left: all 2 were bad" in error and f"{path}:1" in error and "--map" in error
    assert "there are no rows: the source is empty" in refused(
        "download", jsonl(tmp_path / "e.jsonl"), "--out", out
    )
    assert questions(out) == ["old"]


def test_an_interrupted_download_leaves_the_old_file_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = jsonl(tmp_path / "out.jsonl", {"prompt": "old"})

    def interrupted(*args: Any, **options: Any) -> Iterator[Conversation]:
        yield asked(["new"])[0]
        raise KeyboardInterrupt

    monkeypatch.setattr("deepspec.data.sources.open_source", interrupted)
    result = call("download", out, "--out", out)
    assert result.exit_code == 130 and "nothing was written" in result.stderr
    assert questions(out) == ["old"] and os.listdir(tmp_path) == ["out.jsonl"]


def test_the_next_command_is_named(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"prompt": "a"})
    printed = good("download", path, "--out", tmp_path / "p.jsonl")
    assert f"next: deepspec data split {tmp_path / 'p.jsonl'} --out {tmp_path / 'p'}" in printed
    assert "next: deepspec data split" in good("download", path, "--out", tmp_path / "p")
    printed = good("download", "mbpp", "--from", path, "--out", tmp_path / "mbpp.jsonl")
    assert f"next: deepspec eval --target TARGET --draft DRAFT --prompts {tmp_path / 'mbpp.jsonl'}" in printed


# -- ids and repeats ---------------------------------------------------------------------------------------


def test_an_id_that_comes_twice_is_refused_with_both_places(tmp_path: Path) -> None:
    one = jsonl(tmp_path / "a.jsonl", {"id": "x", "prompt": "a"}, {"id": "y", "prompt": "b"})
    two = jsonl(tmp_path / "b.jsonl", {"id": "z", "prompt": "c"}, {"id": "y", "prompt": "d"})
    out = tmp_path / "out.jsonl"
    error = refused("download", one, two, "--out", out)
    assert f"the id comes twice; first at {one}:2" in error and f"where: {two}:2 (id y)" in error
    result = call("download", one, two, "--out", out, "--skip-bad")
    assert result.exit_code == 0 and questions(out) == ["a", "b", "c"]
    assert "the id comes twice" in result.stderr


def test_a_prompt_without_an_id_that_comes_again_is_kept_under_a_new_one(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", *({"prompt": text} for text in ("What?", "b", "what? ", "What?")))
    out = tmp_path / "out.jsonl"
    assert "rows that repeat an earlier prompt: 2 (kept, each under an id of its own)" in good(
        "download", path, "--out", out
    )
    ids = [row["id"] for row in lines_of(out)]
    assert ids == [ids[0], ids[1], f"{ids[0]}-2", f"{ids[0]}-3"] and len(questions(out)) == 4
    again = tmp_path / "again.jsonl"
    good("download", out, "--out", again)
    assert again.read_bytes() == out.read_bytes()
    assert "2 (dropped)" in good("download", path, "--out", again, "--drop-repeats")
    assert questions(again) == ["What?", "b"]


def test_a_file_with_itself_appended_still_gives_every_row_its_own_id() -> None:
    once = list(UniqueIds().rows(asked(["a", "a", "b"])))
    unique = UniqueIds()
    twice = list(unique.rows([*once, *once]))
    assert unique.repeats == 4
    assert twice[:3] == once
    assert len({row.id for row in twice}) == 6


def test_a_number_that_is_taken_already_is_passed_over() -> None:
    plain = asked(["a", "a", "a"])
    third = replace(plain[0], id=f"{plain[0].id}-3")
    names = [row.id.removeprefix(plain[0].id) for row in UniqueIds().rows([third, *plain])]
    assert names == ["-3", "", "-4", "-5"]


@given(st.lists(st.sampled_from("abc"), max_size=12), st.booleans())
def test_ids_are_unique_and_nothing_is_lost(texts: list[str], drop: bool) -> None:
    unique = UniqueIds(drop_repeats=drop)
    got = list(unique.rows(asked(texts)))
    assert len({row.id for row in got}) == len(got)
    assert unique.repeats == len(texts) - len(set(texts))
    assert [row.messages[0]["content"] for row in got] == (list(dict.fromkeys(texts)) if drop else texts)


# -- cutting -----------------------------------------------------------------------------------------------


def chosen(names: list[str], limit: int, seed: int) -> list[str]:
    rows = [Conversation(name, None, ({"role": "user", "content": "q"},)) for name in names]
    return [row.id for row in cut(rows, limit, seed)]


def test_a_cut_depends_on_the_ids_alone_and_grows_by_adding() -> None:
    names = [f"row{i}" for i in range(50)]
    ten = chosen(names, 10, 3)
    assert ten == chosen(names[::-1], 10, 3) != chosen(names, 10, 4)
    assert chosen(names, 20, 3)[:10] == ten
    assert len(set(ten)) == 10 and set(ten) < set(names)


def test_a_cut_never_changes_between_releases() -> None:
    assert chosen([f"row{i}" for i in range(1000)], 4, 0) == ["row582", "row90", "row360", "row514"]


@pytest.mark.parametrize("limit", [5, 6])
def test_what_need_not_be_cut_keeps_its_order(limit: int) -> None:
    names = [f"row{i}" for i in range(5)]
    assert chosen(names, limit, 0) == names


def test_every_row_is_chosen_equally_often() -> None:
    names = [f"row{i}" for i in range(10)]
    counts = dict.fromkeys(names, 0)
    for seed in range(300):
        for name in chosen(names, 3, seed):
            counts[name] += 1
    assert all(60 < count < 120 for count in counts.values())  # 90 ± 3.8 standard deviations


def test_a_cut_keeps_every_field() -> None:
    text = "é\u2028"
    rows = [Conversation(f"r{i}", "d", ({"role": "user", "content": text},), {"k": [i]}) for i in range(3)]
    got = sorted(cut(rows, 2, 0), key=lambda row: row.id)
    assert len(got) == 2 and all(row in rows for row in got)


# -- memory, and the published files -----------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0, 5])
def test_memory_stays_flat_whatever_the_file(tmp_path: Path, limit: int) -> None:
    path = tmp_path / "big.jsonl"
    with path.open("w") as file:
        for i in range(100):
            file.write(json.dumps({"prompt": f"{i} " + "x" * 100_000}) + "\n")
    assert path.stat().st_size > 10e6
    tracemalloc.start()
    done = download(open_source(Wanted([str(path)], {})), tmp_path / "out.jsonl", limit=limit)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert done.rows == (limit or 100)
    assert peak < 4e6


@pytest.mark.parametrize("name", ["gsm8k", "math500", "aime25", "humaneval", "mbpp", "mt-bench"])
def test_the_published_prompts_go_through_unchanged(tmp_path: Path, name: str) -> None:
    source = shared(EVAL / f"{name}.jsonl")
    turns = [row["turns"] for row in lines_of(source)]
    out, folder = tmp_path / "out.jsonl", tmp_path / "sets"
    good("download", source, "--out", out)
    rows = list(read_conversations(out))
    assert [[row.messages[0]["content"], *row.meta.get("follow_ups", [])] for row in rows] == turns
    assert len({row.id for row in rows}) == len(turns)
    told = json.loads(good("split", out, "--out", folder, "--test", "0.2", "--select", "0.1", "--json"))
    assert sum(told["rows"].values()) == len(turns)
    back = {line for file in folder.iterdir() for line in file.read_bytes().splitlines()}
    assert back == set(out.read_bytes().splitlines())
