"""Mistral-, Llama-2-, gpt-oss- and DeepSeek-V3.1-style targets from rows to results, with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from conftest import llama, save_tiny
from deepspec.cli import app
from deepspec.data.conversations import read_conversations
from deepspec.data.tokens import encode_turns, prompt_ids
from deepspec.report.results import read_results
from talking import recipe_tree, write_recipe, write_rows
from templates import DEEPSEEK, HARMONY, LLAMA2, MISTRAL, tokenizer_for

STYLES = {
    "mistral": (MISTRAL, "metaspace first", ["▁Pear", "."], "</s>"),
    "llama-2": (LLAMA2, "prepend", ["▁", "Pear", "."], "</s>"),
    "gpt-oss": (HARMONY, "tiktoken", ["<|channel|>", *"final", "<|message|>", "Pear", "."], "<|return|>"),
    "deepseek-v3.1": (DEEPSEEK, "byte-level", ["Pear", "."], tokenizer_for(DEEPSEEK).eos_token),
}
"""The template, the way to split text, the tokens of the answer "Pear." without the white space after it, and
the end of turn."""


def good(*words: Any) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result.stdout


def save(folder: Path, style: str) -> Path:
    template, family, *_ = STYLES[style]
    tokenizer = tokenizer_for(template, family)
    save_tiny(lambda: llama(len(tokenizer)), folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("style", STYLES)
def test_from_rows_to_results(tmp_path: Path, style: str) -> None:
    target = save(tmp_path / "target", style)
    tokenizer = tokenizer_for(*STYLES[style][:2])
    *_, answer, end = STYLES[style]

    # Answers given as text.
    texts = write_rows(tmp_path / "texts.jsonl", [("A fruit?", "Pear."), ("A tree?", "An oak.")])
    found = json.loads(good("data", "inspect", texts, "--target", target, "--json"))
    assert (found["rows"], found["sequences"], found["refused"]) == (2, 2, 0)
    (first,) = encode_turns(tokenizer, next(read_conversations(texts)), False)
    tokens = tokenizer.convert_ids_to_tokens(
        [i for i, on in zip(first.ids, first.loss_mask, strict=True) if on]
    )
    assert [*tokens[: len(answer)], tokens[-1]] == [*answer, end]
    text = tokenizer.apply_chat_template([*next(read_conversations(texts)).messages], tokenize=False)
    assert first.ids == tokenizer(text, add_special_tokens=False)["input_ids"]

    # Answers by the target itself.
    prompts = write_rows(
        tmp_path / "prompts.jsonl", [("A fruit?", None), ("A tree?", None), ("A bird?", None)]
    )
    answers = tmp_path / "answers.jsonl"
    words = ("--target", target, "--max-new-tokens", 6)
    assert "3 new answers" in good("data", "regenerate", prompts, "--out", answers, *words)
    for row in read_conversations(answers):
        prompt = prompt_ids(tokenizer, row.messages[:1], False)
        (sequence,) = encode_turns(tokenizer, row, False)
        assert sequence.ids == [*prompt, *row.meta["answer_ids"]]
        assert sequence.loss_mask == [0] * len(prompt) + [1] * len(row.meta["answer_ids"])

    # A draft from both, measured on the target.
    with answers.open("a", encoding="utf-8") as file:
        file.write(texts.read_text("utf-8").replace('"id": "r', '"id": "t'))
    write_rows(tmp_path / "select.jsonl", [("A fish?", None)])
    tree = recipe_tree(target, tmp_path, "eagle3", max_steps=1, batch_size=2)
    tree |= {"eval_every_steps": 1, "checkpoint_every_steps": 1, "eval_prompts": 1}
    good("train", write_recipe(tmp_path / "eagle3.yaml", tree), "--runs", tmp_path / "runs")
    best = tmp_path / "runs" / "tiny-eagle3"
    out = tmp_path / "results.json"
    good(
        "eval", "--target", target, "--draft", best, "--prompts", prompts, "--out", out, "--max-new-tokens", 6
    )
    (drafted,) = (row for row in read_results(out)[0]["rows"] if row["algorithm"] == "eagle3")
    assert drafted["lossless"] == {"identical": 3, "prompts": 3, "near_ties": 0}
