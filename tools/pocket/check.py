"""Measure the pocket target on held-out examples: correct arithmetic, code that parses, loss, and samples.

Arithmetic problems are newly drawn, and kept only if the corpus holds them out. Functions and documentation
are the held-out share of this Python's library. All answers are greedy.
"""

from __future__ import annotations

import ast
import hashlib
import itertools
import re
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from deepspec.data.tokens import prompt_ids, require_tokenizer
from deepspec.decode.engine import Decoder, Request
from deepspec.log import progress
from deepspec.targets import Target
from tools.pocket import arithmetic, corpus
from tools.pocket.build import BuildSettings

ROWS = 32
PROBLEM_SEED = 987_654_321
"""This seed differs from those of the training text and of the packaged prompts."""
ANSWER_TOKENS = {"math": 160, "code": 320, "chat": 200}
LOSS_EXAMPLES = 96
"""The number of examples per domain for the loss."""
SAMPLES = 2
"""The number of samples per domain: the first ones, not the best ones."""


def held_out(problems: int, functions: int) -> dict[str, list[corpus.Example]]:
    """Held-out examples by domain: new problems, and library examples in the order of a hash."""

    def by_hash(example: corpus.Example) -> bytes:
        return hashlib.sha256(example.question.encode()).digest()

    fresh = {e.question: e for e in itertools.islice(_fresh_problems(), problems)}
    code = [e for e in corpus.code_examples() if e.held_out and '"""' in e.question]
    chat = [e for e in corpus.chat_examples() if e.held_out]
    longest = BuildSettings().longest_document * 4  # characters; no longer text was in the training set
    return {
        "math": list(fresh.values()),
        "code": sorted((e for e in code if len(e.question) < longest), key=by_hash)[:functions],
        "chat": sorted(chat, key=by_hash)[:LOSS_EXAMPLES],
    }


def _fresh_problems() -> Any:
    seen: set[str] = set()
    for example in corpus.math_examples(PROBLEM_SEED):
        if example.held_out and example.question not in seen:
            seen.add(example.question)
            yield example


def check(model: str = "pocket", *, problems: int = 200, functions: int = 100) -> dict[str, Any]:
    """Measure a target on the pocket's held-out examples.

    Returns {"model", "corpus_hash", "shares": {measure: {"share", "of"}}, "loss": {domain: {"plain",
    "thinking"}} in nats per answer token, "samples": [{"domain", "thinking", "question", "answer"}]}.
    Raises TargetError for a model that cannot be loaded or has no tokenizer.
    """
    target = Target.from_pretrained(model)
    require_tokenizer(target.tokenizer, model)
    examples = held_out(problems, functions)
    math, code, chat = (examples[domain] for domain in corpus.DOMAINS)
    solved = answers(target, math, thinking=False)
    thought = answers(target, math, thinking=True)
    written = answers(target, code, thinking=False)
    told = answers(target, chat[:SAMPLES], thinking=False)
    right = [e.answer for e in math]

    def shown(some: Sequence[corpus.Example], given: Sequence[str], thinking: bool) -> list[dict[str, Any]]:
        return [
            {"domain": e.domain, "thinking": thinking, "question": e.question, "answer": answer}
            for e, answer in list(zip(some[:SAMPLES], given[:SAMPLES], strict=True))
        ]

    return {
        "model": model,
        "corpus_hash": corpus.corpus_hash(),
        "shares": {
            "arithmetic answers exactly right": _share(_correct(solved, right)),
            "arithmetic answers exactly right, thinking": _share(_correct(thought, right)),
            "code answers that parse": _share([parses(answer) for answer in written]),
        },
        "loss": {
            domain: {
                "plain": loss(target, some[:LOSS_EXAMPLES], thinking=False),
                "thinking": loss(target, some[:LOSS_EXAMPLES], thinking=True),
            }
            for domain, some in examples.items()
        },
        "samples": [
            *shown(math, solved, False),
            *shown(math, thought, True),
            *shown(code, written, False),
            *shown(chat, told, False),
        ],
    }


def _correct(given: Sequence[str], right: Sequence[str]) -> list[bool]:
    results = [(arithmetic.result_of(a), arithmetic.result_of(b)) for a, b in zip(given, right, strict=True)]
    return [ours is not None and ours == theirs for ours, theirs in results]


def _share(found: Sequence[bool]) -> dict[str, float]:
    return {"share": sum(found) / len(found), "of": len(found)}


def parses(answer: str) -> bool:
    """Whether the answer's first code block exists, is closed, is not empty, and is valid Python."""
    block = re.search(r"```python\n(.*?)\n?```", answer, re.DOTALL)
    if block is None or not block.group(1).strip():
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a strange escape in generated text does not matter here
            ast.parse(block.group(1))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def answers(target: Target, examples: Sequence[corpus.Example], *, thinking: bool) -> list[str]:
    """Greedy answers, in the order of the examples."""
    tokenizer: Any = target.tokenizer
    decoder = Decoder(target, None, max_rows=min(ROWS, len(examples)))
    requests = [
        Request(
            prompt_ids(tokenizer, [{"role": "user", "content": e.question}], thinking),
            ANSWER_TOKENS[e.domain],
            key=str(i),
            stop_token_ids=target.stop_token_ids,
        )
        for i, e in enumerate(examples)
    ]
    found: dict[int, str] = {}
    mode = "thinking" if thinking else "plain"
    with progress(f"{examples[0].domain}, {mode}", len(requests)) as bar:
        # Rows of similar length are decoded together, which saves padded steps.
        for answer in decoder.run(sorted(requests, key=lambda r: len(r.input_ids))):
            ids = answer.token_ids[: -1 if answer.stopped else None]
            found[int(answer.key)] = tokenizer.decode(ids).strip()
            bar.update(1)
    return [found[i] for i in range(len(examples))]


def loss(target: Target, examples: Sequence[corpus.Example], *, thinking: bool) -> float:
    """Mean nats per answer token, with the end of the turn, and with the thoughts if thinking is on."""
    tokenizer: Any = target.tokenizer
    rows = []
    for example in examples:
        prompt = prompt_ids(tokenizer, [{"role": "user", "content": example.question}], thinking)
        text = example.answer
        if thinking:
            # The generation prompt has already opened the think block.
            text = f"{example.thought}\n</think>\n\n{example.thoughtful_answer}"
        answer = tokenizer(text + "<|im_end|>", add_special_tokens=False)["input_ids"]
        rows.append((prompt, answer))
    rows.sort(key=lambda row: len(row[0]) + len(row[1]))
    nats, tokens = 0.0, 0
    for start in range(0, len(rows), ROWS):
        group = rows[start : start + ROWS]
        width = max(len(prompt) + len(answer) for prompt, answer in group)
        ids = torch.zeros(len(group), width, dtype=torch.long)
        answered = torch.zeros(len(group), width, dtype=torch.bool)
        for i, (prompt, answer) in enumerate(group):
            ids[i, : len(prompt) + len(answer)] = torch.tensor([*prompt, *answer])
            answered[i, len(prompt) : len(prompt) + len(answer)] = True
        hidden = target.read(ids, ()).last_hidden[:, :-1][answered[:, 1:].to(target.device)]
        labels = ids[:, 1:][answered[:, 1:]].to(target.device)
        logits = target.logits(hidden).float()
        nats += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
        tokens += len(labels)
    return nats / tokens
