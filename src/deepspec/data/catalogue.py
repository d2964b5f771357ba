"""Data sets known by name: where the Hub keeps their rows, which columns matter, how a prompt is worded.

There is one row per data set, and `data.sources` reads them all. The nine benchmarks are worded as in the
published measurements of speculative drafts, so that acceptance can be compared; LiveCodeBench's instructions
are in our own words, in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from string import Formatter
from typing import Any

from deepspec.errors import DataError

STEPS = "\nPlease reason step by step, and put your final answer within \\boxed{{}}."

_CODE_TASK = (
    "You are an expert Python programmer. Read the problem below and write a correct Python program that "
    "does what it asks and passes every test.\n\n### Question:\n{question_content}\n\n### Format: "
)
_STARTER_CODE = (
    "Complete the starter code below, and give the whole program between the same fences.\n"
    "```python\n{starter_code}\n```\n\n### Answer:\n"
)
_PLACEHOLDER = (
    "Read the input from standard input and print the answer to standard output. Give the whole program "
    "between fences like these.\n```python\n# your code here\n```\n\n### Answer:\n"
)


@dataclass(frozen=True)
class NamedDataset:
    """A data set on the Hub and how its columns become a prompt.

    `files`: JSONL files of the repository, read in this order instead of a config and a split. `rows`: how
    many the published protocol uses; a seed chooses them from a larger set. `fields`: field of our row ->
    column. `wordings`: (column, template) pairs; the first one whose column holds text is used, and an empty
    column name always matches. Templates name columns in braces.
    """

    repo: str
    use: str
    config: str | None = None
    split: str = "train"
    files: tuple[str, ...] = ()
    rows: int | None = None
    fields: Mapping[str, str] = field(default_factory=dict)
    wordings: tuple[tuple[str, str], ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """Every column that is read, each once."""
        named = [column for column, _ in self.wordings if column]
        used = [name for _, text in self.wordings for _, name, _, _ in Formatter().parse(text) if name]
        return tuple(dict.fromkeys((*self.fields.values(), *used, *named)))

    @property
    def place(self) -> str:
        """Config and split, or the files, as the documentation and error messages name them."""
        return ", ".join(self.files or filter(None, (self.config, self.split)))


def _prompt(text: str) -> tuple[tuple[str, str], ...]:
    return (("", text),)


DATASETS: dict[str, NamedDataset] = {
    "open-perfectblend": NamedDataset(
        "mlabonne/open-perfectblend", "training", fields={"conversations": "conversations"}
    ),
    "gsm8k": NamedDataset(
        "openai/gsm8k", "math", config="main", split="test", rows=500, wordings=_prompt("{question}" + STEPS)
    ),
    "math500": NamedDataset(
        "HuggingFaceH4/MATH-500", "math", split="test", rows=500, wordings=_prompt("{problem}" + STEPS)
    ),
    "aime25": NamedDataset("MathArena/aime_2025", "math", rows=30, wordings=_prompt("{problem}" + STEPS)),
    "humaneval": NamedDataset(
        "openai/openai_humaneval",
        "code",
        split="test",
        rows=164,
        wordings=_prompt(
            "Write a solution to the following problem and make sure that it passes the tests:\n"
            "```python\n{prompt}\n```"
        ),
    ),
    "mbpp": NamedDataset(
        "google-research-datasets/mbpp",
        "code",
        config="sanitized",
        split="test",
        rows=256,
        wordings=_prompt("{prompt}"),
    ),
    "livecodebench": NamedDataset(
        "livecodebench/code_generation_lite",
        "code",
        files=("test.jsonl", *(f"test{i}.jsonl" for i in range(2, 7))),
        rows=500,
        wordings=(("starter_code", _CODE_TASK + _STARTER_CODE), ("", _CODE_TASK + _PLACEHOLDER)),
    ),
    "mt-bench": NamedDataset("HuggingFaceH4/mt_bench_prompts", "chat", rows=80, fields={"turns": "prompt"}),
    "alpaca": NamedDataset(
        "tatsu-lab/alpaca",
        "chat",
        rows=500,
        wordings=(("input", "{instruction}\n\nInput:\n{input}"), ("", "{instruction}")),
    ),
    "arena-hard-v2": NamedDataset(
        "lmarena-ai/arena-hard-auto",
        "chat",
        files=("data/arena-hard-v2.0/question.jsonl",),
        rows=500,
        wordings=_prompt("{prompt}"),
    ),
}


def worded(source: NamedDataset, row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The row's fields as `source` words them. Raises DataError if a column is missing or not text."""
    missing = [column for column in source.columns if column not in row]
    if missing:
        raise DataError(
            f"no column '{missing[0]}'; found {', '.join(map(repr, list(row)[:8]))}",
            where=where,
            next_step=f"expected a copy of {source.repo} ({source.place})",
        )
    made = {name: row[column] for name, column in source.fields.items()}
    for column, template in source.wordings:
        if column and not row[column]:
            continue
        for _, name, _, _ in Formatter().parse(template):
            if name and not isinstance(row[name], str):
                raise DataError(f"column '{name}' is not text: {row[name]!r}"[:200], where=where)
        made["prompt"] = template.format_map(row)
        break
    return made
