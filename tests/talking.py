"""A tiny random Llama that has a tokenizer and a chat template, a recipe for its drafts, their training."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from conftest import llama, save_tiny
from deepspec.config import Recipe
from deepspec.data.tokens import Encoded
from deepspec.features.batches import Source, online
from deepspec.targets import Target
from deepspec.train.build import build_draft
from deepspec.train.loop import Outcome, train
from deepspec.train.run import Run

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>"]
TEMPLATE = (
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is false %}{{ '<think></think>' }}{%- endif %}{%- endif %}"
)


def save_talking_llama(path: Path) -> Path:
    """Weights, tokenizer (one token per byte) and template, as `save_pretrained` writes them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_only = models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[])
    tokenizer = Tokenizer(bytes_only)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=TEMPLATE,
    )

    save_tiny(lambda: llama(len(fast)), path)
    fast.save_pretrained(path)
    return path


def write_rows(path: Path, rows: Sequence[tuple[str, str | None]]) -> Path:
    """(question, answer or None) pairs as JSONL."""
    with path.open("w", encoding="utf-8") as file:
        for i, (question, answer) in enumerate(rows):
            messages = [{"role": "user", "content": question}]
            if answer is not None:
                messages.append({"role": "assistant", "content": answer})
            row = {"id": f"r{i}", "domain": ("math", "chat")[i % 2], "messages": messages}
            file.write(json.dumps(row) + "\n")
    return path


def recipe_tree(target: Path, folder: Path, algorithm: str, **optim: Any) -> dict[str, Any]:
    """A small recipe over `answers.jsonl` and `select.jsonl` in `folder`."""
    deep = algorithm != "eagle3"
    draft: dict[str, Any] = {"num_layers": 2 if deep else 1, "block": 4, "target_layer_ids": [0, 1, 2]}
    loss: dict[str, Any] = {"ce": 1.0}
    if algorithm == "dspark":
        draft |= {"markov_rank": 8, "confidence": True}
        loss |= {"l1": 0.5, "confidence": 1.0}
    return {
        "name": f"tiny-{algorithm}",
        "algorithm": algorithm,
        "target": str(target),
        "draft": draft,
        "loss": loss,
        "data": {"train": str(folder / "answers.jsonl"), "select": str(folder / "select.jsonl")},
        "optim": {"lr": 1e-2, "batch_size": 4, "max_steps": 4, **optim},
        "num_anchors": 8,
        "eval_every_steps": 2,
        "eval_prompts": 2,
        "eval_max_new_tokens": 3,
        "checkpoint_every_steps": 2,
        "trackers": ["none"],
    }


def write_recipe(path: Path, tree: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(tree), "utf-8")
    return path


def write_data(folder: Path) -> None:
    """answers.jsonl to train on, select.jsonl to choose by, prompts.jsonl to report."""
    words = ["red", "green", "blue", "one", "two", "three", "up", "down", "left", "right"]
    write_rows(folder / "answers.jsonl", [(f"say {w}", f"{w} {w} and {w}") for w in words])
    write_rows(folder / "select.jsonl", [("say four", None), ("say five", None)])
    write_rows(folder / "prompts.jsonl", [("say yellow", None), ("say six", None), ("say in", None)])


def train_in(
    folder: Path,
    recipe: Recipe,
    target: Target,
    rows: Sequence[Encoded],
    held_out: Callable[[Any], float] | None = None,
    source: Source | None = None,
    **facts: Any,
) -> Outcome:
    """Train a recipe's draft on rows that are at hand, in a folder of that name or on from what it holds."""
    draft = build_draft(recipe, target, rows)
    source = source or online(target, draft.feature_layers)
    return train(Run(folder, recipe), draft, target, rows, source, facts, held_out)
