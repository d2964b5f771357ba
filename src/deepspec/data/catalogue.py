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

from deepspec.data.formats import WITH_INPUT
from deepspec.errors import DataError

STEPS = "\nPlease reason step by step, and put your final answer within \\boxed{{}}."

_PYTHON_TASK = (
    "Write a solution to the following problem and make sure that it passes the tests:\n"
    "```python\n{prompt}\n```"
)
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
    column. `prompt`: the prompt's template, which names columns in braces. `variant`: (column, template),
    the template to use instead if that column is not empty.
    """

    repo: str
    config: str | None = None
    split: str = "train"
    files: tuple[str, ...] = ()
    rows: int | None = None
    fields: Mapping[str, str] = field(default_factory=dict)
    prompt: str = ""
    variant: tuple[str, str] = ("", "")

    @property
    def columns(self) -> tuple[str, ...]:
        """Every column that is read, each once."""
        column, template = self.variant
        used = (*self.fields.values(), *_columns_of(template), *_columns_of(self.prompt), column)
        return tuple(dict.fromkeys(filter(None, used)))

    @property
    def place(self) -> str:
        """Config and split, or the files, as the documentation and error messages name them."""
        return ", ".join(self.files or filter(None, (self.config, self.split)))


DATASETS: dict[str, NamedDataset] = {
    "open-perfectblend": NamedDataset(
        "mlabonne/open-perfectblend", fields={"conversations": "conversations"}
    ),
    "gsm8k": NamedDataset("openai/gsm8k", "main", "test", rows=500, prompt="{question}" + STEPS),
    "math500": NamedDataset("HuggingFaceH4/MATH-500", split="test", rows=500, prompt="{problem}" + STEPS),
    "aime25": NamedDataset("MathArena/aime_2025", rows=30, prompt="{problem}" + STEPS),
    "humaneval": NamedDataset("openai/openai_humaneval", split="test", rows=164, prompt=_PYTHON_TASK),
    "mbpp": NamedDataset("google-research-datasets/mbpp", "sanitized", "test", rows=256, prompt="{prompt}"),
    "livecodebench": NamedDataset(
        "livecodebench/code_generation_lite",
        files=("test.jsonl", *(f"test{i}.jsonl" for i in range(2, 7))),
        rows=500,
        prompt=_CODE_TASK + _PLACEHOLDER,
        variant=("starter_code", _CODE_TASK + _STARTER_CODE),
    ),
    "mt-bench": NamedDataset("HuggingFaceH4/mt_bench_prompts", rows=80, fields={"turns": "prompt"}),
    "alpaca": NamedDataset(
        "tatsu-lab/alpaca",
        rows=500,
        prompt="{instruction}",
        variant=("input", WITH_INPUT),
    ),
    "arena-hard-v2": NamedDataset(
        "lmarena-ai/arena-hard-auto",
        files=("data/arena-hard-v2.0/question.jsonl",),
        rows=500,
        prompt="{prompt}",
    ),
}


def worded(source: NamedDataset, row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The row's fields as `source` words them. Raises DataError if a column is missing or not text."""
    if missing := [column for column in source.columns if column not in row]:
        raise DataError(
            f"no column '{missing[0]}'; found {', '.join(map(repr, list(row)[:8]))}",
            where=where,
            next_step=f"expected a copy of {source.repo} ({source.place})",
        )
    made = {name: row[column] for name, column in source.fields.items()}
    column, variant = source.variant
    template = variant if column and row[column] else source.prompt
    for name in _columns_of(template):
        if not isinstance(row[name], str):
            raise DataError(f"column '{name}' is not text: {row[name]!r}"[:200], where=where)
    return {**made, "prompt": template.format_map(row)} if template else made


def _columns_of(template: str) -> list[str]:
    return [name for _, name, _, _ in Formatter().parse(template) if name]
