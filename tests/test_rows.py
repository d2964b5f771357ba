"""Training rows in flat arrays: the same sequences back, counted without lists, and read from files."""

from __future__ import annotations

import json
import tracemalloc
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from deepspec.cli import app
from deepspec.config import load_recipe
from deepspec.data import rows as module
from deepspec.data.conversations import Conversation, content_hash, read_conversations
from deepspec.data.rows import Rows, distinct, frequent_ids, pack, supervised_counts
from deepspec.data.tokens import Encoded
from deepspec.errors import DataError
from deepspec.features.batches import batches_from, load_rows
from deepspec.targets import Target
from deepspec.train import facts as workflow
from talking import recipe_tree, save_talking_llama, write_data, write_recipe


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return Target.from_pretrained(save_talking_llama(tmp_path_factory.mktemp("rows")), "float32", "cpu")


def test_rows_are_cut_where_the_targets_context_ends(
    target: Target, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "long.jsonl"
    messages = [{"role": "user", "content": "say"}, {"role": "assistant", "content": "word " * 200}]
    path.write_text(json.dumps({"messages": messages}) + "\n", "utf-8")
    (row,) = load_rows(path, target, thinking=False, max_length=2048)
    assert len(row.ids) == target.max_length == 512
    assert "rows are cut at 512 tokens and not at 2048" in " ".join(capsys.readouterr().err.split())


TOKENS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 1)), min_size=1, max_size=6)


@given(st.lists(TOKENS, max_size=5))
def test_packed_rows_are_the_rows(given_rows: list[list[tuple[int, int]]]) -> None:
    plain = [Encoded([t for t, _ in r], [m for _, m in r], f"r{i}") for i, r in enumerate(given_rows)]
    packed = pack(iter(plain))
    assert list(packed) == plain and len(packed) == len(plain)
    assert packed[1:4] == plain[1:4] and packed[::-1] == plain[::-1]
    assert [packed[-1 - i] for i in range(len(plain))] == plain[::-1]
    assert packed.offsets.diff().tolist() == [len(r.ids) for r in plain]
    assert pack(packed) is packed
    counted = Counter(t for r in given_rows for t, produced in r if produced)
    assert supervised_counts(packed, 10).tolist() == [counted[i] for i in range(10)]
    assert supervised_counts(packed, 10).equal(supervised_counts(plain, 10))


def test_index_past_the_end_is_an_error_not_another_row() -> None:
    packed = pack([Encoded([1, 2], [0, 1], "a")])
    for index in (1, -2):
        with pytest.raises(IndexError):
            packed[index]


def test_counting_goes_in_parts_and_misses_none(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = pack([Encoded([i % 3 for i in range(10)], [1] * 10, "a")])
    monkeypatch.setattr(module, "COUNTED", 4)
    assert supervised_counts(packed, 4).tolist() == [4, 3, 3, 0]


def test_frequent_ids_ignore_context_and_ties_go_to_the_lower_id() -> None:
    row = Encoded([5, 5, 7, 9, 9, 2], [0, 1, 1, 1, 1, 0], "r")
    for rows in ([row], pack([row])):
        assert frequent_ids(rows, 3, [], 12) == [5, 7, 9]
        assert frequent_ids(rows, 3, [11, 99], 12) == [5, 9, 11]


def test_five_bytes_a_token() -> None:
    tracemalloc.start()
    packed = pack(Encoded([1000] * 100, [1] * 100, "a") for _ in range(10_000))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert packed.ids.dtype == torch.int32 and packed.loss_mask.dtype == torch.uint8
    assert packed.ids.numel() == packed.loss_mask.numel() == 1_000_000
    # Lists would take 16 bytes a token; arrays take 5, some more while they grow, and each row its offset.
    assert peak < 7_000_000


def test_batches_of_packed_rows_are_those_of_the_list() -> None:
    plain = [Encoded([1] * (3 + i % 7), [1] * (3 + i % 7), f"r{i}") for i in range(23)]
    one, other = batches_from(plain, 4, 3, 0), batches_from(pack(plain), 4, 3, 0)
    assert [next(one) for _ in range(9)] == [next(other) for _ in range(9)]


def test_names_that_come_twice_are_numbered_and_never_meet_a_name_of_the_file() -> None:
    seen: Counter[str] = Counter()
    assert [distinct(name, seen) for name in ["a", "a~2", "a", "a", "b", "a~2"]] == [
        *("a", "a~2", "a~3", "a~4", "b", "a~2~2"),
    ]


# -- from a file -------------------------------------------------------------------------------------------


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def row(name: str, *contents: str) -> dict[str, Any]:
    roles = ("user", "assistant") * len(contents)
    messages = [{"role": r, "content": text} for r, text in zip(roles, contents, strict=False)]
    return {"id": name, "messages": messages}


def test_every_turn_of_a_file_becomes_a_row_with_an_id_of_its_own(target: Target, tmp_path: Path) -> None:
    path = write(
        tmp_path / "rows.jsonl", row("a", "q", "one", "r", "two"), row("b", "q", "x"), row("b", "q", "y")
    )
    found = load_rows(path, target, thinking=False, max_length=200)
    assert isinstance(found, Rows)
    assert found.names == ["a#1", "a", "b", "b~2"]
    assert [sum(r.loss_mask) for r in found] == [4, 4, 2, 2]


def test_overlong_rows_are_left_out_and_said(
    target: Target, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "rows.jsonl", row("a", "q", "one"), row("b", "q" * 300, "one"), row("c", "q", ""))
    with pytest.raises(DataError, match="empty answer"):
        load_rows(path, target, thinking=False, max_length=100)
    write(path, row("a", "q", "one"), row("b", "q" * 300, "one"))
    assert load_rows(path, target, thinking=False, max_length=100).names == ["a"]
    said = " ".join(capsys.readouterr().err.split())
    assert "1 conversations are left out: their prompts alone take data.max_length, 100 tokens" in said
    assert f"{path}:2 (id b)" in said
    write(path, row("b", "q" * 300, "one"))
    with pytest.raises(DataError, match="truncated before the answer"):
        load_rows(path, target, thinking=False, max_length=100)


def test_provenance_streams_and_says_what_rows_share(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_data(tmp_path)
    recipe = load_recipe(write_recipe(tmp_path / "r.yaml", recipe_tree(tmp_path, tmp_path, "dflash")), [])
    facts = [{"sampling": {"t": 1}, "thinking": False}, {"sampling": {"t": 1}, "thinking": True}]
    path = write(tmp_path / "rows.jsonl", *(row(f"r{i}", "q", "one") | facts[i] for i in range(2)))
    whole = content_hash(list(read_conversations(path)))
    alive: list[weakref.ref[Conversation]] = []

    def watched(source: Path, **options: Any) -> Iterator[Conversation]:
        for found in read_conversations(source, **options):
            alive.append(weakref.ref(found))
            yield found
            del found
            assert sum(reference() is not None for reference in alive) <= 2, "rows pile up"

    monkeypatch.setattr(workflow, "read_conversations", watched)
    found = workflow.provenance(recipe, target, workflow.data_facts(path))
    assert (found["data_rows"], found["data_hash"]) == (2, whole)
    assert (found["sampling"], found["data"]["thinking"], found["system_prompt"]) == (
        {"t": 1},
        "several",
        None,
    )


def test_bad_rows_end_no_training_that_was_told_to_leave_them_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One broken line, one row out of order and one empty answer, each between good rows: training stops at
    the first, or trains on the others, and a cache holds the same rows."""
    write_data(tmp_path)
    answers = tmp_path / "answers.jsonl"
    good = answers.read_text("utf-8").splitlines()
    bad = [
        "{",
        json.dumps({"id": "order", "messages": [{"role": "assistant", "content": "first"}]}),
        json.dumps({"id": "empty", "prompt": "one?", "response": ""}),
    ]
    mixed = [line for pair in zip(bad, good[:3], strict=True) for line in pair] + good[3:]
    model = save_talking_llama(tmp_path / "target")
    target = Target.from_pretrained(model, "float32", "cpu")
    options = {"thinking": False, "max_length": 512}
    wanted = list(load_rows(answers, target, **options))
    answers.write_text("\n".join(mixed) + "\n", "utf-8")
    with pytest.raises(DataError, match="malformed JSON"):
        load_rows(answers, target, **options)
    capsys.readouterr()
    assert list(load_rows(answers, target, **options, skip_bad=True)) == wanted
    said = " ".join(capsys.readouterr().err.split())
    assert "skipped 3 bad rows" in said and "answers.jsonl:1" in said and "empty answer" in said
    write_recipe(tmp_path / "r.yaml", recipe_tree(model, tmp_path, "dflash", max_steps=1))
    stopped = CliRunner().invoke(app, ["train", f"{tmp_path}/r.yaml", "--runs", f"{tmp_path}/runs"])
    assert stopped.exit_code == 2 and "malformed JSON" in stopped.stderr
    words = [f"{tmp_path}/r.yaml", "data.skip_bad=true"]
    cached = CliRunner().invoke(app, ["data", "cache", *words, "--out", f"{tmp_path}/cache"])
    assert cached.exit_code == 0, cached.output
    for features in ("online", f"cache:{tmp_path}/cache"):
        trained = [*words, f"data.features={features}", "--runs", f"{tmp_path}/runs", "--fresh"]
        result = CliRunner().invoke(app, ["train", *trained])
        assert result.exit_code == 0, result.output
