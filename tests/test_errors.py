from __future__ import annotations

import pytest

from deepspec.errors import (
    CheckpointError,
    DataError,
    MismatchError,
    RecipeError,
    TargetError,
    UserError,
    nearest,
)


def test_all_three_parts_are_printed_in_order():
    error = UserError("no answer in line 3", where="chats.jsonl:3", next_step="add an assistant turn")
    assert str(error) == "no answer in line 3\n  where: chats.jsonl:3\n  next: add an assistant turn"


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ({}, "what"),
        ({"where": "here"}, "what\n  where: here"),
        ({"next_step": "do this"}, "what\n  next: do this"),
    ],
)
def test_unknown_parts_leave_no_empty_line(parts, expected):
    assert str(UserError("what", **parts)) == expected


@pytest.mark.parametrize("kind", [RecipeError, DataError, CheckpointError, TargetError, MismatchError])
def test_one_except_clause_catches_every_kind(kind):
    with pytest.raises(UserError, match="what"):
        raise kind("what")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("max_step", "max_steps"),
        ("MAX_STEPS", "max_steps"),  # letter case must not hide a match
        ("qwen3-4b", "Qwen3-4B"),
        ("zzz", None),
    ],
)
def test_nearest_names_a_likely_slip_and_nothing_far_fetched(name, expected):
    assert nearest(name, ["max_steps", "max_minutes", "Qwen3-4B"]) == expected


def test_nearest_of_nothing_is_none():
    assert nearest("a", []) is None
