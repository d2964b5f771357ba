"""Sets known by name: what is asked of the Hub, how prompts are worded, and the page that lists them."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from deepspec.data.catalogue import DATASETS, worded
from rowfiles import EVAL, SHARED, good, jsonl, lines_of, questions, refused, shared

PAGE = Path(__file__).parent.parent / "docs" / "data.md"
STEPS = "\nPlease reason step by step, and put your final answer within \\boxed{}."
PYTHON_TASK = "Write a solution to the following problem and make sure that it passes the tests:\n"
CALLS: dict[str, tuple[tuple[Any, ...], str, dict[str, Any], dict[str, Any]]] = {
    # name -> arguments, split, a row as the Hub has it, fields of our row
    "open-perfectblend": (
        ("mlabonne/open-perfectblend", None),
        "train",
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "source": "s"},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    ),
    "gsm8k": (
        ("openai/gsm8k", "main"),
        "test",
        {"question": "q {x}", "answer": "a"},
        {"prompt": f"q {{x}}{STEPS}"},
    ),
    "math500": (
        ("HuggingFaceH4/MATH-500", None),
        "test",
        {"problem": "p", "solution": "s", "level": 3},
        {"prompt": f"p{STEPS}"},
    ),
    "aime25": (
        ("MathArena/aime_2025", None),
        "train",
        {"problem_idx": 1, "problem": "p", "answer": 70},
        {"prompt": f"p{STEPS}"},
    ),
    "humaneval": (
        ("openai/openai_humaneval", None),
        "test",
        {"task_id": "t", "prompt": "def f():\n", "test": "t"},
        {"prompt": f"{PYTHON_TASK}```python\ndef f():\n\n```"},
    ),
    "mbpp": (
        ("google-research-datasets/mbpp", "sanitized"),
        "test",
        {"task_id": 11, "prompt": "Write f.", "code": "c"},
        {"prompt": "Write f."},
    ),
    "mt-bench": (
        ("HuggingFaceH4/mt_bench_prompts", None),
        "train",
        {"category": "c", "prompt": ["first", "second"]},
        {"prompt": "first", "meta": {"follow_ups": ["second"]}},
    ),
    "alpaca": (
        ("tatsu-lab/alpaca", None),
        "train",
        {"instruction": "i", "input": "x", "output": "o"},
        {"prompt": "i\n\nInput:\nx"},
    ),
    "arena-hard-v2": (
        ("json", ["hf://datasets/lmarena-ai/arena-hard-auto/data/arena-hard-v2.0/question.jsonl"]),
        "train",
        {"uid": "u", "category": "hard_prompt", "prompt": "p"},
        {"prompt": "p"},
    ),
    "livecodebench": (
        (
            "json",
            [
                f"hf://datasets/livecodebench/code_generation_lite/{name}.jsonl"
                for name in ("test", "test2", "test3", "test4", "test5", "test6")
            ],
        ),
        "train",
        {"question_title": "t", "question_content": "q", "starter_code": "", "private_test_cases": "x"},
        {},
    ),
}


COLUMNS = {
    "open-perfectblend": ("conversations",),
    "gsm8k": ("question",),
    "math500": ("problem",),
    "aime25": ("problem",),
    "humaneval": ("prompt",),
    "mbpp": ("prompt",),
    "livecodebench": ("question_content", "starter_code"),
    "mt-bench": ("prompt",),
    "alpaca": ("instruction", "input"),
    "arena-hard-v2": ("prompt",),
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Stands for the Hub: call it with the rows to give; it returns the list of the calls to come."""

    def serve(*rows: dict[str, Any]) -> list[Any]:
        calls: list[Any] = []

        def load_dataset(*args: Any, **options: Any) -> Any:
            calls.append((args, options))
            return datasets.Dataset.from_list(list(rows)).to_iterable_dataset()

        select = datasets.IterableDataset.select_columns

        def select_columns(data: Any, columns: list[str]) -> Any:
            calls.append(columns)
            return select(data, columns)

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        monkeypatch.setattr(datasets.IterableDataset, "select_columns", select_columns)
        return calls

    return serve


@pytest.mark.parametrize("name", sorted(DATASETS))
def test_a_named_set_asks_the_hub_for_exactly_its_config_split_and_columns(
    tmp_path: Path, hub: Callable[..., list[Any]], name: str
) -> None:
    arguments, split, row, fields = CALLS[name]
    calls = hub(row)
    out = tmp_path / "out.jsonl"
    good("download", name, "--out", out)
    options = {"split": split, "streaming": True}
    if arguments[0] == "json":
        arguments, options = ("json",), {"data_files": arguments[1], **options}
    assert calls == [(arguments, options), list(COLUMNS[name])]
    (made,) = lines_of(out)
    if "prompt" in fields:
        fields = {**fields, "messages": [{"role": "user", "content": fields["prompt"]}]}
        del fields["prompt"]
    del made["id"]
    expected = dict(fields) if fields else {"messages": made["messages"]}
    if DATASETS[name].rows:
        expected["domain"] = name
    assert made == expected


def test_wording_by_what_a_row_holds() -> None:
    def prompt(name: str, **row: Any) -> str:
        return str(worded(DATASETS[name], row, "x")["prompt"])

    assert prompt("alpaca", instruction="i", input="") == "i"
    assert prompt("alpaca", instruction="i", input="x") == "i\n\nInput:\nx"
    started = prompt("livecodebench", question_content="Sum {a}.", starter_code="class S:\n  pass")
    assert "### Question:\nSum {a}.\n\n### Format: " in started
    assert started.endswith("```python\nclass S:\n  pass\n```\n\n### Answer:\n")
    assert started.startswith("You are an expert Python programmer.")
    bare = prompt("livecodebench", question_content="Sum.", starter_code="")
    assert bare.endswith("```python\n# your code here\n```\n\n### Answer:\n")
    assert "standard input" in bare and "standard input" not in started


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("gsm8k", rf"(?P<question>.+){re.escape(STEPS)}"),
        ("math500", rf"(?P<problem>.+){re.escape(STEPS)}"),
        ("aime25", rf"(?P<problem>.+){re.escape(STEPS)}"),
        ("humaneval", rf"{re.escape(PYTHON_TASK)}```python\n(?P<prompt>.+)\n```"),
        ("mbpp", "(?P<prompt>.+)"),
    ],
)
def test_the_wording_is_that_of_the_published_prompts(name: str, pattern: str) -> None:
    for row in lines_of(shared(EVAL / f"{name}.jsonl")):
        (text,) = row["turns"]
        found = re.fullmatch(pattern, text, re.DOTALL)
        assert found, text
        assert worded(DATASETS[name], found.groupdict(), "x") == {"prompt": text}


def test_mt_bench_gives_the_published_turns() -> None:
    for row in lines_of(shared(EVAL / "mt-bench.jsonl")):
        assert worded(DATASETS["mt-bench"], {"prompt": row["turns"]}, "x") == row


def test_the_table_is_that_of_the_published_protocol() -> None:
    text = shared(SHARED / "benchmarks.md").read_text("utf-8")
    cells = [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    found = {row[0]: (row[1].split(" ")[0], row[2], row[4]) for row in cells[2:]}
    special = {"livecodebench": "test.jsonl … test6.jsonl", "arena-hard-v2": "–"}
    assert found == {
        name: (source.repo, special.get(name, source.place), str(source.rows))
        for name, source in DATASETS.items()
        if source.rows
    }
    assert f"({DATASETS['open-perfectblend'].repo}, 5% held out)" in text


def test_the_page_and_the_help_name_every_set() -> None:
    heads = "| name | Hub id | config and split, or files | columns | rows |\n|---|---|---|---|---|"
    rows = [
        f"| `{name}` | {s.repo} | {s.place} | {', '.join(f'`{c}`' for c in s.columns)} | {s.rows or 'all'} |"
        for name, s in DATASETS.items()
    ]
    begin, end = "<!-- named sources: begin -->\n", "<!-- named sources: end -->"
    page = PAGE.read_text("utf-8")
    before, rest = page.split(begin)
    after = rest.split(end)[1]
    expected = f"{before}{begin}{heads}\n" + "\n".join(rows) + f"\n{end}{after}"
    if os.environ.get("DEEPSPEC_WRITE_DOCS") == "1":
        PAGE.write_text(expected, "utf-8")
    assert PAGE.read_text("utf-8") == expected, "docs/data.md is not what the code says: run `make docs`"
    words = set(re.split(r"[^\w-]+", good("download", "--help")))
    assert set(DATASETS) <= words


def test_a_copy_of_a_named_set_is_worded_without_any_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    copy = jsonl(tmp_path / "test.jsonl", {"question": "q", "answer": "a"})
    out = tmp_path / "gsm8k.jsonl"
    good("download", "gsm8k", "--from", copy, "--out", out)
    assert questions(out) == [f"q{STEPS}"]
    error = refused("download", "math500", "--from", copy, "--out", out)
    assert "no column 'problem'; found 'question', 'answer'" in error
    assert f"where: {copy}:1" in error and "HuggingFaceH4/MATH-500 (test)" in error


def test_a_folder_copy_of_a_set_of_files_is_read_file_by_file(tmp_path: Path) -> None:
    (tmp_path / "data" / "arena-hard-v2.0").mkdir(parents=True)
    jsonl(tmp_path / "data/arena-hard-v2.0/question.jsonl", {"uid": "u", "prompt": "p"})
    good("download", "arena-hard-v2", "--from", tmp_path, "--out", tmp_path / "out.jsonl")
    assert questions(tmp_path / "out.jsonl") == ["p"]


def test_a_benchmark_is_cut_to_its_published_number_and_zero_takes_all(
    tmp_path: Path, hub: Callable[..., list[Any]]
) -> None:
    hub(*({"problem": f"problem {i}"} for i in range(40)))
    out = tmp_path / "out.jsonl"
    assert "30 rows of 40, chosen by seed 0" in good("download", "aime25", "--out", out)
    chosen = questions(out)
    good("download", "aime25", "--out", out, "--seed", 1)
    assert len(chosen) == 30 and set(chosen) != set(questions(out))
    good("download", "aime25", "--out", out, "--limit", 0)
    assert questions(out) == [f"problem {i}{STEPS}" for i in range(40)]
