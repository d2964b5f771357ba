"""`deepspec data inspect`: what it adds up, what it shows, and what it says of rows that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from deepspec.cli import app
from deepspec.cli.data_inspect import coloured_row
from deepspec.data.conversations import Conversation
from deepspec.data.inspect import Piece, distribution, find_row, pieces
from deepspec.data.tokens import Encoded
from deepspec.errors import DataError
from deepspec.targets import TargetSpec

EVAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "eval"


def call(*words: Any) -> Any:
    return CliRunner().invoke(app, ["data", "inspect", *map(str, words)])


def good(*words: Any) -> str:
    result = call(*words)
    assert result.exit_code == 0, result.output
    return result.stdout


def row(name: str, *contents: str, **facts: Any) -> dict[str, Any]:
    roles = ("user", "assistant") * len(contents)
    messages = [{"role": r, "content": text} for r, text in zip(roles, contents, strict=False)]
    return {"id": name, "messages": messages, **facts}


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def length(text: str) -> int:
    tokenizer = TargetSpec.from_pretrained("pocket").tokenizer()
    assert tokenizer is not None
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


PROMPT = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(
        tmp_path / "rows.jsonl",
        row("a", "2+2?", "4", domain="math", thinking=True),
        row("b", " 2+2? ", "4", "and 3+3?", "The answer is 6.", domain="math"),
        row("c", "Say yes.", domain="chat", follow_ups=["Say no."]),
        row("c", "2+2?", "4", "more?"),
    )


# -- totals ------------------------------------------------------------------------------------------------


def test_totals_are_exact(file: Path) -> None:
    found = json.loads(good(file, "--json"))
    asked, four = length(PROMPT), length("4") + 1
    spaced = length(PROMPT.replace("2+2?", " 2+2? "))
    long = length("The answer is 6.") + 1
    history = PROMPT.replace("2+2?", " 2+2? ").replace("<think>\n\n</think>\n\n", "4<|im_end|>\n")
    last = length(history) + length(PROMPT.replace("2+2?", "and 3+3?"))
    tokens = [asked + four, spaced + four, last + long, asked + four]
    expected = {
        "file": str(file),
        "target": "pocket",
        "rows": 4,
        "answered": 3,
        "prompts": 1,
        "prompt_tokens": length(PROMPT.replace("2+2?", "Say yes.")),
        "sequences": 4,
        "tokens": sum(tokens),
        "supervised_tokens": 3 * four + long,
        "repeated_prompts": 1,
        "repeated_ids": 1,
        "empty": 0,
        "follow_ups": 1,
        "other_mode": 1,
        "refused": 0,
        "problems": [],
        "cut": {"sequences": 0, "tokens": 0, "supervised_tokens": 0, "without_answer": 0},
    }
    assert {key: found[key] for key in expected} == expected
    assert found["supervised_share"] == pytest.approx((3 * four + long) / sum(tokens))
    assert found["lengths"]["count"] == 4 and found["lengths"]["max"] == max(tokens)
    assert found["prompt_lengths"]["count"] == 1
    assert list(found["domains"]) == ["(none)", "chat", "math"]
    assert found["domains"]["math"] | {"tokens": 0} == {
        **{"rows": 2, "sequences": 3, "supervised_tokens": 2 * four + long, "tokens": 0},
        **{"prompts": 0, "prompt_tokens": 0},
    }


def test_several_files_are_read_as_one(tmp_path: Path) -> None:
    one, two = (
        write(tmp_path / "a.jsonl", row("a", "q", "1")),
        write(tmp_path / "b.jsonl", row("b", "q", "2")),
    )
    found = json.loads(good(one, two, "--json"))
    assert (found["rows"], found["repeated_prompts"], found["file"]) == (2, 1, f"{one}, {two}")
    assert json.loads(good(one, two, "--json", "--row", 2))["id"] == "b"


def test_an_empty_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl")
    for option in ([], ["--json"]):
        result = call(path, *option)
        assert (result.exit_code, result.stdout) == (2, "")
        assert "there are no rows: the source is empty" in result.stderr and str(path) in result.stderr
    write(path, {"x": 1})
    result = call(path, "--skip-bad")
    assert result.exit_code == 2 and "no rows left: all 1 were bad" in result.stderr


def test_cut_says_what_a_length_takes_away(file: Path) -> None:
    asked, four = length(PROMPT), length("4") + 1
    found = json.loads(good(file, "--json", "--limit", 1, "--max-length", asked + 1))
    assert found["cut"] == {
        "sequences": 1,
        "tokens": four - 1,
        "supervised_tokens": four - 1,
        "without_answer": 0,
    }
    found = json.loads(good(file, "--json", "--limit", 1, "--max-length", asked))
    assert found["cut"] == {"sequences": 1, "tokens": four, "supervised_tokens": four, "without_answer": 1}


def test_percentiles_are_lengths_that_occur_and_the_histogram_holds_every_one() -> None:
    found = distribution([1, 2, 3, 4, 8, 100])
    assert found is not None
    assert [found[k] for k in ("min", "p50", "p90", "p99", "max", "count")] == [1, 3, 100, 100, 100, 6]
    assert [(h["from"], h["to"], h["count"]) for h in found["histogram"]] == [
        *((1, 1, 1), (2, 3, 2), (4, 7, 1), (8, 15, 1), (16, 31, 0), (32, 63, 0), (64, 127, 1)),
    ]
    assert distribution([]) is None


def test_rows_that_cannot_be_used_are_listed_with_their_lines_and_the_exit_code_says_so(
    tmp_path: Path,
) -> None:
    thought = row("d", "2+2?", "4")
    thought["messages"][1]["reasoning_content"] = "2 and 2"
    path = write(tmp_path / "rows.jsonl", row("a", "2+2?", "4"), row("b", "2+2?", ""), thought)
    result = call(path, "--json")
    assert result.exit_code == 2
    found = json.loads(result.stdout)
    assert (found["rows"], found["answered"], found["refused"], found["empty"]) == (3, 1, 2, 1)
    assert [p["where"] for p in found["problems"]] == [f"{path}:2 (id b)", f"{path}:3 (id d)"]
    assert "empty answer in message 2" in found["problems"][0]["what"]
    shown = call(path)
    assert shown.exit_code == 2 and f"{path}:3 (id d): message 2 (assistant)" in shown.stdout
    assert "training would stop at the first of 2 rows" in shown.stderr


def test_broken_line_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", row("a", "2+2?", "4"))
    with path.open("a") as stream:
        stream.write("{\n")
    result = call(path)
    assert result.exit_code == 2 and f"where: {path}:2" in result.stderr


# -- a row -------------------------------------------------------------------------------------------------


def test_piped_row_shows_supervised_text_in_brackets_and_where_it_is_cut(file: Path) -> None:
    shown = good(file, "--row", "a")
    assert PROMPT + "⟦4<|im_end|>⟧" in shown
    asked = length(PROMPT)
    assert PROMPT + f"⟦4✂{asked + 1}✂<|im_end|>⟧" in good(file, "--row", "1", "--max-length", asked + 1)


def test_row_is_found_by_id_before_number_and_shows_every_sequence(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", row("2", "q", "one"), row("b", "q", "two", "r", "three"))
    assert "⟦one<|im_end|>⟧" in good(path, "--row", 2)
    shown = good(path, "--row", "b")
    assert "b#1 " in shown and "⟦two<|im_end|>⟧" in shown and "⟦three<|im_end|>⟧" in shown
    result = call(path, "--row", "3")
    assert result.exit_code == 2 and "no row '3' among 2 rows" in result.stderr


def test_row_as_json_has_ids_mask_and_pieces(file: Path) -> None:
    found = json.loads(good(file, "--row", "a", "--json"))
    (sequence,) = found["sequences"]
    assert (found["id"], found["where"], sequence["id"]) == ("a", f"{file}:1", "a")
    assert len(sequence["ids"]) == len(sequence["loss_mask"])
    supervised = [piece for piece in sequence["pieces"] if piece["supervised"]]
    assert [(piece["text"], piece["added"]) for piece in supervised] == [("4", False), ("<|im_end|>", True)]
    assert "".join(piece["text"] for piece in sequence["pieces"]) == PROMPT + "4<|im_end|>"


def test_unanswered_row_shows_its_prompt(file: Path) -> None:
    shown = good(file, "--row", 3)
    assert PROMPT.replace("2+2?", "Say yes.") in shown and "⟦" not in shown


def test_colour_needs_no_brackets_and_long_context_is_shortened() -> None:
    found = [
        Piece("ab" * 50, False, False, True),
        Piece("yes", True, False, True),
        Piece("no", True, False, False),
    ]
    text = coloured_row(found, 7, colour=True, short=10)
    assert text.plain == "ababa [… 90 characters …] babab" + "yes✂7✂no"
    assert [str(span.style) for span in text.spans] == ["dim", "green", "red", "green strike"]
    assert coloured_row(found[1:], 7, colour=False).plain == "⟦yes✂7✂no⟧"


def test_pieces_split_at_mask_at_own_tokens_and_at_the_cut() -> None:
    tokenizer = TargetSpec.from_pretrained("pocket").tokenizer()
    assert tokenizer is not None
    ids = tokenizer("one two<|im_end|>", add_special_tokens=False)["input_ids"]
    found = pieces(tokenizer, Encoded(ids, [0] + [1] * (len(ids) - 1), "a"), len(ids) - 1)
    assert found[-1] == Piece("<|im_end|>", True, True, False)
    assert [p.supervised for p in found] == [False, True, True]


def test_find_row_reads_no_further_than_it_must() -> None:
    def rows() -> Any:
        yield Conversation("a", None, ())
        raise DataError("read too far")

    assert find_row(rows(), "a").id == "a"


# -- prompts only ------------------------------------------------------------------------------------------


def test_packaged_prompts_give_prompt_lengths_by_domain() -> None:
    found = json.loads(good("pocket:test", "--json"))
    assert (found["rows"], found["prompts"], found["sequences"]) == (120, 120, 0)
    assert {name: part["prompts"] for name, part in found["domains"].items()} == {
        "chat": 40,
        "code": 40,
        "math": 40,
    }
    shown = good("pocket:test", "--limit", 3)
    assert "rows                          3  (0 answered, 3 prompts only)" in shown
    assert "length of unanswered prompts in tokens" in shown and "supervised tokens" not in shown


@pytest.mark.skipif(not EVAL.exists(), reason="the optional folder of evaluation prompts is not here")
def test_published_evaluation_prompts_go_through() -> None:
    for path in sorted(EVAL.glob("*.jsonl")):
        some = 1000 if path.stem == "mbpp" else 50
        found = json.loads(good(path, "--json", "--max-length", 4096, "--limit", some))
        assert found["rows"] == found["prompts"] == min(some, path.read_bytes().count(b"\n"))
        assert found["refused"] == found["cut"]["without_answer"] == 0
        assert found["repeated_prompts"] == (path.stem == "mbpp")  # it does hold one question twice
