"""The conditions under which a target answers: thinking, chat template, system prompt, tokenizer, sampling.

A draft learns what its target says under some conditions; under others fewer of its tokens are accepted.
Answered rows, checkpoints and results files record them under the keys of `Conditions`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

UNRECORDED = "not recorded"
SEVERAL = "several"
"""In place of a value that the rows of a file do not share."""
SWITCHES = ("enable_thinking", "thinking", "reasoning", "enable_reasoning")
"""What templates call the variable that switches thinking on and off: Qwen3 and Gemma-4, DeepSeek-V3.1 and
Granite, Command-A, and others."""
LABELS = {"thinking": "thinking", "template_hash": "chat template", "system_prompt": "system prompt"}
"""The conditions that a draft must be trained and used under alike, and their names in messages."""


@dataclass(frozen=True)
class Conditions:
    """What the target's words depend on besides the prompt. Hashes are SHA-256 in hex."""

    thinking: bool | str | None = UNRECORDED
    template_hash: str | None = UNRECORDED
    """None: a server used its own template, which is not known here."""
    system_prompt: str | None = UNRECORDED
    """Hash of its text. None: there was no system prompt."""
    tokenizer_hash: str | None = UNRECORDED
    sampling: Mapping[str, float] | str | None = UNRECORDED
    """`temperature`, `top_k` and `top_p`."""

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> Conditions:
        """The conditions that an answered row, a `deepspec.json` or a results file records."""
        return cls(**{f.name: record[f.name] for f in fields(cls) if f.name in record})

    def record(self) -> dict[str, Any]:
        """The recorded conditions by key, as the files hold them."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) != UNRECORDED}

    def shared(self, other: Conditions) -> Conditions:
        """The conditions of both together: each value that they share, SEVERAL for each other."""
        pairs = ((f.name, getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return Conditions(**{name: one if one == two else SEVERAL for name, one, two in pairs})


def differences(one: str, have: Conditions, other: str, want: Conditions) -> list[str]:
    """A sentence for each of LABELS that both sides record and that differs (`contrast`).

    None counts as not recorded, except for the system prompt.
    """
    sentences = []
    for key, label in LABELS.items():
        a, b = getattr(have, key), getattr(want, key)
        unknown = (UNRECORDED,) if key == "system_prompt" else (UNRECORDED, None)
        if a != b and a not in unknown and b not in unknown:
            sentences.append(contrast(label, one, a, other, b))
    return sentences


def contrast(label: str, one: str, a: Any, other: str, b: Any) -> str:
    """Such as "answers.jsonl was answered with thinking, but the recipe trains without thinking"."""
    return f"{one} {_phrase(label, a)}, but {other} {_phrase(label, b)}"


def _phrase(label: str, value: Any) -> str:
    if value is None or isinstance(value, bool):
        return f"{'with' if value else 'without'} {label}"
    text = str(value)
    return f"with {label} {text[:12] if len(text) == 64 else text}"
